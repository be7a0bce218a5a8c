#!/usr/bin/env python3
"""SFT steps: train_sft.py, as it is, against TRL's SFTTrainer on the same records.

    python tools/bench_sft.py --peer trl --out docs/results/bench_sft.json
    python tools/bench_sft.py --peer none --config small --repeats 1 --out x.json       # seconds
    python tools/bench_sft.py --peer trl --config 7b --device cuda --out y.json

The same weights, faces, prompt, traces, batch size, LoRA rank and layers; the projector is frozen on both sides. Useful
tokens are those that carry loss, the completion tokens; a step's time is from one step's end to the next. Ours is
measured twice: as in a first epoch, when every face is new, and as in the ones after, when its vision features are
cached. The ratio is that of the first epoch.

What was done for TRL: activations recomputed only if ours are, the whole batch in one pass, fused AdamW, images decoded
beforehand (ours are read and decoded as training goes). It pads, because it refuses packing where there are images.

Also measured: the share of the machine's matrix rate, measured on the spot, that the useful part of our first-epoch
step amounts to (2 operations a weight and token forward and 2 backward, since frozen weights have no gradient;
attention, adapters, vision and padding do not count), and how full packed steps are on 1 to 8 ranks, whose passes run
in step, at the paper's batch of 256 and its lengths.
"""

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent / "peers"))

import torch
import trl_side

import train_sft
from tag import dist
from tag.bench.flags import peer_parser, run_bench, with_sizes
from tag.bench.measure import free_memory, matrix_rate, median
from tag.bench.our_side import StepClock, run_script
from tag.bench.output import card, print_table, write_json
from tag.bench.workload import bench_vlm, packing_fill, text_parameters
from tag.data.faces import Faces
from tag.data.records import write_records
from tag.synth.dataset import write_dataset
from tag.vlm import DTYPES, VLM

SIZES = {
    "tiny": dict(batch_size=16, lora_rank=64),
    "small": dict(batch_size=4, lora_rank=4),
    "7b": dict(batch_size=16, lora_rank=128),
}
PARTS = ((Faces, "tower", "vision"), (VLM, "forward", "forward"), (torch.Tensor, "backward", "backward"))


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line of this tool."""
    p = peer_parser(__doc__, "tools/bench_sft.py")
    p.add_argument("--batch-size", type=int, help="sequences a step (default: 16)")
    p.add_argument("--lora-rank", type=int, help="default: 64, 7b: 128")
    p.add_argument("--micro-tokens", type=int, default=8192, help="tokens of one of our forward passes")
    p.add_argument("--no-pack", action="store_true", help="ours without packing")
    args = with_sizes(p.parse_args(argv), SIZES)
    if args.peer == "trl":
        trl_side.require_trl()
    return args


def our_steps(args, folder: Path, here: dist.Dist, cached: bool) -> tuple[list[dict], VLM]:
    """Steps of train_sft.py in a first epoch, or in those after."""
    vlm = bench_vlm(args.config, here.device, args.dtype)
    batches = 1 if cached else args.warmup + args.repeats
    flags = {
        "data": folder, "out": folder / f"ours-{cached}", "dtype": args.dtype, "batch-size": args.batch_size,
        "train-faces": args.batch_size * batches, "epochs": (args.warmup + args.repeats) / batches,
        "lora-rank": args.lora_rank, "lora-alpha": 2.0 * args.lora_rank, "lora-dropout": 0.0,
        "micro-tokens": args.micro_tokens, "eval-faces": 0, "save-every": 0,
        "workers": 0 if here.device.type == "cpu" else 2,  # on a CPU they would take cores from the loop
    }  # fmt: skip
    argv = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    argv += ["--freeze-projector"] + ["--no-pack"] * args.no_pack
    argv += ["--activation-checkpointing"] * args.activation_checkpointing
    clock = StepClock(here.device, args.warmup, args.repeats, args.seconds / 3)
    run_script(train_sft, argv, vlm, here, clock, PARTS)
    return clock.measured, vlm


def trl_steps(args, folder: Path, records: list, here: dist.Dist) -> list[dict]:
    """Steps of TRL's SFTTrainer."""
    vlm = bench_vlm(args.config, here.device, args.dtype)
    clock = StepClock(here.device, args.warmup, args.repeats, args.seconds / 3)
    steps, bf16 = args.warmup + args.repeats, args.dtype == "bfloat16"
    recompute = args.activation_checkpointing
    settings = trl_side.common(str(folder / "trl"), steps, args.batch_size, here.device.type, bf16, recompute)
    lora = trl_side.lora_config(args.lora_rank, 2.0 * args.lora_rank)
    with clock.clock.wrapping(torch.Tensor, "backward", "backward"):
        clock.start()
        trl_side.sft_steps(vlm, records, str(folder), settings, 2048, lora, lambda _: clock.step())
    return clock.measured


