"""Figures over tasks against references: scipy's bootstrap and what rliable computes."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy import stats

from gato.rollouts import statistics
from gato.rollouts.statistics import (
    Stratified,
    difference_interval,
    interquartile_mean,
    mean_interval,
    normalised,
    of_task,
    sign_test,
    summary,
    trimmed_mean,
    wilson,
)


def task(scores, measure: str = "return", random=0.0, expert=1.0, human=None) -> dict:
    """Return the kept result of a task with these returns or successes."""
    row = {
        "measure": measure,
        "returns": list(scores),
        "successes": list(scores) if measure == "success" else None,
        "random_score": random,
        "expert_score": expert,
        "human_score": human,
    }
    return row | of_task(row)


@pytest.fixture(scope="module")
def tasks() -> list[dict]:
    """Return tasks with unequal numbers of episodes, spreads and references."""
    rng = np.random.default_rng(5)
    gaussian = [
        task(10 * i + rng.normal(3 + i, 2, 12 + 3 * i), random=10.0 * i, expert=10 * i + 8.0)
        for i in range(5)
    ]
    return [*gaussian, task(rng.random(20) < 0.7, "success", random=0.1, expert=0.95)]


def reference(tasks: list[dict], statistic) -> tuple[float, float]:
    """Return scipy's percentile interval of a statistic of several samples, each drawn anew."""
    samples = [normalised(statistics.episode_scores(t), *_ends(t)) for t in tasks]
    found = stats.bootstrap(
        samples,
        statistic,
        paired=False,
        vectorized=False,
        n_resamples=4000,
        method="percentile",
        random_state=np.random.default_rng(1),
    ).confidence_interval
    return found.low, found.high


def _ends(t: dict) -> tuple[float, float]:
    return t["random_score"], t["expert_score"]


def close(ours, theirs) -> bool:
    """Whether intervals agree to a twentieth of their width: both are drawn at random."""
    width = theirs[1] - theirs[0]
    return bool(np.abs(np.subtract(ours, theirs)).max() < 0.05 * width)


def test_the_pooled_iqm_is_rliables(tasks) -> None:
    pooled = [normalised(statistics.episode_scores(t), *_ends(t)) for t in tasks]
    wanted = stats.trim_mean(np.concatenate(pooled), proportiontocut=0.25)
    assert Stratified(tasks).trimmed == pytest.approx(wanted)
    for n in (1, 2, 3, 5, 8, 101):
        values = np.random.default_rng(n).normal(size=(3, n))
        assert trimmed_mean(values) == pytest.approx(stats.trim_mean(values, 0.25, axis=1))


def test_the_intervals_are_those_of_scipys_stratified_bootstrap(tasks) -> None:
    found = summary({f"made/{i}": t for i, t in enumerate(tasks)})
    pooled = reference(tasks, lambda *x: stats.trim_mean(np.concatenate(x), 0.25))
    assert close(found["episodes_iqm_ci95"], pooled)
    of_means = reference(tasks, lambda *x: interquartile_mean(np.array([[a.mean() for a in x]]))[0])
    assert close(found["ci95"], of_means)
    plain = reference(tasks, lambda *x: np.mean([a.mean() for a in x]))
    assert close(found["mean_ci95"], plain)
    at_half = reference(tasks, lambda *x: np.mean([a.mean() >= 0.5 for a in x]))
    i = found["thresholds"]["of_expert"].index(0.5)
    assert (found["thresholds"]["low"][i], found["thresholds"]["high"][i]) == pytest.approx(at_half)


def test_a_tasks_interval_is_scipys_too(tasks) -> None:
    for t in tasks[:5]:
        alone = reference([t], np.mean)
        assert close(t["expert_normalised_ci95"], alone)
        assert t["expert_normalised_std"] == pytest.approx(np.std(t["returns"]) / 8.0)


@pytest.mark.parametrize(("successes", "episodes"), [(0, 20), (20, 20), (1, 1), (7, 20), (99, 100)])
def test_a_rates_interval_is_wilsons(successes: int, episodes: int) -> None:
    wanted = stats.binomtest(successes, episodes).proportion_ci(0.95, "wilson")
    assert wilson(successes, episodes) == pytest.approx([wanted.low, wanted.high], abs=1e-12)
    t = task([True] * successes + [False] * (episodes - successes), "success", expert=0.5)
    ends = pytest.approx([2 * wanted.low, 2 * wanted.high], abs=1e-9)
    assert t["expert_normalised_ci95"] == (ends if episodes > 1 else None)


@pytest.mark.parametrize("measure", ["return", "success"])
def test_few_episodes_have_no_interval(measure: str) -> None:
    """Two equal returns, drawn anew, would be sure of themselves to the last digit."""
    four, five, many = (task([1.0] * n, measure) for n in (4, 5, 20))
    assert mean_interval(four) is four["expert_normalised_ci95"] is None
    assert mean_interval(five) is not None
    assert difference_interval(four, many) is difference_interval(many, four) is None
    assert difference_interval(five, many) is not None
    found = summary({"made/a": many, "made/b": four, "made/c": task([0.0], measure)})
    ends = [found[k] for k in ("ci95", "mean_ci95", "episodes_iqm_ci95")]
    assert ends == [found["thresholds"][k] for k in ("low", "high")] + [None] == [None] * 3
    assert found["mean"] == pytest.approx(2 / 3), "the figures themselves are there"
    assert found["no_intervals"] == (
        "no intervals: they need 5 episodes of each task or more, and made/c has 1 "
        "(1 more tasks have too few)"
    )
    sure = summary({"made/a": many, "made/b": five, "made/x": task([1.0], expert=None)})
    assert sure["no_intervals"] is None, "of those that are left out, nothing is asked"
    assert None not in [sure[k] for k in ("ci95", "mean_ci95", "episodes_iqm_ci95")]
    people = summary({"made/a": task([1.0] * 3, measure, human=2.0)})["human"]
    assert people["median"] == 0.5
    assert people["median_ci95"] is people["episodes_iqm_ci95"] is None


