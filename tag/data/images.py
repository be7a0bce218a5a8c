"""Opening an image file the one way every part must: same orientation, same colours, or boxes land beside the face."""

import io
import os
from functools import lru_cache
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from tag.errors import DataError

# More is a mistake or an attack. Of the square an image is put on, too: a strip of 1 x 1,000,000 pixels is a small file
# whose square has a trillion. A 100-megapixel RGB image takes 300 MB.
MAX_PIXELS = 100_000_000
MAX_BYTES = 256 << 20  # of a file
# What photographs come in. PIL knows forty more formats, among them one that starts another program (EPS).
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")


def inside(root: str | os.PathLike, name: str) -> Path | None:
    """The file `name` under `root`, links followed; None if that leads out of `root` (`..`, a link, an absolute path).

    Raises OSError or ValueError for what is no path at all: a name too long, a null byte, a loop of links.
    """
    try:
        root = _resolved(os.path.abspath(root))
    except FileNotFoundError:  # not there (yet): nothing to remember
        root = Path(root).resolve()
    try:
        path = (root / name).resolve()
    except RuntimeError as e:  # what Python before 3.13 makes of a loop
        raise OSError(str(e)) from None
    return path if path.is_relative_to(root) else None


@lru_cache(maxsize=64)
def _resolved(root: str) -> Path:
    """An existing folder's path, links followed, once a process: half of what a look at an image's path costs.

    A root that is swapped for a link later stays what it was, so no path gets out of it that way.
    """
    return Path(root).resolve(strict=True)


def load_image(path: str | os.PathLike) -> Image.Image:
    """The image as RGB, turned upright by its EXIF flag. Raises DataError, one line naming the file."""
    return decode_image(read_bytes(path), path)


def read_bytes(path: str | os.PathLike) -> bytes:
    """The file's content. Raises DataError naming the file, also when it is larger than any image of a face."""
    try:
        with open(path, "rb") as f:
            data = f.read(MAX_BYTES + 1)
    except OSError as e:
        raise DataError(f"{path}: cannot be read ({e.strerror or e})") from None
    if len(data) > MAX_BYTES:
        raise DataError(f"{path}: more than {MAX_BYTES >> 20} MiB is no image of a face")
    return data


def decode_image(data: bytes, name: str | os.PathLike) -> Image.Image:
    """As `load_image`, from bytes already read; `name` is for the message."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if max(image.size) ** 2 > MAX_PIXELS:
                raise DataError(f"{name}: {image.width} x {image.height} pixels is more than an image of a face needs")
            image.load()
            if image.mode.startswith("I;16"):  # 16-bit grey; PIL would clip it at 255, not scale it
                image = image.point(lambda v: v / 256).convert("L")
            return ImageOps.exif_transpose(image).convert("RGB")
    except DataError:
        raise
    except UnidentifiedImageError:
        raise DataError(f"{name}: not an image file ({', '.join(FORMATS)} are read), or an empty one") from None
    except Image.DecompressionBombError:
        raise DataError(f"{name}: far too many pixels for an image of a face") from None
    except Exception as e:  # PIL's decoders raise OSError, SyntaxError, ValueError, struct.error, ... on broken files
        reason = " ".join(str(e).split())[:80] or type(e).__name__
        raise DataError(f"{name}: broken or truncated image ({reason})") from None
