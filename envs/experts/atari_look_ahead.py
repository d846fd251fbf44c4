"""Scripted Atari experts for Pong, Breakout and Freeway: a rule, and a short look ahead.

Each expert is a rule with one parameter (where on the paddle to take the ball, how long to wait
before crossing). Every few decisions the rule is played on in a second emulator, in the same state,
with each value of the parameter, and the best is followed until the next look:

```
look        for each value: play the rule HORIZON decisions on, from the copy; note what it earned
follow      play the rule with the best value for EVERY decisions
```
The sticky actions met while looking ahead are drawn from the expert's own generator.
"""

from __future__ import annotations

from typing import Any, ClassVar

import gymnasium as gym
import numpy as np

LIFE = 50.0
"""What a lost life costs in a look ahead."""


class LookAheadExpert:
    """A rule with a parameter that is chosen by trying it; each game fills in its rule."""

    OPTIONS: ClassVar[tuple[int, ...]]
    """Values of the parameter; of equal ones the first is taken, or any where all are equal."""
    EVERY: ClassVar[int]
    """Decisions between two looks."""
    HORIZON: ClassVar[int]
    """Decisions that a look goes ahead."""
    SAMPLES: ClassVar[int] = 1
    """Times that each value is tried."""
    DISCOUNT: ClassVar[float] = 0.98
    STOP: ClassVar[bool] = False
    """Whether a look ends at the first reward."""

    def reset(self, env: gym.Env, seed: int) -> None:
        """Start an episode; `seed` is for the chance met while looking ahead."""
        self._index = {name: i for i, name in enumerate(env.unwrapped.action_names)}
        self._rng = np.random.default_rng([seed, 0xA7A])
        self._option, self._age = self.OPTIONS[0], self.EVERY
        self._before = env.unwrapped.ram()

    def act(self, env: gym.Env, observation: Any) -> np.int64:
        """Return the rule's action, after a look ahead where one is due."""
        game = env.unwrapped
        ram = game.ram()
        if self._age >= self.EVERY and self.open(self._before, ram):
            self._look(game.twin(), ram)
            self._age = 0
        action = self.rule(self._before, ram, self._option, self._age)
        self._before = ram
        self._age += 1
        return np.int64(self._index[action])

    def open(self, before: np.ndarray, ram: np.ndarray) -> bool:
        """Return whether the choice of the parameter matters now."""
        return True

    def rule(self, before: np.ndarray, ram: np.ndarray, option: int, age: int) -> str:
        """Return the name of an action.

        Args:
            before: memory one decision ago.
            ram: memory now.
            option: value of the parameter.
            age: decisions since it was chosen.
        """
        raise NotImplementedError

    def worth(self, start: np.ndarray, end: np.ndarray) -> float:
        """Return what the end of a look is worth beside the rewards on the way."""
        return 0.0

    def _look(self, game: Any, ram: np.ndarray) -> None:
        root, values = game.snapshot(), np.zeros(len(self.OPTIONS))
        for i, option in enumerate(self.OPTIONS):
            for _ in range(self.SAMPLES):
                values[i] += self._try(game, ram, option)
                game.restore(root)
        best = int(values.argmax())
        if values[best] == values.min():  # nothing in sight: variety, so that no cycle is for ever
            best = int(self._rng.integers(len(values)))
        self._option = self.OPTIONS[best]

    def _try(self, game: Any, ram: np.ndarray, option: int) -> float:
        """Return what the rule earns from the present state on with `option`."""
        before, now, value, weight, lives = self._before, ram, 0.0, 1.0, game.ale.lives()
        for age in range(self.HORIZON):
            reward = game.imagine(self._index[self.rule(before, now, option, age)], self._rng)
            before, now = now, game.ram()
            lost = game.ale.lives() < lives
            value += weight * (reward - LIFE * lost)
            if lost or (reward and self.STOP):
                break
            weight *= self.DISCOUNT
        return value + weight * self.worth(ram, now)


