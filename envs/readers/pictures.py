"""Pictures from files and bytes that nobody has checked, as plain arrays.

What becomes of a picture: the first frame of an animation, upright as its EXIF says, transparency
laid over white, grey and CMYK as RGB, 16 bits as 8. Its size is read from its header, so that a
picture of too many pixels costs no memory. Only the formats below are decoded: Pillow knows some
forty more, most of them old and little tested.
"""

from __future__ import annotations

import io
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from gato.envs.readers.reader import MAX_PIXELS, ReadOptions, fit_image

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")
MAX_BYTES = 256 << 20
"""Of one picture as it is stored."""
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
_WHITE = (255, 255, 255, 255)


def open_image(source: bytes | Path) -> np.ndarray:
    """Return the picture in a file or in bytes, uint8 (H, W, 3).

    Raises:
        ValueError: where it cannot be read, with the reason, or has too many pixels.
    """
    if isinstance(source, Path) and not source.is_file():
        raise ValueError(f"no picture at {source}")
    size = source.stat().st_size if isinstance(source, Path) else len(source)
    if size == 0:
        raise ValueError("expected a picture; the file is empty")
    if size > MAX_BYTES:
        raise ValueError(f"expected a picture of at most {MAX_BYTES >> 20} MiB; got {size} bytes")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of damaged EXIF and the like: the pixels count
            return _decode(source)
    except ValueError:
        raise
    except UnidentifiedImageError:
        raise ValueError(f"no picture of the formats {', '.join(_FORMATS)}") from None
    except Image.DecompressionBombError as error:
        pixels = re.search(r"\d+", str(error))  # the limit that Pillow names is its own
        told = f"{pixels.group()} pixels, " if pixels else ""
        raise ValueError(f"a picture of {told}more than {MAX_PIXELS}") from error
    except Exception as error:  # damaged data end decoders in every way there is
        reason = str(error).split(" (")[0] or type(error).__name__  # how much is missing varies
        raise ValueError(f"a damaged picture: {reason}") from error


def read_picture(source: bytes | Path, options: ReadOptions) -> Any:
    """Return a picture as records hold it; raises as `open_image` and `fit_image` do."""
    return fit_image(open_image(source), options.image_size)


def note(options: ReadOptions) -> str:
    """Return what a user should know of how pictures are read."""
    if options.image_size is not None:
        size = "brought to {}x{}".format(*options.image_size)
    else:
        size = "scaled down to 128 on the longer side, both sides to multiples of 16"
    return (
        f"pictures are {size}; upright as EXIF says, transparency over white, first frame of "
        f"animations; of more than {MAX_PIXELS:,} pixels refused"
    )


def _decode(source: bytes | Path) -> np.ndarray:
    file = io.BytesIO(source) if isinstance(source, bytes) else source
    with Image.open(file, formats=_FORMATS) as picture:
        width, height = picture.size
        if width * height > MAX_PIXELS:
            raise ValueError(
                f"a picture of {width}x{height}, more than {MAX_PIXELS} pixels. Scale it down."
            )
        picture.load()
        turned: Image.Image = ImageOps.exif_transpose(picture)
        return np.array(_rgb(turned))


def _rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I"):
        return _from_16_bits(picture)
    if picture.mode == "F":
        raise ValueError("a picture of floating-point numbers: what is white is not said")
    if picture.has_transparency_data:
        layer = picture.convert("RGBA")
        white = Image.new("RGBA", layer.size, _WHITE)
        return Image.alpha_composite(white, layer).convert("RGB")
    return picture.convert("RGB")


def _from_16_bits(picture: Image.Image) -> Image.Image:
    """Return grey numbers of 16 bits in 8; Pillow itself would clip them at 255."""
    grey = np.asarray(picture)
    if grey.min() < 0 or grey.max() > 65535:
        raise ValueError("a picture of 32 bits a pixel: what is white is not said")
    return Image.fromarray((grey >> 8).astype(np.uint8)).convert("RGB")
