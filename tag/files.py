"""Writing files so that a reader never sees half of one."""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:  # torch takes seconds to import, and whoever only writes text does without it
    from torch import Tensor

_UMASK = os.umask(0)  # it can only be read by setting it, for all threads: once, before there are any
os.umask(_UMASK)


@contextmanager
def replacing(path: str | os.PathLike, binary: bool = False) -> Iterator[IO]:
    """A file, UTF-8 text or binary, written beside `path` and renamed over it when the block ends; folders are made as
    needed.

    If the block raises, what stood at `path` stays and the half-written file is removed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") if binary else open(partial, "w", encoding="utf-8", newline="\n") as f:
            yield f
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: str | os.PathLike, content: Any, indent: int = 2) -> None:
    """Indented JSON, whole or not at all."""
    with replacing(path) as f:
        f.write(json.dumps(content, indent=indent) + "\n")


def write_tensors(
    path: str | os.PathLike, tensors: "dict[str, Tensor]", metadata: dict[str, str] | None = None
) -> None:
    """A safetensors file, on the disk and readable by whoever may read the folder when this returns, or not there."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    try:
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, partial, metadata)
        os.chmod(partial, 0o666 & ~_UMASK)  # safetensors makes it readable by its owner alone
        with open(partial, "rb+") as f:
            os.fsync(f.fileno())
        os.replace(partial, path)
    except SafetensorError as e:  # how it reports what the system says, a full disk for example
        number = re.search(r"\(os error (\d+)\)", str(e))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from None
    finally:
        partial.unlink(missing_ok=True)  # a full disk needs the room


def sync_folder(folder: str | os.PathLike) -> None:
    """What was renamed in `folder` outlives a power failure."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
