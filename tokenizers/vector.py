"""Vector tokens: a group of scalars of an observation embedded as one token.

Observations are not predicted, so they need no ids: a Meta-World observation of 39 numbers takes
3 tokens instead of 39.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gato.tokenizers.modality import Modality, Segment, Spec, register, require_finite
from gato.tokenizers.scalars import ValueFeatures, normalise, quantile_scales
from gato.tokenizers.shapes import ROWS, in_blocks

MAX_GROUPS = 64


@register
class Vector(Modality):
    """Real numbers read in groups. Spec: ``shape``, ``group`` (scalars a token), ``codec``."""

    name = "vector"
    fits = True
    predicts = None

    def count(self, spec: Spec) -> int:
        return -(-math.prod(spec["shape"]) // spec["group"])

    def encode(self, values: Any, spec: Spec, key: str = "value") -> Segment:
        raw = np.asarray(values)
        flat = raw.reshape(len(raw), -1)
        if raw.shape[1:] != tuple(spec["shape"]):
            raise ValueError(f"{key!r} must have shape {spec['shape']}; got {raw.shape[1:]}")
        require_finite(flat, key)
        unit = np.clip(normalise(flat, spec), -3.0, 3.0).astype(np.float32)
        n, group = self.count(spec), spec["group"]
        padded = np.zeros((len(unit), n * group), np.float32)
        padded[:, : unit.shape[1]] = unit
        index = np.arange(n, dtype=np.int32) % MAX_GROUPS
        rows = {
            "values": padded.reshape(len(unit), n, group),
            "group": np.broadcast_to(index, (len(unit), n)),
        }
        return Segment(np.full((len(unit), n), -1, np.int32), rows)

    def example(self, rng: np.random.Generator) -> tuple[Any, Spec]:
        return rng.normal(size=(2, 5)), {"shape": [5], "group": 13, "codec": "mu_law"}

    def fit(self, columns: Iterable[np.ndarray], spec: Spec) -> Spec:
        return quantile_scales(columns, spec) if spec.get("fitted", True) else spec

    def net(self, width: int, options: Mapping[str, Any]) -> nn.Module:
        return VectorNet(width, int(options.get("group", 13)))


class VectorNet(nn.Module):
    """Embeds G numbers and the index of their group in one linear map of Fourier features."""

    def __init__(self, width: int, group: int) -> None:
        super().__init__()
        self.features = ValueFeatures()
        self.values = nn.Linear(group * ValueFeatures.size, width)
        self.group = nn.Embedding(MAX_GROUPS, width)
        nn.init.normal_(self.group.weight, std=0.02)

    def forward(self, payload: dict[str, Tensor]) -> Tensor:
        """Return embeddings (r, D) of ``values`` (r, G) and ``group`` (r,)."""

        def embed(values: Tensor) -> Tensor:
            embedded: Tensor = self.values(torch.flatten(self.features(values), 1))  # (r, G * F)
            return embedded

        out = in_blocks(embed, payload["values"], ROWS if self.training else 1)
        return out + self.group(payload["group"].long())
