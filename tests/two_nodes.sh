#!/usr/bin/env bash
# Two hosts on one machine: network namespaces nodea and nodeb, joined by a cable whose ends are both called eth0, with an
# ssh server in each. Runs "$@" on nodea. Needs root and mounts, networks and processes of its own:
#
#   unshare --mount --net --pid --fork --mount-proc --kill-child bash tests/two_nodes.sh WORK_FOLDER COMMAND ...
set -euo pipefail
work=$1
shift
mount -t tmpfs tmpfs /run
mkdir -p /run/sshd /run/netns
mount -t tmpfs tmpfs "$HOME/.ssh" 2>/dev/null || { mkdir -p "$HOME/.ssh"; mount -t tmpfs tmpfs "$HOME/.ssh"; }

printf '127.0.0.1 localhost\n10.77.0.1 nodea\n10.77.0.2 nodeb\n' >"$work/hosts_file"
mount --bind "$work/hosts_file" /etc/hosts
ssh-keygen -q -t ed25519 -N '' -f "$HOME/.ssh/id_ed25519"
ssh-keygen -q -t ed25519 -N '' -f "/run/host_key"
cp "$HOME/.ssh/id_ed25519.pub" "$HOME/.ssh/authorized_keys"
chmod 700 "$HOME/.ssh"
printf 'nodea,nodeb %s\n' "$(cut -d' ' -f1,2 "/run/host_key.pub")" >"$HOME/.ssh/known_hosts"

ip netns add nodea
ip netns add nodeb
ip -n nodea link add eth0 type veth peer name eth0 netns nodeb
address=1
for node in nodea nodeb; do
    ip -n "$node" link set lo up
    ip -n "$node" address add "10.77.0.$address/24" dev eth0
    ip -n "$node" link set eth0 up
    ip netns exec "$node" "$(command -v sshd || echo /usr/sbin/sshd)" -f /dev/null -h "/run/host_key" \
        -o UsePAM=no -o PermitRootLogin=prohibit-password -o StrictModes=no -o "PidFile=/run/$node.pid"
    address=$((address + 1))
done
# Not exec: the first process of a PID namespace has to outlive the servers' children.
ip netns exec nodea "$@"
