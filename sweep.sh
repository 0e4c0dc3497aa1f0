#!/usr/bin/env bash
# The grid of runs: every architecture, mode and seed, over all GPUs of this machine or of a cluster.
#
#   bash sweep.sh [--list] [train.py options]         ARCHS="resnet32 …" MODES="bn_only …" SEEDS="0 1 2" choose the grid
#   GRID=depth bash sweep.sh                          or a named one: depth, width, vgg, parts, init, tuning, warmstart, retrain
#   sbatch --array=0-26 sweep.sh [train.py options]   one cell of the same grid per Slurm task
#
# Cells that are done are skipped, others go on at their last epoch: call it again whenever it was interrupted.
#
#SBATCH --job-name=batchnorm-only
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
set -euo pipefail

script=${BASH_SOURCE[0]}
if [[ -n ${SLURM_JOB_ID:-} && ! -f $(dirname "$script")/run.sh ]]; then # Slurm's copy; it knows where it came from
  job=$SLURM_JOB_ID
  [[ -z ${SLURM_ARRAY_TASK_ID:-} ]] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID # the last one's id is the array's
  script=$(scontrol show job "$job" | sed -n 's/^ *Command=\(.*sweep\.sh\).*/\1/p')
fi
cd "$(dirname "$script")"
exec bash run.sh python sweep.py "$@"
