"""The command line: bad input is one sentence on stderr and an exit code, nothing more."""

from __future__ import annotations

import errno
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces

from gato import cli, language_arguments, presets
from gato.checkpoint import load_checkpoint
from gato.config import TrainConfig
from gato.envs import registry
from gato.options import Parser
from gato.train import train


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cli") / "run"


@pytest.fixture
def checkpoint(tiny: TrainConfig, run_folder: Path) -> Path:
    """Return the run of a small model, trained for a few steps."""
    if not run_folder.exists():
        train(replace(tiny, steps=2, save_every=1), run_folder, device="cpu")
    return run_folder


def sentence(capsys: pytest.CaptureFixture[str]) -> str:
    """Return the one line on stderr; nothing may stand on stdout."""
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("gato: ")
    assert said.err.count("\n") == 1
    return said.err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["trian", "quickstart"], "closest: train"),
        (["show", "atari/Pon-v5"], "atari/Pong-v5"),
        (["collect", "babyai/GoToRedBal-v0", "--episodes", "1", "--out", "x"], "GoToRedBall-v0"),
        (["collect", "gym/CartPole-v1", "--episodes", "1", "--out", "x"], "has none"),
        (["collect", "nothing/*", "--episodes", "1", "--out", "x"], "matches none"),
        (["train", "quikstart"], "closest: quickstart"),
        (["train", "quickstart"], "--data NAME=PATH"),
        (["train", "quickstart", "--data", "babyai"], "NAME=PATH[:WEIGHT]"),
        (["train", "quickstart", "--data", "a=/nowhere"], "/nowhere"),
        (["train", "quickstart", "--parameters", "--model.layrs", "2"], "--model.layers"),
        (["train", "quickstart", "--parameters", "--optim.lr", "fast"], "could not convert"),
        (["train", "quickstart", "--parameters", "--model.heads", "0"], "at least 1"),
        (["tasks", "--suite", "chess"], "metaworld"),
        (["tasks", "--color"], "--color"),
        (["collect", "babyai/GoToLocal-v0"], "--episodes"),
        (["data", "info", "/nowhere"], "/nowhere"),
        (["eval", "/nowhere"], "no such folder"),
        (["show", "babyai/GoToLocal-v0", "--codec", "quantum"], "scalar, vector"),
        (["show", "babyai/GoToLocal-v0", "--steps", "0"], "--steps: expected a whole number, 1 or"),
        (["caption", "/nowhere", "/nowhere.png"], "/nowhere.png"),
        (["classify", "/nowhere", "x.png", "--labels", "one"], "two --labels"),
        (["bench", "serialiser"], "serializer"),
        (["chat", "/nowhere", "--max-tokens", "0"], "--max-tokens: expected a whole number, 1 or"),
        (["train", "quickstart", "--data", "a=/tmp:nan"], "positive weight in --data 'a=/tmp:nan'"),
        (["train", "quickstart", "--data", "a=/tmp:0"], "positive weight"),
        (["train", "quickstart", "--data", "a=/tmp:-2"], "positive weight"),
        (["train", "quickstart", "--data", "a=/tmp", "--out", __file__], "expected a folder as"),
        (["serve", "/nowhere", "--timeout", "nan"], "--timeout: expected a finite number above 0"),
        (["show", "gym/Nope-v0"], "got 'gym/Nope-v0'"),
        (["replay", "/nowhere"], "found none"),
        (
            ["quickstart", "--out", "/proc/self/q"],
            "got /proc/self/q (No such file or directory). C",
        ),
        (
            ["experts", "train", "gym/CartPole-v1", "--steps", "10", "--out", "/proc/self/x"],
            "expected a folder for an expert that can be written; got /proc/self/x/training (No",
        ),
    ],
)
def test_bad_input_is_one_sentence(arguments, told, capsys):
    assert cli.main(arguments) == cli.BAD_INPUT
    assert told in sentence(capsys)


