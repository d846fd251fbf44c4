"""Optimizer steps equal those of a CPU, and so do the losses of a whole run, corpus by corpus."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from gato.bench_train import mixture_of
from gato.config import TrainConfig
from gato.optim import Muon, OptimConfig, Optimizers, orthogonalise
from gato.train import train

SHAPES = [(96, 64)] * 3 + [(64, 256)] * 2 + [(64, 64)]
STEPS = {"cuda": 400, "cpu": 20}
TOLERANCE = 0.01
"""Of a corpus' loss, relative, on average over the lines of a run. On a CPU bf16 is at most 0.0005
away from float32 over 60 steps of the same run, seeds 0 and 1; a GPU orthogonalises in bf16 too."""


def matrices(device: str, seed: int) -> list[torch.nn.Parameter]:
    """Return weights with gradients, the same numbers on every device."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for shape in SHAPES:
        made.append(torch.nn.Parameter(torch.randn(shape, generator=generator).to(device)))
        made[-1].grad = torch.randn(shape, generator=generator).to(device)
    return made


def moved(params: list[torch.nn.Parameter], optimizers: list[Muon]) -> list[torch.Tensor]:
    """Return how far three steps move each of them."""
    before = [p.detach().clone() for p in params]
    for _ in range(3):
        for optimizer in optimizers:
            optimizer.step()
    return [p.detach() - b for p, b in zip(params, before, strict=True)]


def test_muon_of_a_stack_equals_one_matrix_after_another(device, error):
    together, apart, on_cpu = (matrices(device, 0), matrices(device, 0), matrices("cpu", 0))
    got = moved(together, [Muon(together, 0.1, 0.01)])
    single = moved(apart, [Muon([p], 0.1, 0.01) for p in apart])
    exact = moved(on_cpu, [Muon([p], 0.1, 0.01) for p in on_cpu])
    for a, b, c in zip(got, single, exact, strict=True):
        assert error(a, b) < (1e-2 if device == "cuda" else 1e-5)
        assert error(a, c) < (5e-2 if device == "cuda" else 1e-5)  # in bf16 on a GPU


@pytest.mark.parametrize("shape", [(3, 64, 96), (2, 64, 256), (2, 256, 64)])
def test_orthogonalised_matrices_have_singular_values_near_one(device, shape):
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
    values = torch.linalg.svdvals(orthogonalise(drawn).float().cpu())
    assert 0.3 < values.min()
    assert values.max() < 1.3


@pytest.mark.parametrize("muon", [False, True])
def test_an_optimizer_step_equals_the_cpus(device, make_model, make_batch, error, muon):
    model, twin, batch = make_model(), make_model("cpu"), make_batch()
    config = OptimConfig(muon=muon, weight_decay=0.1)
    ours, theirs = Optimizers(model, config), Optimizers(twin, config)
    start = [p.detach().clone() for p in twin.parameters()]
    for _ in range(3):
        twin.loss(batch.to("cpu")).mean().backward()
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            p.grad = q.grad.to(device, copy=True)  # the same gradients: what differs is the step
        norms = [o.step(1e-2).item() for o in (ours, theirs)]
        assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    for p, q, s in zip(model.parameters(), twin.parameters(), start, strict=True):
        # Muon iterates in bf16 on a GPU: imitated on a CPU, matrices come out up to 0.068 away
        coarse = 0.15 if p.ndim == 2 else 5e-2
        tolerance = coarse if muon and device == "cuda" else 1e-4
        assert error(p.detach().cpu() - s, q.detach() - s) < tolerance


def test_what_is_not_finite_changes_nothing_without_the_host(device, make_model, make_batch):
    model, batch = make_model(), make_batch()
    optimizers = Optimizers(model, OptimConfig())
    model.loss(batch).mean().backward()
    optimizers.step(1e-2)
    before = [p.detach().clone() for p in model.parameters()]
    model.loss(batch).mean().backward()
    model.table.weight.grad.fill_(float("nan"))
    optimizers.step(1e-2, closed=torch.ones((), device=device))
    for p, b in zip(model.parameters(), before, strict=True):
        assert torch.equal(p.detach(), b)


def losses(config: TrainConfig, folder: Path, device: str) -> dict[str, np.ndarray]:
    """Return every corpus' losses, line by line, of a run on `device`."""
    train(config, folder, device=device)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    read = [line["losses"] for line in lines if "losses" in line]
    return {name: np.array([line[name] for line in read]) for name in read[0]}


def test_a_run_has_the_losses_of_the_cpu(device, tmp_path):
    """In bf16 here and in float32 on a CPU, on the same data: two minutes, most the CPU's."""
    made = mixture_of(tmp_path)
    config = replace(made, steps=STEPS[device], log_every=10, save_every=STEPS[device])
    if device == "cpu":
        small = replace(made.model, layers=1, width=64, head_dim=32, ffn_width=128, context=128)
        config = replace(config, model=small, rows=2)
    exact = losses(replace(config, precision="float32"), tmp_path / "exact", "cpu")
    found = losses(replace(config, precision="bfloat16"), tmp_path / "found", device)
    assert set(found) == set(exact) == {"arm", "game", "text"}
    for name, curve in exact.items():
        assert len(curve) == STEPS[device] // 10
        away = np.abs(found[name] - curve) / curve
        assert away.max() < 3 * TOLERANCE, (name, away)
        assert away.mean() < TOLERANCE, (name, away)
        assert curve[-1] < curve[0]
        assert found[name][-1] < found[name][0]
