#!/usr/bin/env bash
# Stage 2 with the paper's settings: TAG, that is GRPO with the AU reward (R = R_AU + R_ans + R_fmt), 4 x H200.
#
#     DATA=tag310k/raf-db IMAGE_ROOT=faces ADAPTER=runs/sft-7b/best OUT=runs/tag-7b \
#         bash tools/recipes/grpo_7b_4xh200.sh
#
# DATA        folder with train.jsonl and val.jsonl of ONE data set (the paper trains on each apart)
# IMAGE_ROOT  folder that the records' image paths start from
# ADAPTER     what stage 1 has given: where RL starts, and what KL is measured to
# OUT         run folder: adapter, checkpoints, metrics, step records. Repeat the command to resume
# MODEL       base model, the one of stage 1 (default: Qwen/Qwen2.5-VL-7B-Instruct)
# GPUS        default 4. Another number changes speed only
#
# 512 completions a step (64 faces x 8) are our choice; the paper does not say. If memory is short: --micro-tokens down,
# --activation-checkpointing, --rollout-rows down; none of them changes the gradient. Further flags may follow and win.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"

# No two passes have the same shapes: memory in segments that grow does not fall to pieces over a run.
export PYTORCH_ALLOC_CONF="${PYTORCH_ALLOC_CONF:-expandable_segments:True}"

# torchrun forwards these signals, and then waits so long for a step to be finished and saved (docs/reliability.md).
torchrun --standalone --nproc-per-node "${GPUS:-4}" \
    --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 --shutdown-timeout 120 "$root/train_grpo.py" \
    --model "${MODEL:-Qwen/Qwen2.5-VL-7B-Instruct}" \
    --data "${DATA:?is not set: the folder with train.jsonl and val.jsonl (see the head of this script)}" \
    --image-root "${IMAGE_ROOT:?is not set: the folder that the image paths of the records start from}" \
    --adapter "${ADAPTER:?is not set: the adapter of stage 1, e.g. runs/sft-7b/best}" \
    --out "${OUT:?is not set: the folder of this run, e.g. runs/tag-7b}" \
    --au-reward iou --format-bonus 0.1 \
    --group-size 8 --rollouts-per-step 512 --temperature 1.0 --max-new-tokens 512 \
    --clip-eps 0.2 --beta 0.04 --kl-reference sft \
    --epochs 2 --lr 1e-6 --weight-decay 0.01 --clip-norm 1.0 \
    --micro-tokens 16384 --dtype bfloat16 "$@"
