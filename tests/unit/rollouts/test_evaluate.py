"""The result of an evaluation: its form, its figures and what is left out of them."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from gato import cli
from gato.checkpoint import build_model
from gato.config import TrainConfig
from gato.contents import evaluation_seeds
from gato.envs.episode import EVALUATION_SEED_START
from gato.rollouts.agent import Agent
from gato.rollouts.evaluate import evaluate
from gato.rollouts.policy import Policy
from gato.tokenizers.serializer import History

from .conftest import SPECS, TINY, Made

TASKS = ["made/count-v0", "made/reach-v0", "made/worse-v0"]


def test_the_result_has_the_promised_form(suite, agent: Agent) -> None:
    told = []
    result = evaluate(
        agent,
        TASKS,
        6,
        workers=0,
        progress=lambda task, played, wanted: told.append((task, played)),
    )
    assert json.loads(json.dumps(result)) == result
    assert {"checkpoint", "settings", "versions", "tasks", "summary", "speed"} <= result.keys()
    assert result["speed"]["steps"] == sum(sum(r["lengths"]) for r in result["tasks"].values())
    assert result["settings"]["weights"] == "last step"
    agent.checkpoint.averaged = True
    again = evaluate(agent, TASKS[:1], 1, workers=0)
    assert again["settings"]["weights"] == "averaged"
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
    assert count["human_score"] == 5.0
    low, high = count["expert_normalised_ci95"]
    assert low < count["expert_normalised"] < high
    assert count["expert_normalised_std"] == pytest.approx(np.std(count["returns"]) / 10)
    aggregate = result["summary"]
    assert aggregate["episodes_iqm_ci95"][0] <= aggregate["episodes_iqm"]
    assert aggregate["thresholds"]["share"][0] == 1.0
    assert aggregate["human"]["tasks"] == 1
    assert list(aggregate["excluded_because"]) == ["made/worse-v0"]
    assert aggregate["excluded"] == ["made/worse-v0"]
    values = [count["expert_normalised"], 0.5]
    assert aggregate["mean"] == aggregate["median"] == pytest.approx(np.mean(values))
    assert aggregate["ci95"][0] <= aggregate["expert_normalised_iqm"] <= aggregate["ci95"][1]
    assert aggregate["tasks_at_50_percent"] == sum(v >= 0.5 for v in values)
    assert aggregate["tasks_at_100_percent"] == 0


def test_another_seed_plays_other_episodes(suite, agent: Agent) -> None:
    first, second = (
        evaluate(agent, TASKS[:1], 2, workers=0, seed=seed)["tasks"][TASKS[0]]["seeds"]
        for seed in (0, 1)
    )
    assert not set(first) & set(second)
    assert min(first + second) >= EVALUATION_SEED_START


def break_at(suite, seed: int) -> None:
    """Let every world throw after an episode's second step where it has this seed."""
    plain = suite.make

    def make(spec):
        env = plain(spec)
        step = env.step

        def step_or_throw(action):
            if env.seed_ == seed and env.left == 1 + seed % 6:
                raise RuntimeError("the arm fell off")
            return step(action)

        env.step = step_or_throw
        return env

    suite.make = make


def test_an_episode_that_failed_is_shown_and_the_others_are_played(suite, agent: Agent) -> None:
    broken = EVALUATION_SEED_START + 2
    break_at(suite, broken)
    result = evaluate(agent, TASKS[:2], 4, workers=0)
    for row in result["tasks"].values():
        (failure,) = row["failures"]
        assert failure["seed"] == broken
        assert "RuntimeError: the arm fell off" in failure["traceback"]
        assert row["lengths"][2] == row["returns"][2] == 2
        assert len(row["returns"]) == 4
    assert result["tasks"][TASKS[1]]["successes"] == [False, True, False, True]
    assert json.loads(json.dumps(result, allow_nan=False)) == result


