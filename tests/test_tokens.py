"""Traces tokenised once, in processes, and kept on disk: the same ids whatever the workers, ranks and interruptions.

pytest tests/test_tokens.py
"""

import json

import numpy as np
import pytest
import torch
from helpers import make_vlm, run_processes

from tag.data import tokens
from tag.data.order import batch_indices, even_shares
from tag.data.records import line_of
from tag.data.tokens import Completions, tokenise
from tag.dist import Dist
from tag.errors import DataError

HERE = Dist(0, 1, torch.device("cpu"))
TEXTS = [f"<think>word {i} {'more of it ' * (i % 7)}</think><answer>fear</answer>" for i in range(23)] + [""]


@pytest.fixture(scope="module")
def vlm():
    return make_vlm()


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    """Files of five completions."""
    monkeypatch.setattr(tokens, "PART", 5)


def made(vlm, folder, texts=TEXTS, here=HERE, **options) -> Completions:
    return tokenise(texts, vlm.tokenizer, vlm.eos_id, folder, here, **options)


def files(folder) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_ids_are_the_tokenizers_at_any_number_of_workers(vlm, tmp_path, workers):
    found = made(vlm, tmp_path, workers=workers)
    expected = [vlm.encode_completion(text) for text in TEXTS]
    assert list(found) == expected and found[-1] == [vlm.eos_id] and found[-2] == expected[-2]
    assert found.lengths.tolist() == [len(ids) for ids in expected]
    with pytest.raises(IndexError):
        found[len(TEXTS)]
    made(vlm, tmp_path / "alone")
    assert len(files(tmp_path / "alone")) == 5
    assert {k: v for k, v in files(tmp_path / "alone").items()} == {
        p.name: p.read_bytes() for p in tmp_path.glob("*.tokens")
    }


def test_what_is_there_is_not_made_again(vlm, tmp_path, monkeypatch):
    """A run that was killed goes on; a changed record costs its own file, another tokenizer all of them."""
    made(vlm, tmp_path)
    before = files(tmp_path)
    removed = sorted(before)[2]
    (tmp_path / removed).unlink()
    encoded = []
    encode = tokens.encode_completion
    monkeypatch.setattr(tokens, "encode_completion", lambda *args: encoded.append(args[2]) or encode(*args))
    assert list(made(vlm, tmp_path)) == [vlm.encode_completion(text) for text in TEXTS]
    assert len(encoded) in (4, 5) and files(tmp_path) == before
    encoded.clear()
    made(vlm, tmp_path)
    assert encoded == []
    changed = [*TEXTS[:7], "another", *TEXTS[8:]]
    assert made(vlm, tmp_path, changed)[7] == vlm.encode_completion("another") and encoded == changed[5:10]
    encoded.clear()
    tokenise(TEXTS, vlm.tokenizer, vlm.eos_id - 1, tmp_path, HERE)
    assert encoded == TEXTS


@pytest.mark.parametrize(
    "damage", [lambda d: d[:-4], lambda d: d[:-3], lambda d: d[:60] + b"\x01" + d[61:], lambda d: b""]
)
def test_damaged_files_are_made_again(vlm, tmp_path, damage):
    made(vlm, tmp_path)
    before = files(tmp_path)
    name = sorted(before)[0]
    (tmp_path / name).write_bytes(damage(before[name]))
    assert list(made(vlm, tmp_path)) == [vlm.encode_completion(text) for text in TEXTS]
    assert files(tmp_path) == before


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    "bad, message",
    [("half a pair \ud800", "cannot be tokenised"), ("a <|im_end|> b", "spells the special token '<|im_end|>'")],
)
def test_a_trace_that_cannot_be_trained_on_is_named(vlm, tmp_path, workers, bad, message):
    path = tmp_path / "train.jsonl"
    texts = [*TEXTS[:11], bad, *TEXTS[12:17], bad, *TEXTS[18:]]
    path.write_text("\n".join(json.dumps({"id": f"r{i}", "trace": t}) for i, t in enumerate(["", *texts])) + "\n")
    with pytest.raises(DataError) as e:
        made(vlm, tmp_path / "tokens", texts, workers=workers, name=lambda i: line_of(path, f"r{i + 1}"))
    assert str(e.value).startswith(f"{path}:13: ") and message in str(e.value)
    assert "\n" not in str(e.value) and not list(tmp_path.rglob("*.partial"))


