"""Pictures that cost more than they look, as bytes."""

from __future__ import annotations

import base64
import io
import struct
import zlib

import numpy as np
from PIL import Image


def data_uri(form: str, raw: bytes) -> str:
    """Return a picture as requests hold it."""
    return f"data:image/{form};base64,{base64.b64encode(raw).decode()}"


def stored(pixels: np.ndarray, form: str, **options: bool) -> bytes:
    """Return a picture as a file of a format."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, form, **options)
    return file.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    """Return a part of a PNG."""
    return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")


def told_size(width: int, height: int, notes: int = 0) -> bytes:
    """Return a small PNG that says it is huge, with so many bytes of text, all alike."""
    size = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    raw = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size + b"\x08\x02\0\0\0")
    if notes:
        raw += chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(notes)))
    return raw + chunk(b"IDAT", zlib.compress(bytes(100_000))) + chunk(b"IEND", b"")


def progressive(pixels: np.ndarray, scans: int) -> bytes:
    """Return a progressive JPEG whose last scan is there so many times more."""
    raw = stored(pixels, "jpeg", progressive=True)
    return raw[:-2] + raw[raw.rindex(b"\xff\xda") : -2] * scans + raw[-2:]


def noted_png(tags: int, size: int) -> bytes:
    """Return a PNG with so many tags of EXIF, all of the same bytes."""
    raw = stored(np.zeros((16, 16), np.uint8), "png")
    at, after = raw.index(b"IDAT") - 4, 8 + 2 + 12 * tags + 4
    exif = b"II*\0" + struct.pack("<IH", 8, tags)
    exif += b"".join(struct.pack("<HHII", 1000 + i, 7, size, after) for i in range(tags))
    return raw[:at] + chunk(b"eXIf", exif + bytes(4 + size)) + raw[at:]


def noted_gif(parts: int) -> bytes:
    """Return a GIF with a comment in so many parts."""
    file = io.BytesIO()
    Image.new("P", (16, 16)).save(file, "gif")
    raw = file.getvalue()
    at = raw.index(b",", 13 + 3 * (2 << (raw[10] & 7)))
    return raw[:at] + b"!\xfe" + (b"\xff" + b"x" * 255) * parts + b"\0" + raw[at:]