class Rewards(Made):
    """Rewards the action that the seed and the step name, or a last action to the right."""

    def right(self) -> int:
        return (self.seed_ + self.left) % 3

    def step(self, action):
        by_return = self.task.measure == "return"
        good = bool(action == self.right() if by_return else action[0] > 0)
        observation, _, ended, cut, info = super().step(action)
        return observation, float(good), ended, cut, {"success": good} if info else {}


class Knows:
    """The expert of `Rewards`, which looks inside it."""

    def __init__(self, spec, kind: str) -> None:
        self.spec = spec

    def reset(self, env, seed: int) -> None:
        assert env.unwrapped.seed_ == seed

    def act(self, env, observation):
        if self.spec.measure == "return":
            return np.int64(env.unwrapped.right())
        return np.array([0.5, 0.0], np.float32)


@pytest.mark.parametrize("who", ["expert", "random"])
def test_the_expert_scores_one_and_chance_nothing(suite, agent: Agent, who: str) -> None:
    scores = {TASKS[0]: (5.5 / 3, 5.5), TASKS[1]: (0.5, 1.0)}  # by the mean length, and by halves
    suite.specs = lambda: {
        t: replace(SPECS[t], random_score=low, expert_score=high)
        for t, (low, high) in scores.items()
    }
    suite.expert, suite.make = Knows, Rewards
    result = evaluate(who, TASKS[:2], 126, workers=0)
    for row in result["tasks"].values():
        low, high = row["expert_normalised_ci95"]
        assert low <= (who == "expert") <= high
        assert high - low < 0.5
    model = evaluate(agent, TASKS[:2], 2, workers=0)
    assert result["checkpoint"] == who
    assert result.keys() == model.keys()
    assert result["settings"].keys() == model["settings"].keys()
    assert result["tasks"][TASKS[0]].keys() == model["tasks"][TASKS[0]].keys()
    experts = dict.fromkeys(TASKS[:2], "scripted") if who == "expert" else None
    assert result["settings"]["experts"] == experts


def test_the_command_goes_on_after_a_failure_and_says_so(suite, tmp_path, capsys) -> None:
    file, page = tmp_path / "a.json", tmp_path / "a.html"
    arguments = ["eval", "random", "--tasks", *TASKS[:2], "--episodes", "4", "--workers", "0"]
    assert cli.main([*arguments, "--json", str(file), "--report", str(page)]) == cli.DONE
    told = capsys.readouterr()
    assert "mean of 2 tasks; interquartile mean of the tasks" in told.out
    assert "no intervals: they need 5 episodes of each task or more" in told.out
    assert json.loads(file.read_text())["summary"]["mean_ci95"] is None
    assert "no video of made/count-v0" in told.err
    assert "made/count-v0" in page.read_text()
    assert json.loads(file.read_text())["checkpoint"] == "random"
    break_at(suite, EVALUATION_SEED_START + 2)
    assert cli.main([*arguments, "--json", str(file)]) == cli.FAILURE
    out, err = capsys.readouterr()
    assert "2 episodes failed" in err
    heading, *rows = (line.split() for line in out.splitlines()[:3])
    assert heading[-1] == "failed"
    assert [(row[0], row[-1]) for row in rows] == [(task, "1") for task in TASKS[:2]]
    assert "made/count-v0 at seed 1073741826: RuntimeError: the arm fell off" in err
    rows = json.loads(file.read_text())["tasks"].values()
    assert [len(row["returns"]) for row in rows] == [4, 4]


