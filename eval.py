"""Accuracy and AU IoU of a model on TAG records: greedy answers to the one prompt of the task.

    python   eval.py --preset tiny --data data/synth/test.jsonl --adapter runs/tag/best --out runs/tag/eval
    torchrun --nproc-per-node 4 eval.py --data TAG310K/test.jsonl --image-root IMAGES \\
        --adapter runs/tag-7b/best --out EVAL

Without --adapter the base model is asked (zero-shot). --backend hf asks any Hugging Face image-text model of a known
family, --backend openai one behind OpenAI-compatible servers (the key comes from the environment). All get the same
prompt. Decoding as in the paper: T = 0, top-p 0.9, at most 512 tokens, at most three boxes (a limit that no server
knows; there a fourth box breaks the format).

Writes into --out: metrics.json, predictions.jsonl (one line a face), table.md, speed.json, report.html (faces with
detector boxes in green and predicted ones in red), and with --against OTHER against.json (paired tests). Repeating the
command goes on where it was stopped; when nothing is left to ask, no model is loaded. A folder belongs to one model,
prompt, data and decoding, known by their content.
"""

import json
import time
from pathlib import Path

from tqdm import tqdm

from tag import dist
from tag.args import NO_ONEDNN, Parser, check, run
from tag.checkpoint import run_card
from tag.data.records import read_records
from tag.datagen.endpoint_flags import add_server_flags, check_server_flags
from tag.evaluation.against import check_comparable, compare, comparison_text
from tag.evaluation.answers import MISSING, AnswerBook, batches, find_faces, note_broken
from tag.evaluation.fingerprint import claim, digest, fingerprint
from tag.evaluation.metrics import compute_metrics, markdown_table, write_metrics
from tag.evaluation.models import load_model
from tag.evaluation.output import add_speed, same_json, write_report
from tag.evaluation.predictions import make_prediction
from tag.files import replacing, write_json
from tag.prompts import prompt_hash

PRESETS = {"tiny": dict(model="tiny", dtype="float32", max_new_tokens=160)}


