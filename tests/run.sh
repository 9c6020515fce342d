#!/usr/bin/env bash
# Lint, types and all tests but those marked slurm, hosts or docker, on a fresh clone or a used one.
#
#   ./tests/run.sh [FLAGS OF pytest]
#
# Expect: some eighteen minutes on two cores; tests marked gpu are skipped where there is none.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/install.sh
. launch/install.sh dev
ruff check .
ruff format --check .
pyright
# One thread each: two test processes share the cores with the ranks that they start.
OMP_NUM_THREADS=1 exec python -m pytest -n 2 --dist loadfile "$@"
