#!/usr/bin/env bash
# On a host with one GPU: the fast tests, then one SFT and one GRPO step at the size of Qwen2.5-VL-7B (random weights).
#
#     bash tools/gpu_smoke.sh                                    # writes docs/results/gpu_smoke.json
#     bash tools/gpu_smoke.sh --activation-checkpointing         # flags go to tools/gpu_smoke.py; see its --help
#
# Needs torch >= 2.11 with CUDA, transformers >= 5.17 and what they bring; nothing is downloaded, nothing is installed,
# flash-attn is not needed. PYTHON chooses the interpreter. Exit code: 1 if a test or a gate fails.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python="${PYTHON:-python}"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

if ! versions=$("$python" -c 'import torch, transformers; print("torch", torch.__version__, "| transformers",
    transformers.__version__, "| GPUs", torch.cuda.device_count())'); then
    echo "error: $python has no working torch and transformers; name another one: PYTHON=/path/to/python" >&2
    exit 2
fi
echo "$versions"

if "$python" -c 'import pytest' 2>/dev/null; then
    echo "== fast tests"
    if "$python" -m pytest -q -m "not slow" -p no:cacheprovider; then tests=passed; else tests=failed; fi
else
    echo "== fast tests: skipped, pytest is not installed"
    tests="skipped, no pytest"
fi

echo "== one SFT step, one GRPO step"
"$python" tools/gpu_smoke.py --fast-tests "$tests" "$@" || exit $?
[ "$tests" != failed ]
