"""What a recording does around its graph, and the memory that a cache takes, without a GPU."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from gato.cache import KVCache
from gato.memory import resident
from gato.rollouts.graphs import WARM, Graphs


class Device:
    """Stands for CUDA: what is run while it records is not carried out, as on a GPU."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.recording, self.replays = False, 0
        stream = SimpleNamespace(wait_stream=lambda other: None)
        for name, made in {
            "Stream": lambda device: stream,
            "current_stream": lambda device: stream,
            "stream": lambda which: nullcontext(),
            "CUDAGraph": lambda: SimpleNamespace(replay=self.replay, pool=lambda: (0, 0)),
            "graph": self.graph,
        }.items():
            monkeypatch.setattr(torch.cuda, name, made)

    @contextmanager
    def graph(self, graph, pool):
        self.recording = True
        yield
        self.recording = False

    def replay(self) -> None:
        self.replays += 1


def test_runs_before_a_recording_are_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(monkeypatch)
    length, ring = torch.tensor([5, 2]), torch.arange(8)
    began: list[list[int]] = []

    def step(x: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        if not device.recording:
            began.append([*length.tolist(), *ring.tolist()])
            length.add_(valid)
            ring[length % 8] = -1
        return x

    graphs = Graphs(step, (length, ring), capture=True)
    for tokens in (4, 8, 4):
        graphs(torch.zeros(2, tokens, 3), torch.tensor([3, 1]))
    assert began == [[5, 2, *range(8)]] * 2 * WARM, "every run of both recordings begins alike"
    assert [*length.tolist(), *ring.tolist()] == began[0], "the replays alone may advance it"
    assert device.replays == 3


def test_a_cache_takes_no_memory_before_it_is_written() -> None:
    before = resident()
    cache = KVCache(layers=2, batch=4, window=4096, kv_heads=8, head_dim=128)
    size = cache.store.nbytes / 2**20
    assert size > 256
    assert resident() - before < size / 8
    k = torch.ones(64, 8, 128)
    step = cache.place(np.array([64, 0, 0, 0]))
    for layer in range(2):
        cache.write(layer, step, k, k)
    assert resident() - before < size / 2, "of one row in four; pages may be of 2 MB"
