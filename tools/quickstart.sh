#!/usr/bin/env bash
# The whole story on a laptop without a GPU: draw faces, fine-tune the tiny model that ships with the package (SFT),
# train it with GRPO without and with the AU reward, evaluate all of them. Needs Python >= 3.11 and bash, nothing else.
#
#     bash tools/quickstart.sh           # one seed; minutes on two cores
#     bash tools/quickstart.sh --fast    # the same stages, much shortened: does everything run here? a minute or two
#
# What is done stays done: run it again after an interruption, and it goes on where it was.
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$ROOT"
. tools/venv.sh

profile=quick out=runs/quickstart
case "${1-}" in
    "") ;;
    --fast) profile=smoke out=runs/quickstart-fast ;;
    *) fail "unknown argument $1; usage: bash tools/quickstart.sh [--fast]" ;;
esac

need_venv ""
"$PY" tools/run_study.py --profile "$profile" --out "$out"

show() { [ ! -e "$2" ] || printf '  %-34s %s\n' "$1" "$2"; }
echo
echo "What there is now:"
show "the table" "$out/study.md"
show "the same for machines" "$out/study.json"
show "faces and their records" "$out/data"
show "answers of the base model" "$out/base/eval/report.html"
for run in sft rlvr tag; do
    show "$run: faces, boxes and traces" "$out/seed0/$run/eval/report.html"
done
for run in sft rlvr tag; do
    show "$run: metrics of every step" "$out/seed0/$run/metrics.jsonl"
done
show "tag: recorded steps" "$out/seed0/tag/records"
show "tag: the adapter (PEFT format)" "$out/seed0/tag/best"
cat <<TEXT

What to run next (in .venv: source .venv/bin/activate):
  three seeds, 1,000 test faces      python tools/run_study.py --profile full --out runs/study
  tag: every token, box and reward   python tools/inspect_rollouts.py $out/seed0/tag
  tag: what went wrong first         python tools/check_run.py $out/seed0/tag
  curves                             pip install tensorboard && tensorboard --logdir $out
  one stage alone, other flags       python train_grpo.py --help
  a plain Hugging Face checkpoint    python tools/merge_lora.py --model tiny --adapter $out/seed0/tag/best --out merged
  your own photographs               python tools/detect_aus.py --help
  Qwen2.5-VL-7B on 4 x H200          tools/recipes/sft_7b_4xh200.sh, then grpo_7b_4xh200.sh; read their heads
TEXT
