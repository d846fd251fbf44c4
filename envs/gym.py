"""Any registered Gymnasium environment as a task: ``gym/<registered id>``.

One that a module of the user's registers is ``gym/<module>:<registered id>``, as in Gymnasium
itself: the module is imported wherever the task is started, in worker processes too. After
`import_module`, which ``--import`` calls, the module may be left out.

Importing runs code. So a task that is named by a file (a store, a checkpoint) and not by the user
is started only where its module is imported already; see `require_imported`.
"""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Iterable
from typing import Any

import gymnasium

from gato.envs import cameras
from gato.envs.episode import TaskSpec, require_kind, space_to_json

SUITE = "gym"
EXTRA = "all"
PACKAGES = ("gymnasium",)

DEFAULT_MAX_STEPS = 1000
"""The time limit where the registration names none."""

_modules: dict[str, str] = {}
"""The modules given to `import_module`, by the ids that they register."""
_found: dict[str, tuple[Any, TaskSpec]] = {}
"""Specs by the name asked for, each with its registration: finding one starts the environment."""


def specs() -> dict[str, TaskSpec]:
    """Return nothing: what is registered depends on the process; see `find`."""
    return {}


def import_module(name: str) -> list[str]:
    """Import a module that registers environments, and return their task ids.

    It is also looked for in the current folder, as Python does for a script there.

    Raises:
        ValueError: where it does not import, or registers nothing.
    """
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # worker processes are given our path
    before = set(gymnasium.registry)
    _import(name)
    new = [i for i in gymnasium.registry if i not in before or _modules.get(i) == name]
    if not new:
        raise ValueError(
            f"expected a module that registers environments; {name!r} registers none. Call "
            f"gymnasium.register(id=..., entry_point=...) in it."
        )
    _modules.update(dict.fromkeys(new, name))
    _found.clear()  # ids from now on name the module
    return [f"{SUITE}/{name}:{i}" for i in new]


def imported() -> list[str]:
    """Return the ids of the tasks that imported modules have registered."""
    return sorted(f"{SUITE}/{m}:{i}" for i, m in _modules.items() if i in gymnasium.registry)


def require_imported(task_ids: Iterable[str]) -> None:
    """Refuse task ids, read from a file, that would import a module nobody has asked for.

    Raises:
        ValueError: for the first such id, with what to do.
    """
    for task_id in task_ids:
        suite, _, name = cameras.split(task_id)[0].partition("/")
        module = name.rpartition(":")[0]
        if suite == SUITE and module and module not in sys.modules:
            raise ValueError(
                f"expected tasks whose modules are imported; a file names {task_id!r}, and what "
                f"it imports runs on this machine. If you trust it, run with --import {module}."
            )


def find(task_id: str) -> TaskSpec | None:
    """Return the spec of ``gym/<registered id>``, which starts the environment the first time.

    The id of the spec names the module that registers the environment, where it is one of ours.

    Raises:
        ValueError: where the id is not registered, or its environment does not start.
        TypeError: for spaces that no codec covers.
    """
    name = task_id.removeprefix(f"{SUITE}/")
    registered = _registered(name)
    module = _modules.get(name)
    known, spec = _found.get(name, (None, None))
    if known is registered:
        return spec
    env = _make(name)
    try:
        space_to_json(env.observation_space), space_to_json(env.action_space)
        spec = TaskSpec(
            id=f"{SUITE}/{module}:{name}" if module else task_id,
            observation_space=env.observation_space,
            action_space=env.action_space,
            max_steps=registered.max_episode_steps or DEFAULT_MAX_STEPS,
            control_hz=float(env.metadata.get("render_fps") or 1.0),
        )
    finally:
        env.close()
    _found[name] = registered, spec
    return spec


def make(spec: TaskSpec) -> gymnasium.Env:
    """Return the environment, without Gymnasium's own time limit and checker."""
    return _make(spec.id.removeprefix(f"{SUITE}/"))


def expert(spec: TaskSpec, kind: str) -> Any:
    """Refuse: these environments come without an expert."""
    require_kind(spec, kind)


def _registered(name: str) -> gymnasium.envs.registration.EnvSpec:
    module, _, own = name.rpartition(":")
    if module:
        _import(module)
    try:
        return gymnasium.spec(own)
    except gymnasium.error.Error as error:
        close = difflib.get_close_matches(own, gymnasium.registry, n=3)
        prefix = f"{SUITE}/{module}:" if module else f"{SUITE}/"
        hint = f" (closest: {', '.join(prefix + c for c in close)})" if close else ""
        raise ValueError(
            f"expected {prefix} and the id of a registered Gymnasium environment; got "
            f"'{SUITE}/{name}'{hint}. Name a module that registers your own with --import MODULE."
        ) from error


def _import(module: str) -> None:
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise ValueError(
            f"expected a module that registers environments; {module!r} does not import "
            f"({error}). Install it, or run where it lies with --import {module}."
        ) from error


def _make(name: str) -> gymnasium.Env:
    try:
        return gymnasium.make(
            name, disable_env_checker=True, max_episode_steps=-1, **_render_mode(name)
        )
    except gymnasium.error.DependencyNotInstalled as error:
        raise ValueError(f"gym/{name} needs another package: {error}") from error


def _render_mode(name: str) -> dict[str, str]:
    """Return the option that lets `render` return a picture, where the environment has it."""
    entry = _registered(name).entry_point
    creator = gymnasium.envs.registration.load_env_creator(entry) if type(entry) is str else entry
    modes = getattr(creator, "metadata", {}).get("render_modes", ())
    return {"render_mode": "rgb_array"} if "rgb_array" in modes else {}
