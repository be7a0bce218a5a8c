"""Opening an image file the one way every part must: same orientation, same colours, or boxes land beside the face."""

import io
import os
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from tag.errors import DataError

MAX_PIXELS = 100_000_000  # more is a mistake or an attack; a 100-megapixel RGB image already takes 300 MB


def load_image(path: str | os.PathLike) -> Image.Image:
    """The image as RGB, turned upright by its EXIF flag. Raises DataError, one line naming the file."""
    return decode_image(read_bytes(path), path)


def read_bytes(path: str | os.PathLike) -> bytes:
    """The file's content. Raises DataError naming the file."""
    try:
        return Path(path).read_bytes()
    except OSError as e:
        raise DataError(f"{path}: cannot be read ({e.strerror or e})") from None


def decode_image(data: bytes, name: str | os.PathLike) -> Image.Image:
    """As `load_image`, from bytes already read; `name` is for the message."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.width * image.height > MAX_PIXELS:
                raise DataError(f"{name}: {image.width} x {image.height} pixels is more than an image of a face needs")
            image.load()
            if image.mode.startswith("I;16"):  # 16-bit grey; PIL would clip it at 255, not scale it
                image = image.point(lambda v: v / 256).convert("L")
            return ImageOps.exif_transpose(image).convert("RGB")
    except DataError:
        raise
    except UnidentifiedImageError:
        raise DataError(f"{name}: not an image file (or an empty one)") from None
    except Image.DecompressionBombError:
        raise DataError(f"{name}: far too many pixels for an image of a face") from None
    except Exception as e:  # PIL's decoders raise OSError, SyntaxError, ValueError, struct.error, ... on broken files
        reason = " ".join(str(e).split())[:80] or type(e).__name__
        raise DataError(f"{name}: broken or truncated image ({reason})") from None
