"""Experts for Fetch: rules on the observation, without memory.

```
Reach           straight to the goal
PickAndPlace    over the box, down around it, close, to the goal
Push            over the box to the side away from the goal, down, and against it, slower and slower
Slide           behind the puck as in Push, then one stroke, as fast as the distance asks for
```
Where the puck of Slide comes to rest depends on how the two finger tips meet it, to a degree that
no rule on the observation foresees: the rule alone succeeds in a third of the episodes. So this
expert first tries strokes of slightly different strength and direction on a copy of the simulator,
and plays the one that ended nearest to the goal.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np

from gato.envs.episode import TaskSpec

GAIN = 20.0
"""Actions of 1 move the gripper's target by 5 cm: this asks for all that is missing at once."""
UP = np.array([0.0, 0.0, 1.0])
CLOSED, OPEN, STILL = -1.0, 1.0, 0.0


class FetchExpert:
    """The rule of one task, which sees what a policy sees."""

    def __init__(self, spec: TaskSpec) -> None:
        self._rule = RULES[spec.id.split("/")[1].removeprefix("Fetch").removesuffix("-v4")]

    def reset(self, env: gym.Env, seed: int) -> None:
        """Forget nothing: the rules have neither memory nor chance."""

    def act(self, env: gym.Env, observation: dict[str, np.ndarray]) -> np.ndarray:
        """Return the rule's action."""
        return _action(self._rule, observation)


def _action(rule: Any, observation: dict[str, np.ndarray]) -> np.ndarray:
    state = observation["observation"].astype(np.float64)
    goal = observation["desired_goal"].astype(np.float64)
    return np.clip(rule(state, goal), -1.0, 1.0).astype(np.float32)


def _reach(state: np.ndarray, goal: np.ndarray) -> np.ndarray:
    return _towards(state[:3], goal)


def _pick_and_place(state: np.ndarray, goal: np.ndarray) -> np.ndarray:
    hand, box, width = state[:3], state[3:6], state[9] + state[10]
    off = box - hand
    around = np.linalg.norm(off) < 0.03
    if around and width < 0.053:  # the box is 5 cm wide
        return _towards(box, goal, CLOSED)
    if around:
        return np.array([0.0, 0.0, 0.0, CLOSED])
    aside = np.linalg.norm(off[:2])
    if aside < 0.012 or (aside < 0.02 and off[2] > -0.04):
        return _towards(hand, box, OPEN)
    return _towards(hand, box + 0.08 * UP, OPEN)


def _push(state: np.ndarray, goal: np.ndarray) -> np.ndarray:
    hand, box = state[:3], state[3:6]
    left, ahead = _way(box, goal)
    along, aside = _seen_from(box, hand, ahead)
    if left < 0.025:
        return _towards(hand, hand + 0.015 * UP)  # let it be
    lined = along < -0.02 and np.linalg.norm(aside) < 0.02
    if lined and hand[2] < box[2] + 0.02:
        target = box.copy()
        target[:2] = hand[:2] + ahead * min(0.4 * left, 0.05) - 1.5 * aside
        return _towards(hand, target)
    return _get_behind(hand, box, ahead, distance=0.07, height=0.08, lined=lined)


@dataclass(frozen=True)
class Stroke:
    """How to slide the puck: the rule of Slide."""

    strength: float = 1.15
    """Action per root of the metres to go: friction takes the square of the speed."""
    turn: float = 0.0
    """Radians from the straight line to the goal."""
    distance: float = 0.1
    """Metres behind the puck at which the stroke begins."""

    BRAKE = 0.84
    """Metres per second that the puck loses in a second."""

    def __call__(self, state: np.ndarray, goal: np.ndarray) -> np.ndarray:
        """Return the action, before it is clipped."""
        hand, puck = state[:3], state[3:6]
        left, ahead = _way(puck, goal)
        cos, sin = np.cos(self.turn), np.sin(self.turn)
        ahead = np.array([cos * ahead[0] - sin * ahead[1], sin * ahead[0] + cos * ahead[1]])
        along, aside = _seen_from(puck, hand, ahead)
        speed = 25.0 * (state[14:16] + state[20:22]) @ ahead  # they are metres per decision
        moves = speed > 0.05
        if moves and (speed**2 / (2 * self.BRAKE) >= left or along < -0.2):
            return np.zeros(4)
        lined = along < -0.03 and np.linalg.norm(aside) < 0.015
        if moves or (lined and hand[2] < puck[2] + 0.015):
            flat = ahead * min(1.0, self.strength * np.sqrt(left)) - GAIN * aside
            return np.array([*flat, GAIN * (puck[2] - hand[2]), STILL])
        near = lined and abs(along + self.distance) < 0.02
        return _get_behind(hand, puck, ahead, self.distance, height=0.06, lined=near)


