#!/usr/bin/env bash
# Stage 1 with the paper's settings (arXiv 2602.18763, C.1): LoRA SFT of Qwen2.5-VL-7B on TAG-310k, 4 x H200.
#
#     DATA=tag310k IMAGE_ROOT=faces OUT=runs/sft-7b bash tools/recipes/sft_7b_4xh200.sh
#
# DATA        folder with train.jsonl and val.jsonl: TAG records with traces (docs/data.md)
# IMAGE_ROOT  folder that the records' image paths start from
# OUT         run folder; the adapter for stage 2 is OUT/best. Repeat the command to resume
# MODEL       base model, a folder or a hub name (default: Qwen/Qwen2.5-VL-7B-Instruct)
# GPUS        default 4. Another number changes speed only: --batch-size counts sequences over all of them
#
# The paper's batch is 8 a GPU x 8 accumulation steps x 4 GPUs = 256 sequences a step. Ours are packed, so what fits
# into memory is said in tokens: lower --micro-tokens, or add --activation-checkpointing, on GPUs of 80 GB. Neither
# changes the gradient. Further flags may follow the command and win, e.g. --strip-bbox for the Table 3 ablation.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"

# No two passes have the same shapes: memory in segments that grow does not fall to pieces over a run.
export PYTORCH_ALLOC_CONF="${PYTORCH_ALLOC_CONF:-expandable_segments:True}"

# torchrun forwards these signals, and then waits so long for a step to be finished and saved (docs/reliability.md).
torchrun --standalone --nproc-per-node "${GPUS:-4}" \
    --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 --shutdown-timeout 120 "$root/train_sft.py" \
    --model "${MODEL:-Qwen/Qwen2.5-VL-7B-Instruct}" \
    --data "${DATA:?is not set: the folder with train.jsonl and val.jsonl (see the head of this script)}" \
    --image-root "${IMAGE_ROOT:?is not set: the folder that the image paths of the records start from}" \
    --out "${OUT:?is not set: the folder of this run, e.g. runs/sft-7b}" \
    --lora-rank 128 --lora-alpha 256 --lora-dropout 0.05 \
    --epochs 3 --batch-size 256 --context 2048 \
    --lr 2e-5 --warmup 0.03 --weight-decay 0.01 --clip-norm 1.0 \
    --max-new-tokens 512 --micro-tokens 8192 --dtype bfloat16 "$@"
