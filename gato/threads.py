"""How many threads a small model decides with on a CPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from gato.model_config import ModelConfig

LARGE = 20_000_000
"""Parameters of a trunk from which several threads decide faster than one. At 1M one thread takes
6.0 ms for a decision and two take 11.3, at 10M both take the same, at 79M 145 and 117."""


@contextlib.contextmanager
def few_threads(config: ModelConfig, device: torch.device) -> Iterator[None]:
    """Let a small model on a CPU use one thread here: others wait for one another too long."""
    before = torch.get_num_threads()
    if device.type != "cpu" or before == 1 or trunk_parameters(config) >= LARGE:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def trunk_parameters(config: ModelConfig) -> int:
    """Return the parameters of the matrices of all blocks."""
    assert config.kv_heads is not None
    attention = (2 * config.heads + 2 * config.kv_heads) * config.head_dim * config.width
    return config.layers * (attention + config.width * config.ffn_width * 3 // 2)
