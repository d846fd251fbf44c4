"""Frames of tasks in large cells: 32 x 32 or 64 x 64 pixels in one token.

Gato spends a token on 16 x 16 pixels, 16 of them on a frame of 64 x 64. What a task shows is seen
again at every step, so there a token may show more: 4 or 1 of them. Pictures that come with words
keep Gato's cells. One network reads whole frames, as `image.py`'s convolutional stem does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gato.tokenizers.cells import LARGE, cell_count, cells, described
from gato.tokenizers.image import IMAGES, GridPosition, per_size, strided
from gato.tokenizers.modality import Modality, Segment, Spec, register

STRIDE = 16
"""Pixels between neighbours in the map that is read, `cell / STRIDE` squared of them, per token."""


@register
class Frame(Modality):
    """uint8 frames. Spec: ``shape`` as that of images, ``cell`` in `LARGE`."""

    name = "frame"
    predicts = None

    def count(self, spec: Spec) -> int:
        return cell_count(spec, spec["cell"])

    def encode(self, values: Any, spec: Spec, key: str = "value") -> Segment:
        pixels, place = cells(values, spec, key, spec["cell"])
        return Segment(np.full(pixels.shape[:2], -1, np.int32), {"pixels": pixels, **place})

    def describe(
        self, token: int, row: Mapping[str, np.ndarray], options: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Return the cell's place and its mean colour."""
        return described(row["grid"], row["pixels"])

    def example(self, rng: np.random.Generator) -> tuple[Any, Spec]:
        shape = [64, 40, 3]
        return rng.integers(0, 256, (2, *shape), np.uint8), {"shape": shape, "cell": 32}

    def net(self, width: int, options: Mapping[str, Any]) -> nn.Module | None:
        cell = options.get("cell", LARGE[0])
        return FrameNet(width, cell) if cell in LARGE else None


class FrameNet(nn.Module):
    """Three strided convolutions over the whole frame; of each cell all of the map is one token.

    Every convolution is normalised over its channels at every pixel, for the reason that `ConvNet`
    gives.
    """

    channels = (24, 48, 96)

    def __init__(self, width: int, cell: int) -> None:
        super().__init__()
        c1, c2, c3 = self.channels
        self.cell = cell
        self.convs = nn.ModuleList(
            [
                nn.Conv2d(3, c1, 4, stride=4),
                nn.Conv2d(c1, c2, 3, stride=2, padding=1),
                nn.Conv2d(c2, c3, 3, stride=2, padding=1),
            ]
        )
        self.norms = nn.ModuleList([nn.LayerNorm(c) for c in self.channels])
        side = cell // STRIDE
        self.out = nn.Conv2d(c3, width, side, stride=side)
        for conv in (*self.convs, self.out):
            nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
            nn.init.zeros_(conv.bias)
        with torch.no_grad():  # as measured: frames then teach Boxing sooner than cells of 16 do
            self.out.weight.mul_(0.5)
        self.position = GridPosition(width)

    def forward(self, payload: dict[str, Tensor]) -> Tensor:
        """Return embeddings (r, D); rows of one frame must be complete and in raster order."""
        images = IMAGES if self.training else 1
        out = per_size(self._cells, payload["pixels"], payload, images)
        return out + self.position(payload["grid"])

    def _cells(self, pixels: Tensor, rows: int, columns: int) -> Tensor:
        x = strided(pixels, rows, columns, self.convs, self.norms)
        return self.out(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).reshape(len(pixels), -1)
