"""Scores depend on seeds alone, and reach the table whatever else happens."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.utils import seeding

from gato.cli import BAD_INPUT, DONE, FAILURE, main
from gato.envs import references, registry
from gato.envs.episode import EVALUATION_SEED_START, TaskSpec
from gato.envs.references import Reference
from gato.envs.score import ATTEMPTS, RandomExpert, score, score_all

TASK = "toy/walk-v0"
BABYAI = "babyai/GoToLocalS5N2-v0"


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a copy of the table that stands in for it."""
    copy = tmp_path / "scores.csv"
    shutil.copy(references.TABLE, copy)
    monkeypatch.setattr(references, "TABLE", copy)
    references.references.cache_clear()
    yield copy
    references.references.cache_clear()


def timeless(episodes: list) -> list:
    return [dataclasses.replace(e, seconds=0.0) for e in episodes]


def test_workers_do_not_change_scores() -> None:
    pairs = [(BABYAI, "expert"), (BABYAI, "random")]
    here = {s.policy: s for s in score_all(pairs, 5, seed=3)}
    there = {s.policy: s for s in score_all(pairs, 5, seed=3, workers=2)}
    for policy in ("expert", "random"):
        assert timeless(here[policy].episodes) == timeless(there[policy].episodes)
    first = EVALUATION_SEED_START + 3 * ATTEMPTS
    assert [e.seed for e in here["random"].episodes] == list(range(first, first + 5))
    row = here["expert"].reference()
    assert (row.measure, row.mean, row.expert, row.first_seed) == ("success", 1.0, "planner", first)
    assert row.versions.startswith("minigrid ")
    alone = score(BABYAI, 5, policy="random", first_seed=first)
    assert alone["returns"] == [e.score for e in here["random"].episodes]


def test_random_actions_are_neither_the_worlds_noise_nor_another_tasks() -> None:
    space = spaces.Box(-1, 1, (8,), np.float64)

    def draws(task: str, seed: int) -> list[float]:
        player = RandomExpert(TaskSpec(task, space, space, 9, 1.0))
        player.reset(None, seed)
        return [*player.act(None, None), *player.act(None, None)]

    assert draws("toy/one-v0", 3) == draws("toy/one-v0", 3)
    noise = seeding.np_random(3)[0].uniform(-1, 1, 16)  # what `env.reset(seed=3)` draws from
    seen = [draws("toy/one-v0", 3), draws("toy/two-v0", 3), draws("toy/one-v0", 4), noise]
    correlations = np.corrcoef(seen)[np.triu_indices(4, 1)]
    assert np.abs(correlations).max() < 0.9


