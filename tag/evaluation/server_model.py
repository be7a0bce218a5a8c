"""A model behind OpenAI-compatible servers (OpenRouter, `vllm serve`), asked about many faces at a time.

What goes wrong on the way is `tag.endpoints`' to survive. A refusal or a cut answer is an answer. A face that no server
answers stays for the next run; one that the servers turn down for good (status 400) is treated as `--missing` says.
"""

import asyncio
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from tag.dist import Dist
from tag.endpoints import BackendDown, Completion, Fault, Servers, canvas_url, image_question
from tag.evaluation.answers import Face
from tag.evaluation.fingerprint import TEMPERATURE, TOP_P
from tag.evaluation.models import Answer, Model
from tag.prompts import TAG_PROMPT

SEED = 0  # sent with every question; many servers take no notice


class ServerModel(Model):
    """Asks until every face has an answer or the servers are gone. The key comes from the environment alone."""

    def __init__(self, args, here: Dist) -> None:
        super().__init__()
        key = os.environ.get(args.key_variable, "")
        self.servers = Servers(args.endpoint, key, args.concurrency, args.timeout, args.tries, args.give_up_after)
        self.image_size, self.price = args.image_size, args.price
        self.request: dict[str, Any] = {
            "model": args.model,
            "temperature": TEMPERATURE,
            "top_p": TOP_P,
            "max_tokens": args.max_new_tokens,
            "seed": SEED,
        }
        for name in args.omit:
            del self.request[name]
        self.request |= {"extra_body": args.request} if args.request else {}
        self.failures: Counter[str] = Counter()
        self.stopped = ""

    def answer(self, faces: Sequence[Face]) -> Iterator[list[tuple[Face, Answer]]]:
        """See `Model.answer`; one face at a time, in the order in which they are answered."""
        with asyncio.Runner() as runner:
            loop, waiting, asked = runner.get_loop(), iter(faces), set()
            try:
                while not self.stopped:
                    while len(asked) < self.servers.concurrency and (face := next(waiting, None)) is not None:
                        asked.add(loop.create_task(self._ask(face)))
                    if not asked:
                        return
                    done, asked = runner.run(_first(asked))
                    for task in done:
                        if (answer := task.result()) is not None:
                            yield [answer]
            finally:
                for task in asked:
                    task.cancel()
                runner.run(self._end(asked))

    def complaint(self) -> str:
        """See `Model.complaint`."""
        kinds = ", ".join(f"{kind} {n}" for kind, n in self.failures.most_common())
        return "; ".join(filter(None, [self.stopped, kinds]))

    async def _ask(self, face: Face) -> tuple[Face, Answer] | None:
        """An answer, or None for a face that got none."""
        try:
            url = await asyncio.to_thread(lambda: canvas_url(face.image(), self.image_size))
            found: Completion = await self.servers.complete(**self.request, messages=image_question(url, TAG_PROMPT))
        except BackendDown as e:
            self.stopped = str(e)
        except Fault as e:
            if e.kind == "bad_request":
                self.turned_down[face.index] = f"turned down by the server ({e})"
            else:
                self.failures[e.kind] += 1
        else:
            return face, self._read(found)
        return None

    def _read(self, found: Completion) -> Answer:
        cost = found.cost
        if cost is None and self.price and None not in (found.prompt_tokens, found.completion_tokens):
            cost = (found.prompt_tokens * self.price[0] + found.completion_tokens * self.price[1]) / 1e6
        return Answer(found.text, found.completion_tokens, found.reason, found.prompt_tokens, cost)

    async def _end(self, tasks: set[asyncio.Task]) -> None:
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.servers.close()


async def _first(tasks: set[asyncio.Task]) -> tuple[set[asyncio.Task], set[asyncio.Task]]:
    return await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
