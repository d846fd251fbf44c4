"""A world of pictures, numbers and words, and a slow one, in any process that imports this."""

from __future__ import annotations

import time
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces


class Framed(gym.Env):
    """Lasts 6 steps; what it shows depends on seed and step."""

    observation_space = spaces.Dict(
        {
            "picture": spaces.Box(0, 255, (210, 160, 3), np.uint8),
            "places": spaces.Tuple(
                [spaces.Box(-np.inf, np.inf, (39,), np.float32), spaces.Discrete(9)]
            ),
            "words": spaces.Text(12),
        }
    )
    action_space = spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict]:
        super().reset(seed=seed)
        self.steps = 0
        return self._observe(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        self.steps += 1
        return self._observe(), float(action), self.steps == 6, False, {}

    def _observe(self) -> dict[str, Any]:
        picture = self.np_random.integers(0, 256, (210, 160, 3)).astype(np.uint8)
        numbers = self.np_random.normal(size=39).astype(np.float32)
        return {
            "picture": picture,
            "places": (numbers, np.int64(self.steps)),
            "words": "red" * (1 + self.steps % 3),
        }


class Slow(gym.Env):
    """Six steps of 25 ms each."""

    observation_space = spaces.Box(0, 9, (2,), np.float32)
    action_space = spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict]:
        super().reset(seed=seed)
        self.steps = 0
        return np.zeros(2, np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        time.sleep(0.025)
        self.steps += 1
        return np.full(2, self.steps, np.float32), 0.0, self.steps == 6, False, {}


gym.register("Framed-v0", Framed)
gym.register("Slow-v0", Slow)