def test_an_expert_tells_its_settings(toy: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    module = registry._suite("toy")
    walker = module.expert(None, "")
    walker.settings = "walks, 1 step a step"
    monkeypatch.setattr(module, "expert", lambda spec, kind: walker)
    (one,) = score_all([(TASK, "expert")], 2)
    assert one.reference().expert == "walks, 1 step a step"
    (one,) = score_all([(TASK, "random")], 2)
    assert one.reference().expert == ""


def test_bad_settings_are_refused() -> None:
    for wrong in ({"episodes": 0}, {"seed": 1024}, {"workers": -1}):
        settings = {"episodes": 1, **wrong}
        with pytest.raises(ValueError, match=f"expected {next(iter(wrong))} in"):
            list(score_all([(BABYAI, "random")], **settings))
    with pytest.raises(ValueError, match="policy 'expert' or 'random'; got 'human'"):
        list(score_all([(BABYAI, "human")], 1))
    with pytest.raises(ValueError, match="with an expert"):
        list(score_all([("babyai/KeyInBox-v0", "expert")], 1))


def test_written_rows_replace_old_ones_only(table: Path, capsys: pytest.CaptureFixture) -> None:
    before = references.references()
    arguments = ["experts", "score", BABYAI, "--episodes", "3", "--workers", "0", "--write"]
    assert main([*arguments, "--policy", "both", "--json"]) == DONE
    printed = {row["policy"]: row for row in json.loads(capsys.readouterr().out)}
    after = references.references()
    for policy in ("expert", "random"):
        row = after[BABYAI][policy]
        assert row.episodes == 3
        assert row.mean == pytest.approx(np.mean(printed[policy]["successes"]), abs=1e-6)
        assert printed[policy]["table"] == before[BABYAI][policy].mean
    assert {t: r for t, r in after.items() if t != BABYAI} == {
        t: r for t, r in before.items() if t != BABYAI
    }
    # a row that is written again as it was changes no byte
    text = table.read_bytes()
    references.write(after["metaworld/reach-v3"].values())
    assert table.read_bytes() == text


def test_a_failed_episode_is_told_and_the_sweep_goes_on(
    toy: ModuleType,
    table: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    step = toy.Walk.step

    def broken(self: object, action: object) -> tuple:
        if self._np_random_seed == EVALUATION_SEED_START + 1:
            raise OSError("the floor gave way")
        return step(self, action)

    monkeypatch.setattr(toy.Walk, "step", broken)
    arguments = ["experts", "score", TASK, BABYAI, "--episodes", "3", "--workers", "0", "--write"]
    assert main(arguments) == FAILURE
    out, err = capsys.readouterr()
    assert f"{TASK} at seed {EVALUATION_SEED_START + 1}: OSError: the floor gave way" in err
    assert BABYAI in out  # was played all the same
    assert references.references()[BABYAI]["expert"].episodes == 3
    assert TASK not in references.references()


def test_worlds_are_closed_whatever_happens(
    toy: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, closed = [], []
    module = registry._suite("toy")

    def make(spec: TaskSpec) -> object:
        opened.append(toy.Walk())
        return opened[-1]

    monkeypatch.setattr(module, "make", make)
    monkeypatch.setattr(toy.Walk, "close", lambda env: closed.append(env))
    list(score_all([(TASK, "expert"), (TASK, "random")], 2))
    assert len(opened) == 2
    assert closed == opened
    monkeypatch.setattr(toy.Walk, "step", lambda *_: 1 / 0)
    list(score_all([(TASK, "random")], 2))  # each failed episode ends its world
    with pytest.raises(ZeroDivisionError):
        score(TASK, 1)
    with pytest.raises(ValueError, match="folder of a learned one"):
        score(TASK, 1, kind="nobody")
    assert len(opened) == 6
    assert closed == opened


def test_only_the_tasks_own_expert_gets_its_row(
    toy: ModuleType, table: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["experts", "score", TASK, "--episodes", "1", "--workers", "0", "--write"]
    assert main([*arguments, "--expert", "planner"]) == BAD_INPUT
    err = capsys.readouterr().err
    assert f"expected the scripted expert of '{TASK}'" in err
    assert "Leave out --expert" in err
    assert TASK not in references.references()
    assert main([*arguments, "--expert", "planner", "--policy", "random"]) == DONE
    assert main([*arguments, "--expert", "scripted"]) == DONE
    assert set(references.references()[TASK]) == {"expert", "random"}
    orphan = dataclasses.replace(toy.SPEC, id="toy/crawl-v0", expert="none")
    monkeypatch.setattr(registry._suite("toy"), "specs", lambda: {orphan.id: orphan})
    registry._specs.cache_clear()
    assert main([*arguments[:2], orphan.id, *arguments[3:], "--expert", "planner"]) == DONE
    assert references.references()[orphan.id]["expert"].expert == "planner"


DYING = """
import os
import gymnasium as gym
import numpy as np

class Dies(gym.Env):
    observation_space = gym.spaces.Box(0, 1, (1,), np.float32)
    action_space = gym.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        self.seed = seed
        return np.zeros(1, np.float32), {}

    def step(self, action):
        marks = os.environ["DYING_MARKS"]
        if self.seed % 4 == 1 or (self.seed % 4 == 2 and not os.listdir(marks)):
            open(os.path.join(marks, str(self.seed)), "w").close()
            os._exit(3)
        return np.zeros(1, np.float32), 1.0, True, False, {}

gym.register("Dying-v0", entry_point=Dies)
"""


def test_an_episode_whose_worker_dies_is_played_once_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "dying_worlds.py").write_text(DYING)
    (tmp_path / "marks").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("DYING_MARKS", str(tmp_path / "marks"))
    task = "gym/dying_worlds:Dying-v0"
    (always,) = score_all([(task, "random")], 4, workers=2)
    assert [bool(e.error) for e in always.episodes] == [False, True, False, False]
    assert "twice, its worker process ended, exit code 3" in always.failed[0].error
    assert [e.score for e in always.episodes] == [1.0, 0.0, 1.0, 1.0]


HANGING = """
import time
import gymnasium as gym
import numpy as np

class Hangs(gym.Env):
    observation_space = gym.spaces.Box(0, 1, (1,), np.float32)
    action_space = gym.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        self.seed, self.left = seed, 20
        return np.zeros(1, np.float32), {}

    def step(self, action):
        time.sleep(60 if self.seed % 2 else 0.1)
        self.left -= 1
        return np.zeros(1, np.float32), 1.0, self.left == 0, False, {}

gym.register("Hangs-v0", entry_point=Hangs)
"""


def test_an_episode_that_hangs_is_ended_and_one_that_is_slow_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Two seconds of steps are waited for, though 1.5 without one would not be."""
    (tmp_path / "hanging_worlds.py").write_text(HANGING)
    monkeypatch.syspath_prepend(tmp_path)
    arguments = ["gym/hanging_worlds:Hangs-v0", "--policy", "random", "--episodes", "2"]
    assert main(["experts", "score", *arguments, "--workers", "2", "--timeout", "1.5"]) == FAILURE
    err = capsys.readouterr().err
    assert "1 episodes failed" in err
    assert "twice, its worker process was ended: nothing came of it in 1.5 s" in err


def test_patterns_leave_out_tasks_without_an_expert_and_say_so(
    capsys: pytest.CaptureFixture,
) -> None:
    arguments = ["--episodes", "1", "--workers", "0"]
    assert main(["experts", "score", "babyai/*5N2Carrying-v0", *arguments]) == DONE
    assert "left out, without an expert: babyai/PutNextS5N2Carrying-v0" in capsys.readouterr().err
    assert main(["experts", "score", "babyai/PutNextS5N2Carrying-v0", *arguments]) == BAD_INPUT


def test_listing_shows_every_task(capsys: pytest.CaptureFixture) -> None:
    assert main(["experts", "list", "--suite", "metaworld", "--json"]) == DONE
    rows = {row["task"]: row for row in json.loads(capsys.readouterr().out)}
    assert len(rows) == 50
    row = rows["metaworld/reach-v3"]
    assert (row["expert"], row["measure"]) == ("scripted", "success")
    assert row["mean"] > row["random"]
    assert row["episodes"] >= 20
    assert main(["experts"]) == DONE
    assert "score" in capsys.readouterr().out
    assert main(["experts", "list", "--suite", "mujoco"]) == DONE
    told = capsys.readouterr().out
    assert "learned: none comes with the task; gato experts train TASK --out DIR" in told
    assert main(["experts", "list", "--suite", "babyai"]) == DONE
    assert "experts train" not in capsys.readouterr().out


def test_a_learned_expert_has_a_score_but_does_not_come_with_its_task(
    table: Path, capsys: pytest.CaptureFixture
) -> None:
    task, other = "mujoco/InvertedPendulum-v5", "mujoco/Ant-v5"
    registry._specs.cache_clear()
    assert references.references()[task]["expert"].expert.startswith("learned: ppo")
    assert [registry.spec(i).expert for i in (task, other)] == ["learned", "none"]
    assert not registry.has_expert(task)
    assert registry.has_expert(BABYAI)
    assert registry.spec(f"{task}?camera=free").expert == "learned"
    with pytest.raises(ValueError, match=f"gato experts train '{task}' --out DIR.* --expert DIR"):
        registry.make_expert(task)
    for kind in ("scripted", "planner"):
        with pytest.raises(ValueError, match=f"that is learned; got '{kind}'. To train one: gato"):
            registry.make_expert(task, kind)
    assert main(["experts", "list", "--suite", "mujoco", "--json"]) == DONE
    rows = {row["task"]: row for row in json.loads(capsys.readouterr().out)}
    assert (rows[task]["expert"], rows[other]["expert"]) == ("learned", "none")
    assert rows[task]["mean"] == 1000.0
    for command, code in (
        (["collect", "--out", str(table.parent / "x")], BAD_INPUT),  # nothing would be collected
        (["experts", "score"], DONE),
    ):
        assert main([*command, "mujoco/*", "--episodes", "1", "--workers", "0"]) == code
        told = capsys.readouterr().err
        assert f"left out, without an expert: {other}" in told
        assert task in told
    assert main(["experts", "list", "--suite", "nowhere"]) == BAD_INPUT


WRITER = """
import sys
from pathlib import Path
from gato.envs import references
from gato.envs.references import Reference
references.TABLE = Path(sys.argv[1])
for k in range(25):
    task = f"toy/{sys.argv[2]}-{k}"
    references.write([Reference(task, "random", "return", k, 0.0, 1, 0, "", "", "made up")])
"""


def test_processes_that_write_at_once_lose_nothing(table: Path) -> None:
    before = references.references()
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(table), name]) for name in ("a", "b")
    ]
    assert [w.wait(timeout=60) for w in writers] == [0, 0]
    references.references.cache_clear()
    after = references.references()
    expected = {f"toy/{name}-{k}" for name in "ab" for k in range(25)}
    assert set(after) == set(before) | expected
    row = after["toy/b-24"]["random"]
    assert row == Reference("toy/b-24", "random", "return", 24.0, 0.0, 1, 0, "", "", "made up")
