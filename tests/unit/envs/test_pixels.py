"""Pictures made smaller are the exact means of areas."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from gato.envs.atari import HEIGHT, WIDTH
from gato.envs.pixels import shrink


def small_by_hand(frame, height, width):
    """Area average in exact rational arithmetic, pixel by pixel: the slow twin of `shrink`."""
    tall, wide, channels = frame.shape
    result = np.zeros((height, width, channels), np.uint8)
    for i, j, c in np.ndindex(height, width, channels):
        top, bottom = Fraction(i * tall, height), Fraction((i + 1) * tall, height)
        left, right = Fraction(j * wide, width), Fraction((j + 1) * wide, width)
        total = sum(
            int(frame[y, x, c])
            * (min(bottom, y + 1) - max(top, y))
            * (min(right, x + 1) - max(left, x))
            for y in range(int(top), -(-bottom // 1))
            for x in range(int(left), -(-right // 1))
        )
        mean = total / ((bottom - top) * (right - left))
        result[i, j, c] = int(mean + Fraction(1, 2))
    return result


@pytest.mark.parametrize("size", [(9, 7, 3, 2), (8, 8, 4, 4), (5, 6, 5, 6), (21, 16, 8, 5)])
def test_shrink_equals_its_slow_twin(size):
    tall, wide, height, width = size
    frame = np.random.default_rng(0).integers(0, 256, (tall, wide, 3), np.uint8)
    assert np.array_equal(shrink(frame, height, width), small_by_hand(frame, height, width))


@pytest.mark.parametrize("value", [0, 1, 127, 254, 255])
@pytest.mark.parametrize("tall", [210, 214, 220, 230, 250])
def test_shrink_keeps_a_plain_frame(tall, value):
    frame = np.full((tall, 160, 3), value, np.uint8)
    assert (shrink(frame, HEIGHT, WIDTH) == value).all()
