"""A look-ahead planner for any game of the Arcade Learning Environment.

Rolling-horizon search: every `HOLD` decisions the state is copied to a second emulator, candidate
plans are played on there, and the best is followed until the next search.

```
candidates    the plan kept from the last search, lengthened to the horizon
              the best plan so far, drawn anew from some decision on
              a plan drawn from nothing: an action held for a while, then another
value         sum over decisions t of DISCOUNT^t * reward; a lost life costs LIFE times the largest
              reward that the searches of this episode have seen
```
The search draws the sticky actions that it meets from its own generator, never from the
episode's, so it plans against chance that it cannot foresee; and an episode is the same whether its
actions were planned in it or read from a log.
"""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np

from gato.envs.episode import TaskSpec

FRAMES = 200
"""Emulator frames that the searches may play, per decision of the episode."""
HOLD = 5
"""Decisions between two searches, which share their frames."""
HORIZON = 25
"""Decisions that a plan looks ahead."""
DISCOUNT = 0.98
LIFE = 5.0
HELD = 3.0
"""Decisions that a plan drawn from nothing holds an action, on average."""
FRAME_SKIP = 4
_PLAN = HORIZON * FRAME_SKIP  # frames that one plan may take


class AlePlanner:
    """Plays any game of the suite by searching with its emulator; deterministic given its seed."""

    def __init__(self, spec: TaskSpec, frames: int = FRAMES) -> None:
        if frames * HOLD < _PLAN:
            raise ValueError(
                f"expected at least {_PLAN // HOLD} frames per decision for {spec.id!r}, one "
                f"plan per search; got {frames}."
            )
        self._actions = int(spec.action_space.n)  # type: ignore[attr-defined]
        self._frames = frames
        self.settings = f"planner: {frames} simulator frames per decision"

    def reset(self, env: gym.Env, seed: int) -> None:
        """Forget the episode before; `seed` is for the draws of plans and of imagined chance."""
        self._rng = np.random.default_rng([seed, 0xA1E])
        self._plan = np.zeros(0, np.int64)
        self._age = HOLD
        self._largest = 0.0

    def act(self, env: gym.Env, observation: Any) -> np.int64:
        """Return the plan's next action, after a search where one is due."""
        if self._age >= HOLD:
            self._plan = self._search(env.unwrapped.twin())
            self._age = 0
        self._age += 1
        action, self._plan = self._plan[0], self._plan[1:]
        return np.int64(action)

    def _search(self, game: Any) -> np.ndarray:
        """Return the best plan that the frames of `HOLD` decisions suffice to find."""
        budget = self._frames * HOLD
        root = game.snapshot()
        best = np.concatenate([self._plan, self._draw(HORIZON - len(self._plan))])
        best_value, spent = self._play(game, best)
        game.restore(root)
        while (budget := budget - spent * FRAME_SKIP) >= _PLAN:
            kept = int(self._rng.integers(HORIZON)) if self._rng.random() < 0.5 else 0
            plan = np.concatenate([best[:kept], self._draw(HORIZON - kept)])
            value, spent = self._play(game, plan)
            game.restore(root)
            if value > best_value:
                best, best_value = plan, value
        return best

    def _draw(self, decisions: int) -> np.ndarray:
        """Return random actions, each held for `HELD` decisions on average."""
        actions = self._rng.integers(self._actions, size=decisions)
        changes = self._rng.random(decisions) < 1 / HELD
        return actions[np.maximum.accumulate(np.where(changes, np.arange(decisions), 0))]

    def _play(self, game: Any, plan: np.ndarray) -> tuple[float, int]:
        """Return the value of `plan` from the present state and the decisions that it took."""
        value, weight, lives = 0.0, 1.0, game.ale.lives()
        for t, action in enumerate(plan.tolist()):
            reward = game.imagine(action, self._rng)
            self._largest = max(self._largest, abs(reward))
            left = game.ale.lives()
            value += weight * (reward - LIFE * (self._largest or 1.0) * (left < lives))
            lives, weight = left, weight * DISCOUNT
            if game.ale.game_over(with_truncation=False):
                return value, t + 1
        return value, len(plan)
