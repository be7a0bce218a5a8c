"""Accuracy and AU IoU of a checkpoint on TAG records: greedy answers to the one prompt of the task.

    python   eval.py --preset tiny --data data/synth/test.jsonl --adapter runs/tag/best --out runs/tag/eval
    torchrun --nproc-per-node 4 eval.py --data TAG310K/test.jsonl --image-root IMAGES \\
        --adapter runs/tag-7b/best --out EVAL

Without --adapter the base model is asked (zero-shot). Decoding as in the paper: T = 0, at most 512 tokens, at most
three boxes. Writes into --out: metrics.json, predictions.jsonl (one line a face), table.md, report.html (faces with
detector boxes in green and predicted ones in red). Repeating the command goes on where it was stopped.
"""

import json
from pathlib import Path

from tqdm import tqdm

from tag import dist
from tag.args import Parser, check, claim_run_folder, run
from tag.checkpoint import run_card
from tag.data.faces import Faces
from tag.data.images import load_image
from tag.data.records import read_records
from tag.evaluation.generate import predict
from tag.evaluation.metrics import compute_metrics, markdown_table, write_metrics
from tag.evaluation.predictions import read_predictions, write_predictions
from tag.files import replacing
from tag.lora import load_adapter
from tag.prompts import prompt_hash
from tag.report.eval_page import write_eval_page
from tag.rollout import RolloutEngine, kv_plan
from tag.vlm import load_vlm

PRESETS = {"tiny": dict(model="tiny", dtype="float32", max_new_tokens=160)}
PART = 256  # faces between two saves of what is done


def parse_args(argv=None):
    p = Parser(__doc__, PRESETS)
    a = p.add_argument
    a("--data", required=True, help="TAG records (.jsonl)")
    a("--split", help="only records of this split")
    a("--image-root", help="folder the records' image paths start from (default: where --data lies)")
    a("--faces", type=int, default=0, help="only the first N records, 0 = all")
    a("--model", default="Qwen/Qwen2.5-VL-7B-Instruct", help='checkpoint folder or hub name, or "tiny"')
    a("--adapter", help="adapter folder; none = the base model, zero-shot")
    a("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    a("--name", help="what the model is called in the table (default: the adapter's or model's path)")
    a("--max-new-tokens", type=int, default=512)
    a("--no-box-limit", action="store_true", help="let the model write more than three boxes")
    a("--out", required=True, help="folder for the results")
    a("--report-faces", type=int, default=200, help="faces on the HTML page, 0 = no page")
    a("--rollout-rows", type=int, default=64, help="rows that decode together, per rank")
    a("--cuda-graphs", action="store_true", help="replay the decoding step as a CUDA graph")
    a("--device", choices=("auto", "cpu", "cuda"), default="auto")
    a("--threads", type=int, default=0, help="CPU threads, 0 = PyTorch's choice")
    return p.parse_args(argv)


def evaluate(args, here: dist.Dist) -> None:
    """Answer every face once, then measure."""
    out = Path(args.out)
    image_root = args.image_root or Path(args.data).parent
    records = read_records(args.data, args.split)[: args.faces or None]
    resuming = claim_run_folder(out, "eval.py", args, here.is_main)

    vlm = load_vlm(args.model, args.dtype, here.device)
    if args.adapter:
        load_adapter(vlm.hf_model, args.adapter)
    vlm.requires_grad_(False)
    faces = Faces(records, image_root, vlm, cache_gb=0)
    engine = RolloutEngine(vlm, args.rollout_rows, args.max_new_tokens, cuda_graphs=args.cuda_graphs)
    here.print(kv_plan(engine, len(vlm.prompt().input_ids), 1))
    if here.is_main:
        card = run_card("eval.py", json.loads(json.dumps(vars(args), default=str)), prompt=prompt_hash())
        with replacing(out / "run.json") as f:
            f.write(json.dumps(card, indent=2) + "\n")

    # What an earlier run has answered stays answered. The main process reads, the others are told.
    path = out / "predictions.jsonl"
    done = here.gather(read_predictions(path) if resuming and here.is_main and path.is_file() else [])[0]
    answered = {p.id: p for p in done}
    check(
        set(answered) <= {r.id for r in records},
        f"{path} holds faces that are not in {args.data}; choose another --out",
    )
    waiting = [i for i, r in enumerate(records) if r.id not in answered]

    engine.refresh("policy" if args.adapter else None)
    max_boxes = None if args.no_box_limit else 3
    bar = tqdm(total=len(records), initial=len(answered), desc="eval", disable=None if here.is_main else True)
    for start in range(0, len(waiting), PART):
        part = waiting[start : start + PART]
        found = predict(engine, faces, records, part, vlm.prompt(), args.max_new_tokens, here, max_boxes=max_boxes)
        answered |= {p.id: p for p in found}
        bar.update(len(part))
        if here.is_main:
            write_predictions(path, [answered[r.id] for r in records if r.id in answered])
    bar.close()

    if here.is_main:
        predictions = [answered[r.id] for r in records]
        metrics = compute_metrics(predictions)
        name = args.name or args.adapter or args.model
        write_metrics(out / "metrics.json", {**metrics, "name": name, "data": str(args.data), "prompt": prompt_hash()})
        table = markdown_table([(name, metrics)])
        with replacing(out / "table.md") as f:
            f.write(table)
        print(table)
        if args.report_faces:
            by_id = dict(zip((r.id for r in records), faces.paths))
            write_eval_page(
                out / "report.html",
                predictions,
                records,
                lambda record: load_image(by_id[record.id]),
                metrics,
                title=name,
                max_faces=args.report_faces,
            )
            print(f"page: {out / 'report.html'}")


def main() -> None:
    args = parse_args()
    here = dist.setup(args.device, args.threads)
    try:
        evaluate(args, here)
    finally:
        dist.cleanup()


if __name__ == "__main__":
    run(main)