def test_the_kind_of_expert_is_chosen(suite, agent: Agent, tmp_path, capsys) -> None:
    class Kind(Knows):
        def __init__(self, spec, kind: str) -> None:
            super().__init__(spec, kind)
            self.kind, self.settings = kind, f"{kind}, by hand"

        def act(self, env, observation):
            return super().act(env, observation) if self.kind == "planner" else np.int64(0)

    suite.expert, suite.make = Kind, Rewards
    returns = {}
    for kind in ("planner", "auto"):
        arguments = ["eval", "expert", "--tasks", TASKS[0], "--episodes", "4", "--workers", "0"]
        assert cli.main([*arguments, "--expert", kind, "--json"]) == cli.DONE
        result = json.loads(capsys.readouterr().out)
        own = {"planner": "planner", "auto": "scripted"}[kind]
        assert result["settings"]["experts"] == {TASKS[0]: f"{own}, by hand"}
        row = result["tasks"][TASKS[0]]
        returns[kind] = (row["returns"], row["lengths"])
    assert returns["planner"][0] == returns["planner"][1]
    assert sum(returns["auto"][0]) < sum(returns["auto"][1])
    for player in (agent, "random"):
        with pytest.raises(ValueError, match="for 'expert' only"):
            evaluate(player, TASKS[:1], 1, expert="planner", workers=0)
    with pytest.raises(ValueError, match="Evaluate 'random'"):
        evaluate("expert", TASKS[:1], 1, expert="random", workers=0)


def test_figures_are_printed_though_the_page_fails(suite, tmp_path, monkeypatch, capsys) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    page = tmp_path / "a.html"
    arguments = ["eval", "random", "--tasks", TASKS[0], "--episodes", "2", "--workers", "0"]
    arguments += ["--report", str(page)]
    with monkeypatch.context() as patch:
        patch.setattr("gato.rollouts.report.report", full)
        assert cli.main(arguments) == cli.FAILURE
        assert TASKS[0] in capsys.readouterr().out
        assert cli.main([*arguments, "--json"]) == cli.FAILURE
        assert TASKS[0] in json.loads(capsys.readouterr().out)["tasks"]
    monkeypatch.setattr("gato.evaluation_commands.print_table", full)
    assert cli.main(arguments) == cli.FAILURE
    assert TASKS[0] in page.read_text()


def test_the_command_shows_how_fast_it_plays(suite, monkeypatch, capsys) -> None:
    """While it plays, in the last bar; at its end; and under a name of its own in the JSON."""
    shown: list[str] = []

    class Bar:
        def __enter__(self) -> Bar:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def add_task(self, name: str, total: int) -> str:
            return name

        def update(self, bar: str, **changed: Any) -> None:
            if "description" in changed:
                assert bar == "all"
                shown.append(changed["description"])

    lengths = [3 + (EVALUATION_SEED_START + i) % 6 for i in range(3)]
    steps = sum(lengths) + sum(min(length, 6) for length in lengths)
    monkeypatch.setattr("gato.evaluation_commands.progress_bar", Bar)
    arguments = ["eval", "random", "--tasks", *TASKS[:2], "--episodes", "3", "--workers", "0"]
    assert cli.main(arguments) == cli.DONE
    assert len(shown) == 6
    line = r"[\d,]+ steps/s of [\d.]+ rows a batch; model \d+% of the time, waiting for simulators "
    assert re.match(line, shown[-1])
    assert re.search(rf"^{steps} steps in 0 s: {line}", capsys.readouterr().out, re.MULTILINE)
    assert cli.main([*arguments, "--json", "--max-batch", "2"]) == cli.DONE
    found = json.loads(capsys.readouterr().out)
    assert found["settings"]["max_batch"] == 2
    assert found["speed"]["steps"] == steps
    assert found["speed"]["mean_batch"] <= 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["expert"], "expected --tasks for 'expert'"),
        (["random", "--tasks", TASKS[0], "--expert", "planner"], "with `gato eval expert` only"),
        (["nowhere", "--expert", "planner"], "with `gato eval expert` only"),
        (["expert", "--tasks", TASKS[0], "--expert", "nobody"], "the folder of a learned one"),
        (["expert", "--tasks", "made/count-v0", "--temperature", "1"], "is no model"),
        (
            ["random", "--tasks", "made/count-v0", "--report", "/nowhere/a.html"],
            "--report as a file in a",
        ),
        (
            ["random", "--tasks", TASKS[0], "--json", "/proc/self/a.json"],
            "expected --json as a file in a folder that can be written; got /proc/self/a.json (",
        ),
        (["random", "--tasks", TASKS[0], "--json", "/"], "got / (Is a directory). Make its folder"),
        (
            ["random", "--tasks", TASKS[0], "--video", "/proc/self/v"],
            "--video as a folder that can",
        ),
        (["random", "--tasks", "made/cuont-v0"], "made/count-v0"),
        (
            ["random", "--tasks", TASKS[0], "--video-episodes", "0"],
            "--video-episodes: expected a whole number, 1 or more; got 0",
        ),
        (["random", "--episodes", "0"], "--episodes: expected a whole number, 1 or more; got 0"),
        (["random", "--workers", "-1"], "--workers: expected a whole number, 0 or more; got -1"),
    ],
)
def test_bad_commands_are_refused(suite, arguments: list[str], message: str, capsys) -> None:
    assert cli.main(["eval", "--workers", "0", *arguments]) == cli.BAD_INPUT
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1


