"""A world to be watched, in any process that imports this: three steps, drawn or not."""

from __future__ import annotations

import time
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

LENGTH = 3


class Drawn(gym.Env):
    """Three steps, each rewarded by one; what is drawn is as bright as there were steps."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 20}  # noqa: RUF012
    observation_space = spaces.Dict(
        {
            "place": spaces.Box(-1, 1, (2,), np.float32),
            "picture": spaces.Box(0, 255, (16, 16, 3), np.uint8),
        }
    )
    action_space = spaces.Discrete(3)
    actions = ("left", "right", "wait")

    def __init__(self, render_mode: str | None = None) -> None:
        self.render_mode = render_mode

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict]:
        super().reset(seed=seed)
        self.steps, self.seed_ = 0, seed
        return self._observe(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        self.steps += 1
        ended = self.steps == LENGTH
        return self._observe(), 1.0, ended, False, {"success": ended}

    def render(self) -> np.ndarray:
        return np.full((64, 48, 3), 80 * self.steps, np.uint8)

    def _observe(self) -> dict[str, Any]:
        place = np.array([self.steps / LENGTH, self.seed_ % 10 / 10], np.float32)
        return {"place": place, "picture": np.full((16, 16, 3), 60 * self.steps, np.uint8)}


class Undrawn(Drawn):
    """The same, which draws nothing: what it observes is a picture."""

    metadata = {"render_modes": []}  # noqa: RUF012


class Failing(Drawn):
    """Raises at its second step."""

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        if self.steps == 1:
            raise RuntimeError("the floor gave way")
        return super().step(action)


class Slow(Drawn):
    """Takes a tenth of a second for a step."""

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        time.sleep(0.1)
        return super().step(action)


for kind in (Drawn, Undrawn, Failing, Slow):
    gym.register(f"Watched{kind.__name__}-v0", kind)
