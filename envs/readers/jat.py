"""Episodes in Parquet or Arrow, a row each, as the JAT data set is published.

```
continuous_observations   steps of numbers       continuous_actions   steps of numbers
discrete_observations     steps of integers      discrete_actions     an integer per step
image_observations        steps of pictures      rewards              a number per step
text_observations         a text per step
```

A location is a file, a folder of files, a folder of such folders (one per task, called as the
tasks are), what ``datasets.save_to_disk`` wrote, or a task of the published data set,
``hf:jat-project/jat-dataset/metaworld-assembly``, which is fetched.

The data name no spaces, no seeds, no way episodes end and no last observation. So integers have as
many values as they take, actions that are numbers lie in [-1, 1], an episode is truncated at its
end, and its last observation stands twice.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from gato.envs.episode import ANY_TEXT, Episode, TaskSpec
from gato.envs.readers import arrow
from gato.envs.readers.leaves import Leaf, acted, convert, in_words, observed
from gato.envs.readers.minari import UNKNOWN_HZ, cast_rewards
from gato.envs.readers.reader import MAX_PIXELS, BadItem, ReadOptions, Source, joined
from gato.envs.remote import fetch

FORMAT = "jat"
EXTRA = "readers"
CONTINUOUS, DISCRETE = "continuous_observations", "discrete_observations"
IMAGES, TEXTS = "image_observations", "text_observations"
OBSERVATIONS = (CONTINUOUS, DISCRETE, IMAGES, TEXTS)
MOVES, CHOICES = "continuous_actions", "discrete_actions"
ACTIONS = (MOVES, CHOICES)
REWARDS = "rewards"
FIELDS = (*OBSERVATIONS, *ACTIONS, REWARDS)
PUBLISHED = "hf:jat-project/jat-dataset"
MOST_VALUES = 1 << 16
"""That an integer may take; more are no choice but a quantity."""
_MODES = {"1": "L", "L": "L", "LA": "L", "P": "RGB", "RGB": "RGB", "RGBA": "RGBA"}


def recognises(location: str) -> bool:
    """Return whether files of this schema lie at a location."""
    if "://" in location:
        return False
    if location.startswith(PUBLISHED):
        return True
    try:
        files = arrow.tables(Path(location), "train", glance=True)
        names = arrow.column_names(files[0]) if files else []
    except (ImportError, OSError, ValueError):
        return False
    return REWARDS in names and any(name in names for name in ACTIONS)


def open_source(location: str, options: ReadOptions) -> Source:
    """Return the episodes at a location, a task for each folder of them.

    Raises:
        ValueError: where there are none, or a column is not as above, naming it.
    """
    root = _fetched(location) if location.startswith(PUBLISHED) else Path(location)
    groups: dict[str, list[Path]] = {}
    for file in arrow.tables(root, options.split):
        groups.setdefault(arrow.name_of(file, root), []).append(file)
    if not groups:
        raise ValueError(
            f"expected Parquet or Arrow files of split {options.split!r} at {location}; found none."
        )
    if options.task and len(groups) > 1:
        raise ValueError(
            f"expected one task at {location} to call {options.task!r}; got "
            f"{', '.join(sorted(groups))}. Name the folder of one."
        )
    if len(groups) == 1:
        ((name, files),) = groups.items()
        return _source(location, name, files, options)
    sources, broken = [], []
    for name, files in sorted(groups.items()):
        try:
            sources.append(_source(f"{location}/{name}", name, files, options))
        except ValueError as error:
            broken.append(BadItem(f"{location}/{name}", str(error)))
    if not sources:
        raise ValueError(f"{broken[0].where}: {broken[0].reason}")
    return joined(location, sources, broken)


def _source(location: str, name: str, files: list[Path], options: ReadOptions) -> Source:
    counts: Counter[str] = Counter()
    task = _open_task(name, files, options, counts)
    lengths = task.looked.lengths
    return Source(
        FORMAT,
        location,
        "episodes",
        partial(_read, task),
        tasks={task.spec.id: task.spec},
        items=len(lengths),
        steps=sum(lengths),
        fields=task.fields,
        notes=[
            *task.notes,
            "how episodes end is not in the data: all are truncated, the last observation twice",
            f"the rate of control is not in the data; {UNKNOWN_HZ:g} a second is assumed",
        ],
        counts=counts,
    )


def _fetched(location: str) -> Path:
    """Return a local copy of one task of the data set as it is published on the hub."""
    task = location.removeprefix(PUBLISHED).strip("/")
    if not task or "/" in task:
        raise ValueError(
            f"expected one task, as {PUBLISHED}/metaworld-assembly: all of them are hundreds of "
            f"gigabytes; got {location}."
        )
    return fetch(f"hf://datasets/{PUBLISHED.removeprefix('hf:')}/{task}")


@dataclass
class _Task:
    """One task, and what the columns of its files become."""

    spec: TaskSpec
    columns: dict[str, str]
    """Our field -> the data's."""
    seen: dict[str, Leaf]
    done: dict[str, Leaf]
    looked: _Looked
    fields: dict[str, str]
    notes: list[str]