def test_a_trace_too_long_is_named_whether_its_file_is_new_or_old(vlm, tmp_path):
    lengths = made(vlm, tmp_path).lengths.tolist()
    longest = max(lengths) - 1
    first = next(i for i, n in enumerate(lengths) if n > longest)
    for folder in (tmp_path, tmp_path / "new"):
        with pytest.raises(
            DataError, match=f"^text {first}: the trace takes {longest + 1} tokens.* room for {longest} "
        ):
            made(vlm, folder, longest=longest)
    assert len(files(tmp_path / "new")) < 5
    assert made(vlm, tmp_path, longest=longest + 1).lengths.tolist() == lengths


def test_line_of_what_is_gone(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"id": "a"}\n\n{"id": "b"}\n')
    assert line_of(path, "b") == f"{path}:3" and line_of(path, "c") == str(path)


def several(folder: str) -> None:
    """One of several ranks; each writes down what it has made itself."""
    from pathlib import Path

    from tag import dist

    tokens.PART = 5
    vlm, made_here = make_vlm(), []
    make_part = tokens._make_part
    tokens._make_part = lambda texts, path, *rest: made_here.append(path.name) or make_part(texts, path, *rest)
    here = dist.setup("cpu")
    found = tokenise(TEXTS, vlm.tokenizer, vlm.eos_id, Path(folder), here)
    (Path(folder) / f"rank-{here.rank}.json").write_text(json.dumps(made_here))
    assert list(found) == [vlm.encode_completion(text) for text in TEXTS]
    texts = [*TEXTS[:11], "<|im_end|>", *TEXTS[12:17], "<|im_end|>"]
    with pytest.raises(DataError, match="text 11:"):  # on both, though one rank alone has met it
        tokenise(texts, vlm.tokenizer, vlm.eos_id, Path(folder), here)
    dist.cleanup()


@pytest.mark.slow
def test_ranks_share_the_work_and_the_complaint(tmp_path):
    run_processes(2, "test_tokens:several", tmp_path)
    first, second = (json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in (0, 1))
    assert len(first) + len(second) == 5 and not set(first) & set(second)  # each file by one of them


# ---------------------------------------------------------------- who computes what


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_ranks_get_as_many_sequences_and_about_as_many_tokens(ranks):
    rng = np.random.default_rng(0)
    for count in (ranks, ranks + 1, 64, 256):
        lengths = rng.integers(50, 512, count).tolist()
        shares = even_shares(lengths, ranks)
        assert sorted(i for share in shares for i in share) == list(range(count))
        assert {len(share) for share in shares} <= {count // ranks, -(-count // ranks)} and all(shares)
        loads = [sum(lengths[i] for i in share) for share in shares]
        if count >= 32 * ranks:
            assert min(loads) > 0.99 * max(loads)
    assert even_shares([3, 1, 2], 1) == [[0, 1, 2]]


def test_shares_of_equal_sequences_are_all_the_same_size():
    assert [len(share) for share in even_shares([5] * 7, 3)] == [3, 2, 2]


def test_planning_steps_of_300_000_records_is_quick():
    """One step's plan: milliseconds, whatever the number of records."""
    import time

    lengths = np.random.default_rng(0).integers(50, 512, 300_000).astype(np.int32)
    started = time.process_time()
    for step in range(5):
        indices = batch_indices(len(lengths), 256, step, 0)
        shares = even_shares(lengths[indices].tolist(), 8)
        assert sum(map(len, shares)) == 256
    assert (time.process_time() - started) / 5 < 0.5
