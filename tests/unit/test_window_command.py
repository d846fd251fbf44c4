"""`gato train` with a sliding window: what is trained is what its rollouts remember."""

from __future__ import annotations

import numpy as np
import pytest
from gymnasium import spaces

from gato import cli, load
from gato.envs.episode import Episode, TaskSpec
from gato.envs.store import EpisodeWriter

TASK = TaskSpec(
    id="toy/long-v0",
    observation_space=spaces.Box(-np.inf, np.inf, (5,), np.float32),
    action_space=spaces.Box(-1, 1, (2,), np.float32),
    max_steps=40,
    control_hz=10.0,
)
SIZE = (
    *("--model.layers", "1", "--model.width", "32", "--model.head-dim", "16", "--rows", "2"),
    *("--model.ffn-width", "64", "--steps", "2"),
)
WHOLE = ("--corpora.0.start", "1", "--corpora.0.prompt", "0")


@pytest.fixture
def command(tmp_path) -> list[str]:
    """Return what trains on episodes of 40 steps, about 200 tokens each."""
    rng = np.random.default_rng(0)
    no = np.zeros(40, bool)
    with EpisodeWriter(tmp_path / "long", TASK) as writer:
        for seed in range(4):
            observed = {"observation": rng.normal(size=(41, 5)).astype(np.float32)}
            acted = {"action": rng.uniform(-1, 1, (40, 2)).astype(np.float32)}
            rewards = np.zeros(40, np.float32)
            writer.append(Episode(TASK.id, observed, acted, rewards, no, no, None, "", seed))
    data = ["--data", f"long={tmp_path}/long", "--validation", "0"]
    return ["train", "quickstart", *data, *SIZE, "--out", str(tmp_path / "run")]


def test_a_run_with_a_window_rolls_out_with_it(command, tmp_path, capsys):
    sizes = ["--model.window", "32", "--model.context", "256"]
    assert cli.main([*command, *sizes, *WHOLE]) == cli.DONE, capsys.readouterr().err
    agent = load(tmp_path / "run")
    assert agent.model.config.memory == 32
    corpus = agent.checkpoint.config.corpora[0]
    assert (corpus.start, corpus.prompt, corpus.window) == (1.0, 0.0, 0)
    policy = agent.policy(TASK.id)
    for _ in range(40):  # longer than the window
        action = policy.select_action(np.zeros(5, np.float32))
        assert TASK.action_space.contains(action)
    capsys.readouterr()
    assert cli.main(["eval", str(tmp_path / "run")]) == cli.BAD_INPUT  # there is no such world
    assert "attention: sdpa over the cache on cpu in float32" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--model.window", "512"), "window must be at most context=256"),
        (("--model.window", "32", "--model.context", "64", *WHOLE), "row of 64 tokens"),
        (("--model.window", "32", *WHOLE, "--corpora.0.window", "4"), "leave out the steps"),
    ],
)
def test_what_cannot_be_trained_so_is_a_sentence(command, capsys, tmp_path, more, message):
    assert cli.main([*command, *more]) == cli.BAD_INPUT
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run" / "latest").exists()
