#!/usr/bin/env bash
# Installs what building, running and testing need and this machine does not have. It is safe to run again and again.
# "setup.sh test" also brings what only tests use.
set -euo pipefail
cd "$(dirname "$0")/.."

command -v go >/dev/null || { echo "setup: Go 1.26 or later must be on the PATH" >&2; exit 1; }
go version | grep -Eq 'go1\.(2[6-9]|[3-9][0-9])' || { echo "setup: $(go version): Go 1.26 or later is needed" >&2; exit 1; }
[ "$(id -u)" = 0 ] || { echo "setup: run as root: a grid makes namespaces and mounts" >&2; exit 1; }

need=()
have() { command -v "$1" >/dev/null 2>&1 || need+=("$2"); }
have curl curl
have git git
have dpkg-deb dpkg
if [ "${1:-}" = test ]; then
  have ip iproute2
  have nmap nmap
  have tcpdump tcpdump
  have nsenter util-linux
  have mkfs.ext4 e2fsprogs
  have qemu-system-x86_64 qemu-system-x86
  have busybox busybox-static
  # S3 clients. Debian's, not what else may be on the PATH: tests run them with PATH=/usr/bin:/bin.
  have /usr/bin/aws awscli
  have /usr/bin/s3cmd s3cmd
  have /usr/bin/rclone rclone
  have /usr/bin/restic restic
  [ -e /usr/lib/python3/dist-packages/boto3 ] || need+=(python3-boto3)
fi
[ -e /etc/ssl/certs/ca-certificates.crt ] || need+=(ca-certificates)
if [ ${#need[@]} -gt 0 ]; then
  echo "setup: installing ${need[*]}"
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${need[@]}" >/dev/null
fi
for m in fuse tun loop overlay ext4; do
  modprobe -q "$m" 2>/dev/null || true # built in on many machines; holdfast doctor says what is missing
done