@pytest.mark.parametrize(
    "arguments",
    [
        ["quickstart"],
        ["collect", "babyai/GoToLocal-v0", "--episodes", "1", "--out", "x"],
        ["show", "babyai/GoToLocal-v0"],
        ["train", "quickstart"],
        ["eval", "x"],
        ["chat", "x"],
        ["experts", "score", "babyai/GoToLocal-v0"],
        ["experts", "train", "gym/CartPole-v1", "--out", "x"],
        ["compare", "x"],
    ],
)
def test_a_negative_seed_is_refused_by_its_flag(arguments, capsys):
    for seed in ("-1", "1.5", "one"):
        assert cli.main([*arguments, "--seed", seed]) == cli.BAD_INPUT
        assert f"--seed: expected a whole number, 0 or more; got {seed}" in sentence(capsys)


@pytest.mark.parametrize("minutes", ["nan", "inf", "-5", "0", "ten"])
def test_minutes_are_a_number_of_them(minutes, capsys):
    given = ["quickstart", "--out", "/proc/self/q", "--minutes", minutes]
    assert cli.main(given) == cli.BAD_INPUT
    assert f"--minutes: expected a finite number above 0; got {minutes}" in sentence(capsys)


def test_what_quickstart_wrote_is_a_checkpoint(checkpoint, tmp_path, capsys):
    shutil.copytree(checkpoint, tmp_path / "model")
    arguments = ["chat", str(tmp_path), "--prompt", "hello", "--max-tokens", "1", "--json"]
    assert cli.main(arguments) == cli.DONE


def test_an_unreadable_image(checkpoint, tmp_path, capsys):
    (tmp_path / "text.png").write_text("no image")
    for arguments in (
        ["caption", str(checkpoint), str(tmp_path / "text.png")],
        ["chat", str(checkpoint), "--prompt", "hello", "--image", str(tmp_path / "text.png")],
    ):
        assert cli.main(arguments) == cli.BAD_INPUT
        assert "expected an image" in sentence(capsys)


