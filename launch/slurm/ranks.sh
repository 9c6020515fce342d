#!/usr/bin/env bash
# The ranks of one node of a Slurm job. train.sbatch starts this once on each
# node, predict.sbatch on its own.
#
#   srun launch/slurm/ranks.sh -m pipelines.VERB FLAGS
#
# Hardware: one rank for each GPU that Slurm gave the job on this node, as many on every node; where
# it gave none, one rank a node on the CPU.
# Expect: all nodes meet at the first one. Precision and what else Accelerate wants to know stand in
# accelerate_config.yaml, for CPUs in launch/accelerate/cpu.yaml.
set -euo pipefail

# Slurm's warning goes to every process: the launcher would die of it, and ranks that have only just
# started too. Ignored from here on, until training itself begins to listen.
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

# The port: below those that systems give out by themselves, and another one for the next job.
exec accelerate launch --config_file "$config" \
    --num_machines "$SLURM_JOB_NUM_NODES" --num_processes "$((SLURM_JOB_NUM_NODES * per_node))" \
    --machine_rank "$SLURM_NODEID" \
    --main_process_ip "$first" --main_process_port "$((20000 + SLURM_JOB_ID % 10000))" \
    "$@"
