# shellcheck shell=bash
# Sourced by the recipes with arrays: sets `part` to the flags for this job of an array.
#
#   . launch/slurm/part.sh
#
# Expect: --part i/N in job i of --array 1-N, no flags without an array, exit code 2 for other arrays.
# shellcheck disable=SC2034
part=()
if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then
    # shellcheck disable=SC2153,SC2034
    if [ "$SLURM_ARRAY_TASK_MIN" != 1 ] || [ "$SLURM_ARRAY_TASK_MAX" != "$SLURM_ARRAY_TASK_COUNT" ]; then
        echo "${SLURM_JOB_NAME:-job}: --array must be 1-N; what is finished is skipped" >&2
        exit 2
    fi
    part=(--part "$SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT")
fi
