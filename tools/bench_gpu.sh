#!/usr/bin/env bash
# Every bench on one GPU, at the size of Qwen2.5-VL-7B with random weights, in less than nine minutes; one JSON.
#
#     bash tools/bench_gpu.sh                                                   # writes docs/results/bench_gpu.json
#     bash tools/bench_gpu.sh --config small --device cpu --out x.json          # the same on a CPU: does it all run?
#
# Needs torch with CUDA, transformers and what they bring; TRL, peft, accelerate and datasets for the comparison (without
# them ours is measured alone, and the JSON says so). Nothing is downloaded. PYTHON chooses the interpreter. A bench that
# fails or takes too long is named in the JSON with its exit code, the others run all the same. Exit code: 1 if one has.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python="${PYTHON:-python}"
config=7b device=cuda out=docs/results/bench_gpu.json repeats=5
while [ $# -gt 0 ]; do
    case "$1" in
        --config) config="$2" ;;
        --device) device="$2" ;;
        --out) out="$2" ;;
        --repeats) repeats="$2" ;;
        *) echo "error: unknown flag $1 (--config, --device, --out, --repeats)" >&2; exit 2 ;;
    esac
    shift 2
done
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
if "$python" -c 'import trl, peft, accelerate, datasets' 2>/dev/null; then peer=trl; else peer=none; fi
[ "$peer" = trl ] || echo "TRL is not installed: ours is measured alone"

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
started=$SECONDS
codes=""
bench() {  # name, seconds it may take at most, command
    local name="$1" limit="$2"
    shift 2
    echo "== $name"
    timeout $((limit * patience)) "$python" "$@" --out "$folder/$name.json"
    local code=$?
    codes="$codes $name=$code"
    [ $code = 0 ] || echo "$name: exit code $code" >&2
}
sized=(--config "$config" --device "$device" --repeats "$repeats")
graphs=() recompute=() patience=1 positions=32768
if [ "$device" = cpu ]; then
    patience=30
else
    graphs=(--cuda-graphs)
    # A GRPO step at 7B size holds two copies of the weights and 36 GB of activations.
    "$python" -c 'import sys, torch; sys.exit(torch.cuda.get_device_properties(0).total_memory < 100e9)' ||
        recompute=(--activation-checkpointing)
fi
[ "$config" = 7b ] || positions=256
bench rollout 170 tools/bench_rollout.py "${sized[@]}" --waves 1 --seconds 60
bench rollout_graphs 70 tools/bench_rollout.py "${sized[@]}" --waves 1 --peer none --seconds 30 ${graphs[@]+"${graphs[@]}"}
bench grpo 110 tools/bench_grpo.py "${sized[@]}" --peer "$peer" --warmup 1 --seconds 50 ${recompute[@]+"${recompute[@]}"}
bench sft 90 tools/bench_sft.py "${sized[@]}" --peer "$peer" --warmup 1 --seconds 40
bench scoring 60 tools/bench_scoring.py "${sized[@]}" --memory-tokens "$positions" --seconds 20
bench memory 40 tools/bench_memory.py --config "$config" --device "$device" --tolerance 1  # recorded, not judged
bench scaling 40 tools/bench_scaling.py --config small --worlds 1 2 --repeats 1

"$python" - "$out" "$folder" "$peer" "$((SECONDS - started))" $codes <<'PY'
import sys

from tag.bench.output import join

out, folder, peer, seconds, *codes = sys.argv[1:]
codes = {name: int(code) for name, code in (word.split("=") for word in codes)}
join(out, folder, {"peer": peer, "seconds": int(seconds), "exit_codes": codes})
PY
echo "$((SECONDS - started)) s: $out"
case "$codes" in *=[1-9]*) exit 1 ;; esac
