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
from gato.execution import compile_parts
from gato.model import GatoModel
from gato.presets import preset, untaught
from gato.static_shapes import Capacities
from gato.tokenizers.serializer import Serializer
from gato.tokenizers.stream import TokenBatch, concatenate, pack

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


@pytest.fixture
def long_rows(monkeypatch):
    """Let these rows be ones whose documents are attended one after another on a CPU."""
    monkeypatch.setattr(kernels, "PRODUCTS_MAX_ROW", T - 1)
    monkeypatch.setattr(kernels, "SHORT", 1)
    kernels.use("auto")
    yield
    kernels.use("auto")


@pytest.mark.parametrize("compiled", ["trunk", "blocks"])
def test_long_rows_on_a_cpu_are_one_graph_too(make_model, make_batch, long_rows, compiled):
    model, twin, counter = make_model(), make_model(), CompileCounter()
    trunk = model.trunk
    if compiled == "trunk":
        trunk = torch.compile(trunk, backend=counter, fullgraph=True)
    else:
        compile_parts(model, counter)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch in varied(make_batch, 6):
            x = model.embed(batch.inputs, batch.local)
            assert error(trunk(x, batch), twin.trunk(x, batch)) < 1e-5
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


SIZES = {"image": [(32, 32), (16, 48), (40, 24)], "frame": [(64, 64), (32, 96)]}
"""Pixels of pictures, and of frames in cells of 32."""


def pictured(serializer: Serializer, rng: np.random.Generator) -> TokenBatch:
    """Return a batch of pictures and frames, ever others in number, size and order."""
    parts = []
    for name, sizes in SIZES.items():
        spec = {"cell": 32} if name == "frame" else {}
        for shape in (sizes[i] for i in rng.integers(len(sizes), size=rng.integers(3, 12))):
            pixels = rng.integers(0, 256, (1, *shape, 3), np.uint8)
            written = serializer.modalities[name].encode(pixels, {**spec, "shape": [*shape, 3]})
            parts.append(serializer.piece(name, written))
    order = rng.permutation(len(parts))
    return pack([[concatenate([parts[i] for i in order])]], 256, serializer.control)


@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("image", {"embedder": "conv"}),
        ("image", {"embedder": "patch"}),
        ("frame", {"cell": 32}),
    ],
    ids=["conv", "patch", "frame"],
)
def test_an_embedder_of_images_of_many_sizes_is_one_graph(name, options, half):
    serializer, rng = untaught(preset("quickstart")), np.random.default_rng(0)
    torch.manual_seed(0)
    net, counter = serializer.modalities[name].net(32, options), CompileCounter()
    compiled = torch.compile(net, backend=counter, dynamic=False, fullgraph=True)
    batches = [pictured(serializer, rng) for _ in range(12)]
    assert len({len(b.payload[name]["at"]) for b in batches}) > 5
    capacities = Capacities(1, lambda message: None)
    capacities.measure(batches)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch in batches:
            rows = capacities.pad(batch).payload[name]
            found = []
            for embed in (compiled, net):
                net.zero_grad()
                torch.manual_seed(1)  # the places inside patches
                with bf16(half):
                    out = embed(rows)
                real = rows["at"] < len(batch.inputs)
                out[real].float().square().mean().backward()
                grads = [p.grad.flatten() for p in net.parameters() if p.grad is not None]
                found.append((out[real].detach(), torch.cat(grads)))
            for got, expected in zip(*found, strict=True):
                assert error(got, expected) < (3e-2 if half else 1e-5)
    assert counter.frame_count == 1


@pytest.mark.parametrize(("name", "options"), [("image", {"embedder": "conv"}), ("frame", {})])
def test_grouped_images_are_embedded_as_images_in_any_order(name, options):
    serializer, rng = untaught(preset("quickstart")), np.random.default_rng(1)
    net = serializer.modalities[name].net(32, options).eval()
    batches = [pictured(serializer, rng) for _ in range(6)]
    capacities = Capacities(1, lambda message: None)
    capacities.measure(batches)
    for batch in batches:
        plain, grouped = batch.to("cpu").payload[name], capacities.pad(batch).payload[name]
        assert "host_size" in plain
        assert "host_groups" in grouped
        tokens = torch.zeros(2, len(batch.inputs) + 1, 32)
        for out, rows in zip(tokens, (plain, grouped), strict=True):
            out.index_add_(0, rows["at"], net(rows).detach())
        torch.testing.assert_close(tokens[1, :-1], tokens[0, :-1], rtol=1e-5, atol=1e-5)
        assert tokens[0, :-1].any()
