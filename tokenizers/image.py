"""RGB images as non-overlapping 16 x 16 patches in raster order (Gato section 2.1, appendix C).

Patches travel as uint8 and are scaled on the device. Two embedders: ``patch`` is Gato's (each
patch through one ResNet block), ``conv`` runs a convolutional stem over the whole image, whose
overlapping fields learn where small things are far sooner on a small budget; the tokens are the
same 16 x 16 cells.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gato.tokenizers.cells import PATCH, cell_count, cells, described
from gato.tokenizers.modality import Modality, Segment, Spec, register
from gato.tokenizers.shapes import ROWS, in_blocks

IMAGES = 8
"""Images of one size are embedded in multiples of so many while training; see `shapes.py`."""
POSITIONS = 128  # Gato appendix C: patch intervals are quantised to 128


@register
class Image(Modality):
    """uint8 images. Spec: ``shape`` (H, W) or (H, W, C) with C 1 or 3, or K of them in a stack."""

    name = "image"
    predicts = None

    def count(self, spec: Spec) -> int:
        return cell_count(spec, PATCH)

    def encode(self, values: Any, spec: Spec, key: str = "value") -> Segment:
        pixels, place = cells(values, spec, key, PATCH)
        return Segment(np.full(pixels.shape[:2], -1, np.int32), {"patch": pixels, **place})

    def describe(
        self, token: int, row: Mapping[str, np.ndarray], options: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Return the patch's place and its mean colour."""
        return described(row["grid"], row["patch"])

    def example(self, rng: np.random.Generator) -> tuple[Any, Spec]:
        return rng.integers(0, 256, (2, 32, 48, 3), np.uint8), {"shape": [32, 48, 3]}

    def net(self, width: int, options: Mapping[str, Any]) -> nn.Module:
        kinds = {"patch": PatchNet, "conv": ConvNet}
        kind = options.get("embedder", "patch")
        if kind not in kinds:
            raise ValueError(f"the image embedder must be one of {sorted(kinds)}; got {kind!r}")
        return kinds[kind](width)


def picture_spec(image: np.ndarray) -> Spec:
    """Return the spec of a picture that stands alone: uint8 (H, W), (H, W, 1) or (H, W, 3).

    Raises:
        ValueError: for anything else: with transparency, with channels first, without pixels.
    """
    shape = image.shape
    known = len(shape) == 2 or (len(shape) == 3 and shape[2] in (1, 3))
    if image.dtype != np.uint8 or not known or 0 in shape:
        raise ValueError(
            f"an image must be uint8 of shape (H, W), (H, W, 1) or (H, W, 3); got {image.dtype} "
            f"of shape {shape}. Convert to RGB, channels last."
        )
    return {"shape": list(shape)}


def per_size(
    compute: Callable[[Tensor, int, int], Tensor],
    pixels: Tensor,
    payload: Mapping[str, Any],
    images: int = 1,
) -> Tensor:
    """Return (r, D): ``compute(cells, rows, columns)`` of the cells of images of each size.

    Sizes are known on the host, so that no kernel has to be waited for.

    Args:
        compute: of the cells of whole images of one size, in raster order.
        pixels: (r, ...), the cells of whole images.
        payload: ``host_groups``, the numbers (rows, columns, cells) of one size after another,
            which are no arrays, so that a compiled graph knows them; or, where images come in any
            order, ``host_size`` (r, 2): rows and columns of the image that a cell belongs to.
        images: of one size, in multiples of which they are computed.
    """

    def of(some: Tensor, rows: int, columns: int) -> Tensor:
        block = images * rows * columns if images > 1 else 1
        return in_blocks(lambda x: compute(x, rows, columns), some, block)

    def in_order(cells: Tensor, groups: Sequence[Sequence[int]]) -> Tensor:
        if len(groups) == 1:
            return of(cells, *groups[0][:2])
        cut = torch.split(cells, [n for _, _, n in groups])
        return torch.cat([of(x, g[0], g[1]) for x, g in zip(cut, groups, strict=True)])

    if "host_groups" in payload:
        return in_order(pixels, payload["host_groups"])
    key = np.asarray(payload["host_size"]).astype(np.int64) @ (1 << 16, 1)
    known, counts = np.unique(key, return_counts=True)
    numbers = zip(known.tolist(), counts.tolist(), strict=True)
    groups = [(k >> 16, k & 0xFFFF, n) for k, n in numbers]
    order = np.argsort(key, kind="stable")
    if len(groups) == 1 or (np.diff(order) == 1).all():  # sorted by size already
        return in_order(pixels, groups)
    moved = torch.from_numpy(order).to(pixels.device, non_blocking=True)
    out = in_order(pixels[moved], groups)
    return torch.empty_like(out).index_copy(0, moved, out)


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
        index = self._index(grid[:, :2].long(), grid[:, 2:].long())
        out: Tensor = self.row(index[:, 0])
        return out + self.column(index[:, 1])

    def _index(self, at: Tensor, size: Tensor) -> Tensor:
        if not self.training:
            return (2 * at + 1) * (POSITIONS // 2) // size
        start = at / size * POSITIONS
        inside = torch.rand(2, len(at), device=at.device).T  # rows first
        return (start + inside * (POSITIONS / size)).long().clamp(max=POSITIONS - 1)


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
        patch, images = payload["patch"], IMAGES if self.training else 1
        out = per_size(self._cells, patch, payload, images)
        alone = in_blocks(self._alone, patch, ROWS if self.training else 1)
        return out + alone + self.position(payload["grid"])

    def _alone(self, patch: Tensor) -> Tensor:
        embedded: Tensor = self.patch(unit(torch.flatten(patch, 1)))
        return embedded

    def _cells(self, patches: Tensor, rows: int, columns: int) -> Tensor:
        x = strided(patches, rows, columns, self.convs, self.norms)
        return self.out(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).reshape(len(patches), -1)


def strided(
    cells: Tensor, rows: int, columns: int, convs: Iterable[Any], norms: Iterable[Any]
) -> Tensor:
    """Return the map (n, h, w, C) of n images, uint8 cells (r, c, c, 3) in raster order.

    Channels stay last throughout, where each convolution is normalised and oneDNN and cuDNN want
    them. Pixels of the first, whose stride is its size, do not overlap: it is a linear map.
    """
    first, *others = convs
    norm, *norms = norms
    size, side = first.kernel_size[0], cells.shape[1] // first.kernel_size[0]
    x = cells.view(-1, rows, columns, side, size, side, size * 3)
    x = x.permute(0, 1, 3, 2, 5, 4, 6).reshape(-1, rows * side, columns * side, size * size * 3)
    weight = first.weight.permute(0, 2, 3, 1).flatten(1)
    x = F.gelu(norm(F.linear(unit(x), weight, first.bias)))
    for conv, norm in zip(others, norms, strict=True):
        x = F.gelu(norm(conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)))
    return x


def unit(pixels: Tensor) -> Tensor:
    """Return uint8 pixels as floats in [-1, 1], at once in the dtype that is computed in."""
    kind = pixels.device.type
    mixed = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    low = torch.get_autocast_dtype(kind) if mixed else torch.float32
    return pixels.to(low).sub_(127.5).mul_(1 / 127.5)  # exact in bfloat16 but for the last


def scaled(pixels: Tensor) -> Tensor:
    """Return uint8 pixels as floats in [-1, 1] / sqrt(16) (Gato section 2.1)."""
    return (pixels.float() * (2.0 / 255.0) - 1.0) * 0.25
