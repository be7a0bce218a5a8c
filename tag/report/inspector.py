"""The rollout inspector: a GRPO run as one HTML page on which every token, box, reward part and loss term can be read.

The page holds everything (faces as data URIs, numbers as JSON, no network) and may be mailed or printed. Completions,
ids and arguments are hostile text, see `tag.report.page`: Python escapes what it writes, the script builds its elements
from text nodes only, and the JSON blocks are data that no browser runs. Each step is a block of its own, read only when
it is looked at, so the page opens at once however many steps it holds.
"""

import hashlib
import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tag.boxes import MODEL_SIZE, Canvas
from tag.data.images import decode_image, read_bytes
from tag.data.records import Record, resolve_image
from tag.errors import DataError
from tag.files import replacing
from tag.record import load_record
from tag.report.inspector_card import complaints_html, notes_html, run_card_html
from tag.report.inspector_run import Run, choose_records, number, read_run, tripped
from tag.report.inspector_step import StepView, as_json, clip_range, view_step
from tag.report.page import esc, html_page, image_uri, resource, script_json, visible
from tag.report.pieces import Pieces

STYLES = ("base.css", "inspector.css", "inspector_group.css")
SCRIPTS = ("inspector_base.js", "inspector_charts.js", "inspector_face.js", "inspector_group.js", "inspector.js")
QUANTILE = (
    99.0  # colour scales end at this percentile of all shown tokens, so that one outlier does not bleach the rest
)


@dataclass(frozen=True)
class Written:
    """What a page shows."""

    records: int  # steps with their groups; 0: the charts only
    groups: int
    notes: list[str]  # what is not shown, and why
    problems: list[str]  # those of the notes that name something broken or missing


def write_inspector(
    out_html: str | os.PathLike,
    folder: str | os.PathLike,
    image_root: str | os.PathLike | None = None,
    tokenizer: str | None = None,
    max_steps: int = 50,
    max_groups: int = 8,
) -> Written:
    """Write the page of a run folder (or of one record folder).

    image_root: where the records' image paths start; default: the run's own. tokenizer: folder or cached hub name;
    default: the run's model. max_steps: records shown, evenly spaced, those with tripped gates first. max_groups: of
    each step, the first ones in record order; 0 shows all.

    Raises DataError if there is nothing to show. A broken record, a missing tokenizer or image is noted on the page.
    """
    run = read_run(folder)
    gates = [r for r in run.records if tripped(r)] if len(run.records) > max_steps else []
    chosen = choose_records(run.records, max_steps, gates)
    if len(chosen) < len(run.records):
        run.notes.append(f"{len(chosen)} of {len(run.records)} recorded steps are shown (--max-steps)")
    pieces = load_pieces(tokenizer or run.args.get("model"), run) if chosen else None
    faces = FaceImages(image_root or run.args.get("image_root") or run.args.get("data"))

    blocks, views, vocabulary, broken = [], [], {}, []
    for path in chosen:
        try:
            record = load_record(path, with_state=False)
            view = view_step(record, pieces, faces, max_groups)
        except DataError as e:
            broken.append(f"{path.name} left out: {str(e).removeprefix(f'{path}: ')}")
            continue
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError) as e:
            # record.json may hold anything; what is missing or of the wrong kind surfaces as one of these.
            broken.append(f"{path.name} left out: not what save_record writes ({type(e).__name__}: {str(e)[:80]})")
            continue
        if any(view.data["step"] == other.data["step"] for other in views):
            broken.append(f"{path.name} left out: a second record of step {view.data['step']}")
            continue
        if pieces:
            rows = len(view.data["groups"]) * record.group_size
            used = record.tensors["token_ids"][:rows][record.completion_mask[:rows]].unique().tolist()
            vocabulary |= {t: as_json(pieces.alone(t)) for t in used if t not in vocabulary}
        blocks.append(
            f'<script type="application/json" id="step-{view.data["step"]}">{script_json(view.data)}</script>'
        )
        view.data["groups"] = len(view.data["groups"])  # the block holds them; here they would only take memory
        views.append(view)
    views.sort(key=lambda view: view.data["step"])
    doubts = Counter(note for view in views for note in view.data["notes"])
    for problem in (*broken, *(f"{note} ({count} of {len(views)} steps)" for note, count in doubts.items())):
        run.problem(problem)
    if faces.missing:
        first = f"{faces.missing[0]}; is --image-root right?"
        run.problem(f"{len(faces.missing)} faces are shown without their image, the first: {first}")
    if not views and not run.columns:
        raise DataError(f"{folder}: no step record to show ({broken[0] if broken else 'there is none'})")

    data = {
        "settings": _settings(run),
        "metrics": {"steps": run.steps, **run.columns},
        "records": [_summary(view) for view in views],
        "scales": _scales(run, views),
        "vocabulary": vocabulary,
    }
    groups = sum(view.data["groups"] for view in views)
    page = _page(run, views, groups, "".join(blocks), script_json(data))
    with replacing(out_html) as f:
        f.write(page)
    return Written(len(views), groups, run.notes, run.problems)


