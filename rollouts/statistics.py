"""What the scores of episodes say about a policy, and how surely.

Scores are normalised, 0 for the random policy and 1 for the expert (or a person), and aggregated
as Agarwal et al. 2021 (arXiv 2108.13264) recommend: interquartile means, with intervals from a
stratified bootstrap, which draws each task's episodes anew and keeps the set of tasks. An interval
tells how another round of episodes of these weights might come out; it knows nothing of other
training seeds, nor of the error of the reference scores.

A few episodes drawn anew look too sure: two equal returns would make an interval of no width. So
there is none where a task has fewer than `FEWEST` episodes, and `too_few` says which task it is.

Convention: intervals cover 95%, are percentiles of `RESAMPLES` draws, and for the rate of one
task's successes are Wilson's: 20 successes in 20 episodes do not prove a rate of exactly 1.

Legend: R resamples, N episodes of a task.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

RESAMPLES = 2000
FEWEST = 5
"""Episodes of a task that an interval needs."""
BLOCK = 4_000_000
"""Scores drawn at once, to bound the memory."""
TAILS = (0.025, 0.975)
Z = 1.959963984540054
"""The standard normal quantile of the upper tail."""
THRESHOLDS = np.arange(21) / 20
"""Parts of the expert's score at which the result lists the share of tasks (Gato, figure 5)."""
Task = Mapping[str, Any]
"""What an evaluation keeps of one task."""


def normalised(score: Any, random: float | None, reference: float | None) -> Any:
    """Return the part of the way from `random` to `reference`, of a number or an array.

    None where one of them is unknown, or the reference is no better than random.
    """
    if random is None or reference is None or reference <= random:
        return None
    return (score - random) / (reference - random)


def excluded(task: Task) -> str | None:
    """Return why a task has no normalised score; None where it has one."""
    random, expert = task["random_score"], task["expert_score"]
    if random is None or expert is None:
        return f"no {'random' if random is None else 'expert'} score is known"
    if expert <= random:
        return f"the expert ({expert:.4g}) is no better than random ({random:.4g})"
    return None


def episode_scores(task: Task) -> np.ndarray:
    """Return (N,) raw scores of a task's episodes, in the measure of its references."""
    by_success = task["measure"] == "success"
    return np.array(task["successes"] if by_success else task["returns"], float)


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


def trimmed_mean(values: np.ndarray) -> np.ndarray:
    """Return (R,): the mean of each row (R, n) without its n // 4 lowest and highest values.

    It is what `rliable` calls the interquartile mean, over all episodes of all tasks.
    """
    n = values.shape[1]
    cut = n // 4
    # The middle need not be in order, only the right values: a partition is enough.
    middle = np.partition(values, (cut, n - cut - 1), axis=1)[:, cut : n - cut]
    return middle.mean(1)


def resampled(scores: np.ndarray, rng: np.random.Generator, count: int = RESAMPLES) -> np.ndarray:
    """Return (R, N): as many episodes as there are, drawn with replacement, `count` times."""
    return scores[rng.integers(len(scores), size=(count, len(scores)))]


def percentiles(draws: np.ndarray) -> list[float]:
    """Return the 95% interval of (R,) draws."""
    return [float(q) for q in np.quantile(draws, TAILS)]


def wilson(successes: float, episodes: int) -> list[float]:
    """Return Wilson's 95% interval of a rate of success.

    >>> [round(x, 3) for x in wilson(20, 20)]
    [0.839, 1.0]
    """
    n, rate = episodes, successes / episodes
    centre, spread = rate + Z**2 / (2 * n), Z * np.sqrt(rate * (1 - rate) / n + (Z / (2 * n)) ** 2)
    low, high = (centre - spread) / (1 + Z**2 / n), (centre + spread) / (1 + Z**2 / n)
    return [float(min(low, rate)), float(max(high, rate))]


def newcombe(first: np.ndarray, second: np.ndarray) -> list[float]:
    """Return Newcombe's 95% interval, made of Wilson's, of one rate of ones minus another's."""
    (low_a, high_a), (low_b, high_b) = (wilson(s.sum(), len(s)) for s in (first, second))
    rate_a, rate_b = first.mean(), second.mean()
    down = np.hypot(rate_b - low_b, high_a - rate_a)
    up = np.hypot(high_b - rate_b, rate_a - low_a)
    return [float(rate_b - rate_a - down), float(rate_b - rate_a + up)]


