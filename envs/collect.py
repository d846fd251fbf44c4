"""Collecting demonstrations: experts play, worker processes share the work, stores keep it.

Attempt k of a task is reset with one seed and draws its noise from that seed, so it is the same
episode in any process and in any order. A store keeps the first `episodes` attempts that are good
enough, in order of k; so it is the same whatever the number of workers, and a store that was cut
short goes on after its last seed.

A worker stays with its task, since another world may take seconds to start, and helps with
another's when its own is dealt out. What would leave it idle it spends on attempts beyond those
that are surely wanted: an expert fails now and then.

Convention: the seed of attempt k is ``seed * ATTEMPTS + k``, below `EVALUATION_SEED_START`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from gato.envs import cameras, registry
from gato.envs.check import require_within
from gato.envs.episode import EVALUATION_SEED_START, Episode, TaskSpec
from gato.envs.files import make_folder
from gato.envs.play import Attempts, Failed, close_worlds, disturb, player
from gato.envs.store import EpisodeStore, EpisodeWriter
from gato.envs.workers import Pool, WorkerDiedError

ATTEMPTS = 1 << 20
"""Attempts that one seed of `collect` has room for."""
FLUSH_SECONDS = 2.0
"""Work that a kill may lose, or twenty times what writing it takes."""
SHARE_STEPS = 8192
"""Steps, at the tasks' time limit, that are dealt to a worker at once."""
SPARE = 4
"""Attempts per worker that may be played beyond those surely wanted."""
GIVE_UP = 50
"""Attempts without a single kept episode after which an expert counts as broken."""

Progress = Callable[[str, int, int, int], None]
"""Called with a task id, the episodes kept so far, those wanted, and the attempts they took."""


@dataclass(frozen=True)
class Collected:
    """What became of one task."""

    task: str
    store: Path
    kept: int
    """Episodes in the store."""
    new: int
    """Those of them that this call has added."""
    tried: int
    """Attempts that all of them took."""
    mean_return: float
    success_rate: float | None
    """None where the task defines no success."""
    seconds: float
    """Until the last was kept; tasks are played side by side."""


def collect(
    task_ids: Sequence[str],
    episodes: int,
    out: str | Path,
    *,
    expert: str = "auto",
    seed: int = 0,
    noise: float = 0.0,
    workers: int = 2,
    min_fraction: float = 0.8,
    timeout: float | None = 600.0,
    progress: Progress | None = None,
    on_done: Callable[[Collected], None] | None = None,
) -> dict[str, Path]:
    """Fill one store per task under ``out/<suite>/<name>`` and return their folders.

    Stores that are already there, made with the same settings, are filled up to `episodes`.

    Args:
        task_ids: tasks with an expert.
        episodes: kept episodes wanted per task.
        out: folder of the stores.
        expert: who plays, as in `registry.make_expert`.
        seed: chooses the training seeds, [0, 1024).
        noise: of the executed actions (DART): the standard deviation, in the Box's own units, for
            continuous actions; the probability of a random one for discrete actions. Targets are
            the expert's clean actions.
        workers: processes; with 0 the work is done in this one.
        min_fraction: episodes below this part of the way from the random to the expert score are
            dropped; where the task measures success, those without it are. The score that this
            makes stands in the store's settings; nothing is dropped, and it is told, where the
            table of scores names none, or an expert no better than chance.
        timeout: seconds that one step or reset may take before its worker process is ended, which
            is a death like any other. In this process (`workers` 0) nothing ends it.
        progress: see `Progress`.
        on_done: called at the end with what became of each task.

    Raises:
        ValueError: for an unknown task, a task without such an expert, a bad setting, or a folder
            that cannot be written.
        RuntimeError: where an attempt fails (the world or the expert raises, or its worker
            process ends twice), or none of an expert's first attempts can be kept.
    """
    _check_settings(task_ids, episodes, seed, noise, workers, min_fraction)
    kinds = {task_id: _expert(task_id, expert) for task_id in task_ids}
    folders = {task_id: Path(out) / registry.folder_of(task_id) for task_id in task_ids}
    least = _least_scores(task_ids, min_fraction, expert)
    for folder in folders.values():
        make_folder(folder, "a folder for a store")
    with ExitStack() as stack:
        stack.callback(close_worlds)
        plans = []
        for task_id, folder in folders.items():
            spec = registry.spec(task_id)
            settings = {
                "expert": kinds[task_id],
                "seed": seed,
                "noise": noise,
                "min_fraction": min_fraction,
                "least_score": least[task_id],
            }
            writer = EpisodeWriter(
                folder, spec, settings=settings, versions=registry.versions(spec.suite)
            )
            stack.callback(writer.close)  # what an interrupted run has collected is kept
            plans.append(_Plan(spec, writer, episodes, seed * ATTEMPTS, least[task_id]))
        pool = Pool(workers, player, timeout=timeout)
        stack.callback(pool.close)
        _run(plans, pool, expert, noise, progress)
    if on_done:
        for plan in plans:
            on_done(plan.summary())
    return folders


