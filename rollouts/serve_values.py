"""Observations out of JSON, and actions into it.

Box              nested lists of numbers, or {"dtype": "uint8", "shape": [64, 64, 3],
                 "data": base64 of its bytes, row-major, little-endian}
pictures         the same, or a data URI of a picture of just that size
Discrete         a whole number
Multi...         lists of whole numbers
Text             a string
Dict, Tuple      an object with every key, a list with every item
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from gato.rollouts.data_uri import Budget
from gato.rollouts.serve_json import kind

DTYPES = (
    *("bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"),
    *("float16", "float32", "float64"),
)


def from_json(space: gym.Space, value: Any, budget: Budget, path: str = "observation") -> Any:
    """Return the element of `space` that JSON tells; whether it is within bounds is not asked.

    Raises:
        ValueError: naming the key, for what is of another kind or shape.
    """
    match space:
        case spaces.Dict():
            return _mapping(space, value, budget, path)
        case spaces.Tuple():
            if not isinstance(value, list) or len(value) != len(space.spaces):
                raise _wrong(path, f"a list of {len(space.spaces)}", value)
            pairs = enumerate(zip(space.spaces, value, strict=True))
            return tuple(from_json(s, v, budget, f"{path}[{i}]") for i, (s, v) in pairs)
        case spaces.Text():
            if not isinstance(value, str):
                raise _wrong(path, "a string", value)
            if len(value) > space.max_length:
                most = space.max_length
                raise ValueError(f"expected {path} of at most {most} characters; got {len(value)}")
            return value
        case spaces.Discrete():
            if isinstance(value, bool) or not isinstance(value, int):
                raise _wrong(path, "a whole number", value)
            if not space.start <= value < space.start + space.n:
                last = space.start + space.n - 1
                raise ValueError(f"expected {path} from {space.start} to {last}; got {value}")
            return np.int64(value)
        case spaces.Box() | spaces.MultiDiscrete() | spaces.MultiBinary():
            return _array(space, value, budget, path)
    raise ValueError(f"{path}: a {type(space).__name__} cannot be told in JSON")


def _mapping(space: spaces.Dict, value: Any, budget: Budget, path: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _wrong(path, f"an object with {', '.join(space.spaces)}", value)
    missing = [key for key in space.spaces if key not in value]
    if missing:
        raise ValueError(f"expected a key {missing[0]!r} in {path}; it is missing")
    unknown = [key for key in value if key not in space.spaces]
    if unknown:
        known = ", ".join(space.spaces)
        raise ValueError(f"expected keys {known} in {path}; got {unknown[0][:50]!r}")
    return {k: from_json(s, value[k], budget, f"{path}.{k}") for k, s in space.spaces.items()}


def _array(space: gym.Space, value: Any, budget: Budget, path: str) -> np.ndarray:
    shape, dtype = space.shape or (), np.dtype(space.dtype)
    if isinstance(value, str):
        array = _picture(value, shape, dtype, budget, path)
    elif isinstance(value, dict):
        array = _packed(value, shape, path)
    else:
        array = _listed(value, shape, path)
    if array.dtype.kind == "b" and not isinstance(space, spaces.MultiBinary):
        raise ValueError(f"expected numbers as {path}; got true or false")
    if array.shape != shape:
        raise ValueError(f"expected {path} of shape {shape}; got {array.shape}")
    if dtype.kind in "iu" and array.dtype.kind == "f":
        raise ValueError(f"expected whole numbers as {path}; got {array.dtype}")
    if dtype.kind in "iu" and array.size:
        bounds, low, high = np.iinfo(dtype), int(array.min()), int(array.max())
        if low < bounds.min or high > bounds.max:
            raise ValueError(f"expected {path} as {dtype}; got numbers from {low} to {high}")
    with np.errstate(over="ignore"):  # infinite numbers are refused where bounds are looked at
        return array.astype(dtype)


def _listed(value: Any, shape: tuple[int, ...], path: str) -> np.ndarray:
    told = f"numbers of shape {shape}"
    if not isinstance(value, list | int | float):
        raise _wrong(path, told, value)
    level = [value]
    while level:  # before numpy looks: it would give every text the room of the longest
        if not all(isinstance(one, list | int | float) for one in level):
            raise ValueError(f"expected {path} as {told}; got something else among them")
        level = [one for some in level if isinstance(some, list) for one in some]
    try:
        array = np.array(value)
    except (ValueError, OverflowError) as error:  # ragged, or too many dimensions
        raise ValueError(f"expected {path} as {told}; got lists of other lengths") from error
    if array.size == 0:
        array = array.astype(np.int64)
    if array.dtype.kind not in "iufb":
        raise ValueError(f"expected {path} as {told}; got something else among them")
    return array


def _packed(value: Mapping[str, Any], shape: tuple[int, ...], path: str) -> np.ndarray:
    if set(value) != {"dtype", "shape", "data"}:
        raise ValueError(f"expected dtype, shape and data in {path}; got {sorted(value)[:10]}")
    dtype, data = value["dtype"], value["data"]
    if dtype not in DTYPES:
        raise ValueError(f"expected a dtype of {', '.join(DTYPES)} in {path}; got {dtype!r:.50}")
    if value["shape"] != list(shape):
        raise ValueError(f"expected {path} of shape {list(shape)}; got {value['shape']!r:.50}")
    if not isinstance(data, str):
        raise _wrong(f"{path}.data", "base64", data)
    try:
        raw = base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"expected base64 as {path}.data; {error}") from error
    form = np.dtype(dtype).newbyteorder("<")
    wanted = form.itemsize * int(np.prod(shape, dtype=np.int64))
    if len(raw) != wanted:
        raise ValueError(f"expected {wanted} bytes as {path}.data; got {len(raw)}")
    return np.frombuffer(raw, form).reshape(shape)


def _picture(
    uri: str, shape: tuple[int, ...], dtype: np.dtype, budget: Budget, path: str
) -> np.ndarray:
    if (
        dtype != np.uint8
        or len(shape) not in (2, 3)
        or (len(shape) == 3 and shape[2] not in (1, 3))
    ):
        raise ValueError(f"expected {path} as numbers of shape {shape}; got a string")
    try:
        picture = budget.picture(uri)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    grey = len(shape) == 2 or shape[2] == 1
    if not grey:
        return picture
    if (picture != picture[..., :1]).any():
        raise ValueError(f"expected {path} as a grey picture; got one with colours")
    return picture[..., 0] if len(shape) == 2 else picture[..., :1]


def _wrong(path: str, expected: str, value: Any) -> ValueError:
    return ValueError(f"expected {path} to be {expected}; got {kind(value)}")


def to_json(value: Any) -> Any:
    """Return an action as JSON tells it.

    >>> to_json({"a": np.float32(0.5), "b": (np.int64(2), "x"), "c": np.zeros((1, 2))})
    {'a': 0.5, 'b': [2, 'x'], 'c': [[0.0, 0.0]]}
    """
    match value:
        case dict():
            return {str(k): to_json(v) for k, v in value.items()}
        case tuple() | list():
            return [to_json(v) for v in value]
        case np.ndarray() | np.generic():
            return value.tolist()
    return value
