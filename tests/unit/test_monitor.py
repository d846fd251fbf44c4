"""Watchers draw every step once, whatever interrupted the run, and never end it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gato.config import TrainConfig, to_json
from gato.monitor import TensorBoard, WandB, Watchers, numbers, open_watchers
from gato.train import train


def line(step: int, loss: float) -> dict[str, Any]:
    return {
        "step": step,
        "losses": {"arm": loss, "words": 2 * loss},
        "lr": 0.01,
        "time": 1000.0 + step,
    }


def curves(run: Path) -> dict[str, list[tuple[int, float, float]]]:
    """Return the (step, value, time) of each curve as TensorBoard itself reads them."""
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return {
        tag: [(e.step, e.value, e.wall_time) for e in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def test_tensorboard_draws_every_number_of_every_line(tmp_path):
    board = TensorBoard(tmp_path)
    board.event("start", step=0, steps=4)
    for step in (2, 4):
        board.metrics(line(step, 1.0 / step))
    board.metrics(
        {
            "step": 4,
            "validation": {"arm": {"loss": 3.0, "by_modality": {"continuous": {"loss": 1.5}}}},
            "validation_loss": 3.0,
            "time": 1005.0,
        }
    )
    board.metrics({"step": 4, "evaluation": {"toy/arm-v0": 0.75}, "time": 1006.0})
    board.close()
    assert curves(tmp_path) == {
        "losses/arm": [(2, 0.5, 1002.0), (4, 0.25, 1004.0)],
        "losses/words": [(2, 1.0, 1002.0), (4, 0.5, 1004.0)],
        "run/lr": [(s, pytest.approx(0.01), 1000.0 + s) for s in (2, 4)],
        "validation/arm/loss": [(4, 3.0, 1005.0)],
        "validation/arm/by_modality/continuous/loss": [(4, 1.5, 1005.0)],
        "run/validation_loss": [(4, 3.0, 1005.0)],
        "evaluation/toy/arm-v0": [(4, 0.75, 1006.0)],
    }


def test_a_run_that_goes_on_draws_every_step_once(tmp_path):
    first = TensorBoard(tmp_path)
    first.event("start", step=0, steps=9)
    for step in range(1, 8):
        first.metrics(line(step, 1.0))  # never closed: the process was killed
    second = TensorBoard(tmp_path)
    second.event("start", step=4, steps=9)
    second.metrics(line(5, 2.0))  # killed again
    third = TensorBoard(tmp_path)
    third.event("start", step=4, steps=9)
    for step in range(5, 10):
        third.metrics(line(step, 3.0))
    third.close()
    drawn = [(step, value) for step, value, _ in curves(tmp_path)["losses/arm"]]
    assert drawn == [(s, 1.0) for s in range(1, 5)] + [(s, 3.0) for s in range(5, 10)]


@pytest.mark.parametrize("ahead", [0, 3600])
def test_the_clock_does_not_decide_which_file_goes_on(tmp_path, ahead):
    """Two processes begin within a second, or the clock is set back between them."""
    for steps in (range(1, 6), range(3, 8), range(5, 10)):
        board = TensorBoard(tmp_path)
        board.event("start", step=steps[0] - 1, steps=9)
        for step in steps:
            board.metrics(line(step, float(steps[0])))
        board.close()
        for file in (tmp_path / "tensorboard").iterdir():
            *first, second, rest = file.name.split(".", 4)
            if "zzz" not in rest:  # as of a host or a process that sorts last
                name = ".".join([*first, f"{int(second) + ahead:010d}", f"zzz{9 - steps[0]}"])
                file.rename(file.with_name(name))
    drawn = [(step, value) for step, value, _ in curves(tmp_path)["losses/arm"]]
    assert drawn == [(s, {1: 1.0, 2: 1.0, 3: 3.0, 4: 3.0}.get(s, 5.0)) for s in range(1, 10)]


def test_a_run_that_does_nothing_more_writes_no_file(tmp_path):
    board = TensorBoard(tmp_path)
    board.event("start", step=9, steps=9)
    board.close()
    assert not (tmp_path / "tensorboard").exists()


def test_numbers_are_named_by_where_they_stand():
    given = {"step": 1, "time": 2.0, "a": 3, "b": {"c": 4.0, "d": {"e": 5}, "f": None, "g": "h"}}
    assert dict(numbers(given)) == {"run/a": 3.0, "b/c": 4.0, "b/d/e": 5.0}
    assert dict(numbers({"step": 1, "whole": True})) == {}


class Recorder:
    """A watcher that remembers, and fails at a step if it is told to."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.told: list[Any] = []
        self.fails_at = fails_at

    def metrics(self, line: dict[str, Any]) -> None:
        if line["step"] == self.fails_at:
            raise OSError(28, "No space left on device")
        self.told.append(line["step"])

    def event(self, kind: str, **facts: Any) -> None:
        self.told.append((kind, facts))

    def close(self) -> None:
        self.told.append("close")


