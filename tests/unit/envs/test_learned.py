"""Learned experts: trained, stopped and gone on with, and read back as they were."""

from __future__ import annotations

import builtins
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from gato.cli import BAD_INPUT, DONE, main
from gato.envs import registry
from gato.envs.episode import TaskSpec
from gato.envs.experts import learned, training
from gato.envs.experts.learned import Interface, LearnedExpert
from gato.envs.experts.training import TrainingEnv, train
from gato.envs.experts.training_state import newest, read_counters, restore
from gato.envs.score import score

CARTPOLE, PENDULUM = "gym/CartPole-v1", "gym/Pendulum-v1"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return the folder of a hardly trained expert of each algorithm."""
    folder = tmp_path_factory.mktemp("learned")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "CHECK_EPISODES", 1)
        patch.setitem(training.SAC, "learning_starts", 20)
        patch.setattr(training, "ROLLOUT", 64)
        patch.setitem(training.PPO, "n_steps", 64)
        patch.setitem(training.PPO, "batch_size", 64)
        train(CARTPOLE, folder / "ppo", steps=256, envs=2)
        train(PENDULUM, folder / "sac", steps=128, algorithm="sac")
    return {"ppo": folder / "ppo", "sac": folder / "sac"}


def rebuilt(folder: Path) -> tuple[Any, Any, TaskSpec]:
    """Return model and worlds as a training in `folder` would go on with them."""
    saved = newest(folder / "training")
    counters = read_counters(saved)
    spec = registry.spec(counters.settings["task"])
    worlds = training._worlds(spec, counters)
    model = training._model(worlds, counters)
    restore(saved, model, worlds, counters)
    return model, worlds, spec


@pytest.mark.parametrize("name", ["ppo", "sac"])
def test_the_export_acts_as_the_model_it_came_from(name: str, trained: dict[str, Path]) -> None:
    model, worlds, spec = rebuilt(trained[name])
    actor = training._actor(model, worlds)
    assert actor.sizes[0] == len(actor.tensors[learned.MEAN]) == spec.observation_space.shape[0]
    assert not np.allclose(actor.tensors[learned.MEAN], 0.0)  # scales were learned
    rng = np.random.default_rng(0)
    for _ in range(200):
        seen = rng.normal(0.0, 3.0, spec.observation_space.shape).astype(np.float32)
        expected, _ = model.predict(worlds.normalize_obs(seen), deterministic=True)
        got = actor(seen)
        if name == "ppo":
            assert got == expected
        else:
            np.testing.assert_allclose(got, expected, atol=1e-5)
    worlds.close()


@pytest.mark.parametrize("name", ["ppo", "sac"])
def test_what_is_put_down_is_all_there(name: str, trained: dict[str, Path], tmp_path: Path) -> None:
    model, worlds, _ = rebuilt(trained[name])
    counters = read_counters(newest(trained[name] / "training"))
    assert model.num_timesteps == counters.steps == {"ppo": 256, "sac": 128}[name]
    assert model._n_updates == counters.updates > 0
    training.save(tmp_path, model, worlds, counters)
    for path in newest(trained[name] / "training").iterdir():
        if path.suffix == ".npy":
            again = np.load(newest(tmp_path) / path.name)
            np.testing.assert_array_equal(again, np.load(path))
    if name == "sac":
        assert model.replay_buffer.size() == 128
        assert np.abs(model.replay_buffer.observations[:128]).min(axis=-1).max() > 0
    worlds.close()


def test_a_training_goes_on_and_says_when_it_is_done(
    trained: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.setattr(training, "CHECK_EPISODES", 1)
    folder = tmp_path / "expert"
    shutil.copytree(trained["ppo"], folder)
    before = read_counters(newest(folder / "training"))
    arguments = ["experts", "train", CARTPOLE, "--out", str(folder), "--envs", "2"]
    assert main([*arguments, "--steps", "256"]) == DONE  # nothing is left to do
    assert "finished" in capsys.readouterr().out
    assert read_counters(newest(folder / "training")) == before
    (folder / "training" / ".999.new").mkdir()  # a kill while it was being written
    assert main([*arguments, "--steps", "600", "--json"]) == DONE
    told = json.loads(capsys.readouterr().out)
    after = read_counters(newest(folder / "training"))
    assert after.steps == told["steps"] == 256 + 2 * training.ROLLOUT
    assert after.updates > before.updates
    assert after.minutes > before.minutes
    assert after.checks[: len(before.checks)] == before.checks
    assert len(list((folder / "training").iterdir())) == 1  # older states are gone
    assert main([*arguments, "--steps", "600", "--seed", "1"]) == BAD_INPUT
    assert "--no-resume" in capsys.readouterr().err


def test_training_learns_and_stops_where_that_is_enough(tmp_path: Path) -> None:
    told = []
    done = train(CARTPOLE, tmp_path / "x", steps=60_000, until=120.0, progress=told.append)
    assert done.best.score >= 120.0  # a random policy reaches about 22
    assert done.steps < 40_000
    assert told[-1].best == done.best.score
    assert score(CARTPOLE, 5, kind=str(tmp_path / "x"), first_seed=0)["mean_return"] > 80.0


def test_trials_after_the_last_state_still_count(trained: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "expert"
    shutil.copytree(trained["ppo"], folder)
    counters = read_counters(newest(folder / "training"))
    short = dataclasses.replace(counters, checks=[])
    training._catch_up(short, folder)
    assert short.best == counters.best


def test_trials_of_another_training_do_not_count(trained: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "expert"
    shutil.copytree(trained["ppo"], folder)
    counters = read_counters(newest(folder / "training"))
    for name in ("task", "algorithm", "envs", "seed"):
        other = dataclasses.replace(
            counters, checks=[], settings={**counters.settings, name: "other"}
        )
        training._catch_up(other, folder)
        assert other.checks == []
    description = json.loads((folder / "expert.json").read_text())
    for damage in ([{"stpes": 1}], [3], 7):
        (folder / "expert.json").write_text(json.dumps({**description, "checks": damage}))
        with pytest.raises(ValueError, match=r"expert\.json is damaged.*--no-resume"):
            training._catch_up(dataclasses.replace(counters), folder)


def test_a_training_begun_anew_leaves_nothing_of_the_old(
    trained: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "expert"
    shutil.copytree(trained["ppo"], folder)
    monkeypatch.setattr(training._Run, "go", lambda *_: None)  # killed before its first trial
    assert train(CARTPOLE, folder, steps=600, envs=2, resume=False).checks == []
    assert train(CARTPOLE, folder, steps=600, envs=2).checks == []
    assert not (folder / "expert.json").exists()


def test_only_training_seeds_are_met(trained: dict[str, Path]) -> None:
    spec = registry.spec(CARTPOLE)
    env = TrainingEnv(spec, [0, 0, 0])
    seeds = []
    env._env = type("Spy", (), {"reset": lambda self, seed: (seeds.append(seed), None)[1]})()
    for _ in range(200):
        with pytest.raises(TypeError):  # the spy has no observation
            env.reset(seed=1 << 30)
    assert len(set(seeds)) == 200
    assert max(seeds) < training.CHECK_SEED
    assert training.CHECK_SEED + 3 * training.CHECK_EPISODES < 1 << 30


def test_an_expert_in_a_folder_plays_and_is_scored(
    trained: dict[str, Path], capsys: pytest.CaptureFixture
) -> None:
    folder = str(trained["ppo"])
    expert = registry.make_expert(CARTPOLE, folder)
    assert isinstance(expert, LearnedExpert)
    assert expert.settings.startswith("learned: ppo, ")
    got = score(CARTPOLE, 2, kind=folder)
    arguments = [CARTPOLE, "--expert", folder, "--episodes", "2", "--workers", "0", "--json"]
    assert main(["experts", "score", *arguments]) == DONE
    (row,) = json.loads(capsys.readouterr().out)
    assert row["returns"] == got["returns"]
    assert row["expert"] == expert.settings


def test_what_is_not_this_tasks_expert_is_refused(trained: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"one of '{CARTPOLE}'"):
        registry.make_expert(PENDULUM, str(trained["ppo"]))
    with pytest.raises(ValueError, match="folder of a learned one; got 'scriptd'"):
        registry.make_expert(CARTPOLE, "scriptd")
    with pytest.raises(ValueError, match=r"has no expert\.json"):
        registry.make_expert(CARTPOLE, str(tmp_path))


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 0x40
    path.write_bytes(bytes(content))


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("policy.safetensors", _flip),
        ("policy.safetensors", lambda p: p.write_bytes(p.read_bytes()[:100])),
        ("policy.safetensors", Path.unlink),
        ("expert.json", lambda p: p.write_text(p.read_text()[:-20])),
        ("expert.json", lambda p: p.write_text('{"format": "gato learned expert 1"}')),
        ("expert.json", lambda p: p.write_text("[]")),
    ],
)
def test_a_damaged_expert_is_named(
    name: str, damage: Any, trained: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "expert"
    shutil.copytree(trained["ppo"], folder)
    damage(folder / name)
    with pytest.raises(ValueError, match=name):
        registry.make_expert(CARTPOLE, str(folder))


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"layers.0.bias": np.zeros(3, np.float32)}, "do not fit"),
        ({"layers.0.bias": np.full(64, np.nan, np.float32)}, "finite"),
        ({"layers.9.bias": np.zeros(3, np.float32)}, "it holds"),
        ({"activation": "sigmoid"}, "activation"),
    ],
)
def test_a_network_that_cannot_act_is_refused_when_it_is_read(
    change: dict[str, Any], fault: str, trained: dict[str, Path]
) -> None:
    _, actor = learned.load(trained["ppo"])
    assert learned._fault(actor) is None
    change = {"activation": actor.activation, **change}
    activation = change.pop("activation")
    changed = dataclasses.replace(actor, tensors={**actor.tensors, **change}, activation=activation)
    assert fault in learned._fault(changed)


def test_a_damaged_state_is_named(trained: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "expert"
    shutil.copytree(trained["ppo"], folder)
    (newest(folder / "training") / "parameters.pt").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"damaged.*--no-resume"):
        train(CARTPOLE, folder, steps=2000, envs=2)
    shutil.rmtree(folder / "training")
    with pytest.raises(ValueError, match="training is gone"):
        train(CARTPOLE, folder, steps=2000, envs=2)


def _spec(observation: gym.Space, action: gym.Space) -> TaskSpec:
    return TaskSpec("toy/x", observation, action, max_steps=1, control_hz=1.0)


def test_nested_numbers_become_a_vector_and_a_vector_an_action() -> None:
    spaces = gym.spaces
    seen = spaces.Dict({"b": spaces.Box(-1, 1, (2,), np.float32), "a": spaces.Discrete(3, start=1)})
    acted = spaces.Box(np.float32([-3, 0]), np.float32([3, 10]), dtype=np.float32)
    interface = Interface(_spec(seen, acted))
    assert (interface.size, interface.outputs, interface.discrete) == (5, 2, False)
    vector = interface.vector({"b": np.float32([0.5, -0.5]), "a": np.int64(3)})
    np.testing.assert_array_equal(vector, np.float32([0, 0, 1, 0.5, -0.5]))
    np.testing.assert_array_equal(interface.action(np.array([0.0, 7.0])), np.float32([0, 10]))
    assert interface.action(np.array([-1.0, -1.0])).dtype == np.float32
    steering = Interface(_spec(seen, spaces.Discrete(2, start=5)))
    assert steering.action(1) == 6


@pytest.mark.parametrize(
    ("task_id", "what"),
    [("babyai/GoToLocal-v0", "'mission' is"), ("atari/Boxing-v5", "is a picture")],
)
def test_tasks_that_cannot_be_learned_here_are_refused(
    task_id: str, what: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=what):
        train(task_id, tmp_path / "x", steps=10)
    unbounded = gym.spaces.Box(-np.inf, np.inf, (1,), np.float32)
    with pytest.raises(ValueError, match="bounded Box actions"):
        Interface(_spec(unbounded, unbounded))
    assert not (tmp_path / "x").exists()


def test_bad_settings_are_refused(tmp_path: Path) -> None:
    for wrong in ({"steps": 0}, {"minutes": -1.0}, {"envs": 0}, {"algorithm": "dqn"}):
        with pytest.raises(ValueError, match=f"expected {next(iter(wrong))}"):
            train(CARTPOLE, tmp_path / "x", **wrong)
    with pytest.raises(ValueError, match="Use ppo"):
        train(CARTPOLE, tmp_path / "x", algorithm="sac")


def test_the_missing_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *rest: Any) -> Any:
        if name.startswith("stable_baselines3"):
            raise ImportError(f"No module named {name!r}")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ValueError, match=r'pip install "gato\[experts\]"'):
        train(CARTPOLE, tmp_path / "x", steps=10)
