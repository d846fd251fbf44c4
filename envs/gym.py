"""Any registered Gymnasium environment as a task: ``gym/<registered id>``."""

from __future__ import annotations

import difflib
from typing import Any

import gymnasium

from gato.envs.episode import TaskSpec, require_kind, space_to_json

SUITE = "gym"
EXTRA = "all"
PACKAGES = ("gymnasium",)

DEFAULT_MAX_STEPS = 1000
"""The time limit where the registration names none."""


def specs() -> dict[str, TaskSpec]:
    """Return nothing: what is registered depends on the process; see `find`."""
    return {}


def find(task_id: str) -> TaskSpec | None:
    """Return the spec of ``gym/<registered id>``, which starts the environment once.

    Raises:
        ValueError: where the id is not registered, or its environment does not start.
        TypeError: for spaces that no codec covers.
    """
    name = task_id.removeprefix(f"{SUITE}/")
    try:
        registered = gymnasium.spec(name)
    except gymnasium.error.Error as error:
        close = difflib.get_close_matches(name, gymnasium.registry, n=3)
        hint = f"closest: {', '.join(f'gym/{c}' for c in close)}" if close else str(error)
        raise ValueError(f"expected a registered Gymnasium id; got {name!r} ({hint}).") from error
    env = _make(name)
    try:
        space_to_json(env.observation_space), space_to_json(env.action_space)
        return TaskSpec(
            id=task_id,
            observation_space=env.observation_space,
            action_space=env.action_space,
            max_steps=registered.max_episode_steps or DEFAULT_MAX_STEPS,
            control_hz=float(env.metadata.get("render_fps") or 1.0),
        )
    finally:
        env.close()


def make(spec: TaskSpec) -> gymnasium.Env:
    """Return the environment, without Gymnasium's own time limit and checker."""
    return _make(spec.id.removeprefix(f"{SUITE}/"))


def expert(spec: TaskSpec, kind: str) -> Any:
    """Refuse: these environments come without an expert."""
    require_kind(spec, kind)


def _make(name: str) -> gymnasium.Env:
    try:
        return gymnasium.make(name, disable_env_checker=True, max_episode_steps=-1)
    except gymnasium.error.DependencyNotInstalled as error:
        raise ValueError(f"gym/{name} needs another package: {error}") from error
