#!/usr/bin/env bash
# Train a grid of runs: every architecture, mode and seed, on all GPUs of this machine or of a cluster.
#
#   bash sweep.sh [--list] [train.py options]         ARCHS="resnet32 …" MODES="bn_only …" SEEDS="0 1 2" choose the grid
#   GRID=depth bash sweep.sh                          a named grid: depth, width, vgg, parts, init, tuning, warmstart, retrain
#   sbatch --array=0-26 sweep.sh [train.py options]   one cell of the same grid per Slurm task
#
# Finished cells are skipped and others continue after their last epoch, so call it again after an interruption.
#
#SBATCH --job-name=batchnorm-only
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
set -euo pipefail

script=${BASH_SOURCE[0]}
if [[ -n ${SLURM_JOB_ID:-} && ! -f $(dirname "$script")/run.sh ]]; then # this is Slurm's copy; Slurm knows the original
  job=$SLURM_JOB_ID
  [[ -z ${SLURM_ARRAY_TASK_ID:-} ]] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID # the last task's job ID is the array's
  script=$(scontrol show job "$job" | sed -n 's/^ *Command=\(.*sweep\.sh\).*/\1/p')
fi
cd "$(dirname "$script")"
exec bash run.sh python sweep.py "$@"
