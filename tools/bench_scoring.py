#!/usr/bin/env python3
"""Scoring a group behind one copy of its prompt, or apart; and the memory of log-probs at the full vocabulary.

    python tools/bench_scoring.py --out docs/results/bench_scoring.json                 # tiny model, CPU
    python tools/bench_scoring.py --config small --group-size 4 --memory-tokens 256 --repeats 1 --out x.json
    python tools/bench_scoring.py --config 7b --device cuda --out y.json

Prefix sharing: the same completions, as long as the prompt and then half and twice as long, in one forward and backward
pass behind one copy of the prompt and behind --group-size copies of it.

Memory: log-probs of --memory-tokens positions over a vocabulary of 152,064 from hidden states of 64, fp32, forward and
backward: peak resident (on a GPU allocated) bytes on top of weights, hidden states and their gradient included.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from tag import dist
from tag.args import check
from tag.bench.flags import bench_parser, run_bench, with_sizes
from tag.bench.measure import median, peak_memory, rounds, timed
from tag.bench.output import card, print_table, write_json
from tag.bench.workload import bench_vlm
from tag.data.batching import Group, collate, split_groups
from tag.grpo import token_logprobs_and_entropy
from tag.lora import add_lora

VOCABULARY, HIDDEN = 152_064, 64


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line of this tool."""
    p = bench_parser(__doc__, "tools/bench_scoring.py")
    p.add_argument("--group-size", type=int, default=8)
    p.add_argument("--lora-rank", type=int, default=16)
    p.add_argument("--memory-tokens", type=int, default=64 * 512, help="positions of the memory measurement")
    args = with_sizes(p.parse_args(argv))
    check(args.group_size >= 2, "--group-size must be at least 2")
    return args


def sharing(vlm, args, ratio: float) -> dict:
    """Seconds of forward and backward, together and apart, with completions `ratio` times as long as the prompt."""
    device, prompt = torch.device(vlm.device), vlm.prompt()
    P, G = len(prompt.input_ids), args.group_size
    length = max(1, round(ratio * P))
    generator = torch.Generator().manual_seed(0)
    completions = torch.randint(1000, (G, length), generator=generator).tolist()
    group = Group(prompt, 0, completions, list(range(G)))
    patches = vlm.tokens_per_image * vlm.merge_size**2
    width = vlm.hf_model.config.vision_config.hidden_size
    tower = 0.1 * torch.randn(1, patches, width, generator=generator)
    tower = tower.to(device, vlm.compute_dtype)
    layouts = {"shared": [[group]], "apart": [[alone] for alone in split_groups([group])]}
    batches = {name: collate(rows, vlm.pad_id).to(device) for name, rows in layouts.items()}

    def score(name: str) -> None:
        vlm(batches[name], tower)[0].sum().backward()

    cpu: dict[str, list[float]] = {}
    sides = {name: lambda name=name: score(name) for name in batches}
    found = rounds(sides, device, args.repeats, seconds=args.seconds / 3, cpu=cpu)
    middle = {name: median(times) for name, times in found.items()}
    tokens = {name: batch.num_tokens for name, batch in batches.items()}
    return {
        "completion / prompt": ratio,
        "prompt": P,
        "completion": length,
        **middle,
        "ratio": middle["apart"] / middle["shared"],
        "cpu ratio": median(cpu["apart"]) / median(cpu["shared"]),
        "token ratio": tokens["apart"] / tokens["shared"],
        "seconds": found,
    }


def logprob_memory(args, device: torch.device) -> dict:
    """Peak bytes and seconds of `token_logprobs_and_entropy`, forward and backward."""
    weight = torch.randn(VOCABULARY, HIDDEN, device=device)

    def score(tokens: int = args.memory_tokens) -> None:
        hidden = torch.randn(tokens, HIDDEN, device=device, requires_grad=True)
        targets = torch.randint(VOCABULARY, (tokens,), device=device)
        token_logprobs_and_entropy(hidden, weight, targets)[0].sum().backward()

    score(8)
    seconds: list[float] = []
    peak = peak_memory(lambda: seconds.append(timed(score, device)), device)
    return {
        "positions": args.memory_tokens,
        "peak_gib": None if peak is None else peak / 2**30,
        "all_logits_gib": args.memory_tokens * VOCABULARY * 4 / 2**30,
        "seconds": seconds[0],
    }


def main(argv: list[str] | None = None) -> None:
    """Measure and write."""
    args = parse_args(argv)
    here = dist.setup(args.device, args.threads, not args.no_onednn)
    memory = logprob_memory(args, here.device)
    vlm = bench_vlm(args.config, here.device, args.dtype)
    add_lora(vlm.hf_model, args.lora_rank, 2.0 * args.lora_rank, 0.0)
    results = [sharing(vlm, args, ratio) for ratio in (0.5, 1.0, 2.0)]
    content = card("tools/bench_scoring.py", args, argv, here.device)
    write_json(args.out, content | {"prefix_sharing": results, "logprob_memory": memory})
    print_table([{k: v for k, v in r.items() if k != "seconds"} for r in results])
    print_table([memory])
    print(args.out)


if __name__ == "__main__":
    run_bench(main)
