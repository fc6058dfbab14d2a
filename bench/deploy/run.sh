#!/usr/bin/env bash
# bench/deploy: what a user waits for. --quick takes under a minute. Needs bin/holdfast (make build).
set -euo pipefail
cd "$(dirname "$0")/../.."
exec go run ./bench/deploy "$@"
