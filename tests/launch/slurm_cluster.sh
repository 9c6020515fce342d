#!/usr/bin/env bash
# A two-node Slurm cluster on this machine's loopback, for tests: real daemons, real jobs.
#
#   apt-get install -y --no-install-recommends slurm-wlm munge
#   ./tests/launch/slurm_cluster.sh start DIR && export SLURM_CONF=DIR/slurm.conf
#   ./tests/launch/slurm_cluster.sh stop DIR
#
# DIR: an empty folder, as a short absolute path (it holds a socket). The daemons write only there.
# Both commands can be rerun: start leaves a responding cluster alone, stop ends whatever is left.
# Hardware: any Linux machine, as root; no systemd, no cgroups.
# Expect: two idle nodes after five seconds, each with two CPUs and two simulated GPUs (gres).
set -euo pipefail
action=${1:?start or stop}
dir=${2:?an absolute folder}
export SLURM_CONF=$dir/slurm.conf

stop() {
    # Nodes first: they would keep polling a controller that is gone.
    for daemon in slurmd.127.0.0.1 slurmd.127.0.0.2 slurmctld munged; do
        pid=$(cat "$dir/$daemon.pid" 2>/dev/null || true)
        if [ -z "$pid" ] || ! grep -q "^${daemon%%.*}" "/proc/$pid/comm" 2>/dev/null; then
            continue
        fi
        kill "$pid" 2>/dev/null || true
        for _ in $(seq 100); do
            if ! kill -0 "$pid" 2>/dev/null; then break; fi
            sleep 0.1
        done
        kill -KILL "$pid" 2>/dev/null || true
    done
}

nodes_idle() {
    [ "$(timeout 5 sinfo --noheader --Node --format %t 2>/dev/null | grep -c '^idle$')" = 2 ]
}

free_ports() {
    python3 - <<'PYTHON'
import socket

held = [socket.socket() for _ in range(3)]
for one in held:
    one.bind(("127.0.0.1", 0))
print(*(one.getsockname()[1] for one in held))
PYTHON
}

start() {
    if [ -f "$SLURM_CONF" ]; then
        if nodes_idle; then return; fi
        stop
    fi
    mkdir -p "$dir"/{state,log,spool,gpus}
    chmod 755 "$dir"
    touch "$dir"/gpus/gpu{0,1}
    (umask 077 && head -c 128 /dev/urandom >"$dir/munge.key")
    read -r controller first second < <(free_ports)
    # Nodes are named by their addresses, so that no name has to be resolved. The first job id is
    # random: recipes derive a port from it, and another cluster may run on this machine.
    cat >"$SLURM_CONF" <<CONF
ClusterName=test
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmctldPort=$controller
FirstJobId=$((1000 + RANDOM % 8000))
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$dir/munge.socket
CredType=cred/munge
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool/%n
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd.%n.pid
SlurmctldLogFile=$dir/log/slurmctld
SlurmdLogFile=$dir/log/slurmd.%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2,batch_sched_delay=1
SlurmdParameters=config_overrides
ReturnToService=2
MpiDefault=none
GresTypes=gpu
NodeName=127.0.0.1 NodeHostname=$(hostname -s) NodeAddr=127.0.0.1 Port=$first CPUs=2 RealMemory=4000 Gres=gpu:2
NodeName=127.0.0.2 NodeHostname=$(hostname -s) NodeAddr=127.0.0.2 Port=$second CPUs=2 RealMemory=4000 Gres=gpu:2
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
    echo "NodeName=127.0.0.[1-2] Name=gpu File=$dir/gpus/gpu[0-1]" >"$dir/gres.conf"
    echo "CgroupAutomount=no" >"$dir/cgroup.conf"
    munged --force --socket="$dir/munge.socket" --key-file="$dir/munge.key" \
        --pid-file="$dir/munged.pid" --log-file="$dir/log/munged" --seed-file="$dir/munge.seed"
    slurmctld
    slurmd -N 127.0.0.1
    slurmd -N 127.0.0.2
    for _ in $(seq 120); do
        if nodes_idle; then return; fi
        sleep 0.5
    done
    echo "the nodes did not come up; see $dir/log" >&2
    tail -n 20 "$dir"/log/* >&2
    return 1
}

case $action in
start) start ;;
stop) stop ;;
*) echo "start or stop, not $action" >&2 && exit 2 ;;
esac
