"""Asking a judge about every pair in both orders under several seeds: each question once, over as many runs as needed.

A malformed answer is asked again under another seed, a bounded number of times; after that the judgement is kept as
missing. A question that got no answer at all (`Fault`) is left for the next run.
"""

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from tag.data.records import resolve_image
from tag.datagen.answer import Malformed
from tag.datagen.backends import Backend, Fault
from tag.datagen.stages import request_seed
from tag.datagen.workers import work_through
from tag.preference.judgements import ORDERS, Judgement, Judgements, Key
from tag.preference.judges import Question
from tag.preference.pairs import Pair
from tag.preference.rubric import judge_prompt, read_verdict, rubric_hash

PREPARE_THREADS = 2


@dataclass
class Run:
    """What one run did; the file knows what all of them have done."""

    asked: int = 0  # questions that came to an end
    calls: int = 0  # answers, taken or not
    failures: Counter[str] = field(default_factory=Counter)  # kind of fault -> questions left for the next run
    stopped: str = ""  # why it ended early


def questions(pairs: Sequence[Pair], seeds: int) -> Iterator[Key]:
    """The key of every question there is."""
    for pair, order, seed in product(pairs, ORDERS, range(seeds)):
        yield pair.id, order, seed


def judge_name(judge: Backend) -> str:
    """As it stands in every judgement: `openai:gpt-x`."""
    return ":".join(filter(None, (judge.name, str(judge.info.get("model", "")))))


async def judge_pairs(
    pairs: Sequence[Pair],
    models: tuple[str, str],
    image_root: Path,
    judge: Backend,
    judgements: Judgements,
    seeds: int = 3,
    retries: int = 3,
    progress: Callable[[], None] = lambda: None,
) -> Run:
    """Ask whatever is not yet in `judgements`, `judge.concurrency` pairs at a time. `progress` hears of each question.

    models: what model 0 and 1 are called, for the file; the judge is not told. An image that cannot be read ends the
    run, as does a judge that is gone: `Run.stopped` says so, what is done is kept.
    """
    run, loop, pool = Run(), asyncio.get_running_loop(), ThreadPoolExecutor(PREPARE_THREADS)

    async def one(pair: Pair) -> None:
        waiting = [key for key in questions([pair], seeds) if key not in judgements.by_key]
        if not waiting:
            return
        path = resolve_image(pair.record, image_root)
        image = await loop.run_in_executor(pool, judge.prepare, pair.record, path)
        for _, order, seed in waiting:
            try:
                judgement = await _ask(pair, order, seed, models, image, judge, retries, run)
            except Fault as e:
                run.failures[e.kind] += 1
                continue
            judgements.add(judgement)
            run.asked += 1
            progress()

    try:
        run.stopped = await work_through(pairs, min(judge.concurrency, len(pairs)), one, judgements.path)
    finally:
        pool.shutdown(cancel_futures=True)
        await judge.close()
    return run


async def _ask(
    pair: Pair, order: int, seed: int, models: tuple[str, str], image: Any, judge: Backend, retries: int, run: Run
) -> Judgement:
    """One question to its end. Raises Fault, BackendDown."""
    shown = (order, 1 - order)
    predictions = (pair.predictions[shown[0]], pair.predictions[shown[1]])
    prompt = judge_prompt(predictions[0].text, predictions[1].text)
    rejections: list[str] = []
    verdict = None
    while verdict is None and len(rejections) <= retries:
        number = request_seed(pair.id, f"judge {order} {seed}", len(rejections))
        run.calls += 1
        try:
            verdict = read_verdict(
                await judge.ask(Question("judge", prompt, pair.record, image, (), number, predictions))
            )
        except Malformed as e:
            rejections.append(e.rule)
    return Judgement(
        pair=pair.id,
        order=order,
        seed=seed,
        shown=(models[shown[0]], models[shown[1]]),
        responses=(pair.fingerprints[shown[0]], pair.fingerprints[shown[1]]),
        scores=verdict and verdict.scores,
        preference=verdict and verdict.preference,
        reason=verdict.reason if verdict else "",
        rejections=tuple(rejections),
        judge=judge_name(judge),
        prompt=rubric_hash(),
    )
