"""Stage 1: supervised fine-tuning on AU-grounded traces (paper Eq. 1), the whole loop top to bottom.

    python   train_sft.py --preset tiny --data data/synth --out runs/sft          # laptop, minutes
    torchrun --nproc-per-node 4 train_sft.py --data TAG310K --image-root IMAGES --out runs/sft-7b

Trained: LoRA on every attention and MLP linear of the language model, and the projector in full. Frozen: the vision
tower, the embeddings, all base weights. Loss: mean negative log-likelihood of the completion tokens (the end token
included), never of the prompt.

Departures from the paper, each a choice where it is silent or where we know better:
1. The loss is divided by the number of completion tokens of the whole optimizer step, over all ranks and micro-batches
   (not averaged per micro-batch), so `--micro-tokens` and the number of GPUs only change memory and speed.
2. Sequences are packed into rows of `--micro-tokens` with block-diagonal attention, each at its own rotary positions.
3. All randomness is a function of (seed, step, rank): a resumed run is the same run.

Run it again with the same flags to resume; see docs/metrics.md for what is logged.
"""

import json
import time
from pathlib import Path

import torch

from tag import dist
from tag.args import TOKENS, Parser, add_running_flags, check, run
from tag.checkpoint import run_card, write_run_card
from tag.data.batching import Group
from tag.data.faces import Faces
from tag.data.order import batch_indices, even_shares, num_steps
from tag.data.records import line_of, read_records
from tag.data.tokens import tokenise
from tag.evaluation.held_out import HeldOut
from tag.guard import Guard
from tag.lora import add_lora, load_adapter, save_adapter
from tag.passes import Passes
from tag.plan.startup import check_memory
from tag.rollout import RolloutEngine
from tag.runfolder import claim_run_folder
from tag.runlog import RunLog
from tag.trace import strip_boxes
from tag.trainable import adamw, print_trainable, scheduled_lr, train_projector, trained_parameters
from tag.vlm import PROJECTOR, load_vlm

PRESETS = {
    # The embedded default: the model that ships with the package, float32 on a CPU, minutes.
    "tiny": dict(
        model="tiny",
        dtype="float32",
        lora_rank=64,
        lora_alpha=128,
        lora_dropout=0.0,
        lr=3e-3,
        epochs=3,
        batch_size=16,
        micro_tokens=2048,
        eval_faces=128,
        eval_every=100,
        max_new_tokens=160,
        workers=0,
    )
}


