#!/usr/bin/env bash
# Runs lint, type checks and all tests except those marked slurm, hosts or docker, from any checkout.
#
#   ./tests/run.sh [FLAGS OF pytest]
#
# Expect: about twelve minutes on two cores, installation included; tests marked gpu are skipped without a GPU.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/install.sh
. launch/install.sh dev
ruff check .
ruff format --check .
pyright
# One thread each, and three processes for two cores: tests also wait, for ranks and disks. Files in order:
# the longest, the rehearsal of the GPU benchmark, is among the first, so that no worker ends alone.
OMP_NUM_THREADS=1 exec python -m pytest -n 3 --dist loadfile --no-loadscope-reorder "$@"
