"""Collecting demonstrations: experts play, worker processes share the work, stores keep it.

Attempt k of a task is reset with one seed and draws its noise from that seed, so it is the same
episode in any process and in any order. A store keeps the first `episodes` attempts that are good
enough, in order of k; so it is the same whatever the number of workers, and a store that was cut
short goes on after its last seed.

Convention: the seed of attempt k is ``seed * ATTEMPTS + k``, below `EVALUATION_SEED_START`.
"""

from __future__ import annotations

import platform
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np

from gato.envs import registry
from gato.envs.episode import (
    EVALUATION_SEED_START,
    Episode,
    TaskSpec,
    flatten_space,
    flatten_value,
    unflatten_value,
)
from gato.envs.store import EpisodeWriter
from gato.envs.workers import die_with_parent, one_thread_each

ATTEMPTS = 1 << 20
"""Attempts that one seed of `collect` has room for."""
FLUSH_SECONDS = 20.0
"""Work that a kill may lose."""
CHUNK_STEPS = 2048
"""Steps that a worker plays before it reports."""
GIVE_UP = 50
"""Attempts without a single kept episode after which an expert counts as broken."""

Progress = Callable[[str, int, int], None]
"""Called with a task id, the episodes kept so far, and those wanted."""


def collect(
    task_ids: Sequence[str],
    episodes: int,
    out: str | Path,
    *,
    seed: int = 0,
    noise: float = 0.0,
    workers: int = 2,
    min_fraction: float = 0.8,
    progress: Progress | None = None,
) -> dict[str, Path]:
    """Fill one store per task under ``out/<suite>/<name>`` and return their folders.

    Stores that are already there, made with the same settings, are filled up to `episodes`.

    Args:
        task_ids: tasks with an expert.
        episodes: kept episodes wanted per task.
        out: folder of the stores.
        seed: chooses the training seeds, [0, 1024).
        noise: of the executed actions (DART): the standard deviation, in the Box's own units, for
            continuous actions; the probability of a random one for discrete actions. Targets are
            the expert's clean actions.
        workers: processes; with 1 the work is done in this one.
        min_fraction: episodes below this part of the way from the random to the expert score are
            dropped; where the task measures success, those without it are.
        progress: see `Progress`.

    Raises:
        ValueError: for an unknown task, a task without an expert, or a bad setting.
        RuntimeError: where none of an expert's first attempts can be kept.
    """
    _check_settings(task_ids, episodes, seed, noise, workers, min_fraction)
    settings = {"seed": seed, "noise": noise, "min_fraction": min_fraction}
    folders = {task_id: Path(out) / task_id for task_id in task_ids}
    with ExitStack() as stack:
        plans = []
        for task_id, folder in folders.items():
            spec = registry.spec(task_id)
            writer = EpisodeWriter(folder, spec, settings=settings, versions=_versions(spec.suite))
            stack.callback(writer.close)  # what an interrupted run has collected is kept
            plans.append(_Plan(spec, writer, episodes, seed * ATTEMPTS, min_fraction))
        if workers == 1:
            for plan in plans:
                _run_here(plan, noise, progress)
        else:
            _run_pool(plans, noise, workers, progress)
    return folders


def play(env: gym.Env, expert: registry.Expert, spec: TaskSpec, seed: int, noise: float) -> Episode:
    """Return the episode that `expert` plays after ``env.reset(seed=seed)``."""
    rng = np.random.default_rng([seed, 0xDA27])  # apart from the environment's own stream
    observation, _ = env.reset(seed=seed)
    expert.reset(env, seed)
    observations, actions, targets, rewards = [observation], [], [], []
    success, terminated, truncated = None, False, False
    while not (terminated or truncated):
        clean = expert.act(env, observation)
        action = _disturb(spec.action_space, clean, noise, rng) if noise else clean
        observation, reward, terminated, truncated, info = env.step(action)
        observations.append(observation)
        actions.append(action)
        targets.append(clean)
        rewards.append(reward)
        success = info.get("success")
    ends = np.zeros((2, len(rewards)), np.bool_)
    ends[:, -1] = terminated, truncated
    return Episode(
        task=spec.id,
        observations=_by_column(spec.observation_space, observations, "observation"),
        actions=_by_column(spec.action_space, actions, "action"),
        targets=_by_column(spec.action_space, targets, "action") if noise else None,
        rewards=np.array(rewards, np.float32),
        terminated=ends[0],
        truncated=ends[1],
        instruction=spec.instruction,
        seed=seed,
        success=None if success is None else bool(success),
    )


@dataclass
class _Plan:
    """What is left to do for one task."""

    spec: TaskSpec
    writer: EpisodeWriter
    wanted: int
    first_seed: int
    min_fraction: float
    tried: int = 0
    kept: int = 0
    flushed: float = 0.0

    def __post_init__(self) -> None:
        self.next = self.writer.last_seed + 1 if len(self.writer) else self.first_seed
        self.flushed = time.monotonic()

    @property
    def missing(self) -> int:
        return max(self.wanted - len(self.writer), 0)

    def take(self, episode: Episode) -> None:
        """Keep the next attempt if it is good enough and still wanted."""
        if not self.missing:
            return
        self.tried += 1
        if self._good(episode):
            self.kept += 1
            self.writer.append(episode)
        elif not self.kept and self.tried >= GIVE_UP:
            raise RuntimeError(
                f"expected the expert of {self.spec.id!r} to succeed; none of {self.tried} "
                f"attempts can be kept (last return {episode.score:.3g}, "
                f"success {episode.success}). Lower the noise or min_fraction."
            )
        if time.monotonic() - self.flushed > FLUSH_SECONDS:
            self.writer.flush()
            self.flushed = time.monotonic()

    def _good(self, episode: Episode) -> bool:
        spec = self.spec
        if spec.measure == "success":
            return bool(episode.success)
        if spec.random_score is None or spec.expert_score is None:
            return True
        span = spec.expert_score - spec.random_score
        return episode.score >= spec.random_score + self.min_fraction * span