@dataclass
class _Looked:
    """What a first look at a task's files has found."""

    files: list[Path] = field(default_factory=list)
    broken: list[BadItem] = field(default_factory=list)
    present: list[str] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    most: dict[str, int] = field(default_factory=dict)
    """The greatest integer of each column of them."""
    first: dict[str, np.ndarray] = field(default_factory=dict)
    """The first episode's columns."""
    opaque: bool = False


def _open_task(name: str, files: list[Path], options: ReadOptions, counts: Counter[str]) -> _Task:
    columns = _columns(files, options)
    looked = _look(files, columns)
    if not looked.first:
        reasons = "; ".join(bad.reason for bad in looked.broken[:1])
        raise ValueError(f"expected episodes in {files[0]}; none can be read. {reasons}".strip())
    seen = {n: _observed(n, looked, options) for n in OBSERVATIONS if n in columns}
    done = {n: acted(_acted(n, looked), options, counts) for n in ACTIONS if n in columns}
    named = {ours: leaf.about for ours, leaf in {**seen, **done}.items()} | {REWARDS: "rewards"}
    fields = {theirs: named[ours] for ours, theirs in columns.items()}
    fields |= {n: "left out" for n in looked.present if n not in columns.values()}
    instruction = options.instruction or ("" if TEXTS in seen else in_words(name))
    notes = [f"jat/{name}: the instruction is {instruction!r}"] if instruction else []
    if CHOICES in done:
        notes.append(f"jat/{name}: as many actions as occur; the world may have more")
    if len(done) == 1:
        ((only, leaf),) = done.items()
        done, columns["action"] = {"action": leaf}, columns.pop(only)
        action_space = leaf.space
    else:
        action_space = spaces.Dict({path: leaf.space for path, leaf in done.items()})
    spec = TaskSpec(
        id=options.task or f"jat/{name}",
        observation_space=spaces.Dict({path: leaf.space for path, leaf in seen.items()}),
        action_space=action_space,
        max_steps=max(looked.lengths),
        control_hz=UNKNOWN_HZ,
        instruction=instruction,
    )
    return _Task(spec, columns, seen, done, looked, fields, notes)


def _columns(files: list[Path], options: ReadOptions) -> dict[str, str]:
    """Return our field -> the data's, of those that the first readable file has."""
    unknown = sorted(set(options.columns) - set(FIELDS))
    if unknown:
        raise ValueError(f"expected columns of {', '.join(FIELDS)}; got {unknown[0]!r}.")
    present: list[str] = []
    for file in files:
        try:
            present = arrow.column_names(file)
            break
        except ValueError:
            if file == files[-1]:
                raise
    asked = {name: options.columns.get(name, name) for name in FIELDS}
    missing = sorted(set(options.columns.values()) - set(present))
    if missing:
        raise ValueError(f"expected column {missing[0]!r} in {file}; got {', '.join(present)}.")
    columns = {ours: theirs for ours, theirs in asked.items() if theirs in present}
    for kind, wanted in (("observations", OBSERVATIONS), ("actions", ACTIONS)):
        if not any(ours in columns for ours in wanted):
            raise ValueError(f"expected {kind} in {file}: {' or '.join(wanted)}; found none.")
    if REWARDS not in columns:
        raise ValueError(f"expected a column {REWARDS!r} in {file}; got {', '.join(present)}.")
    return columns


def _look(files: list[Path], columns: Mapping[str, str]) -> _Looked:
    """Read lengths and integers of all episodes, and all of the first."""
    looked = _Looked()
    whole = [n for n in (DISCRETE, CHOICES) if n in columns]
    for file in files:
        lengths: list[int] = []
        try:
            present = arrow.column_names(file)
            if looked.present and present != looked.present:
                raise ValueError(
                    f"expected columns {', '.join(looked.present)}, as before; got "
                    f"{', '.join(present)}"
                )
            for row in arrow.rows(file, [columns[n] for n in (REWARDS, *whole)]):
                with suppress(ValueError):  # a bad row, of which reading it will tell
                    found = arrow.inner(row[columns[REWARDS]])
                    for name in whole:
                        highest = arrow.highest(arrow.inner(row[columns[name]]))
                        looked.most[name] = max(looked.most.get(name, 0), highest)
                    lengths.append(len(found))
        except ValueError as error:
            looked.broken.append(BadItem(str(file), str(error)))
            continue
        looked.present = present
        looked.files.append(file)
        looked.lengths += lengths
        if not looked.first:
            wanted = [theirs for ours, theirs in columns.items() if ours not in (REWARDS, TEXTS)]
            for row in arrow.rows(file, wanted):
                with suppress(ValueError):
                    looked.first, looked.opaque = _look_at(row, columns)
                    break
    return looked


