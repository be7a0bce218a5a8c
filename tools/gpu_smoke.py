#!/usr/bin/env python3
"""One SFT step and one GRPO step at the size of Qwen2.5-VL-7B, without its weights: does it run, how fast, how exact?

    bash tools/gpu_smoke.sh                                             # fast tests first, then this
    python tools/gpu_smoke.py --out docs/results/gpu_smoke.json         # one GPU of 80 GB or more
    python tools/gpu_smoke.py --config tiny --device cpu --out x.json   # the same code in seconds

The model has the 7B configuration and random weights, made on the device in bf16; tokenizer and faces are those of the
embedded default, so nothing is downloaded. The steps call the project's own parts in the order of train_sft.py and
train_grpo.py. A random model earns no reward, so the advantages are drawn at random; and it never stops, so every
completion is as long as it may be.

Writes one JSON: hardware, versions, seconds and peak memory of every stage, the vision tower as ours and as
transformers', decoding speed (with CUDA graphs as well), sampled vs re-scored log-probs, gates. Exit code 1 if a gate
fails.
"""

import argparse
import gc
import json
import shlex
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from transformers import AutoTokenizer

from tag import dist
from tag.args import Parser, check, run
from tag.bench.measure import Stages, hardware
from tag.checkpoint import run_card
from tag.data.batching import Group, collate, plan_micro_batches
from tag.data.faces import Faces
from tag.data.order import rollout_seed
from tag.errors import UsageError
from tag.files import replacing
from tag.gates import check_mismatch, check_ratio, check_reference, mismatch, pad_logprobs
from tag.grpo import group_advantages, grpo_loss, loss_normaliser
from tag.lora import add_lora, copy_adapter, set_adapter, set_dropout, set_trainable
from tag.random_vlm import config_7b, random_vlm
from tag.rewards import score_completion
from tag.rollout import RolloutEngine
from tag.stepstats import StepStats
from tag.synth.dataset import write_dataset
from tag.tiny.checkpoint import build_config
from tag.trainable import adamw, train_projector, trainability_table, trained_parameters
from tag.vlm import DTYPES, TINY_MODEL, VLM

