"""The head of the inspector's page as HTML: the run card, tripped gates, and notes on what could not be shown."""

import json
from collections.abc import Sequence
from typing import Any

from tag.report.inspector_run import Run
from tag.report.page import esc

KL_REFERENCE_TEXT = {
    "sft": "the SFT adapter that RL started from",
    "base": "the base model, without adapter",
    "old": "π_old, the policy before the update",
    "none": "none: no KL term",
}
AU_REWARD_TEXT = {
    "iou": "mean of the best min(n, k) IoUs (Eq. 3-4)",
    "iou-matched": "one-to-one matched IoU",
    "iou-silence": "Eq. 3-4; without activated AUs 1 for no box",
    "f1": "F1 of AU names (Table 4)",
    "none": "not part of the reward (RLVR)",
}
RATIO_TEXT = {"token": "one ratio a token", "sequence": "one ratio a completion (GSPO)"}
AVERAGE_TEXT = {
    "sequence": "mean over a completion's tokens, then over completions",
    "token": "mean over all tokens (DAPO)",
    "constant": "sum over tokens / (completions x longest allowed) (Dr. GRPO)",
}


def run_card_html(run: Run) -> str:
    """The choices that decide what the numbers mean as tiles, and every argument and version below them."""
    a = run.args
    high = a.get("clip_eps_high") or a.get("clip_eps", "?")
    std = "A = R - mean" if a.get("no_advantage_std") else "A = (R - mean) / std"
    world = run.card.get("world", "?")
    tiles = (
        ("KL reference", a.get("kl_reference"), KL_REFERENCE_TEXT, f"β {_of(a, 'beta')}, {_of(a, 'kl_estimator')}"),
        ("Ratio", a.get("ratio_level"), RATIO_TEXT, f"clip -{_of(a, 'clip_eps')}, +{high}"),
        ("AU reward", a.get("au_reward"), AU_REWARD_TEXT, f"R_fmt {_of(a, 'format_bonus')}, R_ans 1"),
        ("Loss average", a.get("loss_average"), AVERAGE_TEXT, std),
        ("Step", f"{_of(a, 'rollouts_per_step')} rollouts", {}, f"G = {_of(a, 'group_size')}, {_updates(a)}"),
        ("Model", a.get("model"), {}, f"{_of(a, 'dtype')}, {world} process{'es' * (world != 1)}"),
        ("Preset", _names(a.get("preset")), {}, f"lr {_of(a, 'lr')}, seed {_of(a, 'seed')}"),
    )
    shown = "".join(
        f'<div class="panel tile"><div class="name">{esc(name)}</div><div class="value">{esc(_of({"v": value}, "v"))}'
        f'</div><div class="sub">{esc(texts.get(value, "") if isinstance(value, str) else "")}</div>'
        f'<div class="sub num">{esc(more)}</div></div>'
        for name, value, texts, more in tiles
    )
    return f'<section class="tiles" aria-label="Run card">{shown}</section>{_everything(run)}'


def complaints_html(complaints: Sequence[tuple[int, str]]) -> str:
    """The gates that tripped; empty if none did. The texts are escaped here."""
    if not complaints:
        return ""
    items = "".join(f"<li><b>step {step}</b>: {esc(text)}</li>" for step, text in complaints)
    return f'<section class="panel alarm" aria-label="Tripped gates"><h2>Gates tripped</h2><ul>{items}</ul></section>'


def notes_html(notes: Sequence[str]) -> str:
    """What could not be shown; empty if nothing."""
    if not notes:
        return ""
    items = "".join(f"<li>{esc(note[:400])}</li>" for note in notes)
    return f'<section class="panel notes" aria-label="Notes"><ul>{items}</ul></section>'


def _everything(run: Run) -> str:
    versions = run.card.get("versions")
    rows = [
        ("script", run.card.get("script", "?")),
        ("commit", run.card.get("commit", "?")),
        *((k, v) for k, v in run.card.items() if k not in ("args", "versions", "script", "commit")),
        *(versions.items() if isinstance(versions, dict) else ()),
    ]
    tables = _table("How it ran", rows) + _table("Arguments", [*run.args.items()])
    return f'<details class="panel all"><summary><h2>All arguments, versions, commit</h2></summary>{tables}</details>'


def _table(title: str, rows: Sequence[tuple[str, Any]]) -> str:
    cells = "".join(f"<div><dt>{esc(k)}</dt><dd>{esc(_text(v))}</dd></div>" for k, v in rows)
    return f'<h3>{esc(title)}</h3><dl class="arguments">{cells}</dl>'


def _text(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= 200 else text[:200] + " …"


def _of(values: dict, key: str) -> str:
    value = values.get(key)
    return "?" if value is None else _text(value)


def _names(value: Any) -> str:
    """A list of presets as text; a run of an earlier version has one name or none."""
    return " ".join(map(_text, value)) if isinstance(value, list) and value else _text(value or "none")


def _updates(args: dict) -> str:
    count = args.get("updates_per_step")
    return "1 update on each batch" if count == 1 else f"{'?' if count is None else _text(count)} updates on each batch"