def parse_args(argv=None):
    p = Parser(__doc__, PRESETS)
    a = p.add_argument_group("data").add_argument
    a("--data", required=True, help="folder with train.jsonl and val.jsonl (TAG records with traces)")
    a("--image-root", help="folder the records' image paths start from (default: the data folder)")
    a("--train-faces", type=int, default=0, help="use only the first N training records, 0 = all")
    a("--strip-bbox", action="store_true", help="remove the boxes from the traces (the paper's Table 3 ablation)")
    a("--out", required=True, help="run folder: adapter, checkpoints, metrics; resumed if it holds this run")
    a = p.add_argument_group("model").add_argument
    a("--model", default="Qwen/Qwen2.5-VL-7B-Instruct", help='checkpoint folder or hub name, or "tiny"')
    a("--adapter", help="start from this adapter instead of a fresh one")
    a("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="compute; trained weights are float32")
    a("--lora-rank", type=int, default=128)
    a("--lora-alpha", type=float, default=256.0)
    a("--lora-dropout", type=float, default=0.05)
    a("--freeze-projector", action="store_true", help="do not train the projector")
    a = p.add_argument_group("optimization").add_argument
    a("--epochs", type=float, default=3.0, help="passes over the training records")
    a("--batch-size", type=int, default=256, help="sequences per optimizer step, over all ranks (paper: 8 x 8 x 4)")
    a("--lr", type=float, default=2e-5, help="peak learning rate (AdamW)")
    a("--warmup", type=float, default=0.03, help="share of the steps with rising learning rate, then cosine to 0")
    a("--weight-decay", type=float, default=0.01)
    a("--clip-norm", type=float, default=1.0, help="largest gradient norm, 0 = no clipping")
    a("--context", type=int, default=2048, help="longest sequence in tokens; a longer record is an error")
    a("--seed", type=int, default=0)
    a = p.add_argument_group("evaluation on val.jsonl: accuracy and AU IoU, the best adapter is kept").add_argument
    a("--eval-every", type=int, default=200, help="steps between evaluations, 0 = only at the end")
    a("--eval-faces", type=int, default=512, help="the first N held-out records, 0 = none")
    a("--max-new-tokens", type=int, default=512)
    a = add_running_flags(p, micro_tokens=8192, save_every=100)
    a("--token-cache", help="folder of tokenised traces, for several runs to share (default: OUT/tokens)")
    a("--no-pack", action="store_true", help="one sequence a row with padding, instead of packed rows")
    return p.parse_args(argv)


def train(args, here: dist.Dist, resuming: bool) -> None:
    """The loop."""
    # ---- what to train on -----------------------------------------------------------------------------------------
    data = Path(args.data)
    image_root = args.image_root or data
    train_file = data / "train.jsonl"
    records = [r for r in read_records(train_file) if r.trace is not None][: args.train_faces or None]
    validation = read_records(data / "val.jsonl")[: args.eval_faces] if args.eval_faces else []
    check(
        len(records) >= args.batch_size,
        f"--batch-size {args.batch_size} exceeds the {len(records)} records with traces",
    )
    check(
        args.batch_size >= here.world, f"--batch-size {args.batch_size} leaves some of {here.world} ranks without work"
    )
    check_memory(args, "sft", here, len(records))

    # ---- model: LoRA -> freeze -> activation checkpointing -> shard -----------------------------------------------
    vlm = load_vlm(args.model, args.dtype, here.device)
    vlm.compute_by(args.dense_attention, not args.no_frozen_shortcut, args.hf_tower)
    torch.manual_seed(args.seed)
    if args.adapter:
        load_adapter(vlm.hf_model, args.adapter)
    else:
        add_lora(vlm.hf_model, args.lora_rank, args.lora_alpha, args.lora_dropout)
    saved_modules = () if args.freeze_projector else (PROJECTOR,)
    train_projector(vlm, on=not args.freeze_projector)
    if args.activation_checkpointing:
        vlm.hf_model.gradient_checkpointing_enable({"use_reentrant": False})
    sharded = dist.shard(vlm, here, args.shard)
    print_trainable(vlm, here)
    params = trained_parameters(vlm)  # name -> parameter
    optimizer = adamw(params, args.lr, args.weight_decay, fused=not args.no_fused_optimizer)

    # ---- faces and sequences; what is not there is found before anything is written -------------------------------
    prompt = vlm.prompt()
    faces = Faces(records, image_root, vlm, args.cache_gb, args.workers, args.on_bad_image)
    engine = RolloutEngine(vlm, args.rollout_rows, args.max_new_tokens, fused=not args.no_fused_projections)
    count, ids = len(records), faces.ids
    steps = num_steps(count, args.batch_size, args.epochs)
    held_out = HeldOut(validation, image_root, vlm, args, steps, here)
    completions = tokenise(
        [strip_boxes(r.trace) if args.strip_bbox else r.trace for r in records],
        vlm.tokenizer,
        vlm.eos_id,
        args.token_cache or Path(args.out) / TOKENS,
        here,
        workers=args.workers,
        longest=args.context - len(prompt.input_ids),
        name=lambda i: f"{line_of(train_file, ids[i])}: record {ids[i]!r}",
    )
    del records  # of 300,000 faces they are gigabytes, and the loop needs them no more

    # ---- where we are ---------------------------------------------------------------------------------------------
    card = run_card("train_sft.py", json.loads(json.dumps(vars(args), default=str)), world=here.world, steps=steps)
    guard = Guard(args.out, args, params, optimizer, here)
    passes = Passes(args.micro_tokens, args.out, here, vlm.pad_id, sharded, pack=not args.no_pack)
    faces.tell = passes.tell = guard.fault
    first_step = guard.resume(held_out, steps) if resuming else 0
    write_run_card(args.out, card, here)
    here.print(f"{count} records, {steps} steps of {args.batch_size}, {here.world} process(es), sharded: {sharded}")
    log = RunLog(args.out, here.is_main, steps, first_step, "sft")

    def share(step: int) -> list[int]:
        """This rank's records in `step`: about as many tokens as the others have, or they would wait for it."""
        indices = batch_indices(count, args.batch_size, step, args.seed)
        return [indices[k] for k in even_shares(completions.lengths[indices].tolist(), here.world)[here.rank]]

    # ---- the loop -------------------------------------------------------------------------------------------------
    last = min(steps, args.stop_after or steps)
    if first_step < last:
        faces.prefetch(share(first_step))
    for step in guard.steps(first_step, last, log):  # watched; SIGTERM and SIGUSR1 end it, saved
        started = time.perf_counter()
        torch.manual_seed((args.seed * 1_000_003 + step) * 1_009 + here.rank)  # dropout
        vlm.train()

        # 1. This rank's share of the step's sequences, cut into forward passes by token budget.
        guard.at("images", [ids[i] for i in share(step)])
        waited = faces.wait_seconds
        indices = faces.readable(share(step))
        tower = faces.tower(indices)  # (B, patches, D), frozen
        waited = faces.wait_seconds - waited
        if step + 1 < last:  # its images are read, decoded and resized while this step computes
            faces.prefetch(share(step + 1))
        groups = [Group(prompt, b, [completions[i]], [b]) for b, i in enumerate(indices)]
        passes.plan(groups)  # equally many on all ranks (tag/passes.py)

        # 2. One normaliser for the whole step: completion tokens over all micro-batches and ranks.
        num_targets = int(completions.lengths[indices].sum())
        normaliser = float(here.sum(num_targets))

        # 3. Forward and backward. If memory runs out, again in smaller passes.
        guard.at("passes")
        for batches in passes.attempts(optimizer):
            loss_sum, computed = torch.zeros((), device=here.device), 0
            with passes.catching():
                for k, (batch, counts) in enumerate(batches):
                    dist.set_gradient_sync(vlm, k == len(batches) - 1)  # reduce-scatter once, in the last backward
                    logprobs, _ = vlm(batch, tower)  # (M,)
                    loss = -(1.0 if counts else 0.0) * logprobs.sum() / normaliser
                    loss.backward()
                    loss_sum += loss.detach()
                    computed += batch.num_tokens
            logprobs = loss = None  # if memory ran out, they hold what the failed pass had in it
        dist.sum_replicated_gradients(list(params.values()), here)

        # 4. Update, unless the loss or the gradient is not finite on some rank.
        grad_norm = dist.clip_gradients(list(params.values()), args.clip_norm)
        lr = scheduled_lr(step, steps, args.lr, max(1, round(args.warmup * steps)), "cosine")
        for group in optimizer.param_groups:
            group["lr"] = lr
        if not (skipped := guard.skips(float(loss_sum), grad_norm, [ids[i] for i in indices])):
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        # 5. Log, evaluate, save.
        seconds = time.perf_counter() - started
        metrics = {
            "loss": float(here.sum(loss_sum)),
            "grad_norm": grad_norm,
            "skipped": float(skipped),
            "lr": lr,
            "epoch": (step + 1) * args.batch_size / count,
            "tokens": normaliser,
            "fill": sum(g.num_tokens for g in groups) / computed,
            "step_seconds": seconds,
            "data_wait_seconds": waited,
            "tokens_per_second": normaliser / seconds,
        }
        log.step(step, metrics, show=("loss", "grad_norm", "tokens_per_second"))
        guard.count_skipped(skipped)
        done, improved = step + 1, False
        if held_out.due(done):
            guard.at("evaluate")
            vlm.eval()
            engine.refresh("policy")
            scores = held_out.evaluate(engine)
            log.event(step, scores)
            if improved := held_out.improved(scores):
                save_adapter(vlm.hf_model, Path(args.out) / "best", "policy", args.model, saved_modules, here.is_main)
        guard.border(done, card | {"best": held_out.best}, improved)  # all ranks agree: save? stop? (tag/guard.py)

    faces.close()
    save_adapter(vlm.hf_model, Path(args.out) / "adapter", "policy", args.model, saved_modules, here.is_main)
    log.close()
    guard.close()
    here.print(f"adapter: {args.out}/adapter" + (f", best on held-out faces: {args.out}/best" if validation else ""))


def main() -> None:
    args = parse_args()
    here = dist.setup(args.device, args.threads, not args.no_onednn, args.hang_minutes)
    try:
        with claim_run_folder(args.out, "train_sft.py", args, here) as resuming:  # nobody else's until we are done
            train(args, here, resuming)
    finally:
        dist.cleanup()


if __name__ == "__main__":
    run(main)
