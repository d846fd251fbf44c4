"""How well a task's expert and a random policy do: where the table of reference scores comes from.

Episodes are played one by one by worker processes, each at its own evaluation seed, so a figure
does not depend on how many workers there were. Nothing of an episode is kept but its return,
success and length.

Convention: episode k of sweep K has the seed ``EVALUATION_SEED_START + K * ATTEMPTS + k``.
"""

from __future__ import annotations

import time
import traceback
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np

from gato.envs import registry
from gato.envs.check import require_within
from gato.envs.collect import ATTEMPTS
from gato.envs.episode import EVALUATION_SEED_START, TaskSpec
from gato.envs.play import Tick, close_worlds, silent, start, world
from gato.envs.references import Reference
from gato.envs.workers import Pool, WorkerDiedError, deal

SWEEPS = 1 << 10
"""Seeds of sweeps, each with room for `ATTEMPTS` episodes."""
PLAYED_BY_US = ("expert", "random")
ACTIONS = 1
"""Sets the draws of random actions apart from a world's own; any other constant would do."""

Progress = Callable[[str], None]
"""Called with a task id after each of its episodes."""


class RandomExpert:
    """Acts uniformly at random, by the task and the seed of the episode.

    The world is reset with the same seed: drawn from it alone, the first actions would be the
    noise of the world's start, and those of all tasks alike.
    """

    def __init__(self, spec: TaskSpec) -> None:
        self._space = spec.action_space
        self._key = (ACTIONS, zlib.crc32(spec.id.encode()))

    def reset(self, env: gym.Env, seed: int) -> None:
        """Seed the draws of an episode."""
        self._space.seed(int(np.random.SeedSequence([seed, *self._key]).generate_state(1)[0]))

    def act(self, env: gym.Env, observation: Any) -> Any:
        """Return a random action."""
        return self._space.sample()


@dataclass(frozen=True)
class Played:
    """What is kept of one episode."""

    seed: int
    score: float = 0.0
    success: bool | None = None
    steps: int = 0
    seconds: float = 0.0
    expert: str = ""
    """The kind of expert that played and its settings."""
    error: str = ""
    """The traceback where the world or the expert raised."""


@dataclass(frozen=True)
class Score:
    """The episodes that one policy played of one task, by seed."""

    task: str
    policy: str
    """``expert`` or ``random``."""
    episodes: list[Played] = field(repr=False)

    @property
    def failed(self) -> list[Played]:
        return [e for e in self.episodes if e.error]

    @property
    def values(self) -> list[float]:
        """What the task's score is the mean of: successes or returns."""
        if registry.spec(self.task).measure == "success":
            return [float(bool(e.success)) for e in self.episodes]
        return [e.score for e in self.episodes]

    @property
    def seconds(self) -> float:
        """Time spent in these episodes, all workers together."""
        return sum(e.seconds for e in self.episodes)

    def reference(self) -> Reference:
        """Return the row of the table that these episodes make."""
        assert not self.failed, self.failed
        spec = registry.spec(self.task)
        return Reference(
            task=self.task,
            policy=self.policy,
            measure=spec.measure,
            mean=float(np.mean(self.values)),
            std=float(np.std(self.values)),
            episodes=len(self.episodes),
            first_seed=self.episodes[0].seed,
            expert=self.episodes[0].expert,
            versions=versions(spec.suite),
            source="measured here",
        )


def score(
    task_id: str,
    episodes: int,
    *,
    policy: str = "expert",
    kind: str = "auto",
    first_seed: int = EVALUATION_SEED_START,
) -> dict[str, Any]:
    """Return returns, successes (or None) and lengths of episodes at consecutive seeds.

    Args:
        task_id: any task.
        episodes: how many.
        policy: ``expert`` or ``random``.
        kind: which expert, as in `registry.make_expert`.
        first_seed: the seed of the first episode.
    """
    check_policy(policy)
    env, player = start(task_id, kind, _MAKE[policy])
    try:
        played = [one_episode(env, player, first_seed + k) for k in range(episodes)]
    finally:
        env.close()
    successes = [e.success for e in played]
    return {
        "policy": policy,
        "first_seed": first_seed,
        "returns": [e.score for e in played],
        "successes": None if None in successes else successes,
        "lengths": [e.steps for e in played],
        "mean_return": float(np.mean([e.score for e in played])),
        "success_rate": None if None in successes else float(np.mean(successes)),
    }


