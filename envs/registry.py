"""The registry of tasks: what exists, what it looks like, and how to start it.

A suite is one file of this folder named in `SUITES`. It holds data and two functions, and imports
its simulator only inside them, so that listing tasks needs no simulator:

```
SUITE = "metaworld"                     first part of its task ids
EXTRA = "metaworld"                     the extra that installs it: pip install "gato[metaworld]"
PACKAGES = ("metaworld", "mujoco")      distributions whose versions stand beside its results
PROTOCOL = {"frame_skip": 4}            optional: what else decides its scores
specs() -> dict[str, TaskSpec]          every task by id; pure data, without scores
make(spec) -> gymnasium.Env             spaces equal to the spec's; info["success"] where defined
expert(spec, kind) -> Expert            kind: "scripted" or "planner"; ValueError where it has none
find(task_id) -> TaskSpec | None        optional: a task that is not worth listing (gym/<id>)
pictures(env, view) -> Pictures         optional: what its cameras see (see `cameras`)
```

`make` here adds the time limit, so a suite's own environment may leave it out. Scores come from
the table of `references`.
"""

from __future__ import annotations

import difflib
import fnmatch
import importlib
import platform
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import gymnasium as gym

from gato.envs import cameras
from gato.envs.episode import TaskSpec
from gato.envs.references import references

SUITES = ("atari", "babyai", "dm_control", "fetch", "gym", "metaworld", "mujoco")
KINDS = ("scripted", "planner")
"""Experts that come with a suite; one that was learned is named by its folder."""


class Expert(Protocol):
    """A policy with a published score that may look inside the simulator."""

    def reset(self, env: gym.Env, seed: int) -> None:
        """Start an episode; `env` has just been reset. `seed` is for the expert's own chance."""

    def act(self, env: gym.Env, observation: Any) -> Any:
        """Return the expert's action, an element of the action space, at the present state."""


def task_ids(pattern: str = "*") -> list[str]:
    """Return the listed task ids that match a shell-style pattern, sorted.

    Options after a pattern (see `cameras`) are given to each: ``metaworld/*?camera=corner2``.
    """
    base, options = cameras.split(pattern)
    known = [task_id for suite in SUITES for task_id in _specs(suite)]
    found = sorted(fnmatch.filter(known, base))
    return [f"{task_id}?{options}" for task_id in found] if options else found


def matches(task_id: str, pattern: str) -> bool:
    """Return whether a pattern names a task; one without options, whatever the task's are.

    The module in the id of an imported one (see `gym`) may be left out of the pattern.

    >>> matches("babyai/GoTo-v0?camera=grid", "babyai/*"), matches("babyai/GoTo-v0", "babyai/G?")
    (True, False)
    >>> matches("gym/my_worlds:Walk-v0", "gym/Walk-*"), matches("gym/my_worlds:Walk-v0", "gym/my*")
    (True, True)
    """
    (base, given), (wanted, options) = cameras.split(task_id), cameras.split(pattern)
    suite, name = base.split("/", 1)
    short = f"{suite}/{name.rpartition(':')[2]}"
    named = any(fnmatch.fnmatchcase(n, wanted) for n in (base, short))
    return named and options in ("", given)


def spec(task_id: str) -> TaskSpec:
    """Return the spec of a task; its id may ask for pictures (see `cameras`).

    Raises:
        ValueError: for an unknown id, with the closest known ones.
    """
    base_id, options = cameras.split(task_id)
    if options:
        base = spec(base_id)
        _drawing(base)
        return cameras.with_pictures(base, task_id, cameras.view(options, task_id))
    suite = task_id.split("/")[0]
    if suite in SUITES:
        found = _specs(suite).get(task_id)
        if found is None and hasattr(_suite(suite), "find"):
            found = _suite(suite).find(task_id)
            found = found and _scored(found)
        if found is not None:
            return found
    close = difflib.get_close_matches(task_id, task_ids(), n=3, cutoff=0.5)
    hint = f"closest: {', '.join(close)}" if close else f"suites: {', '.join(SUITES)}"
    raise ValueError(f"expected a known task id; got {task_id!r} ({hint}).")


def make(task_id: str, seed: int | None = None) -> gym.Env:
    """Return the environment of a task, with the spec's spaces and time limit.

    Args:
        task_id: an id of `task_ids()` or ``gym/<registered id>``.
        seed: where given, seeds the action space and resets the environment once with it.

    Raises:
        ValueError: for an unknown task, or one whose simulator is not installed.
    """
    task = spec(task_id)
    module = _suite(task.suite)
    base_id, options = cameras.split(task_id)
    try:
        env = module.make(spec(base_id) if options else task)
    except ImportError as error:
        raise _missing(task, module, error) from error
    if options:
        env = _see(env, task, options)
    env = gym.wrappers.TimeLimit(env, task.max_steps)
    if seed is not None:
        env.action_space.seed(seed)
        env.reset(seed=seed)
    return env