def _run_here(plan: _Plan, noise: float, progress: Progress | None) -> None:
    while plan.missing:
        plan.take(_attempt(plan.spec.id, plan.next, noise))
        plan.next += 1
        if progress:
            progress(plan.spec.id, len(plan.writer), plan.wanted)


def _run_pool(plans: list[_Plan], noise: float, workers: int, progress: Progress | None) -> None:
    """Keep every worker busy; the attempts of a plan are taken in order, whoever is first."""
    queues: dict[int, deque[tuple[Future, int]]] = {i: deque() for i in range(len(plans))}
    context = get_context("spawn")
    with one_thread_each(), ProcessPoolExecutor(workers, context, die_with_parent) as pool:
        try:
            while any(plan.missing for plan in plans):
                _submit(pool, plans, queues, noise, workers)
                heads = [queue[0][0] for queue in queues.values() if queue]
                wait(heads, return_when=FIRST_COMPLETED)
                for i, plan in enumerate(plans):
                    while queues[i] and queues[i][0][0].done():
                        for episode in queues[i].popleft()[0].result():
                            plan.take(episode)
                        if progress:
                            progress(plan.spec.id, len(plan.writer), plan.wanted)
        except BrokenProcessPool as error:
            raise RuntimeError(
                "a worker process ended at once: out of memory, or the calling script starts work "
                "outside `if __name__ == '__main__':`. Run again to go on; try workers=1."
            ) from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _submit(
    pool: ProcessPoolExecutor,
    plans: list[_Plan],
    queues: dict[int, deque[tuple[Future, int]]],
    noise: float,
    workers: int,
) -> None:
    """Submit chunks of attempts, task after task, until every worker has one waiting."""
    ahead = sum(len(queue) for queue in queues.values())
    for i, plan in enumerate(plans):
        while ahead < 2 * workers:
            open_ = plan.missing - sum(count for _, count in queues[i])
            if open_ <= 0:
                break
            count = max(1, min(CHUNK_STEPS // plan.spec.max_steps, open_ // (2 * workers)))
            future = pool.submit(_attempts, plan.spec.id, plan.next, count, noise)
            queues[i].append((future, count))
            plan.next += count
            ahead += 1


def _attempts(task_id: str, first_seed: int, count: int, noise: float) -> list[Episode]:
    return [_attempt(task_id, first_seed + k, noise) for k in range(count)]


def _attempt(task_id: str, seed: int, noise: float) -> Episode:
    env, expert = _world(task_id)
    return play(env, expert, registry.spec(task_id), seed, noise)


@lru_cache(maxsize=8)
def _world(task_id: str) -> tuple[gym.Env, registry.Expert]:
    """Return an environment that this process goes on using; starting one may cost seconds."""
    return registry.make(task_id), registry.make_expert(task_id)


def _disturb(space: gym.Space, clean: Any, noise: float, rng: np.random.Generator) -> Any:
    """Return what is executed in place of `clean`; the draws do not depend on its value."""
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
            case _:
                raise ValueError(
                    f"expected Box or Discrete actions where noise is {noise}; got {leaf}. "
                    f"Collect this task with noise=0."
                )
    return unflatten_value(space, noisy, "action")


def _by_column(space: gym.Space, values: list[Any], name: str) -> dict[str, Any]:
    rows = [flatten_value(space, value, name) for value in values]
    return {
        path: [str(row[path]) for row in rows]
        if isinstance(leaf, gym.spaces.Text)
        else np.array([row[path] for row in rows], leaf.dtype)
        for path, leaf in flatten_space(space, name).items()
    }


def _check_settings(
    task_ids: Sequence[str],
    episodes: int,
    seed: int,
    noise: float,
    workers: int,
    min_fraction: float,
) -> None:
    if isinstance(task_ids, str) or len(set(task_ids)) != len(task_ids):
        raise ValueError(f"expected a list of different task ids; got {task_ids!r}.")
    for task_id in task_ids:
        if registry.spec(task_id).expert == "none":
            registry.make_expert(task_id)  # raises, and says what to do
    limits = {
        "episodes": (episodes, 1, ATTEMPTS),
        "seed": (seed, 0, EVALUATION_SEED_START // ATTEMPTS - 1),
        "noise": (noise, 0.0, 10.0),
        "workers": (workers, 1, 1024),
        "min_fraction": (min_fraction, 0.0, 1.0),
    }
    for name, (value, low, high) in limits.items():
        if not low <= value <= high:
            raise ValueError(f"expected {name} in [{low}, {high}]; got {value}.")


def _versions(suite: str) -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in registry.packages(suite):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"  # starting the environment will name the extra
    return versions
