"""Whether observations and episodes are what their task promises; whether a store goes on so."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np

from gato.envs.episode import Episode, TaskSpec, flatten_space, flatten_value


def require_within(**limits: tuple[float, float, float]) -> None:
    """Raise ValueError for the first named value that is not in its range, both ends included.

    Args:
        limits: of each name, the value, the least and the greatest that it may have.
    """
    for name, (value, low, high) in limits.items():
        if not low <= value <= high:
            raise ValueError(f"expected {name} in [{low}, {high}]; got {value}.")


class Inside:
    """Tells whether observations are in a space: their keys, shapes, dtypes and range.

    What an environment that keeps its word returns is recognised in a few millionths of a second,
    so that every step can be looked at; of anything else, Gymnasium's own test decides. NaN in a
    space without bounds passes: `check_episode` and the hosts tell of it.
    """

    def __init__(self, space: gym.Space) -> None:
        self._space, self._plain = space, _plainly(space)

    def require(self, observation: Any, when: str) -> None:
        """Raise ValueError for an observation that is not in the space, naming its first part."""
        if not self._plain(observation) and not self._space.contains(observation):
            raise ValueError(
                f"expected observations inside their space; that of {when} is not: "
                f"{outside(self._space, observation)}. Cast or clip it in the environment, or "
                f"widen its observation_space."
            )


def _plainly(space: gym.Space) -> Callable[[Any], bool]:
    """Return what is true for elements of a space that look as expected, and for no others."""
    match space:
        case gym.spaces.Dict():
            parts = {key: _plainly(part) for key, part in space.items()}
            return lambda x: (
                type(x) is dict
                and x.keys() == parts.keys()
                and all(plainly(x[key]) for key, plainly in parts.items())
            )
        case gym.spaces.Tuple():
            each = [_plainly(part) for part in space]
            return lambda x: (
                type(x) is tuple
                and len(x) == len(each)
                and all(plainly(part) for plainly, part in zip(each, x, strict=True))
            )
        case gym.spaces.Discrete():
            start, stop = int(space.start), int(space.start + space.n)
            return lambda x: isinstance(x, (int, np.integer)) and start <= x < stop
        case gym.spaces.Box():
            least, most = _ends(space.dtype)
            low = None if (space.low == least).all() else space.low
            high = None if (space.high == most).all() else space.high
            return _between(space, low, high)
        case gym.spaces.MultiDiscrete():
            return _between(space, space.start, space.start + space.nvec - 1)
    return space.contains


def _ends(dtype: Any) -> tuple[float, float]:
    """Return the least and the greatest value that a dtype has."""
    if dtype.kind not in "iu":
        return (0, 1) if dtype.kind == "b" else (-np.inf, np.inf)
    return np.iinfo(dtype).min, np.iinfo(dtype).max


def _between(space: gym.Space, low: Any, high: Any) -> Callable[[Any], bool]:
    dtype, shape = space.dtype, space.shape
    return lambda x: (
        type(x) is np.ndarray
        and x.dtype == dtype
        and x.shape == shape
        and (low is None or bool((x >= low).all()))
        and (high is None or bool((x <= high).all()))
    )


def outside(space: gym.Space, observation: Any) -> str:
    """Return the first part of an observation that its space does not contain, in words."""
    try:
        parts = flatten_value(space, observation, "observation")
    except (KeyError, TypeError, IndexError):
        return f"{type(observation).__name__} without the keys of {space}"
    for path, leaf in flatten_space(space, "observation").items():
        value = parts[path]
        if not leaf.contains(value):
            kind = getattr(value, "dtype", type(value).__name__)
            return f"{path!r} is {kind}{getattr(value, 'shape', '')}, {value!r:.80}, not of {leaf}"
    return f"keys {sorted(observation)}"


def check_episode(episode: Episode, spec: TaskSpec) -> None:
    """Raise ValueError where `episode` is not a complete, finite episode of `spec`."""
    what = f"episode of {spec.id!r} (seed {episode.seed})"
    if episode.task != spec.id:
        raise ValueError(f"expected an {what}; got one of {episode.task!r}.")
    steps = len(episode)
    if steps == 0:
        raise ValueError(f"expected at least one step in an {what}; got none.")
    observations = flatten_space(spec.observation_space, "observation")
    actions = flatten_space(spec.action_space, "action")
    _check_columns(f"observations of an {what}", episode.observations, observations, steps + 1)
    _check_columns(f"actions of an {what}", episode.actions, actions, steps, bounded=True)
    if episode.targets is not None:
        _check_columns(f"targets of an {what}", episode.targets, actions, steps, bounded=True)
    for name in ("rewards", "terminated", "truncated"):
        column = getattr(episode, name)
        if column.shape != (steps,) or not np.isfinite(column).all():
            raise ValueError(f"expected {steps} finite {name} in an {what}; got {column!r:.200}.")


def check_goes_on(path: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Raise ValueError where the store at `path` cannot go on: its manifest says something else."""
    for key in ("id", "observation_space", "action_space"):
        if old["spec"][key] != new["spec"][key]:
            raise ValueError(
                f"expected a store with {key} {new['spec'][key]} at {path}; "
                f"got {old['spec'][key]}. Choose another folder."
            )
    packages = (old["versions"].keys() & new["versions"].keys()) - {"python", "numpy"}
    for what, names in (
        ("settings", old["settings"].keys() | new["settings"].keys()),
        ("versions", packages),
    ):
        for key in sorted(names):
            was, now = old[what].get(key), new[what].get(key)
            if was != now:
                raise ValueError(
                    f"the store at {path} was begun with {key}={was!r}; got {now!r}. "
                    f"Go on with the same {what}, or choose another folder."
                )


def _check_columns(
    what: str,
    columns: Mapping[str, Any],
    leaves: Mapping[str, gym.Space],
    rows: int,
    *,
    bounded: bool = False,
) -> None:
    if set(columns) != set(leaves):
        raise ValueError(f"expected {sorted(leaves)} as {what}; got {sorted(columns)}.")
    for path, leaf in leaves.items():
        column = columns[path]
        if isinstance(leaf, gym.spaces.Text):
            if len(column) != rows or not all(isinstance(text, str) for text in column):
                raise ValueError(f"expected {rows} strings as {path!r} in {what}.")
            continue
        shape = (rows, *leaf.shape)
        if column.shape != shape:
            raise ValueError(f"expected {path!r} of shape {shape} in {what}; got {column.shape}.")
        if bounded:
            low, high = _bounds(leaf)
            bad = ~((column >= low) & (column <= high))  # true for nan
            fault = "inside its space"
        elif column.dtype.kind == "f":
            bad, fault = ~np.isfinite(column), "finite"
        else:
            continue  # whole numbers are finite, and frames are many
        if bad.any():
            at = tuple(int(k) for k in np.argwhere(bad)[0])
            raise ValueError(f"expected {path!r} {fault} in {what}; got {column[at]} at {at}.")


def _bounds(leaf: gym.Space) -> tuple[Any, Any]:
    match leaf:
        case gym.spaces.Discrete():
            return leaf.start, leaf.start + leaf.n - 1
        case gym.spaces.MultiDiscrete():
            return leaf.start, leaf.start + leaf.nvec - 1
        case gym.spaces.Box():
            return leaf.low, leaf.high
    return 0, 1  # MultiBinary
