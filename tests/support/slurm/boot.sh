#!/usr/bin/env bash
# Starts one machine of the cluster that up.sh laid out: boot.sh FOLDER login|n1|n2
# Its processes are in a pid namespace: when its guard is ended, all of them are. Then boot it again.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
lab=$(realpath -m "$1") name=$2
netns=/run/netns/$(basename "$lab")-$name
# no $() in this command: its process would be taken for the child that is looked for below
setsid nsenter --net="$netns" \
  unshare --uts --ipc --mount --pid --fork --kill-child=KILL --mount-proc \
  bash "$here/node_init.sh" "$lab" "$name" </dev/null >"$lab/log/init-$name.log" 2>&1 &
guard=$!
init=""
for _ in $(seq 100); do
  init=$(cat "/proc/$guard/task/$guard/children")
  [[ -z $init ]] || break
  sleep 0.05
done
[[ -n $init ]] || {
  echo "boot.sh: $name did not start" >&2
  exit 1
}
# with the start time, so that down.sh never ends a stranger with the same number
echo "$guard $(sed 's/.*) //' "/proc/$guard/stat" | cut -d' ' -f20)" >"$lab/pid/guard-$name"
echo "${init% }" >"$lab/pid/init-$name.pid"
