"""One step record as the data behind a step of the inspector: tokens, faces, boxes, and the arithmetic of the step.

Numbers per token are the recorded float32, as base64: exact, and decoded only when they are looked at. The arithmetic
is done by the functions that trained (tag.grpo, tag.rewards), not by the page.

Shapes: N completions = B groups x G, prompt-major; T completion tokens, padded.
"""

import base64
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tag.boxes import is_valid
from tag.data.records import Record, from_line
from tag.grpo import LossTerms, group_advantages, grpo_loss, loss_normaliser, token_weights
from tag.labels import CLASSES
from tag.record import StepRecord
from tag.report.inspector_run import number
from tag.report.page import visible
from tag.report.pieces import Piece, Pieces, token_ranges
from tag.rewards import is_flat
from tag.trace import MAX_BOXES, RULE_TEXT, parse

TOLERANCE = 1e-5  # what float32 sums in another order may differ by

# record, recorded sha256 -> (data URI or None, why there is none)
LoadFace = Callable[[Record, str], tuple[str | None, str]]


@dataclass(frozen=True)
class LossParts:
    """The loss of a step's last inner update, taken apart. All in float64, all divided by the normaliser."""

    whole: LossTerms
    groups: list[LossTerms]  # one a group; they add up to `whole`
    surrogate: Tensor  # (N, T) min(ratio A, clip(ratio) A), 0 on padding
    weights: Tensor  # (N,) what each token of a completion is multiplied with: 1 / |o_i| (or 1), over the normaliser
    normaliser: float
    policy: Tensor  # (N,) the policy term of each completion
    kl: Tensor  # (N,) its beta * KL term


def loss_parts(record: StepRecord) -> LossParts:
    """Compute the recorded update's loss again, group by group, by `tag.grpo.grpo_loss` with the run's own settings."""
    args, t, mask = record.meta["args"], record.tensors, record.completion_mask
    N, G = len(mask), record.group_size
    logprobs, old, advantages = (t[k].double() for k in ("logprobs", "old_logprobs", "advantages"))
    ref = old if args["kl_reference"] == "old" else t["ref_logprobs"].double() if "ref_logprobs" in t else None
    normaliser = loss_normaliser(mask, args["loss_average"], args["max_new_tokens"]).double()

    def loss(rows: slice) -> LossTerms:
        return grpo_loss(
            logprobs[rows],
            old[rows],
            advantages[rows],
            mask[rows],
            ref_logprobs=None if ref is None else ref[rows],
            clip_eps=args["clip_eps"],
            clip_eps_high=args["clip_eps_high"],
            beta=args["beta"],
            kl_estimator=args["kl_estimator"],
            loss_average=args["loss_average"],
            ratio_level=args["ratio_level"],
            normaliser=normaliser,
        )

    whole = loss(slice(None))
    low, high = clip_range(args)
    A = advantages[:, None]  # (N, 1)
    surrogate = torch.minimum(whole.ratio * A, whole.ratio.clamp(low, high) * A).masked_fill(~mask, 0.0)  # (N, T)
    weights = (
        token_weights(mask, args["loss_average"])[:, 0].double() / normaliser
    )  # (N,), the first token is no padding
    kl = torch.zeros(N, dtype=torch.float64)
    if whole.kl is not None:
        kl = args["beta"] * whole.kl.masked_fill(~mask, 0.0).sum(1) * weights
    return LossParts(
        whole=whole,
        groups=[loss(slice(n, n + G)) for n in range(0, N, G)],
        surrogate=surrogate,
        weights=weights,
        normaliser=float(normaliser),
        policy=-surrogate.sum(1) * weights,
        kl=kl,
    )


def clip_range(args: dict) -> tuple[float, float]:
    """[1 - eps, 1 + eps] of a run."""
    high = args.get("clip_eps_high")
    return 1.0 - args["clip_eps"], 1.0 + (args["clip_eps"] if high is None else high)


