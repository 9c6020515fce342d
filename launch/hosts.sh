#!/usr/bin/env bash
# Train on hosts without a scheduler, and keep training when one is lost or returns. Run the same
# command on each host, in any order, from a checkout:
#
#   ./launch/hosts.sh HEAD HOSTS --data SHARDS --run-dir RUN --global-batch-size 16 [FLAGS OF TRAIN]
#
#   HEAD    IPv4 address of the host that runs the rendezvous, on port 29400
#   HOSTS   number of hosts: `2` waits for both; `1:2` starts with one if no other joins within
#           30 s, and admits the other when it joins
#
# If HEAD is lost, so is the rendezvous, and all other hosts exit. To survive the loss of any host,
# run the rendezvous on a machine that does not train; HEAD is then its address, and it needs no
# GPU. It serves one job: stop it with Ctrl-C and start another one for the next job.
#
#   ./launch/hosts.sh HEAD keep
#
# Hardware: hosts that reach each other on all TCP ports, each with the same number of GPUs, all of
# which are used. SHARDS and RUN have the same absolute path on all hosts; RUN is in a shared
# folder. Two hosts without GPUs, one rank each:
#   PET_NPROC_PER_NODE=1 ACCELERATE_USE_CPU=true ./launch/hosts.sh ...
# Any flag of torchrun can be set this way: PET_MAX_RESTARTS (3: restarts after failed ranks on this
# host, in total), PET_RDZV_CONF (join_timeout=600: seconds to wait for missing hosts).
#
# Expect: a dead host is noticed at once, one that is cut off after --rank-timeout (10 minutes). The
# ranks on the other hosts exit with one line, restart, and resume from the last checkpoint
# (--save-every) within a minute or so. Every possible number of ranks must divide
# --global-batch-size; with half of the hosts, each rank computes twice as much of it. SIGTERM to one
# launcher stops the ranks of all hosts at a checkpoint. RUN/state.json records whether the run is
# finished.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=/dev/null
if [ -f .venv/bin/activate ]; then . .venv/bin/activate; fi
head=${1:?HEAD, the address of the host that runs the rendezvous}
hosts=${2:?HOSTS, such as 2 or 1:2, or keep}
shift 2
port=29400
if [ "$hosts" = keep ]; then
    echo "rendezvous on port $port; stop it with Ctrl-C" >&2
    exec python -c 'import signal, sys; from torch.distributed import TCPStore
signal.pthread_sigmask(signal.SIG_BLOCK, ends := {signal.SIGINT, signal.SIGTERM})
store = TCPStore("0.0.0.0", int(sys.argv[1]), is_master=True, wait_for_workers=False)
signal.sigwait(ends)' "$port"
fi
# Host names often resolve to 127.0.1.1, so use the address from which HEAD is reached.
read -r address interface < <(python -c 'import psutil, socket, sys
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
    probe.connect((sys.argv[1], 9))
    mine = probe.getsockname()[0]
found = psutil.net_if_addrs().items()
print(mine, *(name for name, own in found if mine in [one.address for one in own]))' "$head")
is_head=$([ "$address" = "$head" ] && echo 1 || echo 0)
# Otherwise restarted ranks join the store of the previous round, and fail.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
export GLOO_SOCKET_IFNAME="${GLOO_SOCKET_IFNAME:-$interface}"
export PET_NPROC_PER_NODE="${PET_NPROC_PER_NODE:-gpu}" PET_MAX_RESTARTS="${PET_MAX_RESTARTS:-3}"
exec python -m torch.distributed.run --nnodes "$hosts" --local_addr "$address" \
    --rdzv_backend c10d --rdzv_endpoint "$head:$port" --rdzv_id unet \
    --rdzv_conf "is_host=$is_head${PET_RDZV_CONF:+,$PET_RDZV_CONF}" -m pipelines.train "$@"
