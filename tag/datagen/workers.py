"""Many questions under way at a time: one iterator for all workers, so nothing is handed out twice."""

import asyncio
import os
from collections.abc import Awaitable, Callable, Iterable
from typing import TypeVar

from tag.datagen.backends import BackendDown
from tag.errors import DataError

Item = TypeVar("Item")


async def work_through(
    items: Iterable[Item], concurrency: int, one: Callable[[Item], Awaitable[None]], out: str | os.PathLike
) -> str:
    """Await `one(item)` for every item, at most `concurrency` at a time; returns why it ended early, "" if it did not.

    out: where the results go, for the message about a full disk. It ends early, and cleanly, when nobody is left to
    ask, the input has changed under our hands, or the disk is full.
    """
    iterator, stopped = iter(items), ""

    async def worker() -> None:
        for item in iterator:
            await one(item)

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(worker())
    except* (BackendDown, DataError) as e:
        stopped = str(e.exceptions[0])
    except* OSError as e:
        error = e.exceptions[0]
        stopped = f"{error.filename or out}: {error.strerror or error}"
    return stopped
