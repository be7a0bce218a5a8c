"""A made-up run folder of train_grpo.py for tests and demos of the inspector: real records, synthetic numbers.

python tests/fake_run.py OUT      # synthetic faces and a run of 60 steps, 6 of them recorded
"""

import json
import random
import sys
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor
from transformers import AutoTokenizer

from tag.boxes import clip_to_canvas
from tag.data.batching import Prompt
from tag.data.records import Record
from tag.dist import Dist
from tag.grpo import LossTerms, group_advantages, grpo_loss, loss_normaliser
from tag.labels import CLASSES
from tag.record import completion_entry, completion_tensors, face_entry, save_record
from tag.rewards import Rewards, audit, reward_means, score_completion
from tag.rollout import Rollout
from tag.stepstats import StepStats
from tag.synth.dataset import write_dataset
from tag.synth.writer import write_trace
from tag.trace import format_box
from tag.vlm import TINY_MODEL

ALONE = Dist(0, 1, torch.device("cpu"))


@dataclass
class FakeRun:
    """What to make: `steps` steps, every `record_every`-th with a record of `faces` groups of `group_size`."""

    out: Path
    data: Path
    steps: int = 60
    record_every: int = 10
    faces: int = 5
    group_size: int = 8
    seed: int = 0
    texts: dict[tuple[int, int, int], str] = field(default_factory=dict)  # (step, group, sample) -> completion
    complaints: dict[int, list[str]] = field(default_factory=dict)
    args: dict = field(default_factory=dict)  # over the defaults below
    world: int = 1

    def __post_init__(self) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(TINY_MODEL)
        self.end = self.tokenizer.convert_tokens_to_ids("<|im_end|>")
        self.args = {
            **dict(
                preset=["tiny"], data=str(self.data), image_root=None, out=str(self.out), model="tiny", dtype="float32"
            ),
            **dict(group_size=self.group_size, rollouts_per_step=self.faces * self.group_size, max_new_tokens=160),
            **dict(au_reward="iou", format_bonus=0.1, no_advantage_std=False, clip_eps=0.2, clip_eps_high=None),
            **dict(beta=0.04, kl_estimator="k3", kl_reference="sft", loss_average="sequence", ratio_level="token"),
            **dict(updates_per_step=2, lr=3e-4, clip_norm=1.0, seed=self.seed, record_every=self.record_every),
            **dict(adapter="runs/sft/best", epochs=2.0, weight_decay=0.01, temperature=1.0, max_steps=self.steps),
            **self.args,
        }
        self.card = {
            "script": "train_grpo.py",
            "args": self.args,
            "versions": {"python": "3.11", "torch": "2.13.0"},
            "commit": "0" * 40,
            "world": self.world,
            "steps": self.steps,
        }

    def write(self) -> Path:
        """Faces (if they are not there yet), run.json, metrics.jsonl and records."""
        pool = write_dataset(self.data, "train", 3 * self.faces, workers=1)
        self.out.mkdir(parents=True, exist_ok=True)
        (self.out / "run.json").write_text(json.dumps(self.card))
        with open(self.out / "metrics.jsonl", "w") as f:
            for step in range(self.steps):
                rng = random.Random(f"{self.seed}-{step}")
                faces = rng.sample(pool, self.faces)
                skill = 0.35 + 0.5 * step / max(self.steps, 1)
                texts = [
                    self.texts.get((step, b, g)) or write_completion(face, skill, rng)
                    for b, face in enumerate(faces)
                    for g in range(self.group_size)
                ]
                rewards = [
                    score_completion(text, faces[n // self.group_size], self.args["au_reward"])
                    for n, text in enumerate(texts)
                ]
                metrics = self.step(step, faces, texts, rewards)
                f.write(json.dumps({"step": step, **metrics}) + "\n")
                if step % 15 == 14:
                    near = {"val_accuracy": skill + 0.05 * rng.random(), "val_au_iou": 0.2 + 0.6 * skill}
                    f.write(json.dumps({"step": step, **near}) + "\n")
        return self.out

    def step(self, step: int, faces: list[Record], texts: list[str], rewards: list[Rewards]) -> dict[str, float]:
        """One step's metrics; its record is written if it is due."""
        ids = [[*self.tokenizer.encode(text, add_special_tokens=False), self.end] for text in texts]
        rollouts = [
            Rollout(t, self.tokenizer.decode(t, skip_special_tokens=True), torch.zeros(len(t)), 7**20 + n, "stop", 0, 0)
            for n, t in enumerate(ids)
        ]
        totals = torch.tensor([r.total for r in rewards])
        advantages = group_advantages(totals, self.group_size, not self.args["no_advantage_std"])
        tensors, mask = self.numbers(step, ids, [r.text for r in rollouts])
        updates = self.args["updates_per_step"]
        clock = StepStats()
        stats = clock.new_update()
        new = tensors["logprobs"] if updates > 1 else tensors["old_logprobs"]
        ref = tensors["old_logprobs"] if self.args["kl_reference"] == "old" else tensors.get("ref_logprobs")
        settings = ("clip_eps", "clip_eps_high", "beta", "kl_estimator", "loss_average", "ratio_level")

        def loss(rows: Tensor) -> LossTerms:
            return grpo_loss(
                new,
                tensors["old_logprobs"],
                advantages,
                rows,
                ref_logprobs=ref,
                **{k: self.args[k] for k in settings},
                normaliser=loss_normaliser(mask, self.args["loss_average"], self.args["max_new_tokens"]),
            )

        stats.add(loss(mask), mask, new, tensors["entropy"])
        noted = stats.sums
        if self.world > 1:  # the main process notes the share of its own faces, which come first
            mine = mask.clone()
            mine[-(-self.faces // self.world) * self.group_size :] = False
            noted = {"loss": float(loss(mine).loss)}
        grad_norm = 0.4 + 0.5 * random.Random(step).random()
        if step % self.record_every == 0 or step in self.complaints:
            save_record(
                self.out,
                self.card
                | {"step": step, "complaints": self.complaints.get(step, []), "loss": noted}
                | {"grad_norm": grad_norm},
                [face_entry(face, self.data / face.image) for face in faces],
                [completion_entry(r, w) for r, w in zip(rollouts, rewards)],
                completion_tensors(Prompt(torch.arange(5), torch.zeros(3, 5), None), rollouts, rewards, advantages)
                | {k: tensors[k] for k in ("sampled_logprobs", "old_logprobs", "ref_logprobs") if k in tensors}
                | stats.tensors,
                {},
                ALONE,
            )
        mismatch = (tensors["sampled_logprobs"] - tensors["old_logprobs"])[mask].abs()
        return {
            **reward_means(rewards),
            **audit(rewards, self.group_size),
            **clock.metrics(ALONE),
            "grad_norm": grad_norm,
            "completion_tokens": float(mask.sum()) / len(ids),
            "truncated": 0.0,
            "logprob_mismatch_mean": float(mismatch.mean()),
            "logprob_mismatch_max": float(mismatch.max()),
        }

    def numbers(self, step: int, ids: list[list[int]], texts: list[str]) -> tuple[dict[str, Tensor], Tensor]:
        """Plausible per-token numbers: digits and words after a space are uncertain, the rest is nearly sure."""
        generator = torch.Generator().manual_seed(1000 * self.seed + step)
        N, T = len(ids), max(len(t) for t in ids)
        mask = torch.arange(T)[None] < torch.tensor([len(t) for t in ids])[:, None]  # (N, T)
        unsure = torch.tensor(
            [[float(self.tokenizer.convert_ids_to_tokens(t)[0] in "Ġ0123456789") for t in r] + [0.0] * (T - len(r))
             for r in ids]
        )  # fmt: skip

        def noise(scale: float) -> Tensor:
            return scale * torch.randn(N, T, generator=generator)

        entropy = 0.02 + unsure * torch.rand(N, T, generator=generator) * 1.8
        old = -entropy * torch.empty(N, T).exponential_(1.0, generator=generator) * 0.8 - 1e-3
        drift = 0.5 * (step / max(self.steps, 1)) ** 0.7
        tensors = {
            "sampled_logprobs": old + noise(2e-7),
            "old_logprobs": old,
            "logprobs": old + noise(0.12) * unsure,
            "entropy": entropy,
        }
        if self.args["kl_reference"] in ("sft", "base") and self.args["beta"]:
            tensors["ref_logprobs"] = old - drift * unsure * torch.rand(N, T, generator=generator) + noise(0.05 * drift)
        return {k: v.masked_fill(~mask, 0.0) for k, v in tensors.items()}, mask


def write_completion(face: Record, skill: float, rng: random.Random) -> str:
    """A trace as a policy of this skill might write it: boxes near the detector's, labels more or less often right."""
    if face.aus and rng.random() < 0.9:
        label = face.label if rng.random() < skill else rng.choice(CLASSES)
        aus = rng.sample(face.aus, min(len(face.aus), rng.choice((1, 2, 3, 3))))
    else:
        label, aus = face.label if rng.random() < skill else rng.choice(CLASSES), face.aus[:1]
    text = write_trace(label, aus, rng.randrange(2**31))
    for au in aus:
        jittered = clip_to_canvas([v + rng.gauss(0, 45 * (1.2 - skill)) for v in au.box])
        text = text.replace(format_box(au.box), format_box(jittered))
    damage = rng.random()
    if damage < 0.06:
        return text.replace("</think>", "")
    return text.replace("]</bbox>", "</bbox>", 1) if damage < 0.12 else text


if __name__ == "__main__":
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "demo")
    print(FakeRun(folder / "tag", folder / "data").write())
