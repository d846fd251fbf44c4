"""Single shapes of one colour on a dark ground, 32x32, with captions such as "a red circle".

Each colour lacks one shape in training, and each shape one colour: eight of the 64 pairs are never
shown or named there (`UNSEEN`), though their words are. Half of the held-out records show them, and
half show the other pairs, drawn anew; ``meta["unseen"]`` tells which. Place, size, turn, shade and
ground differ from picture to picture.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

import numpy as np

from gato.envs.corpora.common import Split, caption, check_split, stream

COUNTS = {"train": 8_000, "heldout": 512}
SIZE = 32
REACH = 1.12
"""How far any shape reaches along an axis, turned as `draw` turns it, its radius being 1."""
FINE = 2
"""Points along a side of a pixel that are looked at."""
COLOURS = {
    "red": (225, 35, 35),
    "green": (40, 180, 50),
    "blue": (45, 75, 235),
    "yellow": (240, 220, 40),
    "purple": (165, 50, 205),
    "orange": (245, 130, 20),
    "white": (240, 240, 240),
    "cyan": (40, 215, 225),
}
Inside = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Whether points lie in a shape, x to the right and y down, its radius being 1."""
SHAPES: dict[str, Inside] = {
    "circle": lambda x, y: x**2 + y**2 < 1,
    "square": lambda x, y: np.maximum(abs(x), abs(y)) < 0.85,
    "triangle": lambda x, y: (y < 0.75) & (abs(x) < 0.55 * (y + 1)),
    "diamond": lambda x, y: abs(x) + abs(y) < 1.1,
    "cross": lambda x, y: (np.minimum(abs(x), abs(y)) < 0.28) & (np.maximum(abs(x), abs(y)) < 1),
    "ring": lambda x, y: abs(np.hypot(x, y) - 0.8) < 0.2,
    "star": lambda x, y: np.hypot(x, y) < 0.4 + 0.7 * abs(np.cos(2.5 * np.arctan2(x, -y))) ** 2.5,
    "moon": lambda x, y: (x**2 + y**2 < 1) & ((x - 0.5) ** 2 + y**2 > 0.75),
}
PAIRS = tuple((colour, shape) for colour in COLOURS for shape in SHAPES)
UNSEEN = tuple(zip(COLOURS, (*list(SHAPES)[3:], *list(SHAPES)[:3]), strict=True))
"""What training never shows: the k-th colour with the shape three further, in a circle."""
SEEN = tuple(pair for pair in PAIRS if pair not in UNSEEN)


def records(split: Split, seed: int, count: int | None = None) -> Iterator[dict[str, Any]]:
    """Yield caption records; of the held-out ones every second shows an unseen pair."""
    check_split(split)
    for k in range(COUNTS[split] if count is None else count):
        rng = stream("shapes", split, seed, k)
        unseen = split == "heldout" and k % 2 == 0
        colour, shape = rng.choice(UNSEEN if unseen else SEEN)
        yield caption(draw(colour, shape, rng), name(colour, shape), unseen=unseen)


def name(colour: str, shape: str) -> str:
    """Return the caption of a pair.

    >>> name("orange", "ring")
    'an orange ring'
    """
    return f"{'an' if colour[0] in 'aeiou' else 'a'} {colour} {shape}"


def draw(colour: str, shape: str, rng: Random) -> np.ndarray:
    """Return a picture of a shape somewhere, uint8 (32, 32, 3)."""
    radius = rng.uniform(8.5, 13.0)
    reach = SIZE / 2 - 1.0 - REACH * radius
    x0, y0 = rng.uniform(-reach, reach), rng.uniform(-reach, reach)
    angle = rng.uniform(-0.2, 0.2)
    light = rng.uniform(0.8, 1.0)
    ground = np.array([rng.uniform(0.0, 70.0) for _ in range(3)])
    places = (np.arange(SIZE * FINE) + 0.5) / FINE - SIZE / 2
    x, y = (places[None, :] - x0) / radius, (places[:, None] - y0) / radius
    cos, sin = math.cos(angle), math.sin(angle)
    inside = SHAPES[shape](cos * x + sin * y, cos * y - sin * x)
    cover = inside.reshape(SIZE, FINE, SIZE, FINE).mean((1, 3))[..., None]
    picture = cover * light * np.array(COLOURS[colour]) + (1 - cover) * ground
    return np.round(picture).astype(np.uint8)