def parse_args(argv=None):
    p = Parser(__doc__, PRESETS)
    a = p.add_argument_group("what is asked").add_argument
    a("--data", required=True, help="TAG records (.jsonl)")
    a("--split", help="only records of this split")
    a("--image-root", help="folder the records' image paths start from (default: where --data lies)")
    a("--faces", type=int, default=0, help="only the first N records, 0 = all")
    a(
        "--missing",
        choices=[*MISSING],
        default="error",
        help="a face without a readable image: stop, or count, or leave out",
    )
    a = p.add_argument_group("who answers").add_argument
    a("--backend", choices=("engine", "hf", "openai"), default="engine", help="ours, Hugging Face generate, or servers")
    a("--model", default="Qwen/Qwen2.5-VL-7B-Instruct", help='checkpoint folder, hub or served name, or "tiny"')
    a("--adapter", help="adapter folder; none = the base model, zero-shot")
    a("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    a("--max-new-tokens", type=int, default=512)
    a("--no-box-limit", action="store_true", help="let the model write more than three boxes")
    a("--image-size", type=int, default=512, help="side in pixels of the square that hf and openai models get")
    a = p.add_argument_group("--backend openai").add_argument
    add_server_flags(a, concurrency=16)
    a("--price", type=float, nargs=2, metavar=("IN", "OUT"), help="of a million tokens, where the server names no cost")
    a("--omit", nargs="+", default=[], choices=("temperature", "top_p", "max_tokens", "seed"), help="not to be sent")
    a("--request", type=json.loads, default={}, metavar="JSON", help='more to be sent, \'{"reasoning_effort": "low"}\'')
    a = p.add_argument_group("what is written").add_argument
    a("--out", required=True, help="folder for the results")
    a("--name", help="what the model is called in the table (default: the adapter's or model's path)")
    a("--against", metavar="OTHER", help="--out of another evaluation of the same faces, to compare with")
    a("--report-faces", type=int, default=200, help="faces on the HTML page, 0 = no page")
    a = p.add_argument_group("how it runs (never changes an answer)").add_argument
    a("--rollout-rows", type=int, default=64, help="faces that are answered together, per rank")
    a("--cuda-graphs", action="store_true", help="replay the decoding step as a CUDA graph")
    a("--device", choices=("auto", "cpu", "cuda"), default="auto")
    a("--threads", type=int, default=0, help="CPU threads, 0 = PyTorch's choice")
    a("--no-onednn", action="store_true", help=NO_ONEDNN)
    args = p.parse_args(argv)
    check_flags(args)
    return args


def check_flags(args) -> None:
    """Raise UsageError for flags that do not go together."""
    served = args.backend == "openai"
    check(served == bool(args.endpoint), "--backend openai and --endpoint URL go together")
    check_server_flags(args)
    check(
        args.backend == "engine" or not args.adapter,
        f"--adapter goes with --backend engine; merge it for {args.backend}",
    )
    check(isinstance(args.request, dict), "--request must be a JSON object")
    for name, least in (("max_new_tokens", 1), ("rollout_rows", 1), ("faces", 0)):
        check(getattr(args, name) >= least, f"--{name.replace('_', '-')} must be at least {least}")
    check(not args.price or min(args.price) >= 0, "--price must not be negative")


def evaluate(args, here: dist.Dist) -> None:
    """Answer every face once, then measure."""
    out = Path(args.out)
    records = read_records(args.data, args.split)[: args.faces or None]
    faces = find_faces(records, args.image_root or Path(args.data).parent)

    # ---- whose folder it is: hashing reads every image and weight, so one process does it for all
    def prepare() -> dict:
        found = fingerprint(args, faces)
        claim(out, found)
        if args.against:
            check_comparable(args.against, found)
        return found

    mine = here.from_main(prepare)
    book = AnswerBook(out, records, here)
    if book.waiting:
        faces = here.from_main(lambda: note_broken(faces))
        absent = [face for face in faces if face.missing]
        check(args.missing != "error" or not absent, f"{absent[0].missing if absent else ''} (--missing wrong or skip)")
        model = load_model(args, here)
        if here.is_main:
            card = run_card("eval.py", json.loads(json.dumps(vars(args), default=str)), prompt=prompt_hash())
            write_json(out / "run.json", card | {"fingerprint": mine})
            book.add([make_prediction(face.record, "", missing=face.missing) for face in absent])

        # ---- ask: every process its own batches, every answer kept as it comes
        started, answered = time.perf_counter(), 0
        shares = batches(len(records), model.batch_size, book.waiting, here)
        bar = tqdm(total=sum(map(len, shares)), desc="eval", disable=None if here.is_main else True)
        for share in shares:
            for found in model.answer([faces[i] for i in share if not faces[i].missing]):
                book.add([make_prediction(face.record, **vars(answer)) for face, answer in found])
                answered += len(found)
                bar.update(len(found))
        bar.close()
        if args.missing != "error":
            book.add([make_prediction(records[i], "", missing=why) for i, why in model.turned_down.items()])

        complaints = here.gather("; ".join(filter(None, [model.complaint(), *list(model.turned_down.values())[:1]])))
        answered, left = int(here.sum(answered)), book.close()
        if here.is_main and answered:
            add_speed(out / "speed.json", answered, time.perf_counter() - started, here)
        why = next(filter(None, complaints), "")
        check(not left, f"{left} faces got no answer ({why}); what is done is kept, the same command asks them again")
    else:
        here.print(f"all {len(records)} faces were answered before; nothing is asked again")

    # ---- measure
    if here.is_main:
        predictions = book.finish()
        measured = [p for p in predictions if not (p.missing and args.missing == "skip")]
        check(bool(measured), "every face was left out (--missing skip); is --image-root right?")
        name, left_out = args.name or args.adapter or args.model, len(predictions) - len(measured)
        if without := sum(bool(p.missing) for p in predictions):
            here.print(f"{without} of {len(predictions)} faces {MISSING[args.missing]} (--missing {args.missing})")
        metrics = compute_metrics(measured)
        about = {"name": name, "data": str(args.data), "prompt": prompt_hash()}
        about |= {"left_out": left_out, "fingerprint": digest(mine)}
        unchanged = same_json(out / "metrics.json", metrics | about)
        write_metrics(out / "metrics.json", metrics | about)
        table = markdown_table([(name, metrics)])
        with replacing(out / "table.md") as f:
            f.write(table)
        print(table)
        if args.report_faces and not (unchanged and (out / "report.html").is_file()):
            write_report(out / "report.html", measured, faces, metrics, name, args.report_faces)
        if args.against:
            found = compare(args.against, predictions, args.missing == "skip")
            write_json(out / "against.json", {"other": str(args.against), **found})
            print(comparison_text(found, args.against))


def main() -> None:
    args = parse_args()
    here = dist.setup(args.device, args.threads, not args.no_onednn)
    try:
        evaluate(args, here)
    finally:
        dist.cleanup()


if __name__ == "__main__":
    run(main)