def score_all(
    pairs: Sequence[tuple[str, str]],
    episodes: int,
    *,
    kind: str = "auto",
    seed: int = 0,
    workers: int = 0,
    timeout: float | None = 600.0,
    progress: Progress | None = None,
) -> Iterator[Score]:
    """Play episodes of many tasks and yield each task's as soon as they are all there.

    Args:
        pairs: task ids, each with ``expert`` or ``random``.
        episodes: of each.
        kind: which experts, as in `registry.make_expert`.
        seed: of the sweep, [0, 1024): chooses the evaluation seeds.
        workers: processes that play; with 0 the episodes are played in this one.
        timeout: seconds that one step or reset may take before its worker process is ended, which
            fails an episode at the second time. In this process nothing ends it.
        progress: see `Progress`.

    Raises:
        ValueError: for a bad setting, a task without such an expert, or a missing simulator.
        RuntimeError: where a worker process cannot start.
    """
    require_within(
        episodes=(episodes, 1, ATTEMPTS), seed=(seed, 0, SWEEPS - 1), workers=(workers, 0, 1024)
    )
    for task_id, policy in pairs:
        check_policy(policy)
        if policy == "expert" and kind == "auto" and not registry.has_expert(task_id):
            registry.make_expert(task_id)  # raises, and says what to do
    first = EVALUATION_SEED_START + seed * ATTEMPTS
    named = [(registry.spec(task).id, policy) for task, policy in pairs]
    jobs = [(task, policy, kind, first + k) for task, policy in named for k in range(episodes)]
    kept: dict[tuple[str, str], list[Played]] = {}
    for task_id, policy, played in _results(jobs, workers, timeout):
        done = kept.setdefault((task_id, policy), [])
        done.append(played)
        if progress:
            progress(task_id)
        if len(done) == episodes:
            yield Score(task_id, policy, sorted(done, key=lambda e: e.seed))


def check_policy(policy: str) -> None:
    """Raise ValueError for a policy that is not played here."""
    if policy not in PLAYED_BY_US:
        raise ValueError(f"expected policy 'expert' or 'random'; got {policy!r}.")


def versions(suite: str) -> str:
    """Return the versions of what decides a suite's scores: ``metaworld 3.1.1; mujoco 3.3.0``."""
    found = registry.versions(suite)
    return "; ".join(f"{name} {found[name]}" for name in registry.packages(suite))


_Job = tuple[str, str, str, int]
"""Task, policy, kind of expert, seed."""
_Result = tuple[str, str, Played]


def _results(jobs: Sequence[_Job], workers: int, timeout: float | None) -> Iterator[_Result]:
    """Yield results as they come. An episode whose worker dies is played once more, then failed."""
    try:
        for job, answer, _ in deal(Pool(workers, _player, timeout=timeout), jobs, tries=2):
            if isinstance(answer, WorkerDiedError):
                answer = *job[:2], Played(job[3], error=f"twice, its {answer}")
            yield answer
    finally:
        close_worlds()


def _player(tick: Tick) -> Callable[[_Job], _Result]:
    """Return what plays episodes in a worker process."""
    return partial(_job, tick)


def _job(tick: Tick, job: _Job) -> _Result:
    task_id, policy, kind, seed = job
    env, player = world(task_id, kind, _MAKE[policy])
    try:
        played = one_episode(env, player, seed, tick)
    except Exception:  # whatever a simulator raises ends its episode, not the sweep
        close_worlds()  # it may not be fit for another
        return task_id, policy, Played(seed, error=traceback.format_exc())
    name = registry.spec(task_id).expert if kind == "auto" else kind
    settings = "" if policy == "random" else getattr(player, "settings", name)
    return task_id, policy, replace(played, expert=settings)


def _random(task_id: str, _: str) -> RandomExpert:
    return RandomExpert(registry.spec(task_id))


_MAKE = {"expert": registry.make_expert, "random": _random}


def one_episode(env: gym.Env, player: registry.Expert, seed: int, tick: Tick = silent) -> Played:
    """Return one episode in short; its observations would not fit into memory for long games."""
    began = time.perf_counter()
    observation, _ = env.reset(seed=seed)
    player.reset(env, seed)
    total, steps, ended = 0.0, 0, False
    while not ended:
        action = player.act(env, observation)
        observation, reward, terminated, truncated, info = env.step(action)
        tick()
        if not np.isfinite(reward):
            raise ValueError(f"expected finite rewards; got {reward} at step {steps}.")
        total, steps, ended = total + float(reward), steps + 1, bool(terminated or truncated)
    success = info.get("success")
    return Played(
        seed=seed,
        score=total,
        success=None if success is None else bool(success),
        steps=steps,
        seconds=time.perf_counter() - began,
    )
