"""How a run ends before its end: losses that are no numbers, full disks, signals."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import pty
import resource
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from run_files import lines, same, state, weights

from gato import cli, quickstart
from gato.checkpoint import load_checkpoint
from gato.fitting import make_serializer
from gato.run_folder import resolve
from gato.stopping import stop_on_signals
from gato.telling import to_nowhere
from gato.train import NonFiniteLossError, Trainer, train

CPU = torch.device("cpu")


@pytest.fixture
def text_model(tiny_text_model) -> bytes:
    return tiny_text_model


@pytest.fixture
def trainer(tiny, tmp_path, text_model) -> Trainer:
    return Trainer(tiny, tmp_path / "run", CPU, make_serializer(tiny, text_model))


# ---- losses that are no numbers ----------------------------------------------------------------


def spoil(trainer: Trainer, corpus: str) -> Any:
    """Return a batch in which a value of `corpus`, made of numbers, is none."""
    batch = trainer.mixture.batch(0)
    at = batch.target_at[batch.target_corpus == trainer.mixture.names.index(corpus)]
    rows = batch.payload["vector"]
    documents = set(batch.document[at].tolist())
    row = next(i for i, t in enumerate(rows["at"]) if int(batch.document[t]) in documents)
    rows["values"][row, 0] = np.inf
    return batch


def test_a_bad_batch_is_kept_with_what_is_wrong_with_it(trainer):
    batch = spoil(trainer, "arm")
    with pytest.raises(NonFiniteLossError) as error:
        trainer.train_step(batch)
    kept = trainer.folder / "bad-batch-00000000"
    assert "the loss of step 0 is nan; look at arm (also in the batch: " in str(error.value)
    assert f"The batch is kept in {kept}; there is no checkpoint." in str(error.value)
    about = json.loads((kept / "about.json").read_text())
    assert (about["step"], about["loss"], about["at_fault"]) == (0, "nan", ["arm"])
    (fault,) = [d for d in about["documents"] if d["value"]]
    assert fault["corpus"] == "arm"
    assert fault["value"].startswith("vector.values at token ")
    assert fault["tokens"][0] <= int(fault["value"].split()[-1]) < fault["tokens"][1]
    assert fault["targets_not_finite"] > 0
    with np.load(kept / "part-0.npz", allow_pickle=False) as arrays:
        assert np.array_equal(arrays["inputs"], batch.inputs)
        values = arrays["payload.vector.values"]
        assert np.array_equal(values, batch.payload["vector"]["values"], equal_nan=True)
        assert len(arrays["nll"]) == len(batch.target_at)


def test_a_bad_batch_can_be_looked_at(tiny, tmp_path, text_model, monkeypatch, capsys):
    train(replace(tiny, steps=1), tmp_path, device="cpu", text_model=text_model)
    trainer = Trainer.resumed(replace(tiny, steps=1), tmp_path, CPU)
    batch = spoil(trainer, "arm")
    with pytest.raises(NonFiniteLossError):
        trainer.train_step(batch)
    kept = str(tmp_path / "bad-batch-00000001")
    about = json.loads(Path(kept, "about.json").read_text())
    index = next(i for i, d in enumerate(about["documents"]) if d["value"])
    assert cli.main(["show", kept, "--index", str(index), "--json"]) == cli.DONE
    tokens = json.loads(capsys.readouterr().out)
    start, stop = about["documents"][index]["tokens"]
    assert [t["id"] for t in tokens] == [None if i < 0 else i for i in batch.inputs[start:stop]]
    assert (tokens[0]["value"], tokens[0]["modality"]) == ("<bos>", "control")
    assert sum(t["target"] for t in tokens) == about["documents"][index]["targets"]
    bad = int(about["documents"][index]["value"].split()[-1]) - start
    assert tokens[bad]["modality"] == "vector"
    assert "Infinity" in json.dumps(tokens[bad])
    assert cli.main(["show", kept, "--index", "999"]) == cli.BAD_INPUT
    assert "documents; got index 999" in capsys.readouterr().err


def test_losses_at_fault_are_named_where_no_value_is(trainer):
    real = trainer.model.batch_nll
    words = trainer.mixture.names.index("words")

    def spoilt(hidden: Any, batch: Any, *options: Any) -> torch.Tensor:
        return real(hidden, batch, *options).where(batch.target_corpus != words, torch.inf)

    trainer.model.batch_nll = spoilt
    with pytest.raises(NonFiniteLossError, match=r"of step 0 is inf; look at words \(also in"):
        trainer.train_step(trainer.mixture.batch(0))


def test_a_gradient_that_is_no_number_stops_before_the_step(trainer):
    before = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    trainer.model.norm.weight.register_hook(lambda gradient: gradient * torch.inf)
    with pytest.raises(NonFiniteLossError, match=r"the gradient's norm of step 0 is (nan|inf)"):
        trainer.train_step(trainer.mixture.batch(0))
    assert same(before, dict(trainer.model.state_dict()))
    assert (trainer.folder / "bad-batch-00000000" / "about.json").exists()
    assert trainer.step == 0


def test_a_run_that_fails_says_why(tiny, tmp_path, text_model, monkeypatch):
    real = Trainer.train_step

    def spoilt(trainer: Trainer, *parts: Any) -> None:
        if trainer.step == 7:
            parts[0].payload["vector"]["values"][:] = np.nan
        real(trainer, *parts)

    monkeypatch.setattr(Trainer, "train_step", spoilt)
    with pytest.raises(NonFiniteLossError, match="the last checkpoint is whole"):
        train(tiny, tmp_path / "run", device="cpu", text_model=text_model)
    found = state(tmp_path / "run")
    assert (found["state"], found["step"]) == ("failed", 7)
    assert "the loss of step 7 is nan" in found["reason"]
    assert load_checkpoint(tmp_path / "run").step == 5
    monkeypatch.undo()  # the data are mended
    train(tiny, tmp_path / "run", device="cpu", text_model=text_model)
    train(tiny, tmp_path / "whole", device="cpu", text_model=text_model)
    assert same(weights(tmp_path / "run"), weights(tmp_path / "whole"))
    assert lines(tmp_path / "run", "losses") == lines(tmp_path / "whole", "losses")


# ---- full disks --------------------------------------------------------------------------------


@contextlib.contextmanager
def disk(size: int) -> Iterator[None]:
    """Let no file grow beyond `size` bytes: what was written before that byte is written."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    ("size", "save_every", "told", "kept"),
    [
        (2_000, 15, r"metrics\.jsonl", 5),  # between two checkpoints, in a line of metrics
        (60_000, 5, "while saving step 10; the one before it is whole", 5),
    ],
)
def test_a_full_disk_loses_nothing(tiny, tmp_path, text_model, size, save_every, told, kept):
    config, run = replace(tiny, save_every=save_every), tmp_path / "run"
    first = Trainer(config, run, CPU, make_serializer(config, text_model))
    real = first.train_step

    def counted(*parts: Any) -> None:
        real(*parts)
        first.stop.reason = "the test" if first.step == 5 else None

    first.train_step = counted
    first.run()
    assert load_checkpoint(run).step == 5
    with disk(size), pytest.raises(OSError, match=told):
        train(config, run, device="cpu", text_model=text_model)
    assert load_checkpoint(run).step == kept
    assert not list(run.glob(".step-*"))
    train(config, run, device="cpu", text_model=text_model)
    train(config, tmp_path / "whole", device="cpu", text_model=text_model)
    assert same(weights(run), weights(tmp_path / "whole"))
    assert lines(run, "losses") == lines(tmp_path / "whole", "losses")
    assert state(run)["state"] == "finished"