def main(argv: list[str] | None = None) -> None:
    """Measure and write."""
    args = parse_args(argv)
    here = dist.setup(args.device, args.threads, not args.no_onednn)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        records = write_dataset(folder, "train", args.batch_size * (args.warmup + args.repeats), workers=1)
        write_records(folder / "train.jsonl", records)
        first, vlm = our_steps(args, folder, here, cached=False)
        later, _ = our_steps(args, folder, here, cached=True)
        prompt_tokens = len(vlm.prompt().input_ids)
        lengths = [len(vlm.encode_completion(r.trace)) for r in records]
        weights = text_parameters(vlm)
        del vlm
        free_memory(here.device)
        sides = {"ours": first, "ours, cached": later}
        if args.peer == "trl":
            sides["trl"] = trl_steps(args, folder, records, here)
    useful = args.batch_size * sum(lengths) / len(lengths)  # completion tokens of a mean step
    tokens = useful + args.batch_size * prompt_tokens
    seconds = {side: median([step["total"] for step in steps]) for side, steps in sides.items()}
    rate = matrix_rate(here.device, DTYPES[args.dtype])
    # Forward 2, backward to the activations 2: frozen weights have no gradient of their own.
    share = 4 * weights * tokens / seconds["ours"] / rate
    results = {
        "seconds": seconds,
        "useful_tokens_per_second": {side: useful / s for side, s in seconds.items()},
        "tokens_per_second": {side: tokens / s for side, s in seconds.items()},
        "share_of_matrix_rate": share,
        "matrix_rate": rate,
        "packing_fill": packing_fill(args.micro_tokens),  # at the paper's batch and lengths
        "steps": sides,
    }
    if "trl" in seconds:
        results["ratio"] = seconds["trl"] / seconds["ours"]
        results["ratio_cached"] = seconds["trl"] / seconds["ours, cached"]
        cpu = {side: median([step["cpu"] for step in steps]) for side, steps in sides.items()}
        results |= {"cpu_seconds": cpu, "cpu_ratio": cpu["trl"] / cpu["ours"]}
    write_json(args.out, card("tools/bench_sft.py", args, argv, here.device, trl_side.PEERS) | results)
    by_side = results["useful_tokens_per_second"], results["tokens_per_second"]
    print_table(
        [{"side": s, "s a step": t, "useful tokens/s": by_side[0][s], "all": by_side[1][s]} for s, t in seconds.items()]
    )
    fills = ", ".join(f"{ranks} ranks {fill:.1%}" for ranks, fill in results["packing_fill"].items())
    print(f"{share:.1%} of the matrix rate measured here; packed steps are full to: {fills}")
    if "ratio" in results:
        print(
            f"ours / TRL: {results['ratio']:.2f} in the first epoch, {results['ratio_cached']:.2f} after it; ", end=""
        )
        print(f"in processor time {results['cpu_ratio']:.2f}")
    print(args.out)


if __name__ == "__main__":
    run_bench(main)
