"""Scripted Atari experts: rules on positions that the frame shows, read from memory.

A rule here depends on the present frame alone, changes its mind only across wide bands, and uses
no chance, so that a policy that sees pixels can learn it and small mistakes do not matter.
"""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np


class BoxingExpert:
    """Stands half a body above or below the opponent, at arm's length, and punches.

    ```
    beside, `NEAR` or less away        above or below by `LOW` to `HIGH`: punch
    further away, or out of that band  walk: first off the opponent's line, then towards him
    ```
    A boxer is hit on the head, which lies between his fists; so whoever stands level with the
    opponent walks into his fists, and whoever is off by a fist lands his own.
    """

    LOW, HIGH = 10, 23
    """Vertical distance at which a fist meets the head, in emulator pixels."""
    NEAR, REACH, FAR = 20, 24, 45
    """Horizontal distances: stop walking; a fist just lands; too far away to be hit."""
    CLEAR = 6
    """Vertical distance that is enough to approach within `FAR`."""

    def reset(self, env: gym.Env, seed: int) -> None:
        """Look up the game's actions; the rule uses no chance."""
        self._index = {name: i for i, name in enumerate(env.unwrapped.action_names)}

    def act(self, env: gym.Env, observation: Any) -> np.int64:
        """Return the rule's action for the boxers' present positions."""
        player_x, player_y, opponent_x, opponent_y = _boxers(env)
        right, down = opponent_x - player_x, opponent_y - player_y
        aside, off = abs(right), abs(down)
        vertical = horizontal = ""
        if off > self.HIGH:
            vertical = "DOWN" if down >= 0 else "UP"
        elif off < self.LOW:
            vertical = "UP" if down >= 0 else "DOWN"
        if aside > self.NEAR and (off >= self.CLEAR or aside > self.FAR):
            horizontal = "RIGHT" if right >= 0 else "LEFT"
        punch = "FIRE" if aside <= self.REACH and not vertical else ""
        return np.int64(self._index[f"{vertical}{horizontal}{punch}" or "NOOP"])

    def state(self, env: gym.Env) -> dict[str, float]:
        """Return the centres of both boxers as fractions of the frame's width and height."""
        player_x, player_y, opponent_x, opponent_y = _boxers(env)
        return {
            "player_x": (player_x + 12) / 160,
            "player_y": (player_y + 61) / 210,
            "opponent_x": (opponent_x + 9) / 160,
            "opponent_y": (opponent_y + 60) / 210,
        }


def _boxers(env: gym.Env) -> tuple[int, int, int, int]:
    """Return x and y of the player (white), then of the opponent (black)."""
    ram = env.unwrapped.ram()
    return int(ram[32]), int(ram[34]), int(ram[33]), int(ram[35])


EXPERTS = {"boxing": BoxingExpert}
"""Experts by ROM."""
