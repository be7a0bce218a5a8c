"""What is fuzzed: each target reads bytes as a hostile file or model would give them and checks what must hold.

A target returns its behaviour, anything hashable that tells two paths through the code apart (which rules were broken,
which message was given): an input with a new behaviour joins the corpus. It fails by raising: an AssertionError for a
property that does not hold, anything else for a crash. `DataError` and `Malformed` are answers, not crashes.
"""

from collections.abc import Callable, Hashable
from html.parser import HTMLParser

from tag.au.openface import read_openface
from tag.boxes import CANVAS_SIZE, Box, Canvas, clip_to_canvas, is_valid
from tag.data.labels_csv import drop_repeats, read_labels
from tag.data.records import AU, MAX_LINE, Record, from_line, numbered_lines, resolve_image, to_line
from tag.datagen.answer import Malformed, read_answer, read_verdict
from tag.errors import DataError
from tag.evaluation import predictions
from tag.fuzz.evaluation import EVALUATION
from tag.fuzz.inputs import Target, check_message, file_of, folder, text_of
from tag.fuzz.seeds import RECORDS, TOKENS, seeds
from tag.labels import CLASS_INDEX, CLASSES
from tag.lenient import lenient_boxes, lenient_label
from tag.report.face_html import trace_html
from tag.rewards import AU_KINDS, au_reward, audit, score_boxes, score_completion
from tag.trace import (
    MAX_BOXES,
    RULES,
    Trace,
    au_mentions,
    aus_of_boxes,
    format_trace,
    parse,
    strip_boxes,
)

MAX_REWARD = 2.1  # 1 for the boxes, 1 for the answer, 0.1 for the format
AUDIT_CHARS = 4096  # the audit compares all boxes of a completion; one of 512 tokens has some 2,000 characters
ROUNDING = 1e-9


def trace(data: bytes) -> Hashable:
    """Completions: the parser never raises, what it returns is consistent, rewards stay in their ranges."""
    text = text_of(data)
    record = RECORDS[len(data) % len(RECORDS)]
    found = parse(text)
    _check_trace(found)
    scored = [score_completion(text, record, kind) for kind in AU_KINDS]
    for rewards, kind in zip(scored, AU_KINDS, strict=True):
        assert rewards.fmt in (0.0, 0.1) and rewards.ans in (0.0, 1.0)
        assert rewards.au is None or 0.0 <= rewards.au <= 1.0 + ROUNDING
        absent = kind == "none" or (not record.aus and kind != "iou-silence")
        assert (rewards.au is None) == absent
        assert 0.0 <= rewards.total <= MAX_REWARD + ROUNDING
        assert abs(rewards.total - sum(rewards.parts)) < ROUNDING
        assert all(0.0 <= b.iou <= 1.0 and b.matched_iou <= b.iou + ROUNDING for b in rewards.boxes)
    if len(text) <= AUDIT_CHARS:
        assert all(-100 < v < 100 for v in audit(scored, len(scored)).values())
    label = lenient_label(text)
    assert label is None or label in CLASS_INDEX
    assert found.answer is None or "answer_repeated" in found.broken or label == found.answer
    assert all(is_valid(box) for box in lenient_boxes(text))
    assert all(text[a:b].startswith("AU") for _, (a, b) in au_mentions(text))
    assert not parse(strip_boxes(text)).boxes
    return found.broken, min(len(found.boxes), MAX_BOXES + 1), found.answer is not None, bool(au_mentions(text))


