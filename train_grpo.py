"""Stage 2: GRPO with AU-grounded rewards (paper Eq. 2-5), the whole loop top to bottom.

    python train_grpo.py --preset tiny --data data/synth --adapter runs/sft/best --out runs/tag    # laptop, minutes
    torchrun --nproc-per-node 4 train_grpo.py --data TAG310K --image-root IMAGES \\
        --adapter runs/sft-7b/best --out runs/tag-7b

Each step: sample G completions per face -> reward their parts -> advantages within each group -> log-probs under policy
and reference -> clipped loss with KL -> backward -> update -> log -> save.

Departures from the paper (docs/grpo.md has the reason of each, and its switch if there is one):
1. KL is measured to the SFT model (`--kl-reference sft`); Eq. 2 writes pi_old there, which would make the term vanish.
2. The ratio is per token, as in DeepSeekMath and verl (`--ratio-level sequence` is GSPO's).
3. R_AU: no box earns 0, only the first three boxes count, and on a face without activated AUs the part is absent.
4. One normaliser for the whole optimizer step, so micro-batches, ranks, padding and prefix sharing never change the
   gradient; FSDP2 averages nothing.
5. No dropout: the policy that is scored is the one that sampled. Gates check that, and stop the run if it is not so.

`--preset` takes sets of flags by name, `--preset tiny dapo`: tiny is the embedded default; paper, verl, deepseekmath,
drgrpo and dapo are losses (tag/presets.py names their sources). Run it again with the same flags to resume; see
docs/metrics.md for what is logged.
"""

import json
from dataclasses import replace
from pathlib import Path

import torch

from tag import dist
from tag.args import Parser, add_running_flags, check, run
from tag.checkpoint import run_card, write_run_card
from tag.data.batching import group_completions
from tag.data.faces import Faces
from tag.data.order import batch_indices, num_steps, rollout_seed
from tag.data.records import read_records
from tag.evaluation.held_out import HeldOut
from tag.gates import check_mismatch, check_ratio, check_reference, enforce, mismatch, pad_logprobs
from tag.grpo import KL_ESTIMATORS, LOSS_AVERAGES, RATIO_LEVELS, group_advantages, grpo_loss, loss_normaliser
from tag.guard import Guard
from tag.lora import copy_adapter, load_adapter, save_adapter, set_adapter, set_dropout, set_trainable
from tag.passes import Passes
from tag.plan.startup import check_memory
from tag.presets import KL_REFERENCES, LOSS_PRESETS, describe
from tag.record import completion_entry, completion_tensors, face_entry, save_record, snapshot
from tag.rewards import AU_KINDS, audit, reward_means, score_completion
from tag.rollout import RolloutEngine, kv_plan
from tag.runfolder import claim_run_folder
from tag.runlog import RunLog
from tag.stepstats import RecordCost, StepStats, UpdateStats, first_step_note, length_metrics
from tag.trainable import LR_SCHEDULES, adamw, print_trainable, scheduled_lr, train_projector, trained_parameters
from tag.vlm import PROJECTOR, load_vlm

PRESETS = {
    # The embedded default: the model that ships with the package, float32 on a CPU, minutes.
    "tiny": dict(
        model="tiny",
        dtype="float32",
        lr=2e-4,
        warmup_steps=10,
        lr_schedule="cosine",
        rollouts_per_step=64,
        max_steps=100,
        max_new_tokens=160,
        micro_tokens=8192,
        eval_faces=128,
        eval_every=25,
        save_every=25,
        workers=0,
    )
}


