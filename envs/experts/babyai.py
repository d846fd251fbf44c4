"""The BabyAI bot as an expert."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np

# The bot asserts its way through its plan and has no error of its own for a plan that strange
# actions (a box opened by noise) have ruined. The episode goes on without it and counts as failed.
_LOST = (AssertionError, AttributeError, IndexError, TypeError, ValueError)
_MOST_SUBGOALS = 200
"""Subgoals per action; in some worlds the bot replaces one subgoal by another without end."""


class BotExpert:
    """The bot of Minigrid; it replans when the action that was executed is not its own."""

    def reset(self, env: gym.Env, seed: int) -> None:
        """Read the mission of the episode that has just begun; the bot uses no chance."""
        from minigrid.utils.baby_ai_bot import BabyAIBot, DisappearedBoxError

        self._errors = (*_LOST, DisappearedBoxError)
        self._bot = BabyAIBot(env.unwrapped)
        self._bot.stack = self._subgoals = _Subgoals(self._bot.stack)
        self.lost = False

    def act(self, env: gym.Env, observation: Any) -> np.int64:
        """Return the bot's action; "done" once it is lost."""
        if not self.lost:
            try:
                self._subgoals.left = _MOST_SUBGOALS
                return np.int64(self._bot.replan(env.get_wrapper_attr("last_action")))
            except self._errors:
                self.lost = True
        return np.int64(env.unwrapped.actions.done)


class _Subgoals(list):
    """The bot's stack, with a limit on what is pushed during one action."""

    left = _MOST_SUBGOALS

    def append(self, subgoal: Any) -> None:
        self.left -= 1
        if self.left < 0:
            raise ValueError("the bot does not settle on a subgoal")
        super().append(subgoal)
