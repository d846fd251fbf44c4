"""Images embedded whole, in any mixture of sizes, equal one at a time, plainly convolved."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gato.tokenizers.frames import Frame
from gato.tokenizers.image import POSITIONS, GridPosition, Image
from gato.tokenizers.stream import to_device

SIZES = [(64, 64), (16, 48), (64, 64), (40, 70), (16, 48), (33, 16)]


def rows_of(name: str, images: list[np.ndarray], cell: int) -> dict:
    """Return the payload of images one after another."""
    modality = Image() if name == "image" else Frame()
    spec = {"cell": cell}
    segments = [modality.encode(i[None], {**spec, "shape": list(i.shape)}) for i in images]
    joined = {k: np.concatenate([s.rows[k][0] for s in segments]) for k in segments[0].rows}
    return to_device(joined, torch.from_numpy)


def slow(net: nn.Module, image: np.ndarray, cell: int) -> Tensor:
    """Return the embeddings of one image's cells, without their positions."""
    height, width = (math.ceil(n / cell) * cell for n in image.shape[:2])
    canvas = torch.full((1, 3, height, width), -1.0)
    canvas[0, :, : image.shape[0], : image.shape[1]] = (
        torch.from_numpy(image).permute(2, 0, 1) / 127.5 - 1
    )
    x = canvas
    for conv, norm in zip(net.convs, net.norms, strict=True):
        x = F.conv2d(x, conv.weight, conv.bias, conv.stride, conv.padding)
        x = F.gelu(norm(x.movedim(1, -1)).movedim(-1, 1))
    out = net.out
    found = F.conv2d(x, out.weight, out.bias, out.stride, out.padding)[0].flatten(1).T
    if not hasattr(net, "patch"):
        return found
    cells = canvas[0].unfold(1, cell, cell).unfold(2, cell, cell)  # (3, rows, columns, c, c)
    return found + net.patch(cells.permute(1, 2, 3, 4, 0).flatten(2).flatten(0, 1))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("name", "cell"), [("image", 16), ("frame", 32), ("frame", 64)])
def test_embeddings_and_gradients_equal_those_of_one_image_at_a_time(name, cell, training):
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (*size, 3), np.uint8) for size in SIZES]
    modality = Image() if name == "image" else Frame()
    torch.manual_seed(0)
    net = modality.net(24, {"embedder": "conv", "cell": cell})
    nn.init.zeros_(net.position.row.weight)
    nn.init.zeros_(net.position.column.weight)
    net.train(training)
    found = {}
    for way in ("fast", "slow"):
        net.zero_grad()
        if way == "fast":
            embedded = net(rows_of(name, images, cell))
        else:
            embedded = torch.cat([slow(net, image, cell) for image in images])
        (embedded * torch.linspace(-1, 1, len(embedded))[:, None]).sum().backward()
        gradients = {k: p.grad for k, p in net.named_parameters() if "position" not in k}
        found[way] = embedded.detach(), gradients
    torch.testing.assert_close(found["fast"][0], found["slow"][0], rtol=1e-4, atol=1e-5)
    for key, gradient in found["slow"][1].items():
        torch.testing.assert_close(found["fast"][1][key], gradient, rtol=1e-3, atol=1e-3, msg=key)


@pytest.mark.parametrize(("name", "cell"), [("image", 16), ("frame", 32)])
def test_in_bfloat16_embeddings_stay_within_its_rounding(name, cell):
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (64, 64, 3), np.uint8) for _ in range(4)]
    modality = Image() if name == "image" else Frame()
    torch.manual_seed(0)
    net = modality.net(24, {"embedder": "conv", "cell": cell}).eval()
    payload = rows_of(name, images, cell)
    with torch.no_grad():
        exact = net(payload)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = net(payload)
    error = (rounded.float() - exact).abs().max() / exact.abs().max()
    assert 0 < error < 0.03


def test_a_place_is_the_middle_of_its_interval():
    net = GridPosition(4).eval()
    for size in range(1, 200):
        at = torch.arange(size)
        middle = torch.floor((at.double() + 0.5) / size * POSITIONS).long()
        grid = torch.stack([at, at.flip(0), *[torch.full((size,), size)] * 2], 1).short()
        expected = net.row(middle) + net.column(middle.flip(0))
        assert torch.equal(net(grid), expected)
