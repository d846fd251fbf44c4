"""An episode, a task, and the flat view of nested spaces that both share.

Every nested observation or action is handled as a flat mapping ``path -> leaf``; paths join the
keys of a `Dict` and the indices of a `Tuple` with "/" and are kept in lexicographic order (Gato
section 2.1). A space that is not nested has the single path ``observation`` or ``action``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

EVALUATION_SEED_START = 1 << 30
"""Convention: seeds below this one are for training, seeds from it on for evaluation only."""


def flatten_space(space: gym.Space, name: str) -> dict[str, gym.Space]:
    """Return the leaf spaces of `space` by path, in lexicographic order.

    >>> sorted(flatten_space(spaces.Dict({"b": spaces.Discrete(2), "a": spaces.Discrete(3)}), "x"))
    ['a', 'b']
    """
    return dict(sorted(_leaves(space, "", name)))


def flatten_value(space: gym.Space, value: Any, name: str) -> dict[str, Any]:
    """Return the leaves of `value`, an element of `space`, by path in lexicographic order."""
    if isinstance(space, spaces.Dict):
        parts = {k: flatten_value(s, value[k], "") for k, s in space.spaces.items()}
    elif isinstance(space, spaces.Tuple):
        parts = {_index(i): flatten_value(s, value[i], "") for i, s in enumerate(space.spaces)}
    else:
        return {name: value}
    return dict(sorted((_join(k, p), leaf) for k, sub in parts.items() for p, leaf in sub.items()))


def unflatten_value(space: gym.Space, flat: Mapping[str, Any], name: str) -> Any:
    """Return the element of `space` whose leaves are `flat`; inverse of `flatten_value`."""
    if isinstance(space, spaces.Dict):
        return {k: unflatten_value(s, _below(flat, k), "") for k, s in space.spaces.items()}
    if isinstance(space, spaces.Tuple):
        return tuple(
            unflatten_value(s, _below(flat, _index(i)), "") for i, s in enumerate(space.spaces)
        )
    return flat[name]


def _leaves(space: gym.Space, path: str, name: str) -> list[tuple[str, gym.Space]]:
    if isinstance(space, spaces.Dict):
        items = list(space.spaces.items())
    elif isinstance(space, spaces.Tuple):
        items = [(_index(i), s) for i, s in enumerate(space.spaces)]
    else:
        return [(path or name, space)]
    return [leaf for key, sub in items for leaf in _leaves(sub, _join(path, key), name)]


def _index(i: int) -> str:
    return f"{i:03d}"  # zero-padded so that lexicographic order is the tuple's order


def _join(path: str, key: str) -> str:
    return f"{path}/{key}" if path and key else path or key


def _below(flat: Mapping[str, Any], key: str) -> dict[str, Any]:
    return {
        "" if path == key else path[len(key) + 1 :]: leaf
        for path, leaf in flat.items()
        if path == key or path.startswith(key + "/")
    }


def space_to_json(space: gym.Space) -> dict[str, Any]:
    """Return a JSON-able description of `space`; `space_from_json` is its inverse.

    Raises:
        TypeError: for a space that is not Box, Discrete, MultiDiscrete, MultiBinary, Text, Dict
            or Tuple.
    """
    match space:
        case spaces.Box():
            bounds = {"low": space.low, "high": space.high}
            packed = {k: _pack(v) for k, v in bounds.items()}
            return {"type": "Box", "shape": list(space.shape), "dtype": str(space.dtype), **packed}
        case spaces.Discrete():
            return {"type": "Discrete", "n": int(space.n), "start": int(space.start)}
        case spaces.MultiDiscrete():
            data = {"type": "MultiDiscrete", "nvec": space.nvec.tolist(), "dtype": str(space.dtype)}
            return {**data, "start": space.start.tolist()} if space.start.any() else data
        case spaces.MultiBinary():
            return {"type": "MultiBinary", "shape": list(space.shape)}
        case spaces.Text():
            return {"type": "Text", "max_length": int(space.max_length)}
        case spaces.Dict():
            return {"type": "Dict", "spaces": {k: space_to_json(s) for k, s in space.items()}}
        case spaces.Tuple():
            return {"type": "Tuple", "spaces": [space_to_json(s) for s in space]}
    raise TypeError(
        f"expected a Box, Discrete, MultiDiscrete, MultiBinary, Text, Dict or Tuple space; "
        f"got {type(space).__name__}. Wrap the environment so that its spaces are among these."
    )


def space_from_json(data: Mapping[str, Any]) -> gym.Space:
    """Return the space that `space_to_json` described."""
    match data["type"]:
        case "Box":
            shape, dtype = tuple(data["shape"]), np.dtype(data["dtype"])
            low, high = (_unpack(data[k], shape, dtype) for k in ("low", "high"))
            return spaces.Box(low, high, shape, dtype.type)
        case "Discrete":
            return spaces.Discrete(data["n"], start=data["start"])
        case "MultiDiscrete":
            nvec, start = np.array(data["nvec"]), data.get("start")
            start = None if start is None else np.array(start)
            return spaces.MultiDiscrete(nvec, dtype=np.dtype(data["dtype"]).type, start=start)
        case "MultiBinary":
            shape = data["shape"]
            return spaces.MultiBinary(shape[0] if len(shape) == 1 else shape)
        case "Text":
            return ANY_TEXT(data["max_length"])
        case "Dict":
            return spaces.Dict({k: space_from_json(s) for k, s in data["spaces"].items()})
        case "Tuple":
            return spaces.Tuple([space_from_json(s) for s in data["spaces"]])
    raise ValueError(f"expected a known space type; got {data['type']!r}")


class ANY_TEXT(spaces.Text):
    """A `Text` space of any characters: instructions are free text, not an alphabet."""

    def __init__(self, max_length: int = 1024) -> None:
        super().__init__(max_length, min_length=0)

    def contains(self, x: Any) -> bool:
        return isinstance(x, str) and len(x) <= self.max_length


def _pack(bound: np.ndarray) -> Any:
    """Return one number where all entries agree (most boxes), the nested list otherwise."""
    flat = bound.reshape(-1)
    same = flat.size > 0 and bool((flat == flat[0]).all())
    return _number(flat[0]) if same else [_number(x) for x in flat]


def _number(x: Any) -> Any:
    value = x.item()
    return value if np.isfinite(value) else str(value)  # JSON has no infinity


def _unpack(packed: Any, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    if isinstance(packed, list):
        return np.array([dtype.type(x) for x in packed], dtype).reshape(shape)
    return np.full(shape, dtype.type(packed), dtype)


@dataclass(frozen=True)
class TaskSpec:
    """What a task looks like and how well a random policy, its expert and a person do on it."""

    id: str
    """``suite/name``, for example ``metaworld/reach-v3``."""
    observation_space: gym.Space
    action_space: gym.Space
    max_steps: int
    """Decisions after which the episode is truncated."""
    control_hz: float
    """Decisions per simulated second."""
    instruction: str = ""
    """Text at the head of every episode of the task; empty where the observation carries it."""
    measure: str = "return"
    """What scores are in: ``return`` or ``success``."""
    random_score: float | None = None
    expert_score: float | None = None
    human_score: float | None = None
    score_source: str = ""
    expert: str = "none"
    """``scripted``, ``planner``, ``learned`` (by a command; none comes with it) or ``none``."""

    @property
    def suite(self) -> str:
        return self.id.split("/")[0]

    def to_json(self) -> dict[str, Any]:
        spaces_ = {
            "observation_space": space_to_json(self.observation_space),
            "action_space": space_to_json(self.action_space),
        }
        return {**{k: getattr(self, k) for k in self.__dataclass_fields__}, **spaces_}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TaskSpec:
        spaces_ = {k: space_from_json(data[k]) for k in ("observation_space", "action_space")}
        return cls(**{**data, **spaces_})


def require_kind(spec: TaskSpec, kind: str, *kinds: str) -> None:
    """Raise ValueError where a task that has experts of `kinds` is asked for another."""
    if kind not in kinds:
        raise ValueError(
            f"expected an expert of {spec.id!r} that is {' or '.join(kinds) or 'learned'}; "
            f"got {kind!r}. To train one: gato experts train {spec.id!r} --out DIR"
        )


@dataclass(frozen=True)
class Episode:
    """T decisions of one task, by column. Legend: T decisions, so T + 1 observations.

    A window cut from a longer episode may have T observations (the last one left out).
    """

    task: str
    observations: Mapping[str, np.ndarray | Sequence[str]]
    """Leaves by path, each with T + 1 entries; text is a sequence of str."""
    actions: Mapping[str, np.ndarray]
    """Leaves by path, each with T entries: what was executed."""
    rewards: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    targets: Mapping[str, np.ndarray] | None = None
    """The expert's clean actions where the executed ones carry noise (DART)."""
    instruction: str = ""
    seed: int = 0
    success: bool | None = None
    info: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.rewards)

    @property
    def score(self) -> float:
        """The sum of rewards."""
        return float(np.sum(self.rewards, dtype=np.float64))

    def __repr__(self) -> str:
        def shapes(columns: Mapping[str, Any]) -> str:
            return ", ".join(
                f"{k}: {v.dtype}{v.shape}" if isinstance(v, np.ndarray) else f"{k}: str({len(v)},)"
                for k, v in columns.items()
            )

        return (
            f"Episode({self.task!r}, T={len(self)}, seed={self.seed}, return={self.score:.3f}, "
            f"success={self.success}, observations {{{shapes(self.observations)}}}, "
            f"actions {{{shapes(self.actions)}}})"
        )