class PongExpert(LookAheadExpert):
    """Moves some decisions up or down while the ball comes, so that the return is missed.

    Coordinates are the emulator's: the ball at (49, 54) of its memory, the paddle at 51.
    """

    OPTIONS = (0, -1, 1, -2, 2, -3, 3, -4, 4, -6, 6)
    """Decisions to move: up where negative, down where positive."""
    EVERY, HORIZON, SAMPLES, STOP = 4, 72, 2, True
    NEAR, PADDLE = 120, 187
    """Columns: from where on the ball counts as coming, and of the paddle."""
    COMING = 22
    """Decisions that the parameter is about; a look goes on by following the ball."""
    BAND, COAST = 10, 0.75
    """Distance that one decision's move would overshoot; how far the paddle slides on."""

    def open(self, before: np.ndarray, ram: np.ndarray) -> bool:
        """Return whether the ball comes and can still be reached."""
        return max(int(before[49]), self.NEAR) < int(ram[49]) < self.PADDLE + 3

    def rule(self, before: np.ndarray, ram: np.ndarray, option: int, age: int) -> str:
        """Move while the ball comes, otherwise go to the middle."""
        x, y, paddle = int(ram[49]), int(ram[54]), int(ram[51])
        aim = 125.0
        if x > max(int(before[49]), self.NEAR) and before[49]:
            if age <= self.COMING:
                return "NOOP" if age >= abs(option) else "LEFT" if option > 0 else "RIGHT"
            steps = (self.PADDLE - x) / (x - int(before[49]))
            aim = _bounce(y + (y - int(before[54])) * steps, 44, 206) - 6
        off = aim - paddle - self.COAST * (paddle - int(before[51]))
        return "NOOP" if abs(off) <= self.BAND else "LEFT" if off > 0 else "RIGHT"


class BreakoutExpert(LookAheadExpert):
    """Meets the ball where it will come down, off the paddle's middle as the bricks ask for.

    Coordinates are the emulator's: the ball at (99, 101) of its memory, the paddle at 72.
    """

    OPTIONS = (0, -3, 3, -6, 6)
    """Where to take the ball, off the paddle's middle."""
    EVERY, HORIZON, SAMPLES = 3, 40, 2
    NEAR, PADDLE = 110, 175
    """Rows: from where on the ball counts as coming down, and of the paddle."""
    BAND, COAST = 8, 0.6
    """Distance that one decision's move would overshoot; how far the paddle slides on."""
    CLEARED = (8, 0x64)
    """The score of two cleared walls, 864, in binary coded decimal; no third follows."""

    def open(self, before: np.ndarray, ram: np.ndarray) -> bool:
        """Return whether the ball comes down."""
        return int(ram[101]) > max(int(before[101]), self.NEAR)

    def rule(self, before: np.ndarray, ram: np.ndarray, option: int, age: int) -> str:
        """Serve, or go to where the ball will be."""
        x, y, paddle = int(ram[99]), int(ram[101]), int(ram[72])
        if y == 0:
            return "FIRE"
        aim, fall = float(x), y - int(before[101])
        if fall > 0 and before[101]:
            aim = _bounce(x + (x - int(before[99])) * (self.PADDLE - y) / fall, 57, 200)
        if (ram[76] & 0x0F, ram[77]) == self.CLEARED:
            aim = 57.0 if x > 128 else 200.0  # nothing is left to win: let the game end
        off = aim + option - 9 - paddle - self.COAST * (paddle - int(before[72]))
        return "NOOP" if abs(off) <= self.BAND else "RIGHT" if off > 0 else "LEFT"


class FreewayExpert(LookAheadExpert):
    """Walks up; where a car would hit the chicken, waits or steps back as long as it takes."""

    OPTIONS = (0, 1, 2, 3, 4, -1, -2, 6)
    """Decisions to wait, or to step back where negative, before walking up."""
    EVERY, HORIZON = 4, 20
    ROAD = 170
    """Length of the way up, in the units of the chicken's place, memory 14."""

    def rule(self, before: np.ndarray, ram: np.ndarray, option: int, age: int) -> str:
        """Walk up after the wait."""
        return "UP" if age >= abs(option) else "NOOP" if option > 0 else "DOWN"

    def worth(self, start: np.ndarray, end: np.ndarray) -> float:
        """Return the part of the way gained; a crossing itself is rewarded and starts anew."""
        return (int(end[14]) - int(start[14])) / self.ROAD


def _bounce(at: float, low: float, high: float) -> float:
    """Return where a ball that flies to `at` is after the walls at `low` and `high` turned it."""
    span = high - low
    at = (at - low) % (2 * span)
    return low + min(at, 2 * span - at)
