"""Handwritten digits with captions: scikit-learn's 8x8 grey digits, enlarged to 32x32 RGB.

Split by index: the last fifth of each class's images is held out, and shown as it is. Training
records show an image of the rest, moved, turned, resized and lit at random.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache
from random import Random
from typing import Any

import numpy as np

from gato.envs.corpora.common import NUMBERS, Split, caption, check_split, missing, stream

COUNTS = {"train": 8_000, "heldout": 364}
SIZE = 32
HELD_OUT = 0.2
"""Share of each class that is held out."""


def records(split: Split, seed: int, count: int | None = None) -> Iterator[dict[str, Any]]:
    """Yield caption records such as "a handwritten seven".

    The held-out split is a fixed list of 364 images: the seed only turns the order round, and a
    larger `count` goes through the list again.
    """
    check_split(split)
    images, labels, numbers = _part(split)
    for k in range(COUNTS[split] if count is None else count):
        rng = stream("digits", split, seed, k)
        i = rng.randrange(len(images)) if split == "train" else (k + seed) % len(images)
        change = _random_change(rng) if split == "train" else {}
        image = draw(images[i], **change)
        yield caption(image, name(labels[i]), digit=int(labels[i]), source=int(numbers[i]))


def name(digit: int) -> str:
    """Return the caption of a digit."""
    return f"a handwritten {NUMBERS[digit]}"


def sample(split: Split, rng: Random) -> tuple[np.ndarray, int]:
    """Return one image of the split and its digit."""
    images, labels, _ = _part(split)
    i = rng.randrange(len(images))
    change = _random_change(rng) if split == "train" else {}
    return draw(images[i], **change), int(labels[i])


def draw(
    digit: np.ndarray,
    angle: float = 0.0,
    scale: float = 1.0,
    shift: tuple[float, float] = (0.0, 0.0),
    light: float = 1.0,
) -> np.ndarray:
    """Return `digit` (8, 8), values 0..16, as uint8 (32, 32, 3), by bilinear sampling.

    Args:
        digit: the image as scikit-learn has it.
        angle: anticlockwise turn about the centre, in radians.
        scale: size of the drawn digit relative to the frame.
        shift: rightward and downward move, in output pixels.
        light: factor on the brightness.
    """
    padded = np.pad(digit.astype(np.float32), 2)
    per_pixel = SIZE / digit.shape[0]
    y, x = np.mgrid[:SIZE, :SIZE].astype(np.float32) - (SIZE - 1) / 2
    x, y = (x - shift[0]) / (scale * per_pixel), (y - shift[1]) / (scale * per_pixel)
    cos, sin = math.cos(angle), math.sin(angle)
    middle, edge = (padded.shape[0] - 1) / 2, padded.shape[0] - 1.001
    column = np.clip(cos * x - sin * y + middle, 0, edge)
    row = np.clip(sin * x + cos * y + middle, 0, edge)
    i, j = row.astype(int), column.astype(int)
    a, b = row - i, column - j
    upper = padded[i, j] * (1 - b) + padded[i, j + 1] * b
    lower = padded[i + 1, j] * (1 - b) + padded[i + 1, j + 1] * b
    grey = (upper * (1 - a) + lower * a) * (255 / 16 * light)
    return np.repeat(np.clip(grey, 0, 255).astype(np.uint8)[..., None], 3, axis=2)


def _random_change(rng: Random) -> dict[str, Any]:
    return {
        "angle": rng.uniform(-0.17, 0.17),
        "scale": rng.uniform(0.9, 1.1),
        "shift": (rng.uniform(-2, 2), rng.uniform(-2, 2)),
        "light": rng.uniform(0.8, 1.15),
    }


@cache
def _part(split: Split) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return images (n, 8, 8), labels (n,) and indices into scikit-learn's list (n,)."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise missing("digits", "scikit-learn", "language") from error
    data = load_digits()
    chosen = []
    for label in range(10):
        of_class = np.flatnonzero(data.target == label)
        cut = len(of_class) - math.ceil(HELD_OUT * len(of_class))
        chosen.append(of_class[:cut] if split == "train" else of_class[cut:])
    numbers = np.sort(np.concatenate(chosen))
    return data.images[numbers], data.target[numbers], numbers
