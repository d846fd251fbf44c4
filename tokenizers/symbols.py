"""Symbol tokens: a group of integers of an observation embedded as one token.

A grid world's cell (object, colour, state) is one token whose embedding is the sum of its
integers' embeddings; Gato would spend one token per integer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor, nn

from gato.tokenizers.modality import Modality, Segment, Spec, register

MAX_PLACES = 512


@register
class Symbols(Modality):
    """Integers read in groups. Spec: ``shape``, ``group`` (integers a token), ``size``."""

    name = "symbols"
    predicts = None

    def count(self, spec: Spec) -> int:
        return math.prod(spec["shape"]) // int(spec["group"])

    def encode(self, values: Any, spec: Spec, key: str = "value") -> Segment:
        raw = np.asarray(values)
        if raw.shape[1:] != tuple(spec["shape"]) or not np.issubdtype(raw.dtype, np.integer):
            raise ValueError(
                f"{key!r} must hold integers of shape {spec['shape']}; got {raw.dtype} of shape "
                f"{raw.shape[1:]}"
            )
        if raw.size and not 0 <= raw.min() <= raw.max() < spec["size"]:
            raise ValueError(
                f"{key!r} must be in [0, {spec['size'] - 1}]; got {raw.min()} to {raw.max()}. "
                f"Check that the data and the task's space agree."
            )
        n, group = self.count(spec), spec["group"]
        grouped = raw.reshape(len(raw), n, group).astype(np.int32)
        place = np.arange(n, dtype=np.int32) % MAX_PLACES
        rows = {
            "index": grouped + np.arange(group, dtype=np.int32) * spec["size"],
            "place": np.broadcast_to(place, (len(raw), n)),
        }
        return Segment(np.full((len(raw), n), -1, np.int32), rows)

    def describe(
        self, token: int, row: Mapping[str, np.ndarray], options: Mapping[str, Any]
    ) -> list[int]:
        """Return the group's integers."""
        return [int(i) % int(options.get("size", 16)) for i in row["index"]]

    def example(self, rng: np.random.Generator) -> tuple[Any, Spec]:
        return rng.integers(0, 6, (2, 4, 3)), {"shape": [4, 3], "group": 3, "size": 16}

    def net(self, width: int, options: Mapping[str, Any]) -> nn.Module:
        return SymbolNet(width, int(options.get("group", 3)) * int(options.get("size", 16)))


class SymbolNet(nn.Module):
    """Sums the embeddings of a token's integers and of its place in the tensor."""

    def __init__(self, width: int, entries: int) -> None:
        super().__init__()
        self.integers = nn.EmbeddingBag(entries, width, mode="sum")
        self.place = nn.Embedding(MAX_PLACES, width)
        nn.init.normal_(self.integers.weight, std=0.05)
        nn.init.normal_(self.place.weight, std=0.05)

    def forward(self, payload: dict[str, Tensor]) -> Tensor:
        """Return embeddings (r, D) of ``index`` (r, G) and ``place`` (r,)."""
        out: Tensor = self.integers(payload["index"].long())
        return out + self.place(payload["place"].long())
