"""A suite without a simulator: walk to the origin of a line."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from gato.envs.episode import ANY_TEXT, Episode, TaskSpec

SPEC = TaskSpec(
    id="toy/walk-v0",
    observation_space=spaces.Dict(
        {
            "a/place": spaces.Box(-np.inf, np.inf, (2,), np.float32),
            "note": ANY_TEXT(),
            "picture": spaces.Box(0, 255, (16, 16, 3), np.uint8),
        }
    ),
    action_space=spaces.Dict(
        {"go": spaces.Box(-1, 1, (2,), np.float32), "say": spaces.Discrete(3, start=1)}
    ),
    max_steps=12,
    control_hz=10.0,
    instruction="walk to the middle",
    measure="success",
    expert="scripted",
)


class Walk(gym.Env):
    """Steps of at most 1 towards the origin; some seeds start too far away to succeed."""

    observation_space, action_space = SPEC.observation_space, SPEC.action_space

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict]:
        super().reset(seed=seed)
        self.place = self.np_random.uniform(-13, 13, 2)
        return self._observe(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        self.place = self.place + action["go"]
        near = bool(np.abs(self.place).max() < 0.5)
        return self._observe(), float(near), near, False, {"success": near}

    def _observe(self) -> dict[str, Any]:
        picture = np.full((16, 16, 3), int(abs(self.place[0]) * 9) % 256, np.uint8)
        side = "left" if self.place[0] < 0 else "right"
        return {
            "a/place": self.place.astype(np.float32),
            "note": f"i am {side}",
            "picture": picture,
        }


class Walker:
    """Walks straight home."""

    def reset(self, env: gym.Env, seed: int) -> None:
        """Nothing to forget."""

    def act(self, env: gym.Env, observation: Any) -> dict[str, Any]:
        return {"go": np.clip(-observation["a/place"], -1, 1), "say": np.int64(2)}


def suite() -> ModuleType:
    """Return the suite's module."""
    module = ModuleType("gato.envs.toy")
    module.SUITE, module.EXTRA, module.PACKAGES = "toy", "toy", ("numpy", "no-such-package")
    module.specs = lambda: {SPEC.id: SPEC}
    module.make = lambda spec: Walk()
    module.expert = lambda spec, kind: Walker()
    return module


def episode(seed: int, steps: int | None = None, *, targets: bool = True) -> Episode:
    """Return a made-up episode of the task."""
    rng = np.random.default_rng(seed)
    steps = steps or int(rng.integers(1, 12))
    actions = {
        "go": rng.uniform(-1, 1, (steps, 2)).astype(np.float32),
        "say": rng.integers(1, 4, steps),
    }
    ends = np.arange(steps) == steps - 1
    return Episode(
        task=SPEC.id,
        observations={
            "a/place": rng.normal(size=(steps + 1, 2)).astype(np.float32),
            "note": [f"note {k % 3} é" for k in range(steps + 1)],
            "picture": rng.integers(0, 256, (steps + 1, 16, 16, 3), np.uint8),
        },
        actions=actions,
        targets={k: v.copy() for k, v in actions.items()} if targets else None,
        rewards=rng.normal(size=steps).astype(np.float32),
        terminated=ends,
        truncated=np.zeros(steps, np.bool_),
        instruction=SPEC.instruction,
        seed=seed,
        success=[True, False, None][seed % 3],
        info={"level": seed} if seed % 2 else {},
    )
