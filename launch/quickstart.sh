#!/usr/bin/env bash
# From a fresh clone to predicted masks of unseen images.
#
#   ./launch/quickstart.sh [FLAGS OF unet demo]
#
# Hardware: two CPU cores are enough; GPUs are used if there are any.
# Expect: one to three minutes to install (.venv), then under four minutes; a foreground Dice above
# 0.90, and the folder demo/ with images, shards, run and masks. A rerun resumes, or does nothing if
# all is finished.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/install.sh
. launch/install.sh core
exec unet demo "$@"
