"""What a store holds happens again in its simulator, and what was changed is found."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gato import cli
from gato.envs import registry
from gato.envs.collect import collect
from gato.envs.play import play
from gato.envs.store import EpisodeStore, EpisodeWriter
from gato.rollouts.replay import changed_versions, replay

DEADLY = "gym/deadly:Deadly-v0"


class Chance:
    """Acts by the seed."""

    def reset(self, env: Any, seed: int) -> None:
        self.draws = np.random.default_rng(seed)

    def act(self, env: Any, observation: Any) -> int:
        return int(self.draws.integers(3))


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a store of ten episodes with noise; ``$DEADLY`` decides which seeds fail now."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    monkeypatch.setenv("DEADLY", str(tmp_path / "faults"))
    (tmp_path / "faults").mkdir()
    spec = registry.spec(DEADLY)
    env = registry.make(DEADLY)
    with EpisodeWriter(tmp_path / "store", spec, versions={"gymnasium": "0.1"}) as writer:
        for seed in range(10):
            writer.append(play(env, Chance(), spec, seed, 0.5))
    return tmp_path / "store"


def replayed(path: Path) -> list:
    opened = EpisodeStore(path)
    return list(replay(opened, range(len(opened))))


def change(path: Path, name: str, index: Any, value: Any) -> None:
    """Write one number of a store's column."""
    (file,) = path.glob(f"shard-*/{name}.npy")
    column = np.load(file)
    assert column[index] != value
    column[index] = value
    np.save(file, column)


def test_executed_actions_are_played_again(store: Path) -> None:
    opened = EpisodeStore(store)
    episodes = [opened.episode(i) for i in range(10)]
    assert any((e.actions["action"] != e.targets["action"]).any() for e in episodes)
    now = replayed(store)
    assert [r.difference for r in now] == [None] * 10
    assert [r.return_now for r in now] == opened.returns.tolist()
    assert [r.steps for r in now] == opened.lengths.tolist()
    assert next(iter(replay(opened, [-1]))).episode == 9


@pytest.mark.parametrize(
    ("column", "index", "value", "told"),
    [
        ("actions.action", 4, 7, "step 1: 'counts/000' at [1] is"),  # the second episode's first
        ("seeds", 1, 4, "step 0: 'counts/000' at [0] is 1.0 in the store, 4.0 now"),
        ("observations.time", 5 + 3, 3.5, "step 3: 'time' is 3.5 in the store, 3.0 now"),
        ("rewards", 4 + 2, -1.0, "step 3: reward is -1.0 in the store"),
        ("successes", 1, 1, "step 5: success is True in the store, None now"),
        ("truncated", 4 + 4, True, "step 5: truncated is True in the store, False now"),
        ("returns", 1, 77.0, "step 5: return is 77.0 in the store, whose rewards sum to "),
        ("returns", 1, np.nan, "step 5: return is nan in the store"),
    ],
)
def test_what_was_changed_is_found(
    store: Path, column: str, index: int, value: Any, told: str
) -> None:
    change(store, column, index, value)
    now = replayed(store)
    assert told in now[1].difference
    assert [r.reproduced for r in now] == [True, False, *[True] * 8]


def test_an_episode_that_ends_otherwise_differs(store: Path) -> None:
    change(store, "seeds", 0, 7)  # lasts a step longer, and observes the same
    assert "step 4: terminated is True in the store, False now" in replayed(store)[0].difference


def test_a_simulator_that_throws_differs(store: Path) -> None:
    (store.parent / "faults" / "6").write_text("throw")
    now = replayed(store)
    assert now[6].difference.startswith("step 2: RuntimeError: the arm fell off (deadly.py:")
    assert sum(not r.reproduced for r in now) == 1


def test_other_versions_are_told(store: Path) -> None:
    import gymnasium

    manifest = EpisodeStore(store).manifest
    assert changed_versions(manifest) == {"gymnasium": ("0.1", gymnasium.__version__)}


def test_the_command_tells_and_fails(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(store, store.parent / "two" / "a")
    shutil.copytree(store, store.parent / "two" / "b")
    two = str(store.parent / "two")
    assert cli.main(["replay", two, "--all", "--json"]) == cli.DONE
    said = capsys.readouterr()
    rows = json.loads(said.out)
    assert len(rows) == 20
    assert all(row["reproduced"] for row in rows)
    assert "gymnasium was 0.1 when this was logged" in said.err
    change(store.parent / "two" / "b", "actions.action", 4, 7)
    assert cli.main(["replay", two, "--json"]) == cli.DONE
    assert cli.main(["replay", two, "--episode", "1"]) == cli.FAILURE
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("gato: 1 of 2 episodes are not reproduced; episode 1 of ")
    assert f"two{os.sep}b differs at step 1: 'counts/000' at [1]" in said
    assert cli.main(["replay", two, "--episode", "10"]) == cli.BAD_INPUT
    assert "an episode in [0, 10); got 10" in capsys.readouterr().err


def test_a_store_of_records_cannot_be_replayed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from gato.envs.records import RecordWriter

    with RecordWriter(tmp_path / "words", "words") as writer:
        writer.append({"kind": "document", "text": "hello"})
    assert cli.main(["replay", str(tmp_path)]) == cli.BAD_INPUT
    assert "a store with episodes" in capsys.readouterr().err


@pytest.mark.sim
@pytest.mark.parametrize(
    "task", ["metaworld/push-v3", "babyai/GoToLocal-v0", "fetch/FetchReach-v4", "atari/Boxing-v5"]
)
def test_simulators_do_it_again(tmp_path: Path, task: str) -> None:
    spec = registry.spec(task)
    pytest.importorskip({"atari": "ale_py", "babyai": "minigrid"}.get(spec.suite, "mujoco"))
    episodes = 1 if spec.max_steps > 1000 else 2
    made = collect([task], episodes, tmp_path, noise=0.05, min_fraction=0.0, workers=0)
    assert [r.difference for r in replayed(made[task])] == [None] * episodes
