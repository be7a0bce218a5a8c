#!/usr/bin/env bash
#SBATCH --job-name=tag
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
# Training on several machines under Slurm, in pieces of --time until it is done; also after pre-emption.
#
#     sbatch --nodes 4 tools/recipes/slurm.sh train_grpo.py --data ... --adapter ... --out SHARED/runs/tag-7b
#
# Five minutes before its time is up (--signal), and when it is pre-empted (SIGTERM), the run finishes its step, saves
# and ends; the job then goes back into the queue and resumes. A step, with its evaluation, has to be shorter than GRACE
# (here 270 seconds), and GRACE than the notice: lengthen both, GRACE=570 sbatch --signal=USR1@600. GPUS, RESTARTS,
# IFNAME as in nodes.sh. This script is copied by sbatch: submit it from the repository, or set TAG_ROOT.
set -euo pipefail
root="${TAG_ROOT:-${SLURM_SUBMIT_DIR:-$PWD}}"

export GRACE="${GRACE:-270}"
export NODES="${NODES:-$SLURM_NNODES}" JOB="${JOB:-tag-$SLURM_JOB_ID}" GPUS="${GPUS:-${SLURM_GPUS_ON_NODE:-4}}"
export HEAD="${HEAD:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1):$((20000 + SLURM_JOB_ID % 20000))}"
code=0
srun --kill-on-bad-exit=1 bash "$root/tools/recipes/nodes.sh" "$@" || code=$?

# "done" is the run's own word: a run that was stopped says "stopped by", and is asked to go on.
out=""
for ((i = 1; i < $#; i++)); do
    next=$((i + 1))
    [ "${!i}" != --out ] || out="${!next}"
done
if [ -n "$out" ] && [ -f "$out/stopped.json" ]; then
    echo "stopped before its end; back into the queue"
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
fi
exit "$code"