def parse_args(argv=None):
    p = Parser(__doc__, PRESETS | LOSS_PRESETS)
    a = p.add_argument_group("data").add_argument
    a("--data", required=True, help="folder with train.jsonl and val.jsonl (TAG records; traces are not read)")
    a("--image-root", help="folder the records' image paths start from (default: the data folder)")
    a("--train-faces", type=int, default=0, help="use only the first N training records, 0 = all")
    a("--out", required=True, help="run folder: adapter, checkpoints, metrics, rollouts; resumed if it holds this run")
    a = p.add_argument_group("model").add_argument
    a("--model", default="Qwen/Qwen2.5-VL-7B-Instruct", help='checkpoint folder or hub name, or "tiny"')
    a("--adapter", required=True, help="adapter of the SFT stage: where RL starts, and its KL reference")
    a("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="compute; trained weights are float32")
    a("--train-projector", action="store_true", help="train the projector too (the paper freezes it in RL)")
    a = p.add_argument_group("sampling").add_argument
    a("--group-size", type=int, default=8, help="G, completions per face")
    a("--rollouts-per-step", type=int, default=512, help="completions per step over all ranks, a multiple of G")
    a("--temperature", type=float, default=1.0, help="1 = the distribution trained on; a gate refuses others")
    a("--max-new-tokens", type=int, default=512)
    a = p.add_argument_group("reward, R = R_AU + R_ans + R_fmt").add_argument
    a("--au-reward", choices=AU_KINDS, default="iou", help="iou: Eq. 3-4; none: RLVR; f1: Table 4; others: ours")
    a("--format-bonus", type=float, default=0.1, help="R_fmt of a well-formed trace")
    a("--no-advantage-std", action="store_true", help="A = R - mean, not divided by the group's std (Dr. GRPO)")
    a = p.add_argument_group("loss").add_argument
    a("--clip-eps", type=float, default=0.2, help="ratio is clipped to [1 - eps, 1 + eps]")
    a("--clip-eps-high", type=float, help="upper range if it differs (DAPO: 0.28)")
    a("--beta", type=float, default=0.04, help="weight of the KL penalty")
    a("--kl-estimator", choices=KL_ESTIMATORS, default="k3")
    a("--kl-reference", choices=KL_REFERENCES, default="sft", help="sft: --adapter; base: no adapter; old: pi_old")
    a("--loss-average", choices=LOSS_AVERAGES, default="sequence")
    a("--ratio-level", choices=RATIO_LEVELS, default="token")
    a = p.add_argument_group("optimization").add_argument
    a("--epochs", type=float, default=2.0, help="passes over the training records")
    a("--max-steps", type=int, default=0, help="this many steps instead of --epochs")
    a("--updates-per-step", type=int, default=1, help="optimizer updates on each batch of rollouts (mu)")
    a("--lr", type=float, default=1e-6, help="learning rate after the warm-up (AdamW)")
    a("--warmup-steps", type=int, default=0, help="steps with rising learning rate")
    a("--lr-schedule", choices=LR_SCHEDULES, default="constant", help="what follows: constant, or cosine to 0")
    a("--weight-decay", type=float, default=0.01)
    a("--clip-norm", type=float, default=1.0, help="largest gradient norm, 0 = no clipping")
    a("--seed", type=int, default=0)
    a = p.add_argument_group("evaluation on val.jsonl: accuracy and AU IoU, the best adapter is kept").add_argument
    a("--eval-every", type=int, default=50, help="steps between evaluations, 0 = only at the end")
    a("--eval-faces", type=int, default=512, help="the first N held-out records, 0 = none")
    a = add_running_flags(p, micro_tokens=16384, save_every=25)
    a("--no-prefix-sharing", action="store_true", help="score every completion behind its own copy of the prompt")
    a("--kv-gb", type=float, default=0.0, help="memory of the rollouts' KV cache, per rank, 0 = a share of the free")
    a("--cuda-graphs", action="store_true", help="replay the decoding step as a CUDA graph")
    a("--compile", action="store_true", help="torch.compile the decoding step (on a CPU it is slower)")
    a("--rollout-backend", choices=("engine", "hf"), default="engine", help="hf: Hugging Face generate, one process")
    a("--record-every", type=int, default=10, help="steps between step records (tag/record.py), 0 = only tripped gates")
    a("--record-state", action="store_true", help="records hold weights and moments too, for tools/replay_step.py")
    a("--record-budget-mb", type=float, default=1024, help="all records together; the oldest go")
    a("--waive-gates", action="store_true", help="warn instead of stopping when a self-check fails")
    args = p.parse_args(argv)
    check(args.group_size >= 2, f"--group-size {args.group_size}: a group needs at least 2 completions to compare")
    check(
        args.rollouts_per_step % args.group_size == 0,
        f"--rollouts-per-step {args.rollouts_per_step} is not a multiple of --group-size {args.group_size}",
    )
    return args


def train(args, here: dist.Dist, resuming: bool) -> None:
    """The loop. N completions on this rank = its faces x G, prompt-major; T the longest of them."""
    # ---- what to train on
    data, out, G = Path(args.data), Path(args.out), args.group_size
    image_root = args.image_root or data
    records = read_records(data / "train.jsonl")[: args.train_faces or None]
    validation = read_records(data / "val.jsonl")[: args.eval_faces] if args.eval_faces else []
    faces_per_step = args.rollouts_per_step // G
    check(faces_per_step >= here.world, f"{faces_per_step} faces a step leave some of {here.world} ranks without work")
    check_memory(args, "grpo", here, len(records))

    # ---- model: LoRA -> reference -> freeze -> activation checkpointing -> shard
    vlm = load_vlm(args.model, args.dtype, here.device)
    vlm.compute_by(args.dense_attention, not args.no_frozen_shortcut, args.hf_tower)
    vlm.keep_projector("base")
    projector_in_adapter = PROJECTOR in load_adapter(vlm.hf_model, args.adapter, "policy")
    vlm.keep_projector("sft")
    if args.kl_reference == "sft":
        copy_adapter(vlm.hf_model, "policy", "reference")
    set_trainable(vlm.hf_model, "policy")
    set_dropout(vlm.hf_model, 0.0)
    train_projector(vlm, on=args.train_projector)
    saved_modules = (PROJECTOR,) if args.train_projector or projector_in_adapter else ()
    if args.activation_checkpointing:
        vlm.hf_model.gradient_checkpointing_enable({"use_reentrant": False})
        vlm.train()  # Hugging Face recomputes in training mode only; there is no dropout left that it could turn on
    sharded = dist.shard(vlm, here, args.shard)
    print_trainable(vlm, here)
    params = trained_parameters(vlm)  # name -> parameter
    optimizer = adamw(params, args.lr, args.weight_decay, fused=not args.no_fused_optimizer)

    prompt = vlm.prompt()
    faces = Faces(records, image_root, vlm, args.cache_gb, args.workers, args.on_bad_image)
    engine = RolloutEngine(
        vlm,
        args.rollout_rows,
        args.max_new_tokens,
        backend=args.rollout_backend,
        max_kv_bytes=int(args.kv_gb * 2**30) or None,
        cuda_graphs=args.cuda_graphs,
        compiled=args.compile,
        fused=not args.no_fused_projections,
    )
    here.print(kv_plan(engine, len(prompt.input_ids), G))

    # ---- where we are
    steps = args.max_steps or num_steps(len(records), faces_per_step, args.epochs)
    held_out = HeldOut(validation, image_root, vlm, args, steps, here)
    plain = json.loads(json.dumps(vars(args), default=str))
    card = run_card("train_grpo.py", plain, world=here.world, steps=steps, objective=describe(plain))
    guard = Guard(out, args, params, optimizer, here)
    passes = Passes(args.micro_tokens, out, here, vlm.pad_id, sharded, split=args.no_prefix_sharing)
    faces.tell = passes.tell = guard.fault
    first_step = guard.resume(held_out, steps) if resuming else 0
    write_run_card(out, card, here)
    here.print(
        f"{len(records)} faces, {steps} steps of {faces_per_step} faces x {G} completions, {here.world} process(es), "
        f"sharded: {sharded}"
    )
    here.print("\n".join(card["objective"]))
    log = RunLog(out, here.is_main, steps, first_step, f"grpo ({args.au_reward})")

    def share(step: int) -> list[int]:
        """This rank's faces in `step`."""
        return batch_indices(len(records), faces_per_step, step, args.seed)[here.rank :: here.world]

    # ---- the loop
    record_cost = RecordCost()
    last = min(steps, args.stop_after or steps)
    for step in guard.steps(first_step, last, log):  # watched; SIGTERM and SIGUSR1 end it, saved
        clock = StepStats()
        recording = bool(args.record_every) and step % args.record_every == 0
        before = {}
        if recording and args.record_state:
            before = snapshot(params, optimizer)
            clock.lap("record_seconds")

        # 1. Sample G completions per face with the current policy, merged into the rollout engine's own weights.
        guard.at("images", [records[i].id for i in share(step)])
        indices, tower, waited = faces.batch(share(step), ahead=share(step + 1) if step + 1 < last else ())
        ids = [records[i].id for i in indices]  # tower (faces, patches, D), frozen
        with torch.no_grad():
            features = vlm.project(tower)  # (faces, K, H)
        guard.at("sample", ids)
        engine.refresh("policy")
        rollouts = engine.generate(
            [replace(prompt, image_features=f) for f in features],
            G,
            seeds=[rollout_seed(args.seed, step, i, g) for i in indices for g in range(G)],
            temperature=args.temperature,
            max_new_tokens=args.max_new_tokens,
        )  # N = faces x G
        sampled_logprobs, mask = pad_logprobs([r.logprobs for r in rollouts], here.device)  # (N, T), (N, T)
        N, T = mask.shape
        clock.lap("sample_seconds")

        # 2. Reward every part of every completion; advantages within each group (no group crosses ranks).
        rewards = [
            score_completion(r.text, records[indices[n // G]], args.au_reward, args.format_bonus)
            for n, r in enumerate(rollouts)
        ]
        totals = torch.tensor([r.total for r in rewards], dtype=torch.float32, device=here.device)  # (N,)
        advantages = group_advantages(totals, G, use_std=not args.no_advantage_std)  # (N,)
        clock.lap("reward_seconds")

        # 3. Lay the groups out: prompt once, then its G completions, each seeing the prompt and itself.
        passes.plan(group_completions(prompt, [r.token_ids for r in rollouts], G))  # as many passes on every rank

        # 4. Score under the reference. No second model: the same base with the frozen adapter, or with none.
        guard.at("reference")
        ref_logprobs = None
        if args.beta != 0 and args.kl_reference in ("sft", "base"):
            set_adapter(vlm.hf_model, "reference" if args.kl_reference == "sft" else None)
            ref_logprobs = passes.score(vlm, tower, N, T, projector=args.kl_reference)  # (N, T)
            set_adapter(vlm.hf_model, "policy")
        clock.lap("reference_seconds")

        # 5. One normaliser for the whole optimizer step, over all micro-batches and ranks, before the first backward.
        normaliser = here.sum(loss_normaliser(mask, args.loss_average, args.max_new_tokens))

        # 6. Update: ratio, clip, KL (tag/grpo.py), backward, step. At the first inner update pi_old is pi_theta itself.
        old_logprobs = torch.zeros(N, T, device=here.device)  # (N, T)
        complaints: list[str] = []
        lr = scheduled_lr(step, steps, args.lr, args.warmup_steps, args.lr_schedule)
        guard.at("update")
        for update in range(args.updates_per_step):
            for batches in passes.attempts(optimizer):  # if memory runs out: again, in smaller passes
                stats = UpdateStats()
                with passes.catching():
                    for k, (batch, counts) in enumerate(batches):
                        dist.set_gradient_sync(vlm, k == len(batches) - 1)  # reduce-scatter once, in the last backward
                        logprobs, entropy = vlm(batch, tower)  # (M,), (M,)
                        if not counts:
                            (logprobs.sum() * 0.0).backward()
                            continue
                        here_mask = batch.scatter(torch.ones_like(entropy), N, T)  # (N, T), what this pass scores
                        logprobs, entropy = batch.scatter(logprobs, N, T), batch.scatter(entropy, N, T)  # (N, T)
                        if update == 0:
                            old_logprobs = torch.where(here_mask.bool(), logprobs.detach(), old_logprobs)
                        terms = grpo_loss(
                            logprobs,
                            old_logprobs,
                            advantages,
                            here_mask,
                            ref_logprobs=old_logprobs if args.kl_reference == "old" else ref_logprobs,
                            clip_eps=args.clip_eps,
                            clip_eps_high=args.clip_eps_high,
                            beta=args.beta,
                            kl_estimator=args.kl_estimator,
                            loss_average=args.loss_average,
                            ratio_level=args.ratio_level,
                            normaliser=normaliser,
                        )
                        terms.loss.backward()
                        stats.add(terms, here_mask, logprobs, entropy)
                logprobs = entropy = terms = None  # if memory ran out, they hold what the failed pass had in it
            clock.updates.append(stats)
            dist.sum_replicated_gradients(list(params.values()), here)
            grad_norm = dist.clip_gradients(list(params.values()), args.clip_norm)
            skipped = guard.skips(stats.sums["loss"], grad_norm, ids)  # loss or gradient not finite on some rank

            # Gates: what was sampled is what is trained, and nothing moved before the first update.
            if update == 0:
                found = mismatch(sampled_logprobs, old_logprobs, mask)
                checks = [check_mismatch(found, args.dtype), check_ratio(stats.ratio, mask)]
                if step == 0 and args.kl_reference == "sft" and stats.kl is not None:
                    checks.append(check_reference(stats.kl, mask, args.dtype))
                complaints = [] if skipped else [c for rank in here.gather(checks) for c in rank if c]
            if complaints and not args.waive_gates:
                break
            for group in optimizer.param_groups:
                group["lr"] = lr
            if not skipped:
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if skipped:
                break
        clock.lap("update_seconds")

        # 7. Record the step, on schedule, when it was skipped, and when a gate has tripped; that stops the run unless
        #    gates are waived.
        guard.at("record")
        if recording or complaints or skipped:
            if args.record_state and not before and update == 0 and not args.waive_gates:
                before = snapshot(params, optimizer)  # stopped at the first inner update: nothing has moved yet
            outcome = {"complaints": complaints, "skipped": skipped, "loss": stats.sums, "grad_norm": grad_norm}
            logprobs = dict(sampled_logprobs=sampled_logprobs, old_logprobs=old_logprobs, ref_logprobs=ref_logprobs)
            numbers = completion_tensors(prompt, rollouts, rewards, advantages) | stats.tensors | logprobs
            seen = [face_entry(records[i], faces.paths[i]) for i in indices]
            said = [completion_entry(r, w) for r, w in zip(rollouts, rewards)]
            meta = card | {"step": step} | outcome
            save_record(out, meta, seen, said, numbers, before, here, args.record_budget_mb)
            clock.lap("record_seconds")
        enforce(complaints, args.waive_gates, step, log.write, args.out)
        guard.count_skipped(skipped)

        #    Then log, evaluate, save.
        everyone = [r for rank in here.gather(rewards) for r in rank]  # groups stay whole
        metrics = {
            **reward_means(everyone),
            **audit(everyone, G, use_std=not args.no_advantage_std),
            **clock.metrics(here),
            "record_share": record_cost.add(clock),
            "grad_norm": grad_norm,
            "skipped": float(skipped),
            "lr": lr,
            "data_wait_seconds": waited,
            "epoch": (step + 1) * faces_per_step / len(records),
            **found.metrics(here),
            **length_metrics(rollouts, mask, here),
        }
        log.step(step, metrics, show=("reward", "reward_ans", "reward_au", "kl", "grad_norm"))
        if step == 0:
            log.write(first_step_note(metrics, args.loss_average, args.updates_per_step))
        done, improved = step + 1, False
        if held_out.due(done):
            guard.at("evaluate")
            engine.refresh("policy")
            scores = held_out.evaluate(engine)
            log.event(step, scores)
            if improved := held_out.improved(scores):
                save_adapter(vlm.hf_model, out / "best", "policy", args.model, saved_modules, here.is_main)
        guard.border(done, card | {"best": held_out.best}, improved)  # all ranks agree: save? stop? (tag/guard.py)

    faces.close()
    save_adapter(vlm.hf_model, out / "adapter", "policy", args.model, saved_modules, here.is_main)
    log.close()
    guard.close()
    here.print(record_cost)
    here.print(f"adapter: {out}/adapter" + (f", best on held-out faces: {out}/best" if validation else ""))


def main() -> None:
    args = parse_args()
    here = dist.setup(args.device, args.threads, not args.no_onednn, args.hang_minutes)
    try:
        with claim_run_folder(args.out, "train_grpo.py", args, here) as resuming:  # nobody else's until we are done
            train(args, here, resuming)
    finally:
        dist.cleanup()


if __name__ == "__main__":
    run(main)
