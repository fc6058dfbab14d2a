#!/usr/bin/env bash
# Runs all tests. One package at a time, since they share one machine's namespaces and cores; then the lab, which mostly
# waits, beside the race detector over the rooms whose tests start no other program of ours. Arguments go to go test.
set -euo pipefail
cd "$(dirname "$0")/.."
out=$(mktemp) lab=$(mktemp)
trap 'rm -f "$out" "$lab"' EXIT
fail=0
mapfile -t rooms < <(go list ./... | grep -v '/internal/lab$')
go test -p 1 -count=1 -timeout 20m "$@" "${rooms[@]}" 2>&1 | tee "$out" || fail=1
go test -count=1 -timeout 20m "$@" ./internal/lab > "$lab" 2>&1 &
waiting=$!
# The race detector needs a C compiler. Left out: what is slow on purpose (a passphrase) and what measures memory.
CGO_ENABLED=1 go test -race -short -count=1 -timeout 15m -skip "TestKeyFile|TestHostileInputTakesLittleMemory|TestMemory" \
  ./access ./ca ./contract ./disperse ./gateway ./identity ./ledger ./node ./reconcile ./schedule ./seal ./store ./store/location 2>&1 | tee -a "$out" || fail=1
wait "$waiting" || fail=1
tee -a "$out" < "$lab"
echo "the slowest packages:"
grep -E '^ok' "$out" | awk '{t=$3; sub(/s$/,"",t); print t, $2}' | sort -rn | head -10 | sed 's/^/  /'
passed=$(grep -cE '^ok' "$out" || true)
failed=$(grep -cE '^FAIL[[:space:]]+holdfast' "$out" || true)
echo "$passed passed, $failed failed"
exit $fail