# ---- stops -------------------------------------------------------------------------------------


def test_a_second_interrupt_stops_at_once(tiny, tmp_path, text_model):
    long = replace(tiny, steps=100_000, save_every=4)
    real, seen = Trainer.train_step, []
    before = signal.getsignal(signal.SIGINT)

    def slow(trainer: Trainer, *parts: Any) -> None:
        real(trainer, *parts)
        if trainer.step == 6:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)  # the same one, told twice
            seen.append(trainer.stop.reason)
            time.sleep(0.4)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(60)

    Trainer.train_step = slow
    try:
        with pytest.raises(KeyboardInterrupt):
            train(long, tmp_path, device="cpu", text_model=text_model)
    finally:
        Trainer.train_step = real
    assert seen == ["SIGINT"]
    assert load_checkpoint(tmp_path).step == 4
    assert state(tmp_path)["state"] == "stopped"
    assert signal.getsignal(signal.SIGINT) is before


def test_signals_are_the_callers_where_they_cannot_be_ours():
    found = []

    def elsewhere() -> None:
        with stop_on_signals() as stop:
            found.append(stop.reason)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert found == [None]


# ---- the command line --------------------------------------------------------------------------


@pytest.fixture
def command(stores, tmp_path) -> list[str]:
    """Return a command line with something to quote."""
    return [
        *("train", "quickstart", "--out", str(tmp_path / "my run"), "--no-resume"),
        *(
            "--data",
            f"words={stores / 'words'}",
            "--steps",
            "6",
            "--rows",
            "2",
            "--save-every",
            "2",
        ),
        *("--text-pieces", "300", "--model.layers", "1", "--model.context", "64"),
        *("--validation", "0", "--log-every", "1"),
    ]


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, do: Any) -> None:
    real = Trainer.train_step

    def watched(trainer: Trainer, *parts: Any) -> None:
        if trainer.step == step:
            do(trainer, *parts)
        real(trainer, *parts)

    monkeypatch.setattr(Trainer, "train_step", watched)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_command_tells_the_one_to_go_on(
    command, tmp_path, monkeypatch, capfd, number: signal.Signals
):
    at_step(monkeypatch, 3, lambda *_: os.kill(os.getpid(), number))
    assert cli.main(command) == cli.DONE
    said = capfd.readouterr()
    assert f"{number.name}: saving and stopping; Ctrl-C stops at once" in said.err
    saved = tmp_path / "my run" / "step-00000004"
    assert said.out.strip() == str(saved)
    *_, told, again = said.err.strip().splitlines()
    assert told == f"stopped at step 4, saved in {saved}. Go on with:"
    program, *words = shlex.split(again)
    assert program == "gato"
    assert words == [word for word in command if word != "--no-resume"]
    monkeypatch.undo()
    assert cli.main(words) == cli.DONE
    assert resolve(tmp_path / "my run").name == "step-00000006"


