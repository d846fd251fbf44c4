"""What a run keeps and tells: best and averaged weights, parts, bad batches, full disks, stops."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shlex
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gato import cli
from gato.checkpoint import load_checkpoint, load_tensors, pointed_at, resolve
from gato.envs.files import lock_folder
from gato.fitting import make_serializer
from gato.optim import Average
from gato.stopping import stop_on_signals
from gato.tokenizers.text import MODEL_FILE
from gato.train import NonFiniteLossError, Trainer, train

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("run")


@pytest.fixture
def text_model(folder: Path, tiny) -> bytes:
    """Return the text model of all runs here, trained once."""
    path = folder / "text.model"
    if not path.exists():
        path.write_bytes(make_serializer(tiny).state()["text"][MODEL_FILE])
    return path.read_bytes()


@pytest.fixture
def trainer(tiny, tmp_path, text_model) -> Trainer:
    return Trainer(tiny, tmp_path / "run", CPU, make_serializer(tiny, text_model))


def lines(run: Path, kind: str) -> dict[int, Any]:
    """Return what the log says of a kind, by step; every step once."""
    read = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = [(line["step"], line[kind]) for line in read if kind in line]
    assert len(dict(found)) == len(found)
    return dict(found)


def state(run: Path) -> dict[str, Any]:
    return json.loads((run / "state.json").read_text())


def checkpoints(run: Path) -> list[int]:
    return sorted(int(p.name.removeprefix("step-")) for p in run.glob("step-*"))


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_tensors(resolve(run) / "model.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# ---- parts -------------------------------------------------------------------------------------


def test_gradients_of_parts_add_up_to_those_of_the_batch(tiny, tmp_path, text_model):
    config = replace(tiny, parts=2)
    parted, whole = (
        Trainer(config, tmp_path, CPU, make_serializer(config, text_model)) for _ in range(2)
    )
    for each in (parted, whole):
        each.model.eval()  # where patches lie is drawn anew for every part
    for k in range(3):
        for part in range(2):
            parted._backward(part, parted.mixture.part(k, part))
        whole._backward(0, whole.mixture.batch(k))
    for name, p in parted.model.named_parameters():
        other = whole.model.get_parameter(name).grad
        torch.testing.assert_close(p.grad, other, rtol=1e-4, atol=1e-6)


def test_parts_must_divide_rows(tiny):
    with pytest.raises(ValueError, match="rows must be a multiple of parts; got 4 rows in 3"):
        replace(tiny, parts=3)


# ---- averaged weights --------------------------------------------------------------------------


def test_the_average_is_that_of_plain_arithmetic():
    model = torch.nn.Linear(2, 1)
    average = Average(model, 0.5)
    expected = model.weight.detach().double().clone()
    for step in range(8):
        with torch.no_grad():
            model.weight += step
        average.update(step)
        kept = min(0.5, (1 + step) / (10 + step))
        expected = kept * expected + (1 - kept) * model.weight.detach().double()
    torch.testing.assert_close(average.values["weight"].double(), expected, rtol=1e-6, atol=1e-6)
    trained = model.weight.detach().clone()
    with average.in_place():
        assert torch.equal(model.weight, average.values["weight"])
    assert torch.equal(model.weight, trained)


def test_a_checkpoint_gives_the_averaged_weights_unless_told(tiny, tmp_path, text_model):
    config = replace(tiny, steps=4, ema=0.9)
    train(config, tmp_path / "run", device="cpu", text_model=text_model)
    train(replace(tiny, steps=4), tmp_path / "plain", device="cpu", text_model=text_model)
    assert same(weights(tmp_path / "run"), weights(tmp_path / "plain"))  # nothing but an average
    averaged = load_checkpoint(tmp_path / "run")
    trained = load_checkpoint(tmp_path / "run", averaged=False)
    assert (averaged.averaged, trained.averaged) == (True, False)
    kept = load_tensors(resolve(tmp_path / "run") / "ema.safetensors")
    assert same(dict(averaged.model.state_dict()), kept)
    assert same(dict(trained.model.state_dict()), weights(tmp_path / "run"))
    assert not same(kept, weights(tmp_path / "run"))
    assert not load_checkpoint(tmp_path / "plain").averaged


def test_a_checkpoint_without_its_average_is_refused(tiny, tmp_path, text_model):
    train(replace(tiny, steps=1, ema=0.9), tmp_path, device="cpu", text_model=text_model)
    (resolve(tmp_path) / "ema.safetensors").unlink()
    with pytest.raises(ValueError, match=r"ema\.safetensors is damaged"):
        load_checkpoint(tmp_path)


def test_checkpoints_from_before_there_were_these_options_go_on(tiny, tmp_path, text_model):
    train(tiny, tmp_path / "whole", device="cpu", text_model=text_model)
    half, old = Trainer(tiny, tmp_path / "old", CPU, make_serializer(tiny, text_model)), None
    for k in range(5):
        half.train_step(half.mixture.batch(k))
    half.save()
    old = resolve(tmp_path / "old") / "config.json"
    described = json.loads(old.read_text())
    for name in ("parts", "ema", "keep_last", "keep_best", "validate_every", "eval_tasks"):
        del described["train"][name]
    old.write_text(json.dumps(described))
    train(tiny, tmp_path / "old", device="cpu", text_model=text_model)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "old"))


# ---- which checkpoints are kept ----------------------------------------------------------------


def evaluated(tiny: Any, **changes: Any) -> Any:
    return replace(
        tiny, steps=12, save_every=100, eval_tasks=("toy/arm-v0",), eval_every=2, **changes
    )


def score(path: Path) -> dict[str, float]:
    """Return a score that is best at step 4."""
    return {"toy/arm-v0": -abs(int(path.name.removeprefix("step-")) - 4)}


def test_the_best_and_the_last_are_kept(tiny, tmp_path, text_model):
    config = evaluated(tiny, keep_best=True, keep_last=1)
    train(config, tmp_path, device="cpu", text_model=text_model, evaluate=score)
    assert list(lines(tmp_path, "evaluation")) == [2, 4, 6, 8, 10, 12]
    assert checkpoints(tmp_path) == [4, 12]
    assert load_checkpoint(tmp_path / "best").step == 4
    assert load_checkpoint(tmp_path / "latest").step == load_checkpoint(tmp_path).step == 12


@pytest.mark.parametrize("keep_last", [1, 3])
def test_the_newest_are_kept(tiny, tmp_path, text_model, keep_last):
    config = replace(tiny, steps=10, save_every=2, keep_last=keep_last)
    train(config, tmp_path, device="cpu", text_model=text_model)
    assert checkpoints(tmp_path) == [10, 8, 6][:keep_last][::-1]
    assert not (tmp_path / "best").exists()


def test_the_best_by_validation_is_saved_when_it_is_found(tiny, tmp_path, text_model):
    corpora = tuple(replace(c, validation=0.2) for c in tiny.corpora)
    config = replace(
        tiny, corpora=corpora, steps=12, save_every=100, validate_every=3, keep_best=True
    )
    train(config, tmp_path, device="cpu", text_model=text_model)
    found = lines(tmp_path, "validation_loss")
    assert list(found) == [3, 6, 9, 12]
    best = min(found, key=found.__getitem__)
    assert pointed_at(tmp_path, "best") == f"step-{best:08d}"
    assert {best, 12} <= set(checkpoints(tmp_path))


def test_the_best_needs_a_measure(tiny):
    with pytest.raises(ValueError, match="keep_best needs something to be best at"):
        replace(tiny, keep_best=True)


def test_an_evaluation_that_was_cut_off_is_done_again(tiny, tmp_path, text_model):
    config, cuts = evaluated(tiny, keep_best=True), []

    def cut(path: Path) -> dict[str, float]:
        if path.name.endswith("4") and not cuts:
            cuts.append(path)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        return score(path)

    options = {"device": "cpu", "text_model": text_model, "evaluate": cut}
    saved = train(config, tmp_path / "cut", **options)
    assert saved.name == "step-00000004"
    assert state(tmp_path / "cut")["state"] == "stopped"
    assert list(lines(tmp_path / "cut", "evaluation")) == [2]
    train(config, tmp_path / "cut", **options)
    train(config, tmp_path / "whole", device="cpu", text_model=text_model, evaluate=score)
    assert lines(tmp_path / "cut", "evaluation") == lines(tmp_path / "whole", "evaluation")
    assert lines(tmp_path / "cut", "losses") == lines(tmp_path / "whole", "losses")
    assert same(weights(tmp_path / "cut"), weights(tmp_path / "whole"))
    assert pointed_at(tmp_path / "cut", "best") == "step-00000004"


def test_an_evaluation_needs_someone_who_plays(tiny, tmp_path):
    with pytest.raises(ValueError, match="eval_every needs an `evaluate`"):
        train(evaluated(tiny), tmp_path / "run")
    assert not (tmp_path / "run").exists()


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
    real = trainer.model.loss
    words = trainer.mixture.names.index("words")

    def spoilt(batch: Any, **options: Any) -> torch.Tensor:
        return real(batch, **options).where(batch.target_corpus != words, torch.inf)

    trainer.model.loss = spoilt
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


# ---- stops, locks and other runs in the folder -------------------------------------------------


def test_a_second_interrupt_stops_at_once(tiny, tmp_path, text_model):
    long = replace(tiny, steps=100_000, save_every=4)
    real, seen = Trainer.train_step, []

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
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_signals_are_the_callers_where_they_cannot_be_ours():
    found = []

    def elsewhere() -> None:
        with stop_on_signals() as stop:
            found.append(stop.reason)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert found == [None]


def test_a_folder_has_one_run_at_a_time(tiny, tmp_path, text_model):
    held = lock_folder(tmp_path, wait=False)
    try:
        with pytest.raises(ValueError, match="is being written by another process"):
            train(tiny, tmp_path, device="cpu", text_model=text_model)
    finally:
        os.close(held)
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_starts_anew_sets_the_old_one_aside(tiny, tmp_path, text_model):
    options = {"device": "cpu", "text_model": text_model}
    train(replace(tiny, steps=3), tmp_path, **options)
    old = weights(tmp_path)
    train(replace(tiny, steps=2, seed=8), tmp_path, resume=False, **options)
    assert load_checkpoint(tmp_path).step == 2
    assert same(weights(tmp_path / "earlier-1"), old)
    assert list(lines(tmp_path, "losses")) == [1, 2]
    assert list(lines(tmp_path / "earlier-1", "losses")) == [1, 2, 3]
    train(replace(tiny, steps=1), tmp_path, resume=False, **options)
    assert load_checkpoint(tmp_path / "earlier-2").step == 2


def test_another_configuration_is_named(tiny, tmp_path, text_model):
    train(replace(tiny, steps=1), tmp_path, device="cpu", text_model=text_model)
    with pytest.raises(ValueError, match="another configuration: steps was 1, is 2; seed was 3"):
        train(replace(tiny, steps=2, seed=4), tmp_path, device="cpu", text_model=text_model)
    assert state(tmp_path)["state"] == "finished"  # as it was


def test_how_a_run_is_watched_may_change(tiny, tmp_path, text_model):
    train(tiny, tmp_path / "whole", device="cpu", text_model=text_model)
    first = Trainer(tiny, tmp_path / "run", CPU, make_serializer(tiny, text_model))
    first.train_step(first.mixture.batch(0))
    first.save()
    other = replace(tiny, save_every=7, keep_last=1, log_every=2)
    train(other, tmp_path / "run", device="cpu", text_model=text_model)
    assert same(weights(tmp_path / "run"), weights(tmp_path / "whole"))
    assert checkpoints(tmp_path / "run") == [20]


def test_what_a_kill_left_is_swept_away(tiny, tmp_path, text_model):
    for name in (".state.json.123.tmp", ".latest.new"):
        (tmp_path / name).write_text("half")
    (tmp_path / ".step-00000001.123").mkdir()
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "losses": {}}\n[1]\n{"step": 1, "lo')
    train(replace(tiny, steps=2), tmp_path, device="cpu", text_model=text_model)
    names = {p.name for p in tmp_path.iterdir()}
    assert names == {"latest", "metrics.jsonl", "state.json", "step-00000002"}
    assert list(lines(tmp_path, "losses")) == [0, 1, 2]


def test_watchers_are_told(tiny, tmp_path, text_model):
    class Watcher:
        def __init__(self) -> None:
            self.lines: list[int] = []
            self.events: list[tuple[str, Any]] = []
            self.closed = 0

        def metrics(self, line: dict[str, Any]) -> None:
            self.lines.append(line["step"])

        def event(self, kind: str, **facts: Any) -> None:
            self.events.append((kind, facts["step"]))

        def close(self) -> None:
            self.closed += 1

    watcher = Watcher()
    config = replace(tiny, steps=4, save_every=3, log_every=2)
    train(config, tmp_path, device="cpu", text_model=text_model, watchers=[watcher])
    assert watcher.lines == [2, 4]
    assert watcher.events == [("start", 0), ("checkpoint", 3), ("checkpoint", 4), ("end", 4)]
    assert watcher.closed == 1


def test_batches_made_ahead_are_the_same(tiny, tmp_path, text_model):
    options = {"device": "cpu", "text_model": text_model}
    train(replace(tiny, steps=4), tmp_path / "here", **options)
    train(replace(tiny, steps=4), tmp_path / "ahead", workers=1, **options)
    assert same(weights(tmp_path / "here"), weights(tmp_path / "ahead"))


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
