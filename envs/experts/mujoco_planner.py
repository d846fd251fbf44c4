"""Look-ahead for any MuJoCo environment: predictive sampling with the environment's own model.

```
plan       H actions, the best found so far; the first k of them are executed
  shift    drop those that were executed, hold the last one
  sample   N copies of it, each disturbed by a random curve through a few knots
  roll out every copy from the present state, exactly as the environment will
  narrow   around the mean of the best copies, with half the disturbance; again from "sample"
```
What is executed is the best copy of all rounds (the cross-entropy method on warm-started splines).
The simulator is deterministic, so k > 1 costs only what a longer look ahead would have seen. Where
an action was disturbed the state is not the predicted one, and one round mends the plan.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np

from gato.envs.episode import TaskSpec
from gato.envs.experts.mujoco_rollouts import Rollouts, Simulator, physics_state


@dataclass(frozen=True)
class Plan:
    """What the planner wants of a task and what it may spend on it."""

    value: Callable[[Rollouts], np.ndarray]
    """What each step of each future is worth, (N, H): the reward, or a denser stand-in for it."""
    samples: int
    """Futures per round."""
    horizon: int
    """Control steps per future."""
    replan: int = 1
    """Control steps executed per plan."""
    rounds: int = 1
    """Rounds per plan; each disturbs half as much as the one before."""
    elites: int = 4
    """Best copies of a round; the next is drawn around their mean."""
    knots: int = 5
    """Points of the random curve that disturbs a copy; between them it is straight."""
    spread: float = 0.5
    """Largest standard deviation of a knot, as a part of half the action range."""

    def __post_init__(self) -> None:
        if not 1 <= self.replan <= self.horizon:
            raise ValueError(
                f"expected to execute between 1 and all {self.horizon} steps of a plan; "
                f"got replan = {self.replan}."
            )


class MujocoPlanner:
    """An expert that looks ahead; it needs nothing but the simulator.

    Args:
        spec: the task.
        plan: its value and budget.
        threads: that simulate. The default leaves the cores to worker processes.
    """

    def __init__(self, spec: TaskSpec, plan: Plan, threads: int = 1) -> None:
        self._space, self._plan, self._threads = spec.action_space, plan, threads
        self._curves = _curves(plan.horizon, plan.knots)
        rounds = f"{plan.rounds} x " if plan.rounds > 1 else ""
        self.settings = (
            f"planner: {rounds}{plan.samples} samples x {plan.horizon} steps, "
            f"replans every {plan.replan}"
        )

    def reset(self, env: gym.Env, seed: int) -> None:
        """Start without a plan; `seed` is for the samples."""
        world = env.unwrapped
        self._rng = np.random.default_rng([seed, 0x9A7])
        self._simulator = Simulator(world.model, world.frame_skip, self._threads)
        self._actions = np.zeros((self._plan.horizon, *self._space.shape), np.float32)
        self._executed = self._left = 0

    def act(self, env: gym.Env, observation: Any) -> np.ndarray:
        """Return the next action of the plan; make or mend the plan first where that is due."""
        world = env.unwrapped
        state = physics_state(world.model, world.data)
        if not self._left:
            self._search(state, world.data.qacc_warmstart, self._plan.rounds)
            self._left = self._plan.replan
        elif (state != self.predicted).any():
            self._search(state, world.data.qacc_warmstart, 1)
        self._left -= 1
        self._executed += 1
        return self._actions[self._executed - 1].copy()

    @property
    def predicted(self) -> np.ndarray:
        """The full physics state that follows what was executed of the plan."""
        return self._states[self._executed - 1]

    def _search(self, state: np.ndarray, warmstart: np.ndarray, rounds: int) -> None:
        plan, best = self._plan, -np.inf
        held = self._actions[-1:].repeat(self._executed, axis=0)
        centre = np.concatenate([self._actions[self._executed :], held])
        for turn in range(rounds):
            candidates = self._sample(centre, plan.spread / 2**turn)
            futures = self._simulator.rollouts(state, warmstart, candidates)
            score = np.nan_to_num(plan.value(futures).sum(axis=1), nan=-np.inf)
            order = score.argsort()
            centre = candidates[order[-plan.elites :]].mean(axis=0)
            if turn == 0 or score[order[-1]] > best:
                best, self._actions = score[order[-1]], candidates[order[-1]]
                self._states = futures.states[order[-1]]
        self._executed = 0

    def _sample(self, centre: np.ndarray, spread: float) -> np.ndarray:
        """Return `centre` and disturbed copies, (N, H, controls), as the space has them."""
        plan, space = self._plan, self._space
        shape = plan.samples - 1, plan.knots, *space.shape
        scale = spread * 2.0 ** -self._rng.uniform(0, 3, (shape[0], 1, 1))  # coarse to fine
        knots = self._rng.normal(size=shape) * scale * (space.high - space.low) / 2
        copies = centre + np.einsum("hk,nka->nha", self._curves, knots)
        copies = np.clip(copies, space.low, space.high).astype(np.float32)
        return np.concatenate([centre[None], copies])


def _curves(horizon: int, knots: int) -> np.ndarray:
    """Return the weights (H, knots) of straight lines through evenly spaced knots."""
    where = np.linspace(0, knots - 1, horizon)
    return np.maximum(0, 1 - np.abs(where[:, None] - np.arange(knots)))
