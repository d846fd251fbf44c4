"""Small models and packed batches shared by the reference tests."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from gato.model import GatoModel
from gato.model_config import ModelConfig
from gato.tokenizers.stream import TokenBatch, TokenSequence, pack

VOCABULARY = 96
TINY = ModelConfig(
    layers=2, width=32, heads=4, head_dim=8, ffn_width=64, context=48, qk_norm=True, kv_heads=2
)


def random_sequence(length: int, rng: np.random.Generator) -> TokenSequence:
    """Return a sequence with some tokens without id and some targets."""
    ids = rng.integers(0, VOCABULARY, length).astype(np.int32)
    target = (rng.random(length) < 0.4).astype(np.float32)
    target[0] = 0
    ids[(rng.random(length) < 0.2) & (target == 0)] = -1
    local = (np.arange(length) % 7).astype(np.int16)
    return TokenSequence(ids, np.zeros(length, np.uint8), local, target)


@pytest.fixture
def make_batch() -> Callable[..., TokenBatch]:
    """Return a maker of packed batches from the lengths of each row's documents."""

    def make(lengths: list[list[int]], row_length: int = 48, seed: int = 0) -> TokenBatch:
        rng = np.random.default_rng(seed)
        rows = [[random_sequence(n, rng) for n in row] for row in lengths]
        return pack(rows, row_length, {"<pad>": 0, "<masked>": 1}).to("cpu")

    return make


@pytest.fixture
def make_model() -> Callable[..., GatoModel]:
    """Return a maker of tiny models in which no weight is zero."""

    def make(seed: int = 0, nets: dict | None = None, **changes: object) -> GatoModel:
        torch.manual_seed(seed)
        model = GatoModel(replace(TINY, **changes), VOCABULARY, masked_id=1, nets=nets)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        return model

    return make
