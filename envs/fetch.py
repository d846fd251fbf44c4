"""Fetch: a robot arm that reaches, pushes, slides, and picks and places, towards a goal it is told.

The observation keeps Gymnasium-Robotics' three vectors: the state, the place of what is to be
moved (the gripper itself in Reach), and the goal. The reward is -1 away from the goal and 0 at it.

An episode always lasts 50 decisions, and success is that the goal is held at the last of them: the
published measure (Plappert et al. 2018). Ending at the first touch would count as solved a puck
that slides across the goal and off the table.
"""

from __future__ import annotations

import contextlib
import importlib
import io
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from gato.envs.cameras import MuJoCoPictures, Rendered
from gato.envs.episode import TaskSpec, require_kind
from gato.envs.graphics import load_mujoco

SUITE = "fetch"
EXTRA = "fetch"
PACKAGES = ("gymnasium-robotics", "mujoco", "gymnasium")

MAX_STEPS = 50
CONTROL_HZ = 25.0  # 20 physics steps of 2 ms

TASKS = {
    "PickAndPlace": (25, "pick up the box and bring it to the goal"),
    "Push": (25, "push the box to the goal"),
    "Reach": (10, "move the gripper to the goal"),
    "Slide": (25, "slide the puck to the goal"),
}
"""By name: numbers in the state, and the instruction."""

pictures = MuJoCoPictures

PLANNED = "Slide"
"""The task whose rule alone seldom succeeds."""


def specs() -> dict[str, TaskSpec]:
    """Return the four tasks by id, ``fetch/Fetch<Name>-v4``."""
    return {
        f"{SUITE}/Fetch{name}-v4": TaskSpec(
            id=f"{SUITE}/Fetch{name}-v4",
            observation_space=_observation_space(observed),
            action_space=spaces.Box(-1.0, 1.0, (4,), np.float32),
            max_steps=MAX_STEPS,
            control_hz=CONTROL_HZ,
            instruction=instruction,
            measure="success",
            expert="planner" if name == PLANNED else "scripted",
        )
        for name, (observed, instruction) in TASKS.items()
    }


def make(spec: TaskSpec) -> gym.Env:
    """Return the task's environment; `unwrapped.model` and `.data` are MuJoCo's own."""
    load_mujoco()
    with contextlib.redirect_stderr(io.StringIO()):  # news about other environments
        gym.register_envs(importlib.import_module("gymnasium_robotics"))
    name = spec.id.split("/")[1]
    base = gym.make(name, disable_env_checker=True, render_mode="rgb_array").unwrapped
    return FetchEnv(base, spec)


def expert(spec: TaskSpec, kind: str) -> Any:
    """Return the scripted expert, which reads the observation alone, or the planner of Slide."""
    planned = PLANNED in spec.id
    require_kind(spec, kind, "scripted", *(["planner"] if planned else []))
    from gato.envs.experts.fetch import FetchExpert, SlideExpert

    return SlideExpert(spec) if kind == "planner" else FetchExpert(spec)


def _observation_space(observed: int) -> spaces.Dict:
    sizes = {"achieved_goal": 3, "desired_goal": 3, "observation": observed}
    return spaces.Dict(
        {key: spaces.Box(-np.inf, np.inf, (size,), np.float32) for key, size in sizes.items()}
    )


class FetchEnv(Rendered, gym.Wrapper):
    """A task in float32 whose goal is also drawn where it is."""

    def __init__(self, base: gym.Env, spec: TaskSpec) -> None:
        super().__init__(base)
        self.observation_space = spec.observation_space
        self.action_space = spec.action_space
        model, data = base.model, base.data
        self._goal_site = model.site("target0").id
        body = model.site_bodyid[self._goal_site]
        self._goal_origin = data.xpos[body].copy()  # of a body that never moves

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Start an episode; object and goal follow from `seed` alone."""
        base = self.unwrapped
        observation, info = base.reset(seed=seed, options=options)
        base.model.site_pos[self._goal_site] = base.goal - self._goal_origin
        return _float32(observation), {**info, "success": False}

    def step(
        self, action: np.ndarray
    ) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """Act; `info["success"]` is true while the goal is held."""
        observation, reward, terminated, truncated, info = self.unwrapped.step(action)
        info = {**info, "success": bool(info["is_success"])}
        return _float32(observation), float(reward), bool(terminated), bool(truncated), info


def _float32(observation: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {key: value.astype(np.float32) for key, value in sorted(observation.items())}
