#!/usr/bin/env bash
# A study on a SLURM cluster: a Ray cluster on the job's machines, the study on the first of them.
#   sbatch --export=ALL,MLFLOW_TRACKING_URI=https://tracking.example.org deploy/slurm.sh --profile paper --seeds 3
# Machines, cores, GPUs and time as your cluster names them. The checkout and its .venv lie on a shared file system.
#SBATCH --job-name=rampart
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --time=24:00:00
# The study is told ten minutes before the end, leaves checkpoints, and goes on with the next job.
#SBATCH --signal=B:TERM@600
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?start this with sbatch, from the checkout}"
export PATH="$PWD/.venv/bin:$PATH" RAY_USAGE_STATS_ENABLED=0
: "${MLFLOW_TRACKING_URI:?the address of a tracking server that all machines reach}"
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 20000))
cpus=${SLURM_CPUS_PER_TASK:-1}
srun --nodes=1 --ntasks=1 --nodelist="$head" \
    ray start --head --port="$port" --num-cpus="$cpus" --include-dashboard=false --block &
sleep 20
if [ "$SLURM_JOB_NUM_NODES" -gt 1 ]; then
    srun --nodes=$((SLURM_JOB_NUM_NODES - 1)) --ntasks=$((SLURM_JOB_NUM_NODES - 1)) --exclude="$head" \
        ray start --address="$head:$port" --num-cpus="$cpus" --block &
    sleep 20
fi
python -m rampart main --executor ray --address "$head:$port" "$@" &
study=$!
trap 'kill -TERM $study' TERM
wait $study || wait $study
