"""The faces of a list of records: images from disk, and what the frozen vision tower makes of them, computed once."""

import os
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tag.data.images import load_image
from tag.data.records import Record, resolve_image
from tag.data.workers import held_by_worker, start_workers
from tag.errors import DataError

DECODE_THREADS = 4
MAX_DEATHS = 10  # of data workers in one run
BAD_IMAGE = ("stop", "skip")


class Faces:
    """Images and vision tower states by record index.

    The vision tower is frozen, so what it says of a face never changes. It is kept in memory up to `cache_gb` (least
    recently used go first); the projector behind it is cheap and may be trained.

    workers: processes that read, decode and resize the faces announced by `prefetch` while the loop computes; 0 leaves
    it all to `tower`. The pixels are the same. `wait_seconds` is how long `tower` has waited for pixels so far.
    on_bad_image: what `readable` does about an image that cannot be read. tell(kind, text, ...): called with each fault
    that is survived.
    """

    def __init__(
        self,
        records: Sequence[Record],
        image_root: str | os.PathLike,
        vlm,
        cache_gb: float = 4.0,
        workers: int = 0,
        on_bad_image: str = "stop",
    ) -> None:
        self.paths = [resolve_image(record, image_root) for record in records]  # all checked before anything is spent
        self.ids = [record.id for record in records]
        self.vlm = vlm
        self.on_bad_image = on_bad_image
        self.bad: dict[int, str] = {}  # what is wrong with the images that cannot be read
        self.tell: Callable[..., object] = lambda *args, **facts: None
        self.deaths = 0  # of worker processes
        self.cache_bytes = int(cache_gb * 2**30)
        self.cache: OrderedDict[int, Tensor] = OrderedDict()
        self.used = 0
        self.wait_seconds = 0.0
        self.coming: dict[int, Future] = {}
        self.pixels: dict[int, Tensor] = {}  # read by `readable`, not yet encoded
        self.workers = workers
        self.pool = start_workers(workers, vlm.image_processor) if workers else None

    def __len__(self) -> int:
        return len(self.paths)

    def image(self, index: int) -> Image.Image:
        """The photograph as it is, RGB. Raises DataError naming a broken file."""
        return load_image(self.paths[index])

    def prefetch(self, indices: Sequence[int]) -> None:
        """Have the workers prepare what `tower` will have to encode of `indices`; it need not be asked for."""
        if self.pool is None:
            return
        wanted = [
            i for i in dict.fromkeys(indices) if i not in self.cache and i not in self.coming and i not in self.bad
        ]
        try:
            self.coming |= {i: self.pool.submit(_prepare, self.paths[i]) for i in wanted}
        except BrokenProcessPool:
            self._replace_workers()
            self.coming |= {i: self.pool.submit(_prepare, self.paths[i]) for i in wanted}

    def readable(self, indices: Sequence[int]) -> list[int]:
        """The same indices, those of images that cannot be read replaced by the nearest later ones that can.

        A function of the files alone, so all ranks and a resumed run get the same. With on_bad_image "stop" nothing is
        looked at, and `tower` raises DataError at the first bad one. So does this if no image is left.
        """
        if self.on_bad_image == "stop":
            return list(indices)
        started = time.perf_counter()
        try:  # all at once, if all are sound
            new = [i for i in dict.fromkeys(indices) if i not in self.cache and i not in self.bad]
            self.pixels |= dict(zip(new, self._pixels(new))) if new else {}
        except DataError:
            pass
        chosen = []
        for i in indices:
            tried = i
            while not self._can_read(tried):
                tried = (tried + 1) % len(self.paths)
                if tried == i:
                    raise DataError(f"none of the {len(self.paths)} images can be read, the first: {self.bad[0]}")
            if tried != i:
                self.tell("bad_image", self.bad[i], sample=self.ids[i], instead=self.ids[tried])
            chosen.append(tried)
        self.wait_seconds += time.perf_counter() - started
        return chosen

    def batch(self, indices: Sequence[int], ahead: Sequence[int] = ()) -> tuple[list[int], Tensor, float]:
        """The faces of a step: `readable` indices, their `tower` states, and the seconds that the loop has waited for
        images. Those of `ahead`, the next step's, are prepared meanwhile."""
        waited = self.wait_seconds
        chosen = self.readable(indices)
        tower = self.tower(chosen)
        self.prefetch(ahead)
        return chosen, tower, self.wait_seconds - waited

    def _can_read(self, index: int) -> bool:
        if index not in self.bad and index not in self.cache and index not in self.pixels:
            try:
                self.pixels[index] = self._pixels([index])[0]
            except DataError as e:
                self.bad[index] = str(e)
        return index not in self.bad

    def tower(self, indices: Sequence[int]) -> Tensor:
        """Tower states of the faces at `indices`, (B, patches, D), on the device."""
        missing = [i for i in dict.fromkeys(indices) if i not in self.cache]
        fresh: dict[int, Tensor] = {}
        if missing:
            started = time.perf_counter()
            pixels = self._pixels(missing)  # (missing, patches, 3 * 2 * 14 * 14)
            self.wait_seconds += time.perf_counter() - started
            fresh = dict(zip(missing, self.vlm.encode_pixels(pixels)))
        found = torch.stack([fresh[i] if i in fresh else self.cache[i] for i in indices])
        for i in indices:
            if i in self.cache:
                self.cache.move_to_end(i)
        for i, value in fresh.items():
            self.cache[i] = value.clone()
            self.used += value.nbytes
        while self.used > self.cache_bytes and self.cache:
            self.used -= self.cache.popitem(last=False)[1].nbytes
        self.pixels.clear()
        return found

    def _pixels(self, indices: Sequence[int]) -> Tensor:
        parts = {i: self.pixels[i] for i in indices if i in self.pixels}
        ready = [i for i in indices if i in self.coming and i not in parts]
        rest = [i for i in indices if i not in self.coming and i not in parts]
        if rest:
            with ThreadPoolExecutor(DECODE_THREADS) as pool:
                parts |= dict(zip(rest, self.vlm.pixel_values(list(pool.map(self.image, rest)))))
        parts |= {i: self._prepared(i) for i in ready}
        return torch.stack([parts[i] for i in indices])

    def _prepared(self, index: int) -> Tensor:
        """What a worker has made of an image. Workers that died are replaced, and all they had not delivered is asked
        for again; an image that kills the next one as well, alone in it, is a bad image."""
        try:
            return torch.from_numpy(self.coming.pop(index).result())
        except BrokenProcessPool:
            pass
        lost = self._replace_workers(then=False)
        try:
            return torch.from_numpy(self.pool.submit(_prepare, self.paths[index]).result())  # nothing else runs there
        except BrokenProcessPool:
            self._new_pool()
            self.bad[index] = f"{self.paths[index]}: the process that reads it dies"  # never to be tried in this one
            raise DataError(self.bad[index]) from None
        finally:
            self.coming |= {i: self.pool.submit(_prepare, self.paths[i]) for i in lost}

    def _replace_workers(self, then: bool = True) -> list[int]:
        """New workers; `then` all that the dead ones had not delivered is asked for again. The indices of that."""
        lost = [i for i, f in self.coming.items() if not (f.done() and f.exception() is None)]
        self.deaths += 1
        if self.deaths > MAX_DEATHS:
            raise DataError(f"data workers died {self.deaths} times, perhaps of too little memory; try --workers 0")
        self.tell("data_worker", f"a data worker died, others take its place ({len(lost)} images asked for again)")
        self._new_pool()
        if then:
            self.coming |= {i: self.pool.submit(_prepare, self.paths[i]) for i in lost}
        return lost

    def _new_pool(self) -> None:
        self.pool.shutdown(wait=True, cancel_futures=True)
        self.pool = start_workers(self.workers, self.vlm.image_processor, "spawn")  # not forked: there are threads now

    def close(self) -> None:
        """End the workers; safe to call twice."""
        if self.pool is not None:
            self.pool.shutdown(wait=True, cancel_futures=True)
            self.pool = None


# ---- in a worker ------------------------------------------------------------------------------------------------


def _prepare(path: Path) -> np.ndarray:
    """The patches of one face, (patches, 3 * 2 * 14 * 14) float32."""
    from tag.vlm import pixel_values

    return pixel_values(held_by_worker(), [load_image(path)])[0].numpy()
