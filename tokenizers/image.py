"""RGB images as non-overlapping 16 x 16 patches in raster order (Gato section 2.1, appendix C).

Patches travel as uint8 and are scaled on the device. Two embedders: ``patch`` is Gato's (each
patch through one ResNet block), ``conv`` runs a convolutional stem over the whole image, whose
overlapping fields learn where small things are far sooner on a small budget; the tokens are the
same 16 x 16 cells.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gato.tokenizers.modality import Modality, Segment, Spec, register
from gato.tokenizers.shapes import ROWS, in_blocks

PATCH = 16
IMAGES = 8
"""Images of one size are embedded in multiples of so many while training; see `shapes.py`."""
POSITIONS = 128  # Gato appendix C: patch intervals are quantised to 128


@register
class Image(Modality):
    """uint8 images. Spec: ``shape`` (H, W) or (H, W, C) with C 1 or 3."""

    name = "image"
    predicts = None

    def count(self, spec: Spec) -> int:
        rows, columns = grid_of(spec)
        return rows * columns

    def encode(self, values: Any, spec: Spec, key: str = "value") -> Segment:
        raw = np.asarray(values)
        if raw.dtype != np.uint8 or raw.shape[1:] != tuple(spec["shape"]):
            raise ValueError(
                f"{key!r} must be uint8 of shape {spec['shape']}; got {raw.dtype} of shape "
                f"{raw.shape[1:]}"
            )
        count, (rows, columns) = len(raw), grid_of(spec)
        pixels = raw if raw.ndim == 4 else raw[..., None]
        if pixels.shape[-1] == 1:
            pixels = np.broadcast_to(pixels, (*pixels.shape[:-1], 3))
        height, width = pixels.shape[1:3]
        missing = (rows * PATCH - height, columns * PATCH - width)
        if any(missing):  # the last row and column of patches are filled up with black
            pixels = np.pad(pixels, ((0, 0), (0, missing[0]), (0, missing[1]), (0, 0)))
        patches = pixels.reshape(count, rows, PATCH, columns, PATCH, 3).swapaxes(2, 3)
        n = rows * columns
        row, column = np.divmod(np.arange(n, dtype=np.int16), np.int16(columns))
        size = np.full(n, rows, np.int16), np.full(n, columns, np.int16)
        grid = np.stack([row, column, *size], 1)
        payload = {
            "patch": patches.reshape(count, n, PATCH, PATCH, 3),
            "grid": np.broadcast_to(grid, (count, n, 4)),
        }
        return Segment(np.full((count, n), -1, np.int32), payload)

    def describe(
        self, token: int, row: Mapping[str, np.ndarray], options: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Return the patch's place and its mean colour."""
        place, mean = row["grid"][:2].tolist(), row["patch"].mean((0, 1))
        return {"row": place[0], "column": place[1], "rgb": np.round(mean).astype(int).tolist()}

    def example(self, rng: np.random.Generator) -> tuple[Any, Spec]:
        return rng.integers(0, 256, (2, 32, 48, 3), np.uint8), {"shape": [32, 48, 3]}

    def net(self, width: int, options: Mapping[str, Any]) -> nn.Module:
        kinds = {"patch": PatchNet, "conv": ConvNet}
        kind = options.get("embedder", "patch")
        if kind not in kinds:
            raise ValueError(f"the image embedder must be one of {sorted(kinds)}; got {kind!r}")
        return kinds[kind](width)


