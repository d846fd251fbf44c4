"""Continuous values, one token per scalar: Gato's 1024 bins, embedded by value.

Actions are scaled from their Box to [-1, 1]; observations are mu-law squeezed or, where scales
were fitted, scaled by quantiles. Decoding returns the bin's centre.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from torch import Tensor, nn

from gato.tokenizers.modality import Modality, Segment, Spec, register, require_finite
from gato.tokenizers.scalars import (
    BINS,
    ValueFeatures,
    bin_centre,
    denormalise,
    normalise,
    quantile_scales,
    to_bin,
)
from gato.tokenizers.shapes import ROWS, in_blocks

MAX_DIMENSIONS = 512


@register
class Continuous(Modality):
    """Real numbers, row-major. Spec: ``shape``, ``codec``, ``bounded`` and ``low``, ``high``."""

    name = "continuous"
    fits = True
    ordinal = True

    def __init__(self) -> None:
        self.vocabulary = BINS

    def count(self, spec: Spec) -> int:
        return math.prod(spec["shape"])

    def encode(self, values: Any, spec: Spec, key: str = "value") -> Segment:
        raw = np.asarray(values)
        flat = raw.reshape(len(raw), -1)
        if flat.shape[1] != self.count(spec):
            raise ValueError(f"{key!r} must have shape {spec['shape']}; got {raw.shape[1:]}")
        require_finite(flat, key)
        unit = normalise(flat, spec)
        if spec.get("bounded"):
            self._require_inside(flat, unit, spec, key)
        bins = to_bin(unit)
        exact = np.clip(unit, -3.0, 3.0)
        value = bin_centre(bins) if spec.get("bounded") else exact
        return Segment(bins, self._rows(value.astype(np.float32), 0))

    def _require_inside(self, flat: np.ndarray, unit: np.ndarray, spec: Spec, key: str) -> None:
        low, high = np.array(spec["low"], np.float64), np.array(spec["high"], np.float64)
        # rounding in float32 is no fault of the data
        slack = 1e-6 * np.maximum(np.abs(low), np.abs(high))
        point = (high == low) & (np.abs(flat - low) > slack)  # a dimension that cannot move
        outside = (np.abs(unit) > 1.0 + 1e-5) | point
        if outside.any():
            step, i = (int(k) for k in np.argwhere(outside)[0])
            raise ValueError(
                f"{key!r} must be in [{spec['low'][i]:g}, {spec['high'][i]:g}] at dim {i}; got "
                f"{float(flat[step, i]):g}. Clip or rescale the actions (gymnasium's ClipAction, "
                f"RescaleAction)."
            )

    def _rows(self, value: np.ndarray, first: int) -> dict[str, np.ndarray]:
        dims = np.arange(first, first + value.shape[-1], dtype=np.int32) % MAX_DIMENSIONS
        return {"value": value, "dimension": np.broadcast_to(dims, value.shape)}

    def decode(self, ids: np.ndarray, spec: Spec) -> np.ndarray:
        return self.decode_many(np.asarray(ids)[None], spec).reshape(spec["shape"])

    def decode_many(self, ids: np.ndarray, spec: Spec) -> np.ndarray:
        value = denormalise(bin_centre(ids), spec)
        dtype = np.dtype(spec.get("dtype", "float32"))
        if np.issubdtype(dtype, np.integer):
            value = np.rint(value)
        return value.astype(dtype).reshape(len(ids), *spec["shape"])

    def allowed(self, prefix: np.ndarray, spec: Spec) -> tuple[int, int] | None:
        return None if len(prefix) >= self.count(spec) else (0, BINS)

    def ranges(self, spec: Spec) -> list[tuple[int, int]]:
        return [(0, BINS)] * self.count(spec)

    def rows_of(self, ids: np.ndarray, spec: Spec, first: int) -> dict[str, np.ndarray]:
        return self._rows(bin_centre(ids).astype(np.float32), first)

    def example(self, rng: np.random.Generator) -> tuple[Any, Spec]:
        spec = {"shape": [3], "codec": "uniform", "bounded": True}
        return rng.uniform(-1, 1, (2, 3)), {**spec, "low": [-1.0] * 3, "high": [1.0] * 3}

    def fit(self, columns: Iterable[np.ndarray], spec: Spec) -> Spec:
        return quantile_scales(columns, spec) if spec["codec"] == "quantile" else spec

    def net(self, width: int, options: Mapping[str, Any]) -> nn.Module:
        return ScalarNet(width)


class ScalarNet(nn.Module):
    """Embeds a scalar by its value and the index of its dimension."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.features = ValueFeatures()
        self.value = nn.Linear(ValueFeatures.size, width)
        self.dimension = nn.Embedding(MAX_DIMENSIONS, width)
        nn.init.normal_(self.dimension.weight, std=0.02)

    def forward(self, payload: dict[str, Tensor]) -> Tensor:
        """Return embeddings (r, D) of ``value`` (r,) and ``dimension`` (r,)."""

        def embed(value: Tensor) -> Tensor:
            embedded: Tensor = self.value(self.features(value))
            return embedded

        out = in_blocks(embed, payload["value"], ROWS if self.training else 1)
        return out + self.dimension(payload["dimension"].long())
