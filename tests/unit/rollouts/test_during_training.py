"""Tasks played during training: at seeds of their own, and what fails there ends nothing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import gymnasium as gym
import numpy as np
import pytest

from gato import cli, presets
from gato.checkpoint import load_checkpoint
from gato.config import TrainConfig
from gato.corpora import CorpusConfig
from gato.envs import registry
from gato.envs.collect import ATTEMPTS
from gato.envs.episode import EVALUATION_SEED_START, Episode, flatten_value
from gato.envs.store import EpisodeStore, EpisodeWriter
from gato.model_config import ModelConfig
from gato.rollouts import during_training
from gato.rollouts.during_training import FIRST_SEED, evaluation
from gato.rollouts.hosts import DRAWING_AT_ONCE
from gato.train import train

from .conftest import SPECS, Made

TASKS = ("made/count-v0", "made/reach-v0")


def write(path: Path, task: str, first: int = 0) -> EpisodeStore:
    """Return a store of six episodes of noise."""
    spec, env = registry.spec(task), registry.make(task)
    env.action_space.seed(0)
    with EpisodeWriter(path, spec) as writer:
        for seed in range(first, first + 6):
            seen, done = [env.reset(seed=seed)[0]], []
            for _ in range(3):
                done.append(env.action_space.sample())
                seen.append(env.step(done[-1])[0])
            no = np.zeros(3, bool)
            writer.append(
                Episode(
                    task,
                    columns(spec.observation_space, seen, "observation"),
                    columns(spec.action_space, done, "action"),
                    np.ones(3, np.float32),
                    no,
                    no,
                    None,
                    spec.instruction,
                    seed,
                )
            )
    env.close()
    return EpisodeStore(path)


def columns(space: gym.Space, values: list, name: str) -> dict[str, np.ndarray]:
    flat = [flatten_value(space, value, name) for value in values]
    return {path: np.stack([row[path] for row in flat]) for path in flat[0]}


@pytest.fixture
def stores(suite: ModuleType, tmp_path: Path) -> list[EpisodeStore]:
    return [write(tmp_path / "stores" / task.replace("/", "-"), task) for task in TASKS]


def recipe(folder: Path) -> TrainConfig:
    """Return a run of a few steps on a folder of stores."""
    return TrainConfig(
        model=ModelConfig(layers=1, width=16, heads=2, head_dim=8, ffn_width=32, context=64),
        corpora=(CorpusConfig("episodes", str(folder), window=2),),
        rows=2,
        steps=4,
        log_every=1,
        save_every=10,
    )


@pytest.fixture
def run_(stores: list[EpisodeStore], tmp_path: Path, text_model: bytes) -> Path:
    config = replace(recipe(tmp_path / "stores"), steps=1)
    return train(config, tmp_path / "run", device="cpu", text_model=text_model)


def test_scores_are_at_seeds_of_their_own(stores, run_, monkeypatch):
    seen = []
    plain = Made.reset

    def reset(self, *, seed=None, options=None):
        seen.append(seed)
        return plain(self, seed=seed)

    monkeypatch.setattr(Made, "reset", reset)
    found = evaluation(TASKS, 4, stores, workers=0)(run_)
    expected = [FIRST_SEED + i for i in range(4)]
    assert sorted(s for s in seen if s is not None) == sorted(expected * 2)
    assert all(s < EVALUATION_SEED_START for s in expected)
    assert EVALUATION_SEED_START - FIRST_SEED == ATTEMPTS
    lengths = [3 + seed % 6 for seed in expected]  # a reward of 1 a step, the expert's score is 10
    assert found["made/count-v0"] == pytest.approx(np.mean(lengths) / 10)
    assert found["made/reach-v0"] == pytest.approx(0.5)  # odd seeds succeed
    assert evaluation(TASKS, 4, stores, workers=0)(run_) == found


def test_few_environments_stand_beside_the_trainer(stores, run_, monkeypatch):
    rows = []
    plain = during_training.Agent.policy

    def policy(self, tasks, *rest):
        rows.append(len(tasks))
        return plain(self, tasks, *rest)

    monkeypatch.setattr(during_training.Agent, "policy", policy)
    assert evaluation(TASKS, DRAWING_AT_ONCE, stores, workers=0)(run_)
    assert rows == [DRAWING_AT_ONCE]


def test_a_task_without_references_has_its_own_measure(stores, run_, monkeypatch):
    bare = {i: replace(s, random_score=None, expert_score=None) for i, s in SPECS.items()}
    monkeypatch.setattr(registry, "spec", lambda task: bare[task])
    found = evaluation(TASKS, 2, stores, workers=0)(run_)
    lengths = [3 + (FIRST_SEED + i) % 6 for i in range(2)]
    assert found == {"made/count-v0": np.mean(lengths), "made/reach-v0": 0.5}


def test_what_fails_is_told_and_has_no_score(stores, run_, monkeypatch):
    def step(self, action):
        if self.task.id == "made/count-v0" or self.seed_ == FIRST_SEED:
            raise RuntimeError("the arm fell off")
        return plain(self, action)

    plain = Made.step
    monkeypatch.setattr(Made, "step", step)
    said: list[str] = []
    found = evaluation(TASKS, 2, stores, workers=0, say=said.append)(run_)
    assert found == {"made/reach-v0": float((FIRST_SEED + 1) % 2)}  # of the one that was played
    assert [s.split(" failed: ")[0] for s in said] == [
        "2 of 2 episodes of made/count-v0",
        "1 of 2 episodes of made/reach-v0",
    ]
    assert all("the arm fell off" in s for s in said)


def test_whatever_else_fails_is_told_too(stores, tmp_path, monkeypatch):
    said: list[str] = []
    play = evaluation(TASKS, 2, stores, workers=0, say=said.append)
    assert play(tmp_path / "nowhere") == {}
    assert said[0].startswith("no scores of nowhere: ValueError: expected a checkpoint folder")

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(during_training.Agent, "load", interrupted)
    with pytest.raises(KeyboardInterrupt):
        play(tmp_path)


def test_a_task_that_is_not_trained_on_is_refused(stores):
    with pytest.raises(ValueError, match=r"trained on \(made/count-v0\); got 'made/reach-v0'"):
        evaluation(TASKS, 2, stores[:1])


def test_stores_that_hold_these_seeds_are_refused(suite, tmp_path):
    store = write(tmp_path / "seen", TASKS[0], first=FIRST_SEED - 5)  # the last is the first seed
    with pytest.raises(ValueError, match=r"seen holds some\. Collect with another --seed than 10"):
        evaluation(TASKS[:1], 1, [store])


def test_a_simulator_that_is_missing_is_told_at_once(stores, suite):
    def make(spec):
        raise ImportError("no module named made")

    suite.make = make
    with pytest.raises(ValueError, match=r'pip install "gato\[made\]"'):
        evaluation(TASKS, 2, stores)


DEADLY = "gym/deadly:Deadly-v0"  # ends its process at chosen seeds


def test_gato_train_plays_in_processes_and_goes_on(tmp_path, monkeypatch, capsys):
    """With simulators in processes of their own, one of them killed at every attempt."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    monkeypatch.setenv("DEADLY", str(tmp_path))
    (tmp_path / str(FIRST_SEED + 1)).write_text("kill")
    write(tmp_path / "stores", DEADLY)
    config = replace(recipe(tmp_path / "stores"), save_every=2)
    monkeypatch.setitem(presets.PRESETS, "tiny", lambda: config)
    run = tmp_path / "run"
    more = ["--eval-tasks", DEADLY, "--eval-every", "2", "--eval-episodes", "3"]
    words = ["train", "tiny", "--data", f"episodes={tmp_path / 'stores'}", "--out", str(run)]
    words += ["--validation", "0"]
    assert cli.main([*words, *more]) == cli.DONE
    said = capsys.readouterr().err
    assert said.count(f"1 of 3 episodes of {DEADLY} failed: worker process ended") == 2
    every = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    scores = {line["step"]: line["evaluation"] for line in every if "evaluation" in line}
    assert list(scores) == [2, 4]
    assert all(list(found) == [DEADLY] for found in scores.values())
    assert load_checkpoint(run).step == 4
    assert cli.main(["runs", str(run), "--json"]) == cli.DONE
    assert json.loads(capsys.readouterr().out)[0]["evaluation"]["scores"] == scores[4]
