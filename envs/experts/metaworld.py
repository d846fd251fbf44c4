"""Meta-World's own scripted policies as experts."""

from __future__ import annotations

import warnings

import gymnasium as gym
import numpy as np

from gato.envs.episode import TaskSpec


class ScriptedExpert:
    """The task's scripted policy; its actions are clipped to the Box before anyone sees them."""

    def __init__(self, spec: TaskSpec) -> None:
        from metaworld.policies import ENV_POLICY_MAP

        self._make = ENV_POLICY_MAP[spec.id.split("/")[1]]
        self._space = spec.action_space

    def reset(self, env: gym.Env, seed: int) -> None:
        """Forget the episode before; the policies use no chance."""
        self._policy = self._make()

    def act(self, env: gym.Env, observation: np.ndarray) -> np.ndarray:
        """Return the policy's action at `observation`."""
        with warnings.catch_warnings():  # the policies announce what the clip below repairs
            warnings.simplefilter("ignore")
            action = self._policy.get_action(observation.astype(np.float64))
        return np.clip(action, self._space.low, self._space.high).astype(np.float32)
