"""The result of an evaluation: its form, its figures and what is left out of them."""

from __future__ import annotations

import json

import numpy as np
import pytest

from gato.envs.episode import EVALUATION_SEED_START
from gato.rollouts.agent import Agent
from gato.rollouts.evaluate import evaluate, interquartile_mean, summary
from gato.rollouts.runner import Played

TASKS = ["made/count-v0", "made/reach-v0", "made/worse-v0"]


def test_the_result_has_the_promised_form(suite, agent: Agent) -> None:
    told = []
    result = evaluate(
        agent,
        TASKS,
        6,
        workers=1,
        progress=lambda task, played, wanted: told.append((task, played)),
    )
    assert json.loads(json.dumps(result)) == result
    assert {"checkpoint", "settings", "versions", "tasks", "summary"} <= result.keys()
    promised = {"returns", "successes", "lengths", "mean_return", "success_rate", "random_score"}
    promised |= {"expert_score", "expert_normalised", "human_normalised"}
    assert all(promised <= row.keys() for row in result["tasks"].values())
    assert max(told) == ("made/worse-v0", 6)
    count, reach, worse = (result["tasks"][t] for t in TASKS)
    assert count["seeds"] == [EVALUATION_SEED_START + i for i in range(6)]
    assert count["returns"] == [3.0 + s % 6 for s in count["seeds"]]
    assert count["successes"] is None
    assert count["success_rate"] is None
    assert count["expert_normalised"] == pytest.approx(count["mean_return"] / 10)
    assert count["human_normalised"] == pytest.approx(count["mean_return"] / 5)
    assert reach["success_rate"] == reach["expert_normalised"] == 0.5
    assert worse["expert_normalised"] is None
    aggregate = result["summary"]
    assert aggregate["excluded"] == ["made/worse-v0"]
    values = [count["expert_normalised"], 0.5]
    assert aggregate["mean"] == aggregate["median"] == pytest.approx(np.mean(values))
    assert aggregate["ci95"][0] <= aggregate["expert_normalised_iqm"] <= aggregate["ci95"][1]
    assert aggregate["tasks_at_50_percent"] == sum(v >= 0.5 for v in values)
    assert aggregate["tasks_at_100_percent"] == 0


def test_another_seed_plays_other_episodes(suite, agent: Agent) -> None:
    first, second = (
        evaluate(agent, TASKS[:1], 2, workers=1, seed=seed)["tasks"][TASKS[0]]["seeds"]
        for seed in (0, 1)
    )
    assert not set(first) & set(second)
    assert min(first + second) >= EVALUATION_SEED_START


def test_an_episode_that_failed_is_shown(suite, agent: Agent, monkeypatch) -> None:
    from gato.rollouts import evaluate as module

    def run(make_policy, jobs, **settings):
        return [
            Played(j, 1.0, 3, i > 0, "Traceback: the arm fell off" if i == 0 else None)
            for i, j in enumerate(jobs)
        ]

    monkeypatch.setattr(module, "run", run)
    row = evaluate(agent, TASKS[1:2], 4, workers=1)["tasks"][TASKS[1]]
    assert row["success_rate"] == 0.75
    assert [f["seed"] for f in row["failures"]] == row["seeds"][:1]
    assert "arm" in row["failures"][0]["traceback"]


@pytest.mark.parametrize(
    ("tasks", "episodes", "settings", "message"),
    [
        ([], 1, {}, "one or more different"),
        ("made/count-v0", 1, {}, "one or more different"),
        (TASKS[:1] * 2, 1, {}, "one or more different"),
        (TASKS, 0, {}, "at least 1 episode"),
        (TASKS, 1, {"seed": 5000}, "seed in"),
        (["made/cuont-v0"], 1, {}, "made/count-v0"),
    ],
)
def test_bad_requests_are_refused(suite, agent, tasks, episodes, settings, message) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(agent, tasks, episodes, workers=1, **settings)


def test_the_interquartile_mean_counts_cut_values_in_part() -> None:
    values = np.array([[5.0, 1.0, 100.0, 3.0, -50.0]])
    # the middle half of 5 values: a quarter of the 2nd and 4th each weigh 0.75, the 3rd 1
    assert interquartile_mean(values)[0] == pytest.approx((0.75 * 1 + 3 + 0.75 * 5) / 2.5)
    assert interquartile_mean(np.array([[7.0]]))[0] == pytest.approx(7.0)


def test_nothing_but_excluded_tasks_has_no_aggregate() -> None:
    result = summary({"a": {"expert_normalised": None}})
    assert result["expert_normalised_iqm"] is None
    assert result["excluded"] == ["a"]


def test_prompts_come_from_demonstrations(suite, agent: Agent, tmp_path) -> None:
    from gato.envs import registry
    from gato.envs.episode import Episode
    from gato.envs.store import EpisodeWriter
    from gato.rollouts.evaluate import _prompts

    writer = EpisodeWriter(tmp_path / TASKS[1], registry.spec(TASKS[1]))
    for seed in range(3):
        ends = np.arange(4) == 3
        writer.append(
            Episode(
                task=TASKS[1],
                observations={"observation": np.arange(5)},
                actions={"action": np.full((4, 2), seed / 10, np.float32)},
                rewards=np.ones(4, np.float32),
                terminated=ends,
                truncated=~ends & ends,
                seed=seed,
                success=seed == 1,
            )
        )
    writer.close()
    shown = _prompts(tmp_path, TASKS[1:2], 2)[TASKS[1]]
    assert len(shown) == 2
    np.testing.assert_allclose(shown.actions["action"], 0.1, atol=1e-6)
    result = evaluate(agent, TASKS[1:2], 2, workers=1, prompt_store=tmp_path, prompt_steps=2)
    assert result["settings"]["prompt"]["steps"] == 2
    with pytest.raises(ValueError, match="demonstrations of 'made/count-v0'"):
        evaluate(agent, TASKS[:1], 2, workers=1, prompt_store=tmp_path)