def sign_test(better: int, worse: int) -> float:
    """Return how probable it is that chance alone divides pairs so unevenly, or more so.

    >>> round(sign_test(5, 0), 4), round(sign_test(1, 9), 4), sign_test(4, 4)
    (0.0625, 0.0215, 1.0)
    """
    pairs, k = better + worse, np.arange(1, min(better, worse) + 1)
    ways = np.concatenate([[0.0], np.log((pairs - k + 1) / k).cumsum()])  # log of n over k
    return float(min(1.0, 2 * np.exp(ways - pairs * np.log(2)).sum()))


def mean_interval(task: Task, seed: int = 0) -> list[float] | None:
    """Return the 95% interval of a task's mean raw score; None for fewer than `FEWEST` episodes."""
    scores = episode_scores(task)
    if len(scores) < FEWEST:
        return None
    if task["measure"] == "success":
        return wilson(scores.sum(), len(scores))
    return percentiles(resampled(scores, np.random.default_rng(seed)).mean(1))


def difference_interval(a: Task, b: Task, seed: int = 0) -> list[float] | None:
    """Return the 95% interval of the mean raw score of `b` minus that of `a`.

    Their episodes are taken as independent, also where the seeds are the same: paired intervals
    would be narrower where both policies find the same seeds hard. Rates of success are compared
    by Newcombe's interval, which is made of Wilson's. None where one of them has fewer episodes
    than `FEWEST`.
    """
    first, second = episode_scores(a), episode_scores(b)
    if min(len(first), len(second)) < FEWEST:
        return None
    if a["measure"] == "success":
        return newcombe(first, second)
    rng = np.random.default_rng(seed)
    return percentiles(resampled(second, rng).mean(1) - resampled(first, rng).mean(1))


def of_task(task: Task, seed: int = 0) -> dict[str, Any]:
    """Return the figures of one task: normalised means, the expert's with interval and spread."""
    random, scores = task["random_score"], episode_scores(task)
    interval = mean_interval(task, seed)
    result: dict[str, Any] = {}
    for who in ("expert", "human"):
        value = normalised(float(scores.mean()), random, task[f"{who}_score"])
        result[f"{who}_normalised"] = value
    known = result["expert_normalised"] is not None
    result["expert_normalised_ci95"] = (
        [normalised(x, random, task["expert_score"]) for x in interval]
        if known and interval
        else None
    )
    spread = float(normalised(scores, random, task["expert_score"]).std()) if known else None
    return {**result, "expert_normalised_std": spread}


def too_few(tasks: Mapping[str, Task]) -> str | None:
    """Return which tasks have too few episodes for intervals, in a sentence; None where none has.

    >>> too_few({"a/b": {"returns": [1.0, 2.0]}, "a/c": {"returns": [1.0] * 20}})
    'no intervals: they need 5 episodes of each task or more, and a/b has 2'
    """
    counts = {name: len(task["returns"]) for name, task in tasks.items()}
    few = {name: count for name, count in counts.items() if count < FEWEST}
    if not few:
        return None
    name, count = min(few.items(), key=lambda item: item[1])
    others = f" ({len(few) - 1} more tasks have too few)" if len(few) > 1 else ""
    least = f"they need {FEWEST} episodes of each task or more"
    return f"no intervals: {least}, and {name} has {count}{others}"