# Where the configurations differ; a flag wins.
SIZES = {
    "7b": dict(dtype="bfloat16", max_new_tokens=512, lora_rank=128, sft_faces=8),
    "tiny": dict(dtype="float32", max_new_tokens=24, lora_rank=8, sft_faces=4),
}
TOWER_BOUNDS = {"bfloat16": 0.1, "float32": 1e-4}  # mean difference of its states over their mean size


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line of this tool."""
    p = Parser(__doc__)
    p.add_argument("--config", choices=tuple(SIZES), default="7b", help="tiny: 0.4 M parameters")
    p.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    p.add_argument("--dtype", choices=tuple(DTYPES), help="default: bfloat16, tiny: float32")
    p.add_argument("--out", default="docs/results/gpu_smoke.json", help="the JSON to write")
    p.add_argument("--prompts", type=int, default=2, help="faces of the GRPO step")
    p.add_argument("--group-size", type=int, default=8, help="completions a face")
    p.add_argument("--max-new-tokens", type=int, help="default: 512, tiny: 24")
    p.add_argument("--sft-faces", type=int, help="sequences of the SFT step (default: 8, tiny: 4)")
    p.add_argument("--lora-rank", type=int, help="default: 128, tiny: 8")
    p.add_argument("--micro-tokens", type=int, default=8192, help="tokens of one forward pass")
    p.add_argument("--activation-checkpointing", action="store_true", help="for GPUs of 80 GB")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--fast-tests", default="not run", help="outcome of the fast tests, kept in the JSON")
    p.add_argument("--threads", type=int, default=0, help="CPU threads, 0 = PyTorch's choice")
    args = p.parse_args(argv)
    for name, value in SIZES[args.config].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    check(args.group_size >= 2 and args.prompts >= 1, "--group-size must be at least 2 and --prompts at least 1")
    return args


# ---- the vision tower -------------------------------------------------------------------------------------------


def tower_both_ways(vlm: VLM, faces: Faces, count: int, here: dist.Dist) -> dict:
    """States of `count` faces by tag/tower.py and by transformers: seconds of each, and how far they are apart."""
    stages, states = Stages(here.device), {}
    for name in ("ours", "transformers"):
        vlm.compute_by(hf_tower=name == "transformers")
        faces.tower(range(count))  # a first call chooses kernels
        stages.restart()
        states[name] = faces.tower(range(count)).float()  # (B, patches, D)
        stages.lap(name)
    vlm.compute_by()
    apart = (states["ours"] - states["transformers"]).abs().mean() / states["transformers"].abs().mean()
    return {"faces": count, "seconds": stages.seconds, "peak_gib": stages.peak_gib, "relative_difference": float(apart)}


# ---- the two steps ----------------------------------------------------------------------------------------------


def sft_step(vlm: VLM, faces: Faces, records: list, args, here: dist.Dist) -> dict:
    """One optimizer step as in train_sft.py: LoRA and the projector are trained."""
    params = trained_parameters(vlm)
    optimizer = adamw(params, 2e-5, 0.01)
    prompt = vlm.prompt()
    completions = [vlm.encode_completion(r.trace) for r in records]
    vlm.train()
    stages = Stages(here.device)

    tower = faces.tower(range(len(records)))  # (B, patches, D)
    stages.lap("encode")
    groups = [Group(prompt, b, [c], [b]) for b, c in enumerate(completions)]
    normaliser = float(sum(map(len, completions)))
    loss_sum, tokens = 0.0, 0
    for micro_batch in plan_micro_batches(groups, args.micro_tokens):
        batch = collate(micro_batch, vlm.pad_id).to(here.device)
        logprobs, _ = vlm(batch, tower)  # (M,)
        loss = -logprobs.sum() / normaliser
        loss.backward()
        loss_sum, tokens = loss_sum + float(loss.detach()), tokens + batch.num_tokens
    stages.lap("forward_backward")
    grad_norm = dist.clip_gradients(list(params.values()), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    stages.lap("optimizer")
    return {
        "loss": loss_sum,
        "grad_norm": grad_norm,
        "tokens": tokens,
        "tokens_per_second": tokens / stages.seconds["forward_backward"],
        "seconds": stages.seconds,
        "peak_gib": stages.peak_gib,
    }


def grpo_step(vlm: VLM, engine: RolloutEngine, faces: Faces, records: list, args, here: dist.Dist) -> dict:
    """One optimizer step as in train_grpo.py: the adapter is trained, KL is measured to a frozen copy of it."""
    copy_adapter(vlm.hf_model, "policy", "reference")
    vlm.keep_projector("sft")
    set_trainable(vlm.hf_model, "policy")
    set_dropout(vlm.hf_model, 0.0)
    train_projector(vlm, on=False)
    vlm.train(args.activation_checkpointing)  # Hugging Face recomputes in training mode only
    params = trained_parameters(vlm)
    optimizer = adamw(params, 1e-6, 0.01)
    G, prompt, B = args.group_size, vlm.prompt(), len(records)
    seeds = [rollout_seed(args.seed, 0, i, g) for i in range(B) for g in range(G)]

    # What a first call pays for (kernels, buffers) is not what a step costs.
    stages = Stages(here.device)
    tower = faces.tower(range(B))  # (B, patches, D)
    with torch.no_grad():
        prompts = [replace(prompt, image_features=f) for f in vlm.project(tower)]
    engine.refresh("policy")
    engine.generate(prompts, G, seeds=seeds, max_new_tokens=8)
    stages.lap("warm_up")

    # 1. Sample.
    tower = faces.tower(range(B))
    with torch.no_grad():
        prompts = [replace(prompt, image_features=f) for f in vlm.project(tower)]  # (K, H) each
    stages.lap("encode")
    engine.refresh("policy")
    stages.lap("refresh")
    rollouts = engine.generate(prompts, G, seeds=seeds, max_new_tokens=args.max_new_tokens)  # N = B x G
    stages.lap("prefill_decode")
    sampled_logprobs, mask = (t.to(here.device) for t in pad_logprobs([r.logprobs for r in rollouts]))  # (N, T)
    N, T = mask.shape

    # 2. Reward, for its cost; advantages at random, see the module docstring.
    rewards = [score_completion(r.text, records[n // G]).total for n, r in enumerate(rollouts)]
    drawn = torch.randn(N, generator=torch.Generator().manual_seed(args.seed))
    advantages = group_advantages(drawn, G).to(here.device)  # (N,)
    stages.lap("reward")

    # 3. Lay out, 4. score under the reference.
    groups = [
        Group(prompt, b, [r.token_ids for r in rollouts[b * G : (b + 1) * G]], list(range(b * G, (b + 1) * G)))
        for b in range(B)
    ]
    batches = [collate(m, vlm.pad_id).to(here.device) for m in plan_micro_batches(groups, args.micro_tokens)]
    set_adapter(vlm.hf_model, "reference")
    ref_logprobs = torch.zeros(N, T, device=here.device)
    with torch.no_grad():
        for batch in batches:
            ref_logprobs += batch.scatter(vlm(batch, tower, projector="sft")[0], N, T)
    set_adapter(vlm.hf_model, "policy")
    stages.lap("reference")

    # 5. Normaliser, 6. loss and update.
    normaliser = loss_normaliser(mask, "sequence", args.max_new_tokens)
    old_logprobs = torch.zeros(N, T, device=here.device)
    stats = StepStats()
    update = stats.new_update()
    for batch in batches:
        logprobs, entropy = vlm(batch, tower)  # (M,), (M,)
        here_mask = batch.scatter(torch.ones_like(entropy), N, T)  # (N, T)
        logprobs, entropy = batch.scatter(logprobs, N, T), batch.scatter(entropy, N, T)
        old_logprobs = torch.where(here_mask.bool(), logprobs.detach(), old_logprobs)
        terms = grpo_loss(
            logprobs, old_logprobs, advantages, here_mask, ref_logprobs=ref_logprobs, normaliser=normaliser
        )
        terms.loss.backward()
        update.add(terms, here_mask, logprobs, entropy)
    stages.lap("forward_backward")
    grad_norm = dist.clip_gradients(list(params.values()), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    stages.lap("optimizer")

    found = mismatch(sampled_logprobs, old_logprobs, mask)
    tokens = sum(len(r.token_ids) for r in rollouts)
    decode = {"tokens_per_second": tokens / stages.seconds["prefill_decode"], "occupancy": engine.stats.occupancy}
    decode |= asdict(engine.stats)
    kept = ("loss", "kl", "entropy", "ratio_min", "ratio_max")
    metrics = stats.metrics(here)
    result = {
        **{name: metrics[name] for name in kept},
        "grad_norm": grad_norm,
        "reward": sum(rewards) / N,
        "advantages": "drawn at random",
        "prompt_tokens": len(prompt.input_ids),
        "completion_tokens": tokens,
        "scored_tokens": sum(batch.num_tokens for batch in batches),
        "decode": decode,
        "logprob_mismatch": asdict(found),
        "gates": {
            "mismatch": check_mismatch(found, args.dtype),
            "ratio": check_ratio(update.ratio, mask),
            "reference": check_reference(update.kl, mask, args.dtype),
        },
        "seconds": stages.seconds,
        "peak_gib": stages.peak_gib,
    }
    if here.device.type == "cuda":  # last: a failed capture would leave nothing to work with
        result["decode_cuda_graphs"] = with_cuda_graphs(engine, prompts, G, seeds, rollouts, args, here)
    return result


def with_cuda_graphs(engine: RolloutEngine, prompts, G: int, seeds, expected, args, here: dist.Dist) -> dict:
    """The same completions with the decoding step replayed as a CUDA graph (the weights are refreshed before)."""
    engine.cuda_graphs = True
    try:
        engine.generate(prompts, G, seeds=seeds, max_new_tokens=args.max_new_tokens)  # captures
        stages = Stages(here.device)
        rollouts = engine.generate(prompts, G, seeds=seeds, max_new_tokens=args.max_new_tokens)
        stages.lap("prefill_decode")
    except RuntimeError as e:
        return {"error": str(e).splitlines()[0][:200]}
    same = sum(r.token_ids == e.token_ids for r, e in zip(rollouts, expected)) / len(rollouts)
    tokens = sum(len(r.token_ids) for r in rollouts)
    seconds = stages.seconds["prefill_decode"]
    return {"seconds": seconds, "tokens_per_second": tokens / seconds, "same_completions": same}


# ---- all together -----------------------------------------------------------------------------------------------


def measure(args, here: dist.Dist, folder: str) -> dict:
    """Build the model, run both steps."""
    tokenizer = AutoTokenizer.from_pretrained(TINY_MODEL, trust_remote_code=False)
    config = config_7b(tokenizer) if args.config == "7b" else build_config(tokenizer, small=True)
    stages = Stages(here.device)
    vlm = random_vlm(config, tokenizer, here.device, DTYPES[args.dtype], args.seed)
    stages.lap("build")
    add_lora(vlm.hf_model, args.lora_rank, 2.0 * args.lora_rank, 0.05)
    train_projector(vlm)
    if args.activation_checkpointing:
        vlm.hf_model.gradient_checkpointing_enable({"use_reentrant": False})
    table = trainability_table(vlm.hf_model)
    records = write_dataset(folder, "train", max(args.sft_faces, args.prompts), workers=1)
    faces = Faces(records, folder, vlm, cache_gb=0)  # nothing is kept, so that encoding is measured

    tower = tower_both_ways(vlm, faces, len(records), here)
    sft = sft_step(vlm, faces, records[: args.sft_faces], args, here)
    gc.collect()  # the optimizer's moments
    engine = RolloutEngine(vlm, args.prompts * args.group_size, args.max_new_tokens)
    grpo = grpo_step(vlm, engine, faces, records[: args.prompts], args, here)
    model = {
        "parameters": sum(count for _, how, count, _ in table if "frozen" in how or how == "full"),
        "lora_parameters": sum(count for _, how, count, _ in table if how == "LoRA"),
        "gib": round(sum(size for *_, size in table) / 2**30, 2),
        "seconds_to_build": stages.seconds["build"],
    }
    return {"model": model, "tower": tower, "sft": sft, "grpo": grpo}


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 1 if a gate has failed."""
    args = parse_args(argv)
    here = dist.setup(args.device, args.threads)
    torch.manual_seed(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        try:
            found = measure(args, here, folder)
        except torch.OutOfMemoryError as e:
            hint = "try --activation-checkpointing, a lower --micro-tokens, or fewer --prompts"
            raise UsageError(f"out of GPU memory; {hint} ({str(e).splitlines()[0][:120]})") from None
    card = run_card("tools/gpu_smoke.py", {k: v for k, v in vars(args).items() if k not in ("out", "fast_tests")})
    card |= {"command": shlex.join(["python", "tools/gpu_smoke.py", *(sys.argv[1:] if argv is None else argv)])}
    card |= {"hardware": hardware(here.device), "fast_tests": args.fast_tests}
    complaints = [f"{name}: {text}" for name, text in found["grpo"]["gates"].items() if text]
    apart = found["tower"]["relative_difference"]
    if not apart <= TOWER_BOUNDS[args.dtype]:
        complaints.append(f"tower: states differ from transformers' by {apart:.1e}; --hf-tower does without ours")
    with replacing(args.out) as f:
        f.write(json.dumps(card | {"passed": not complaints} | found, indent=2) + "\n")
    for stage in ("tower", "sft", "grpo"):
        seconds = ", ".join(f"{name} {value:.3g}" for name, value in found[stage]["seconds"].items())
        print(f"{stage:5} seconds: {seconds}; peak GiB: {max(found[stage]['peak_gib'].values(), default=0):.1f}")
    decode, off = found["grpo"]["decode"], found["grpo"]["logprob_mismatch"]
    print(f"decoding: {decode['tokens_per_second']:.0f} tokens/s; sampled vs scored: mean {off['mean']:.1e}, ", end="")
    print(f"p99 {off['p99']:.1e}, max {off['max']:.1e}\n{args.out}")
    for complaint in complaints:
        print(f"GATE FAILED, {complaint}", file=sys.stderr)
    return 1 if complaints else 0


if __name__ == "__main__":
    run(lambda: sys.exit(main()))