def test_a_command_that_is_interrupted_at_once_tells_how_to_go_on(
    command, tmp_path, monkeypatch, capfd
):
    def interrupt(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.4)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)

    at_step(monkeypatch, 3, interrupt)
    assert cli.main(command) == cli.FAILURE
    assert "stopped at once; what was saved before is whole. Go on with: gato train" in (
        capfd.readouterr().err
    )
    assert resolve(tmp_path / "my run").name == "step-00000002"


def test_a_loss_that_is_no_number_is_a_failure_in_one_sentence(command, monkeypatch, capfd):
    def spoilt(trainer: Trainer, *parts: Any) -> None:
        with torch.no_grad():
            trainer.model.norm.weight[0] = torch.nan

    at_step(monkeypatch, 3, spoilt)
    assert cli.main(command) == cli.FAILURE
    assert "\ngato: the loss of step 3 is nan; look at words. The batch is kept in" in (
        capfd.readouterr().err
    )


def test_a_full_disk_is_a_failure_in_one_sentence(command, tmp_path, monkeypatch, capfd):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    at_step(monkeypatch, 3, lambda *_: resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, hard)))
    try:
        assert cli.main(command) == cli.FAILURE
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    last = capfd.readouterr().err.strip().splitlines()[-1]
    told = "gato: File too large while saving step 4; the one before it is whole: "
    assert last == told + str(tmp_path / "my run")
    assert resolve(tmp_path / "my run").name == "step-00000002"


# ---- nobody reads any more ---------------------------------------------------------------------


def started(words: list[str], **pipes: Any) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-m", "gato.cli", *words], **pipes)


