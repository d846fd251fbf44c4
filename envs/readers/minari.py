"""Minari data sets, by the path of their folder or, of those on this machine, by ``minari:<id>``;
or a folder of such data sets, or ``minari:<the beginning of their ids>``.

What becomes of them: observations and actions keep their names, pictures become (H, W, 1 or 3), the
seed and the ends of episodes stay, reference scores become those of a random policy and an expert,
``infos["success"]`` at the last step becomes success; other infos are left out. What was exported
from a store (see `minari_writer`) comes back whole.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import gymnasium as gym
import numpy as np

from gato.envs.episode import Episode, TaskSpec, flatten_value
from gato.envs.readers.json_stream import parse_json
from gato.envs.readers.leaves import (
    Leaf,
    acted,
    as_is,
    convert,
    in_words,
    leaves_of,
    observed,
    replaced,
)
from gato.envs.readers.reader import BadItem, ReadOptions, Source, joined
from gato.envs.readers.untrusted import check_spaces

FORMAT = "minari"
EXTRA = "readers"
IGNORES = ("split", "columns")
KEPT = "gato"
"""Name, in a data set's metadata and its episodes' infos, of what only a store of ours knows."""
SUCCESS = ("success", "is_success")
UNKNOWN_HZ = 1.0
_BY_ID = "minari:"
_LOOKED_AT = 2000  # entries of a folder, to tell what it holds


def recognises(location: str) -> bool:
    """Return whether a location holds, or names, Minari data sets on this machine."""
    return location.startswith(_BY_ID) or bool(_data_sets(place(location), glance=True))


def open_source(location: str, options: ReadOptions) -> Source:
    """Return the data set at a location, or all in the folder there.

    Raises:
        ValueError: where there is none, or it has spaces that no modality reads.
    """
    folders = _data_sets(place(location))
    if not folders:
        raise ValueError(
            f"expected a Minari data set at {location}; none is here. If it is one of Minari's, "
            f"fetch it first: minari download {location.removeprefix(_BY_ID)}"
        )
    if len(folders) == 1:
        return _open(location, folders[0], options)
    sources, broken = [], []
    for folder in folders:
        try:
            sources.append(_open(str(folder), folder, options))
        except ValueError as error:
            broken.append(BadItem(str(folder), str(error)))
    if not sources:
        raise ValueError(f"{broken[0].where}: {broken[0].reason}")
    return joined(location, sources, broken)


def _open(location: str, folder: Path, options: ReadOptions) -> Source:
    import minari

    metadata = _metadata(folder)
    for name in ("observation_space", "action_space"):
        if not isinstance(metadata.get(name), str):
            # Minari would start the environment, and with it whatever code the file names
            raise ValueError(f"expected {name!r} in {folder}/metadata.json; it names none.")
        check_spaces(parse_json(metadata[name].encode()), f"{folder}/metadata.json")
    try:
        data = minari.MinariDataset(folder)
        longest = _longest(data)
    except ImportError:
        raise
    except Exception as error:  # damaged files end the libraries below in every way there is
        raise ValueError(f"expected a Minari data set at {location}; {error!s:.300}") from error
    counts: Counter[str] = Counter()
    kept = metadata.get(KEPT)
    # what a store held comes back as it was: a picture (H, W) stays one
    see = as_is if kept and options.image_size is None else partial(observed, options=options)
    seen = leaves_of(data.observation_space, "observation", see, location)
    done = leaves_of(
        data.action_space, "action", lambda leaf: acted(leaf, options, counts), location
    )
    spec = (
        _kept_spec(kept, seen, options)
        if kept
        else _spec(data, metadata, seen, done, options, longest)
    )
    fields = {f"observations: {path}": leaf.about for path, leaf in seen.items()}
    fields |= {f"actions: {path}": leaf.about for path, leaf in done.items()}
    fields |= {"rewards": "float32", "infos": "left out, but for success"}
    read = partial(_read, data, spec, seen, done, str(folder), options.instruction)
    return Source(
        FORMAT,
        location,
        "episodes",
        read,
        tasks={spec.id: spec},
        items=int(data.total_episodes),
        steps=int(data.total_steps),
        hours=data.total_steps / spec.control_hz / 3600 if kept else None,
        fields=fields,
        notes=[] if kept else [*_notes(metadata, spec), *_losses(metadata, seen)],
        counts=counts,
        made={spec.id: {k: kept[k] for k in ("settings", "versions")}} if kept else {},
    )


def place(location: str) -> Path | None:
    """Return the folder that a location names, if it is on this machine."""
    if "://" in location:
        return None
    folder = Path(location)
    if location.startswith(_BY_ID):
        named = os.environ.get("MINARI_DATASETS_PATH")
        root = Path(named) if named else Path.home() / ".minari" / "datasets"
        folder = root / location.removeprefix(_BY_ID)
    return folder if folder.is_dir() else None


def _data_sets(folder: Path | None, *, glance: bool = False) -> list[Path]:
    """Return the folders in a folder that hold metadata.json, as Minari lays them out."""
    if folder is None:
        return []
    for itself in (folder, folder / "data"):
        if _is_data(itself):
            return [itself]
    found, seen = [], 0
    for inside, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        seen += len(folders) + len(files)
        if "metadata.json" in files and _is_data(Path(inside)):
            found.append(Path(inside))
            folders.clear()
        if glance and (found or seen > _LOOKED_AT):
            break
    return found


def _is_data(folder: Path) -> bool:
    try:
        metadata = _metadata(folder)
    except (OSError, ValueError):
        return False
    return {"total_episodes", "minari_version", "dataset_id"} <= metadata.keys()


def _metadata(folder: Path) -> dict[str, Any]:
    metadata = json.loads((folder / "metadata.json").read_text(encoding="utf-8"))
    if not isinstance(metadata, dict):
        raise ValueError(f"expected an object in {folder}/metadata.json")
    return metadata


def _longest(data: Any) -> int:
    """Return the time limit of the world, or the steps of the longest episode."""
    limit = getattr(data.env_spec, "max_episode_steps", None)
    if limit:
        return int(limit)
    lengths, fault = [], None
    for index in _all(data):
        try:
            (about,) = data.storage.get_episode_metadata([index])
            lengths.append(int(about.get("total_steps", 1)))
        except Exception as error:  # an episode that reading will tell of
            fault = error
    if not lengths and fault is not None:
        raise fault
    return max(lengths, default=1)


def _spec(
    data: Any,
    metadata: Mapping[str, Any],
    seen: dict[str, Leaf],
    done: dict[str, Leaf],
    options: ReadOptions,
    longest: int,
) -> TaskSpec:
    low, high = metadata.get("ref_min_score"), metadata.get("ref_max_score")
    has_text = any(isinstance(leaf.space, gym.spaces.Text) for leaf in seen.values())
    named = options.instruction or ("" if has_text else in_words(str(data.id)))
    return TaskSpec(
        id=options.task or f"minari/{data.id}",
        observation_space=replaced(data.observation_space, seen, "observation"),
        action_space=replaced(data.action_space, done, "action"),
        max_steps=longest,
        control_hz=UNKNOWN_HZ,
        instruction=named,
        measure="return",
        random_score=None if low is None else float(low),
        expert_score=None if high is None else float(high),
        score_source="" if low is None and high is None else f"Minari's of {data.id}",
    )


def _kept_spec(kept: Mapping[str, Any], seen: dict[str, Leaf], options: ReadOptions) -> TaskSpec:
    try:
        if not all(isinstance(kept[name], dict) for name in ("spec", "settings", "versions")):
            raise TypeError(f"got {kept!r:.200}")
        check_spaces(kept["spec"], "metadata.json")
        spec = TaskSpec.from_json(kept["spec"])
        return replace(
            spec,
            id=options.task or spec.id,
            instruction=options.instruction or spec.instruction,
            observation_space=replaced(spec.observation_space, seen, "observation"),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"expected spec, settings and versions as {KEPT!r} in metadata.json; {error}"
        ) from error


def _notes(metadata: Mapping[str, Any], spec: TaskSpec) -> list[str]:
    notes = [f"the rate of control is not in the data; {UNKNOWN_HZ:g} a second is assumed"]
    if spec.instruction:
        notes.append(f"the instruction is {spec.instruction!r}; --instruction gives another")
    if isinstance(metadata.get("env_spec"), str):
        try:
            world = json.loads(metadata["env_spec"]).get("id")
        except (ValueError, AttributeError):
            world = None
        if world and spec.suite == FORMAT:
            notes.append(
                f"made in {world}; --task gym/{world} makes the episodes those of that task"
            )
    return notes


def _losses(metadata: Mapping[str, Any], seen: dict[str, Leaf]) -> Iterator[str]:
    if metadata.get("jpeg_encoding", True) and any("picture" in v.about for v in seen.values()):
        yield "pictures of 32 x 32 or more are JPEG in the data: what was lost is lost"


def _all(data: Any) -> list[int]:
    return [int(i) for i in data.episode_indices]


def _read(
    data: Any,
    spec: TaskSpec,
    seen: dict[str, Leaf],
    done: dict[str, Leaf],
    folder: str,
    instruction: str,
) -> Iterator[Episode | BadItem]:
    spaces = data.observation_space, data.action_space
    for index in _all(data):
        try:
            (raw,) = data.storage.get_episodes([index])
            (about,) = data.storage.get_episode_metadata([index])
            yield _episode(raw, about, spec, spaces, seen, done, instruction)
        except ImportError:
            raise
        except Exception as error:  # damaged files end the libraries below in every way there is
            reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            reason = reason or type(error).__name__
            yield BadItem(f"{folder}, episode {index}", reason)


def _episode(
    raw: Mapping[str, Any],
    about: Mapping[str, Any],
    spec: TaskSpec,
    spaces: tuple[gym.Space, gym.Space],
    seen: dict[str, Leaf],
    done: dict[str, Leaf],
    instruction: str,
) -> Episode:
    steps = len(raw["rewards"])
    if "total_steps" in about and int(about["total_steps"]) != steps:
        raise ValueError(f"expected {about['total_steps']} steps; {steps} can be read")
    observations = flatten_value(spaces[0], raw["observations"], "observation")
    actions = flatten_value(spaces[1], raw["actions"], "action")
    infos = raw.get("infos") or {}
    own = _own(infos)
    targets = None
    if "targets" in infos and own:
        flat = {p: infos["targets"][quote(p, safe="")] for p in actions}
        targets = convert({p: _decoded(c) for p, c in flat.items()}, done, "targets")
    return Episode(
        task=spec.id,
        observations=convert(observations, seen, "observation"),
        actions=convert(actions, done, "action"),
        rewards=cast_rewards(raw["rewards"]),
        terminated=np.asarray(raw["terminations"]).astype(bool),
        truncated=np.asarray(raw["truncations"]).astype(bool),
        targets=targets,
        instruction=instruction or own.get("instruction", spec.instruction),
        seed=_seed(about.get("seed")),
        success=own["success"] if own else _success(infos),
        info=own.get("info", {}),
    )


def cast_rewards(rewards: Any) -> np.ndarray:
    """Return rewards as stores hold them; those beyond float32 become infinite, and are refused."""
    with np.errstate(over="ignore"):
        return np.asarray(rewards).astype(np.float32)


def _own(infos: Mapping[str, Any]) -> dict[str, Any]:
    """Return what `minari_writer` has kept of an episode beside its columns."""
    kept = infos.get(KEPT)
    if kept is None or len(kept) != 1:
        return {}
    text = kept[0]
    found = json.loads(text.decode() if isinstance(text, bytes) else text)
    return found if isinstance(found, dict) and "success" in found else {}


def _decoded(column: Any) -> Any:
    """Return a column of infos with its texts, which are bytes there, as str."""
    values = list(column)
    return [v.decode() for v in values] if values and isinstance(values[0], bytes) else column


def _seed(seed: Any) -> int:
    """Return an episode's seed; 0 where it has none, or one that no store can hold."""
    return int(seed) if seed is not None and 0 <= int(seed) < 1 << 63 else 0


def _success(infos: Mapping[str, Any]) -> bool | None:
    for name in SUCCESS:
        column = infos.get(name)
        if isinstance(column, np.ndarray) and column.ndim == 1 and column.dtype.kind in "biuf":
            return bool(column[-1] > 0) if len(column) else None
    return None
