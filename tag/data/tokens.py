"""The training records' completions as token ids: made once, in processes, and kept on disk.

    DIR/5b0c...e1.tokens      PART completions:  digest (8) | count n (1) | lengths (n) | ids (sum of lengths)   int32

A file is named by what it is made of, the texts and the tokenizer. So nothing can be out of date: a changed record, a
changed flag or another tokenizer is another name, and what was finished before a run was killed is found again. Files
are mapped into memory, not read: all processes of a machine share one copy, 4 bytes a token.
"""

import hashlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import tokenizers

from tag.data.workers import held_by_worker, start_workers
from tag.dist import Dist
from tag.errors import DataError, UsageError
from tag.files import replacing

PART = 4096  # completions in a file: a second or two of work
FORMAT = "1"
HEADER = 8  # int32 of a digest of the rest


class Completions(Sequence):
    """Token ids of completions by record index, from the files of `tokenise`. lengths: (n,) int32."""

    def __init__(self, parts: Sequence[np.ndarray]) -> None:
        """parts: the int32 files, in order; all but the last hold PART completions."""
        self.ids: list[np.ndarray] = []
        self.ends: list[np.ndarray] = []
        lengths = [np.zeros(0, np.int32)]
        for part in parts:
            n = int(part[HEADER])
            lengths.append(np.array(part[HEADER + 1 : HEADER + 1 + n]))
            self.ids.append(part[HEADER + 1 + n :])
            self.ends.append(np.cumsum(lengths[-1], dtype=np.int64))
        self.lengths = np.concatenate(lengths)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> list[int]:
        part, row = divmod(range(len(self))[index], PART)
        end = int(self.ends[part][row])
        return self.ids[part][end - int(self.lengths[part * PART + row]) : end].tolist()


def encode_completion(tokenizer, eos_id: int, text: str) -> list[int]:
    """Token ids of a completion with the end-of-turn token, which is trained on."""
    return [*tokenizer.encode(text, add_special_tokens=False), eos_id]


def tokenise(
    texts: Sequence[str],
    tokenizer,
    eos_id: int,
    folder: str | os.PathLike,
    here: Dist,
    *,
    workers: int = 0,
    longest: int = 2**31 - 1,
    name: Callable[[int], str] = "text {}".format,
) -> Completions:
    """`encode_completion` of all texts, from `folder` where it has been done before; a collective.

    Ranks share the files that are missing, each with `workers` processes (0: itself). Raises DataError, on all ranks
    the same, for the first text (called `name(index)`) that takes more than `longest` tokens, spells a special token or
    cannot be encoded; its file is not written.
    """
    key = _tokenizer_key(tokenizer, eos_id)
    starts = range(0, len(texts), PART)
    parts = [texts[start : start + PART] for start in starts]
    paths = [Path(folder) / f"{_part_key(key, part)}.tokens" for part in parts]
    mine = [k for k in range(here.rank, len(parts), here.world) if _read(paths[k], len(parts[k])) is None]
    found = _make([(parts[k], paths[k], longest) for k in mine], (tokenizer, eos_id), workers)
    problems = [(starts[k] + row, problem) for k, bad in zip(mine, found) for row, problem in bad]
    if problems := [p for rank in here.gather(sorted(problems)[:1]) for p in rank]:  # all ranks have written theirs
        _complain(*min(problems), name)
    opened = []
    for part, path in zip(parts, paths):
        if (data := _read(path, len(part))) is None:  # not a folder that all machines share
            _make_part(part, path, longest, (tokenizer, eos_id))
            data = _read(path, len(part))
        if data is None:
            raise UsageError(f"{path}: what was just written there cannot be read back; another --token-cache?")
        opened.append(data)
    completions = Completions(opened)
    for index in np.flatnonzero(completions.lengths > longest)[:1]:  # in a file from before
        _complain(int(index), _too_long(completions.lengths[index], longest), name)
    return completions


def _complain(index: int, problem: str, name: Callable[[int], str]) -> None:
    raise DataError(f"{name(index)}: {problem}")


def _too_long(length: int, longest: int) -> str:
    return f"the trace takes {length} tokens, --context leaves room for {longest} beside the prompt"


def _tokenizer_key(tokenizer, eos_id: int) -> bytes:
    """What decides the ids besides the texts."""
    facts = (FORMAT, tokenizers.__version__, str(eos_id), tokenizer.backend_tokenizer.to_str())
    return hashlib.blake2b("\0".join(facts).encode()).digest()


def _part_key(key: bytes, texts: Sequence[str]) -> str:
    digest = hashlib.blake2b(key, digest_size=16)
    for text in texts:
        data = text.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()


def _make(tasks: list[tuple[Sequence[str], Path, int]], held: tuple, workers: int) -> list[list[tuple[int, str]]]:
    """The problems of each part, which is written if it has none."""
    if not workers or len(tasks) < 2:
        return [_make_part(*task, held) for task in tasks]
    pool = start_workers(min(workers, len(tasks)), held)
    try:
        return [future.result() for future in [pool.submit(_make_part, *task) for task in tasks]]
    except BrokenProcessPool:
        raise UsageError(
            "a process that tokenises died, perhaps of too little memory; the same command goes on where it was, "
            "with --workers 0 in one process"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _make_part(texts: Sequence[str], path: Path, longest: int, held: tuple | None = None) -> list[tuple[int, str]]:
    """Write one file; the problems that kept it from being written, (row, what)."""
    tokenizer, eos_id = held or held_by_worker()
    special = {*tokenizer.all_special_ids, eos_id}
    rows: list[list[int]] = []
    for row, text in enumerate(texts):
        try:
            rows.append(encode_completion(tokenizer, eos_id, text))
        except (TypeError, ValueError) as e:  # half a surrogate pair, which JSON can spell
            return [(row, f"the trace cannot be tokenised ({' '.join(str(e).split())[:80]})")]
        if found := special.intersection(rows[-1][:-1]):
            return [(row, f"the trace spells the special token {tokenizer.convert_ids_to_tokens(min(found))!r}")]
        if len(rows[-1]) > longest:
            return [(row, _too_long(len(rows[-1]), longest))]
    flat = [len(rows), *map(len, rows)]
    for ids in rows:
        flat += ids
    body = np.array(flat, dtype="<i4").tobytes()
    try:
        with replacing(path, binary=True) as f:
            f.write(_digest(body) + body)
    except FileNotFoundError:  # another run, which makes the same file, was quicker
        if not path.is_file():
            raise
    return []


def _read(path: Path, count: int) -> np.ndarray | None:
    """The file mapped into memory; None if it is not there or not whole."""
    try:
        data = np.memmap(path, dtype="<i4", mode="r")
    except (OSError, ValueError):  # ValueError: empty, or not a multiple of 4 bytes
        return None
    body = memoryview(data[HEADER:]).cast("B")
    if len(data) <= HEADER or data[:HEADER].tobytes() != _digest(body) or int(data[HEADER]) != count:
        return None
    return data


def _digest(body: bytes | memoryview) -> bytes:
    return hashlib.blake2b(body, digest_size=4 * HEADER).digest()
