"""What makes an evaluation this one: model, prompt, data, decoding. Its folder is claimed by it, and answers are reused
only under the same one.

Weights, adapter, records and images are known by their content, not by their names or dates: a moved folder is the same
model, an adapter trained further is another one.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from tag.data.records import to_line
from tag.errors import UsageError
from tag.evaluation.answers import Face
from tag.prompts import prompt_hash
from tag.vlm import TINY_MODEL

TEMPERATURE, TOP_P = 0.0, 0.9  # the paper's; at temperature 0 the second has nothing to choose from
SCRIPT = "eval.py"
_MODEL_FILES = (".safetensors", ".json", ".jinja", ".model", ".txt")
_READERS = 8


def fingerprint(args, faces: Sequence[Face]) -> dict[str, Any]:
    """Everything that the answers depend on, as plain JSON.

    args: of eval.py (backend, model, adapter, dtype, max_new_tokens, no_box_limit, image_size, omit, request, missing).
    """
    decoding: dict[str, Any] = {"temperature": TEMPERATURE, "top_p": TOP_P, "max_new_tokens": args.max_new_tokens}
    if args.backend == "openai":
        decoding |= {"image_size": args.image_size, "omit": sorted(args.omit), "request": args.request}
        model: dict[str, Any] = {"backend": "openai", "name": args.model}
    else:
        decoding |= {"dtype": args.dtype, "max_boxes": None if args.no_box_limit else 3}
        decoding |= {"image_size": args.image_size} if args.backend == "hf" else {}
        model = {"backend": args.backend, "base": model_identity(args.model)}
        model["adapter"] = _hash_folder(args.adapter) if args.adapter else None
    return {
        "model": model,
        "prompt": prompt_hash(),
        "data": {"faces": len(faces), "sha256": data_hash(faces)},
        "missing": args.missing,
        "decoding": decoding,
    }


def digest(found: Mapping[str, Any]) -> str:
    """Short form of a fingerprint."""
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:16]


def model_identity(source: str) -> str:
    """A folder's hash, or a hub model's name and revision. Whether it can be loaded is found when it is."""
    folder = TINY_MODEL if source == "tiny" else Path(source)
    if folder.is_dir():
        return _hash_folder(folder)
    try:
        commit = AutoConfig.from_pretrained(source, trust_remote_code=False)._commit_hash
    except Exception:  # whatever is wrong with it, loading it says so, in one line
        commit = None
    return f"{source}@{commit}"


def data_hash(faces: Sequence[Face]) -> str:
    """sha256 over records and the bytes of their images; a missing image counts as such."""
    total = hashlib.sha256()
    with ThreadPoolExecutor(_READERS) as pool:
        for face, image in zip(faces, pool.map(_hash_image, faces)):
            total.update(f"{to_line(face.record)}\n{image}\n".encode("utf-8", "surrogatepass"))
    return total.hexdigest()[:16]


def claim(out: str | os.PathLike, mine: Mapping[str, Any]) -> None:
    """Check that `out` is free, or holds an earlier part of this very evaluation; nothing is written.

    Raises UsageError that names what differs.
    """
    out = Path(out)
    if not (out / "run.json").is_file():
        if out.is_dir() and any(out.iterdir()):
            raise UsageError(f"{out} is not empty and holds no run of ours; choose another --out")
        return
    theirs = read_fingerprint(out)
    was, now = _leaves(theirs), _leaves(mine)
    changed = [key for key in {**now, **was} if was.get(key, "not there") != now.get(key, "not there")]
    if changed:
        theirs, mine = (str(leaves.get(changed[0]))[:80] for leaves in (was, now))
        raise UsageError(
            f"{out} holds another evaluation: its {changed[0][:80]} is {theirs}, this one's is {mine}; "
            "repeat its command to go on with it, or choose another --out"
        )


def read_fingerprint(out: str | os.PathLike) -> dict[str, Any]:
    """The fingerprint of the evaluation in folder `out`. Raises UsageError if there is none."""
    card = Path(out) / "run.json"
    try:
        raw = json.loads(card.read_text(encoding="utf-8"))
        script = raw["script"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise UsageError(f"{card} cannot be read; choose another folder") from None
    if script != SCRIPT:
        raise UsageError(f"{out} holds a run of {' '.join(str(script).split())[:60]}; choose another folder")
    if not isinstance(raw.get("fingerprint"), dict):
        raise UsageError(f"{out} holds an evaluation without a fingerprint, made by an older version; evaluate again")
    return raw["fingerprint"]


def _leaves(found: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"decoding.dtype": "float32", ...}."""
    leaves: dict[str, Any] = {}
    for key, value in found.items():
        leaves |= _leaves(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {prefix + key: value}
    return leaves


def _hash_folder(folder: str | os.PathLike) -> str:
    """sha256 over the names and contents of a model's files."""
    total = hashlib.sha256()
    for path in _model_files(Path(folder)):
        with open(path, "rb") as f:
            total.update(f"{path.name} {hashlib.file_digest(f, 'sha256').hexdigest()}\n".encode())
    return total.hexdigest()[:16]


def _model_files(folder: Path) -> Iterator[Path]:
    if folder.is_dir():
        yield from (p for p in sorted(folder.iterdir()) if p.suffix in _MODEL_FILES and p.is_file())


def _hash_image(face: Face) -> str:
    if face.path is None:
        return "missing"
    try:
        with open(face.path, "rb") as f:
            return hashlib.file_digest(f, "sha256").hexdigest()
    except OSError as e:
        return f"unreadable: {e.strerror}"
