"""One attempt of an expert at a task, as an episode that depends on the seed alone."""

from __future__ import annotations

import contextlib
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np

from gato.envs import registry
from gato.envs.check import Inside, check_episode
from gato.envs.episode import Episode, TaskSpec, flatten_space, flatten_value, unflatten_value

REPORT_SECONDS = 0.5
"""Work after which a player hands over what he has: small enough to lose, and to hold."""
WORLDS = 8
"""Environments that a process keeps; starting one may cost seconds."""
World = tuple[gym.Env, registry.Expert]
"""An environment and who acts in it."""
Make = Callable[[str, str], registry.Expert]
"""Returns who acts in a task, by its id and who was asked for, as `registry.make_expert`."""
_worlds: dict[tuple[str, str, Make], World] = {}


Tick = Callable[[], None]


def silent() -> None:
    """Tell nobody."""


def play(
    env: gym.Env,
    expert: registry.Expert,
    spec: TaskSpec,
    seed: int,
    noise: float,
    tick: Tick = silent,
) -> Episode:
    """Return the episode that `expert` plays after ``env.reset(seed=seed)``.

    `tick` is called after each step: so long as it is, nothing hangs.
    """
    rng = np.random.default_rng([seed, 0xDA27])  # apart from the environment's own stream
    observation, _ = env.reset(seed=seed)
    inside = Inside(spec.observation_space)
    inside.require(observation, "reset")
    expert.reset(env, seed)
    observations, actions, targets, rewards = [observation], [], [], []
    success, terminated, truncated = None, False, False
    while not (terminated or truncated):
        clean = expert.act(env, observation)
        if noise:
            action = disturb(spec.action_space, clean, noise, rng)
        else:
            action = _as_logged(spec.action_space, clean)
        observation, reward, terminated, truncated, info = env.step(action)
        tick()
        inside.require(observation, f"step {len(rewards)}")
        observations.append(observation)
        actions.append(action)
        targets.append(clean)
        rewards.append(reward)
        success = info.get("success")
    ends = np.zeros((2, len(rewards)), np.bool_)
    ends[:, -1] = terminated, truncated
    return Episode(
        task=spec.id,
        observations=by_column(spec.observation_space, observations, "observation"),
        actions=by_column(spec.action_space, actions, "action"),
        targets=by_column(spec.action_space, targets, "action") if noise else None,
        rewards=np.array(rewards, np.float32),
        terminated=ends[0],
        truncated=ends[1],
        instruction=spec.instruction,
        seed=seed,
        success=None if success is None else bool(success),
    )


@dataclass(frozen=True)
class Attempts:
    """Attempts at consecutive seeds, to be played by one process."""

    task: str
    expert: str
    """Of what kind, as in `registry.make_expert`."""
    noise: float
    first: int
    count: int
    one_by_one: bool = False
    """Whether each is reported by itself, so that what ends the process is known to the seed."""


@dataclass(frozen=True)
class Failed:
    """An attempt that has no episode."""

    seed: int
    reason: str
    """One sentence."""
    detail: str = ""
    """The traceback."""


def player(tick: Tick) -> Callable[[Attempts], list[Episode | Failed]]:
    """Return what plays attempts in a worker process, each time for about `REPORT_SECONDS`."""
    return partial(_play_some, tick)


def _play_some(tick: Tick, wanted: Attempts) -> list[Episode | Failed]:
    """Return the first attempts of those wanted, at least one."""
    until = time.monotonic() + (0.0 if wanted.one_by_one else REPORT_SECONDS)
    done: list[Episode | Failed] = []
    for k in range(wanted.count):
        done.append(attempt(wanted.task, wanted.expert, wanted.first + k, wanted.noise, tick))
        if time.monotonic() >= until:
            break
    return done


def attempt(
    task_id: str, kind: str, seed: int, noise: float, tick: Tick = silent
) -> Episode | Failed:
    """Return the episode of one seed, checked; or why there is none.

    Raises:
        ValueError: where the task or its expert cannot be started at all.
    """
    env, expert = world(task_id, kind)
    spec = registry.spec(task_id)
    try:
        episode = play(env, expert, spec, seed, noise, tick)
        check_episode(episode, spec)
    except Exception as error:  # whatever a simulator raises; what was kept before is not lost
        close_worlds()  # it may not be fit for another
        reason = f"the environment or its expert raised {type(error).__name__}: {error}"
        return Failed(seed, reason, traceback.format_exc())
    return episode


def close_worlds(kept: int = 0) -> None:
    """Close the environments of this process, all but those `kept` that were used last."""
    while len(_worlds) > kept:
        env, _ = _worlds.pop(next(iter(_worlds)))
        with contextlib.suppress(Exception):  # one that has thrown may do so again
            env.close()


def world(task_id: str, who: str, make: Make = registry.make_expert) -> World:
    """Return an environment and who acts in it, both of which this process goes on using."""
    found = _worlds.pop((task_id, who, make), None)
    if found is None:
        close_worlds(WORLDS - 1)
        found = start(task_id, who, make)
    _worlds[task_id, who, make] = found
    return found


def start(task_id: str, who: str, make: Make) -> World:
    """Return a new environment and who acts in it; the one is closed where there is no other."""
    env = registry.make(task_id)
    try:
        return env, make(task_id, who)
    except BaseException:
        env.close()
        raise


def disturb(space: gym.Space, clean: Any, noise: float, rng: np.random.Generator) -> Any:
    """Return what is executed in place of `clean`; the draws do not depend on its value.

    Raises:
        ValueError: for an action space that noise is not defined for.
    """
    flat = flatten_value(space, clean, "action")
    noisy = {}
    for path, leaf in flatten_space(space, "action").items():
        value = flat[path]
        match leaf:
            case gym.spaces.Box() if leaf.dtype.kind == "f":
                moved = value + rng.normal(0.0, noise, leaf.shape)
                noisy[path] = np.clip(moved, leaf.low, leaf.high).astype(leaf.dtype)
            case gym.spaces.Discrete():
                other = leaf.start + rng.integers(leaf.n)
                noisy[path] = np.int64(other if rng.random() < noise else value)
            case gym.spaces.MultiDiscrete():
                others = leaf.start + rng.integers(leaf.nvec)
                chosen = np.where(rng.random(leaf.shape) < noise, others, value)
                noisy[path] = chosen.astype(leaf.dtype)
            case gym.spaces.MultiBinary():
                others = rng.integers(2, size=leaf.shape)
                chosen = np.where(rng.random(leaf.shape) < noise, others, value)
                noisy[path] = chosen.astype(leaf.dtype)
            case _:
                raise ValueError(
                    f"expected numbers as actions where noise is {noise}; got {leaf}. "
                    f"Collect this task with noise=0."
                )
    return unflatten_value(space, noisy, "action")


def _as_logged(space: gym.Space, action: Any) -> Any:
    """Return an action as the store will hold it, so that replaying does the very same."""
    flat = flatten_value(space, action, "action")
    leaves = flatten_space(space, "action")
    exact = {path: np.array(value, leaves[path].dtype)[()] for path, value in flat.items()}
    return unflatten_value(space, exact, "action")


def by_column(space: gym.Space, values: list[Any], name: str) -> dict[str, Any]:
    """Return elements of a space as the columns of an episode, by the paths of their leaves."""
    rows = [flatten_value(space, value, name) for value in values]
    return {
        path: [str(row[path]) for row in rows]
        if isinstance(leaf, gym.spaces.Text)
        else np.array([row[path] for row in rows], leaf.dtype)
        for path, leaf in flatten_space(space, name).items()
    }
