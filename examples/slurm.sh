#!/bin/bash
# A job of several machines under Slurm: one torchrun on each, which starts the ranks of its machine.
#
#   sbatch examples/slurm.sh                                   a training run of a few seconds
#   sbatch examples/slurm.sh -m dpcomm info --group            who reaches whom, and which engine serves
#   RANKS_PER_NODE=8 sbatch --nodes=4 examples/slurm.sh train.py --epochs 3
#
# Submit it where the script lies that it is to run, with the Python of dpcomm on PATH. See examples/train_multinode.md.

#SBATCH --job-name=dpcomm
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=2
#SBATCH --time=00:10:00
#SBATCH --output=%x-%j.out
# For GPUs: #SBATCH --gpus-per-node=2

set -euo pipefail

ranks_per_node=${RANKS_PER_NODE:-2}
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
# Below the ports that the system hands out (32768 and up); jobs that share a machine have different ones, as a rule.
port=$((20000 + SLURM_JOB_ID % 10000))

export OMP_NUM_THREADS=$((SLURM_CPUS_PER_TASK > ranks_per_node ? SLURM_CPUS_PER_TASK / ranks_per_node : 1))
# Where the machines' names lead to a network that is not the one for data:
# export GLOO_SOCKET_IFNAME=ib0

if (($# == 0)); then
  set -- examples/train_lm.py --demo --steps 20 --layers 2 --width 64 --context 64
fi

# srun does not hand on --cpus-per-task by itself. One machine's failure ends the others.
srun --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=1 \
  torchrun --nnodes "$SLURM_NNODES" --nproc-per-node "$ranks_per_node" \
  --rdzv-backend c10d --rdzv-endpoint "${nodes[0]}:$port" --rdzv-id "$SLURM_JOB_ID" \
  "$@"
