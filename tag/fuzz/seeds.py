"""What fuzzing starts from: faces that completions are scored on, valid inputs of each target, words to make more."""

import json

from tag.data.records import AU, Record, to_line
from tag.evaluation import predictions
from tag.labels import CLASSES, DROPPED
from tag.trace import format_box, format_trace

_AUS = [
    AU("AU12", 0.9, (80, 323, 416, 407)),
    AU("AU6", 0.8, (117, 248, 396, 344)),
    AU("AU25", 0.7, (168, 353, 321, 417)),
    AU("AU4", 0.4, (235, 119, 345, 188)),
    AU("AU1", 0.2, (0, 0, 511, 511)),
]
# Faces without, with one, with all AUs: the reward differs.
RECORDS = tuple(
    Record(f"r{n}", f"r{n}.png", "d", "train", CLASSES[n], _AUS[:n], [a.au for a in _AUS[: min(n, 3)]], size=(48, 48))
    for n in (0, 1, 2, 3, 5)
)

_WORD = ["AU12", "AU6", "AU 4", "AU99", "fear", "happy", "the brows", ". ", "\n", "  ", "é", "世界", "\u202e", "\x00"]
_JSON = ["{", "}", "[", "]", ":", ",", '"', "\\", "null", "true", "false", "NaN", "Infinity", "1e999", "-1", "1e-9"]
_TAGS = ["<think>", "</think>", "<answer>", "</answer>", "<bbox>", "</bbox>", "<bb", "ox>", "<", ">", "/"]
_NUMBERS = ["0", "1", "511", "512", "-1", "0007", "99999", "[", "]", ", ", "[1, 2, 300, 400]", "١", "１"]
_CELLS = [
    ",",
    ";",
    "\t",
    "\n",
    "\r\n",
    '"',
    '""',
    "image",
    "label",
    "emotion",
    "split",
    "a.png",
    "../b",
    "/c",
    "\ufeff",
]
_FIELDS = ["id", "image", "dataset", "split", "label", "aus", "au", "score", "box", "candidates", "trace", "size"]
_OPENFACE = ["AU12_r", "AU12_c", "action_units", "face", "confidence", "success", "nan", "inf", "1e400", "[0.1, 0.2]"]

TOKENS: dict[str, list[bytes]] = {
    "trace": [t.encode() for t in (*_TAGS, *_NUMBERS, *_WORD, *CLASSES, "<bbox>[1, 2, 300, 400]</bbox>")],
    "records": [t.encode() for t in (*_JSON, *_NUMBERS, *(f'"{f}": ' for f in _FIELDS), *_WORD, "\\ud800", "\n")],
    "labels": [t.encode() for t in (*_CELLS, *CLASSES, *sorted(DROPPED), *_WORD)] + [b"\xff"],
    "openface": [t.encode() for t in (*_CELLS, *_OPENFACE)],
    "answer": [
        t.encode()
        for t in (*_JSON, *_TAGS, *_WORD, "```json\n", "```", '"global": ', '"local": ', '"label": ', '"usable": ')
    ],
}
TOKENS["predictions"] = TOKENS["records"] + [b'"text": ', b'"au_boxes": ', b'"num_tokens": ']
TOKENS["page"] = TOKENS["trace"] + [
    b"<script>",
    b"</script>",
    b"<img src=x onerror=y>",
    b"&lt;",
    b"&#0;",
    b"'",
    b'"',
    b"<!--",
]


def seeds(target: str) -> list[bytes]:
    """Valid inputs, and some that are nearly so."""
    boxes = " ".join(f"The sign ({a.au}) {format_box(a.box)}." for a in _AUS[:3])
    traces = [format_trace(f"A face. {boxes} So it is {c}.", c) for c in CLASSES[:3]]
    traces += [format_trace("Nothing moves.", "neutral"), "I see a happy face.", traces[0][:60], ""]
    full = [to_line(Record(**{**vars(RECORDS[3]), "trace": traces[0], "provenance": {"a": [1, {"b": None}]}}))]
    if target in ("trace", "page"):
        return [t.encode() for t in traces]
    if target == "records":
        return [line.encode() for line in (*map(to_line, RECORDS), *full, "\n".join(map(to_line, RECORDS)), "{}", "")]
    if target == "predictions":
        return [predictions.to_line(predictions.make_prediction(r, t)).encode() for r, t in zip(RECORDS, traces)]
    if target == "labels":
        tables = ("image,label\na.png,fear\nb/c.png,Happy\n", 'file;emotion;split\n"x y.jpg";contempt;test\n')
        return [t.encode() for t in (*tables, "\ufeffimage\temotion\na.png\tsad\n", "image,label\n")]
    if target == "openface":
        two = "face,confidence,success,AU12_r,AU12_c\n0,0.9,1,2.5,1\n"
        three = 'image_path,action_units\na.png,"[0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]"\n'
        return [two.encode(), three.encode()]
    if target == "answer":
        marks = " ".join(f"It moves <{a.au}> [{', '.join(map(str, a.box))}]." for a in _AUS[:3])
        whole = {"global": "A face.", "local": marks, "conclusion": "So.", "label": "fear"}
        none = {**whole, "local": "Nothing moves."}
        texts = [json.dumps(whole), json.dumps(none), f"```json\n{json.dumps(whole)}\n```"]
        return [t.encode() for t in (*texts, json.dumps({"usable": True, "reason": ""}))]
    return [bytes(range(64)), bytes(32), b"\xff" * 48, b"\x03\x05" + bytes(range(0, 250, 7))]
