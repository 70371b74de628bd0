#!/usr/bin/env bash
# Starts a real SLURM cluster inside this machine: a login node with slurmctld and the nodes n1 and
# n2 with slurmd, each with its own hostname, address and processes. Nothing of it is reachable from
# the machine's own network, and no file of an installed SLURM or munge is used. Needs root.
#   up.sh FOLDER            all its files; FOLDER/bin holds sbatch, srun, ... and `on_login COMMAND`
# From the environment:
#   PROCTRACK=linuxproc|cgroup  whom signals reach: all processes of a task, or the task alone (as on
#                               most real clusters)
#   KILL_WAIT=10 GRACE=20       seconds from TERM to KILL after scancel, and after a preemption
#   NODE_TIMEOUT=10             seconds until a node that does not answer counts as down
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
lab=$(realpath -m "$1")
prefix=$(basename "$lab") net=10.201.77
export PATH=$PATH:/usr/sbin:/sbin
die() {
  echo "up.sh: $*" >&2
  exit 1
}
missing=$(bash "$here/lacks.sh") || die "this machine lacks $missing"
[[ ! -e $lab/pid ]] || die "$lab is up, or was not taken down: down.sh $lab"

umask 022
mkdir -p "$lab"/{munge,state,spool,pid,log,bin,empty,gpu,etc/slurm}
trap 'code=$?; ((code == 0)) || { tail -n 5 "$lab"/log/* >&2; bash "$here/down.sh" "$lab"; }' EXIT

# munge with a key and a socket of its own, for all nodes: a socket's path crosses network namespaces
(umask 077 && head -c 1024 /dev/urandom >"$lab/munge/munge.key")
munged --socket="$lab/munge/munge.sock" --key-file="$lab/munge/munge.key" \
  --pid-file="$lab/pid/munged.pid" --log-file="$lab/log/munged.log" --seed-file="$lab/munge/seed"

# configuration
for gpu in 0 1; do mknod "$lab/gpu/nvidia$gpu" c 1 3; done # /dev/null, to be counted as a GPU
echo "NodeName=n[1-2] Name=gpu File=$lab/gpu/nvidia[0-1] Flags=nvidia_gpu_env" >"$lab/etc/slurm/gres.conf"
for pair in "1 login" "11 n1" "12 n2"; do
  echo "$net.$pair"
  echo "::ffff:$net.$pair" # torch asks for the name behind a mapped address
done >"$lab/etc/hosts"
echo "127.0.0.1 localhost" >>"$lab/etc/hosts"
sed -e "s|@LAB@|$lab|g" -e "s|@NET@|$net|g" -e "s|@PROCTRACK@|${PROCTRACK:-linuxproc}|" \
  -e "s|@KILL_WAIT@|${KILL_WAIT:-10}|" -e "s|@GRACE@|${GRACE:-20}|" \
  -e "s|@NODE_TIMEOUT@|${NODE_TIMEOUT:-10}|" -e "s|@FIRST_JOB@|$((1000 + $(date +%s) % 600000))|" \
  "$here/slurm.conf.in" >"$lab/etc/slurm/slurm.conf"
if [[ ${PROCTRACK:-} == cgroup ]]; then
  printf '%s\n' CgroupPlugin=cgroup/v1 CgroupAutomount=no CgroupMountpoint=/sys/fs/cgroup \
    >"$lab/etc/slurm/cgroup.conf"
fi

# commands that run on the login node, in the folder where they are called
for tool in sbatch srun scancel scontrol sinfo squeue on_login; do
  command=$tool
  [[ $tool != on_login ]] || command=
  cat >"$lab/bin/$tool" <<SHIM
#!/usr/bin/env bash
exec nsenter -t "\$(<"$lab/pid/init-login.pid")" -n -u -i -m -p -- \\
  bash -c 'cd "\$1" && shift && exec $command "\$@"' $tool "\$PWD" "\$@"
SHIM
  chmod 755 "$lab/bin/$tool"
done

# machines
add_netns() {
  ip netns add "$prefix-$1"
  ip -n "$prefix-$1" link set lo up
}
add_netns login
ip -n "$prefix-login" link add br0 type bridge
ip -n "$prefix-login" addr add "$net.1/24" dev br0
ip -n "$prefix-login" link set br0 up
bash "$here/boot.sh" "$lab" login
for number in 1 2; do
  add_netns "n$number"
  ip -n "$prefix-login" link add "v$number" type veth peer name eth0 netns "$prefix-n$number"
  ip -n "$prefix-login" link set "v$number" master br0 up
  ip -n "$prefix-n$number" addr add "$net.1$number/24" dev eth0
  ip -n "$prefix-n$number" link set eth0 up
  bash "$here/boot.sh" "$lab" "n$number"
done
for _ in $(seq 100); do
  idle=$( (timeout 5 "$lab/bin/sinfo" -h -N -p main -t idle -o %N || true) 2>/dev/null | wc -l)
  ((idle < 2)) || exit 0
  sleep 0.2
done
die "the nodes did not become idle"
