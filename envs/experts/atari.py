"""The scripted Boxing expert: rules on positions that the frame shows, read from memory.

A rule here depends on the present frame alone, changes its mind only across wide bands, and uses
no chance, so that a policy that sees pixels can learn it and small mistakes do not matter.
"""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np


class BoxingExpert:
    """Comes in level with the opponent, then slips off his line and punches from there.

    ```
    further than `REACH` to the side   walk towards him, level with him: no fist meets a head there
    within `REACH`                     move until `LOW` to `HIGH` above or below, where a fist does;
                                       punch from `PUNCH` on, also while moving
    ```
    A boxer is hit on the head, which lies between his fists. Most points are lost by whoever
    comes close while off by a fist's height, and most are won by whoever slips there at arm's
    length.
    """

    REACH = 24
    """Horizontal distance, in emulator pixels, at which a punch begins to land."""
    LEVEL = 8
    """Vertical distance within which he counts as level while walking in."""
    LOW, HIGH = 15, 22
    """Vertical distance at which a fist meets the head."""
    PUNCH = 8
    """Vertical distance from which punching begins."""

    def reset(self, env: gym.Env, seed: int) -> None:
        """Look up the game's actions; the rule uses no chance."""
        self._index = {name: i for i, name in enumerate(env.unwrapped.action_names)}

    def act(self, env: gym.Env, observation: Any) -> np.int64:
        """Return the rule's action for the boxers' present positions."""
        player_x, player_y, opponent_x, opponent_y = _boxers(env)
        right, down = opponent_x - player_x, opponent_y - player_y
        off = abs(down)
        towards, away = ("DOWN", "UP") if down >= 0 else ("UP", "DOWN")
        if abs(right) > self.REACH:
            vertical = towards if off > self.LEVEL else ""
            return np.int64(self._index[vertical + ("RIGHT" if right >= 0 else "LEFT")])
        vertical = away if off < self.LOW else towards if off > self.HIGH else ""
        punch = "FIRE" if off >= self.PUNCH else ""
        return np.int64(self._index[vertical + punch or "NOOP"])

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