class FaceImages:
    """Loads the faces of records as data URIs, and checks that they are the files the run saw."""

    def __init__(self, root: str | os.PathLike | None) -> None:
        self.root = root
        self.missing: list[str] = []  # one line a face that cannot be shown
        self.known: dict[tuple[str, str], tuple[str | None, str]] = {}

    def __call__(self, record: Record, sha256: str) -> tuple[str | None, str]:
        """(data URI, "") or (None, why there is no picture)."""
        key = (record.image, sha256)
        if key not in self.known:
            self.known[key] = self._load(record, sha256)
            if self.known[key][0] is None:
                self.missing.append(f"{record.image[:80]}: {self.known[key][1]}")
        return self.known[key]

    def _load(self, record: Record, sha256: str) -> tuple[str | None, str]:
        if not self.root:
            return None, "no image root is known"
        try:  # the reasons are worded here: a page that is mailed should not name the folders of this computer
            data = read_bytes(resolve_image(record, self.root))
        except DataError:
            return None, "not found under the image root"
        if hashlib.sha256(data).hexdigest() != sha256:
            return None, "not the image that the run saw (its sha256 is another)"
        try:
            image = decode_image(data, record.image)
        except DataError:
            return None, "a broken image"
        return image_uri(Canvas(*image.size).letterbox(image, MODEL_SIZE), 88), ""


def load_pieces(source: Any, run: Run) -> Pieces | None:
    """The run's tokenizer, from disk or the hub's cache, never from the network; None with a note if there is none."""
    from transformers import AutoTokenizer

    from tag.vlm import TINY_MODEL

    try:
        if not isinstance(source, str) or not source:
            raise ValueError("run.json names no model")
        folder = TINY_MODEL if source == "tiny" else source
        return Pieces(AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False))
    except Exception as e:  # the tokenizers library raises bare Exception on a broken file
        reason = " ".join(str(e).split())[:100]
        run.problem(f"no tokenizer {source!r} ({reason}): tokens are shown by their ids; --tokenizer names another")
        return None


def _settings(run: Run) -> dict[str, Any]:
    """What the script needs to know of the arguments; None where run.json does not say."""
    args = run.args
    try:
        clip = [number(v) for v in clip_range(args)]
    except (KeyError, TypeError):
        clip = [None, None]
    words = ("kl_estimator", "kl_reference", "loss_average", "ratio_level", "au_reward")
    return {
        "clip": clip,
        "beta": number(args.get("beta")),
        "groupSize": number(args.get("group_size")),
        "maxTokens": number(args.get("max_new_tokens")),
        **{k: visible(args.get(k, "?")) for k in words},
    }


def _summary(view: StepView) -> dict[str, Any]:
    return {"step": view.data["step"], "gate": bool(view.data["complaints"]), "classes": view.classes}


