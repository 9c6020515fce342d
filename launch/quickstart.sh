#!/usr/bin/env bash
# From a fresh clone to masks of unseen pictures.
#
#   ./launch/quickstart.sh [FLAGS OF unet demo]
#
# Hardware: two CPU cores are enough; GPUs are used where there are some.
# Expect: a minute or three to install (.venv), then under four minutes; a foreground Dice above 0.90,
# and the folder demo/ with pictures, shards, run and masks. Given again, it goes on or is done.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/install.sh
. launch/install.sh core
exec unet demo "$@"
