"""Images cut into cells, which tokens stand for: geometry alone, for those who need no network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from gato.tokenizers.modality import Spec

PATCH = 16
"""Pixels along the side of Gato's cells (Gato section 2.1)."""
LARGE = (32, 64)
"""Sides of the cells that frames of tasks may have instead."""


def stacked(shape: Sequence[int]) -> tuple[int, tuple[int, ...]]:
    """Return how many images an observation of `shape` is, and the shape of one.

    >>> stacked([4, 84, 84]), stacked([96, 96, 3])
    ((4, (84, 84)), (1, (96, 96, 3)))
    """
    one = tuple(shape)
    stack = len(one) == 4 or (len(one) == 3 and one[2] not in (1, 3))
    return (one[0], one[1:]) if stack else (1, one)


def cell_count(spec: Spec, cell: int) -> int:
    """Return how many cells the images of ``spec["shape"]`` have."""
    count, (height, width, *_) = stacked(spec["shape"])
    return count * -(-height // cell) * -(-width // cell)


def cells(values: Any, spec: Spec, key: str, cell: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Return images cut into cells, in raster order, image after image of a stack.

    Args:
        values: uint8 (L, ...) of ``spec["shape"]``.
        spec: ``shape``: (H, W) or (H, W, C) with C 1 or 3, or K such images in a stack.
        key: names the values in errors.
        cell: pixels along a cell's side.

    Returns:
        pixels (L, n, cell, cell, 3), and where each lies: ``grid`` (L, n, 4), its row and column
        and how many of them there are, and ``host_size`` (L, n, 2), the latter two once more.
    """
    raw = np.asarray(values)
    if raw.dtype != np.uint8 or raw.shape[1:] != tuple(spec["shape"]):
        raise ValueError(
            f"{key!r} must be uint8 of shape {spec['shape']}; got {raw.dtype} of shape "
            f"{raw.shape[1:]}"
        )
    length, (count, shape) = len(raw), stacked(spec["shape"])
    pixels = raw.reshape(length * count, *shape[:2], -1)
    if pixels.shape[-1] == 1:
        pixels = np.broadcast_to(pixels, (*pixels.shape[:-1], 3))
    height, width = shape[:2]
    rows, columns = -(-height // cell), -(-width // cell)
    missing = (rows * cell - height, columns * cell - width)
    if any(missing):  # the last row and column of cells are filled up with black
        pixels = np.pad(pixels, ((0, 0), (0, missing[0]), (0, missing[1]), (0, 0)))
    split = pixels.reshape(length * count, rows, cell, columns, cell, 3).swapaxes(2, 3)
    n = rows * columns
    size = np.broadcast_to(np.array([rows, columns], np.int16), (n, 2))
    grid = np.concatenate([np.stack(np.divmod(np.arange(n), columns), 1).astype(np.int16), size], 1)
    place = {
        "grid": np.broadcast_to(np.tile(grid, (count, 1)), (length, count * n, 4)),
        "host_size": np.broadcast_to(size[:1], (length, count * n, 2)),
    }
    return split.reshape(length, count * n, cell, cell, 3), place


def described(grid: np.ndarray, pixels: np.ndarray) -> dict[str, Any]:
    """Return a cell's row and column and its mean colour."""
    row, column = grid[:2].tolist()
    rgb = np.round(pixels.mean((0, 1))).astype(int).tolist()
    return {"row": row, "column": column, "rgb": rgb}