class SlideExpert:
    """Tries strokes in the simulator before it plays the best of them."""

    TRIES = 64
    GOOD = 0.025
    """Metres from the goal at which the search ends; 0.05 is success."""

    def __init__(self, spec: TaskSpec) -> None:
        self.settings = f"planner: the best of at most {self.TRIES} strokes tried in the simulator"
        self._decisions = spec.max_steps

    def reset(self, env: gym.Env, seed: int) -> None:
        """Choose the stroke of the episode that has just begun."""
        rng = np.random.default_rng([seed, 0x511DE])
        self._stroke, best = Stroke(), np.inf
        for k in range(self.TRIES):
            stroke = self._near(rng, k) if k else self._stroke
            miss = self._try(env, stroke)
            if miss < best:
                self._stroke, best = stroke, miss
            if best < self.GOOD:
                return

    def act(self, env: gym.Env, observation: dict[str, np.ndarray]) -> np.ndarray:
        """Return the stroke's action."""
        return _action(self._stroke, observation)

    def _near(self, rng: np.random.Generator, k: int) -> Stroke:
        """Return a stroke near the usual one or, later and ever nearer, near the best so far."""
        half = self.TRIES // 2
        centre, width = (Stroke(), 1.0) if k < half else (self._stroke, 1.0 - 0.9 * (k / half - 1))
        return Stroke(
            strength=centre.strength * np.exp(0.2 * width * rng.normal()),
            turn=centre.turn + 0.08 * width * rng.normal(),
            distance=float(
                np.clip(centre.distance + 0.03 * width * rng.uniform(-1, 1), 0.07, 0.13)
            ),
        )

    def _try(self, env: gym.Env, stroke: Stroke) -> float:
        """Return how far from the goal the puck ends; the simulator stays as it is."""
        world = env.unwrapped
        real = world.data
        observation = world._get_obs()
        world.data = copy.copy(real)
        try:
            for _ in range(self._decisions):
                rounded = {key: value.astype(np.float32) for key, value in observation.items()}
                observation = world.step(_action(stroke, rounded))[0]
        finally:
            world.data = real
        return float(np.linalg.norm(observation["achieved_goal"] - observation["desired_goal"]))


def _way(here: np.ndarray, goal: np.ndarray) -> tuple[float, np.ndarray]:
    """Return how far it is on the table, and in which direction."""
    way = (goal - here)[:2]
    left = float(np.linalg.norm(way))
    return left, way / max(left, 1e-6)


def _seen_from(thing: np.ndarray, hand: np.ndarray, ahead: np.ndarray) -> tuple[float, np.ndarray]:
    """Return how far the hand is ahead of a thing, and its offset to the side."""
    off = (hand - thing)[:2]
    along = float(off @ ahead)
    return along, off - along * ahead


def _get_behind(
    hand: np.ndarray,
    thing: np.ndarray,
    ahead: np.ndarray,
    distance: float,
    height: float,
    lined: bool,
) -> np.ndarray:
    """Return the action that brings the hand down behind a thing, passing over it."""
    target = thing.copy()
    target[:2] -= distance * ahead
    if lined and np.linalg.norm(hand[:2] - target[:2]) < 0.03:
        return _towards(hand, target)
    target[2] += height
    if hand[2] < thing[2] + 0.6 * height:  # first up, where nothing is touched
        target[:2] = hand[:2]
    return _towards(hand, target)


def _towards(hand: np.ndarray, target: np.ndarray, fingers: float = STILL) -> np.ndarray:
    return np.append(GAIN * (target - hand), fingers)


RULES = {"PickAndPlace": _pick_and_place, "Push": _push, "Reach": _reach, "Slide": Stroke()}
"""By the name of the task."""
