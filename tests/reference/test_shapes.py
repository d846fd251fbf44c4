"""Rows computed in blocks are what they are alone, values and gradients; kernels see few shapes."""

import numpy as np
import pytest
import torch
from torch import nn

from gato.tokenizers.modality import modality_classes
from gato.tokenizers.shapes import ROWS, in_blocks


def embedder(name: str, **options) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """Return an embedder and the payload of its modality's example."""
    modality = modality_classes()[name]()
    values, spec = modality.example(np.random.default_rng(0))
    rows = modality.encode(values, spec).rows
    flat = {k: torch.from_numpy(np.array(v).reshape(-1, *v.shape[2:])) for k, v in rows.items()}
    torch.manual_seed(0)
    net = modality.net(32, options)
    assert net is not None
    return net, flat


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("image", {"embedder": "patch"}),
        ("image", {"embedder": "conv"}),
        ("frame", {}),
        ("continuous", {}),
        ("vector", {}),
    ],
)
def test_an_embedder_learns_the_same_from_rows_in_blocks(name, options):
    net, payload = embedder(name, **options)
    n = len(next(iter(payload.values())))
    assert n % ROWS, "this tests nothing where no row is missing"
    for module in net.modules():  # places inside a patch are drawn in training only
        module.train(module is net)
    found = {}
    for training in (True, False):
        net.training = training
        net.zero_grad()
        embedded = net(payload)
        assert embedded.shape == (n, 32)
        (embedded * torch.linspace(-1, 1, n)[:, None]).sum().backward()
        gradients = {k: p.grad.clone() for k, p in net.named_parameters() if p.grad is not None}
        found[training] = (embedded.detach(), gradients)
    torch.testing.assert_close(found[True][0], found[False][0], rtol=1e-5, atol=1e-6)
    assert found[True][1].keys() == found[False][1].keys()
    for key, gradient in found[True][1].items():
        torch.testing.assert_close(gradient, found[False][1][key], rtol=1e-4, atol=1e-5, msg=key)


def test_kernels_see_few_shapes():
    seen = set()

    def compute(x: torch.Tensor) -> torch.Tensor:
        seen.add(len(x))
        return x * 2

    for n in range(1, 130):
        x = torch.arange(float(n))
        assert torch.equal(in_blocks(compute, x, ROWS), x * 2)
    assert seen == {ROWS, 2 * ROWS, 3 * ROWS}
