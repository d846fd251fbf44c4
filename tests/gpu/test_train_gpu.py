"""A step of training on a GPU: nothing waits, nothing bad is learned; see also `test_speed_gpu.py`.

What is not about the GPU itself runs on a CPU too; see `conftest.py`.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from gato.bench_train import mixture_of
from gato.config import TrainConfig
from gato.execution import Execution
from gato.feed import Fed, Feed
from gato.fitting import make_serializer
from gato.model_config import ModelConfig
from gato.train import NonFiniteLossError, Progress, Trainer, train

# torch's tracer asks whether what it is given has a gradient, and torch warns of it; the compiler
# itself warns of much, version by version
pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch._inductor"),
]
on_a_gpu = pytest.mark.gpu
SMALL = ModelConfig(layers=2, width=64, heads=2, head_dim=32, ffn_width=256, context=256)


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    """Return a run of a small model on an arm, a game and text, its weights averaged."""
    made = mixture_of(tmp_path)
    return replace(made, model=SMALL, rows=4, steps=30, ema=0.9, log_every=10, save_every=10)


def eager(config: TrainConfig, folder: Path, device: str) -> Trainer:
    """Return a trainer that does all that it does on a GPU, but compile."""
    execution = Execution(compile="no", static=True, lagged=True, ahead=True)
    serializer = make_serializer(config)
    return Trainer(config, folder, torch.device(device), serializer, execution=execution)


@on_a_gpu
def test_a_step_waits_for_nothing(config, tmp_path):
    trainer = eager(config, tmp_path / "run", "cuda")
    drawn = [trainer.mixture.batch(k) for k in range(9)]
    feed = Feed(iter(drawn), 1, trainer.device, trainer.measured(), ahead=True)
    for k in range(len(drawn)):
        parts = feed.take()
        torch.cuda.set_sync_debug_mode("error" if k > 3 else "default")  # states are made first
        try:
            trainer.train_step(*parts)
            feed.fetch()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    trainer.settle()
    assert trainer.step == len(drawn)


def test_what_is_fed_ahead_is_what_was_drawn(device, config, tmp_path):
    trainer = eager(config, tmp_path / "run", device)
    drawn = [trainer.mixture.batch(k) for k in range(12)]
    capacities = trainer.measured()
    assert capacities is not None
    feed = Feed(iter(drawn), 1, trainer.device, capacities, ahead=True)
    busy = torch.randn(2000, 2000, device=device)
    for batch in drawn:
        (fed,) = feed.take()
        feed.fetch()
        for _ in range(20 if device == "cuda" else 1):
            busy = (busy @ busy).tanh()  # the copies come while this is computed
        assert isinstance(fed, Fed)
        assert fed.drawn is batch
        expected = capacities.pad(batch)
        for name in ("inputs", "position", "cu_seqlens", "target_at", "target_weight"):
            assert torch.equal(getattr(fed.given, name).cpu(), getattr(expected, name)), name
        for modality, rows in expected.payload.items():
            for name, values in rows.items():
                given = fed.given.payload[modality][name]
                if name.startswith("host_"):
                    assert np.array_equal(given, values)
                else:
                    assert given.device.type == device
                    assert torch.equal(given.cpu(), values), (modality, name)


def test_a_loss_that_is_no_number_changes_nothing(device, config, tmp_path):
    trainer = eager(config, tmp_path / "run", device)
    assert trainer.average is not None
    for k in range(3):
        trainer.train_step(trainer.mixture.batch(k))
    trainer.settle()

    def everything() -> dict[str, torch.Tensor]:
        state = {**trainer.model.state_dict(), **trainer.optimizers.tensors(trainer.names)}
        average = {f"average/{k}": v for k, v in trainer.average.values.items()}
        return {k: v.cpu().clone() for k, v in {**state, **average}.items()}

    before = everything()
    batch = trainer.mixture.batch(3)
    batch.payload["vector"]["values"][0, 0] = np.nan
    trainer.train_step(batch)
    with pytest.raises(NonFiniteLossError, match="the loss of step 3 is nan; look at arm"):
        trainer.train_step(trainer.mixture.batch(4))
    assert trainer.step == 3
    for key, value in everything().items():
        assert torch.equal(value, before[key]), key
    assert (trainer.folder / "bad-batch-00000003" / "part-0.npz").is_file()


def test_a_run_by_default_learns_resumes_and_tells_its_mfu(device, config, tmp_path):
    """Compiled on a GPU: some minutes, most of them the compiler's."""
    run, config = tmp_path / "run", replace(config, steps=20)
    first = Trainer(config, run, torch.device(device), make_serializer(config))

    def end(progress: Progress) -> None:
        first.stop.reason = "asked" if progress.step == 10 else None

    first.run(end, workers=2 if device == "cuda" else 0)
    assert first.step == 10
    assert train(config, run, device=device).name == "step-00000020"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [10, 20]
    assert all(lines[1]["losses"][name] < lines[0]["losses"][name] for name in ("game", "text"))
    assert all(0 < line["mfu"] < 1 for line in lines if "mfu" in line)
