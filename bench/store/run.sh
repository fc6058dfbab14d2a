#!/usr/bin/env bash
# bench/store: holdfast beside MinIO and versitygw as S3 servers. --quick takes under a minute. Needs bin/holdfast (make build).
set -euo pipefail
cd "$(dirname "$0")/../.."
export GOTOOLCHAIN=local CGO_ENABLED=0
# The peers take minutes to compile, and change with their modules only.
[ bin/minio -nt bench/peers/minio/go.sum ] || { (cd bench/peers/minio && go build -trimpath -ldflags "-s -w" -o ../../../bin/minio github.com/minio/minio) && touch bin/minio; }
make -s bin/versitygw
(cd bench/store && go build -trimpath -o ../../bin/bench-store . && go build -trimpath -o ../../bin/bench-front ./front)
exec bin/bench-store "$@"