def test_a_watcher_that_fails_is_told_of_and_left_out():
    good, bad, said = Recorder(), Recorder(fails_at=2), []
    watchers = Watchers([bad, good], said.append)
    watchers.event("start", step=0, steps=3)
    for step in (1, 2, 3):
        watchers.metrics(line(step, 1.0))
    watchers.close()
    assert good.told == [("start", {"step": 0, "steps": 3}), 1, 2, 3, "close"]
    assert bad.told == [("start", {"step": 0, "steps": 3}), 1]
    (told,) = said
    assert told.startswith("Recorder stops watching (OSError: [Errno 28] No space left")


def test_without_tensorboard_one_line_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    said: list[str] = []
    assert open_watchers(tmp_path, {}, say=said.append) == []
    assert len(said) == 1
    assert 'pip install "gato[monitor]"' in said[0]


def test_without_wandb_an_error_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r'pip install "gato\[wandb\]"'):
        open_watchers(tmp_path, {}, wandb="project")


class FakeRun:
    def __init__(self, **options: Any) -> None:
        self.options, self.logged, self.summary, self.finished = options, [], {}, False

    def log(self, values: dict[str, float], step: int) -> None:
        self.logged.append((step, values))

    def finish(self) -> None:
        self.finished = True


@pytest.fixture
def wandb(monkeypatch) -> types.ModuleType:
    """Return a module that stands where W&B's would."""
    module = types.ModuleType("wandb")
    module.init = FakeRun
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_wandb_is_told_all_and_goes_on_with_the_same_run(tmp_path, wandb):
    run = tmp_path / "mine"
    first = WandB(run, "project", {"rows": 4})
    first.metrics(line(1, 0.5))
    first.event("end", step=1, state="stopped", reason="SIGTERM")
    first.close()
    told = first._run
    assert told.logged == [(1, {"losses/arm": 0.5, "losses/words": 1.0, "run/lr": 0.01})]
    assert told.options["project"] == "project"
    assert told.options["config"] == {"rows": 4}
    assert (told.options["name"], told.options["dir"]) == ("mine", str(run))
    assert told.summary == {"state": "stopped"}
    assert told.finished
    second = WandB(run, "project", {})
    assert second._run.options["id"] == told.options["id"]
    assert second._run.options["resume"] == "allow"
    with pytest.raises(ValueError, match="expected --wandb project, the project that"):
        WandB(run, "other", {})
    assert WandB(run, "other", {}, anew=True)._run.options["id"] != told.options["id"]
    assert WandB(tmp_path / "other", "other", {})._run.options["id"] != told.options["id"]


def test_wandb_that_cannot_begin_is_told_before_training(tmp_path, wandb):
    def refuse(**options: Any) -> None:
        raise RuntimeError("api_key not configured (no-tty)")

    wandb.init = refuse
    with pytest.raises(ValueError, match=r"api_key not configured.*wandb login"):
        WandB(tmp_path / "mine", "project", {})
    assert not (tmp_path / "mine" / "wandb.json").exists()


def test_what_wandb_remembers_is_json(tmp_path, wandb):
    WandB(tmp_path, "project", {})
    assert json.loads((tmp_path / "wandb.json").read_text()).keys() == {"project", "id"}


KILLED = """
import json, os, pathlib, signal, sys
from gato.config import TrainConfig, from_json
from gato.monitor import open_watchers
from gato.train import train

class Killer:
    def metrics(self, line):
        if line["step"] == 8:
            os.kill(os.getpid(), signal.SIGKILL)
    def event(self, kind, **facts): pass
    def close(self): pass

run = pathlib.Path(sys.argv[1])
config = from_json(TrainConfig, json.loads(sys.argv[2]))
train(config, run, device="cpu", watchers=[*open_watchers(run, {}), Killer()])
"""


def test_the_curves_of_a_killed_run_are_those_of_its_log(tiny: TrainConfig, tmp_path):
    held = tuple(replace(c, validation=0.2) for c in tiny.corpora[:1])
    config = replace(tiny, steps=10, corpora=held, validate_every=2, validate_batches=1)
    words = [sys.executable, "-c", KILLED, str(tmp_path), json.dumps(to_json(config))]
    assert subprocess.run(words).returncode == -signal.SIGKILL
    assert max(step for step, _, _ in curves(tmp_path)["losses/arm"]) == 8
    train(config, tmp_path, device="cpu", watchers=open_watchers(tmp_path, {}))  # from step 5 on
    lines = [json.loads(text) for text in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    expected: dict[str, list] = {}
    for row in lines:
        for name, value in numbers(row):
            expected.setdefault(name, []).append((row["step"], pytest.approx(value), row["time"]))
    drawn = curves(tmp_path)
    assert drawn == expected
    assert [step for step, _, _ in drawn["losses/arm"]] == list(range(1, 11))
    assert [step for step, _, _ in drawn["validation/arm/loss"]] == [2, 4, 6, 8, 10]
