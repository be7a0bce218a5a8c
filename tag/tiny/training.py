"""The two training stages of the tiny base model: loops, optimizer, held-out checks."""

import math
import random
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from tag.boxes import iou
from tag.labels import CLASSES
from tag.synth.dataset import render_many
from tag.synth.params import AUS
from tag.tiny.idioms import idiom_batch, make_idioms
from tag.tiny.language import Packer, answer, decoder, language_loss, next_token_loss
from tag.tiny.questions import BOX_QUESTIONS, EXPRESSION_QUESTIONS, LIST_QUESTIONS, active_aus, conversation
from tag.tiny.tower import BatchedTower, Heads, bins_to_boxes, to_patches, tower_loss

# Seeds of the base model's faces: outside the train / val / test ranges of tag.synth.dataset.SPLITS.
BASE_SEEDS, HELD_OUT_SEEDS = 30_000_000, 39_000_000
OTHER_DOMAINS = 0.15  # share of line art and grey faces

TOWER_BATCH = 16  # faces
LANGUAGE_BATCH, LANGUAGE_WIDTH = 16, 336  # faces, tokens of a face with its questions

Log = Callable[[str], None]


@dataclass
class Faces:
    """Faces in memory: images (n, 224, 224, 3) uint8, labels (n,), intensities (n, 16), boxes (n, 16, 4)."""

    images: Tensor
    labels: Tensor
    intensities: Tensor
    boxes: Tensor

    def __len__(self) -> int:
        return len(self.images)


def draw_faces(start: int, counts: dict[str, int], workers: int) -> Faces:
    """Draw `counts[domain]` faces of consecutive seeds from `start` on.

    All with the habits of the shaded domain: what the base has seen of the other domains is how they look.
    """
    parts = []
    for domain, count in counts.items():
        if count:
            parts.append(render_many(range(start, start + count), domain, workers, habits="shaded"))
            start += count
    return Faces(*(torch.from_numpy(np.concatenate(p)) for p in zip(*parts)))


def base_faces(count: int, workers: int, cache: Path | None = None) -> tuple[Faces, Faces]:
    """The base model's training faces and its 300 held-out ones (shaded), read from the `cache` file if it exists."""
    if cache and cache.is_file():
        kept = torch.load(cache, weights_only=True)
        if len(kept["train"]["images"]) != count:
            raise ValueError(f"{cache} holds {len(kept['train']['images'])} faces, not {count}")
        return Faces(**kept["train"]), Faces(**kept["held_out"])
    other = int(count * OTHER_DOMAINS / 2)
    train = draw_faces(BASE_SEEDS, {"shaded": count - 2 * other, "lineart": other, "grey": other}, workers)
    held_out = draw_faces(HELD_OUT_SEEDS, {"shaded": 300}, workers)
    if cache:
        torch.save({"train": vars(train), "held_out": vars(held_out)}, cache)
    return train, held_out