def _scales(run: Run, views: Sequence[StepView]) -> dict[str, float]:
    """Where the colour scale of each quantity ends: one scale for all steps, so that colours can be compared."""
    scales = {}
    for name in sorted({k for view in views for k in view.samples}):
        values = torch.cat([view.samples[name] for view in views if name in view.samples])
        scales[name] = number(float(np.percentile(values.numpy(), QUANTILE)), 4) if len(values) else 0.0
    try:  # ratios within the clip range are pale, whatever happens
        scales["ratio"] = max(scales.get("ratio", 0.0), number(math.log(clip_range(run.args)[1]), 4) or 0.0)
    except (KeyError, TypeError, ValueError):
        pass
    return scales


def _page(run: Run, views: Sequence[StepView], groups: int, blocks: str, data: str) -> str:
    if views:
        scope = f"{len(views)} recorded step{'s' * (len(views) != 1)}, {groups} groups of completions, token by token"
    else:
        scope = "no step record can be shown: the charts only"
    body = _BODY.format(
        title=esc(run.name),
        scope=esc(scope),
        complaints=complaints_html([(v.data["step"], c) for v in views for c in v.data["complaints"]]),
        notes=notes_html(run.notes),
        card=run_card_html(run),
        blocks=blocks,
        data=data,
    )
    style, script = ("".join(resource(name) for name in names) for names in (STYLES, SCRIPTS))
    return html_page(f"{run.name}: rollouts", body, style, script)


_BODY = """<div class="wrap">
<header><div><h1>Run {title}</h1><p class="dim">{scope}</p></div>
<button class="button screen" id="theme" type="button">Theme: auto</button></header>
<noscript><p class="panel alarm">This page draws its charts and tokens with a script of its own; scripts are off here.
</p></noscript>
{complaints}{notes}
{card}
<div class="panel timebar" id="timebar" role="group" aria-label="Step and colours">
<button class="button" id="previous" type="button" title="previous recorded step (p)">◀</button>
<div class="slider"><input type="range" id="step" min="0" max="0" value="0" aria-label="step">
<div id="ticks"></div></div>
<button class="button" id="next" type="button" title="next recorded step (n)">▶</button>
<output id="where" for="step"></output>
<label class="pick">colour by <select id="colour"></select></label>
<button class="button pick" id="extreme" type="button" title="go to the token of this step with the largest value (m)">\
largest</button>
<div class="legend" id="legend"></div>
</div>
<details class="panel timeline" id="timeline" open><summary><h2>The run</h2></summary>
<div class="charts" id="charts"></div></details>
<main id="main" tabindex="-1"></main>
<details class="panel keys"><summary><h2>Keyboard</h2></summary><dl>
<dt><kbd>←</kbd> <kbd>→</kbd></dt><dd>on the slider: one step; in a completion: one token
(<kbd>Home</kbd>, <kbd>End</kbd>: first, last; <kbd>↑</kbd> <kbd>↓</kbd>: the completion before, after)</dd>
<dt><kbd>p</kbd> <kbd>n</kbd></dt><dd>previous, next recorded step</dd>
<dt><kbd>k</kbd> <kbd>j</kbd></dt><dd>previous, next group (face)</dd>
<dt><kbd>1</kbd> … <kbd>9</kbd></dt><dd>show the boxes of that completion and go to it</dd>
<dt><kbd>b</kbd></dt><dd>next box of the completion</dd>
<dt><kbd>c</kbd> <kbd>x</kbd></dt><dd>next, previous colouring of the tokens</dd>
<dt><kbd>m</kbd></dt><dd>go to the token of this step, in whichever group, with the largest value of the colouring</dd>
<dt><kbd>t</kbd></dt><dd>theme: auto, light, dark</dd>
<dt><kbd>Esc</kbd></dt><dd>close the numbers of a token</dd>
</dl></details>
<div class="panel tip" id="tip" role="status" hidden></div>
<script type="application/json" id="run-data">{data}</script>
{blocks}
</div>"""
