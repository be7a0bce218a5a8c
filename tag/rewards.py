"""The verifiable rewards of TAG, R = R_AU + R_ans + R_fmt, each part kept on its own, and their audit.

R_fmt   a small bonus when the trace grammar holds (`tag.trace`), else 0.
R_ans   1 when the answer is the true class, else 0.
R_AU    Eq. 3-4 of arXiv 2602.18763: with k predicted and n activated-AU boxes, the IoU of each predicted box with its
        closest AU box, mean of the top min(n, k) of those.

The paper leaves three gaps; what we do instead:
1. k = 0 gives 0 (Eq. 4 divides by it);
2. only the first three boxes of a trace count (else a trace with fifty boxes wins on its best few);
3. n = 0: the part is absent. n belongs to the face, so it is absent for the whole group of completions, not zero for
   some of them. `score_completion` says so with `Rewards.au is None`; `au_reward`, a plain number, returns 0.0.

Eq. 4 can be gamed: one easy box has min(n, k) = 1 and is the whole mean, and three copies of one good box score as
three. Hence `kind="iou-matched"` (ours), and `audit`, which shows what the policy does about it. And where n = 0 it
says nothing, so a policy may learn to point at calm faces, too. Hence `kind="iou-silence"` (ours): Eq. 4 where n > 0;
where n = 0, 1 for a trace without boxes, else 0.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from tag.boxes import CANVAS_SIZE, Box, area, iou
from tag.data.records import Record
from tag.trace import MAX_BOXES, Trace, aus_of_boxes, named_aus, parse

AU_KINDS = ("iou", "iou-matched", "iou-silence", "f1", "none")
DUPLICATE_IOU = 0.9  # a box this close to an earlier one of the same trace is a copy of it
WHOLE_FACE_SHARE = 0.6  # a box that covers more of the canvas than this points at nothing in particular


def format_reward(trace: Trace, bonus: float = 0.1) -> float:
    """R_fmt: `bonus` if no rule of the grammar is broken, else 0."""
    return bonus if trace.well_formed else 0.0


def answer_reward(trace: Trace, label: str) -> float:
    """R_ans: 1 if the class in `<answer>` is `label`, else 0. Strict: free text earns nothing."""
    return 1.0 if trace.answer == label else 0.0


def au_reward(boxes: Sequence[Box], au_boxes: Sequence[Box], kind: str = "iou") -> float:
    """R_AU from boxes alone, in [0, 1].

    boxes: the k predicted boxes in text order; only the first three count. au_boxes: the n activated-AU boxes.
    kind: "iou" (Eq. 3-4 of the paper), "iou-matched" (one-to-one assignment, sum / max(k, min(n, 3))) or "none" (0).
    k = 0 gives 0. n = 0 gives 0, but means "no such reward on this face": see `Rewards.au`.
    Raises ValueError for another kind; "f1" reads AU names, not boxes: use `au_f1`. "iou-silence" is "iou" wherever
    boxes are compared, and the rest of it needs none: see `score_completion`.
    """
    if kind not in ("iou", "iou-matched", "none"):
        elsewhere = {"f1": " (see au_f1)", "iou-silence": " (see score_completion)"}.get(kind, "")
        raise ValueError(f"au_reward knows iou, iou-matched and none, not {kind!r}{elsewhere}")
    ious = iou_matrix(boxes[:MAX_BOXES], au_boxes)
    k, n = len(ious), len(au_boxes)
    if kind == "none" or k == 0 or n == 0:
        return 0.0
    if kind == "iou":
        closest = sorted((max(row) for row in ious), reverse=True)
        return sum(closest[: min(n, k)]) / min(n, k)
    return sum(ious[i][j] for i, j in enumerate(assign(ious)) if j is not None) / max(k, min(n, MAX_BOXES))


def au_f1(named: Sequence[str], activated: Sequence[str]) -> float:
    """F1 of the AU names a text mentions against those activated on the face (the paper's Table 4), in [0, 1].

    Repeats are ignored; 0 when either is empty or they share nothing.
    """
    named, activated = set(named), set(activated)
    return 2 * len(named & activated) / (len(named) + len(activated)) if named and activated else 0.0


def iou_matrix(boxes: Sequence[Box], au_boxes: Sequence[Box]) -> list[list[float]]:
    """IoU of every predicted box with every AU box, k rows of n."""
    return [[iou(box, au_box) for au_box in au_boxes] for box in boxes]


def assign(ious: Sequence[Sequence[float]]) -> list[int | None]:
    """One-to-one assignment of at most three rows (predicted boxes) to columns (AU boxes) with the largest sum.

    Returns a column or None for each row; pairs that do not overlap are left unassigned. Exact: with k rows some best
    assignment gives each row one of its k best columns, so k ** k <= 27 combinations are all there is to try.
    Raises ValueError for more than three rows.
    """
    if len(ious) > MAX_BOXES:
        raise ValueError(f"assign takes at most {MAX_BOXES} predicted boxes, got {len(ious)}")
    options = []
    for row in ious:
        best = sorted((j for j in range(len(row)) if row[j] > 0), key=lambda j: -row[j])
        options.append([*best[: len(ious)], None])
    best_sum, best_columns = -1.0, [None] * len(ious)
    for columns in product(*options):
        taken = [j for j in columns if j is not None]
        total = sum(row[j] for row, j in zip(ious, columns, strict=True) if j is not None)
        if len(set(taken)) == len(taken) and total > best_sum:
            best_sum, best_columns = total, list(columns)
    return best_columns


@dataclass(frozen=True)
class BoxScore:
    """One predicted box and what it was compared with."""

    box: Box
    named: str | None  # the AU the text names for it (`tag.trace.aus_of_boxes`)
    au: str | None  # the AU whose box is closest (largest IoU); None when it overlaps none
    iou: float  # IoU with that box, 0 .. 1
    counted: bool  # enters the mean of Eq. 4: among the first three boxes and the top min(n, k)
    matched_au: str | None  # its AU in the one-to-one assignment, None when it got none
    matched_iou: float


@dataclass(frozen=True)
class Rewards:
    """The reward of one completion: parts, total and how R_AU came about."""

    fmt: float
    ans: float
    au: float | None  # None: absent for the whole group (kind "none", or no activated AU and not kind "iou-silence")
    total: float  # sum of the parts present
    boxes: tuple[BoxScore, ...] = ()  # every valid box of the text, in text order
    num_aus: int = 0  # n, activated AUs of the face
    paper_iou: float | None = None  # R_AU of kind "iou", whatever kind is trained on; None when n = 0
    matched_iou: float | None = None  # R_AU of kind "iou-matched"; None when n = 0
    name_f1: float | None = None  # R_AU of kind "f1"; None when n = 0

    @property
    def parts(self) -> tuple[float, float, float]:
        """(R_fmt, R_ans, R_AU), with 0 for an absent R_AU."""
        return self.fmt, self.ans, self.au or 0.0


def score_completion(text: str, record: Record, kind: str = "iou", bonus: float = 0.1) -> Rewards:
    """All reward parts of one completion on one face. Never raises on model text.

    text: the completion as decoded, without special tokens. record: the face, with its activated AUs.
    kind: which R_AU is paid, one of `AU_KINDS`; the others are computed as well, for the log.
    Raises ValueError for an unknown kind.
    """
    if kind not in AU_KINDS:
        raise ValueError(f"unknown AU reward {kind!r}; expected one of {', '.join(AU_KINDS)}")
    trace = parse(text)
    fmt, ans = format_reward(trace, bonus), answer_reward(trace, record.label)
    variants: dict[str, float | None] = dict.fromkeys(AU_KINDS)
    if record.aus:
        for name in ("iou", "iou-matched"):
            variants[name] = au_reward(trace.boxes, record.au_boxes, name)
        variants["f1"] = au_f1(named_aus(text), [a.au for a in record.aus])
        variants["iou-silence"] = variants["iou"]
    else:
        variants["iou-silence"] = 0.0 if trace.boxes else 1.0
    au = variants[kind]
    return Rewards(
        fmt=fmt,
        ans=ans,
        au=au,
        total=fmt + ans + (au or 0.0),
        boxes=score_boxes(trace, record),
        num_aus=len(record.aus),
        paper_iou=variants["iou"],
        matched_iou=variants["iou-matched"],
        name_f1=variants["f1"],
    )


def score_boxes(trace: Trace, record: Record) -> tuple[BoxScore, ...]:
    """What each box of a trace was compared with, in text order; the arithmetic behind R_AU, for reports."""
    ious = iou_matrix(trace.boxes, record.au_boxes)
    matched = assign(ious[:MAX_BOXES]) + [None] * len(ious[MAX_BOXES:])
    closest = [max(range(len(row)), key=row.__getitem__) if any(row) else None for row in ious]
    by_iou = sorted(range(len(ious[:MAX_BOXES])), key=lambda i: -max(ious[i], default=0.0))
    counted = set(by_iou[: min(len(by_iou), len(record.aus))])
    return tuple(
        BoxScore(
            box=box,
            named=named,
            au=None if closest[i] is None else record.aus[closest[i]].au,
            iou=0.0 if closest[i] is None else ious[i][closest[i]],
            counted=i in counted,
            matched_au=None if matched[i] is None else record.aus[matched[i]].au,
            matched_iou=0.0 if matched[i] is None else ious[i][matched[i]],
        )
        for i, (box, named) in enumerate(zip(trace.boxes, aus_of_boxes(trace), strict=True))
    )


def is_duplicate(boxes: Sequence[Box], index: int) -> bool:
    """True if box `index` copies an earlier one (IoU > 0.9)."""
    return any(iou(boxes[index], earlier) > DUPLICATE_IOU for earlier in boxes[:index])


def is_whole_face(box: Box) -> bool:
    """True if the box covers more than 60 % of the canvas."""
    return area(box) > WHOLE_FACE_SHARE * CANVAS_SIZE**2


def reward_means(rewards: Sequence[Rewards]) -> dict[str, float]:
    """Mean reward and its parts over completions; `reward_au` over those on faces where the part is present."""
    return {
        "reward": _rate(r.total for r in rewards),
        "reward_fmt": _rate(r.fmt for r in rewards),
        "reward_ans": _rate(r.ans for r in rewards),
        "reward_au": _rate(r.au for r in rewards if r.au is not None),
    }


def audit(rewards: Sequence[Rewards], group_size: int, use_std: bool = True) -> dict[str, float]:
    """What the policy does with the AU reward, as flat numbers for the log of a step.

    rewards: N = B * group_size scored completions, groups in a row. use_std: as in the advantages of the run.
    Rates over no items are 0. Keys:
      k0, k1, k2, k3, k_over_3       share of completions with that many valid boxes (sums to 1)
      duplicate_box_rate             share of boxes that copy an earlier one of their trace (IoU > 0.9)
      whole_face_box_rate            share of boxes that cover more than 60 % of the canvas
      named_box_rate                 share of boxes for which the text names an AU
      box_au_agreement               of those, on faces with AUs: the closest AU box is that of the AU named
      iou, iou_matched, name_f1      mean R_AU of each kind, over completions on faces with AUs
      variance_fmt, _ans, _au        share of advantage variance due to each part, see `advantage_variance_shares`
      groups_all_right, _all_wrong, _mixed     share of groups by their answers (sums to 1)
      groups_flat                    share of groups whose rewards are all equal: no gradient
      groups_no_au                   share of groups on a face without activated AUs: R_AU absent (but: iou-silence)
    Raises ValueError when N is 0 or no multiple of group_size.
    """
    if not rewards or group_size < 1 or len(rewards) % group_size:
        raise ValueError(f"{len(rewards)} completions are not whole groups of {group_size}")
    counts = [len(r.boxes) for r in rewards]
    boxes = [score for r in rewards for score in r.boxes]
    named = [score for r in rewards if r.num_aus for score in r.boxes if score.named]
    with_aus = [r for r in rewards if r.num_aus]
    groups = [rewards[i : i + group_size] for i in range(0, len(rewards), group_size)]
    right = [sum(r.ans > 0 for r in group) for group in groups]
    shares = advantage_variance_shares([r.parts for r in rewards], group_size, use_std)
    return {
        **{f"k{k}": _rate(c == k for c in counts) for k in range(MAX_BOXES + 1)},
        f"k_over_{MAX_BOXES}": _rate(c > MAX_BOXES for c in counts),
        "duplicate_box_rate": _rate(
            is_duplicate([s.box for s in r.boxes], i) for r in rewards for i in range(len(r.boxes))
        ),
        "whole_face_box_rate": _rate(is_whole_face(s.box) for s in boxes),
        "named_box_rate": _rate(s.named is not None for s in boxes),
        "box_au_agreement": _rate(s.named == s.au for s in named),
        "iou": _rate(r.paper_iou for r in with_aus),
        "iou_matched": _rate(r.matched_iou for r in with_aus),
        "name_f1": _rate(r.name_f1 for r in with_aus),
        **dict(zip(("variance_fmt", "variance_ans", "variance_au"), shares, strict=True)),
        "groups_all_right": _rate(n == group_size for n in right),
        "groups_all_wrong": _rate(n == 0 for n in right),
        "groups_mixed": _rate(0 < n < group_size for n in right),
        "groups_flat": _rate(is_flat([r.total for r in group]) for group in groups),
        "groups_no_au": _rate(group[0].num_aus == 0 for group in groups),
    }


def advantage_variance_shares(
    parts: Sequence[Sequence[float]] | np.ndarray, group_size: int, use_std: bool = True
) -> tuple[float, ...]:
    """Share of the within-group advantage variance due to each reward part; sums to 1 (all 0 if every group is flat).

    parts: (N, P) reward parts, groups in a row. Within a group Var(R) = sum over parts of Cov(part, R), so a part's
    share is Cov(part, R) / Var(R). With use_std each advantage group has variance 1, so the shares of the groups that
    are not flat are averaged; without (Dr. GRPO) the covariances are summed before dividing. A share below 0 means
    that the part pulls against the sum of the others.
    """
    parts = np.asarray(parts, dtype=np.float64)
    if parts.ndim != 2 or not len(parts) or group_size < 1 or len(parts) % group_size:
        raise ValueError(f"parts of shape {parts.shape} are not whole groups of {group_size}")
    grouped = parts.reshape(-1, group_size, parts.shape[1])  # (B, G, P)
    live = np.array([not is_flat(total) for total in grouped.sum(2)])
    if not live.any():
        return (0.0,) * parts.shape[1]
    centred = grouped[live] - grouped[live].mean(axis=1, keepdims=True)
    covariance = (centred * centred.sum(axis=2, keepdims=True)).mean(axis=1)  # (B, P): Cov(part, R)
    variance = covariance.sum(axis=1, keepdims=True)  # (B, 1): Var(R)
    shares = (covariance / variance).mean(axis=0) if use_std else covariance.sum(axis=0) / variance.sum()
    return tuple(float(s) for s in shares)


def is_flat(totals: Sequence[float] | np.ndarray) -> bool:
    """True if all rewards of a group are equal up to rounding, as in `tag.grpo.group_advantages`: no gradient."""
    return bool(max(totals) - min(totals) <= 1e-6)


def _rate(values: Iterable[float]) -> float:
    """Mean of booleans or numbers; 0 for none."""
    values = list(values)
    return float(sum(values) / len(values)) if values else 0.0
