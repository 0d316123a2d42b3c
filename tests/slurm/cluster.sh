#!/bin/sh
# A real Slurm cluster on one machine: two nodes, node1 and node2, of 8 pretend GPUs and 128 pretend CPUs each, and one
# partition called `partition`.
#     sh tests/slurm/cluster.sh start DIR [PORT]    prints the path to export as SLURM_CONF; uses PORT to PORT+2 (16817)
#     sh tests/slurm/cluster.sh stop DIR
# Needs root and Debian's packages slurm-wlm and munge. `start` adds both node names to /etc/hosts, once.
set -eu

command=${1:?start or stop} dir=${2:?a directory} port=${3:-16817}
mkdir -p "$dir"
dir=$(cd -- "$dir" && pwd)
export SLURM_CONF="$dir/slurm.conf"

write_configuration() {
    host=$(hostname -s)
    cat >"$SLURM_CONF" <<EOF
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
AuthType=auth/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool-%n
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd-%n.pid
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmdLogFile=$dir/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SlurmctldParameters=preempt_send_user_signal
MpiDefault=none
ReturnToService=2
GresTypes=gpu
KillWait=5
SchedulerParameters=bf_interval=1,sched_interval=1
NodeName=node1 NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + 1)) CPUs=128 Gres=gpu:8 State=UNKNOWN
NodeName=node2 NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + 2)) CPUs=128 Gres=gpu:8 State=UNKNOWN
PartitionName=partition Nodes=node1,node2 Default=YES MaxTime=INFINITE State=UP
EOF
    echo "NodeName=node[1-2] Name=gpu File=$dir/dev/gpu[0-7]" >"$dir/gres.conf"
}

start_munge() {
    munge --no-input >/dev/null 2>&1 && return
    mkdir -p /run/munge
    [ -f /etc/munge/munge.key ] || head -c 1024 /dev/urandom >/etc/munge/munge.key
    chown -R munge: /run/munge /etc/munge
    chmod 400 /etc/munge/munge.key
    su -s /bin/sh munge -c '/usr/sbin/munged --force'
}

idle_nodes() {
    sinfo --noheader --Node --states idle --format %N 2>/dev/null | sort -u | wc -l
}

case $command in
start)
    [ "$(id -u)" -eq 0 ] || { echo "starting a test cluster needs root" >&2 && exit 1; }
    mkdir -p "$dir/state" "$dir/log" "$dir/dev"
    for i in 0 1 2 3 4 5 6 7; do : >"$dir/dev/gpu$i"; done
    grep -q 'node1 node2' /etc/hosts || echo '127.0.0.1 node1 node2' >>/etc/hosts
    write_configuration
    start_munge
    slurmctld -c
    slurmd -N node1
    slurmd -N node2
    waited=0
    while [ "$(idle_nodes)" -ne 2 ]; do
        if [ "$waited" -ge 30 ]; then
            echo "the nodes did not come up within 30 s:" >&2
            tail -n 20 "$dir"/log/*.log >&2
            exit 1
        fi
        sleep 1
        waited=$((waited + 1))
    done
    echo "$SLURM_CONF"
    ;;
stop)
    scancel --full --user root 2>/dev/null || true
    for daemon in slurmctld slurmd-node1 slurmd-node2; do
        if [ -f "$dir/$daemon.pid" ]; then kill "$(cat "$dir/$daemon.pid")" 2>/dev/null || true; fi
    done
    ;;
*)
    echo "'$command' is neither start nor stop" >&2
    exit 2
    ;;
esac
