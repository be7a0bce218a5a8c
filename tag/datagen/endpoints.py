"""The backend that asks models behind OpenAI-compatible servers (`tag.endpoints` does the asking)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tag.boxes import CANVAS_SIZE
from tag.data.images import load_image
from tag.data.records import Record
from tag.datagen.answer import Malformed
from tag.datagen.backends import Backend
from tag.datagen.stages import Request
from tag.endpoints import Servers, canvas_url, image_question


class EndpointBackend(Backend):
    """See `tag.endpoints.Servers`; a question that a server gives up stays for the next run."""

    name = "openai"

    def __init__(
        self,
        urls: Sequence[str],
        model: str,
        key: str = "",
        concurrency: int = 128,
        timeout: float = 120.0,
        tries: int = 8,
        give_up_after: float = 300.0,
        temperature: float = 0.7,
        max_tokens: int = 512,
        json_mode: bool = False,
        image_size: int = CANVAS_SIZE,
    ) -> None:
        self.servers = Servers(urls, key, concurrency, timeout, tries, give_up_after)
        self.concurrency = self.servers.concurrency
        self.model, self.temperature, self.max_tokens = model, temperature, max_tokens
        self.json_mode, self.image_size = json_mode, image_size

    @property
    def info(self) -> dict[str, Any]:
        """Model and sampling; not the addresses, which may change between runs of one build."""
        names = ("model", "temperature", "max_tokens", "json_mode", "image_size")
        return {name: getattr(self, name) for name in names}

    def prepare(self, record: Record, path: Path) -> str:
        """The image on the canvas, as a data URL."""
        return canvas_url(load_image(path), self.image_size)

    async def ask(self, request: Request) -> str:
        """See `Backend.ask`."""
        extra = {"response_format": {"type": "json_object"}} if self.json_mode else {}
        answer = await self.servers.complete(
            model=self.model,
            messages=image_question(request.image, request.prompt),
            temperature=self.temperature,
            max_tokens=self.max_tokens,
            seed=request.seed,
            **extra,
        )
        if answer.reason != "stop":
            raise Malformed("refused" if answer.reason == "refused" else "cut_off")
        return answer.text

    def stats(self) -> dict[str, Any]:
        """Answers and faults of each server."""
        return self.servers.stats()

    async def close(self) -> None:
        """Close the connections."""
        await self.servers.close()
