#!/usr/bin/env bash
# Runs all tests, one package at a time (they share one machine's namespaces and cores), and the race detector over the
# rooms whose tests start no other program of ours. Arguments go to go test.
set -euo pipefail
cd "$(dirname "$0")/.."
out=$(mktemp)
trap 'rm -f "$out"' EXIT
fail=0
go test -p 1 -count=1 -timeout 20m "$@" ./... 2>&1 | tee "$out" || fail=1
# The race detector needs a C compiler.
CGO_ENABLED=1 go test -race -short -count=1 -timeout 15m \
  ./access ./ca ./contract ./identity ./ledger ./node ./reconcile ./schedule ./seal ./store ./gateway 2>&1 | tee -a "$out" || fail=1
echo "the slowest packages:"
grep -E '^ok' "$out" | awk '{t=$3; sub(/s$/,"",t); print t, $2}' | sort -rn | head -10 | sed 's/^/  /'
passed=$(grep -cE '^ok' "$out" || true)
failed=$(grep -cE '^FAIL[[:space:]]+holdfast' "$out" || true)
echo "$passed passed, $failed failed"
exit $fail
