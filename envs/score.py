"""How well a task's expert and a random policy do: where the figures in the specs come from."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np

from gato.envs import registry
from gato.envs.collect import play
from gato.envs.episode import EVALUATION_SEED_START, TaskSpec


class RandomExpert:
    """Acts uniformly at random, by the seed of the episode."""

    def __init__(self, spec: TaskSpec) -> None:
        self._space = spec.action_space

    def reset(self, env: gym.Env, seed: int) -> None:
        """Seed the draws of an episode."""
        self._space.seed(seed)

    def act(self, env: gym.Env, observation: Any) -> Any:
        """Return a random action."""
        return self._space.sample()


def score(
    task_id: str,
    episodes: int,
    *,
    policy: str = "expert",
    first_seed: int = EVALUATION_SEED_START,
) -> dict[str, Any]:
    """Return returns, successes (or None) and lengths of episodes at consecutive seeds.

    Args:
        task_id: any task.
        episodes: how many.
        policy: ``expert`` or ``random``.
        first_seed: the seed of the first episode.
    """
    if policy not in ("expert", "random"):
        raise ValueError(f"expected policy 'expert' or 'random'; got {policy!r}.")
    spec = registry.spec(task_id)
    expert = RandomExpert(spec) if policy == "random" else registry.make_expert(task_id)
    env = registry.make(task_id)
    played = [play(env, expert, spec, first_seed + k, noise=0.0) for k in range(episodes)]
    env.close()
    successes = [e.success for e in played]
    return {
        "policy": policy,
        "first_seed": first_seed,
        "returns": [e.score for e in played],
        "successes": None if None in successes else successes,
        "lengths": [len(e) for e in played],
        "mean_return": float(np.mean([e.score for e in played])),
        "success_rate": None if None in successes else float(np.mean(successes)),
    }