class Stratified:
    """Normalised scores of several tasks, and the same drawn anew `RESAMPLES` times."""

    def __init__(self, tasks: Sequence[Task], seed: int = 0, reference: str = "expert") -> None:
        """Draw.

        Args:
            tasks: with a normalised score each.
            seed: of the draws.
            reference: ``expert`` or ``human``.
        """
        rng = np.random.default_rng(seed)
        found = [
            normalised(episode_scores(t), t["random_score"], t[f"{reference}_score"]) for t in tasks
        ]
        self.sure = min(map(len, found)) >= FEWEST
        """Whether there are episodes enough for intervals."""
        self.means = np.array([s.mean() for s in found])  # (tasks,)
        self.trimmed = float(trimmed_mean(np.concatenate(found)[None])[0])
        means, trimmed, block = [], [], max(1, BLOCK // sum(map(len, found)))
        for start in range(0, RESAMPLES, block):
            drawn = [resampled(s, rng, min(block, RESAMPLES - start)) for s in found]
            means.append(np.stack([d.mean(1) for d in drawn], 1))
            trimmed.append(trimmed_mean(np.concatenate(drawn, 1)))
        self.drawn_means = np.concatenate(means)  # (R, tasks)
        self.drawn_trimmed = np.concatenate(trimmed)  # (R,)

    def interval(self, draws: np.ndarray) -> list[float] | None:
        """Return the 95% interval of (R,) figures of the draws; None for too few episodes."""
        return percentiles(draws) if self.sure else None

    def curve(self, thresholds: np.ndarray = THRESHOLDS) -> dict[str, Any]:
        """Return the share of tasks whose mean is at least each threshold, with its interval.

        ``low`` and ``high`` are None for too few episodes.
        """
        shares = [(self.drawn_means >= t).mean(1) for t in thresholds]
        low, high = np.array([np.quantile(s, TAILS) for s in shares]).T
        return {
            "of_expert": [round(float(t), 4) for t in thresholds],
            "share": [float((self.means >= t).mean()) for t in thresholds],
            "low": low.tolist() if self.sure else None,
            "high": high.tolist() if self.sure else None,
        }


def summary(tasks: Mapping[str, Task], seed: int = 0) -> dict[str, Any]:
    """Return the aggregates over tasks.

    ``expert_normalised_iqm`` is the interquartile mean of the tasks' mean scores, with its
    interval ``ci95``; ``episodes_iqm``, with ``episodes_iqm_ci95``, the one the literature quotes:
    of all episodes of all tasks in one pool. The middle half of ones and zeros is far from their
    mean, so where tasks are measured by success, ``mean`` with ``mean_ci95`` says more. ``human``
    holds the pooled mean and the median of the tasks, against people, over the tasks that have a
    human score. ``no_intervals`` says why there are none, and is None where there are.
    """
    reasons = {name: excluded(task) for name, task in tasks.items()}
    scored = {name: task for name, task in tasks.items() if reasons[name] is None}
    known = list(scored.values())
    named = ("expert_normalised_iqm", "ci95", "episodes_iqm", "episodes_iqm_ci95", "mean")
    empty = dict.fromkeys((*named, "mean_ci95", "median"))
    result: dict[str, Any] = {
        **empty,
        "tasks_at_50_percent": 0,
        "tasks_at_100_percent": 0,
        "tasks": len(known),
        "excluded": sorted(name for name, why in reasons.items() if why),
        "excluded_because": {name: why for name, why in sorted(reasons.items()) if why},
        "thresholds": None,
        "human": _human(tasks, seed),
        "no_intervals": too_few(scored),
    }
    if not known:
        return result
    drawn = Stratified(known, seed)
    return result | {
        "expert_normalised_iqm": float(interquartile_mean(drawn.means[None])[0]),
        "ci95": drawn.interval(interquartile_mean(drawn.drawn_means)),
        "episodes_iqm": drawn.trimmed,
        "episodes_iqm_ci95": drawn.interval(drawn.drawn_trimmed),
        "mean": float(drawn.means.mean()),
        "mean_ci95": drawn.interval(drawn.drawn_means.mean(1)),
        "median": float(np.median(drawn.means)),
        "tasks_at_50_percent": int((drawn.means >= 0.5).sum()),
        "tasks_at_100_percent": int((drawn.means >= 1.0).sum()),
        "thresholds": drawn.curve(),
    }


def _human(tasks: Mapping[str, Task], seed: int) -> dict[str, Any] | None:
    known = [t for t in tasks.values() if t.get("human_normalised") is not None]
    if not known:
        return None
    drawn = Stratified(known, seed, "human")
    return {
        "tasks": len(known),
        "mean": float(drawn.means.mean()),
        "median": float(np.median(drawn.means)),
        "median_ci95": drawn.interval(np.median(drawn.drawn_means, 1)),
        "episodes_iqm": drawn.trimmed,
        "episodes_iqm_ci95": drawn.interval(drawn.drawn_trimmed),
    }
