"""The sweep: a sample of every suite is in order, and each kind of fault is found and named."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest

from gato.cli import main
from gato.envs import gym as gym_suite
from gato.envs import registry
from gato.envs.episode import Episode
from gato.rollouts import sweep
from gato.rollouts.players import HostPlayer
from gato.rollouts.runner import Job, run
from gato.rollouts.sweep import check

SAMPLE = [
    "atari/Freeway-v5",
    "atari/Qbert-v5",  # these two draw
    "atari/Tetris-v5",  # only parts of the screen in a frame
    "babyai/GoToLocal-v0",
    "babyai/BossLevel-v0",
    "babyai/PickupLoc-v0?camera=grid",
    "dm_control/cheetah-run",
    "dm_control/quadruped-walk",
    "dm_control/cartpole-swingup?camera=0&size=32x32&state=no",
    "fetch/FetchPickAndPlace-v4",
    "fetch/FetchReach-v4",
    "gym/CartPole-v1",
    "gym/Pendulum-v1",
    "metaworld/assembly-v3",
    "metaworld/drawer-open-v3",
    "mujoco/Ant-v5",
    "mujoco/InvertedPendulum-v5",
]
WORLDS = '''
import os
import gymnasium as gym
import numpy as np
from gymnasium import spaces


class Walk(gym.Env):
    """Walks by nested actions, and is in order."""

    observation_space = spaces.Dict(
        {"place": spaces.Box(-99, 99, (2,), np.float32), "note": spaces.Text(20)}
    )
    action_space = spaces.Tuple(
        [spaces.Box(-2.0, 1.0, (2,), np.float32), spaces.MultiDiscrete([3, 4])]
    )
    steps = 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place = self.np_random.normal(size=2).astype(np.float32)
        return self.see(), {}

    def step(self, action):
        self.place = self.place + action[0]
        self.steps += 1
        return self.see(), self.reward(), False, False, {}

    def see(self):
        return {"place": self.place.copy(), "note": "here"}

    def reward(self):
        return 1.0


class Shares(Walk):
    def see(self):
        return {"place": self.place, "note": "here"}

    def step(self, action):
        self.place += action[0]
        return self.see(), 0.0, False, False, {}


class Forgets(Walk):
    def see(self):
        return {"place": self.place + np.float32(self.steps // 21), "note": "here"}


class Unseeded(Walk):
    def reset(self, *, seed=None, options=None):
        return super().reset()


class Outside(Walk):
    def see(self):
        return {"place": self.place.astype(np.float64) + 100.0, "note": "here"}


class Wide(Walk):
    observation_space = spaces.Dict(
        {"place": spaces.Box(-np.inf, np.inf, (2,), np.float32), "note": spaces.Text(20)}
    )

    def see(self):
        return {"place": self.place + np.float32(np.inf if self.steps else 0), "note": "here"}


class Pays(Walk):
    def reward(self):
        return float("nan")


class Writes(Walk):
    def step(self, action):
        action[0][:] = 0
        return super().step(action)


class Throws(Walk):
    def reward(self):
        raise KeyError("the ball is gone")


class Dies(Walk):
    def reward(self):
        os._exit(7)


for one in (Walk, Shares, Forgets, Unseeded, Outside, Wide, Pays, Writes, Throws, Dies):
    gym.register(f"{one.__name__}-v0", one, max_episode_steps=30)
'''
FAULTS = {
    "Shares": "observation 0 changes after it was returned",
    "Forgets": "seed 7 gives other observations 'place' again, after another episode",
    "Unseeded": "seed 7 gives other observations",
    "Outside": "an observation of reset is outside its space: 'place' is float64(2,)",
    "Wide": "expected 'place' finite",
    "Pays": "the reward is nan",
    "Writes": "a step changes its action, from ",
    "Throws": "KeyError: 'the ball is gone'",
}


@pytest.fixture
def worlds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Return the name of a module of the user's, in the present folder."""
    (tmp_path / "my_worlds.py").write_text(WORLDS)
    monkeypatch.chdir(tmp_path)
    path, known = list(sys.path), dict(gym.registry)
    yield "my_worlds"
    sys.path[:] = path
    sys.modules.pop("my_worlds", None)
    gym.registry.clear()
    gym.registry.update(known)
    gym_suite._modules.clear()


@pytest.mark.sim
@pytest.mark.parametrize("task_id", SAMPLE)
def test_a_sample_of_every_suite_is_in_order(task_id: str) -> None:
    row = check(task_id)
    assert not row.fault, row.detail or row.fault
    assert row.ok