@dataclass(eq=False)
class _Plan:
    """What is left to do for one task."""

    spec: TaskSpec
    writer: EpisodeWriter
    wanted: int
    first_seed: int
    least_score: float | None
    """What an episode must reach to be kept, where the task does not measure success."""
    tried: int = 0
    kept: int = 0
    flushed: float = field(default_factory=time.monotonic)
    flushing: float = 0.0
    """Seconds that it took."""
    arrived: dict[int, Episode | Failed] = field(default_factory=dict)
    """Attempts by seed whose turn has not come."""

    def __post_init__(self) -> None:
        self.begun = self.ended = time.monotonic()
        self.due = self.writer.last_seed + 1 if len(self.writer) else self.first_seed
        self.dealt = self.due
        """The first seed that no worker was given."""

    @property
    def missing(self) -> int:
        return max(self.wanted - len(self.writer), 0)

    @property
    def open(self) -> int:
        """Attempts still to be dealt out if all succeed; negative where more are under way."""
        return self.missing - (self.dealt - self.due) if self.missing else 0

    def take(self, attempts: Sequence[Episode | Failed]) -> None:
        """Take attempts in any order; keep those that are good enough, in the order of seeds."""
        self.arrived |= {a.seed: a for a in attempts}
        while self.missing and self.due in self.arrived:
            self._next(self.arrived.pop(self.due))
            self.ended = time.monotonic()
        begun = time.monotonic()
        if begun - self.flushed > max(FLUSH_SECONDS, 20 * self.flushing):
            self.writer.flush()
            self.flushed = time.monotonic()
            self.flushing = self.flushed - begun

    def summary(self) -> Collected:
        """Return what is in the store, which is closed."""
        store = EpisodeStore(self.writer.path)
        known = store.successes >= 0
        return Collected(
            task=self.spec.id,
            store=store.path,
            kept=len(store),
            new=self.kept,
            tried=self.due - self.first_seed,
            mean_return=float(store.returns.mean()),
            success_rate=float(store.successes[known].mean()) if known.any() else None,
            seconds=round(self.ended - self.begun, 1),
        )

    def _next(self, attempt: Episode | Failed) -> None:
        if isinstance(attempt, Failed):
            error = RuntimeError(
                f"{self.spec.id!r} at seed {attempt.seed}: {attempt.reason.rstrip('.')}. What was "
                f"collected before is kept in {self.writer.path}."
            )
            error.add_note(attempt.detail)
            raise error
        self.due += 1
        self.tried += 1
        if self._good(attempt):
            self.kept += 1
            self.writer.append(attempt)
        elif not self.kept and self.tried >= GIVE_UP:
            raise RuntimeError(
                f"expected the expert of {self.spec.id!r} to succeed; none of {self.tried} "
                f"attempts can be kept (last return {attempt.score:.3g}, "
                f"success {attempt.success}). Lower the noise or min_fraction."
            )

    def _good(self, episode: Episode) -> bool:
        if self.spec.measure == "success":
            return bool(episode.success)
        return self.least_score is None or episode.score >= self.least_score


@dataclass(eq=False)
class _Share:
    """Attempts dealt to one worker."""

    plan: _Plan
    first: int
    """The first that it has not reported."""
    stop: int
    died: bool = False
    """Whether its worker died, so that the rest is reported one by one."""
    suspect: int | None = None
    """The seed at which one died that reported one by one."""


