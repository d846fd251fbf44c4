"""On a GPU, flash equals the reference, decoding equals the full forward, compiled equals eager."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from gato.attention import PackedMeta, attend_packed, describe_backend, packed_mask
from gato.model import GatoModel
from gato.model_config import ModelConfig
from gato.tokenizers.stream import TokenBatch, TokenSequence, pack

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

DEVICE = "cuda"
VOCABULARY = 512
CONFIG = ModelConfig(
    layers=2, width=128, heads=4, head_dim=64, ffn_width=512, context=256, qk_norm=True, kv_heads=2
)
LENGTHS = [[100, 1, 30, 125], [256], [40, 60]]


def make_batch(seed: int = 0, lengths: list[list[int]] = LENGTHS, T: int = 256) -> TokenBatch:
    """Return a packed batch on the GPU; its document boundaries end in empty documents."""
    rng = np.random.default_rng(seed)

    def sequence(n: int) -> TokenSequence:
        target = (np.arange(n) % 5 == 4).astype(np.float32)
        ids = rng.integers(0, VOCABULARY, n).astype(np.int32)
        return TokenSequence(ids, np.zeros(n, np.uint8), np.zeros(n, np.int16), target)

    rows = [[sequence(n) for n in row] for row in lengths]
    return pack(rows, T, {"<pad>": 0, "<masked>": 1}).to(DEVICE)


def make_model(**changes: object) -> GatoModel:
    """Return a small model on the GPU in which no weight is zero."""
    torch.manual_seed(0)
    model = GatoModel(replace(CONFIG, **changes), VOCABULARY, masked_id=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.to(DEVICE)


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the relative error in norm."""
    return ((got.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize("window", [None, 1, 17])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("head_dim", [32, 64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_flash_equals_the_masked_reference_with_gradients(dtype, head_dim, kv_heads, window):
    batch = make_batch()
    generator = torch.Generator(DEVICE).manual_seed(0)
    shapes = [(batch.inputs.numel(), h, head_dim) for h in (4, kv_heads, kv_heads)]
    inputs = [
        torch.randn(s, device=DEVICE, generator=generator).to(dtype).requires_grad_()
        for s in shapes
    ]
    twins = [x.detach().float().requires_grad_() for x in inputs]
    meta = PackedMeta.build(batch, window, dtype)
    assert meta.mask is None, describe_backend(DEVICE, dtype)
    mask = packed_mask(batch.document.view(batch.rows, batch.row_length), window)
    out = attend_packed(*inputs, meta)
    expected = attend_packed(*twins, replace(meta, mask=mask))
    assert out.dtype == dtype
    assert error(out, expected) < 1e-2
    (out.float() ** 2).sum().backward()
    (expected**2).sum().backward()
    for x, twin in zip(inputs, twins, strict=True):
        assert x.grad.isfinite().all()
        assert error(x.grad, twin.grad) < 2e-2


@torch.no_grad()
def test_the_model_equals_the_cpu():
    model, batch = make_model(), make_batch()
    hidden = model(batch)
    assert error(hidden.cpu(), make_model().cpu()(batch.to("cpu"))) < 1e-4
    with torch.autocast(DEVICE, torch.bfloat16):
        assert error(model(batch), hidden) < 3e-2


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)])
@torch.no_grad()
def test_cached_decoding_equals_the_full_forward(dtype, tolerance):
    model, length = make_model(window=64), 256
    batch = make_batch(lengths=[[length]] * 3, T=length)
    x = model.embed(batch.inputs, batch.local).view(3, length, -1)
    expected = model(batch).view(3, length, -1)
    cache = model.new_cache(3, chunk=16, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    done = torch.zeros(3, dtype=torch.int64)
    with torch.autocast(DEVICE, torch.bfloat16, enabled=dtype == torch.bfloat16):
        while (done < length).any():
            valid = torch.randint(0, 17, (3,), generator=generator).minimum(length - done)
            at = (done[:, None] + torch.arange(16)).clamp(max=length - 1).to(DEVICE)
            rows = torch.arange(3, device=DEVICE)[:, None]
            hidden = model.decode(x[rows, at], cache, valid.to(DEVICE))
            for row, n in enumerate(valid.tolist()):
                if n:
                    start = int(done[row])
                    assert error(hidden[row, :n], expected[row, start : start + n]) < tolerance
            done += valid


@torch.no_grad()
def test_decoding_runs_as_a_cuda_graph():
    model = make_model(window=64)
    x = torch.randn(4, 1, CONFIG.width, device=DEVICE)
    valid = torch.tensor([1, 1, 0, 1], device=DEVICE)
    eager, graphed = model.new_cache(4, chunk=1), model.new_cache(4, chunk=1)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        model.decode(x, graphed, valid)
    torch.cuda.current_stream().wait_stream(stream)
    graphed.reset()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        hidden = model.decode(x, graphed, valid)
    graphed.reset()
    for step in range(100):
        x.normal_(generator=torch.Generator(DEVICE).manual_seed(step))
        graph.replay()
        expected = model.decode(x, eager, valid)
        assert error(hidden[[0, 1, 3]], expected[[0, 1, 3]]) < 1e-4
    assert graphed.lengths.tolist() == [100, 100, 0, 100]


def test_compiled_equals_eager_without_recompiling():
    model = make_model()
    compiled = torch.compile(model, fullgraph=True)
    counters = torch._dynamo.utils.counters
    counters.clear()
    for seed in range(3):
        batch = make_batch(seed)
        gradients = []
        for f in (model, compiled):
            model.zero_grad()
            with torch.autocast(DEVICE, torch.bfloat16):
                f(batch).float().square().mean().backward()
            gradients.append(model.blocks[0].attention.qkv.weight.grad.clone())
        assert error(gradients[1], gradients[0]) < 5e-2
    assert counters["stats"]["unique_graphs"] == 1


def test_a_packed_batch_trains_and_the_loss_falls():
    model = make_model()
    batch = make_batch()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, fused=True)
    losses = []
    for _ in range(3):
        with torch.autocast(DEVICE, torch.bfloat16):
            loss = model.loss(batch).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0]


def test_the_choice_of_kernel_is_described():
    assert any(
        k in describe_backend(DEVICE, torch.bfloat16) for k in ("varlen on", "flash_attn on")
    )
    assert "sdpa on cuda in float32" in describe_backend(DEVICE, torch.float32)
