"""The faces of a list of records: images from disk, and what the frozen vision tower makes of them, computed once."""

import os
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from PIL import Image
from torch import Tensor

from tag.data.images import load_image
from tag.data.records import Record, resolve_image

DECODE_THREADS = 4


class Faces:
    """Images and vision tower states by record index.

    The vision tower is frozen, so what it says of a face never changes. It is kept in memory up to `cache_gb` (least
    recently used go first); the projector behind it is cheap and may be trained.
    """

    def __init__(
        self,
        records: Sequence[Record],
        image_root: str | os.PathLike,
        vlm,
        cache_gb: float = 4.0,
    ) -> None:
        self.paths = [resolve_image(record, image_root) for record in records]  # all checked before anything is spent
        self.vlm = vlm
        self.cache_bytes = int(cache_gb * 2**30)
        self.cache: OrderedDict[int, Tensor] = OrderedDict()
        self.used = 0

    def __len__(self) -> int:
        return len(self.paths)

    def image(self, index: int) -> Image.Image:
        """The photograph as it is, RGB. Raises DataError naming a broken file."""
        return load_image(self.paths[index])

    def tower(self, indices: Sequence[int]) -> Tensor:
        """Tower states of the faces at `indices`, (B, patches, D), on the device."""
        missing = [i for i in dict.fromkeys(indices) if i not in self.cache]
        fresh: dict[int, Tensor] = {}
        if missing:
            with ThreadPoolExecutor(DECODE_THREADS) as pool:
                images = list(pool.map(self.image, missing))
            fresh = dict(zip(missing, self.vlm.encode(images)))
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
