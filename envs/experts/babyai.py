"""The BabyAI bot as an expert."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np


# The bot asserts its way through its plan and has no error of its own for a plan that strange
# actions (a box opened by noise) have ruined. The episode goes on without it and counts as failed.
_LOST = (AssertionError, AttributeError, IndexError, TypeError, ValueError)


class BotExpert:
    """The bot of Minigrid; it replans when the action that was executed is not its own."""

    def reset(self, env: gym.Env, seed: int) -> None:
        """Read the mission of the episode that has just begun; the bot uses no chance."""
        from minigrid.utils.baby_ai_bot import BabyAIBot, DisappearedBoxError

        self._errors = (*_LOST, DisappearedBoxError)
        self._bot = BabyAIBot(env.unwrapped)
        self._lost = False

    def act(self, env: gym.Env, observation: Any) -> np.int64:
        """Return the bot's action; "done" once a strange action has put it off its plan."""
        done = env.unwrapped.actions.done
        if not self._lost:
            try:
                action = self._bot.replan(env.get_wrapper_attr("last_action"))
                return np.int64(action)
            except self._errors:
                self._lost = True
        return np.int64(done)