def _check_trace(found: Trace) -> None:
    text = found.text
    assert tuple(r for r in RULES if r in found.broken) == found.broken
    assert len(found.boxes) == len(found.box_spans) == len(aus_of_boxes(found))
    assert all(is_valid(box) for box in found.boxes)
    ends = [0, *(end for _, end in found.box_spans)]
    assert all(end <= start for end, (start, _) in zip(ends, found.box_spans))
    assert all(text[a:b].startswith("<bbox>") and text[a:b].endswith("</bbox>") for a, b in found.box_spans)
    assert found.answer is None or found.answer in CLASS_INDEX
    if found.well_formed:
        assert found.think is not None and found.answer is not None and len(found.boxes) <= MAX_BOXES
        again = parse(format_trace(found.think, found.answer))
        assert again.well_formed and again.boxes == found.boxes and again.answer == found.answer


def rewards(data: bytes) -> Hashable:
    """Boxes against AU boxes: every kind of R_AU lies in [0, 1] and does not depend on the order of the AU boxes."""
    numbers = iter(data)
    predicted = [_box(numbers) for _ in range(next(numbers, 0) % 8)]
    activated = [_box(numbers) for _ in range(next(numbers, 0) % 14)]
    found = []
    for kind in ("iou", "iou-matched"):
        value = au_reward(predicted, activated, kind)
        assert 0.0 <= value <= 1.0 + ROUNDING
        assert abs(value - au_reward(predicted, activated[::-1], kind)) < ROUNDING
        assert value == 0.0 or (predicted and activated)
        found.append(value)
    assert found[1] <= found[0] + ROUNDING
    copies = au_reward(activated[:MAX_BOXES], activated, "iou-matched")
    assert not activated or abs(copies - 1.0) < ROUNDING  # pointing exactly at them is all there is to win
    aus = [AU(f"AU{i + 1}", 0.5, box) for i, box in enumerate(activated)]
    record = Record("r", "r.png", "d", "test", CLASSES[len(data) % 7], aus)
    boxes = "".join(f"<bbox>{list(box)}</bbox>" for box in predicted)
    scored = score_completion(f"<think>{boxes}</think><answer>fear</answer>", record)
    assert scored.boxes == score_boxes(parse(f"<think>{boxes}</think>"), record)
    assert 0.0 <= scored.total <= MAX_REWARD + ROUNDING
    return len(predicted), min(len(activated), 4), round(found[0], 1), round(found[1], 1)


def records(data: bytes) -> Hashable:
    """Lines of a records file: a record that survives being written and read again, or one line that says what."""
    return _lines(data, lambda line: _same_again(from_line(line), to_line, from_line))


def prediction_lines(data: bytes) -> Hashable:
    """Lines of predictions.jsonl, likewise."""
    return _lines(
        data, lambda line: _same_again(predictions.from_line(line), predictions.to_line, predictions.from_line)
    )


def _same_again(found, write: Callable, read: Callable) -> Hashable:
    line = write(found)
    assert "\n" not in line and read(line) == found
    if isinstance(found, Record):
        root = folder().resolve()
        try:
            assert resolve_image(found, root).is_relative_to(root)
        except DataError as e:
            check_message(e)
        assert all(is_valid(a.box) and 0 <= a.score <= 1 for a in found.aus) and len(found.candidate_aus) <= len(
            found.aus
        )
        return "record", len(found.aus), found.trace is None, bool(found.provenance)
    return ("prediction",)


def _lines(data: bytes, read: Callable[[str], Hashable]) -> Hashable:
    path = file_of(data)
    seen: list[Hashable] = []
    try:
        for _, line in numbered_lines(path):
            assert len(line) <= MAX_LINE
            try:
                seen.append(read(line))
            except DataError as e:
                seen.append(check_message(e))
    except DataError as e:
        seen.append(check_message(e))
    return tuple(seen[:3])


def labels(data: bytes) -> Hashable:
    """Tables of labels: rows within the seven classes, paths without a null byte, or one line that says what."""
    path = file_of(data)
    try:
        rows, repeated = drop_repeats(read_labels(path))
    except DataError as e:
        return check_message(e)
    assert rows and all(row.label is None or row.label in CLASS_INDEX for row in rows)
    assert all(row.image and "\0" not in row.image for row in rows)
    assert len({row.image for row in rows}) == len(rows)
    return min(len(rows), 4), min(len(repeated), 2), {row.label for row in rows} == {None}


