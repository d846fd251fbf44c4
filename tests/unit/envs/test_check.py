"""Observations in and outside of spaces: the quick test and Gymnasium's own agree."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from gymnasium import spaces

from gato.envs.check import Inside, _plainly, outside
from gato.envs.episode import ANY_TEXT

SPACES = [
    spaces.Box(-1, 1, (3,), np.float32),
    spaces.Box(np.array([-np.inf, 0.0]), np.array([np.inf, 4.0]), dtype=np.float64),
    spaces.Box(-np.inf, np.inf, (2, 2), np.float32),
    spaces.Box(0, 255, (4, 4, 3), np.uint8),
    spaces.Box(-3, 9, (2,), np.int32),
    spaces.Box(-128, 127, (2,), np.int8),
    spaces.Box(0, 1, (), np.float32),
    spaces.Discrete(5, start=-2),
    spaces.MultiDiscrete([[3, 4], [1, 200]], dtype=np.uint8),
    spaces.MultiDiscrete([3, 4], start=[-1, 7]),
    spaces.MultiBinary(4),
    ANY_TEXT(12),
    spaces.Dict({"a": spaces.Discrete(2), "b": spaces.Tuple([ANY_TEXT(), spaces.Discrete(3)])}),
]


def altered(value: Any) -> list[Any]:
    """Return what an element becomes by mistakes that environments make."""
    if isinstance(value, dict):
        each = [{**value, k: other} for k, part in value.items() for other in altered(part)]
        return [*each, {**value, "more": 1}, {}, tuple(value.values())]
    if isinstance(value, tuple):
        each = [(*value[:i], x, *value[i + 1 :]) for i, p in enumerate(value) for x in altered(p)]
        return [*each, value[:-1], (*value, 0), list(value)]
    if isinstance(value, str):
        return [value * 20, 3, None]
    array = np.asarray(value)
    whole = array.dtype.kind in "iu"
    edges = [array + array.dtype.type(1), array - array.dtype.type(1)] if whole else []
    far = [array.astype(np.int64) + 300] if whole else [array + 5, array - 5, array * np.nan]
    kinds = [array.astype(kind) for kind in (np.float64, np.float32, np.int64, np.uint8)]
    shapes = [array[None], array.reshape(-1)[:1]]
    return [*edges, *far, *kinds, *shapes, None, "text"]


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
@pytest.mark.parametrize("space", SPACES, ids=str)
def test_the_quick_test_takes_nothing_for_inside_that_is_not(space: spaces.Space) -> None:
    """It may leave the decision to the space; NaN without bounds is told of elsewhere."""
    space.seed(0)
    plainly, inside = _plainly(space), Inside(space)
    samples = [space.sample() for _ in range(20)]
    if not isinstance(space, spaces.Text) and space.shape != ():
        assert all(map(plainly, samples)), "what keeps its word is seen at once"
    refused = 0
    for value in [*samples, *(other for sample in samples for other in altered(sample))]:
        finite = not (isinstance(value, np.ndarray) and np.isnan(value.astype(float)).any())
        if space.contains(value):
            inside.require(value, "reset")
        elif finite:
            refused += 1
            assert not plainly(value), value
            assert outside(space, value)
            with pytest.raises(ValueError, match="that of reset is not: "):
                inside.require(value, "reset")
    assert refused > 20
