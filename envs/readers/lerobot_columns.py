"""Which column of a LeRobot dataset is what in an episode, and the spaces that follow.

LeRobot names columns by what they are: `observation.images.top` is read as the observation
`images/top`, `action` as the action, `next.reward` as the reward. Writing goes the other way.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from gato.envs.episode import ANY_TEXT, TaskSpec, flatten_space
from gato.envs.readers.reader import MAX_NUMBERS, MAX_PIXELS, ReadOptions, fit_image

Role = Literal["observations", "actions", "targets"]
Kind = Literal["array", "text", "image", "video"]
Bounds = Callable[[str], tuple[np.ndarray, np.ndarray]]
"""Least and greatest value of a feature, an entry per dimension."""

CLOCK = ("timestamp", "frame_index", "episode_index", "index", "task_index")
"""Columns of every LeRobot dataset: where a frame belongs."""
FLAGS = ("reward", "done", "terminated", "truncated", "success")
"""Of a step, in columns `next.<flag>`: a LeRobot frame tells what came of its action."""


@dataclass(frozen=True)
class Column:
    """A leaf of an episode, and the feature that holds it."""

    role: Role
    path: str
    feature: str
    kind: Kind
    space: gym.Space
    size: tuple[int, int] | None = None
    """(width, height) that pictures are brought to; None leaves them as they are."""


@dataclass
class Columns:
    """All that is read of a dataset."""

    leaves: list[Column] = field(default_factory=list)
    flags: dict[str, str] = field(default_factory=dict)
    """Flag -> feature."""
    instruction: str = ""
    """The feature of text that takes the place of LeRobot's tasks."""
    fields: dict[str, str] = field(default_factory=dict)

    def of(self, role: Role) -> list[Column]:
        return [c for c in self.leaves if c.role == role]

    def space(self, role: Role, bare: str) -> gym.Space:
        """Return the nested space of a role; one leaf named `bare` is the space itself."""
        leaves = {c.path: c.space for c in self.of(role)}
        return leaves[bare] if set(leaves) == {bare} else _nested(leaves)


def foreign_columns(
    features: Mapping[str, Mapping[str, Any]], options: ReadOptions, bounds: Bounds
) -> Columns:
    """Return what becomes of each feature of somebody's dataset.

    Raises:
        ValueError: naming the feature that cannot be mapped.
    """
    columns, numbers = Columns(), 0
    renamed = _renamed(features, options.columns)
    for name, feature in features.items():
        ours = renamed.get(name, _ours(name))
        if name in CLOCK:
            columns.fields[name] = "where the frame belongs"
        elif ours is None:
            hint = "left out" if name in renamed else f"left out; --columns PATH={name} reads it"
            columns.fields[name] = hint
        elif ours == "instruction":
            columns.instruction = name
            columns.fields[name] = "instruction"
        elif ours.startswith("next."):
            columns.flags[ours.removeprefix("next.")] = name
            columns.fields[name] = ours.removeprefix("next.")
        else:
            numbers += _numbers(name, feature)
            if numbers > MAX_NUMBERS:
                raise ValueError(
                    f"expected at most {MAX_NUMBERS:,} numbers in a frame; feature {name!r} is of "
                    f"shape {feature['shape']!r:.200}. Leave it out: --columns {name}="
                )
            column = _column(name, feature, ours, options, bounds)
            columns.leaves.append(column)
            columns.fields[name] = f"{column.role[:-1]} {column.path!r}: {_brief(column.space)}"
    if not columns.of("actions"):
        raise ValueError(
            f"expected a feature 'action'; got {', '.join(features)}. Name it: "
            f"--columns action=FEATURE."
        )
    if not columns.of("observations"):
        raise ValueError(
            f"expected features 'observation.*'; got {', '.join(features)}. Name one: "
            f"--columns state=FEATURE."
        )
    return columns


