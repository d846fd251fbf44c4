"""A look at a task: what its episode looks like after some steps, in a process of its own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from gato import cli
from gato.envs import gym as gym_suite
from gato.envs import registry
from gato.envs.workers import Pool, WorkerDiedError
from gato.rollouts.hosts import Reply
from gato.rollouts.look import look
from gato.rollouts.stage import Scene


@pytest.mark.sim
def test_a_game_is_seen_as_the_model_sees_it() -> None:
    task, seed = "atari/Boxing-v5", 3
    seen = look(task, 4, seed, lambda observation: 0)
    env = registry.make(task)
    frame, _ = env.reset(seed=seed)
    for _ in range(4):
        frame, *_ = env.step(0)
    env.close()
    assert np.array_equal(seen.picture, frame)
    assert seen.steps == 4


@pytest.mark.sim
def test_what_is_observed_in_numbers_is_drawn() -> None:
    task = "babyai/GoToRedBallGrey-v0"
    first, later = look(task, 0, 1), look(task, 200, 1, "expert")
    assert first.picture.dtype == np.uint8
    assert first.picture.shape[2] == 3
    assert first.words == "go to the red ball"
    assert 0 < later.steps < 200, "the expert gets there, and the episode ends"
    assert not np.array_equal(first.picture, later.picture)


def test_only_tasks_of_the_registry_are_started() -> None:
    with pytest.raises(ValueError, match=r"closest: atari/Pong-v5"):
        look("atari/Pon-v5")
    for task in ("gym/os:system", "gym/antigravity:Flight-v0"):
        with pytest.raises(ValueError, match="names a module"):
            look(task)
    with pytest.raises(ValueError, match="got 'gym/Nope-v0'"):
        look("gym/Nope-v0")


def test_a_module_that_was_imported_is_known_to_the_process_that_plays(
    tmp_path, monkeypatch, capsys
) -> None:
    # a name of its own: what is imported stays registered in this process
    world = Path(__file__).with_name("watched.py").read_text()
    (tmp_path / "looked_at.py").write_text(world.replace("Watched", "LookedAt"))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(gym_suite, "_modules", {})
    for command in ("serve", "chat"):
        assert cli.main([command, "/nowhere", "--import", "looked_at"]) == cli.BAD_INPUT
        assert "no such folder" in capsys.readouterr().err
    with pytest.raises(ValueError, match="names a module"):
        look("gym/looked_at:LookedAtDrawn-v0")
    assert look("gym/LookedAtDrawn-v0", 2).steps == 2


def test_what_cannot_be_seen_or_fails_is_said(monkeypatch) -> None:
    scenes = [Scene(Reply(0, np.zeros(3)), fault="it has no window")]
    monkeypatch.setattr(Pool, "send", lambda *_: None)
    monkeypatch.setattr(Pool, "receive", lambda *_: [(0, scenes[0])])
    with pytest.raises(
        ValueError, match=r"of 'gym/Blackjack-v1' nothing can be \(it has no window"
    ):
        look("gym/Blackjack-v1")
    scenes[0] = Scene(Reply(0, ended=True, error="Traceback\n  x\nKeyError: 'lost'"))
    with pytest.raises(RuntimeError, match="the simulator failed: KeyError: 'lost'"):
        look("gym/Blackjack-v1")
    scenes[0] = WorkerDiedError("exit code 9", 1)
    with pytest.raises(RuntimeError, match="process ended: exit code 9"):
        look("gym/Blackjack-v1")
