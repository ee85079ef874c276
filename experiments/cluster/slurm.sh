#!/bin/bash
# Slurm: sbatch experiments/cluster/slurm.sh, from the top of a checkout on a common disk. The same command resumes.
#SBATCH --job-name=deberta --requeue --open-mode=append
#SBATCH --nodes=4 --ntasks-per-node=1 --gpus-per-node=8 --exclusive
#SBATCH --signal=USR1@600
export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1) MASTER_PORT=29500
srun bash -c 'WORLD_SIZE=$SLURM_NNODES RANK=$SLURM_NODEID ./rtd.sh deberta-v3-base'
