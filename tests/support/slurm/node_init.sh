#!/usr/bin/env bash
# Process 1 of one machine of the cluster, in namespaces of its own (net, uts, ipc, mount, pid).
# Only boot.sh starts it: node_init.sh LAB login|n1|n2. When it ends, the machine's processes end.
set -u
lab=$1 name=$2
hostname "$name"
mount --bind "$lab/etc/hosts" /etc/hosts
mkdir -p /etc/slurm && mount --bind "$lab/etc/slurm" /etc/slurm # so that jobs need no SLURM_CONF
mount -t tmpfs -o size=2g tmpfs /dev/shm
mount --bind "$lab/empty" "$lab/bin" # in here, the real commands and not up.sh's
ulimit -c 0
unset SLURM_CONF
trap 'kill -TERM "$daemon"' TERM
if [[ $name == login ]]; then
  slurmctld -D -c </dev/null >"$lab/log/slurmctld.out" 2>&1 &
else
  slurmd -D </dev/null >"$lab/log/slurmd-$name.out" 2>&1 &
fi
daemon=$!
while :; do
  wait "$daemon"
  code=$?
  kill -0 "$daemon" 2>/dev/null || exit "$code" # a trapped signal also ends `wait`
done
