"""Asking a vision-language model in this process, through our own rollout engine: no server needed.

Questions that wait together are sampled together. The face goes in as in training: letterboxed, 224 x 224 pixels.
"""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from tag.data.images import load_image
from tag.data.records import Record
from tag.datagen.answer import Malformed
from tag.datagen.backends import Backend, BackendDown
from tag.datagen.stages import Request
from tag.lora import load_adapter
from tag.rollout import RolloutEngine
from tag.vlm import load_vlm

GATHER_SECONDS = 0.02  # how long a batch that is not full waits for more questions


class LocalBackend(Backend):
    """model: as `--model` of the training scripts. adapter: a folder of ours or PEFT's, or None for the bare model."""

    name = "local"

    def __init__(
        self,
        model: str,
        adapter: str | None = None,
        batch_size: int = 64,
        temperature: float = 0.7,
        max_tokens: int = 512,
        dtype: str = "bfloat16",
        device: str = "cpu",
    ) -> None:
        self.model, self.adapter, self.dtype = model, adapter, dtype
        self.temperature, self.max_tokens = temperature, max_tokens
        self.concurrency = 2 * batch_size  # one batch under way, one being prepared
        self.vlm = load_vlm(model, dtype, device)
        if adapter is not None:
            load_adapter(self.vlm.hf_model, adapter, "policy")
        self.engine = RolloutEngine(self.vlm, max_rows=batch_size, max_new_tokens=max_tokens)
        self.engine.refresh("policy" if adapter is not None else None)
        self._batch_size = batch_size
        self._waiting: asyncio.Queue[tuple[Request, asyncio.Future[str]]] = asyncio.Queue()
        self._sampler: asyncio.Task | None = None
        self._thread = ThreadPoolExecutor(1)  # one batch at a time
        self._batches = self._answers = 0

    @property
    def info(self) -> dict[str, Any]:
        """Model, adapter and sampling."""
        names = ("model", "adapter", "dtype", "temperature", "max_tokens")
        return {name: getattr(self, name) for name in names}

    def prepare(self, record: Record, path: Path) -> Image.Image:
        """The image."""
        return load_image(path)

    async def ask(self, request: Request) -> str:
        """See `Backend.ask`."""
        if self._sampler is None:
            self._sampler = asyncio.create_task(self._sample_forever())
        future: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._waiting.put_nowait((request, future))
        return await future

    def stats(self) -> dict[str, Any]:
        """Batches sampled and answers given."""
        return {"batches": self._batches, "answers": self._answers}

    async def close(self) -> None:
        """Stop sampling."""
        if self._sampler is not None:
            self._sampler.cancel()
        self._thread.shutdown(cancel_futures=True)

    async def _sample_forever(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            batch = [await self._waiting.get()]
            deadline = loop.time() + GATHER_SECONDS
            while len(batch) < self._batch_size and (left := deadline - loop.time()) > 0:
                try:
                    batch.append(await asyncio.wait_for(self._waiting.get(), left))
                except TimeoutError:
                    break
            try:
                answers = await loop.run_in_executor(self._thread, self._answer, [request for request, _ in batch])
            except (ValueError, RuntimeError, FloatingPointError) as e:  # prompt too long, out of memory, NaN
                answers = [BackendDown(f"{self.model}: {' '.join(str(e).split())[:200]}")] * len(batch)
            self._batches += 1
            self._answers += len(batch)
            for (_, future), answer in zip(batch, answers, strict=True):
                if not future.done():  # its face may have been cancelled
                    (future.set_exception if isinstance(answer, Exception) else future.set_result)(answer)

    @torch.no_grad()
    def _answer(self, requests: list[Request]) -> list[str | Malformed]:
        """One completion a request, in order."""
        features = self.vlm.project(self.vlm.encode([request.image for request in requests]))  # (B, K, H)
        prompts = [replace(self.vlm.prompt(r.prompt), image_features=f) for r, f in zip(requests, features)]
        rollouts = self.engine.generate(
            prompts, 1, seeds=[request.seed for request in requests], temperature=self.temperature
        )
        return [Malformed("cut_off") if r.finish_reason == "length" else r.text for r in rollouts]