def test_the_sample_leaves_no_suite_out() -> None:
    assert {task_id.split("/")[0] for task_id in SAMPLE} == set(registry.SUITES)


def test_faults_are_found(worlds: str) -> None:
    gym_suite.import_module(worlds)
    assert check(f"gym/{worlds}:Walk-v0").ok
    for name, fault in FAULTS.items():
        row = check(f"gym/{worlds}:{name}-v0")
        assert not row.ok
        assert fault in row.fault, (name, row.fault)
    assert "self.reward()" in row.detail


def test_actions_that_read_back_otherwise_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = registry.spec("gym/Pendulum-v1")
    force = np.array([[0.123], [-2.0], [2.0]], np.float32)
    ends = np.zeros(3, np.bool_)
    observed = {"observation": np.zeros((4, 3), np.float32)}
    episode = Episode(spec.id, observed, {"action": force}, np.zeros(3), ends, ends)
    decoded = sweep.decoded_actions(episode, spec)
    assert np.abs(np.array(decoded) - force).max() <= 4 / 1024 / 2 + 1e-6
    monkeypatch.setattr(sweep, "BINS", 1 << 16)
    with pytest.raises(sweep.FaultError, match=r"action 0, 'action': \[0.123\] reads back as"):
        sweep.decoded_actions(episode, spec)


def test_worker_processes_know_the_users_worlds_and_may_die(
    worlds: str, capfd: pytest.CaptureFixture[str]
) -> None:
    names = ["gym/Walk-v0", "gym/Dies-v0"]
    code = main(["tasks", *names, "--check", "--json", "--workers", "1", "--import", worlds])
    assert code == 1
    told = json.loads(capfd.readouterr().out)
    assert [(row["id"], row["ok"], row.get("fault")) for row in told["tasks"]] == [
        ("gym/my_worlds:Walk-v0", True, None),
        ("gym/my_worlds:Dies-v0", False, "worker process ended, exit code 7"),
    ]
    counts = told["suites"]["gym"]
    assert (counts["ok"], counts["failed"]) == (1, 1)


def test_patterns_name_the_users_worlds_and_what_leaves_its_space_fails(
    worlds: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The module may be left out; without --import nobody knows them."""
    ids = [f"gym/{worlds}:{name}-v0" for name in ("Walk", "Wide", "Writes")]
    for pattern in ("gym/W*", f"gym/{worlds}:W*"):
        assert main(["tasks", pattern, "--import", worlds, "--json"]) == 0
        assert [row["id"] for row in json.loads(capsys.readouterr().out)] == ids
    arguments = ["gym/Out*", "--episodes", "2", "--import", worlds, "--workers", "0"]
    assert main(["eval", "random", "--tasks", *arguments, "--json"]) == 1
    said = capsys.readouterr()
    (row,) = json.loads(said.out)["tasks"].values()
    assert "not: 'place' is float64(2,), array(" in row["failures"][0]["traceback"]
    assert len(row["failures"]) == 2
    gym_suite._modules.clear()
    assert main(["tasks", "gym/W*"]) == 2
    assert "matches none" in capsys.readouterr().err


def test_the_users_worlds_are_played_by_worker_processes(worlds: str) -> None:
    gym_suite.import_module(worlds)
    jobs = [Job(registry.spec("gym/Walk-v0").id, seed) for seed in range(2)]
    played = run(HostPlayer("random").policy, jobs, workers=2)
    assert [(p.job.task, p.score, p.error) for p in played] == [
        (f"gym/{worlds}:Walk-v0", 30.0, None)
    ] * 2


def test_modules_that_do_not_serve_are_refused(
    worlds: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, message in (
        (["--import", "my_world"], "'my_world' does not import (No module named 'my_world')"),
        (["--import", "json"], "'json' registers none"),
        (["--import", worlds, "gym/Wolk-v0"], "got 'gym/Wolk-v0' (closest: gym/Walk-v0"),
        ([f"gym/{worlds}:Wolk-v0"], f"closest: gym/{worlds}:Walk-v0"),
        (["gym/no_such_module:Walk-v0"], "run where it lies with --import no_such_module"),
    ):
        assert main(["tasks", *arguments]) == 2
        assert message in capsys.readouterr().err
    assert main(["tasks", "gym/Walk-v0", "--import", worlds]) == 0
    assert f"gym/{worlds}:Walk-v0" in capsys.readouterr().out
