"""Columns of foreign episodes as columns of ours: what each becomes, and what it may not hold."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from gato.envs.episode import ANY_TEXT, flatten_space, space_to_json
from gato.envs.readers.reader import ReadOptions, fit_image

SMALLEST = 16
"""Pixels of a picture's sides at least; smaller arrays of bytes are numbers."""
STACKS = range(4, 17)
"""Channels that mean the latest frames, one grey frame each, as Atari agents see them."""
CLIPPED = "numbers of actions brought to their bounds"


@dataclass(frozen=True)
class Leaf:
    """What one column becomes."""

    space: gym.Space
    convert: Callable[[Any], Any]
    """Raises ValueError for values that do not fit."""
    about: str
    """In words, for the user."""


def as_is(space: gym.Space) -> Leaf:
    """Return a leaf that stays what it is."""
    if isinstance(space, spaces.Text):
        return Leaf(ANY_TEXT(int(space.max_length)), _texts, "text")
    return Leaf(space, lambda column: cast(column, space), describe(space))


def observed(space: gym.Space, options: ReadOptions) -> Leaf:
    """Return what an observed leaf becomes."""
    if not _is_bytes(space):
        return as_is(space)
    shape = space.shape
    if len(shape) == 2 and min(shape) >= SMALLEST:
        return _picture(shape, (*shape, 1), lambda x: x[..., None], options, "grey picture")
    if len(shape) == 3 and min(shape[:2]) >= SMALLEST and (shape[2] in (1, 3)):
        return _picture(shape, shape, lambda x: x, options, "picture")
    if len(shape) == 3 and min(shape[:2]) >= SMALLEST and shape[2] in STACKS:
        about = f"picture: the last of {shape[2]} stacked frames, the others left out"
        return _picture(shape, (*shape[:2], 1), lambda x: x[..., -1:], options, about)
    if len(shape) == 3 and min(shape[1:]) >= SMALLEST and shape[0] in (1, 3):
        about = "picture, channels brought to the end"
        turned = (*shape[1:], shape[0])
        return _picture(shape, turned, lambda x: np.moveaxis(x, 1, -1), options, about)
    if len(shape) == 3 and min(shape[1:]) >= SMALLEST and shape[0] in STACKS:
        about = f"picture: the last of {shape[0]} stacked frames, the others left out"
        return _picture(shape, (*shape[1:], 1), lambda x: x[:, -1, ..., None], options, about)
    return Leaf(space, lambda column: cast(column, space), f"{describe(space)}, a token per number")


def _is_bytes(space: gym.Space) -> bool:
    return isinstance(space, spaces.Box) and space.dtype == np.uint8


def _picture(
    given: tuple[int, ...],
    shape: tuple[int, ...],
    turn: Callable[[Any], Any],
    options: ReadOptions,
    about: str,
) -> Leaf:
    def convert(column: Any) -> np.ndarray:
        pictures = np.asarray(column)
        fixed = options.image_size is None  # otherwise any size becomes the one asked for
        if pictures.dtype != np.uint8 or (pictures.shape[1:] != given if fixed else False):
            raise ValueError(
                f"expected pictures, uint8 of shape {given}; got {pictures.dtype} of shape "
                f"{pictures.shape[1:]}. Bring all to one size: --image-size"
            )
        turned = turn(pictures)
        if options.image_size is None:
            return np.ascontiguousarray(turned)
        return np.stack([fit_image(picture, options.image_size) for picture in turned])

    if options.image_size is not None:
        width, height = options.image_size
        shape, about = (height, width, 3), f"{about}, brought to {width}x{height}"
    return Leaf(spaces.Box(0, 255, shape, np.uint8), convert, about)


def acted(space: gym.Space, options: ReadOptions, counts: Counter[str]) -> Leaf:
    """Return what a leaf of the actions becomes; those outside its bounds are refused or clipped.

    Args:
        space: of the leaf.
        options: whether to clip.
        counts: where clipped numbers are counted.
    """
    if isinstance(space, spaces.Text):
        return Leaf(ANY_TEXT(int(space.max_length)), lambda c: np.array(_texts(c)), "text")
    if not isinstance(space, spaces.Box):
        return as_is(space)

    def convert(column: Any) -> np.ndarray:
        actions = cast(column, space)
        bad = ~((actions >= space.low) & (actions <= space.high))  # true for nan
        if not bad.any():
            return actions
        at = tuple(int(k) for k in np.argwhere(bad)[0])
        if not options.clip_actions or np.isnan(actions).any():
            raise ValueError(
                f"expected actions of {describe(space)}; {int(bad.sum())} of {bad.size} numbers "
                f"are outside, the first {actions[at]:.6g} at {at}. If the world brings them "
                f"to its bounds itself: --clip-actions"
            )
        counts[CLIPPED] += int(bad.sum())
        return np.clip(actions, space.low, space.high)

    return Leaf(space, convert, describe(space))


