"""What all targets share: an input as a text and as a file, and what an error may look like."""

import os
import re
import shutil
import tempfile
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from pathlib import Path

from tag.errors import DataError

MAX_MESSAGE = 600  # characters of an error that is one line

IN_MEMORY = "/dev/shm" if os.path.isdir("/dev/shm") else None
_FOLDERS: dict[int, tempfile.TemporaryDirectory] = {}  # by process: a fork inherits its parent's, and must not drop it


@dataclass(frozen=True)
class Target:
    """A function to fuzz, texts to start from, and words that inputs are made of."""

    run: Callable[[bytes], Hashable]
    seeds: list[bytes] = field(default_factory=list)
    tokens: list[bytes] = field(default_factory=list)
    max_bytes: int = 1 << 16


def text_of(data: bytes) -> str:
    """As a tokenizer decodes (replacement characters), or for one length in four as JSON can (lone surrogates)."""
    return data.decode("utf-8", "replace" if len(data) % 4 else "surrogateescape")


def folder() -> Path:
    """A folder of this process, in memory where there is such a place."""
    process = os.getpid()
    if process not in _FOLDERS:
        _FOLDERS[process] = tempfile.TemporaryDirectory(prefix=f"fuzz-{process}-", dir=IN_MEMORY)
    return Path(_FOLDERS[process].name)


def remove_folder(process: int) -> None:
    """The folder of a process that has ended, by itself or killed."""
    for path in Path(IN_MEMORY or tempfile.gettempdir()).glob(f"fuzz-{process}-*"):
        shutil.rmtree(path, ignore_errors=True)


def file_of(data: bytes, name: str = "input") -> str:
    """A file of that folder with these bytes."""
    path = folder() / name
    path.write_bytes(data)
    return str(path)


def check_message(error: DataError) -> str:
    """An error is one line of bounded length; its behaviour is its text without what differs between inputs."""
    message = str(error)
    assert "\n" not in message and len(message) <= MAX_MESSAGE + 2 * len(str(folder() / "input")), message[:200]
    return re.sub(r"'.*'|\"[^\"]*\"|\d+|\(.*\)", "", message)[-60:]