@dataclass(frozen=True)
class StepView:
    """What the page needs of one step, JSON-able, and what colour scales and class charts are made from."""

    data: dict[str, Any]
    samples: dict[str, Tensor]  # quantity -> values over the shown tokens (or completions), flat
    classes: dict[str, dict[str, float | None]]  # class -> statistics over all groups of the step


def view_step(record: StepRecord, pieces: Pieces | None, load_face: LoadFace, max_groups: int) -> StepView:
    """Build the view of a record; the first `max_groups` groups are shown, all of them are counted.

    Raises KeyError, TypeError, ValueError, ... if record.json does not hold what save_record wrote.
    """
    meta, G = record.meta, record.group_size
    if not 0 <= int(meta["step"]) < 10**9:
        raise ValueError(f"step {str(meta['step'])[:20]}")
    faces = [from_line(json.dumps(face["record"]), "face") for face in meta["faces"]]
    parts = loss_parts(record)
    shown = len(faces) if max_groups <= 0 else min(max_groups, len(faces))
    totals = record.tensors["rewards"][:, 3]
    use_std = not meta["args"].get("no_advantage_std", False)
    groups = []
    for b in range(shown):
        uri, why = load_face(faces[b], str(meta["faces"][b]["sha256"]))
        rows = slice(b * G, (b + 1) * G)
        rights = [c["rewards"]["ans"] > 0 for c in meta["completions"][rows]]
        groups.append(
            {
                "face": _face(faces[b], uri, why),
                "kind": _taxonomy(rights),
                "flat": is_flat(totals[rows].tolist()),
                "mean": number(float(totals[rows].mean())),
                "std": number(float(totals[rows].std())),
                "sums": _sums(parts.groups[b]),
                **_token_columns(record, parts, rows),
                "completions": [_completion(record, n, faces[b], parts, pieces) for n in range(rows.start, rows.stop)],
            }
        )
    expected = group_advantages(totals, G, use_std)
    notes = []
    if not torch.allclose(expected, record.tensors["advantages"].float(), atol=1e-4, equal_nan=True):
        notes.append("the recorded advantages are not those of the recorded rewards")
    if pieces is not None and any("odd" not in c for g in groups for c in g["completions"]):
        notes.append("this tokenizer does not spell the recorded text: tokens are shown by their ids")
    recorded = recorded_loss(record, parts)
    if recorded and recorded["difference"] is not None and recorded["difference"] > TOLERANCE:
        notes.append("the recorded loss is not that of the recorded tokens")
    data = {
        "step": int(meta["step"]),
        "complaints": [visible(c)[:2000] for c in meta.get("complaints", [])],
        "notes": notes,
        "gradNorm": number(meta.get("grad_norm")),
        "loss": {**_sums(parts.whole), "normaliser": number(parts.normaliser), "recorded": recorded},
        "useStd": use_std,
        "numGroups": len(faces),
        "hidden": {
            k: number(float(sum(getattr(p, k) for p in parts.groups[shown:])))
            for k in ("policy_loss", "kl_loss", "loss")
        },
        "groups": groups,
    }
    return StepView(data, _samples(record, parts, shown * G), class_statistics(record, faces))


