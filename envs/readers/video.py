"""Frames of MP4 files by their time, and files of frames; through PyAV."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, Self

import numpy as np

from gato.envs.readers.reader import MAX_PIXELS

CODECS = {
    "h264": {"crf": "18", "preset": "medium"},
    "lossless": {"qp": "0", "preset": "medium"},
}
"""How a video is kept: H.264 with colours at full resolution, or the same in RGB without loss.

Colours at half the resolution, as cameras have them, cost small pictures far more than the codec
does: 200 frames of Boxing, 64x64, come back at 30 dB so, at 39 dB with all colours, in files of the
same size.
"""


def require_av() -> Any:
    """Return PyAV.

    Raises:
        ValueError: where it is missing, naming what to install.
    """
    try:
        import av
    except ImportError as error:
        raise ValueError(
            f"videos need PyAV, which does not import ({error}). Install it: "
            'pip install "gato[video]"'
        ) from error
    return av


def frames_at(path: Path, times: Sequence[float], tolerance: float) -> Iterator[np.ndarray]:
    """Yield the uint8 (H, W, 3) frame nearest to each time, in seconds from the file's start.

    Args:
        path: the video.
        times: in ascending order.
        tolerance: seconds that a frame may lie from its time.

    Raises:
        ValueError: where the file cannot be decoded, or has no frame at one of the times.
    """
    av = require_av()
    try:
        with av.open(str(path)) as container:
            yield from _nearest(path, container, times, tolerance)
    except av.FFmpegError as error:
        raise ValueError(f"expected a video in {path}; {error.strerror or error}.") from error


def _nearest(
    path: Path, container: Any, times: Sequence[float], tolerance: float
) -> Iterator[np.ndarray]:
    if not container.streams.video:
        raise ValueError(f"expected a video in {path}; it has no picture.")
    stream = container.streams.video[0]
    if stream.codec_context is None or not stream.time_base:
        raise ValueError(f"expected a video in {path}; how it is coded is not told.")
    if stream.codec_context.width * stream.codec_context.height > MAX_PIXELS:
        raise ValueError(f"expected frames of at most {MAX_PIXELS:,} pixels in {path}.")
    first = max(0.0, times[0] - tolerance)
    container.seek(int(first / stream.time_base), stream=stream, backward=True)
    frames = (frame for frame in container.decode(stream) if frame.time is not None)
    before, frame = None, next(frames, None)
    for time in times:
        while frame is not None and frame.time < time:
            before, frame = frame, next(frames, None)
        near = min(
            (f for f in (before, frame) if f is not None),
            key=lambda f: abs(f.time - time),
            default=None,
        )
        if near is None or abs(near.time - time) > tolerance:
            found = "none" if near is None else f"the nearest at {near.time:.4f} s"
            raise ValueError(f"expected a frame at {time:.4f} s in {path}; got {found}.")
        yield near.to_ndarray(format="rgb24")


class VideoWriter:
    """Writes frames at a steady rate; every second one can be decoded by itself.

    Args:
        path: a new MP4 file.
        rate: frames per second.
        codec: of `CODECS`.
        shape: (H, W) of the frames.
    """

    def __init__(self, path: Path, rate: Fraction, codec: str, shape: Sequence[int]) -> None:
        av = require_av()
        self.path, self.frames = path, 0
        self._rate, self._av = rate, av
        path.parent.mkdir(parents=True, exist_ok=True)
        self._container = av.open(str(path), "w", format="mp4")
        name = "libx264" if codec == "h264" else "libx264rgb"
        # frames that depend on the one before only: to read one costs at most two
        options = {**CODECS[codec], "g": "2", "bf": "0", "threads": "1"}
        self._stream = self._container.add_stream(name, rate=rate, options=options)
        self._stream.height, self._stream.width = shape[:2]
        self._stream.time_base = 1 / rate
        self.format = "rgb24" if codec == "lossless" else "yuv444p"
        self._stream.pix_fmt = self.format

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def append(self, frame: np.ndarray, *, starts: bool = False) -> None:
        """Add a uint8 (H, W, 3) frame.

        Args:
            frame: the picture.
            starts: whether it can be decoded without those before it.
        """
        av = self._av
        picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
        picture.pts, picture.time_base = self.frames, 1 / self._rate
        if starts:
            picture.pict_type = av.video.frame.PictureType.I
        self._container.mux(self._stream.encode(picture))
        self.frames += 1

    def close(self) -> None:
        """Write what is pending."""
        if self._container is not None:
            container, self._container = self._container, None
            try:
                container.mux(self._stream.encode())
            finally:
                container.close()
