#!/usr/bin/env bash
# Train on hosts that no scheduler binds together, and go on when one is lost or comes back. The
# same command on each host, in any order, from a checkout:
#
#   ./launch/hosts.sh HEAD HOSTS --data SHARDS --run-dir RUN --global-batch-size 16 [FLAGS OF TRAIN]
#
#   HEAD    IPv4 address of the host that keeps the list of hosts, on port 29400
#   HOSTS   how many: `2` waits for both; `1:2` begins and goes on with one, if no other comes
#           within 30 s, and takes the other in when it comes
#
# If HEAD is lost its list is, and all others end too. A machine that trains nothing can keep the
# list instead, then any host may be lost; HEAD is its address, and it needs no GPU. For one job:
# end it with Ctrl-C, begin the next with another.
#
#   ./launch/hosts.sh HEAD keep
#
# Hardware: hosts that reach each other on all TCP ports, with equal numbers of GPUs, which are all
# used; SHARDS and RUN under one absolute path on all, RUN in a folder that they share. Two without
# GPUs, one rank each:  PET_NPROC_PER_NODE=1 ACCELERATE_USE_CPU=true ./launch/hosts.sh ...
# Any flag of torchrun can be set so: PET_MAX_RESTARTS (3: ranks that failed, on this host, in all),
# PET_RDZV_CONF (join_timeout=600: seconds to wait for the hosts that are missing).
#
# Expect: a host that dies is noticed at once, one that is cut off after --rank-timeout (10
# minutes). The ranks of the others end with one line, start again, and go on from the last
# checkpoint (--save-every), a minute later. --global-batch-size must divide among each number of
# ranks that can come; with half of the hosts each rank computes twice as much of it. SIGTERM to one
# launcher ends the ranks of all hosts, at a checkpoint. RUN/state.json says whether the run is
# finished.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=/dev/null
if [ -f .venv/bin/activate ]; then . .venv/bin/activate; fi
head=${1:?HEAD, the address of the host that keeps the list}
hosts=${2:?HOSTS, such as 2 or 1:2, or keep}
shift 2
port=29400
if [ "$hosts" = keep ]; then
    echo "keeping the list of hosts on port $port, until Ctrl-C" >&2
    exec python -c 'import signal, sys; from torch.distributed import TCPStore
signal.pthread_sigmask(signal.SIG_BLOCK, ends := {signal.SIGINT, signal.SIGTERM})
store = TCPStore("0.0.0.0", int(sys.argv[1]), is_master=True, wait_for_workers=False)
signal.sigwait(ends)' "$port"
fi
# Names of hosts often lead to 127.0.1.1: what counts is the address from which HEAD is reached.
read -r address interface < <(python -c 'import psutil, socket, sys
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
    probe.connect((sys.argv[1], 9))
    mine = probe.getsockname()[0]
found = psutil.net_if_addrs().items()
print(mine, *(name for name, own in found if mine in [one.address for one in own]))' "$head")
is_head=$([ "$address" = "$head" ] && echo 1 || echo 0)
# Without this ranks that start again meet in the store of their last round, and fail.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
export GLOO_SOCKET_IFNAME="${GLOO_SOCKET_IFNAME:-$interface}"
export PET_NPROC_PER_NODE="${PET_NPROC_PER_NODE:-gpu}" PET_MAX_RESTARTS="${PET_MAX_RESTARTS:-3}"
exec python -m torch.distributed.run --nnodes "$hosts" --local_addr "$address" \
    --rdzv_backend c10d --rdzv_endpoint "$head:$port" --rdzv_id unet \
    --rdzv_conf "is_host=$is_head${PET_RDZV_CONF:+,$PET_RDZV_CONF}" -m pipelines.train "$@"
