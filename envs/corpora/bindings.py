"""Words that mean something for one record only: two made-up words, bound to two digits anew.

    [a three] dako   [a seven] vilu   [a seven] vilu   [a three] dako   ...   [a seven] ?

Which word stands for which digit is drawn for every record, so nothing but the record itself tells
(few-shot learning in context, after Flamingo, Alayrac et al. 2022; the randomly bound names are of
Tsimpoukelli et al. 2021, arXiv 2106.13884). Digits are those of `digits`, split as there; drawn at
16 x 16 they are one token each.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from random import Random
from typing import Any

import numpy as np

from gato.envs.corpora import digits
from gato.envs.corpora.common import NUMBERS, Split, check_split, pairs, stream

COUNTS = {"train": 40_000, "heldout": 400}
SHOTS = 8
"""Pairs before the last one."""
SIZE = 16
VARIANTS = 8
"""Drawings of each image in training, each moved, turned, resized and lit differently."""
WORDS = ("dako", "vilu")
"""Always the same two: with eight or more to choose among, a model learns for long to repeat words
it has just read instead of looking at what stood before them."""
NAMED = 0.2
"""Share of training records whose words are the digits' own names, for the sake of the eye: what
looks alike is then soon the same, which bound words alone teach slowly."""
REPEATED = 0.2
"""Share of training records that show one picture of each digit again and again: to look back for
the same picture is learnt sooner than for the same digit."""


def records(split: Split, seed: int, count: int | None = None) -> Iterator[dict[str, Any]]:
    """Yield records of `SHOTS` + 1 pairs of a picture and its word.

    In training each picture's digit is drawn on its own from the second or third on, so that no
    order gives a word away. Held out, every two pairs show both digits, so that each number of
    shots is as good as it can be.
    """
    check_split(split)
    for k in range(COUNTS[split] if count is None else count):
        rng = stream("bindings", split, seed, k)
        chosen, names = rng.sample(range(10), 2), rng.sample(WORDS, 2)
        kind = rng.random() if split == "train" else 1.0
        if kind < NAMED:
            names = [NUMBERS[digit] for digit in chosen]
        shown = [rng.randrange(2) for _ in range(SHOTS + 1)]
        for i in range(1, SHOTS if split == "heldout" else 1 + rng.randrange(2), 2):
            shown[i] = 1 - shown[i - 1]
        drawn = [(_picture(split, chosen[which], rng), names[which]) for which in shown]
        if NAMED <= kind < NAMED + REPEATED:
            drawn = [drawn[shown.index(which)] for which in shown]
        yield pairs(drawn, digits=chosen, words=names)


def _picture(split: Split, digit: int, rng: Random) -> np.ndarray:
    """Return one of the split's pictures of a digit."""
    _, labels, _ = digits._part(split)
    of_digit = np.flatnonzero(labels == digit)
    i = int(of_digit[rng.randrange(len(of_digit))])
    return _drawn(split, i, rng.randrange(VARIANTS) if split == "train" else 0)


@cache
def _drawn(split: Split, i: int, variant: int) -> np.ndarray:
    change = (
        digits._random_change(stream("bindings", split, i, variant)) if split == "train" else {}
    )
    large = digits.draw(digits._part(split)[0][i], **change)
    side = digits.SIZE // SIZE
    blocks = large.reshape(SIZE, side, SIZE, side, 3).mean((1, 3))
    return blocks.round().astype(np.uint8)
