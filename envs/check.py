"""Whether an episode is what its task promises, and whether a store goes on as it began."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np

from gato.envs.episode import Episode, TaskSpec, flatten_space


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