def recorded_loss(record: StepRecord, parts: LossParts) -> dict[str, float | None] | None:
    """The loss that the run noted for this update, beside ours of the same groups; None if it noted none.

    A run on several ranks notes the share of its main process, whose groups come first.
    """
    noted = record.meta.get("loss", {}).get("loss")
    if number(noted) is None:
        return None
    mine = -(-len(parts.groups) // max(int(record.meta.get("world", 1)), 1))
    computed = float(sum(p.loss for p in parts.groups[:mine]))
    return {
        "value": number(noted),
        "computed": number(computed),
        "difference": number(abs(float(noted) - computed)),
        "groups": mine,
    }


def class_statistics(record: StepRecord, faces: Sequence[Record]) -> dict[str, dict[str, float | None]]:
    """Per class of the true label: groups, accuracy, AU IoU (faces with AUs), and the share of groups of each kind."""
    G, completions = record.group_size, record.meta["completions"]
    table = {}
    for label in CLASSES:
        which = [b for b, face in enumerate(faces) if face.label == label]
        if not which:
            continue
        groups = [completions[b * G : (b + 1) * G] for b in which]
        rewards = [c["rewards"] for group in groups for c in group]
        kinds = [_taxonomy([c["rewards"]["ans"] > 0 for c in group]) for group in groups]
        ious = [float(r["paper_iou"]) for r in rewards if r["paper_iou"] is not None]
        table[label] = {
            "groups": len(groups),
            "accuracy": number(sum(r["ans"] > 0 for r in rewards) / len(rewards), 4),
            "iou": number(sum(ious) / len(ious), 4) if ious else None,
            **{name: kinds.count(name) / len(kinds) for name in ("all right", "mixed", "all wrong")},
            "flat": sum(is_flat([c["rewards"]["total"] for c in group]) for group in groups) / len(groups),
            "no AU boxes": sum(not faces[b].aus for b in which) / len(which),
        }
    return table


def _taxonomy(rights: Sequence[bool]) -> str:
    return "all right" if all(rights) else "mixed" if any(rights) else "all wrong"


def _face(record: Record, uri: str | None, why: str) -> dict[str, Any]:
    return {
        "id": visible(record.id),
        "label": record.label,
        "dataset": visible(record.dataset),
        "image": uri,
        "why": visible(why)[:300],
        "aus": [[a.au, number(a.score, 3), list(a.box)] for a in record.aus],
    }


def _sums(terms: LossTerms) -> dict[str, float | None]:
    return {k: number(float(getattr(terms, k))) for k in ("policy_loss", "kl_loss", "loss")}


def _token_columns(record: StepRecord, parts: LossParts, rows: slice) -> dict[str, Any]:
    """Numbers per token of one group, completions end to end. None stands for what can be told from the others."""
    t, mask = record.tensors, record.completion_mask[rows]  # (G, T)

    def pack(values: Tensor, kind: str = "<f4") -> str:
        return base64.b64encode(values[rows][mask].numpy().astype(kind).tobytes()).decode("ascii")

    moved = bool((t["ratio"][rows][mask] != 1).any())  # NaN counts as moved
    same = torch.equal(t["logprobs"][rows][mask], t["old_logprobs"][rows][mask])
    return {
        "lengths": mask.sum(1).tolist(),
        "ids": pack(t["token_ids"], "<u4"),
        "sampled": pack(t["sampled_logprobs"]),
        "old": pack(t["old_logprobs"]),
        "new": None if same else pack(t["logprobs"]),  # the same as old
        "ref": pack(t["ref_logprobs"]) if "ref_logprobs" in t else None,  # no reference
        "entropy": pack(t["entropy"]),
        "ratio": pack(t["ratio"]) if moved else None,  # 1
        "surrogate": pack(parts.surrogate) if moved else None,  # the advantage
        "kl": pack(t["kl"]) if "kl" in t else None,
        "clipped": parts.whole.clipped[rows][mask].nonzero().flatten().tolist(),
    }


def _completion(record: StepRecord, n: int, face: Record, parts: LossParts, pieces: Pieces | None) -> dict[str, Any]:
    entry, ids = record.meta["completions"][n], record.completion(n)
    text = entry["text"]
    if not isinstance(text, str):
        raise TypeError("a completion's text is not a string")
    trace = parse(text)
    split = pieces.split(ids, text) if pieces else None
    boxes = [_box(box) for box in entry["boxes"]]
    spans = trace.box_spans if len(trace.box_spans) == len(boxes) else []
    for box, (first, stop) in zip(boxes, token_ranges(split, spans) if split else ()):
        box["tokens"] = [first, stop]
    fmt, ans, au, total = (entry["rewards"][k] for k in ("fmt", "ans", "au", "total"))
    out = {
        "rewards": [
            number(float(fmt)),
            number(float(ans)),
            None if au is None else number(float(au)),
            number(float(total)),
        ],
        "au": au_arithmetic(entry, len(face.aus), record.meta["args"]["au_reward"]),
        "advantage": number(float(record.tensors["advantages"][n])),
        "weight": number(float(parts.weights[n]), 9),
        "klWeight": number(float(parts.weights[n]) * record.meta["args"]["beta"], 9),
        "policy": number(float(parts.policy[n])),
        "kl": number(float(parts.kl[n])),
        "answer": visible(trace.answer or "no valid answer"),
        "broken": [RULE_TEXT[rule] for rule in trace.broken],
        "boxes": boxes,
        "finish": visible(entry.get("finish_reason", "")),
        "seed": visible(entry.get("seed", "")),
    }
    if split is None:
        out["text"] = visible(text)
    else:  # the pieces that differ from what the page's vocabulary says of the token alone
        out["odd"] = {i: as_json(p) for i, (t, p) in enumerate(zip(ids, split)) if p != pieces.alone(t)}
    return out


def as_json(piece: Piece) -> str | list[str]:
    """A piece as the page has it: its text, and its chip if there is one."""
    return [visible(piece.text), visible(piece.chip)] if piece.chip else visible(piece.text)


def _box(entry: dict) -> dict[str, Any]:
    if not is_valid(entry["box"]):
        raise ValueError("a box that is not on the canvas")
    named, au, matched = (None if entry[k] is None else visible(entry[k]) for k in ("named", "au", "matched_au"))
    return {
        "box": list(entry["box"]),
        "named": named,
        "au": au,
        "iou": number(float(entry["iou"]), 4),
        "counted": bool(entry["counted"]),
        "matched": matched,
        "matchedIou": number(float(entry["matched_iou"]), 4),
    }


def au_arithmetic(entry: dict, n: int, kind: str) -> str:
    """How R_AU came about, spelled out with the numbers of this completion."""
    if kind == "none":
        return "not part of the reward in this run"
    boxes, value = entry["boxes"], entry["rewards"]["au"]
    k = min(len(boxes), MAX_BOXES)
    if n == 0:
        if kind != "iou-silence":
            return "absent: no activated AU on this face"
        return f"{value:.0f}: no activated AU on this face, and {f'{k} box(es)' if k else 'no box'}"
    if kind == "f1":
        return f"F1 of the AU names in the text against the {n} activated = {value:.3f}"
    if k == 0:
        return "0: no valid box"
    if kind in ("iou", "iou-silence"):
        ious = sorted((box["iou"] for box in boxes if box["counted"]), reverse=True)
        if len(ious) == 1:
            return f"IoU of its {'best' if k > 1 else 'one'} box = {value:.3f}"
        best = f"the best {len(ious)} of {k}" if len(ious) < k else f"all {k}"
        return f"mean IoU of {best} boxes: ({' + '.join(f'{v:.3f}' for v in ious)}) / {len(ious)} = {value:.3f}"
    ious = [box["matched_iou"] for box in boxes[:MAX_BOXES]]
    return (
        f"one-to-one IoUs over max(k, min(n, 3)) = {max(k, min(n, MAX_BOXES))}: "
        f"({' + '.join(f'{v:.3f}' for v in ious)}) / {max(k, min(n, MAX_BOXES))} = {value:.3f}"
    )


def _samples(record: StepRecord, parts: LossParts, rows: int) -> dict[str, Tensor]:
    """Finite values of each coloured quantity over the first `rows` completions."""
    t, mask = record.tensors, record.completion_mask[:rows]
    term = -parts.surrogate * parts.weights[:, None]  # (N, T)
    if parts.whole.kl is not None:
        term = term + record.meta["args"]["beta"] * parts.whole.kl * parts.weights[:, None]
    values = {
        "advantage": t["advantages"][:rows],
        "logprob": t["logprobs"][:rows][mask],
        "ratio": t["ratio"][:rows][mask].log(),
        "entropy": t["entropy"][:rows][mask],
        "mismatch": (t["sampled_logprobs"] - t["old_logprobs"])[:rows][mask],
        "term": term[:rows][mask],
    }
    if "kl" in t:
        values["kl"] = t["kl"][:rows][mask]
    return {k: v.float()[v.isfinite()].abs() for k, v in values.items()}