def _look_at(
    row: Mapping[str, Any], columns: Mapping[str, str]
) -> tuple[dict[str, np.ndarray], bool]:
    """Return an episode's columns, of pictures the first, and whether these have a blank alpha."""
    first: dict[str, np.ndarray] = {}
    opaque = False
    for name, theirs in columns.items():
        if name == IMAGES:
            picture = _decoded(arrow.inner(row[theirs]).slice(0, 1), opaque=False)
            opaque = picture.shape[-1] == 4 and bool((picture[..., 3] == 255).all())
            first[name] = picture[..., :3] if opaque else picture
        elif name not in (REWARDS, TEXTS):
            first[name] = arrow.array(arrow.inner(row[theirs]))
    return first, opaque


def _observed(name: str, looked: _Looked, options: ReadOptions) -> Leaf:
    if name == TEXTS:
        return observed(ANY_TEXT(), options)
    shape = looked.first[name].shape[1:]
    if name == IMAGES:
        return observed(spaces.Box(0, 255, shape, np.uint8), options)
    if name == CONTINUOUS:
        return observed(spaces.Box(-np.inf, np.inf, shape, np.float32), options)
    return observed(_integers(name, looked), options)


def _acted(name: str, looked: _Looked) -> gym.Space:
    if name == MOVES:
        return spaces.Box(-1.0, 1.0, looked.first[name].shape[1:], np.float32)
    return _integers(name, looked)


def _integers(name: str, looked: _Looked) -> gym.Space:
    values, shape = looked.most[name] + 1, looked.first[name].shape[1:]
    if values > MOST_VALUES:
        raise ValueError(
            f"expected integers below {MOST_VALUES} as {name}; got {looked.most[name]}. Store "
            f"quantities as continuous numbers."
        )
    return spaces.MultiDiscrete(np.full(shape, values)) if shape else spaces.Discrete(values)


def _read(task: _Task) -> Iterator[Episode | BadItem]:
    yield from task.looked.broken
    for file in task.looked.files:
        yield from _read_file(task, file)


def _read_file(task: _Task, file: Path) -> Iterator[Episode | BadItem]:
    number = 0
    try:
        for number, row in enumerate(arrow.rows(file, list(task.columns.values()))):
            try:
                yield _episode(task, row)
            except ValueError as error:
                yield BadItem(f"{file}, row {number}", str(error))
    except ValueError as error:
        yield BadItem(f"{file}, after row {number}", str(error))


def _episode(task: _Task, row: Mapping[str, Any]) -> Episode:
    raw = {name: arrow.inner(row[theirs]) for name, theirs in task.columns.items()}
    steps = len(raw[REWARDS])
    for name, values in raw.items():
        if len(values) != steps:
            raise ValueError(f"expected {steps} steps of {name}, as of rewards; got {len(values)}")
    if not steps:
        raise ValueError("expected at least one step; got none")
    columns: dict[str, Any] = {}
    for name, values in raw.items():
        try:
            if name == TEXTS:
                columns[name] = values.to_pylist()
            elif name == IMAGES:
                columns[name] = _decoded(values, task.looked.opaque)
            else:
                columns[name] = arrow.array(values)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    seen = {name: columns[name] for name in task.seen}
    if DISCRETE in seen and seen[DISCRETE].min() < 0:
        raise ValueError(f"{DISCRETE}: expected 0 or more; got {seen[DISCRETE].min()}")
    observations = convert(seen, task.seen, "observation")
    for name, column in observations.items():  # the last observation is not in the data
        last = column[-1:]
        twice = isinstance(column, np.ndarray)
        observations[name] = np.concatenate([column, last]) if twice else [*column, *last]
    truncated = np.zeros(steps, bool)
    truncated[-1] = True
    return Episode(
        task=task.spec.id,
        observations=observations,
        actions=convert({name: columns[name] for name in task.done}, task.done, "action"),
        rewards=cast_rewards(columns[REWARDS]),
        terminated=np.zeros(steps, bool),
        truncated=truncated,
        instruction=task.spec.instruction,
    )


def _decoded(pictures: Any, opaque: bool) -> np.ndarray:
    """Return steps of encoded pictures, ``{"bytes": ..., "path": ...}`` each, as one array."""
    found = []
    for step, value in enumerate(pictures.to_pylist()):
        data = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(data, bytes):
            raise ValueError(f"expected an encoded picture at step {step}; got {value!r:.80}")
        found.append(_picture(data, step))
        if found[-1].shape != found[0].shape:
            raise ValueError(
                f"pictures of different sizes: {found[0].shape} at step 0 and "
                f"{found[-1].shape} at step {step}"
            )
    if not found:
        raise ValueError("expected pictures; got none")
    whole = np.stack(found)
    return whole[..., :3] if opaque and whole.shape[-1] == 4 else whole


def _picture(data: bytes, step: int) -> np.ndarray:
    """Return one picture, (H, W, C): four channels are kept as they are, frames stacked in them."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP", "BMP")) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                size = f"{picture.width}x{picture.height}"
                raise ValueError(f"a picture of {size}, more than {MAX_PIXELS} pixels")
            mode = _MODES.get(picture.mode, "RGB")
            pixels = np.array(picture if picture.mode == mode else picture.convert(mode))
    except Exception as error:  # damaged data end decoders in every way there is
        raise ValueError(f"step {step}: {error or type(error).__name__}") from error
    return pixels[..., None] if pixels.ndim == 2 else pixels