def initialise(model: nn.Module) -> None:
    """Fan-in initialisation: the library's std of 0.02 is meant for wide layers and learns slowly in narrow ones."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and not name.endswith("lm_head"):
            into_residual = name.endswith(("attn.proj", "o_proj", "down_proj"))
            nn.init.normal_(module.weight, std=module.in_features**-0.5 * (0.5 if into_residual else 1.0))
    patch = model.model.visual.patch_embed.proj.weight
    nn.init.normal_(patch, std=0.5 * (patch[0].numel() / 2) ** -0.5)


class Optimizer:
    """Muon for the matrices, AdamW for the rest, one warm-up and cosine schedule: at this size, half the steps."""

    def __init__(self, matrices: list[Tensor], others: list[Tensor], lr: float, steps: int, warmup: int = 60):
        self.lr, self.steps, self.warmup, self.step_number = lr, steps, warmup, 0
        self.parameters = [*matrices, *others]
        self.parts = [
            torch.optim.Muon(matrices, lr=lr, momentum=0.95, weight_decay=0.02, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.98), weight_decay=0.0),
        ]

    def step(self, loss: Tensor) -> None:
        """Backward, clip, update, advance the schedule."""
        s = self.step_number
        scale = min(1.0, (s + 1) / self.warmup) * (0.02 + 0.49 * (1 + math.cos(math.pi * s / self.steps)))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = self.lr * scale
            part.step()
            part.zero_grad()
        self.step_number += 1


def train_tower(
    model: nn.Module, faces: Faces, held_out: Faces, steps: int, seed: int, compiled: bool, log: Log
) -> None:
    """Stage 1: vision tower and merger through throw-away heads."""
    torch.manual_seed(seed)
    visual = model.model.visual
    tower, heads = BatchedTower(visual), Heads(model.config.text_config.hidden_size)
    forward = torch.compile(tower.__call__) if compiled else tower
    matrices = [p for n, p in visual.named_parameters() if p.ndim == 2]
    others = [p for n, p in visual.named_parameters() if p.ndim != 2] + list(heads.parameters())
    optimizer = Optimizer(matrices, others, lr=2.5e-3, steps=steps)
    meter = _Meter(log, "vision", steps)
    for index in meter.loop(_batches(len(faces), TOWER_BATCH, steps, seed)):
        with torch.autocast("cpu", torch.bfloat16):
            tokens = forward(to_patches(faces.images[index]))
        parts = tower_loss(heads, tokens.float(), faces.labels[index], faces.intensities[index], faces.boxes[index])
        optimizer.step(sum(parts.values()))
        meter.add({k: v.item() for k, v in parts.items()})
    with torch.no_grad():
        aus, classes, boxes, _ = heads(tower_features(model, held_out).float())
    found = bins_to_boxes(boxes).round().long()
    pairs = zip(found.view(-1, 4).tolist(), held_out.boxes.view(-1, 4).tolist())
    log(
        f"vision held out: class {float((classes.argmax(-1) == held_out.labels).float().mean()):.3f}, "
        f"AU error {float((aus.sigmoid() - held_out.intensities).abs().mean()):.3f}, "
        f"box IoU {float(np.mean([iou(a, b) for a, b in pairs])):.3f}"
    )


@torch.no_grad()
def tower_features(model: nn.Module, faces: Faces, chunk: int = 50) -> Tensor:
    """Merged image tokens (n, 64, hidden) of all faces, bf16."""
    tower = BatchedTower(model.model.visual)
    out = []
    for i in range(0, len(faces), chunk):
        with torch.autocast("cpu", torch.bfloat16):
            out.append(tower(to_patches(faces.images[i : i + chunk]).to(torch.bfloat16)))
    return torch.cat(out).to(torch.bfloat16)


def train_language(
    model: nn.Module,
    packer: Packer,
    faces: Faces,
    held_out: Faces,
    steps: int,
    seed: int,
    compiled: bool,
    log: Log,
    num_boxes: int = 4,
    num_markup: int = 0,
    idiom_rows: int = 0,
    lr: float = 3e-3,
) -> None:
    """Stage 2 (and with markup exercises and idioms 3): the language model on frozen visual features."""
    started = time.time()
    features = tower_features(model, faces)
    torch.manual_seed(seed)
    name = "markup" if num_markup else "language"
    log(f"{name}: features of {len(faces)} faces in {time.time() - started:.0f} s")
    text = model.model.language_model
    matrices = [p for n, p in text.layers.named_parameters() if p.ndim == 2]
    others = [p for n, p in text.named_parameters() if p.ndim != 2] + [text.embed_tokens.weight]
    optimizer = Optimizer(matrices, others, lr=lr, steps=steps)
    forward = torch.compile(decoder) if compiled else decoder
    rng = random.Random(seed)
    arrays = [a.numpy() for a in (faces.labels, faces.intensities, faces.boxes)]
    pieces = packer.pieces()
    idioms = make_idioms(packer.ordinary_ids(), random.Random(0))  # the same for every seed: what one run has memorised
    meter = _Meter(log, name, steps)
    for index in meter.loop(_batches(len(faces), LANGUAGE_BATCH, steps, seed + 1)):
        rows = [conversation(rng, AUS, *(a[i] for a in arrays), num_boxes, num_markup, pieces) for i in index.tolist()]
        batch = packer.batch(rows, LANGUAGE_WIDTH)
        with torch.autocast("cpu", torch.bfloat16):
            parts = {"loss": language_loss(model, features[index], batch, forward)}
            if idiom_rows:
                ids, *rest = idiom_batch(idioms, rng, idiom_rows)
                parts["idioms"] = next_token_loss(model, text.embed_tokens(ids), *rest)
        optimizer.step(sum(parts.values()))
        meter.add({name: part.item() for name, part in parts.items()})
        if (meter.done % 200) == 0 and meter.done < steps:
            log(f"{name} {meter.done}: {evaluate(model, packer, held_out, 60, seed)}")


@torch.no_grad()
def evaluate(model: nn.Module, packer: Packer, faces: Faces, count: int = 300, seed: int = 0) -> dict[str, float]:
    """Greedy answers on held-out faces: class accuracy, box IoU over all AUs and over active ones, AU list overlap."""
    rng = random.Random(seed)
    faces = Faces(*(a[:count] for a in (faces.images, faces.labels, faces.intensities, faces.boxes)))
    features = tower_features(model, faces)

    def ask(questions: list[str]) -> list[str]:
        found = answer(model, packer, features.to(model.dtype), questions)
        return [packer.decode(ids) for ids in found]

    said = ask([rng.choice(EXPRESSION_QUESTIONS) for _ in range(len(faces))])
    right = [CLASSES[c] in text for c, text in zip(faces.labels.tolist(), said)]
    overlaps: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(2):
        which = [rng.randrange(len(AUS)) for _ in range(len(faces))]
        boxes = ask([BOX_QUESTIONS[0].format(name=AUS[w]) for w in which])
        for i, (w, text) in enumerate(zip(which, boxes)):
            overlaps[bool(faces.intensities[i, w] > 0)].append(_box_iou(text, faces.boxes[i, w].tolist()))
    lists = ask([LIST_QUESTIONS[0]] * len(faces))
    agree = []
    for i, text in enumerate(lists):
        true, told = set(active_aus(AUS, faces.intensities[i].numpy())), set(re.findall(r"AU\d+", text))
        agree.append(len(true & told) / len(true | told) if true | told else 1.0)
    return {
        "class_accuracy": round(float(np.mean(right)), 3),
        "box_iou": round(float(np.mean(overlaps[True] + overlaps[False])), 3),
        "box_iou_active": round(float(np.mean(overlaps[True] or [0.0])), 3),
        "au_list_jaccard": round(float(np.mean(agree)), 3),
    }


def _box_iou(text: str, box: list[int]) -> float:
    numbers = [int(v) for v in re.findall(r"\d+", text)]
    return iou(numbers, box) if len(numbers) == 4 else 0.0


def _batches(count: int, size: int, steps: int, seed: int) -> Iterator[Tensor]:
    """`steps` batches of indices, every face once per pass."""
    generator = torch.Generator().manual_seed(seed)
    size, order, at = min(size, count), None, 0
    for _ in range(steps):
        if order is None or at + size > count:
            order, at = torch.randperm(count, generator=generator), 0
        yield order[at : at + size]
        at += size


class _Meter:
    """Progress bar plus a log line of smoothed losses every 50 steps."""

    def __init__(self, log: Log, name: str, steps: int):
        self.log, self.name, self.steps, self.done, self.mean = log, name, steps, 0, {}
        self.started = time.time()

    def loop(self, batches: Iterator[Tensor]) -> Iterator[Tensor]:
        """The batches, under a progress bar."""
        yield from tqdm(batches, desc=self.name, total=self.steps, mininterval=5)

    def add(self, parts: dict[str, float]) -> None:
        """Count a step with its losses."""
        self.done += 1
        for key, value in parts.items():
            self.mean[key] = value if self.done == 1 else 0.95 * self.mean[key] + 0.05 * value
        if self.done % 50 == 0:
            text = ", ".join(f"{k} {v:.3f}" for k, v in self.mean.items())
            self.log(f"{self.name} {self.done}/{self.steps} ({time.time() - self.started:.0f} s): {text}")