def _run(
    plans: list[_Plan], pool: Pool, expert: str, noise: float, progress: Progress | None
) -> None:
    """Keep every worker busy; the attempts of a plan are taken in order, whoever is first."""
    shares: dict[int, _Share] = {}
    last: dict[int, _Plan] = {}
    lost: list[_Share] = []

    def ask(worker: int) -> None:
        share = shares.get(worker) or (lost.pop() if lost else _deal(plans, shares, last, worker))
        if share is None:
            return
        shares[worker], last[worker] = share, share.plan
        count = share.stop - share.first
        task = share.plan.spec.id
        one_by_one = share.died or pool.here  # in this process reporting costs nothing
        pool.send(worker, Attempts(task, expert, noise, share.first, count, one_by_one))

    while any(plan.missing for plan in plans):
        for worker in range(pool.count):
            if worker not in shares:
                ask(worker)
        for worker, answer in pool.receive():
            share = shares[worker]
            if isinstance(answer, WorkerDiedError):
                del shares[worker]
                answer = _died(share, answer, lost)
            else:
                share.first += len(answer)
                if share.first == share.stop:
                    del shares[worker]
                ask(worker)  # first: it plays on while we write
            plan = share.plan
            plan.take(answer)
            if progress:
                progress(plan.spec.id, len(plan.writer), plan.wanted, plan.due - plan.first_seed)


def _died(share: _Share, error: WorkerDiedError, lost: list[_Share]) -> list[Failed]:
    """Let a share be played once more; return its first attempt as failed where that died twice.

    A worker that reports many attempts at once may have died at any of them.
    """
    if share.suspect == share.first:
        reason = f"the {error}, twice: a simulator crashed or memory ran out. Try fewer workers."
        return [Failed(share.first, reason)]
    where = f"{share.plan.spec.id!r} at seeds {share.first} to {share.stop - 1}"
    print(f"{where}: {error}; playing these once more in a new one", file=sys.stderr)
    if share.died or share.stop - share.first == 1:
        share.suspect = share.first
    share.died = True
    lost.append(share)
    return []


def _deal(
    plans: list[_Plan], shares: Mapping[int, _Share], last: Mapping[int, _Plan], worker: int
) -> _Share | None:
    """Return what a worker does next; None where it could only waste its time."""
    busy = [share.plan for share in shares.values()]
    workers = len({*shares, worker})
    open_ = [plan for plan in plans if plan.open > 0]
    if open_:
        plan = min(open_, key=lambda p: (p is not last.get(worker), busy.count(p)))
        most = max(1, SHARE_STEPS // plan.spec.max_steps)
        count = max(1, min(most, plan.open // (2 * workers)))
    else:
        ahead = [plan for plan in plans if plan.missing and plan.open > -SPARE * workers]
        if not ahead:
            return None
        plan, count = max(ahead, key=lambda p: p.open), 1
    plan.dealt += count
    return _Share(plan, plan.dealt - count, plan.dealt)


def _expert(task_id: str, kind: str) -> str:
    """Return what a store remembers of its expert: the kind and, where it has any, settings."""
    found = registry.make_expert(task_id, kind)
    kind = registry.spec(task_id).expert if kind == "auto" else kind
    return str(getattr(found, "settings", kind))


def _least_scores(
    task_ids: Sequence[str], min_fraction: float, kind: str
) -> dict[str, float | None]:
    """Return the least score of a kept episode by task; None where there is none, which is told.

    None without a word where the task measures success.
    """
    least: dict[str, float | None] = dict.fromkeys(task_ids)
    unknown = []
    for task_id in task_ids:
        spec = registry.spec(task_id)
        low, high = spec.random_score, spec.expert_score
        if spec.measure == "success":
            continue
        if low is None or high is None or high <= low:
            unknown.append(task_id)
        else:
            least[task_id] = low + min_fraction * (high - low)
    if unknown:
        task = cameras.split(unknown[0])[0]
        own = "" if registry.has_expert(task) else f" --expert {kind}"
        print(
            f"every episode is kept, good or bad, of {', '.join(unknown)}: no score of an expert "
            f"above the random policy's is known. Measure them: gato experts score {task!r} "
            f"--policy both --write{own}",
            file=sys.stderr,
        )
    return least


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
    require_within(
        episodes=(episodes, 1, ATTEMPTS),
        seed=(seed, 0, EVALUATION_SEED_START // ATTEMPTS - 1),
        noise=(noise, 0.0, 10.0),
        workers=(workers, 0, 1024),
        min_fraction=(min_fraction, 0.0, 1.0),
    )
    for task_id in task_ids:
        space = registry.spec(task_id).action_space
        if noise:
            disturb(space, space.sample(), noise, np.random.default_rng(0))
