"""Pictures inside requests: data URIs in base64, judged by their headers before they are decoded.

Nothing else is ever read as a picture: no path and no address. What a picture becomes is what a
picture in a file becomes (`gato.rollouts.messages.fitting`), so that it is answered about alike.
"""

from __future__ import annotations

import base64
import binascii
import io
import threading
import warnings
from typing import Any

import numpy as np
from PIL import Image

from gato.envs.readers.pictures import open_image

FORMATS = ("PNG", "JPEG", "WEBP", "GIF")
"""Of an animation, the first frame."""
_MAGIC = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF", b"GIF8")
_SCAN = b"\xff\xda"
"""Where a scan of a JPEG begins; in what is coded, no such bytes stand."""
SCANS, MOST_SCANS = 16, 64
"""Scans of a JPEG that count as one picture's pixels (progressive ones have about ten), and that
it may have: a few bytes are a scan, and each is a pass over all pixels."""
_one_at_a_time = threading.Lock()
"""Decoding takes memory, and silences warnings of damaged files for the whole process."""


class Budget:
    """What the pictures of one request may take together."""

    def __init__(self, images: int, image_bytes: int, pixels: int) -> None:
        self.images, self.image_bytes, self.pixels = images, image_bytes, pixels
        self._left = images

    def picture(self, uri: Any) -> np.ndarray:
        """Return the picture of a data URI, uint8 (H, W, 3), in its own size.

        Raises:
            ValueError: for any other address, and for what is no picture or takes too much.
        """
        if self._left < 1:
            raise ValueError(f"expected at most {self.images} images in a request")
        self._left -= 1
        raw = self._bytes(uri)
        with _one_at_a_time:
            self.pixels -= self._pixels(raw)
            return open_image(raw)

    def _bytes(self, uri: Any) -> bytes:
        if not isinstance(uri, str):
            raise ValueError(f"expected an image as a data URI; got {type(uri).__name__}")
        head, comma, body = uri.partition(",")
        told = head.strip().lower()
        if not (comma and told.startswith("data:image/") and told.endswith(";base64")):
            raise ValueError(
                f"expected an image as a data URI, data:image/png;base64,...; got {uri[:40]!r}. "
                f"Paths and addresses are never opened"
            )
        if len(body) * 3 // 4 > self.image_bytes + 2:
            raise ValueError(f"expected an image of at most {self.image_bytes} bytes")
        try:
            raw = base64.b64decode(body, validate=True)
        except (binascii.Error, ValueError) as error:  # ValueError: not ASCII
            raise ValueError(f"expected an image in base64; {error}") from error
        if not raw.startswith(_MAGIC):
            raise ValueError(f"expected an image of the formats {', '.join(FORMATS)}")
        return raw

    def _pixels(self, raw: bytes) -> int:
        """Return how many pixels the header tells; raises ValueError for more than are left."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                with Image.open(io.BytesIO(raw), formats=FORMATS) as picture:
                    width, height = picture.size
        except Image.DecompressionBombError:
            width, height = self.pixels, 2
        except Exception as error:  # damaged headers end readers in every way there is
            raise ValueError(
                f"expected an image of the formats {', '.join(FORMATS)}; its header is damaged"
            ) from error
        scans = raw.count(_SCAN) if raw.startswith(b"\xff\xd8") else 1
        if scans > MOST_SCANS:
            raise ValueError(f"expected a JPEG of at most {MOST_SCANS} scans; got {scans}")
        cost = width * height * max(-(-scans // SCANS), 1)
        if cost > self.pixels:
            raise ValueError(
                f"expected images of at most {self.pixels} more pixels in this request; got one "
                f"with more. Scale it down"
            )
        return cost