def _renamed(features: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, str | None]:
    """Return by feature what the user says it is; None where it is to be left out."""
    renamed: dict[str, str | None] = {}
    for ours, theirs in columns.items():
        name = theirs or ours
        if name not in features:
            close = difflib.get_close_matches(name, features, n=2, cutoff=0.4) or list(features)
            raise ValueError(
                f"expected a feature of the dataset in --columns; got {name!r} "
                f"(closest: {', '.join(close)})."
            )
        if not theirs:
            renamed[name] = None
        elif ours in FLAGS:
            renamed[name] = f"next.{ours}"
        elif ours in ("action", "instruction") or ours.startswith(("action.", "action/")):
            renamed[name] = ours.replace("/", ".")
        else:
            renamed[name] = f"observation.{ours.removeprefix('observation.').replace('/', '.')}"
    return renamed


def _ours(name: str) -> str | None:
    """Return a feature's name if it says what the feature is."""
    known = name in ("action", "observation") or name.startswith(("observation.", "action."))
    return name if known or name in {f"next.{flag}" for flag in FLAGS} else None


def _column(
    name: str,
    feature: Mapping[str, Any],
    ours: str,
    options: ReadOptions,
    bounds: Bounds,
) -> Column:
    head, _, rest = ours.partition(".")
    role: Role = "actions" if head == "action" else "observations"
    path = rest.replace(".", "/") or head
    dtype, shape = str(feature.get("dtype")), _shape(name, feature)
    if dtype in ("image", "video"):
        return _picture(name, feature, role, path, options)
    if dtype == "string":
        return Column(role, path, name, "text", ANY_TEXT())
    try:
        kind = np.dtype(dtype).kind
    except TypeError:
        kind = ""
    if kind not in tuple("fiub") or 0 in shape:
        raise _unmappable(name, feature)
    if kind == "b":
        return Column(role, path, name, "array", spaces.MultiBinary(shape))
    if role == "actions":
        return Column(role, path, name, "array", _action_space(kind, dtype, shape, bounds(name)))
    number = np.float32 if dtype == "float16" else np.dtype(dtype).type
    if kind == "f":
        return Column(role, path, name, "array", spaces.Box(-np.inf, np.inf, shape, number))
    limits = np.iinfo(dtype)
    return Column(role, path, name, "array", spaces.Box(limits.min, limits.max, shape, number))


def _action_space(
    kind: str, dtype: str, shape: tuple[int, ...], bounds: tuple[np.ndarray, np.ndarray]
) -> gym.Space:
    """Return the smallest space of the actions in the data; [-1, 1] where they lie inside it."""
    low, high = (np.asarray(b).reshape(shape) for b in bounds)
    if kind == "f":
        number = np.float64 if dtype == "float64" else np.float32
        if low.min() >= -1 and high.max() <= 1:
            return spaces.Box(-1, 1, shape, number)
        return spaces.Box(low.astype(number), high.astype(number), shape, number)
    first = np.minimum(low, 0).astype(np.int64)
    sizes = high.astype(np.int64) - first + 1
    if shape == (1,):
        return spaces.Discrete(int(sizes[0]), start=int(first[0]))
    return spaces.MultiDiscrete(sizes, start=first)


def _picture(
    name: str, feature: Mapping[str, Any], role: Role, path: str, options: ReadOptions
) -> Column:
    about = {**(feature.get("info") or {}), **(feature.get("video_info") or {})}
    depth = any(about.get(key) for key in ("is_depth_map", "video.is_depth_map"))
    shape = _shape(name, feature)
    if depth or role == "actions" or len(shape) != 3:
        raise _unmappable(name, feature)
    names = [str(n).lower()[:1] for n in feature.get("names") or ()]
    first = names[:1] == ["c"] if len(names) == 3 else shape[0] in (1, 3, 4)
    height, width = shape[1:] if first else shape[:2]
    if not 0 < height * width <= MAX_PIXELS:
        raise _unmappable(name, feature)
    # what `fit_image` makes of one picture of that size, it makes of all
    fitted = fit_image(np.zeros((height, width), np.uint8), options.image_size).shape
    space = spaces.Box(0, 255, fitted, np.uint8)
    return Column(role, path, name, feature["dtype"], space, (fitted[1], fitted[0]))


def _shape(name: str, feature: Mapping[str, Any]) -> tuple[int, ...]:
    shape = feature.get("shape") or [1]
    if not isinstance(shape, list) or not all(isinstance(n, int) and n >= 0 for n in shape):
        raise _unmappable(name, feature)
    return tuple(shape)


