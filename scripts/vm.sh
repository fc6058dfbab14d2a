#!/usr/bin/env bash
# Boots a node once, unattended: builds its image, starts a grid without nodes, boots the image in an emulated machine, admits
# it, deploys PocketBase on it, pulls its plug, boots it again and asks for what was written. Leaves nothing. Exits 0 if all of
# that came about. "vm.sh keep" leaves grid and machine running instead, and says how to look at them.
set -euo pipefail
cd "$(dirname "$0")/.."
export HOLDFAST_DIR=${VM_DIR:-$(mktemp -d /tmp/holdfast-vm.XXXXXX)/grid}
listen=${VM_LISTEN:-127.0.0.1:18443}
top=$(dirname "$HOLDFAST_DIR")
h=$PWD/bin/holdfast machine=
say() { printf '%4ds  %s\n' "$SECONDS" "$*"; }
cut() { [ -z "$machine" ] || { kill -9 "$machine" 2>/dev/null || true; wait "$machine" 2>/dev/null || true; machine=; }; }
end() {
  code=$?
  [ $code = 0 ] || { echo "the machine's console:"; tail -40 "$top/console"; "$h" status || true; } >&2
  cut
  "$h" down --data >/dev/null 2>&1 || true
  rm -rf "$top"
  exit $code
}
trap end EXIT
trap 'exit 130' INT TERM
# until WHAT COMMAND...: tries it once a second, for three minutes.
until_() {
  for _ in $(seq 180); do
    if "${@:2}" >/dev/null 2>&1; then return; fi
    if [ -n "$machine" ] && ! kill -0 "$machine" 2>/dev/null; then echo "the machine ended" >&2; exit 1; fi
    sleep 1
  done
  echo "$1 did not come within three minutes" >&2
  exit 1
}
boot() {
  "$h" image run bin/image --qemu --disk "$top/disk.img" >> "$top/console" 2>&1 &
  machine=$!
}
ask() { curl -sS --fail --max-time 10 --cacert "$top/ca.pem" --connect-to "pocketbase.localhost:443:$listen" "$@"; }
id() { grep -o 'waits to be approved.* node=node1[a-z0-9]*' "$top/console" | grep -o 'node1[a-z0-9]*' | tail -1; }

"$h" image build --out bin/image
say "an image"
"$h" up --nodes 0 --detach --listen "$listen" >/dev/null
say "a grid: a validator and a gateway as processes, no node"
boot
until_ "the machine's ID on its console" id
say "a machine that booted it asks to become a node: $(id)"
until_ "its wish" bash -c "'$h' node list --pending --json | grep -q '$(id)'"
"$h" node approve "$(id)" --yes
"$h" deploy examples/pocketbase/compose.yaml --yes --wait --timeout 170s
"$h" ca > "$top/ca.pem"
until_ "an answer" ask https://pocketbase.localhost/api/health
say "PocketBase answers through the gateway: $(ask https://pocketbase.localhost/api/health)"
if [ "${1:-}" = keep ]; then
  trap - EXIT
  echo "left running: process $machine, console in $top/console; HOLDFAST_DIR=$HOLDFAST_DIR $h status"
  echo "to end it: kill $machine; HOLDFAST_DIR=$HOLDFAST_DIR $h down --data; rm -r $top"
  exit 0
fi
cut
say "its plug is pulled"
boot
say "it boots again, with the disk that it had"
until_ "an answer after the power cut" ask https://pocketbase.localhost/api/health
say "PocketBase answers again: $(ask https://pocketbase.localhost/api/health)"
