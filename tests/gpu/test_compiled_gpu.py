"""The compiled trunk trains as the eager one does, and is compiled once for a real mixture.

On a CPU it is compiled for no backend: tests/reference/test_compiled.py has more of that.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from gato.bench_train import mixture_of
from gato.config import TrainConfig
from gato.execution import Execution
from gato.fitting import make_serializer
from gato.train import Trainer

# torch's tracer asks whether what it is given has a gradient, and torch warns of it; the compiler
# itself warns of much, version by version
pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch._inductor"),
]
BATCHES = {"cuda": 50, "cpu": 5}


@pytest.fixture
def counter(device: str) -> CompileCounterWithBackend:
    """Return a compiler that counts its graphs."""
    return CompileCounterWithBackend("inductor" if device == "cuda" else "eager")


@pytest.fixture
def config(device: str, tmp_path: Path) -> TrainConfig:
    """Return a run on an arm, a game and text, of a size that suits the device."""
    made = mixture_of(tmp_path)
    if device == "cpu":
        small = replace(made.model, layers=2, width=32, head_dim=16, ffn_width=64)
        made = replace(made, model=small, rows=2)
    return made


def test_compiled_equals_eager_without_recompiling(device, make_model, make_batch, error, counter):
    model = make_model()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(3):
            batch = make_batch(seed)
            gradients = []
            for f in (model, compiled):
                model.zero_grad()
                with torch.autocast(device, torch.bfloat16):
                    f(batch).float().square().mean().backward()
                gradients.append(model.blocks[0].attention.qkv.weight.grad.clone())
            assert error(gradients[1], gradients[0]) < 5e-2
    assert counter.frame_count == 1


def test_a_real_mixture_is_trained_on_without_recompiling(device, config, tmp_path, counter):
    """Ever other documents, images, targets and words; the step's losses as in an eager twin."""
    serializer = make_serializer(config)
    trainer, twin = (
        Trainer(config, tmp_path / how, torch.device(device), serializer, execution=execution)
        for how, execution in (
            ("compiled", Execution(compile="yes", backend=counter)),
            ("eager", Execution(compile="no")),
        )
    )
    shapes = set()
    for k in range(BATCHES[device]):
        batch = trainer.mixture.batch(k)
        shapes.add((len(batch.target_at), *(len(p["at"]) for p in batch.payload.values())))
        with torch._dynamo.config.patch(error_on_recompile=k > 2):
            trainer.train_step(batch)
        if k < 4:
            twin.train_step(twin.mixture.batch(k))
        if k == 2:
            graphs = counter.frame_count
        if k == 3:
            for each in (trainer, twin):
                each.settle()
            (sums, counts), (expected, counted) = trainer.sums.tolist(), twin.sums.tolist()
            assert counts == counted
            assert sums == pytest.approx(expected, rel=1e-2)
    trainer.settle()
    assert 0 < graphs == counter.frame_count
    assert len(shapes) > BATCHES[device] // 2, "batches should differ"
