"""The faces of a list of records: images from disk, and what the frozen vision tower makes of them, computed once."""

import multiprocessing
import os
import signal
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tag.data.images import load_image
from tag.data.records import Record, resolve_image
from tag.errors import DataError

DECODE_THREADS = 4


class Faces:
    """Images and vision tower states by record index.

    The vision tower is frozen, so what it says of a face never changes. It is kept in memory up to `cache_gb` (least
    recently used go first); the projector behind it is cheap and may be trained.

    workers: processes that read, decode and resize the faces announced by `prefetch` while the loop computes; 0 leaves
    it all to `tower`. The pixels are the same. `wait_seconds` is how long `tower` has waited for pixels so far.
    """

    def __init__(
        self,
        records: Sequence[Record],
        image_root: str | os.PathLike,
        vlm,
        cache_gb: float = 4.0,
        workers: int = 0,
    ) -> None:
        self.paths = [resolve_image(record, image_root) for record in records]  # all checked before anything is spent
        self.vlm = vlm
        self.cache_bytes = int(cache_gb * 2**30)
        self.cache: OrderedDict[int, Tensor] = OrderedDict()
        self.used = 0
        self.wait_seconds = 0.0
        self.coming: dict[int, Future] = {}
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
        for i in dict.fromkeys(indices):
            if i not in self.cache and i not in self.coming:
                self.coming[i] = self.pool.submit(_prepare, self.paths[i])

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
        return found

    def _pixels(self, indices: Sequence[int]) -> Tensor:
        ready = {i: self.coming.pop(i) for i in indices if i in self.coming}
        rest = [i for i in indices if i not in ready]
        parts: dict[int, Tensor] = {}
        if rest:
            with ThreadPoolExecutor(DECODE_THREADS) as pool:
                parts = dict(zip(rest, self.vlm.pixel_values(list(pool.map(self.image, rest)))))
        try:
            parts |= {i: torch.from_numpy(future.result()) for i, future in ready.items()}
        except BrokenProcessPool:
            raise DataError("a data worker died, perhaps of too little memory; try --workers 0") from None
        return torch.stack([parts[i] for i in indices])

    def close(self) -> None:
        """End the workers; safe to call twice."""
        if self.pool is not None:
            self.pool.shutdown(wait=True, cancel_futures=True)
            self.pool = None


# ---- worker processes -------------------------------------------------------------------------------------------

_image_processor = None  # of a worker


def start_workers(count: int, image_processor) -> ProcessPoolExecutor:
    """`count` processes ready to `_prepare` images.

    Forked where the system can, and at once: before the loop has started threads of its own. They touch neither the
    GPU nor the process group.
    """
    method = "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"
    pool = ProcessPoolExecutor(
        count, multiprocessing.get_context(method), initializer=_start_worker, initargs=(image_processor, os.getpid())
    )
    pool.submit(int).result()
    return pool


def _start_worker(image_processor, parent: int) -> None:
    global _image_processor
    _image_processor = image_processor
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the loop's to handle; it ends the workers
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    """A killed process cannot end its workers: they look whether it is still there."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(0)


def _prepare(path: Path) -> np.ndarray:
    """The patches of one face, (patches, 3 * 2 * 14 * 14) float32."""
    from tag.vlm import pixel_values

    return pixel_values(_image_processor, [load_image(path)])[0].numpy()