def test_differences_of_returns_are_scipys() -> None:
    rng = np.random.default_rng(2)
    a, b = task(rng.normal(0, 1, 30)), task(rng.normal(1, 2, 20))
    wanted = stats.bootstrap(
        (b["returns"], a["returns"]),
        lambda x, y: np.mean(x) - np.mean(y),
        vectorized=False,
        n_resamples=4000,
        method="percentile",
        random_state=np.random.default_rng(1),
    ).confidence_interval
    assert close(difference_interval(a, b), (wanted.low, wanted.high))
    assert difference_interval(a, task([1.0])) is None


def test_differences_of_rates_are_newcombes() -> None:
    """Newcombe 1998, table II, method 10, example (a): 56/70 - 48/80 is 0.0524 to 0.3339."""
    first = task([True] * 48 + [False] * 32, "success")
    second = task([True] * 56 + [False] * 14, "success")
    assert difference_interval(first, second) == pytest.approx([0.0524, 0.3339], abs=5e-5)
    one, none = task([True] * 5, "success"), task([False, True, True] * 2, "success")
    low, high = difference_interval(none, one)
    assert low < 0 < high


def test_the_sign_test_is_exact() -> None:
    for better, worse in ((0, 0), (5, 0), (6, 0), (1, 9), (4, 4), (300, 251), (20_000, 19_500)):
        wanted = stats.binomtest(better, better + worse).pvalue if better else 1.0
        assert sign_test(better, worse) == pytest.approx(wanted, rel=1e-9)
        assert sign_test(worse, better) == sign_test(better, worse)


def test_the_curve_falls_from_all_tasks_to_those_at_the_expert() -> None:
    drawn = Stratified([task([x] * 5) for x in (-1.0, 0.3, 0.5, 1.0, 2.0)])
    line = drawn.curve()
    assert line["of_expert"][0] == 0.0
    assert line["of_expert"][-1] == 1.0
    share = dict(zip(line["of_expert"], line["share"], strict=True))
    assert (share[0.0], share[0.3], share[0.35], share[0.5], share[1.0]) == (
        0.8,
        0.8,
        0.6,
        0.6,
        0.4,
    )
    assert line["low"] == line["share"] == line["high"], "these episodes have no spread"


def test_tasks_without_a_zero_or_a_one_are_left_out_and_it_is_said_why() -> None:
    rows = {
        "made/good": task([1.0, 2.0]),
        "made/none": task([1.0], random=None),
        "made/worse": task([1.0], random=2.0, expert=2.0),
        "made/unknown": task([1.0], expert=None),
    }
    found = summary(rows)
    assert found["tasks"] == 1
    assert found["excluded"] == ["made/none", "made/unknown", "made/worse"]
    assert "no random score" in found["excluded_because"]["made/none"]
    assert "no expert score" in found["excluded_because"]["made/unknown"]
    assert "no better than random" in found["excluded_because"]["made/worse"]
    assert rows["made/worse"]["expert_normalised"] is None
    empty = summary({"made/none": rows["made/none"]})
    assert empty["expert_normalised_iqm"] is empty["episodes_iqm"] is empty["thresholds"] is None
    assert set(empty) == set(found)
    json.dumps(found, allow_nan=False)


def test_people_are_compared_where_their_scores_are_known() -> None:
    rows = {f"made/{i}": task([x] * 8, human=2.0) for i, x in enumerate((0.0, 1.0, 4.0))}
    found = summary({**rows, "made/other": task([9.0] * 8)})["human"]
    assert found["tasks"] == 3
    assert found["median"] == 0.5
    assert found["mean"] == pytest.approx(2.5 / 3)
    assert found["median_ci95"] == [0.5, 0.5]
    assert summary({"made/other": task([9.0] * 8)})["human"] is None


def test_the_draws_are_the_seeds(tasks) -> None:
    first, again, other = (Stratified(tasks, seed).drawn_trimmed for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_blocks_of_draws_are_complete(tasks, monkeypatch) -> None:
    whole = Stratified(tasks)
    monkeypatch.setattr(statistics, "BLOCK", 1000)  # seven draws at a time
    parts = Stratified(tasks)
    assert parts.drawn_means.shape == whole.drawn_means.shape == (2000, 6)
    assert parts.drawn_trimmed.shape == (2000,)
    ours, theirs = (statistics.percentiles(d.drawn_trimmed) for d in (parts, whole))
    assert close(ours, theirs)


def test_the_interquartile_mean_counts_cut_values_in_part() -> None:
    values = np.array([[5.0, 1.0, 100.0, 3.0, -50.0]])
    # the middle half of 5 values: a quarter of the 2nd and 4th each weigh 0.75, the 3rd 1
    assert interquartile_mean(values)[0] == pytest.approx((0.75 * 1 + 3 + 0.75 * 5) / 2.5)
    assert interquartile_mean(np.array([[7.0]]))[0] == pytest.approx(7.0)
