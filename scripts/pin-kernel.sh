#!/usr/bin/env bash
# Pins the kernel that Debian 12 has now: writes machine/image/kernel.json and shows what changed. apt verifies the archive's
# signatures with Debian's keys, in directories of its own: this machine's sources, packages and lists are neither used nor
# changed. Review the change, build holdfast again, and then the image. The argument is a mirror.
set -euo pipefail
cd "$(dirname "$0")/.."
mirror=${1:-http://deb.debian.org}
keys=/usr/share/keyrings/debian-archive-keyring.gpg
pin=machine/image/kernel.json
die() { echo "pin-kernel: $*" >&2; exit 1; }
command -v apt-get >/dev/null || die "apt-get is missing: run it on Debian, or in a container of it"
[ -e "$keys" ] || die "$keys is missing: install debian-archive-keyring"
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
mkdir -p "$tmp"/lists/partial "$tmp"/cache/archives/partial
: > "$tmp/status"
cat > "$tmp/sources.list" <<SOURCES
deb [arch=amd64 signed-by=$keys] $mirror/debian bookworm main
deb [arch=amd64 signed-by=$keys] $mirror/debian-security bookworm-security main
SOURCES
chmod 755 "$tmp" # apt reads it as a user of its own
[ "$(id -u)" != 0 ] || chown -R _apt "$tmp"
apt() {
  local tool=$1
  shift
  "$tool" -q -o APT::Architecture=amd64 -o Dir::Etc::SourceList="$tmp/sources.list" -o Dir::Etc::SourceParts=/dev/null -o Dir::Etc::Preferences=/dev/null \
    -o Dir::Etc::PreferencesParts=/dev/null -o Dir::Etc::Trusted=/dev/null -o Dir::Etc::TrustedParts=/dev/null -o Dir::State="$tmp" -o Dir::State::Lists="$tmp/lists" \
    -o Dir::State::Status="$tmp/status" -o Dir::Cache="$tmp/cache" -o APT::Get::AllowUnauthenticated=false -o Acquire::AllowInsecureRepositories=false "$@"
}
apt apt-get update -o APT::Update::Error-Mode=any >&2
# The metapackage names the kernel that is supported now.
package=$(apt apt-cache show --no-all-versions linux-image-cloud-amd64 | sed -n 's/^Depends: \(linux-image-[^ ,]*\).*/\1/p')
[ -n "$package" ] || die "linux-image-cloud-amd64 names no kernel"
record=$(apt apt-cache show --no-all-versions "$package")
field() { sed -n "s/^$1: //p" <<<"$record"; }
version=$(field Version) size=$(field Size) sha256=$(field SHA256) file=$(field Filename)
# Which of the two archives has that file.
uri=$(cd "$tmp" && apt apt-get download --print-uris "$package=$version" | sed -n "s/^'\([^']*\)'.*/\1/p")
path=${uri#"$mirror"/}
[[ $path == debian*/"$file" && $size =~ ^[0-9]+$ && $sha256 =~ ^[0-9a-f]{64}$ && $version =~ ^[0-9A-Za-z.+~-]+$ ]] ||
  die "apt's answer makes no sense: $package $version $size $sha256 $uri"
cat > "$tmp/kernel.json" <<JSON
{
  "package": "$package",
  "version": "$version",
  "path": "$path",
  "size": $size,
  "sha256": "$sha256"
}
JSON
if cmp -s "$tmp/kernel.json" "$pin"; then
  echo "$pin is up to date: $package $version"
  exit 0
fi
diff -u --label "pinned until now" --label "pinned now" "$pin" "$tmp/kernel.json" || true
cat "$tmp/kernel.json" > "$pin"
echo "wrote $pin: review it, then make image"
