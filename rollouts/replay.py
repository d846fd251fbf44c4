"""Whether logged episodes happen again: their actions in the simulator, from their seeds.

What is compared is all that the store holds: every observation bit for bit, rewards, how the
episode ended, its return, and success. Executed actions are replayed, never the clean targets
beside them.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np

from gato.envs import registry
from gato.envs.episode import Episode, TaskSpec, flatten_space, flatten_value, unflatten_value
from gato.envs.gym import require_imported
from gato.envs.store import EpisodeStore


@dataclass(frozen=True)
class Replayed:
    """One episode, as it is in the store and as it went now."""

    store: str
    episode: int
    """Its index in the store."""
    task: str
    seed: int
    steps: int
    return_logged: float
    return_now: float
    success_logged: bool | None
    success_now: bool | None
    reproduced: bool
    difference: str | None
    """The first thing that went otherwise; None where nothing did."""


def replay(store: EpisodeStore, indices: Sequence[int]) -> Iterator[Replayed]:
    """Yield what became of episodes of a store, in one environment.

    Raises:
        ValueError: for an episode that is not there, a task whose simulator is not, or one whose
            module is not imported (see `gym.require_imported`).
    """
    require_imported([store.spec.id])
    for index in indices:
        if not -len(store) <= index < len(store):
            raise ValueError(f"expected an episode in [0, {len(store)}); got {index}.")
    env = registry.make(store.spec.id)
    try:
        for index in indices:
            index %= len(store)
            yield _again(env, store, index)
    finally:
        env.close()


def changed_versions(manifest: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Return the packages that are not those a store was made with: (then, now) by name."""
    suite = str(manifest["spec"]["id"]).split("/")[0]
    now = {"numpy": np.__version__, **registry.versions(suite)}
    then = manifest["versions"]
    return {k: (then[k], now[k]) for k in then if k in now and then[k] != now[k]}


def _again(env: gym.Env, store: EpisodeStore, index: int) -> Replayed:
    episode, spec = store.episode(index), store.spec
    run = _Run(episode, spec)
    try:
        run.go(env)
    except Exception as error:  # whatever a simulator raises is a difference
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(last.filename).name}:{last.lineno}"
        run.differs(f"{type(error).__name__}: {error} ({where})")
    stored = float(store.returns[index])
    # an imported episode may have been summed before its rewards were rounded to float32
    slack = 1e-6 * (1.0 + float(np.abs(episode.rewards, dtype=np.float64).sum()))
    if not abs(stored - episode.score) <= slack:  # true for nan
        run.differs(f"return is {stored} in the store, whose rewards sum to {episode.score}")
    return Replayed(
        store=str(store.path),
        episode=index,
        task=spec.id,
        seed=episode.seed,
        steps=len(episode),
        return_logged=stored,
        return_now=float(np.sum(np.array(run.rewards, np.float32), dtype=np.float64)),
        success_logged=episode.success,
        success_now=run.success,
        reproduced=run.difference is None,
        difference=run.difference,
    )


class _Run:
    """An episode under way again; what differs first is kept."""

    def __init__(self, episode: Episode, spec: TaskSpec) -> None:
        self.episode, self.spec = episode, spec
        self.leaves = flatten_space(spec.observation_space, "observation")
        self.rewards: list[float] = []
        self.success: bool | None = None
        self.difference: str | None = None

    @property
    def steps(self) -> int:
        return len(self.rewards)

    def go(self, env: gym.Env) -> None:
        """Do what was logged until either ends."""
        episode, space = self.episode, self.spec.action_space
        observation, _ = env.reset(seed=episode.seed)
        self._observed(observation)
        for t in range(len(episode)):
            flat = {path: column[t] for path, column in episode.actions.items()}
            action = unflatten_value(space, flat, "action")
            observation, reward, terminated, truncated, info = env.step(action)
            self.rewards.append(float(reward))
            success = info.get("success")
            self.success = None if success is None else bool(success)
            self._observed(observation)
            self._same("reward", episode.rewards[t], np.float32(reward))
            self._same("terminated", bool(episode.terminated[t]), bool(terminated))
            self._same("truncated", bool(episode.truncated[t]), bool(truncated))
            if terminated or truncated:
                break
        self._same("success", episode.success, self.success)

    def _observed(self, observation: Any) -> None:
        flat = flatten_value(self.spec.observation_space, observation, "observation")
        for path, leaf in self.leaves.items():
            logged = self.episode.observations[path][self.steps]
            if isinstance(leaf, gym.spaces.Text):
                self._same(repr(path), logged, str(flat[path]))
                continue
            now = np.asarray(flat[path], leaf.dtype)
            other = np.argwhere(np.asarray(logged) != now) if np.shape(logged) == now.shape else []
            if len(other):
                at = tuple(int(k) for k in other[0])
                where = f"{path!r} at {list(at)}" if at else repr(path)
                self._same(where, np.asarray(logged)[at].item(), now[at].item())
            else:
                self._same(f"shape of {path!r}", np.shape(logged), now.shape)

    def _same(self, what: str, logged: Any, now: Any) -> None:
        if logged != now:
            self.differs(f"{what} is {logged} in the store", f"{now}")

    def differs(self, logged: str, now: str = "") -> None:
        """Keep a difference, if it is the first."""
        if self.difference is None:
            told = f"{logged}, {now} now" if now else logged
            self.difference = f"step {self.steps}: {told}"
