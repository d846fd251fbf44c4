"""`gato train` settles what is held out, reports to whom, and what is played, before it trains."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from gymnasium import spaces
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gato import cli, presets
from gato.config import TrainConfig
from gato.corpora import CorpusConfig
from gato.envs.episode import TaskSpec
from gato.envs.files import lock_folder
from gato.preparation import judged_by_returns, validated
from gato.run_log import Clock
from gato.train import train

ARM = TaskSpec(
    id="toy/arm-v0",
    observation_space=spaces.Box(-np.inf, np.inf, (5,), np.float32),
    action_space=spaces.Box(-1, 1, (2,), np.float32),
    max_steps=30,
    control_hz=10.0,
)


@pytest.fixture
def known(tiny: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> TrainConfig:
    """Return the tiny run, a preset of the command line."""
    config = replace(tiny, steps=4, save_every=2, corpora=tiny.corpora[:1] + tiny.corpora[2:3])
    monkeypatch.setitem(presets.PRESETS, "tiny", lambda: config)
    return config


def arguments(config: TrainConfig, out: Path, *more: str) -> list[str]:
    data = [f"{c.name}={c.path}" for c in config.corpora]
    return ["train", "tiny", "--data", *data, "--out", str(out), *more]


def lines(run: Path, kind: str) -> list[dict]:
    every = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in every if kind in line]


def saved(run: Path) -> dict:
    found = json.loads((run / (run / "latest").read_text() / "config.json").read_text())
    return found["train"]


def test_a_share_is_held_out_measured_shown_and_drawn(known, tmp_path, capsys):
    run = tmp_path / "run"
    assert cli.main(arguments(known, run, "--validation", "0.1")) == cli.DONE
    assert [c["validation"] for c in saved(run)["corpora"]] == [0.1, 0.1]
    measured = lines(run, "validation")
    assert [line["step"] for line in measured] == [2, 4]  # with every checkpoint
    said = capsys.readouterr().err
    for line in measured:
        for name, row in line["validation"].items():
            assert f"{name} {row['loss']:.3f} (perplexity {row['perplexity']:.4g})" in said
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    drawn = {e.step: e.value for e in events.Scalars("validation/words/loss")}
    assert drawn == {
        line["step"]: pytest.approx(line["validation"]["words"]["loss"]) for line in measured
    }
    assert [e.step for e in events.Scalars("losses/arm")] == [1, 2, 3, 4]
    assert cli.main(["runs", str(tmp_path), "--json"]) == cli.DONE
    (found,) = json.loads(capsys.readouterr().out)
    best = min(measured, key=lambda line: line["validation_loss"])
    assert (found["state"], found["step"]) == ("finished", 4)
    assert found["best_validation"] == {"step": best["step"], "loss": best["validation_loss"]}


def test_the_best_is_kept_by_what_the_command_line_holds_out(known, tmp_path, capsys):
    run = tmp_path / "run"
    command = arguments(known, run, "--keep-best", "--validation")
    assert cli.main([*command, "0.1"]) == cli.DONE
    assert (saved(run)["keep_best"], saved(run)["validate_every"]) == (True, 2)
    best = min(lines(run, "validation"), key=lambda line: line["validation_loss"])
    assert (run / "best").read_text() == f"step-{best['step']:08d}"
    capsys.readouterr()
    command[command.index(str(run))] = str(tmp_path / "other")
    assert cli.main([*command, "0"]) == cli.BAD_INPUT
    assert "keep_best needs something to be best at" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_small_corpora_are_left_whole_and_told(known):
    config, notes = validated(known, 0.02, None)  # 20 episodes and 40 records
    held = {c.name: c.validation for c in config.corpora}
    told = [name for name in held if any(f"corpus {name!r} is too small" in n for n in notes)]
    assert told == [name for name, share in held.items() if share == 0]
    assert set(held.values()) <= {0.0, 0.02}
    assert told  # one of 20 episodes is rarely in the 50th part
    own = replace(known, corpora=(replace(known.corpora[0], validation=0.3), known.corpora[1]))
    config, notes = validated(own, 0.0, None)
    assert [c.validation for c in config.corpora] == [0.3, 0.0]
    assert config.validate_every == known.save_every
    assert notes == []
    config, _ = validated(known, 0.0, None)
    assert config == known


def test_a_run_goes_on_with_what_it_held_out(known, tmp_path):
    begun = replace(
        known,
        corpora=(known.corpora[0], replace(known.corpora[1], validation=0.1)),
        validate_every=3,
        steps=2,
    )
    train(begun, tmp_path / "run", device="cpu")
    assert validated(replace(known, steps=2), None, tmp_path / "run")[0] == begun
    old = replace(known, steps=2)  # begun without validation: it goes on without
    train(old, tmp_path / "old", device="cpu")
    assert validated(old, None, tmp_path / "old") == (old, [])


@pytest.mark.parametrize("share", ["1", "-0.1", "nan", "much"])
def test_a_share_that_is_none_is_refused(share, capsys):
    assert cli.main(["train", "tiny", "--validation", share]) == cli.BAD_INPUT
    assert "expected a share, 0 or more and below 1" in capsys.readouterr().err


def test_wandb_that_is_missing_is_told_before_training(known, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    run = tmp_path / "run"
    assert cli.main(arguments(known, run, "--wandb", "project")) == cli.BAD_INPUT
    assert 'pip install "gato[wandb]"' in capsys.readouterr().err
    assert not run.exists()


def test_a_run_that_is_being_trained_is_reported_by_one(known, tmp_path, capsys, monkeypatch):
    run, opened = tmp_path / "run", []
    monkeypatch.setattr("gato.monitor.open_watchers", lambda *a, **k: opened.append(a) or [])
    run.mkdir()
    held = lock_folder(run, wait=False)
    try:
        assert cli.main(arguments(known, run)) == cli.BAD_INPUT
    finally:
        os.close(held)
    assert "is being written by another process" in capsys.readouterr().err
    assert opened == []
    assert cli.main(arguments(known, run)) == cli.DONE
    assert len(opened) == 1


def test_tasks_to_play_must_be_trained_on(known, tmp_path, capsys):
    more = ("--eval-every", "2", "--eval-tasks", "babyai/*")
    assert cli.main(arguments(known, tmp_path / "run", *more)) == cli.BAD_INPUT
    assert "'babyai/*' matches none" in capsys.readouterr().err
    assert cli.main(arguments(known, tmp_path / "run", "--eval-every", "2")) == cli.BAD_INPUT
    assert "eval_tasks and eval_every go together" in capsys.readouterr().err


def test_a_pattern_that_no_task_of_the_run_matches_names_those_it_has(known, tmp_path, capsys):
    more = ["--eval-every", "2", "--eval-tasks", "babyai/*"]
    command = arguments(known, tmp_path / "run", *more)
    assert cli.main(command) == cli.BAD_INPUT
    said = capsys.readouterr().err
    assert "'babyai/*' matches none of them: its tasks are toy/arm-v0." in said
    command[3] = command[4]  # words alone
    del command[4]
    assert cli.main(command) == cli.BAD_INPUT
    assert "'babyai/*' matches none of them: it has no tasks." in capsys.readouterr().err


def test_tasks_without_scores_to_compare_with_are_told_where_the_best_is_kept(known, monkeypatch):
    scores = {"random_score": 1.0, "expert_score": 9.0}
    specs = {
        spec.id: spec
        for spec in (
            replace(ARM, id="a", **scores),
            replace(ARM, id="b"),
            replace(ARM, id="c", measure="success"),
            replace(ARM, id="d", random_score=1.0, expert_score=1.0),
        )
    }
    monkeypatch.setattr("gato.envs.registry.spec", specs.__getitem__)
    played = {"eval_every": 1, "keep_best": True}
    (note,) = judged_by_returns(replace(known, eval_tasks=("a", "b", "c", "d"), **played))
    assert "mean scores of 4 tasks; of b, d no scores of chance and expert are known" in note
    for tasks in (("a", "c"), ("b",)):
        assert judged_by_returns(replace(known, eval_tasks=tasks, **played)) == []
    apart = replace(known, eval_tasks=("a", "b"), **{**played, "keep_best": False})
    assert judged_by_returns(apart) == []


def test_a_corpus_with_a_name_of_its_own(tmp_path, known):
    """A run that goes on keeps the split of corpora it knows, and none for one it does not."""
    train(replace(known, steps=1), tmp_path / "run", device="cpu")
    more = CorpusConfig("more", known.corpora[1].path)
    config, _ = validated(replace(known, corpora=(*known.corpora, more)), None, tmp_path / "run")
    assert config.corpora[-1].validation == 0


def test_measuring_is_no_part_of_the_pace(monkeypatch):
    """Tokens a second are those of training; what is left takes measuring in."""
    now = [0.0]
    monkeypatch.setattr("gato.run_log.time", SimpleNamespace(perf_counter=lambda: now[0]))
    clock = Clock(0)
    now[0] = 10.0  # five steps of two seconds
    assert clock.lap(5) == (5, 10.0, 0.0)
    with clock.apart():
        now[0] = 110.0
    with clock.waiting():
        now[0] = 113.0
    now[0] = 120.0
    assert clock.lap(10) == (5, 10.0, 3.0)
    assert clock.seconds_left(10, 20) == 120.0
