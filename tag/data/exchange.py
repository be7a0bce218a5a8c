"""TAG records in formats of other tools: LLaMA-Factory's ShareGPT JSON and a Hugging Face image folder.

Both carry the whole record beside what the other tool reads, so that what was exported comes back as it was. Files
made elsewhere are read as far as they go: image, trace and the class in its answer.
"""

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tag.data.records import Record, from_line, numbered_lines, resolve_image, to_line
from tag.errors import DataError
from tag.files import replacing
from tag.prompts import TAG_PROMPT
from tag.trace import parse

MAX_JSON = 4 << 30  # bytes of a ShareGPT file
DATASET_INFO = {"formatting": "sharegpt", "columns": {"messages": "conversations", "images": "images"}}


def write_sharegpt(records: Iterable[Record], out: str | os.PathLike, prompt: str = TAG_PROMPT) -> int:
    """OUT.json, a list with a conversation for each record that has a trace, and dataset_info.json beside it.

    Image paths are those of the records; LLaMA-Factory looks for them under its `media_dir`. Returns how many.
    """
    out = Path(out)
    count = 0
    with replacing(out) as f:
        f.write("[")
        for record in records:
            if record.trace is None:
                continue
            turns = [{"from": "human", "value": f"<image>{prompt}"}, {"from": "gpt", "value": record.trace}]
            item = {"conversations": turns, "images": [record.image], "tag_record": json.loads(to_line(record))}
            f.write((",\n" if count else "\n") + json.dumps(item))
            count += 1
        f.write("\n]\n")
    info = out.with_name("dataset_info.json")
    known = _read_json(info) if info.is_file() else {}
    if not isinstance(known, dict):
        raise DataError(f"{info}: not a JSON object; move it away or choose another folder")
    with replacing(info) as f:
        f.write(json.dumps({**known, out.stem: {"file_name": out.name, **DATASET_INFO}}, indent=1) + "\n")
    return count


def read_sharegpt(path: str | os.PathLike, dataset: str, split: str) -> Iterator[Record]:
    """Records of a ShareGPT file. Raises DataError (file: item: what) for an item that is not one image and one answer.

    dataset, split: for items that bring no record of their own.
    """
    items = _read_json(Path(path))
    if not isinstance(items, list):
        raise DataError(f"{path}: not a JSON list of conversations")
    for number, item in enumerate(items):
        where = f"{path}: item {number}"
        if isinstance(item, dict) and isinstance(item.get("tag_record"), dict):
            yield from_line(json.dumps(item["tag_record"]), where)
            continue
        image, trace = _foreign(item, where)
        yield _bare_record(f"{dataset}-{number:07d}", image, dataset, split, trace, where)


def write_imagefolder(records: Iterable[Record], image_root: str | os.PathLike, out: str | os.PathLike) -> int:
    """OUT/SPLIT/ with images (hard links where the file system can, else copies) and metadata.jsonl; returns how many.

    `datasets.load_dataset("imagefolder", data_dir=OUT)` reads it. Raises DataError when OUT is not empty.
    """
    out = Path(out)
    if out.is_dir() and any(out.iterdir()):
        raise DataError(f"{out}: not empty; choose another folder")
    lines: dict[str, list[str]] = {}
    for count, record in enumerate(records, 1):
        source = resolve_image(record, image_root)
        name = f"{count:07d}{source.suffix.lower()}"  # records of several data sets may share file names
        target = out / record.split / name
        target.parent.mkdir(parents=True, exist_ok=True)
        _link_or_copy(source, target)
        fields = {"file_name": name, "label": record.label, "trace": record.trace or "", "tag_record": to_line(record)}
        lines.setdefault(record.split, []).append(json.dumps(fields))
    for split, part in lines.items():
        with replacing(out / split / "metadata.jsonl") as f:
            f.writelines(line + "\n" for line in part)
    return sum(map(len, lines.values()))


def read_imagefolder(folder: str | os.PathLike, dataset: str) -> Iterator[Record]:
    """Records of an image folder, `image` relative to it, split by sub-folder. Raises DataError (file:line)."""
    folder = Path(folder)
    tables = sorted(folder.glob("*/metadata.jsonl"))
    if not tables:
        raise DataError(f"{folder}: no SPLIT/metadata.jsonl in it")
    for table in tables:
        split = table.parent.name
        for number, line in numbered_lines(table):
            where = f"{table}:{number}"
            raw = _parse(line, where)
            name = raw.get("file_name") if isinstance(raw, dict) else None
            if not isinstance(name, str) or not name:
                raise DataError(f"{where}: field 'file_name' must be a non-empty string")
            image = f"{split}/{name}"
            if isinstance(raw.get("tag_record"), str):
                record = from_line(raw["tag_record"], where)
                yield Record(**{**vars(record), "image": image})
                continue
            trace = raw.get("trace") or raw.get("text")
            yield _bare_record(f"{dataset}-{split}-{number:07d}", image, dataset, split, trace, where, raw.get("label"))


def _bare_record(name: str, image: str, dataset: str, split: str, trace: Any, where: str, label: Any = None) -> Record:
    """A record of what another tool's file says; its class is `label`, else the one in the trace's answer."""
    answer = parse(trace).answer if isinstance(trace, str) else None
    fields = {"id": name, "image": image, "dataset": dataset, "split": split, "label": label or answer}
    return from_line(json.dumps({**fields, "trace": trace or None, "detector": ""}), where)


def _foreign(item: Any, where: str) -> tuple[str, str]:
    """(image, answer) of an item in either of ShareGPT's spellings."""
    turns = (item.get("conversations") or item.get("messages")) if isinstance(item, dict) else None
    images = item.get("images") if isinstance(item, dict) else None
    if not isinstance(turns, list) or not isinstance(images, list) or len(images) != 1:
        raise DataError(f"{where}: not a conversation about one image")
    for turn in reversed(turns):
        role = (turn.get("from") or turn.get("role")) if isinstance(turn, dict) else None
        text = (turn.get("value") or turn.get("content")) if isinstance(turn, dict) else None
        if role in ("gpt", "assistant") and isinstance(text, str):
            return str(images[0]), text
    raise DataError(f"{where}: no answer in the conversation")


def _read_json(path: Path) -> Any:
    try:
        if path.stat().st_size > MAX_JSON:
            raise DataError(f"{path}: larger than {MAX_JSON >> 30} GiB")
        text = path.read_text(encoding="utf-8")
    except OSError as e:
        raise DataError(f"{path}: cannot be read ({e.strerror or e})") from None
    except UnicodeDecodeError as e:
        raise DataError(f"{path}: not UTF-8 text (byte {e.start})") from None
    return _parse(text, str(path))


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as e:
        raise DataError(f"{where}: not valid JSON ({str(e)[:100]})") from None


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)
