"""On a GPU, chunks replayed as graphs equal eager ones and the full forward, near the floor.

What these compute is proved on a CPU, where the same buffers and buckets run without a recording
(tests/unit/rollouts/test_batched.py); here the recording itself is at stake, and its speed.
"""

from __future__ import annotations

import statistics
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from gato.bench_suites import SUITES, episodes, make
from gato.model import GatoModel
from gato.model_config import ModelConfig, gato_79m
from gato.rollouts.batching import BUCKETS, Memory
from gato.rollouts.policy import Policy
from gato.tokenizers.stream import TokenSequence, pack

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

DEVICE = "cuda"
VOCABULARY = 512
SMALL = ModelConfig(
    layers=3, width=128, heads=4, head_dim=32, ffn_width=512, context=96, window=96, qk_norm=True
)


def make_model(config: ModelConfig) -> GatoModel:
    """Return a model on the GPU in which no weight is zero."""
    torch.manual_seed(0)
    model = GatoModel(config, VOCABULARY, masked_id=1).to(DEVICE).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return model


def read(memory: Memory, x: Tensor, lengths: np.ndarray) -> Tensor:
    """Return the states (B, Q, D) of a padded chunk of embedded tokens."""
    memory.lengths = memory.lengths + lengths
    with torch.inference_mode():
        return memory.graphs(x, torch.from_numpy(lengths).to(DEVICE))


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_graph_equals_eager_code(dtype: torch.dtype, kv_heads: int) -> None:
    model = make_model(replace(SMALL, kv_heads=kv_heads))
    replayed, eager = (Memory(model, 5, dtype=dtype) for _ in range(2))
    assert replayed.static
    assert replayed.graphs.capture
    eager.graphs.capture = False
    rng = np.random.default_rng(0)
    for step in range(40):  # rings wrap, on rows of their own timesteps
        Q = BUCKETS[step % 3]
        x = torch.randn(5, Q, SMALL.width, device=DEVICE)
        lengths = rng.integers(0, Q + 1, 5)
        got, expected = (read(memory, x, lengths) for memory in (replayed, eager))
        for row, n in enumerate(lengths):
            torch.testing.assert_close(got[row, :n], expected[row, :n])
        if step % 9 == 8:
            rows = rng.random(5) < 0.4
            for memory in (replayed, eager):
                memory.reset(rows)
    assert replayed.lengths.max() > SMALL.memory
    assert replayed.cache.lengths.tolist() == eager.cache.lengths.tolist()
    assert len(replayed.graphs.recorded) == 3


def test_cached_rows_equal_the_full_forward_under_the_same_window() -> None:
    model = make_model(SMALL)
    memory = Memory(model, 2, dtype=torch.float32)
    x = torch.randn(2, 240, SMALL.width, device=DEVICE)
    states, done = [], 0
    for step in range(1000):
        Q = (8, 1, 1, 16)[step % 4]
        if done + Q > x.shape[1]:
            break
        states.append(read(memory, x[:, done : done + Q].clone(), np.full(2, Q)))
        done += Q
    ids = np.zeros(done, np.int32)
    zeros = np.zeros(done, np.int16)
    row = TokenSequence(ids, zeros.astype(np.uint8), zeros, zeros.astype(np.float32))
    batch = pack([[row]], done, {"<pad>": 0, "<masked>": 1}).to(DEVICE)
    for i, got in enumerate(torch.cat(states, dim=1)):
        with torch.no_grad():
            expected = model.trunk(x[i, :done], batch)
        torch.testing.assert_close(got, expected, atol=2e-3, rtol=2e-3)


def test_a_replay_never_waits_for_the_device() -> None:
    model = make_model(SMALL)
    memory = Memory(model, 4, dtype=torch.bfloat16)
    x, valid = torch.randn(4, 8, SMALL.width, device=DEVICE), torch.full((4,), 8, device=DEVICE)
    with torch.inference_mode():
        memory.graphs(x, valid)
        torch.cuda.set_sync_debug_mode("error")
        try:
            memory.graphs(x, valid)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_a_policy_of_four_suites_records_each_bucket_once() -> None:
    model, serializer = make(replace(SMALL, context=192, window=192), DEVICE)
    tasks = [t for t in SUITES for _ in range(4)]
    graphed = Policy(model, serializer, tasks, temperature=0.0, precision="float32")
    eager = Policy(model, serializer, tasks, temperature=0.0, precision="float32")
    eager.memory.graphs.capture = False
    for seen in episodes(tasks, 15):
        for mine, other in zip(*(p.select_action(seen) for p in (graphed, eager)), strict=True):
            np.testing.assert_array_equal(mine, other)
    recorded = graphed.memory.graphs.recorded
    assert {shape[1] for shape in recorded} <= set(BUCKETS)
    assert (graphed.memory.lengths > 192).any()


def milliseconds(work, repeats: int = 20) -> float:
    """Return the median milliseconds of one call of `work` on the device."""
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def test_256_rows_of_79m_are_decoded_within_twice_the_floor() -> None:
    """The floor is what must be read once per token, over the bandwidth of a copy on this device.

    Bytes of a decoded token of 256 rows, all with a full memory of W tokens, in bfloat16:
    2 x (weights of the trunk) + 2 x (256 x W x layers x 2 x G x K) for keys and values.
    """
    config, rows = gato_79m(), 256
    model = make_model(config)
    memory = Memory(model, rows, dtype=torch.bfloat16)
    x = torch.randn(rows, 64, config.width, device=DEVICE)
    for _ in range(config.memory // 64 + 1):
        read(memory, x, np.full(rows, 64))
    one, valid = x[:, :1].clone(), torch.ones(rows, dtype=torch.int64, device=DEVICE)
    with torch.inference_mode():
        for _ in range(3):
            memory.graphs(one, valid)
        taken = milliseconds(lambda: memory.graphs(one, valid))
    source = torch.randint(0, 100, (2**28,), device=DEVICE)  # 2 GiB
    target = torch.empty_like(source)
    copying = milliseconds(lambda: target.copy_(source))
    bandwidth = 2 * source.nbytes / copying  # bytes per millisecond, read and written
    weights = sum(p.numel() for p in model.blocks.parameters())
    cache = rows * config.memory * config.layers * 2 * memory.cache.kv_heads * config.head_dim
    floor = 2 * (weights + cache) / bandwidth
    assert taken <= 2 * floor, f"{taken:.3f} ms against a floor of {floor:.3f} ms"
