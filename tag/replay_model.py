"""The model half of a replay: the policy as it was before a recorded step, and its references.

Base model + start adapter, named by the record's arguments, + the trained weights and AdamW moments of its
state.safetensors. One process, whole tensors: a step that ran on many ranks differs in the order of summation only.
"""

import hashlib
import math
import os
from pathlib import Path

import torch
from torch import Tensor

from tag import dist
from tag.data.batching import collate
from tag.data.faces import Faces
from tag.dist import Dist
from tag.errors import DataError
from tag.lora import copy_adapter, load_adapter, set_adapter, set_dropout, set_trainable
from tag.record import StepRecord
from tag.replay import Knobs, Outcome, Scores, evaluate, face_records, inner_updates, layout, pass_masks
from tag.trainable import adamw, scheduled_lr, train_projector, trained_parameters
from tag.vlm import DTYPES, load_vlm


class RecordedModel:
    """Scores the recorded completions and turns coefficients into gradients of the trained parameters."""

    def __init__(
        self,
        record: StepRecord,
        here: Dist,
        *,
        model: str | None = None,
        adapter: str | None = None,
        image_root: str | os.PathLike | None = None,
        micro_tokens: int | None = None,
        prefix_sharing: bool | None = None,
    ) -> None:
        """model, adapter, image_root: where those of the run are now, if not where its arguments say.
        micro_tokens, prefix_sharing: another layout than the run's; it must not change any result.
        Raises DataError for a record without state and for whatever does not fit it.
        """
        if not record.state:
            raise DataError("the record has no state.safetensors (train_grpo.py --record-state writes it)")
        args = _checked(record.meta["args"])
        self.record, self.args, self.here = record, args, here
        adapter = _existing(adapter or args["adapter"], "adapter", "--adapter")
        self.vlm = load_vlm(model or args["model"], args["dtype"], here.device)
        # How it was computed, which moves results by rounding; not said by runs from before there were these flags.
        dense, apart, hf_tower = (args.get(f, False) for f in ("dense_attention", "no_frozen_shortcut", "hf_tower"))
        self.vlm.compute_by(dense, not apart, hf_tower)
        # The order of train_grpo.py, so that parameters have the same names and the reference the same weights.
        self.vlm.keep_projector("base")
        load_adapter(self.vlm.hf_model, adapter, "policy")
        self.vlm.keep_projector("sft")
        copy_adapter(self.vlm.hf_model, "policy", "reference")
        set_trainable(self.vlm.hf_model, "policy")
        set_dropout(self.vlm.hf_model, 0.0)
        train_projector(self.vlm, on=args["train_projector"])
        if args["activation_checkpointing"]:
            self.vlm.hf_model.gradient_checkpointing_enable({"use_reentrant": False})
            self.vlm.train()
        self.params = trained_parameters(self.vlm)
        self.load(record)

        # The batch, laid out as the run did unless asked otherwise.
        root = _existing(image_root or args["image_root"] or args["data"], "image folder", "--image-root")
        faces = Faces(face_records(record), root, self.vlm)
        _check_images(record, faces.paths)
        self.tower = faces.tower(range(len(faces)))  # (B, patches, D)
        prompt = self.vlm.prompt()
        if prompt.input_ids.tolist() != record.tensors["prompt_ids"].tolist():
            raise DataError("the record's prompt is not that of this version and tokenizer")
        ids = record.tensors["token_ids"]  # (N, T)
        if int(ids.min()) < 0 or int(ids.max()) >= self.vlm.text_config.vocab_size:
            raise DataError("the record holds token ids that this model does not have")
        passes = layout(record, prompt, micro_tokens, prefix_sharing)
        self.batches = [collate(rows, self.vlm.pad_id).to(here.device) for rows in passes]
        self.passes = pass_masks(record, passes)

    def load(self, record: StepRecord) -> None:
        """Weights and AdamW moments as they were before `record`'s step. Raises DataError if they do not fit."""
        state = record.state
        fused = not self.args.get("no_fused_optimizer", True)  # runs from before the flag had no fused kernel
        self.optimizer = adamw(self.params, self.args["lr"], self.args["weight_decay"], fused)
        expected = {
            f"{kind}.{n}": p.shape for n, p in self.params.items() for kind in ("param", "exp_avg", "exp_avg_sq")
        }
        expected["optimizer_step"] = torch.Size([1])
        wrong = sorted(
            n for n in {*expected, *state} if n not in expected or n not in state or state[n].shape != expected[n]
        )
        if wrong:
            raise DataError(f"state.safetensors is not of this model and adapter: {wrong[0]} does not fit")
        with torch.no_grad():
            for name, param in self.params.items():
                param.copy_(state[f"param.{name}"])
                param.grad = None
                self.optimizer.state[param] = {
                    "step": state["optimizer_step"].reshape(()).clone(),
                    "exp_avg": state[f"exp_avg.{name}"].to(param.device, copy=True),
                    "exp_avg_sq": state[f"exp_avg_sq.{name}"].to(param.device, copy=True),
                }

    def score(self, who: str) -> Tensor:
        """Log-probs of the recorded completions under "policy", "sft" or "base", (N, T) on the CPU."""
        set_adapter(self.vlm.hf_model, {"policy": "policy", "sft": "reference", "base": None}[who])
        N, T = self.record.tensors["token_ids"].shape
        logprobs = torch.zeros(N, T, device=self.here.device)  # (N, T)
        # With gradient where the run had it: kernels may be chosen by that.
        with torch.set_grad_enabled(who == "policy"):
            for batch in self.batches:
                found, _ = self.vlm(batch, self.tower, projector=None if who == "policy" else who)
                logprobs += batch.scatter(found.detach(), N, T)
        set_adapter(self.vlm.hf_model, "policy")
        return logprobs.cpu()

    def gradient(self, coefficients: Tensor) -> tuple[dict[str, Tensor], float]:
        """sum c_it grad log pi(o_it) for every trained parameter, and its norm. coefficients: (N, T)."""
        for param in self.params.values():
            param.grad = None
        coefficients = coefficients.to(self.here.device)
        for batch in self.batches:
            logprobs, _ = self.vlm(batch, self.tower)  # (M,)
            logprobs.backward(batch.gather(coefficients))
        norm = dist.clip_gradients(list(self.params.values()), max_norm=0.0)
        return {name: p.grad.detach().clone() for name, p in self.params.items()}, norm

    def outcome(self, knobs: Knobs, scores: Scores) -> Outcome:
        """`evaluate`, with the gradient of the trained parameters."""
        found = evaluate(self.record, knobs, scores, self.passes)
        found.gradient, found.grad_norm = self.gradient(found.coefficients)
        return found

    def update(self, knobs: Knobs, scores: Scores, lr: float | None = None) -> None:
        """One inner update as the run made it: gradient, clip, AdamW. lr: instead of the run's."""
        found = self.outcome(knobs, scores)
        dist.clip_gradients(list(self.params.values()), self.args["clip_norm"])
        step, steps = int(self.record.meta["step"]), int(self.record.meta["steps"])
        scheduled = scheduled_lr(step, steps, *(self.args[a] for a in ("lr", "warmup_steps", "lr_schedule")))
        for group in self.optimizer.param_groups:
            group["lr"] = scheduled if lr is None else lr
        if math.isfinite(found.grad_norm):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def scores(self, knobs: Knobs, references: tuple[str, ...], more: int = 0, lr: float | None = None) -> Scores:
        """Log-probs at the step's last inner update, the ones before it made again with `knobs`.

        references: those wanted beside it. more: that many inner updates on the same batch beyond the run's.
        Leaves the weights there; `load` goes back.
        """
        self.load(self.record)
        policy = self.score("policy")
        scores = Scores(policy, policy, {name: self.score(name) for name in references})
        updates = inner_updates(self.record) - 1
        for k in range(updates + more):
            self.update(knobs, scores, lr if k >= updates else None)
            scores.policy = self.score("policy")
        return scores


