"""Discrete values: integers in [0, 1024), larger ranges in base-1024 digits, high digit first."""

from __future__ import annotations

from typing import Any

import numpy as np

from gato.tokenizers.modality import Modality, Segment, Spec, register

BASE = 1024


@register
class Discrete(Modality):
    """Integers; a tensor of them is written row-major (Gato section 2.1).

    Spec: ``shape``, ``sizes`` (values per entry, row-major) and ``start``
    (the lowest value, of all entries or of each).
    """

    name = "discrete"

    def __init__(self) -> None:
        self.vocabulary = BASE

    def count(self, spec: Spec) -> int:
        return sum(digits(n) for n in spec["sizes"])

    def encode(self, values: Any, spec: Spec, key: str = "value") -> Segment:
        sizes = np.array(spec["sizes"], np.int64)
        raw = np.asarray(values)
        flat = raw.reshape(len(raw), -1)
        if flat.shape[1] != len(sizes) or not (
            np.issubdtype(flat.dtype, np.integer) or flat.dtype == bool
        ):
            raise ValueError(
                f"{key!r} must hold {len(sizes)} integers; got {raw.dtype} of shape {raw.shape[1:]}"
            )
        start = np.broadcast_to(np.array(spec["start"], np.int64), sizes.shape)
        flat = flat.astype(np.int64) - start
        wrong = (flat < 0) | (flat >= sizes)
        if wrong.any():
            step, entry = (int(i) for i in np.argwhere(wrong)[0])
            low, high = int(start[entry]), int(start[entry] + sizes[entry]) - 1
            raise ValueError(
                f"{key!r} must be in [{low}, {high}]; got {int(flat[step, entry]) + low} at entry "
                f"{entry}. Check that the data and the task's space agree."
            )
        if (sizes <= BASE).all():
            return Segment(flat.astype(np.int32))
        columns = [
            flat[:, i] // BASE**power % BASE
            for i, size in enumerate(sizes)
            for power in reversed(range(digits(int(size))))
        ]
        return Segment(np.stack(columns, 1).astype(np.int32))

    def decode(self, ids: np.ndarray, spec: Spec) -> Any:
        values, at = [], 0
        for size in spec["sizes"]:
            value = 0
            for _ in range(digits(size)):
                value = value * BASE + int(ids[at])
                at += 1
            values.append(min(value, size - 1))
        array = (np.array(values, np.int64) + spec["start"]).reshape(spec["shape"])
        return array if spec["shape"] else array[()]

    def allowed(self, prefix: np.ndarray, spec: Spec) -> tuple[int, int] | None:
        at = 0
        for size in spec["sizes"]:
            n = digits(size)
            if len(prefix) < at + n:
                return 0, self._bound(size, n, prefix[at:])
            at += n
        return None

    def ranges(self, spec: Spec) -> list[tuple[int, int]] | None:
        if max(spec["sizes"], default=0) > BASE:
            return None  # the low digits of the largest value depend on the high ones
        return [(0, size) for size in spec["sizes"]]

    def _bound(self, size: int, n: int, written: np.ndarray) -> int:
        """Return one more than the largest next digit that keeps the number below `size`."""
        last = [(size - 1) // BASE**p % BASE for p in reversed(range(n))]
        tight = all(int(w) == top for w, top in zip(written, last, strict=False))
        return last[len(written)] + 1 if tight else BASE

    def example(self, rng: np.random.Generator) -> tuple[Any, Spec]:
        spec = {"shape": [2], "sizes": [5, 3000], "start": 1}
        return rng.integers(0, [5, 3000], (2, 2)) + 1, spec


def digits(size: int) -> int:
    """Return how many base-1024 digits the values 0 .. size - 1 take.

    >>> digits(2), digits(1024), digits(1025)
    (1, 1, 2)
    """
    n = 1
    while BASE**n < size:
        n += 1
    return n
