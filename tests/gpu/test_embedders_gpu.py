"""Embedders of images: on a GPU as on a CPU in float32, and the host waits for nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from gato.tokenizers.modality import modality_classes
from gato.tokenizers.stream import to_device

SIZES = {
    "one size": [(64, 64)] * 5,
    "sorted": [(32, 32), (32, 32), (64, 96)],
    "mixed": [(64, 96), (32, 32), (64, 96), (40, 70)],
}
NETS = [("image", "conv", 16), ("image", "patch", 16), ("frame", None, 32), ("frame", None, 64)]


@contextmanager
def no_wait(device: str) -> Iterator[None]:
    """Raise where the host waits for the GPU."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize(("name", "embedder", "cell"), NETS)
def test_images_are_embedded_as_on_a_cpu_without_a_wait(
    device, error, name, embedder, cell, sizes, dtype
):
    rng = np.random.default_rng(0)
    modality = modality_classes()[name]()
    segments = [
        modality.encode(
            rng.integers(0, 256, (1, *size, 3), np.uint8), {"shape": [*size, 3], "cell": cell}
        )
        for size in SIZES[sizes]
    ]
    rows = {k: np.concatenate([s.rows[k][0] for s in segments]) for k in segments[0].rows}
    options = {"cell": cell} if embedder is None else {"embedder": embedder}
    torch.manual_seed(0)
    net = modality.net(64, options).train()
    net.position.eval()  # places inside a cell are drawn in training
    found = {}
    for where, low in (("cpu", torch.float32), (device, dtype)):
        net.zero_grad()
        net.to(where)
        payload = to_device(rows, lambda x, to=where: torch.from_numpy(x).to(to))
        weight = torch.randn(len(rows["grid"]), 64, generator=torch.Generator().manual_seed(0))
        weight = weight.to(where)
        with (
            no_wait(where),
            torch.autocast(where, torch.bfloat16, enabled=low == torch.bfloat16),
        ):
            embedded = net(payload)
            (embedded.float() * weight).sum().backward()
        gradients = torch.cat([p.grad.float().cpu().flatten() for p in net.parameters()])
        found[where, low] = embedded.detach().float().cpu(), gradients
    expected, got = found["cpu", torch.float32], found[device, dtype]
    bound = 3e-2 if dtype == torch.bfloat16 else 5e-3  # TF32, which convolutions take
    assert error(got[0], expected[0]) < bound
    assert error(got[1], expected[1]) < bound