def wait_for_step(run: Path, step: int) -> None:
    log, until = run / "metrics.jsonl", time.monotonic() + 60
    while not (log.exists() and f'"step": {step},' in log.read_text()):
        assert time.monotonic() < until
        time.sleep(0.05)


@pytest.mark.parametrize("terminal", [False, True])
def test_ctrl_c_that_ends_tee_too_saves(command, tmp_path, terminal):
    words = [word if word != "6" else "100000" for word in command]
    words[words.index("--save-every") + 1] = "100000"
    ours, theirs = pty.openpty() if terminal else os.pipe()
    child = started(words, stdout=theirs, stderr=theirs)
    os.close(theirs)
    wait_for_step(tmp_path / "my run", 3)
    os.close(ours)  # tee is gone
    child.send_signal(signal.SIGINT)
    assert child.wait(60) == cli.DONE
    assert state(tmp_path / "my run")["state"] == "stopped"
    assert load_checkpoint(tmp_path / "my run").step >= 3


@contextlib.contextmanager
def unread() -> Iterator[Any]:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w", buffering=1) as stream:
        yield stream
        to_nowhere(stream)  # closing it writes what is pending


def test_training_goes_on_when_nobody_reads(command, tmp_path, monkeypatch):
    with unread() as out, unread() as err:
        monkeypatch.setattr("sys.stdout", out)
        monkeypatch.setattr("sys.stderr", err)
        assert cli.main(command) == cli.DONE
    assert state(tmp_path / "my run")["state"] == "finished"
    assert resolve(tmp_path / "my run").name == "step-00000006"


def test_quickstart_goes_on_when_nobody_reads(tmp_path, monkeypatch):
    told = []

    def run(self: quickstart.Quickstart) -> dict[str, Any]:
        self.say("training")
        told.append("and on")
        return {}

    monkeypatch.setattr(quickstart.Quickstart, "run", run)
    monkeypatch.setattr("gato.report.show", lambda result, console: None)
    with unread() as out:
        monkeypatch.setattr("sys.stdout", out)
        quickstart.run(tmp_path / "quick", 1.0, 0)
    assert told == ["and on"]


def test_a_broken_pipe_is_a_good_end_only_where_the_output_s_reader_is_gone(monkeypatch, capfd):
    def broken(chosen: Any) -> None:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr("gato.cli._late", lambda name: broken)
    assert cli.main(["tasks"]) == cli.FAILURE
    assert "gato: Broken pipe" in capfd.readouterr().err
    with unread() as out:
        monkeypatch.setattr("sys.stdout", out)
        assert cli.main(["train", "quickstart"]) == cli.FAILURE
        assert cli.main(["tasks"]) == cli.DONE


@pytest.mark.parametrize("asked", ["--fields", "--parameters", "--dry-run"])
def test_a_reader_who_has_seen_enough_of_what_trains_nothing_ends_it_well(
    asked, command, monkeypatch, capfd
):
    with unread() as out:
        monkeypatch.setattr("sys.stdout", out)
        assert cli.main([*command, asked]) == cli.DONE
    assert not capfd.readouterr().err


@pytest.mark.parametrize("watching", [True, False])
def test_a_stop_before_the_first_step_saves_and_stops(tiny, tmp_path, text_model, watching):
    def watchers() -> list[Any]:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(30)
        raise AssertionError("the signal interrupts what asks from afar")

    def hook(event: str, arguments: Any) -> None:
        nonlocal armed
        if armed and event == "os.mkdir" and str(arguments[0]) == str(tmp_path / "run"):
            armed = False
            os.kill(os.getpid(), signal.SIGTERM)

    armed = not watching
    sys.addaudithook(hook)
    options = {"watchers": watchers} if watching else {}
    saved = train(tiny, tmp_path / "run", device="cpu", text_model=text_model, **options)
    assert saved.name == "step-00000000"
    assert state(tmp_path / "run")["state"] == "stopped"
    assert train(tiny, tmp_path / "run", device="cpu").name == f"step-{tiny.steps:08d}"