# What is read here of a run's arguments, beside the Knobs.
_ARGUMENTS = {
    "model": str,
    "adapter": str,
    "data": str,
    "image_root": str | None,
    "dtype": str,
    "train_projector": bool,
    "activation_checkpointing": bool,
    "lr": int | float,
    "weight_decay": int | float,
    "clip_norm": int | float,
    "warmup_steps": int,
    "lr_schedule": str,
}


def _checked(args: dict) -> dict:
    for name, kind in _ARGUMENTS.items():
        if not isinstance(args.get(name), kind):
            raise DataError(f"the record's {name} is {args.get(name)!r}: not a record of this train_grpo.py")
    if args["dtype"] not in DTYPES:
        raise DataError(f"the record's dtype is {args['dtype']!r}, not one of {', '.join(DTYPES)}")
    return args


def _existing(path: str | os.PathLike, what: str, flag: str) -> Path:
    if not Path(path).exists():
        raise DataError(f"the run's {what} is not at {path} any more; say where it is with {flag}")
    return Path(path)


def _check_images(record: StepRecord, paths: list[Path]) -> None:
    for b, (face, path) in enumerate(zip(record.meta["faces"], paths, strict=True)):
        with open(path, "rb") as f:
            if hashlib.file_digest(f, "sha256").hexdigest() != face.get("sha256"):
                raise DataError(f"{path} is not the image that face {b} of the record was (its sha256 differs)")
