"""Gymnasium's eleven MuJoCo tasks: walkers, swimmers, pendulums and two arms.

The observation is one vector, without the global position of what walks; the reward is the
simulator's own. Walkers that fall end the episode.
"""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from gato.envs.cameras import FREE, MuJoCoPictures, Rendered
from gato.envs.episode import TaskSpec, require_kind
from gato.envs.graphics import load_mujoco

SUITE = "mujoco"
EXTRA = "mujoco"
PACKAGES = ("gymnasium", "mujoco")

TASKS = {
    "Ant": (105, 8, 1.0, 1000, 20.0, "run forward on four legs"),
    "HalfCheetah": (17, 6, 1.0, 1000, 20.0, "run forward"),
    "Hopper": (11, 3, 1.0, 1000, 125.0, "hop forward on one leg"),
    "Humanoid": (348, 17, 0.4, 1000, 1 / 0.015, "run forward on two legs"),
    "HumanoidStandup": (348, 17, 0.4, 1000, 1 / 0.015, "stand up from the floor"),
    "InvertedDoublePendulum": (9, 1, 1.0, 1000, 20.0, "balance two poles on the cart"),
    "InvertedPendulum": (4, 1, 3.0, 1000, 25.0, "balance the pole on the cart"),
    "Pusher": (23, 7, 2.0, 100, 20.0, "push the cylinder to the goal"),
    "Reacher": (10, 2, 1.0, 50, 50.0, "reach the goal with the fingertip"),
    "Swimmer": (8, 2, 1.0, 1000, 25.0, "swim forward"),
    "Walker2d": (17, 6, 1.0, 1000, 125.0, "walk forward on two legs"),
}
"""By name: observed numbers, actions, the largest action, decisions, decisions a second, text."""

pictures = MuJoCoPictures


def specs() -> dict[str, TaskSpec]:
    """Return the tasks by id, ``mujoco/<Name>-v5``."""
    return {
        f"{SUITE}/{name}-v5": TaskSpec(
            id=f"{SUITE}/{name}-v5",
            observation_space=spaces.Box(-np.inf, np.inf, (observed,), np.float32),
            action_space=spaces.Box(-bound, bound, (actions,), np.float32),
            max_steps=max_steps,
            control_hz=control_hz,
            instruction=instruction,
        )
        for name, (observed, actions, bound, max_steps, control_hz, instruction) in TASKS.items()
    }


def make(spec: TaskSpec) -> gym.Env:
    """Return the task's environment; `unwrapped.model` and `.data` are MuJoCo's own."""
    load_mujoco()
    name = spec.id.split("/")[1]
    base = gym.make(name, disable_env_checker=True, render_mode="rgb_array").unwrapped
    return MuJoCoEnv(base, spec)


def expert(spec: TaskSpec, kind: str) -> Any:
    """Refuse: no task has an expert yet."""
    require_kind(spec, kind)


class MuJoCoEnv(Rendered, gym.Wrapper):
    """A task in float32."""

    def __init__(self, base: gym.Env, spec: TaskSpec) -> None:
        super().__init__(base)
        self.observation_space = spec.observation_space
        self.action_space = spec.action_space
        self.render_camera = "track" if base.model.ncam else FREE  # what walks, walks away

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start an episode; it follows from `seed` alone."""
        observation, info = self.unwrapped.reset(seed=seed, options=options)
        return observation.astype(np.float32), info

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Act; the reward is a plain float."""
        observation, reward, terminated, truncated, info = self.unwrapped.step(action)
        return observation.astype(np.float32), float(reward), bool(terminated), truncated, info
