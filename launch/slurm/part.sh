# shellcheck shell=bash
# Sourced by predict.sbatch and pack.sbatch: sets `part`, for them, to the flags of this job
# of an array.
#
#   . launch/slurm/part.sh
#
# Expect: --part i/N in job i of --array 1-N, nothing without an array, and exit code 2 for other arrays.
# shellcheck disable=SC2034
part=()
if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then
    # shellcheck disable=SC2153,SC2034
    if [ "$SLURM_ARRAY_TASK_MIN" != 1 ] || [ "$SLURM_ARRAY_TASK_MAX" != "$SLURM_ARRAY_TASK_COUNT" ]; then
        echo "${SLURM_JOB_NAME:-job}: give --array 1-N, whatever is there already" >&2
        exit 2
    fi
    part=(--part "$SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT")
fi