def test_a_truncated_image(tmp_path, capsys):
    from PIL import Image

    Image.new("RGB", (64, 64), "red").save(tmp_path / "whole.png")
    content = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "half.png").write_bytes(content[: len(content) // 2])
    assert cli.main(["caption", "/nowhere", str(tmp_path / "half.png")]) == cli.BAD_INPUT
    assert "half.png" in sentence(capsys)


def test_a_missing_extra_is_named(monkeypatch, capsys):
    def absent(spec):
        raise ModuleNotFoundError("No module named 'metaworld'", name="metaworld")

    monkeypatch.setattr(registry._suite("metaworld"), "make", absent)
    assert cli.main(["show", "metaworld/reach-v3"]) == cli.BAD_INPUT
    assert 'pip install "gato[metaworld]"' in sentence(capsys)


def test_an_action_without_bounds(monkeypatch, capsys):
    class Unbounded(gym.Env):
        observation_space = spaces.Discrete(2)
        action_space = spaces.Box(-np.inf, np.inf, (2,), np.float32)

        def reset(self, *, seed=None, options=None):
            return 0, {}

        def step(self, action):
            return 0, 0.0, False, False, {}

    gym.register("Unbounded-v0", Unbounded)
    assert cli.main(["show", "gym/Unbounded-v0"]) == cli.BAD_INPUT
    assert "finite bounds" in sentence(capsys)
    del gym.registry["Unbounded-v0"]


def test_an_action_out_of_its_box(stores, tmp_path, capsys):
    shutil.copytree(stores / "arm", tmp_path / "arm")
    file = next((tmp_path / "arm").rglob("action*.npy"))
    actions = np.load(file)
    actions[0, 1] = 3.2
    np.save(file, actions)
    assert cli.main(["show", str(tmp_path / "arm")]) == cli.BAD_INPUT
    told = sentence(capsys)
    assert "[-1, 1] at dim 1" in told
    assert "3.2" in told


@pytest.mark.parametrize(
    "name", ["config.json", "vocabulary.json", "model.safetensors", "text.model"]
)
@pytest.mark.parametrize("damage", ["missing", "truncated", "foreign"])
def test_a_damaged_checkpoint_is_refused(checkpoint, tmp_path, capsys, name, damage):
    folder = tmp_path / "damaged"
    shutil.copytree(load_checkpoint(checkpoint).path, folder)
    file = folder / name
    match damage:
        case "missing":
            file.unlink()
        case "truncated":
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        case "foreign":
            file.write_text("{}")
    assert cli.main(["chat", str(folder), "--prompt", "hello"]) == cli.BAD_INPUT
    assert "damaged" in sentence(capsys)


def test_an_empty_folder_is_no_checkpoint(tmp_path, capsys):
    assert cli.main(["chat", str(tmp_path), "--prompt", "hello"]) == cli.BAD_INPUT
    assert "config.json" in sentence(capsys)


def test_a_task_the_model_does_not_know(checkpoint, capsys):
    arguments = ["eval", str(checkpoint), "--tasks", "babyai/GoToLocal-v0", "--episodes", "1"]
    assert cli.main(arguments) == cli.BAD_INPUT
    assert "toy/arm-v0" in capsys.readouterr().err


def test_a_full_disk_leaves_the_last_checkpoint(tiny, tmp_path, monkeypatch, capsys):
    short = replace(tiny, steps=2, save_every=1)
    run = tmp_path / "run"
    train(short, run, device="cpu")
    before = load_checkpoint(run)

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setitem(presets.PRESETS, "short", lambda: replace(tiny, steps=4, save_every=3))
    data = [f"{c.name}={c.path}:{c.weight}" for c in tiny.corpora]
    other = tmp_path / "other"
    assert cli.main(["train", "short", "--data", *data, "--out", str(other), "--steps", "3"]) == 0
    capsys.readouterr()
    longer = ["train", "short", "--data", *data, "--out", str(other), "--steps", "3", "--no-resume"]
    monkeypatch.setattr(os, "fsync", full)
    assert cli.main(longer) == cli.FAILURE
    assert "No space left on device" in capsys.readouterr().err.splitlines()[-1]
    monkeypatch.undo()
    assert load_checkpoint(other / "earlier-1").step == 3
    assert load_checkpoint(run).step == before.step
    assert not list(other.glob(".step-*"))


def test_debug_shows_the_traceback(capsys):
    assert cli.main(["show", "atari/Pon-v5", "--debug"]) == cli.BAD_INPUT
    assert "Traceback" in capsys.readouterr().err


def test_a_fault_of_ours_is_a_failure(monkeypatch, capsys):
    def broken(pattern):
        raise KeyError("lost")

    monkeypatch.setattr(registry, "task_ids", broken)
    assert cli.main(["tasks"]) == cli.FAILURE
    assert "KeyError" in sentence(capsys)


def test_the_help_tells_every_bound_of_the_server():
    parser = Parser()
    language_arguments.serve(parser)
    bounds = [a for a in parser._actions if type(a.default) in (int, float)]
    assert len(bounds) >= 7
    for action in bounds:
        assert f"({action.default:g})" in action.help, action.option_strings


def test_tasks_as_json(capsys):
    assert cli.main(["tasks", "--suite", "metaworld", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert len(listed) == 50
    assert list(listed[0]) == [
        *("id", "suite", "modalities", "max_steps", "random_score", "expert_score"),
        *("score_source", "expert"),
    ]
    assert listed[0]["modalities"] == ["continuous", "text"]


def test_parameters_as_json_stand_beside_the_papers(capsys):
    assert cli.main(["train", "gato_79m", "--parameters", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["paper"] == 79e6
    assert sum(told["parameters"].values()) == 2 * told["parameters"]["total"]


@pytest.mark.parametrize("name", presets.PAPER_PARAMETERS)
def test_the_sizes_are_near_the_papers(name):
    counted = presets.parameters(presets.preset(name))["total"]
    assert 0.9 < counted / presets.PAPER_PARAMETERS[name] < 1.1


def test_data_keeps_what_a_preset_knows_of_a_corpus():
    config = presets.preset("quickstart")
    known = config.corpora[0]
    data = [f"{known.name}=C:/elsewhere:2", "mine=here:there"]
    changed = presets.with_data(config, data).corpora
    assert changed[0] == replace(known, path="C:/elsewhere", weight=2.0)
    assert (changed[1].name, changed[1].path, changed[1].weight) == ("mine", "here:there", 1.0)


def test_overrides_reach_every_field(capsys):
    arguments = ["train", "quickstart", "--parameters", "--json", "--model.layers", "2"]
    assert cli.main(arguments) == 0
    fewer = json.loads(capsys.readouterr().out)["parameters"]["trunk"]
    assert fewer * 2 == presets.parameters(presets.preset("quickstart"))["trunk"]


def test_a_store_is_described_and_checked(stores, capsys):
    assert cli.main(["data", "info", str(stores), "--json"]) == 0
    told = {Path(row["store"]).name: row for row in json.loads(capsys.readouterr().out)}
    assert told["arm"]["items"] == 20
    assert told["arm"]["steps"] > 0
    assert told["words"]["items"] == 40
    assert cli.main(["data", "validate", str(stores)]) == 0


def test_a_damaged_store_is_refused(stores, tmp_path, capsys):
    shutil.copytree(stores / "arm", tmp_path / "arm")
    file = next(p for p in sorted((tmp_path / "arm").rglob("*.npy")) if p.stat().st_size > 200)
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert cli.main(["data", "validate", str(tmp_path)]) == cli.BAD_INPUT
    said = capsys.readouterr()
    assert said.err.startswith("gato: ")
    assert "damaged" in said.err


def test_a_damaged_store_does_not_hide_the_others(stores, tmp_path, capsys):
    for name in ("arm", "words"):
        shutil.copytree(stores / name, tmp_path / name)
    (tmp_path / "arm" / "manifest.json").write_text("{")
    assert cli.main(["data", "validate", str(tmp_path), "--json"]) == cli.BAD_INPUT
    said = capsys.readouterr()
    rows = {Path(row["store"]).name: row["valid"] for row in json.loads(said.out)}
    assert rows == {"arm": False, "words": True}
    assert "manifest.json" in said.err
    assert cli.main(["data", "info", str(tmp_path), "--json"]) == cli.BAD_INPUT
    assert len(json.loads(capsys.readouterr().out)) == 1


def test_chat_answers_a_prompt(checkpoint, tmp_path, capsys):
    from PIL import Image

    Image.new("L", (900, 300)).save(tmp_path / "wide.png")
    arguments = ["chat", str(checkpoint), "--prompt", "what?", "--max-tokens", "4", "--json"]
    assert cli.main(arguments) == 0
    assert json.loads(capsys.readouterr().out)["prompt"] == "what?"
    arguments = ["classify", str(checkpoint), str(tmp_path / "wide.png"), "--labels", "red, blue"]
    assert cli.main([*arguments, "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)["probabilities"]) == {"red", "blue"}


def test_a_conversation_outlives_its_errors(checkpoint, monkeypatch, capsys):
    lines = iter(["hello", "/image nowhere.png", "/what", "", "/reset", "hello", "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    assert cli.main(["chat", str(checkpoint), "--max-tokens", "4"]) == 0
    told = capsys.readouterr().err
    assert "nowhere.png" in told
    assert "/what" in told
    assert next(lines, None) is None


def test_a_run_that_was_told_to_stop_says_so(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(presets.PRESETS, "short", lambda: replace(tiny, steps=3))

    def stopped(config, out, **options):
        return train(replace(config, steps=2), out, device="cpu")

    monkeypatch.setattr("gato.train.train", stopped)
    data = [f"{c.name}={c.path}:{c.weight}" for c in tiny.corpora]
    assert cli.main(["train", "short", "--data", *data, "--out", str(tmp_path), "--json"]) == 0
    said = capsys.readouterr()
    assert "stopped at step 2" in said.err
    assert json.loads(said.out)["step"] == 2


@pytest.mark.parametrize("size", ["30x30", "0x16", "64", "64x", "axb", "16x16x16"])
def test_a_size_is_of_whole_patches(size, capsys, tmp_path):
    given = ["data", "import", str(tmp_path), "--out", str(tmp_path / "out"), "--image-size", size]
    assert cli.main(given) == cli.BAD_INPUT
    assert "multiples of 16" in capsys.readouterr().err
