#!/usr/bin/env bash
# Starts the ranks of one node of a Slurm job; run by train.sbatch once per node, by predict.sbatch
# on its only node.
#
#   srun launch/slurm/ranks.sh -m pipelines.VERB FLAGS
#
# Hardware: one rank per GPU that Slurm allocated on this node, the same number on every node; one
# CPU rank per node if it allocated none.
# Expect: all nodes rendezvous at the first one. Precision and other settings of Accelerate are in
# accelerate_config.yaml, for CPUs in launch/accelerate/cpu.yaml.
set -euo pipefail

# Slurm's warning goes to every process and would kill the launcher, and ranks that are still
# starting. Ignored from here on, until training installs its own handler.
trap '' USR1

gpus=${SLURM_GPUS_ON_NODE:-0}
config=accelerate_config.yaml
if [ "$gpus" = 0 ]; then
    config=launch/accelerate/cpu.yaml
    export ACCELERATE_USE_CPU=true
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
fi
per_node=$((gpus > 0 ? gpus : 1))
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# The port is below the ephemeral range and differs from job to job.
exec accelerate launch --config_file "$config" \
    --num_machines "$SLURM_JOB_NUM_NODES" --num_processes "$((SLURM_JOB_NUM_NODES * per_node))" \
    --machine_rank "$SLURM_NODEID" \
    --main_process_ip "$first" --main_process_port "$((20000 + SLURM_JOB_ID % 10000))" \
    "$@"