def _numbers(name: str, feature: Mapping[str, Any]) -> int:
    """Return how many numbers a feature has in a frame; of pictures none, as they are resized."""
    pictures = feature.get("dtype") in ("image", "video")
    return 0 if pictures else math.prod(_shape(name, feature))


def _unmappable(name: str, feature: Mapping[str, Any]) -> ValueError:
    about = {**(feature.get("info") or {}), **(feature.get("video_info") or {})}
    depth = any(about.get(key) for key in ("is_depth_map", "video.is_depth_map"))
    what = "a depth map" if depth else f"{feature.get('dtype')!r} of shape {feature.get('shape')}"
    return ValueError(
        f"expected numbers, text or RGB pictures in feature {name!r}; got {what}. "
        f"Leave it out: --columns {name}="
    )


def _nested(leaves: Mapping[str, gym.Space]) -> spaces.Dict:
    tree: dict[str, Any] = {}
    for path, space in leaves.items():
        *folders, last = path.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
            if not isinstance(node, dict):
                raise ValueError(f"feature {path!r} lies below {folder!r}, which is one itself.")
        if last in node:
            raise ValueError(f"expected one feature as {path!r}; got another, or some below it.")
        node[last] = space

    def dict_of(node: dict[str, Any]) -> spaces.Dict:
        return spaces.Dict({k: dict_of(v) if isinstance(v, dict) else v for k, v in node.items()})

    return dict_of(tree)


def _brief(space: gym.Space) -> str:
    if isinstance(space, spaces.Text):
        return "text"
    shape = f"{space.dtype}{list(space.shape or ())}"
    if isinstance(space, spaces.Box):
        low, high = float(space.low.min()), float(space.high.max())
        whole = space.dtype.kind in "iu" and space.dtype.itemsize > 1 and low < -1e4
        return shape if whole or np.isinf(low) else f"{shape} in [{low:g}, {high:g}]"
    return str(space) if len(str(space)) < 60 else f"{type(space).__name__} {shape}"


def our_columns(spec: TaskSpec, images: Kind, targets: bool) -> list[Column]:
    """Return the features that a store of ours becomes.

    Args:
        spec: the store's task.
        images: ``video`` or ``image``: how pictures are kept.
        targets: whether the episodes hold the expert's clean actions beside the executed ones.

    Raises:
        ValueError: where two paths would get one name.
    """
    observed = flatten_space(spec.observation_space, "observation")
    acted = flatten_space(spec.action_space, "action")
    columns = [
        Column("observations", path, _feature_of(path, space), _kept(space, images), space)
        for path, space in observed.items()
    ]
    for role in ("actions", "targets") if targets else ("actions",):
        for path, space in acted.items():
            head = "action" if role == "actions" else "target"
            name = head if path == "action" and len(acted) == 1 else f"{head}.{_dotted(path)}"
            columns.append(Column(role, path, name, _kept(space, "array"), space))
    names = [c.feature for c in columns]
    for column in columns:
        if names.count(column.feature) > 1:
            raise ValueError(
                f"{spec.id!r}: more than one path would become the feature {column.feature!r}; "
                f"rename {column.path!r}."
            )
        if 0 in (column.space.shape or ()):
            raise ValueError(f"{spec.id!r}: LeRobot has no feature of no numbers ({column.path!r})")
    return columns


def _feature_of(path: str, space: gym.Space) -> str:
    if is_picture(space):
        return f"observation.images.{_dotted(path.removeprefix('images/'))}"
    return f"observation.{'state' if path == 'observation' else _dotted(path)}"


def _dotted(path: str) -> str:
    return path.replace("/", ".")


def _kept(space: gym.Space, images: Kind) -> Kind:
    if isinstance(space, spaces.Text):
        return "text"
    return images if is_picture(space) else "array"


def is_picture(space: gym.Space) -> bool:
    """Return whether LeRobot can keep a leaf as RGB pictures; others are arrays of numbers."""
    shape = space.shape or ()
    return isinstance(space, spaces.Box) and space.dtype == np.uint8 and shape[2:] == (3,)