def has_expert(task_id: str) -> bool:
    """Return whether a task comes with an expert; a learned one has to be trained first."""
    return spec(task_id).expert in KINDS


def make_expert(task_id: str, kind: str = "auto") -> Expert:
    """Return an expert of a task; it is reset with the environment that it will act in.

    Args:
        task_id: a task.
        kind: ``auto`` for the task's own choice, ``scripted``, ``planner``, or the folder of a
            learned one.

    Raises:
        ValueError: where the task has no such expert, or its simulator is not installed.
    """
    task = spec(task_id)
    base_id, options = cameras.split(task_id)
    if options:
        return cameras.BaseExpert(make_expert(base_id, kind))
    if kind == "auto" and not has_expert(task_id):
        raise ValueError(
            f"expected a task with an expert; {task_id!r} has none that comes with it. Train one "
            f"(gato experts train {task_id!r} --out DIR) and give --expert DIR, or choose another "
            f"task."
        )
    if kind not in ("auto", *KINDS):
        return _learned(task, kind)
    module = _suite(task.suite)
    try:
        return module.expert(task, task.expert if kind == "auto" else kind)
    except ImportError as error:
        raise _missing(task, module, error) from error


def _learned(task: TaskSpec, folder: str) -> Expert:
    if not Path(folder).is_dir():
        raise ValueError(
            f"expected an expert of {task.id!r} that is auto, {', '.join(KINDS)} or the folder of "
            f"a learned one; got {folder!r}."
        )
    from gato.envs.experts.learned import LearnedExpert

    return LearnedExpert(task, folder)


def folder_of(task_id: str) -> str:
    """Return the path, of plain characters, under which what belongs to a task is kept.

    >>> folder_of("metaworld/push-v3?camera=corner2&size=80x64")
    'metaworld/push-v3,camera-corner2,size-80x64'
    """
    return task_id.translate(str.maketrans("?&=:", ",,-."))


def packages(suite: str) -> tuple[str, ...]:
    """Return the distributions whose versions belong beside a suite's data and results."""
    return _suite(suite).PACKAGES


def versions(*suites: str) -> dict[str, str]:
    """Return the versions of Python and of what these suites run on."""
    found = {"python": platform.python_version()}
    for name in dict.fromkeys(name for suite in suites for name in packages(suite)):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"  # starting an environment will name the extra
    return found


def protocol(suite: str) -> dict[str, Any]:
    """Return what, beside versions, decides a suite's scores: sticky actions, frame skip."""
    return dict(getattr(_suite(suite), "PROTOCOL", {}))


def _see(env: gym.Env, task: TaskSpec, options: str) -> gym.Env:
    view = cameras.view(options, task.id)
    try:
        return cameras.CameraEnv(env, task, view, _drawing(task)(env, view))
    except ValueError:
        env.close()
        raise


def _drawing(task: TaskSpec) -> Callable[[gym.Env, cameras.View], cameras.Pictures]:
    found = getattr(_suite(task.suite), "pictures", None)
    if found is None:
        seeing = (name for name in SUITES if hasattr(_suite(name), "pictures"))
        raise ValueError(
            f"expected {task.id!r} without options: its suite has no cameras. Those of "
            f"{', '.join(seeing)} have."
        )
    return found


def _missing(task: TaskSpec, module: ModuleType, error: ImportError) -> ValueError:
    return ValueError(
        f"{task.id!r} needs the simulator of suite {task.suite!r}, which does not import "
        f'({error}). Install it: pip install "gato[{module.EXTRA}]"'
    )


@cache
def _suite(name: str) -> ModuleType:
    if name not in SUITES:
        raise ValueError(f"expected a suite of {', '.join(SUITES)}; got {name!r}.")
    module = importlib.import_module(f"gato.envs.{name}")
    assert module.SUITE == name, (name, module.SUITE)
    return module


@cache
def _specs(suite: str) -> dict[str, TaskSpec]:
    return {task_id: _scored(spec) for task_id, spec in _suite(suite).specs().items()}


def _scored(spec: TaskSpec) -> TaskSpec:
    """Return `spec` with the reference scores that the table has for it.

    Where that of the expert is a learned one's, and no other comes with the task, so is its expert.
    """
    rows = references().get(spec.id, {})
    learned = "expert" in rows and rows["expert"].expert.startswith("learned")
    if learned and spec.expert == "none":
        spec = replace(spec, expert="learned")
    scores = {f"{policy}_score": row.mean for policy, row in rows.items()}
    source = "; ".join(row.describe() for row in rows.values())
    return replace(spec, **scores, score_source=source)
