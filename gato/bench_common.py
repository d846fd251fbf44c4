"""What the benches share: two made-up tasks, what a result is, how a pace is measured."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from gymnasium import spaces

from gato.envs.episode import Episode, TaskSpec

Result = dict[str, Any]

ARM = TaskSpec(
    id="bench/arm",
    observation_space=spaces.Box(-np.inf, np.inf, (39,), np.float32),
    action_space=spaces.Box(-1, 1, (4,), np.float32),
    max_steps=500,
    control_hz=80.0,
    instruction="push the puck to the goal",
)
GAME = TaskSpec(
    id="bench/game",
    observation_space=spaces.Box(0, 255, (80, 80, 3), np.uint8),
    action_space=spaces.Discrete(18),
    max_steps=500,
    control_hz=15.0,
)
FLOORS = {"bench/arm": 1e6, "bench/game": 4e5}
"""Tokens a second that one core must write (Meta-World and Atari in all but the simulator)."""


def result(case: str, value: float, unit: str, baseline: float, against: str) -> Result:
    """Return one line of what is printed."""
    return {
        "case": case,
        "value": value,
        "unit": unit,
        "baseline": baseline,
        "ratio": value / baseline,
        "against": against,
    }


def pace(work: Callable[[], Any], amount: float) -> float:
    """Return `amount` per second of one call of `work`."""
    begun = time.perf_counter()
    work()
    return amount / (time.perf_counter() - begun)


def made_up(task: TaskSpec, steps: int, seed: int = 0) -> Episode:
    """Return an episode of noise in the task's spaces."""
    rng = np.random.default_rng(seed)

    def column(space: Any, n: int) -> np.ndarray:
        if isinstance(space, spaces.Discrete):
            return rng.integers(space.n, size=n)
        if space.dtype == np.uint8:
            return rng.integers(0, 256, (n, *space.shape), np.uint8)
        return np.clip(rng.normal(size=(n, *space.shape)), -1, 1).astype(np.float32)

    no = np.zeros(steps, bool)
    return Episode(
        task=task.id,
        observations={"observation": column(task.observation_space, steps + 1)},
        actions={"action": column(task.action_space, steps)},
        rewards=np.zeros(steps, np.float32),
        terminated=no,
        truncated=no,
        instruction=task.instruction,
        seed=seed,
    )


def wait(device: torch.device) -> None:
    """Return once the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
