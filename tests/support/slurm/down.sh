#!/usr/bin/env bash
# Stops what up.sh started, and nothing else: down.sh FOLDER
# A process is ended by its number, and only if it started when up.sh says.
set -uo pipefail
export PATH=$PATH:/usr/sbin:/sbin
lab=$(realpath -m "$1")
[[ -d $lab/pid ]] || exit 0

alive() { # PID START-TIME: that very process, and not a zombie
  local stat
  stat=$(cat "/proc/$1/stat" 2>/dev/null) || return 1
  stat=${stat##*) }
  [[ $(cut -d' ' -f20 <<<"$stat") == "$2" && ${stat%% *} != Z ]]
}
for signal in TERM KILL; do
  left=()
  for guard in "$lab"/pid/guard-*; do
    [[ -e $guard ]] || continue
    read -r pid start <"$guard"
    alive "$pid" "$start" || continue
    left+=("$guard")
    if [[ $signal == TERM ]]; then
      kill -TERM "$(<"$lab/pid/init-${guard##*/guard-}.pid")" 2>/dev/null
    else
      kill -KILL "$pid" # its child goes with it, and with that the pid namespace
    fi
  done
  for _ in $(seq 30); do
    count=0
    for guard in "${left[@]}"; do
      read -r pid start <"$guard"
      if alive "$pid" "$start"; then count=$((count + 1)); fi
    done
    ((count > 0)) || break
    sleep 0.1
  done
done
if [[ -s $lab/pid/munged.pid ]]; then
  pid=$(<"$lab/pid/munged.pid")
  if tr '\0' ' ' <"/proc/$pid/cmdline" | grep -qF -- "--socket=$lab/munge/munge.sock"; then
    kill "$pid"
    for _ in $(seq 20); do
      kill -0 "$pid" 2>/dev/null || break
      sleep 0.1
    done
  fi
fi
for machine in login n1 n2; do
  [[ ! -e /run/netns/$(basename "$lab")-$machine ]] || ip netns del "$(basename "$lab")-$machine"
  find "/sys/fs/cgroup/freezer/slurm_$machine" -depth -type d -exec rmdir {} \; 2>/dev/null
done
rm -rf "${lab:?}"