def grid_of(spec: Spec) -> tuple[int, int]:
    """Return (rows, columns) of patches of an image of ``spec["shape"]``."""
    return -(-spec["shape"][0] // PATCH), -(-spec["shape"][1] // PATCH)


class GridPosition(nn.Module):
    """Row and column embeddings over patch intervals quantised to 128 (Gato appendix C).

    In training the index is drawn uniformly from the patch's interval, in evaluation its mean.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.row = nn.Embedding(POSITIONS, width)
        self.column = nn.Embedding(POSITIONS, width)
        nn.init.normal_(self.row.weight, std=0.02)
        nn.init.normal_(self.column.weight, std=0.02)

    def forward(self, grid: Tensor) -> Tensor:
        """Return (r, D) for ``grid`` (r, 4): row, column, rows, columns."""
        out: Tensor = self.row(self._index(grid[:, 0], grid[:, 2]))
        return out + self.column(self._index(grid[:, 1], grid[:, 3]))

    def _index(self, at: Tensor, size: Tensor) -> Tensor:
        start = at.float() / size * POSITIONS
        extent = POSITIONS / size
        inside = torch.rand_like(start) if self.training else 0.5
        return (start + inside * extent).long().clamp(max=POSITIONS - 1)


class PatchNet(nn.Module):
    """One pre-activation ResNet block per patch (GroupNorm 32, GELU), then one linear map."""

    channels = 64

    def __init__(self, width: int) -> None:
        super().__init__()
        c = self.channels
        self.enter = nn.Conv2d(3, c, 3, stride=2, padding=1)
        self.norm1, self.norm2 = nn.GroupNorm(32, c), nn.GroupNorm(32, c)
        self.conv1 = nn.Conv2d(c, c, 3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(c, c, 3, padding=1)
        self.shortcut = nn.Conv2d(c, c, 1, stride=2)
        self.out = nn.Linear(c * (PATCH // 4) ** 2, width)
        self.position = GridPosition(width)

    def forward(self, payload: dict[str, Tensor]) -> Tensor:
        """Return embeddings (r, D) of ``patch`` (r, 16, 16, 3) and ``grid`` (r, 4)."""
        embedded = in_blocks(self._embed, payload["patch"], ROWS if self.training else 1)
        return embedded + self.position(payload["grid"])

    def _embed(self, patch: Tensor) -> Tensor:
        x = self.enter(scaled(patch).permute(0, 3, 1, 2))  # (r, C, 8, 8)
        y = self.conv1(F.gelu(self.norm1(x)))  # (r, C, 4, 4)
        y = self.conv2(F.gelu(self.norm2(y)))
        embedded: Tensor = self.out(torch.flatten(self.shortcut(x) + y, 1))
        return embedded


class ConvNet(nn.Module):
    """Four strided convolutions over the whole image, one cell of the last map per token.

    Beside them a small network reads each patch alone, for what lies wholly inside it.

    Each convolution is normalised over its channels at every pixel: at PyTorch's own initial scale
    the part of the output that depends on the image is a tenth of its constant part, and small
    things on a plain ground stay unseen for hundreds of steps.
    """

    channels = (24, 48, 96)
    inside = 192

    def __init__(self, width: int) -> None:
        super().__init__()
        c1, c2, c3 = self.channels
        self.convs = nn.ModuleList(
            [
                nn.Conv2d(3, c1, 4, stride=4),
                nn.Conv2d(c1, c2, 3, stride=2, padding=1),
                nn.Conv2d(c2, c3, 3, stride=2, padding=1),
            ]
        )
        self.norms = nn.ModuleList([nn.LayerNorm(c) for c in self.channels])
        self.out = nn.Conv2d(c3, width, 3, padding=1)
        for conv in (*self.convs, self.out):
            nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
            nn.init.zeros_(conv.bias)
        with torch.no_grad():
            self.out.weight.mul_(0.25)
        inside = nn.Linear(PATCH * PATCH * 3, self.inside)
        nn.init.kaiming_normal_(inside.weight, nonlinearity="relu")
        self.patch = nn.Sequential(inside, nn.GELU(), nn.Linear(self.inside, width))
        self.position = GridPosition(width)

    def forward(self, payload: dict[str, Tensor]) -> Tensor:
        """Return embeddings (r, D); rows of one image must be complete and in raster order."""
        patch, grid = payload["patch"], payload["grid"]
        shape_key = grid[:, 2].long() * 1024 + grid[:, 3].long()
        out = None
        for key in torch.unique(shape_key).tolist():
            at = (shape_key == key).nonzero().squeeze(1)
            rows, columns = key // 1024, key % 1024
            block = IMAGES * rows * columns if self.training else 1
            cells = in_blocks(partial(self._cells, rows=rows, columns=columns), patch[at], block)
            if out is None:
                out = cells.new_empty(len(patch), cells.shape[1])
            out = out.index_copy(0, at, cells)
        assert out is not None
        alone = in_blocks(self._alone, patch, ROWS if self.training else 1)
        return out + alone + self.position(grid)

    def _alone(self, patch: Tensor) -> Tensor:
        embedded: Tensor = self.patch(torch.flatten(scaled(patch), 1) * 4.0)
        return embedded

    def _cells(self, patches: Tensor, rows: int, columns: int) -> Tensor:
        images = patches.view(-1, rows, columns, PATCH, PATCH, 3).permute(0, 5, 1, 3, 2, 4)
        x = scaled(images.reshape(-1, 3, rows * PATCH, columns * PATCH)) * 4.0
        x = x.contiguous(memory_format=torch.channels_last)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.gelu(norm(conv(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
        return self.out(x).permute(0, 2, 3, 1).reshape(len(patches), -1)  # (r, D)


def scaled(pixels: Tensor) -> Tensor:
    """Return uint8 pixels as floats in [-1, 1] / sqrt(16) (Gato section 2.1)."""
    return (pixels.float() * (2.0 / 255.0) - 1.0) * 0.25