def test_seeds_that_were_trained_on_are_refused(suite, agent: Agent) -> None:
    low = EVALUATION_SEED_START + 3
    seen = {"words": {"records": 9}, "made": {"episodes": 2, "seeds": [low, low + 5]}}
    agent.checkpoint.data = seen
    evaluate(agent, TASKS[:1], 3, workers=0)
    with pytest.raises(ValueError, match=r"corpus 'made' .* seeds 1073741827 to 1073741832"):
        evaluate(agent, TASKS[:1], 4, workers=0)
    evaluate(agent, TASKS[:1], 4, workers=0, seed=1)


def test_seeds_of_imported_data_that_lie_about_those_are_none_of_them(suite, agent: Agent) -> None:
    seeds = np.array([5, EVALUATION_SEED_START + (900 << 20)])
    about = {
        "episodes": 2,
        "seeds": [5, int(seeds[1])],
        "evaluation_seeds": evaluation_seeds(seeds),
    }
    agent.checkpoint.data = {"made": about}
    evaluate(agent, TASKS[:1], 1, workers=0)
    with pytest.raises(ValueError, match=r"corpus 'made' .* Choose another --seed"):
        evaluate(agent, TASKS[:1], 1, workers=0, seed=900)
    agent.checkpoint.data = {"made": about | {"evaluation_seeds": evaluation_seeds(seeds[:1])}}
    evaluate(agent, TASKS[:1], 1, workers=0, seed=900)


@pytest.mark.parametrize(
    ("precision", "told"), [(None, "float32"), ("float32", "float32"), ("bfloat16", "bfloat16")]
)
def test_the_result_has_the_precision(suite, agent: Agent, monkeypatch, precision, told) -> None:
    used = []
    plain = agent.policy

    def policy(*arguments, **settings):
        made = plain(*arguments, **settings)
        used.append(str(made.memory.decoder.dtype))
        return made

    monkeypatch.setattr(agent, "policy", policy)
    result = evaluate(agent, TASKS[:1], 1, workers=0, precision=precision)
    assert result["settings"]["precision"] == told
    assert used == [f"torch.{told}"]


def test_the_command_chooses_the_precision(suite, agent: Agent, monkeypatch, capsys) -> None:
    monkeypatch.setattr("gato.load", lambda path: agent)
    asked = ["--workers", "0", "--episodes", "1", "--tasks", TASKS[0], "--json"]
    for options, told in (([], "float32"), (["--precision", "bfloat16"], "bfloat16")):
        assert cli.main(["eval", "nowhere", *asked, *options]) == 0
        printed = capsys.readouterr()
        assert json.loads(printed.out)["settings"]["precision"] == told
        assert told in printed.err
    assert cli.main(["eval", "random", *asked, "--precision", "float32"]) == cli.BAD_INPUT
    assert "is no model" in capsys.readouterr().err


