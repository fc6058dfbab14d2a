#!/usr/bin/env bash
# Runs every fuzz target for a while.
set -euo pipefail
cd "$(dirname "$0")/.."
time=${1:-20s}
grep -rlE '^func Fuzz' --include=*_test.go . | while read -r f; do
  dir=$(dirname "$f")
  for t in $(grep -oE '^func Fuzz[A-Za-z0-9_]+' "$f" | sed 's/func //'); do
    echo "== $dir $t"
    # A large input takes minutes to minimise: a few tries are enough.
    go test "./$dir" -run '^$' -fuzz "^$t\$" -fuzztime "$time" -fuzzminimizetime 5x
  done
done
