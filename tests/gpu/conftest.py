"""Every test here runs on a GPU (marker gpu) and, as its twin, on a CPU: so that the tests
themselves are known to be right on the day a GPU is there.

What is peculiar to a GPU, such as that a flash kernel needs no mask, is asserted there alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from gato import kernels
from gato.kernels import Case
from gato.model import GatoModel
from gato.model_config import ModelConfig
from gato.tokenizers.stream import TokenBatch, TokenSequence, pack

VOCABULARY = 512
CONFIG = ModelConfig(
    layers=2, width=128, heads=4, head_dim=64, ffn_width=512, context=256, qk_norm=True, kv_heads=2
)
ROW = {"cuda": 256, "cpu": 64}
"""Tokens in a row: few on a CPU, where the tests are tried and the kernels are known."""


@pytest.fixture(params=[pytest.param("cuda", marks=pytest.mark.gpu), "cpu"])
def device(request: pytest.FixtureRequest) -> str:
    """Return the device a test runs on."""
    return request.param


@pytest.fixture(autouse=True)
def _as_it_was():
    torch._dynamo.reset()
    yield
    kernels.use("auto")
    torch._dynamo.reset()


@pytest.fixture
def make_batch(device: str) -> Callable[..., TokenBatch]:
    """Return a maker of packed batches whose document boundaries end in empty documents."""

    def make(
        seed: int = 0, lengths: list[list[int]] | None = None, row_length: int = ROW[device]
    ) -> TokenBatch:
        T = row_length
        lengths = lengths or [[T // 3, 1, T // 8, T // 2], [T], [T // 6, T // 4]]
        rng = np.random.default_rng(seed)

        def sequence(n: int) -> TokenSequence:
            target = (np.arange(n) % 5 == 4).astype(np.float32)
            ids = rng.integers(0, VOCABULARY, n).astype(np.int32)
            return TokenSequence(ids, np.zeros(n, np.uint8), np.zeros(n, np.int16), target)

        rows = [[sequence(n) for n in row] for row in lengths]
        batch = pack(rows, row_length, {"<pad>": 0, "<masked>": 1})
        assert (np.diff(batch.cu_seqlens) == 0).any()
        return batch.to(device)

    return make


@pytest.fixture
def make_model(device: str) -> Callable[..., GatoModel]:
    """Return a maker of small models in which no weight is zero; the same ones everywhere."""

    def make(where: str | None = None, **changes: object) -> GatoModel:
        torch.manual_seed(0)
        model = GatoModel(replace(CONFIG, **changes), VOCABULARY, masked_id=1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
        return model.to(where or device)

    return make


@pytest.fixture
def error() -> Callable[[torch.Tensor, torch.Tensor], float]:
    """Return what measures the relative error in norm, across devices."""

    def measure(got: torch.Tensor, expected: torch.Tensor) -> float:
        got, expected = (x.detach().double().cpu() for x in (got, expected))
        return ((got - expected).norm() / expected.norm()).item()

    return measure


@pytest.fixture
def at_hand(device: str) -> Callable[[torch.dtype], list[str]]:
    """Return what lists the kernels that can be had here for a dtype."""

    def listed(dtype: torch.dtype, head_dim: int = 64) -> list[str]:
        found = []
        for name in kernels.NAMES[1:]:
            with kernels.using(name):
                try:
                    kernels.chosen(Case(device, dtype, 256, head_dim))
                except ValueError:
                    continue
            found.append(name)
        return found

    return listed
