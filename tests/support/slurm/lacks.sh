#!/usr/bin/env bash
# Says in one line what this machine lacks for the cluster of up.sh.
# Exit code 0: nothing; 1: something that cannot be installed; 2: Debian packages only.
set -u
export PATH=$PATH:/usr/sbin:/sbin
lacks() { # CODE WHAT
  echo "$2"
  exit "$1"
}
[[ $(id -u) == 0 ]] || lacks 1 "the user root"
[[ -e /etc/debian_version ]] || lacks 1 "Debian"
alone=(unshare --net --uts --ipc --mount --pid --fork --kill-child --mount-proc)
"${alone[@]}" sh -c 'hostname probe && mount -t tmpfs tmpfs /dev/shm' >/dev/null 2>&1 ||
  lacks 1 "the privilege to make namespaces"
packages=()
for pair in slurmctld:slurmctld slurmd:slurmd sbatch:slurm-client munged:munge ip:iproute2; do
  command -v "${pair%%:*}" >/dev/null || packages+=("${pair##*:}")
done
((${#packages[@]} == 0)) || lacks 2 "the Debian packages ${packages[*]}"
"${alone[@]}" ip link add probe0 type veth peer name probe1 >/dev/null 2>&1 ||
  lacks 1 "virtual network devices (veth)"
