"""A world that fails at chosen seeds, registered in any process that imports this file.

``$DEADLY`` is a folder; a file `SEED` in it says how episodes of that seed fail, at their third
step: exit, leave, kill, hang, throw, nan, reward, outside. With ``once`` before it, only the first
time.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces


class Deadly(gym.Env):
    """Lasts 4 to 9 steps by its seed; observes what it was told to do."""

    observation_space = spaces.Dict(
        {
            "counts": spaces.Tuple([spaces.Box(-9, 9, (2,), np.float32), spaces.Discrete(3)]),
            "time": spaces.Box(0, 9, (), np.float32),
        }
    )
    action_space = spaces.Discrete(3)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict]:
        super().reset(seed=seed)
        self.seed_, self.steps = seed, 0
        if self._fault("reset"):
            raise RuntimeError("no such world")
        return self._observe(0, 0.0), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        self.steps += 1
        fault = self._fault("exit", "leave", "kill", "hang", "throw", "nan", "reward", "outside")
        match fault:
            case "exit":
                os._exit(7)
            case "leave":
                raise SystemExit(3)
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "hang":
                time.sleep(60)
            case "throw":
                raise RuntimeError("the arm fell off")
            case "outside":
                self.steps += 10
        observation = self._observe(action, np.nan if fault == "nan" else self.steps)
        reward = np.inf if fault == "reward" else float(action) + 0.01 * self.steps
        return observation, reward, self.steps == 4 + self.seed_ % 6, False, {}

    def _observe(self, action: Any, time_: float) -> dict[str, Any]:
        counts = np.array([self.seed_ % 7, action], np.float32)
        return {"counts": (counts, np.int64(action)), "time": np.array(time_, np.float32)}

    def _fault(self, *known: str) -> str:
        file = Path(os.environ.get("DEADLY", "/nowhere")) / str(self.seed_)
        if self.steps not in (0, 3) or not file.exists():
            return ""
        *once, fault = file.read_text().split()
        if fault not in known:
            return ""
        if once:
            file.unlink()
        return fault


gym.register("Deadly-v0", Deadly)