def openface(data: bytes) -> Hashable:
    """Results of OpenFace."""
    try:
        faces = read_openface(file_of(data))
    except DataError as e:
        return check_message(e)
    assert all(face.active <= face.known and all(0 <= v <= 1 for v in face.scores.values()) for face in faces)
    return len(faces[:3]), bool(faces and faces[0].active)


def answer(data: bytes) -> Hashable:
    """Answers of the models that write traces: a well-formed trace with the face's own boxes, or a named rule."""
    text, candidates = text_of(data), RECORDS[len(data) % len(RECORDS)].candidate_aus
    try:
        read_verdict(text)
        verdict = "verdict"
    except Malformed as e:
        verdict = e.rule
    try:
        found = read_answer(text, candidates)
    except Malformed as e:
        return verdict, e.rule
    parsed = parse(found.trace)
    assert parsed.well_formed and parsed.answer == found.label
    assert set(parsed.boxes) <= {a.box for a in candidates} and bool(parsed.boxes) == bool(candidates)
    return verdict, found.label


def canvas(data: bytes) -> Hashable:
    """Boxes go to the canvas and back to where they were, and onto the canvas from anywhere."""
    numbers = iter(data)
    width, height = (1 + (next(numbers, 0) << 8 | next(numbers, 0)) for _ in range(2))
    place = Canvas(width, height)
    box = [float((next(numbers, 0) << 8 | next(numbers, 0)) - 1000) for _ in range(4)]
    back = place.to_image(place.to_canvas(box))
    assert all(abs(a - b) <= 1e-6 * max(width, height, abs(a)) for a, b in zip(box, back, strict=True))
    assert all(abs(a - b) < 1e-6 for a, b in zip(box, place.from_model(place.to_model(box)), strict=True))
    clipped = clip_to_canvas(place.to_canvas(box))
    assert is_valid(clipped) and clip_to_canvas(clipped) == clipped
    inside = place.to_canvas((0, 0, width, height))
    assert min(inside) >= -ROUNDING and max(inside) <= CANVAS_SIZE + ROUNDING
    return width > height, width == height, clipped[0] == 0, clipped[2] == CANVAS_SIZE - 1


def page(data: bytes) -> Hashable:
    """A completion as HTML: its own text comes out, as text, and nothing but our own tags."""
    text = text_of(data)
    record = RECORDS[len(data) % len(RECORDS)]
    found = parse(text)
    reader = _Tags()
    reader.feed(trace_html(found, score_boxes(found, record), {a.au for a in record.aus}))
    reader.close()
    assert reader.tags <= {"span", "mark", "b", "i", "em", "strong", "div", "p", "br", "sup", "small"}, reader.tags
    assert not {name for name in reader.attributes if name.startswith("on") or name in ("src", "href", "srcdoc")}
    return tuple(sorted(reader.tags)), found.broken


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note which elements and attributes there are."""
        self.tags.add(tag)
        self.attributes.update(name for name, _ in attrs)


def _box(numbers) -> Box:
    """A valid box from six bytes."""
    x1, y1 = (next(numbers, 0) * 2 % (CANVAS_SIZE - 1) for _ in range(2))
    width, height = (1 + (next(numbers, 0) << 1) for _ in range(2))
    return x1, y1, min(x1 + width, CANVAS_SIZE - 1), min(y1 + height, CANVAS_SIZE - 1)


TARGETS = {
    name: Target(run, seeds(name), TOKENS.get(name, []))
    for name, run in {
        "trace": trace,
        "rewards": rewards,
        "records": records,
        "predictions": prediction_lines,
        "labels": labels,
        "openface": openface,
        "answer": answer,
        "canvas": canvas,
        "page": page,
    }.items()
} | EVALUATION
