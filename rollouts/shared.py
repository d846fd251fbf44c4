"""Observations that go from worker processes to this one through memory which both see.

    a worker   put(slot, observation) -> the same with a `There` for each array   -> its pipe
    this one   get(what came)         -> the observation, arrays copied out

Every slot has room for one observation, sized from the spaces of what it may play. That is enough:
a worker writes anew only when it is asked for the next step, and by then the last was copied. What
has no fixed shape or finds no room (words, integers, an array larger than its space says) stays as
it is and travels as a message. A pipe holds little more than one frame, so that without this a
worker with more of them would wait until the model has read.

The memory has no name that could be left behind: it is gone with the last process that holds it,
however that ends.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping
from multiprocessing import get_context
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np

from gato.envs.episode import flatten_space

MOST = 2**28
"""Bytes of all slots together; those after that have no room."""
ALIGNED = 64
"""Arrays begin at multiples of so many bytes."""
KINDS = "biuf"
"""Of dtypes, those whose bytes say it all."""


class There(NamedTuple):
    """Stands for an array."""

    at: int
    shape: tuple[int, ...]
    dtype: str


def room(spaces: Iterable[gym.Space]) -> int:
    """Return the bytes that an observation of any of these spaces takes at most.

    >>> room([gym.spaces.Box(0, 255, (210, 160, 3), np.uint8), gym.spaces.Text(9)])
    100800
    """
    return max((_bytes(space) for space in spaces), default=0)


def _bytes(space: gym.Space) -> int:
    leaves = flatten_space(space, "observation").values()
    return sum(
        _aligned(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize)
        for leaf in leaves
        if leaf.shape and leaf.dtype is not None and np.dtype(leaf.dtype).kind in KINDS
    )


def _aligned(size: int) -> int:
    return -(-size // ALIGNED) * ALIGNED


class SharedMemory:
    """Room for one observation per slot; a worker process is given it as it is started."""

    def __init__(self, rooms: Mapping[Hashable, int]) -> None:
        """Allocate so many bytes for each slot, `MOST` at most."""
        self._spans: dict[Hashable, tuple[int, int]] = {}
        end = 0
        for slot, size in rooms.items():
            if end + size <= MOST:
                self._spans[slot] = end, end + _aligned(size)
                end += _aligned(size)
        self._memory = get_context("spawn").RawArray("B", max(end, 1))

    def put(self, slot: Hashable, observation: Any) -> Any:
        """Write the arrays of a slot's observation; return it with what stands for them."""
        at, end = self._spans.get(slot, (0, 0))

        def write(value: Any) -> Any:
            nonlocal at
            if type(value) is dict:
                return {key: write(part) for key, part in value.items()}
            if type(value) is tuple:
                return tuple(write(part) for part in value)
            if (
                type(value) is not np.ndarray
                or value.dtype.kind not in KINDS
                or not value.ndim
                or at + value.nbytes > end
            ):
                return value
            there = There(at, value.shape, value.dtype.str)
            self._array(there)[...] = value
            at += _aligned(value.nbytes)
            return there

        return write(observation)

    def get(self, observation: Any) -> Any:
        """Return what was put, its arrays copied."""
        if type(observation) is There:
            return self._array(observation).copy()
        if type(observation) is dict:
            return {key: self.get(part) for key, part in observation.items()}
        if type(observation) is tuple:
            return tuple(self.get(part) for part in observation)
        return observation

    def _array(self, there: There) -> np.ndarray:
        return np.ndarray(there.shape, there.dtype, self._memory, there.at)
