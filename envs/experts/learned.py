"""Learned experts: small networks that `gato experts train` has left in a folder.

```
DIR/expert.json          the task and its spaces, how it was trained, how well it did meanwhile
DIR/policy.safetensors   the network, with the scales of what it reads and a checksum
DIR/training/            what a training that goes on needs; not read here
```
The network reads the observation as one vector and runs in numpy; nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from gato.envs.episode import TaskSpec, flatten_space, flatten_value, space_to_json
from gato.envs.files import write_atomically

DESCRIPTION, WEIGHTS = "expert.json", "policy.safetensors"
FORMAT = "gato learned expert 1"
MEAN, STD = "observation.mean", "observation.std"
CLIP = 10.0
"""Of scaled observations."""
_READ = (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)


class Interface:
    """A task as a vector that is read and a vector in [-1, 1], or an index, that is acted."""

    def __init__(self, spec: TaskSpec) -> None:
        self._space = spec.observation_space
        self._leaves = flatten_space(self._space, "observation")
        for path, leaf in self._leaves.items():
            picture = isinstance(leaf, spaces.Box) and len(leaf.shape) > 2
            if picture or not isinstance(leaf, _READ):
                what = "a picture" if picture else f"{leaf}"
                raise ValueError(
                    f"expected observations of numbers for a learned expert of {spec.id!r}; "
                    f"{path!r} is {what}. Choose a variant of the task without it."
                )
        self.action_space = space = spec.action_space
        bounded = isinstance(space, spaces.Box) and space.dtype.kind == "f" and space.is_bounded()
        if not (bounded or isinstance(space, spaces.Discrete)):
            raise ValueError(
                f"expected Discrete or bounded Box actions for a learned expert of {spec.id!r}; "
                f"got {space}."
            )
        self.size = sum(spaces.flatdim(leaf) for leaf in self._leaves.values())
        self.outputs = int(space.n) if self.discrete else int(np.prod(space.shape))

    @property
    def discrete(self) -> bool:
        return isinstance(self.action_space, spaces.Discrete)

    def vector(self, observation: Any) -> np.ndarray:
        """Return an observation's numbers, by path; integers as one-hot."""
        flat = flatten_value(self._space, observation, "observation")
        parts = [spaces.flatten(leaf, flat[path]) for path, leaf in self._leaves.items()]
        return np.concatenate(parts, dtype=np.float32, casting="unsafe")

    def action(self, raw: np.ndarray | int) -> Any:
        """Return the task's action for a vector in [-1, 1], which is clipped, or an index."""
        space = self.action_space
        if isinstance(space, spaces.Discrete):
            return np.int64(space.start + int(raw))
        unit = (np.clip(np.asarray(raw, np.float64), -1.0, 1.0).reshape(space.shape) + 1.0) / 2.0
        low, high = space.low.astype(np.float64), space.high.astype(np.float64)
        return np.clip(low + unit * (high - low), low, high).astype(space.dtype)


@dataclass(frozen=True)
class Actor:
    """A network: scaled input, layers with an activation between them, outputs."""

    tensors: Mapping[str, np.ndarray]
    """`MEAN` and `STD` of the input, and ``layers.<k>.weight`` and ``.bias``."""
    activation: str
    """``tanh`` or ``relu``."""
    discrete: bool
    squash: bool
    """Whether the outputs go through tanh."""

    def __call__(self, vector: np.ndarray) -> np.ndarray | int:
        """Return the likeliest action: an index or a vector."""
        scaled = (vector - self.tensors[MEAN]) / self.tensors[STD]
        hidden = np.clip(scaled, -CLIP, CLIP).astype(np.float32)
        depth = (len(self.tensors) - 2) // 2
        for k in range(depth):
            if k:
                hidden = np.tanh(hidden) if self.activation == "tanh" else np.maximum(hidden, 0)
            hidden = self.tensors[f"layers.{k}.weight"] @ hidden + self.tensors[f"layers.{k}.bias"]
        if self.discrete:
            return int(hidden.argmax())
        return np.tanh(hidden) if self.squash else hidden

    @property
    def sizes(self) -> list[int]:
        """How many numbers go in, through each layer, and out."""
        depth = (len(self.tensors) - 2) // 2
        return [
            len(self.tensors[MEAN]),
            *(len(self.tensors[f"layers.{k}.bias"]) for k in range(depth)),
        ]


class ActorExpert:
    """A network that acts in a task; without chance."""

    def __init__(self, spec: TaskSpec, actor: Actor) -> None:
        self._interface, self._actor = Interface(spec), actor

    def reset(self, env: gym.Env, seed: int) -> None:
        """Forget nothing: there is neither memory nor chance."""

    def act(self, env: gym.Env, observation: Any) -> Any:
        """Return the network's action."""
        return self._interface.action(self._actor(self._interface.vector(observation)))


