"""Optimizers against formulas written out, and their state through a file."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from gato.optim import Muon, OptimConfig, Optimizers, orthogonalise


class Toy(nn.Module):
    """Weights of every kind that the optimizers tell apart."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(7, 6)
        self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))
        self.wide = nn.Linear(6, 12)
        self.norm = nn.Parameter(torch.ones(6))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.table(ids) * self.norm
        for block in self.blocks:
            x = x + block(x).tanh()
        return self.wide(x)


def names(model: nn.Module) -> dict[int, str]:
    return {id(p): n for n, p in model.named_parameters()}


def learn(model: Toy, optimizers: Optimizers, first: int, last: int) -> list[float]:
    norms = []
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        ids = torch.randint(7, (20,), generator=generator)
        model(ids).square().mean().backward()
        norms.append(float(optimizers.step(1e-2)))
    return norms


def test_the_rate_rises_stays_and_falls():
    config = OptimConfig(lr=2.0, warmup=10, cooldown=0.4, final=0.1)
    rates = [config.rate(k, 100) for k in range(100)]
    assert rates[:10] == pytest.approx([2.0 * (k + 1) / 10 for k in range(10)])
    assert rates[10:60] == pytest.approx([2.0] * 50)
    for k in range(60, 100):
        assert rates[k] == pytest.approx(2.0 * (0.1 + 0.9 * (100 - k) / 40))
    assert config.rate(0, 1) == pytest.approx(0.2)


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 16, 5), (4, 5, 16), (1, 64, 32)])
def test_orthogonalised_matrices_have_singular_values_near_one(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    out = orthogonalise(matrices)
    assert out.shape == matrices.shape
    values = torch.linalg.svdvals(out)
    assert 0.3 < values.min()
    assert values.max() < 1.3
    for one, together in zip(matrices, out, strict=True):
        torch.testing.assert_close(orthogonalise(one[None])[0], together, atol=1e-5, rtol=1e-4)
        u, _, v = torch.linalg.svd(one, full_matrices=False)
        turned = torch.diagonal(u.mT @ together @ v.mT)
        assert (turned > 0.3).all()  # along the same singular vectors
    assert orthogonalise(torch.zeros(1, 4, 4)).abs().max() == 0


@pytest.mark.parametrize("shape", [(4, 128, 1024), (2, 96, 24), (3, 16, 32)])
@pytest.mark.parametrize("rank", [None, 3])
def test_long_matrices_are_orthogonalised_as_the_plain_iteration_does_it(shape, rank):
    n, a, b = shape
    generator = torch.Generator().manual_seed(0)
    matrices = torch.randn(shape, generator=generator)
    if rank:  # the momentum of a real layer has few large directions, and many that are almost 0
        left = torch.randn(n, a, rank, generator=generator)
        matrices = left @ torch.randn(n, rank, b, generator=generator) + 1e-3 * matrices
    expected = matrices.double()
    expected = expected / expected.norm(dim=(-2, -1), keepdim=True)
    for _ in range(5):
        gram = expected @ expected.mT
        expected = 3.4445 * expected + (-4.7750 * gram + 2.0315 * gram @ gram) @ expected
    error = (orthogonalise(matrices) - expected).norm() / expected.norm()
    assert error < 2e-3
    rough = (expected.float().bfloat16().float() - expected).norm() / expected.norm()
    assert error < rough  # nearer than bf16 can say it


def test_muon_is_momentum_orthogonalised():
    parameter = nn.Parameter(torch.randn(4, 6, generator=torch.Generator().manual_seed(1)))
    muon = Muon([parameter], lr=0.1, weight_decay=0.01, momentum=0.9)
    expected, momentum = parameter.detach().clone(), torch.zeros(4, 6)
    for step in range(3):
        gradient = torch.randn(4, 6, generator=torch.Generator().manual_seed(step))
        parameter.grad = gradient.clone()
        muon.step()
        momentum = 0.9 * momentum + 0.1 * gradient
        ahead = 0.9 * momentum + 0.1 * gradient
        direction = orthogonalise(ahead[None])[0]
        expected = expected * (1 - 0.1 * 0.01) - 0.1 * 0.2 * math.sqrt(6) * direction
        torch.testing.assert_close(parameter.detach(), expected)


def test_each_weight_has_its_optimizer_and_only_the_trunk_decays():
    model = Toy()
    optimizers = Optimizers(model, OptimConfig(weight_decay=0.3))
    adam, muon = optimizers.all
    named = names(model)
    matrices = {named[id(p)] for g in muon.param_groups for p in g["params"]}
    assert matrices == {"blocks.0.weight", "blocks.1.weight"}
    decay = {named[id(p)]: g["weight_decay"] for g in adam.param_groups for p in g["params"]}
    assert set(decay) | matrices == set(named.values())
    assert set(decay.values()) == {0.0}
    adam = Optimizers(model, OptimConfig(weight_decay=0.3, muon=False)).all
    assert len(adam) == 1
    decay = {named[id(p)]: g["weight_decay"] for g in adam[0].param_groups for p in g["params"]}
    assert {n for n, d in decay.items() if d == 0.3} == matrices


def test_long_gradients_are_cut():
    model = Toy()
    optimizers = Optimizers(model, OptimConfig(clip=1e-3, muon=False))
    (norm,) = learn(model, optimizers, 0, 1)
    assert norm > 1e-3
    state = optimizers.all[0].state
    seen = torch.stack([state[p]["exp_avg"].square().sum() for p in model.parameters()]).sum()
    assert float(seen.sqrt()) == pytest.approx(0.1 * 1e-3, rel=1e-3)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("muon", [True, False])
def test_state_goes_on_bit_for_bit(muon):
    config = OptimConfig(muon=muon)
    whole, first, second = Toy(), Toy(), Toy()
    learn(whole, Optimizers(whole, config), 0, 6)
    before = Optimizers(first, config)
    learn(first, before, 0, 3)
    saved = {k: v.clone() for k, v in before.tensors(names(first)).items()}
    second.load_state_dict(first.state_dict())
    after = Optimizers(second, config)
    after.load_tensors(saved, names(second))
    learn(second, after, 3, 6)
    for (name, a), b in zip(whole.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b), name
