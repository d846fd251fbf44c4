"""How well a checkpoint plays: episodes at seeds never trained on, scores with their context.

The result is JSON (see `evaluate`); scores are raw and normalised by the random policy and by the
expert, and aggregated over tasks as the interquartile mean of the tasks' normalised scores, its
95% interval by bootstrap over each task's episodes. A task whose expert is no better than random,
or unknown, is excluded by name.
"""

from __future__ import annotations

import os
import platform
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gato.envs import registry
from gato.envs.collect import ATTEMPTS
from gato.envs.episode import EVALUATION_SEED_START, Episode, TaskSpec
from gato.envs.store import EpisodeStore
from gato.rollouts.agent import Agent, load
from gato.rollouts.language import evaluate_language
from gato.rollouts.runner import Job, Played, run

__all__ = ["evaluate", "evaluate_language", "interquartile_mean", "summarise", "summary"]

Progress = Callable[[str, int, int], None]
"""Called with a task id, its episodes played so far, and those wanted."""
RESAMPLES = 2000


def evaluate(
    checkpoint: str | Path | Agent,
    task_ids: Sequence[str],
    episodes: int,
    *,
    seed: int = 0,
    workers: int = 2,
    temperature: float | None = None,
    prompt_store: str | Path | None = None,
    prompt_steps: int = 1,
    max_batch: int = 20,
    threads: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Return scores per task and over tasks, as JSON-able data.

    Args:
        checkpoint: a folder, or a loaded agent.
        task_ids: tasks the checkpoint knows.
        episodes: per task; episode i is reset with `EVALUATION_SEED_START` + i where `seed` is 0.
        seed: chooses other evaluation seeds, [0, 1024), and the draws of sampled actions.
        workers: processes that step simulators; 1 steps them in this one.
        temperature: of the actions; by default what each task was trained for.
        prompt_store: a store, or a folder of stores, of demonstrations to prompt with.
        prompt_steps: last steps of a demonstration that are shown.
        max_batch: most rows decoded at once.
        threads: of the model in this process; by default one per core that no worker has.
        progress: see `Progress`.

    Raises:
        ValueError: for an unknown task, one the model does not know, or a missing simulator.
    """
    _check(task_ids, episodes, seed, prompt_steps)
    agent = checkpoint if isinstance(checkpoint, Agent) else load(checkpoint)
    specs = {task: registry.spec(task) for task in task_ids}
    for task in task_ids:
        agent.serializer.task(task)
    prompts = _prompts(prompt_store, task_ids, prompt_steps) if prompt_store else None
    first = EVALUATION_SEED_START + seed * ATTEMPTS
    jobs = [Job(task, first + i) for task in task_ids for i in range(episodes)]
    began = time.perf_counter()
    with _threads(threads, workers):
        played = run(
            lambda tasks, seeds: agent.policy(tasks, temperature, seeds, prompts),
            jobs,
            workers=workers,
            max_batch=max_batch,
            seed=seed,
            on_played=_counted(progress, episodes),
        )
    tasks = {
        task: summarise(specs[task], [p for p in played if p.job.task == task]) for task in task_ids
    }
    return {
        "checkpoint": str(agent.checkpoint.path),
        "settings": {
            "episodes": episodes,
            "seed": seed,
            "first_seed": first,
            "temperature": temperature,
            "prompt": prompts and {"store": str(prompt_store), "steps": prompt_steps},
            "workers": workers,
            "max_batch": max_batch,
            **_circumstances(agent, specs),
        },
        "versions": _versions(task_ids),
        "seconds": time.perf_counter() - began,
        "tasks": tasks,
        "summary": summary(tasks, seed),
    }


@contextmanager
def _threads(wanted: int | None, workers: int) -> Iterator[None]:
    """Let the model use so many threads inside."""
    before = torch.get_num_threads()
    # Threads that wait for each other while simulators hold the cores may cost ten times more.
    busy = workers if workers > 1 else 0
    torch.set_num_threads(wanted or max(1, (os.cpu_count() or 1) - busy))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _counted(progress: Progress | None, episodes: int) -> Callable[[Played], None] | None:
    """Return what tells `progress` of each episode."""
    if progress is None:
        return None
    counts: Counter[str] = Counter()

    def tell(played: Played) -> None:
        counts[played.job.task] += 1
        progress(played.job.task, counts[played.job.task], episodes)

    return tell


def _circumstances(agent: Agent, specs: Mapping[str, TaskSpec]) -> dict[str, Any]:
    """Return what else decides the scores: memories, horizons and the suites' protocols."""
    return {
        "device": str(agent.model.table.weight.device),
        "histories": {t: asdict(agent.serializer.task(t).history) for t in specs},
        "max_steps": {t: spec.max_steps for t, spec in specs.items()},
        "protocols": {s: registry.protocol(s) for s in sorted({t.suite for t in specs.values()})},
    }


def _check(task_ids: Sequence[str], episodes: int, seed: int, prompt_steps: int) -> None:
    if isinstance(task_ids, str) or not task_ids or len(set(task_ids)) != len(task_ids):
        raise ValueError(f"expected a list of one or more different task ids; got {task_ids!r}")
    if episodes < 1 or not 0 <= seed < 1024 or prompt_steps < 1:
        raise ValueError(
            f"expected at least 1 episode, a seed in [0, 1023] and at least 1 prompt step; got "
            f"{episodes}, {seed} and {prompt_steps}"
        )


def _prompts(root: str | Path, task_ids: Sequence[str], steps: int) -> dict[str, Episode]:
    """Return the end of each task's first successful demonstration, its first where none is."""
    folders = [p.parent for p in sorted(Path(root).glob("**/manifest.json"))]
    stores = {store.spec.id: store for store in map(EpisodeStore, folders) if len(store)}
    missing = [task for task in task_ids if task not in stores]
    if missing:
        raise ValueError(f"expected demonstrations of {missing[0]!r} at {root}; found none")
    prompts = {}
    for task in task_ids:
        store = stores[task]
        good = np.flatnonzero(np.asarray(store.successes) == 1)
        index = int(good[0]) if len(good) else 0
        length = int(store.lengths[index])
        prompts[task] = store.window(index, max(0, length - steps), length)
    return prompts


def summarise(spec: TaskSpec, played: Sequence[Played]) -> dict[str, Any]:
    """Return the result of one task from its episodes."""
    defined = spec.measure == "success" or any(
        p.success is not None and not p.error for p in played
    )
    successes = [bool(p.success) for p in played] if defined else None
    returns = [p.score for p in played]
    scores = _scores(spec, returns, successes)
    result: dict[str, Any] = {
        "measure": spec.measure,
        "returns": returns,
        "successes": successes,
        "lengths": [p.length for p in played],
        "seeds": [p.job.seed for p in played],
        "mean_return": float(np.mean(returns)),
        "success_rate": None if successes is None else float(np.mean(successes)),
        "random_score": spec.random_score,
        "expert_score": spec.expert_score,
        "human_score": spec.human_score,
        "score_source": spec.score_source,
        "expert_normalised": normalised(float(np.mean(scores)), spec, spec.expert_score),
        "human_normalised": normalised(float(np.mean(scores)), spec, spec.human_score),
        "failures": [
            {"seed": p.job.seed, "traceback": p.error} for p in played if p.error is not None
        ],
    }
    return result


def _scores(
    spec: TaskSpec, returns: Sequence[float], successes: Sequence[bool] | None
) -> list[float]:
    if spec.measure == "success":
        assert successes is not None
        return [float(s) for s in successes]
    return list(returns)


def normalised(score: float, spec: TaskSpec, reference: float | None) -> float | None:
    """Return the part of the way from the random score to `reference`; None where there is none."""
    if spec.random_score is None or reference is None or reference <= spec.random_score:
        return None
    return (score - spec.random_score) / (reference - spec.random_score)


def summary(tasks: Mapping[str, Mapping[str, Any]], seed: int = 0) -> dict[str, Any]:
    """Return the aggregate over tasks; see the module."""
    known = {t: r for t, r in tasks.items() if r["expert_normalised"] is not None}
    result: dict[str, Any] = {
        "expert_normalised_iqm": None,
        "ci95": None,
        "mean": None,
        "median": None,
        "tasks_at_50_percent": 0,
        "tasks_at_100_percent": 0,
        "excluded": sorted(set(tasks) - set(known)),
    }
    if not known:
        return result
    values = np.array([r["expert_normalised"] for r in known.values()])
    rng = np.random.default_rng(seed)
    resampled = np.stack([_resampled(r, rng) for r in known.values()], 1)  # (R, tasks)
    spread = interquartile_mean(resampled)
    result |= {
        "expert_normalised_iqm": float(interquartile_mean(values[None])[0]),
        "ci95": [float(q) for q in np.quantile(spread, [0.025, 0.975])],
        "mean": float(values.mean()),
        "median": float(np.median(values)),
        "tasks_at_50_percent": int((values >= 0.5).sum()),
        "tasks_at_100_percent": int((values >= 1.0).sum()),
    }
    return result


def _resampled(task: Mapping[str, Any], rng: np.random.Generator) -> np.ndarray:
    """Return (R,) normalised scores of a task, its episodes drawn with replacement."""
    by_success = task["measure"] == "success"
    scores = np.array(task["successes"] if by_success else task["returns"], float)
    means = scores[rng.integers(len(scores), size=(RESAMPLES, len(scores)))].mean(1)
    span = task["expert_score"] - task["random_score"]
    return (means - task["random_score"]) / span


def interquartile_mean(values: np.ndarray) -> np.ndarray:
    """Return (R,): the mean of the middle half of each row (R, n), cut values counted in part.

    >>> interquartile_mean(np.array([[0.0, 1.0, 3.0, 100.0]])).tolist()
    [2.0]
    """
    ordered = np.sort(values, 1)
    n = ordered.shape[1]
    edges = np.arange(n + 1) / n
    inside = np.clip(np.minimum(edges[1:], 0.75) - np.maximum(edges[:-1], 0.25), 0, None)
    return ordered @ (inside / inside.sum())


def _versions(task_ids: Sequence[str]) -> dict[str, str]:
    names = {"gato", "torch", "numpy", "gymnasium"}
    for suite in {task.split("/")[0] for task in task_ids}:
        names |= set(registry.packages(suite))
    versions = {"python": platform.python_version()}
    for name in sorted(names):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    return versions
