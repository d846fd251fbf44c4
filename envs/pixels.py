"""Pictures at another size, the same bytes on every machine."""

from __future__ import annotations

from functools import cache

import numpy as np


def shrink(frame: np.ndarray, height: int, width: int) -> np.ndarray:
    """Return `frame` (uint8 RGB) at another size, each pixel the mean of the area it covers.

    Convention: rounded half up, exactly, in integers; the same bytes on every machine.
    """
    tall = _sum_overlaps(frame, height, 0, np.uint16)  # (height, W, 3)
    small = _sum_overlaps(tall, width, 1, np.uint32)  # (height, width, 3)
    area = _area(frame.shape[0], height) * _area(frame.shape[1], width)
    return ((small + area // 2) // area).astype(np.uint8)


def _sum_overlaps(lines: np.ndarray, parts: int, axis: int, dtype: type) -> np.ndarray:
    """Return sums of `lines` over `parts` equal intervals of an axis, by overlap, as `dtype`."""
    assert 255 * _area(lines.shape[axis], parts) <= np.iinfo(dtype).max, (lines.shape, parts)
    shape = (-1, 1, 1) if axis == 0 else (1, -1, 1)
    total: np.ndarray | None = None
    for weights, at in _overlaps(lines.shape[axis], parts):
        part = np.multiply(lines.take(at, axis), weights.astype(dtype).reshape(shape), dtype=dtype)
        total = part if total is None else np.add(total, part, out=total)
    assert total is not None
    return total


def _area(size: int, parts: int) -> np.uint32:
    """Return the length of one of `parts` intervals in the unit of `_overlaps`."""
    return np.uint32(size // np.gcd(size, parts))


@cache
def _overlaps(size: int, parts: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return pairs (weights, lines): the k-th line that each interval covers, and by how much.

    The unit of length divides both a line and an interval, so that all overlaps are integers.
    """
    unit = np.gcd(size, parts)
    line, part = parts // unit, size // unit
    start = np.arange(parts) * part
    first, last = start // line, (start + part - 1) // line
    taps = []
    for k in range(int((last - first).max()) + 1):
        at = first + k
        overlap = np.minimum((at + 1) * line, start + part) - np.maximum(at * line, start)
        taps.append((np.maximum(overlap, 0).astype(np.uint32), np.minimum(at, size - 1)))
    return taps
