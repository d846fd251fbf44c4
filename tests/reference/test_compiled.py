"""What is compiled is one graph: no breaks, and none anew for other documents in rows of one size.

Compiled for no backend ("eager"), so that only the tracing is put to the test, in seconds;
tests/gpu compiles in earnest.
"""

from __future__ import annotations

import sys
from contextlib import nullcontext
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from gato import kernels
from gato.model import GatoModel
from gato.tokenizers.stream import TokenBatch

# torch's tracer asks whether what it is given has a gradient, and torch warns of it
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")

T, ROWS, BATCHES = 48, 3, 50


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def varied(make_batch, count: int = BATCHES) -> list[TokenBatch]:
    """Return batches of ever other documents, numbers of targets and tokens without an id."""
    rng = np.random.default_rng(0)
    batches = []
    for seed in range(count):
        rows = []
        for _ in range(ROWS):
            cuts = np.sort(rng.choice(np.arange(1, T), int(rng.integers(0, 12)), replace=False))
            lengths = np.diff([0, *cuts, T])
            rows.append([int(n) for n in lengths[: rng.integers(1, len(lengths) + 1)]])
        batches.append(make_batch(rows, T, seed))
    assert len({tuple(b.cu_seqlens.tolist()) for b in batches}) > count // 2
    assert len({len(b.target_at) for b in batches}) > count // 4
    return batches


def error(got: Tensor, expected: Tensor) -> float:
    """Return the relative error in norm."""
    return ((got - expected).norm() / expected.norm().clamp(min=1e-9)).item()


def bf16(enabled: bool):
    return torch.autocast("cpu", torch.bfloat16) if enabled else nullcontext()


@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("window", [None, 9])
def test_a_trunk_is_one_graph_for_all_batches(make_model, make_batch, window, half):
    model, counter = make_model(window=window), CompileCounter()
    compiled = torch.compile(model.trunk, backend=counter, fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch in varied(make_batch):
            x = model.embed(batch.inputs, batch.local)
            with bf16(half):
                got, expected = compiled(x, batch), model.trunk(x, batch)
            assert error(got, expected) < (2e-2 if half else 1e-5)
    assert counter.frame_count == 1


@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
def test_all_blocks_of_a_model_are_one_graph_with_gradients(make_model, make_batch, half):
    model, twin, counter = make_model(layers=3), make_model(layers=3), CompileCounter()
    for block in model.blocks:
        block.compile(backend=counter, fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch in varied(make_batch, 8):
            for m in (model, twin):
                m.zero_grad()
                with bf16(half):
                    m(batch).float().square().mean().backward()
            got, expected = (
                torch.cat([p.grad.flatten() for p in m.parameters()]) for m in (model, twin)
            )
            assert error(got, expected) < (3e-2 if half else 1e-5)
    assert counter.frame_count == 1


@pytest.mark.parametrize("pinned", [False, True])
@pytest.mark.parametrize("kernel", ["varlen", "flash_attn"])
def test_a_flash_kernel_breaks_no_graph(make_model, make_batch, monkeypatch, kernel, pinned):
    """With a stand-in for the kernel, which on a GPU is an opaque operator in the graph."""

    def varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, *, window_size=(-1, -1), enable_gqa=False):
        assert cu_q is cu_k
        assert enable_gqa == (q.shape[1] != k.shape[1])
        return stand_in(q, k, v, cu_q)

    def flash_attn_varlen_func(q, k, v, cu_q, cu_k, max_q, max_k, causal, window_size):
        return stand_in(q, k, v, cu_q)

    def stand_in(q: Tensor, k: Tensor, v: Tensor, cu: Tensor) -> Tensor:
        return q * k.sum() + v.mean() + cu.sum()

    for name, function in (
        ("torch.nn.attention.varlen", varlen_attn),
        ("flash_attn", flash_attn_varlen_func),
    ):
        fake = ModuleType(name)
        setattr(fake, function.__name__, function)
        monkeypatch.setitem(sys.modules, name, fake)
    monkeypatch.setattr(kernels, "chosen", lambda case: (kernel, "for the test"))
    monkeypatch.setattr(kernels, "honours_sdpa_kernel", lambda: pinned)
    model, counter = make_model(window=9), CompileCounter()
    compiled = torch.compile(model.trunk, backend=counter, fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch in varied(make_batch, 5):
            x = model.embed(batch.inputs, batch.local)
            torch.testing.assert_close(compiled(x, batch), model.trunk(x, batch))
    assert counter.frame_count == 1


@torch.no_grad()
def test_decoding_is_one_graph(make_model):
    model: GatoModel = make_model(window=16)
    counter = CompileCounter()
    compiled = torch.compile(model.decode, backend=counter, fullgraph=True)
    cache, twin = model.new_cache(3, chunk=4), model.new_cache(3, chunk=4)
    rng = torch.Generator().manual_seed(0)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(30):
            x = torch.randn(3, 4, model.config.width, generator=rng)
            valid = torch.randint(0, 5, (3,), generator=rng)
            got, expected = compiled(x, cache, valid), model.decode(x, twin, valid)
            for row, n in enumerate(valid.tolist()):
                torch.testing.assert_close(got[row, :n], expected[row, :n], atol=1e-5, rtol=1e-5)
    assert counter.frame_count == 1