class LearnedExpert(ActorExpert):
    """The expert in a folder.

    Raises:
        ValueError: where the folder holds none, it is damaged, or it is of another task.
    """

    def __init__(self, spec: TaskSpec, folder: str | Path) -> None:
        self.description, actor = load(Path(folder))
        about = self.description
        if about["task"] != spec.id:
            raise ValueError(
                f"expected a learned expert of {spec.id!r}; {folder} is one of {about['task']!r}. "
                f"Train one: gato experts train {spec.id!r} --out DIR"
            )
        given = {k: space_to_json(getattr(spec, k)) for k in ("observation_space", "action_space")}
        if {k: about[k] for k in given} != given:
            raise ValueError(
                f"expected the spaces of {spec.id!r} in {folder}; it was trained when the task had "
                f"others. Train it anew."
            )
        super().__init__(spec, actor)
        wanted = self._interface.size, self._interface.outputs
        if (actor.sizes[0], actor.sizes[-1]) != wanted:
            raise _damaged(Path(folder), f"a network of {actor.sizes}, expected {wanted} outside")
        self.settings = (
            f"learned: {about['algorithm']}, {about['steps']} steps, seed {about['seed']}"
        )


def save(folder: Path, description: Mapping[str, Any], actor: Actor) -> None:
    """Write a learned expert; killed at any instant, a folder that held one holds a whole one.

    What acts lies in one file, and the other does not change its meaning.
    """
    from safetensors.numpy import save as to_bytes

    if not all(np.isfinite(t).all() for t in actor.tensors.values()):
        raise ValueError(f"expected finite weights for {folder}; training has diverged.")
    about = {
        "activation": actor.activation,
        "discrete": json.dumps(actor.discrete),
        "squash": json.dumps(actor.squash),
        "sha256": _checksum(actor.tensors),
    }
    weights = to_bytes({k: np.ascontiguousarray(v) for k, v in actor.tensors.items()}, about)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / WEIGHTS, weights)
    text = json.dumps({"format": FORMAT, **description, "network": actor.sizes}, indent=1)
    write_atomically(folder / DESCRIPTION, text.encode())


def load(folder: Path) -> tuple[dict[str, Any], Actor]:
    """Return what `save` wrote.

    Raises:
        ValueError: where it is not there, or damaged; the message names the file.
    """
    from safetensors import SafetensorError, safe_open

    for name in (DESCRIPTION, WEIGHTS):
        if not (folder / name).is_file():
            raise ValueError(
                f"expected the folder of a learned expert; {folder} has no {name}. "
                f"Make one: gato experts train TASK --out DIR"
            )
    try:
        description = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
    except ValueError as error:
        raise _damaged(folder / DESCRIPTION, error) from error
    needed = {"task", "observation_space", "action_space", "algorithm", "steps", "seed"}
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise _damaged(folder / DESCRIPTION, f"expected format {FORMAT!r}")
    if missing := sorted(needed - set(description)):
        raise _damaged(folder / DESCRIPTION, f"it has no {', '.join(missing)}")
    try:
        with safe_open(folder / WEIGHTS, "np") as file:
            about = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise _damaged(folder / WEIGHTS, error) from error
    if about.get("sha256") != _checksum(tensors):
        raise _damaged(folder / WEIGHTS, "the checksum does not fit")
    flags = {name: about.get(name) == "true" for name in ("discrete", "squash")}
    actor = Actor(tensors, about.get("activation", ""), **flags)
    if fault := _fault(actor):
        raise _damaged(folder / WEIGHTS, fault)
    return description, actor


def _fault(actor: Actor) -> str | None:
    """Return why an actor that was read cannot act, if so; a checksum only says who wrote it."""
    depth = (len(actor.tensors) - 2) // 2
    names = {f"layers.{k}.{part}" for k in range(depth) for part in ("weight", "bias")}
    if not depth or set(actor.tensors) != {MEAN, STD} | names:
        return f"it holds {sorted(actor.tensors)}"
    if actor.activation not in ("tanh", "relu"):
        return f"its activation is {actor.activation!r}"
    if not all(np.isfinite(tensor).all() for tensor in actor.tensors.values()):
        return "its numbers are not all finite"
    sizes = [actor.tensors[MEAN].shape]
    sizes += [actor.tensors[f"layers.{k}.bias"].shape for k in range(depth)]
    fit = actor.tensors[STD].shape == sizes[0] and all(len(size) == 1 for size in sizes)
    for k in range(depth):
        fit = fit and actor.tensors[f"layers.{k}.weight"].shape == sizes[k + 1] + sizes[k]
    return None if fit else "its layers do not fit together"


def _checksum(tensors: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name}{tensors[name].dtype}{tensors[name].shape}".encode())
        digest.update(np.ascontiguousarray(tensors[name]).tobytes())
    return digest.hexdigest()


def _damaged(path: Path, error: object) -> ValueError:
    return ValueError(f"{path} is damaged ({error}). Train the expert again.")