@pytest.mark.parametrize("execute", [None, 1, 2, 3])
def test_so_many_actions_of_a_chunk_are_taken(suite, agent: Agent, monkeypatch, execute) -> None:
    """Also by rows that first played what decides fewer at once."""
    chunks = dict(zip(TASKS, (3, 2, 0), strict=True))
    for task, joint in chunks.items():
        agent.serializer.add_task(SPECS[task], history=History(hide_actions=True, joint=joint))
    agent.model = build_model(TrainConfig(TINY), agent.serializer).eval()
    taken: dict[str, int] = {}
    plain = agent.policy

    def policy(*arguments: Any, **settings: Any) -> Policy:
        made = plain(*arguments, **settings)
        select = made.select_action

        def select_action(*seen: Any) -> Any:
            taken.update({row.task.task.id: row.execute for row in made.rows})
            return select(*seen)

        made.select_action = select_action
        return made

    monkeypatch.setattr(agent, "policy", policy)
    result = evaluate(agent, TASKS[::-1], 1, workers=0, max_batch=1, execute=execute)
    assert taken == {task: min(execute or 3, max(joint, 1)) for task, joint in chunks.items()}
    assert result["settings"].get("execute") == execute
    with pytest.raises(ValueError, match="at most 3 in these tasks; got 4"):
        evaluate(agent, TASKS, 1, workers=0, execute=4)


def test_the_command_takes_fewer_actions_of_a_chunk(suite, agent, monkeypatch, capsys) -> None:
    monkeypatch.setattr("gato.load", lambda path: agent)
    asked = ["--workers", "0", "--episodes", "1", "--tasks", TASKS[0], "--execute", "2"]
    for who in ("nowhere", "random"):
        assert cli.main(["eval", who, *asked]) == cli.BAD_INPUT
        assert "at most 0 in these tasks; got 2" in capsys.readouterr().err


def test_what_is_no_model_has_no_temperature(suite) -> None:
    with pytest.raises(ValueError, match="is no model"):
        evaluate("expert", TASKS[:1], 1, workers=0, temperature=1.0)
    with pytest.raises(ValueError, match="'made/worse-v0' has none"):
        evaluate("expert", TASKS[2:], 1, workers=0)


@pytest.mark.parametrize(
    ("tasks", "episodes", "settings", "message"),
    [
        ([], 1, {}, "one or more different"),
        ("made/count-v0", 1, {}, "one or more different"),
        (TASKS[:1] * 2, 1, {}, "one or more different"),
        (TASKS, 0, {}, r"expected episodes in \[1, .*; got 0"),
        (TASKS, 1, {"seed": 5000}, r"expected seed in \[0, 1023\]; got 5000"),
        (TASKS, 1, {"precision": "fp8"}, "precision must be float32 or bfloat16; got 'fp8'"),
        (TASKS, 1, {"prompt_steps": 0}, r"expected prompt_steps in \[1, .*; got 0"),
        (["made/cuont-v0"], 1, {}, "made/count-v0"),
    ],
)
def test_bad_requests_are_refused(suite, agent, tasks, episodes, settings, message) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(agent, tasks, episodes, workers=0, **settings)


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
    shown = _prompts(tmp_path, TASKS[1:2], 2, range(9, 12))[TASKS[1]]
    assert len(shown) == 2
    np.testing.assert_allclose(shown.actions["action"], 0.1, atol=1e-6)
    result = evaluate(agent, TASKS[1:2], 2, workers=0, prompt_store=tmp_path, prompt_steps=2)
    assert result["settings"]["prompt"]["steps"] == 2
    with pytest.raises(ValueError, match="holds one of seed 2"):
        _prompts(tmp_path, TASKS[1:2], 2, range(2, 12))
    with pytest.raises(ValueError, match="demonstrations of 'made/count-v0'"):
        evaluate(agent, TASKS[:1], 2, workers=0, prompt_store=tmp_path)
