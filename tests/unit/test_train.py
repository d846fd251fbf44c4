"""Training: losses fall, and a run that was interrupted ends as one that was not."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from gato.checkpoint import load_checkpoint, load_tensors
from gato.config import TrainConfig, from_json, to_json
from gato.fitting import make_serializer
from gato.train import NonFiniteLossError, Progress, Trainer, train

GOLDEN = Path(__file__).parents[1] / "golden" / "losses.json"


def losses(run: Path) -> dict[int, dict[str, float]]:
    """Return the losses per corpus by step, as logged."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len({line["step"] for line in lines}) == len(lines)
    return {line["step"]: line["losses"] for line in lines}


def assert_same_run(first: Path, second: Path) -> None:
    """Assert that two runs logged and ended alike, bit for bit."""
    assert losses(first) == losses(second)
    files = ("model.safetensors", "training/optimizer.safetensors")
    ends = [run / (run / "latest").read_text() for run in (first, second)]
    assert ends[0].name == ends[1].name
    for name in files:
        a, b = (load_tensors(end / name) for end in ends)
        assert a.keys() == b.keys()
        for key, tensor in a.items():
            assert torch.equal(tensor, b[key]), key
    for name in ("config.json", "vocabulary.json", "text.model"):
        assert (ends[0] / name).read_bytes() == (ends[1] / name).read_bytes()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def whole(runs: Path, tiny: TrainConfig) -> Path:
    """Return the run of the tiny configuration that nothing interrupted."""
    if not (runs / "whole").exists():
        train(tiny, runs / "whole", device="cpu")
    return runs / "whole"


def test_the_loss_of_every_corpus_falls(tiny, tmp_path):
    seen: list[Progress] = []
    train(replace(tiny, steps=80, log_every=10, save_every=80), tmp_path, on_progress=seen.append)
    first, last = seen[0], seen[-1]
    assert [p.step for p in seen] == list(range(10, 81, 10))
    assert set(last.losses) == {"arm", "grid", "words", "pictures", "talks"}
    for name, value in last.losses.items():
        assert value < 0.8 * first.losses[name], name
    assert last.seconds_left == 0
    assert first.seconds_left > 0
    assert min(p.tokens_per_second for p in seen) > 0


def test_twenty_losses_are_as_recorded(whole, request):
    got = losses(whole)
    if request.config.getoption("--write-golden"):
        GOLDEN.write_text(json.dumps(got, indent=1) + "\n")
    recorded = json.loads(GOLDEN.read_text())
    assert list(got) == list(range(1, 21))
    for step, line in recorded.items():
        assert got[int(step)].keys() == line.keys()
        for name, value in line.items():
            assert got[int(step)][name] == pytest.approx(value, rel=1e-4), (step, name)


def test_a_run_is_a_function_of_its_configuration(whole, tiny, tmp_path):
    train(tiny, tmp_path)
    assert_same_run(whole, tmp_path)
    other = replace(tiny, seed=4, steps=1)
    train(other, tmp_path / "other")
    assert losses(tmp_path / "other")[1] != losses(whole)[1]


@pytest.mark.parametrize("log_every", [1, 4])
def test_resuming_goes_on_bit_for_bit(tiny, tmp_path, log_every):
    tiny = replace(tiny, steps=12, log_every=log_every)
    train(tiny, tmp_path / "whole")

    def stop_after(limit: int) -> Trainer:
        if (tmp_path / "parts" / "latest").exists():
            trainer = Trainer.resumed(tiny, tmp_path / "parts", torch.device("cpu"))
        else:
            serializer = make_serializer(tiny)
            trainer = Trainer(tiny, tmp_path / "parts", torch.device("cpu"), serializer)
        step = trainer.train_step

        def counted(batch):
            step(batch)
            trainer.stop.reason = "the test" if trainer.step >= limit else None

        trainer.train_step = counted
        trainer.run()
        return trainer

    assert stop_after(3).step == 3  # neither at a save nor at a line of metrics
    assert stop_after(6).step == 6
    assert stop_after(7).step == 7
    train(tiny, tmp_path / "parts")
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_a_finished_run_is_left_as_it_is(whole, tiny):
    latest = whole / (whole / "latest").read_text()
    before = {p: p.stat().st_mtime_ns for p in latest.rglob("*")}
    assert train(tiny, whole) == latest
    assert {p: p.stat().st_mtime_ns for p in latest.rglob("*")} == before


def test_a_sigterm_saves_and_returns(tiny, tmp_path):
    long = replace(tiny, steps=100_000, save_every=100_000)

    def terminate() -> None:
        while not (tmp_path / "metrics.jsonl").exists() or len(losses(tmp_path)) < 3:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=terminate)
    thread.start()
    saved = train(long, tmp_path)
    thread.join()
    assert signal.getsignal(signal.SIGTERM) is before
    assert 3 <= load_checkpoint(saved).step < 1000
    assert saved.name == (tmp_path / "latest").read_text()


def test_a_loss_that_is_no_number_stops_before_the_step(tiny, tmp_path):
    trainer = Trainer(tiny, tmp_path, torch.device("cpu"), make_serializer(tiny))
    trainer.train_step(trainer.mixture.batch(0))
    before = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    batch = trainer.mixture.batch(1)
    batch.payload["vector"]["values"][0, 0] = np.nan
    at_fault = "the loss of step 1 is nan; look at arm .also in the batch: grid.*lower optim\\.lr"
    with pytest.raises(NonFiniteLossError, match=at_fault):
        trainer.train_step(batch)
    assert trainer.step == 1
    for key, value in trainer.model.state_dict().items():
        assert torch.equal(value, before[key])


def test_another_configuration_does_not_go_on(whole, tiny):
    with pytest.raises(ValueError, match="another configuration"):
        train(replace(tiny, rows=5), whole)


def test_a_configuration_survives_its_file(tiny):
    assert from_json(TrainConfig, json.loads(json.dumps(to_json(tiny)))) == tiny
    with pytest.raises(ValueError, match="TrainConfig has no field 'speed'"):
        from_json(TrainConfig, {**to_json(tiny), "speed": 1})
    for change in ({"rows": 0}, {"precision": "half"}, {"corpora": (tiny.corpora[0],) * 2}):
        with pytest.raises(ValueError, match=r"at least 1; got 0|got 'half'|different names"):
            replace(tiny, **change)


def test_bfloat16_trains_too(tiny, tmp_path):
    train(replace(tiny, precision="bfloat16", steps=20), tmp_path)
    assert losses(tmp_path)[20]["words"] < losses(tmp_path)[1]["words"]