def leaves_of(
    space: gym.Space, role: str, make: Callable[[gym.Space], Leaf], where: str
) -> dict[str, Leaf]:
    """Return what every leaf of a space becomes, by path.

    Raises:
        ValueError: for a leaf that no modality reads, naming it.
    """
    found = {}
    for path, leaf in flatten_space(space, role).items():
        try:
            space_to_json(leaf)
        except TypeError as error:
            raise ValueError(f"{where}: {role} {path!r}: {error}") from error
        found[path] = make(leaf)
    return found


def replaced(space: gym.Space, leaves: dict[str, Leaf], role: str) -> gym.Space:
    """Return a space with its leaves replaced."""

    def rebuild(part: gym.Space, path: str) -> gym.Space:
        if isinstance(part, spaces.Dict):
            return spaces.Dict({k: rebuild(s, _join(path, k)) for k, s in part.spaces.items()})
        if isinstance(part, spaces.Tuple):
            return spaces.Tuple([rebuild(s, _join(path, f"{i:03d}")) for i, s in enumerate(part)])
        return leaves[path or role].space

    return rebuild(space, "")


def convert(columns: dict[str, Any], leaves: dict[str, Leaf], what: str) -> dict[str, Any]:
    """Return columns by path as ours; raises ValueError, naming the column, where one is not."""
    found = {}
    for path, leaf in leaves.items():
        try:
            found[path] = leaf.convert(columns[path])
        except (ValueError, TypeError, OverflowError) as error:
            raise ValueError(f"{what} {path!r}: {error}") from error
    return found


def cast(column: Any, space: gym.Space) -> np.ndarray:
    """Return a column in its space's dtype and shape.

    Raises:
        ValueError: for another shape, or whole numbers that are none.
    """
    values = np.asarray(column)
    shape = tuple(space.shape or ())
    if values.dtype.kind not in "biuf":
        raise ValueError(f"expected {describe(space)}; got {values.dtype}")
    if values.shape[1:] != shape:
        raise ValueError(f"expected {describe(space)}; got {values.dtype} {values.shape[1:]}")
    dtype = np.dtype(space.dtype)
    with np.errstate(all="ignore"):  # what does not fit is told below, or as not finite
        changed = values.astype(dtype)
    if dtype.kind != "f" and (changed != values).any():
        raise ValueError(f"expected whole numbers of {dtype}; got {values.min()}..{values.max()}")
    return changed


def describe(space: gym.Space) -> str:
    """Return a leaf space in a few words.

    >>> describe(spaces.Box(-1, 1, (4,))), describe(spaces.Discrete(7))
    ('float32 (4,) in [-1, 1]', 'one of 7')
    """
    match space:
        case spaces.Box():
            low, high = space.low.reshape(-1), space.high.reshape(-1)
            even = low.size and (low == low[0]).all() and (high == high[0]).all()
            ends = f"[{low[0]:g}, {high[0]:g}]" if even else "bounds of its own each"
            return f"{space.dtype} {space.shape} in {ends}"
        case spaces.Discrete():
            start = f", from {space.start}" if space.start else ""
            return f"one of {space.n}{start}"
        case spaces.MultiDiscrete():
            most = int(space.nvec.max())
            exactly = "" if (space.nvec == most).all() else "at most "
            return f"{space.shape} integers, one of {exactly}{most} each"
        case spaces.MultiBinary():
            return f"{space.shape} of 0 or 1"
        case spaces.Text():
            return "text"
    return " ".join(str(space).split())


def in_words(name: str) -> str:
    """Return a name as words: the instruction of data that have none.

    >>> in_words("D4RL/door/human-v2")
    'D4RL door human'
    """
    return " ".join(re.split(r"[/_\s-]+", re.sub(r"-v\d+$", "", name.strip("/"))))


def _texts(column: Any) -> list[str]:
    texts = list(column)
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("expected a str at every step")
    return [str(text) for text in texts]


def _join(path: str, key: str) -> str:
    return f"{path}/{key}" if path else key
