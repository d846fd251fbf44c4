"""Chosen tasks played while a model is being trained.

Convention: episode i is reset with seed `FIRST_SEED` + i, the same seeds every time. They lie below
`EVALUATION_SEED_START`, outside what corpora hold and outside what `gato eval` uses: the best of a
run's checkpoints may be chosen by these scores, and a score at seeds that something was chosen by
is no longer a fair one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch

from gato.envs import registry
from gato.envs.collect import ATTEMPTS
from gato.envs.episode import EVALUATION_SEED_START
from gato.envs.store import EpisodeStore
from gato.envs.workers import last_words
from gato.rollouts.agent import Agent
from gato.rollouts.evaluate import summarise
from gato.rollouts.hosts import DRAWING_AT_ONCE
from gato.rollouts.runner import Job, Played, run
from gato.telling import tell

FIRST_SEED = EVALUATION_SEED_START - ATTEMPTS
"""The last block of seeds that `gato collect` may draw from, that of ``--seed 1023``."""
Evaluate = Callable[[Path], dict[str, float]]


def evaluation(
    task_ids: Sequence[str],
    episodes: int,
    stores: Iterable[EpisodeStore],
    *,
    workers: int | None = None,
    timeout: float | None = 600.0,
    say: Callable[[str], None] = tell,
) -> Evaluate:
    """Return what plays tasks with a checkpoint and returns a score per task.

    A score is 0 as a random policy's and 1 as the expert's where the task has both; elsewhere it is
    the share of successes or the mean return. What fails in a simulator is told, and neither ends
    the training nor counts as a score of 0: a task of which no episode could be played has no
    score.

    Args:
        task_ids: tasks that the run is trained on.
        episodes: per task.
        stores: what it is trained on.
        workers: processes that step simulators; with 0 this one, which a simulator that crashes
            then takes with it; by default at most 2.
        timeout: seconds that one step may take.
        say: told of what failed.

    Raises:
        ValueError: for a task that is not trained on, one whose simulator does not start, or
            stores that hold these seeds.
    """
    seeds = range(FIRST_SEED, FIRST_SEED + episodes)
    _check(task_ids, seeds, list(stores))
    processes = min(2, os.cpu_count() or 1) if workers is None else workers

    def evaluate(checkpoint: Path) -> dict[str, float]:
        agent = Agent.load(checkpoint)
        threads = torch.get_num_threads()
        torch.set_num_threads(max(1, min(threads, (os.cpu_count() or 1) - processes)))
        try:
            played = run(
                lambda tasks, draws: agent.policy(tasks, None, draws),
                [Job(task, seed) for task in task_ids for seed in seeds],
                workers=processes,
                max_batch=DRAWING_AT_ONCE,  # the trainer's memory is taken too
                timeout=timeout,
            )
        finally:
            torch.set_num_threads(threads)
        return _scores(task_ids, played, say)

    def guarded(checkpoint: Path) -> dict[str, float]:
        try:
            return evaluate(checkpoint)
        except Exception as error:  # whatever it is, hours of training are worth more
            say(f"no scores of {checkpoint.name}: {type(error).__name__}: {error}")
            return {}

    return guarded


def _scores(
    task_ids: Sequence[str], played: Sequence[Played], say: Callable[[str], None]
) -> dict[str, float]:
    """Return the scores of what was played, and say what failed."""
    scores = {}
    for task in task_ids:
        of_task = [p for p in played if p.job.task == task]
        whole = [p for p in of_task if p.error is None]
        failed = [p for p in of_task if p.error is not None]
        if failed:
            last = last_words(str(failed[0].error))
            say(f"{len(failed)} of {len(of_task)} episodes of {task} failed: {last}")
        if whole:
            row = summarise(registry.spec(task), whole)
            known = (row[k] for k in ("expert_normalised", "success_rate", "mean_return"))
            scores[task] = float(next(value for value in known if value is not None))
    return scores


def _check(task_ids: Sequence[str], seeds: range, stores: list[EpisodeStore]) -> None:
    trained = {store.spec.id for store in stores}
    for task in task_ids:
        if task not in trained:
            known = ", ".join(sorted(trained)[:5]) or "none"
            raise ValueError(
                f"expected eval_tasks that the run is trained on ({known}); got {task!r}."
            )
    for store in stores:
        used = np.asarray(store.seeds)
        if ((used >= seeds.start) & (used < seeds.stop)).any():
            raise ValueError(
                f"expected stores without the seeds {seeds.start} to {seeds.stop - 1}, which are "
                f"played while training goes on; {store.path} holds some. Collect with another "
                f"--seed than {FIRST_SEED // ATTEMPTS}; where they were imported, leave "
                f"eval_tasks out and play with `gato eval` afterwards."
            )
    for task in {task.split("/")[0]: task for task in task_ids}.values():
        registry.make(task).close()  # a missing simulator is told now, not after the first hour
