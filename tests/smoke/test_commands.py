"""From demonstrations to answers by the commands of the README, in miniature."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gato import cli, load
from gato.envs import registry
from gato.envs.corpora.registry import build

TASKS = ("babyai/GoToRedBallGrey-v0", "metaworld/reach-v3")
TINY = (
    *("--model.layers", "1", "--model.width", "32", "--model.heads", "2", "--model.head-dim"),
    *("16", "--model.ffn-width", "64", "--rows", "4", "--text-pieces", "300", "--log-every", "5"),
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with demonstrations, digits and a model that has hardly learnt from them."""
    root = tmp_path_factory.mktemp("smoke")
    out = ["--out", str(root / "demonstrations"), "--workers", "1"]
    assert cli.main(["collect", *TASKS, "--episodes", "3", *out]) == 0
    build("digits", root / "digits", "train", count=30)
    data = [f"{suite}={root}/demonstrations/{suite}" for suite in ("babyai", "metaworld")]
    data.append(f"digits={root}/digits:0.5")
    train = ["train", "quickstart", "--data", *data, "--out", str(root / "run"), "--steps", "10"]
    assert cli.main([*train, *TINY]) == 0
    return root


@pytest.mark.sim
def test_a_run_does_not_go_on_with_other_data(made, capsys):
    arguments = ["train", "quickstart", "--data", f"digits={made}/digits", "--out"]
    assert cli.main([*arguments, str(made / "run"), "--steps", "10", *TINY]) == cli.BAD_INPUT
    assert "another configuration" in capsys.readouterr().err


@pytest.mark.sim
def test_eval(made, capsys):
    file = made / "scores.json"
    arguments = ["eval", str(made / "run"), "--episodes", "2", "--workers", "1", "--json"]
    assert cli.main([*arguments, str(file), "--tasks", "babyai/*"]) == 0
    told = json.loads(file.read_text())
    assert set(told) >= {"checkpoint", "settings", "versions", "tasks", "summary"}
    (row,) = told["tasks"].values()
    keys = {"returns", "successes", "lengths", "mean_return", "success_rate", "random_score"}
    assert set(row) >= keys | {"expert_score", "expert_normalised", "human_normalised"}
    assert len(row["returns"]) == 2
    assert TASKS[0] in capsys.readouterr().out


@pytest.mark.sim
def test_show_what_a_checkpoint_reads(made, capsys):
    arguments = ["show", f"{made}/demonstrations/{TASKS[1]}", "--checkpoint", str(made / "run")]
    assert cli.main([*arguments, "--steps", "1", "--json"]) == 0
    tokens = json.loads(capsys.readouterr().out)
    assert sum(token["target"] for token in tokens) == 4
    assert any(token["modality"] == "vector" for token in tokens)


@pytest.mark.sim
def test_caption_classify_and_chat(made, capsys):
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(made / "black.png")
    run, image = str(made / "run"), str(made / "black.png")
    for arguments in (
        ["caption", run, image],
        ["classify", run, image, "--labels", "a three,a five"],
        ["chat", run, "--prompt", "what is this?", "--image", image, "--max-tokens", "4"],
    ):
        assert cli.main(arguments) == 0
        assert capsys.readouterr().out.strip()


@pytest.mark.sim
def test_the_python_of_the_readme(made):
    agent = load(made / "run")
    policy = agent.policy(TASKS[1])
    env = registry.make(TASKS[1])
    observation, _ = env.reset(seed=0)
    action = policy.select_action(observation)
    assert env.action_space.contains(action)
    env.close()
