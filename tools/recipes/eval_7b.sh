#!/usr/bin/env bash
# Accuracy and AU IoU on a test split as in the paper: greedy, at most 512 tokens, at most three boxes.
#
#     DATA=tag310k/raf-db/test.jsonl IMAGE_ROOT=faces ADAPTER=runs/tag-7b/best OUT=runs/tag-7b/eval \
#         bash tools/recipes/eval_7b.sh
#
# DATA        TAG records (.jsonl); traces are not needed
# IMAGE_ROOT  folder that the records' image paths start from
# ADAPTER     adapter to evaluate; ADAPTER=none asks the base model, zero-shot
# OUT         folder for metrics.json, predictions.jsonl, table.md, report.html. Repeat the command to go on
# MODEL       base model (default: Qwen/Qwen2.5-VL-7B-Instruct), or a merged checkpoint with ADAPTER=none
# GPUS        default 4; faces are shared out, results do not depend on it
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"

adapter=(--adapter "${ADAPTER:?is not set: the adapter to evaluate, or none for the base model}")
[ "$ADAPTER" != none ] || adapter=()

torchrun --standalone --nproc-per-node "${GPUS:-4}" "$root/eval.py" \
    --model "${MODEL:-Qwen/Qwen2.5-VL-7B-Instruct}" \
    --data "${DATA:?is not set: the records to evaluate on (.jsonl, see the head of this script)}" \
    --image-root "${IMAGE_ROOT:?is not set: the folder that the image paths of the records start from}" \
    --out "${OUT:?is not set: the folder for the results, e.g. runs/tag-7b/eval}" \
    --max-new-tokens 512 --rollout-rows 128 --dtype bfloat16 ${adapter[@]+"${adapter[@]}"} "$@"
