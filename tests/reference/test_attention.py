"""Every path of attention equals a slow twin that loops over tokens."""

import sys
from itertools import pairwise
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

from gato import attention, kernels
from gato.attention import PackedMeta, attend_masked, attend_packed, cached_mask

LENGTHS = [[13, 1, 20], [34], [5, 5, 5, 19]]
T = 34


def slow_packed(q, k, v, boundaries, window=None):
    """Return attention computed token by token over each document."""
    q, k, v = q.double(), k.double(), v.double()
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    out = torch.zeros_like(q)
    for start, stop in pairwise(boundaries):
        for i in range(start, stop):
            first = start if window is None else max(start, i - window + 1)
            scores = torch.einsum("hk,thk->ht", q[i], k[first : i + 1]) * q.shape[-1] ** -0.5
            out[i] = torch.einsum("ht,thk->hk", scores.softmax(-1), v[first : i + 1])
    return out


def packed_inputs(dtype, kv_heads=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    N = T * len(LENGTHS)
    shapes = ((N, 4, 16), (N, kv_heads, 16), (N, kv_heads, 16))
    return [torch.randn(s, generator=generator).to(dtype) for s in shapes]


@pytest.mark.parametrize("window", [None, 1, 6, 100])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_packed_equals_the_slow_twin(make_batch, dtype, tolerance, kv_heads, window):
    batch = make_batch(LENGTHS, T)
    q, k, v = packed_inputs(dtype, kv_heads)
    out = attend_packed(q, k, v, PackedMeta.build(batch, window, dtype))
    assert out.dtype == dtype
    expected = slow_packed(q, k, v, batch.cu_seqlens.tolist(), window)
    torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 5e-2)])
def test_gradients_equal_the_slow_twin(make_batch, dtype, tolerance):
    batch = make_batch(LENGTHS, T)
    inputs = [x.requires_grad_() for x in packed_inputs(dtype, kv_heads=2)]
    twins = [x.detach().double().requires_grad_() for x in inputs]
    attend_packed(*inputs, PackedMeta.build(batch, 6, dtype)).square().sum().backward()
    slow_packed(*twins, batch.cu_seqlens.tolist(), 6).square().sum().backward()
    for x, twin in zip(inputs, twins, strict=True):
        error = (x.grad.double() - twin.grad).norm() / twin.grad.norm()
        assert error < tolerance


PADDED = [[13, 1], [34], [5, 5, 5], [2]]
"""Rows with padding at their ends, which is a document too."""


@pytest.fixture
def long_rows(monkeypatch):
    """Let rows of T tokens be long, and no document short."""
    monkeypatch.setattr(kernels, "PRODUCTS_MAX_ROW", T - 1)
    monkeypatch.setattr(kernels, "SHORT", 2)
    kernels.use("auto")  # forget what was chosen before
    yield
    kernels.use("auto")


@pytest.mark.parametrize("window", [None, 1, 6, 100])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize(
    ("dtype", "tolerance", "of_gradients"),
    [(torch.float32, 1e-5, 1e-4), (torch.bfloat16, 3e-2, 5e-2)],
)
@pytest.mark.parametrize("lengths", [LENGTHS, PADDED], ids=["full", "padded"])
def test_documents_of_long_rows_equal_the_slow_twin(
    make_batch, long_rows, lengths, dtype, tolerance, of_gradients, kv_heads, window
):
    batch = make_batch(lengths, T)
    generator = torch.Generator().manual_seed(1)
    N = T * len(lengths)
    inputs = [
        torch.randn(N, heads, 16, generator=generator).to(dtype).requires_grad_()
        for heads in (4, kv_heads, kv_heads)
    ]
    twins = [x.detach().double().requires_grad_() for x in inputs]
    meta = PackedMeta.build(batch, window, dtype)
    assert meta.kernel == "documents"
    assert meta.mask is None
    got = attend_packed(*inputs, meta)
    assert got.dtype == dtype
    expected = slow_packed(*twins, batch.cu_seqlens.tolist(), window)
    torch.testing.assert_close(got.double(), expected, atol=tolerance, rtol=tolerance)
    got.square().sum().backward()
    expected.square().sum().backward()
    for x, twin in zip(inputs, twins, strict=True):
        error = (x.grad.double() - twin.grad).norm() / twin.grad.norm().clamp(min=1.0)
        assert error < of_gradients


def test_many_short_documents_and_compiled_models_take_one_mask(make_batch, long_rows, monkeypatch):
    batch = make_batch(LENGTHS, T)  # eight documents
    for short, compiled, kernel in (
        (12, False, "documents"),
        (13, False, "sdpa"),
        (2, True, "sdpa"),
    ):
        monkeypatch.setattr(kernels, "SHORT", short)
        meta = PackedMeta.build(batch, 6, torch.float32, compiled=compiled)
        assert (meta.kernel, meta.mask is None) == (kernel, kernel == "documents")
    monkeypatch.setattr(kernels, "SHORT", 1000)
    with kernels.using("documents"):
        assert PackedMeta.build(batch, 6, torch.float32).kernel == "documents"


def test_long_rows_in_bf16_use_sdpa(make_batch, monkeypatch):
    monkeypatch.setattr(kernels, "PRODUCTS_MAX_ROW", T - 1)
    kernels.use("auto")  # forget what was chosen before
    batch = make_batch(LENGTHS, T)
    meta = PackedMeta.build(batch, None, torch.bfloat16)
    kernels.use("auto")
    assert meta.mask.dtype == torch.bool
    q, k, v = packed_inputs(torch.bfloat16)
    expected = slow_packed(q, k, v, batch.cu_seqlens.tolist())
    torch.testing.assert_close(
        attend_packed(q, k, v, meta).double(), expected, atol=3e-2, rtol=3e-2
    )


def test_cached_equals_the_slow_twin_whatever_the_order_of_slots():
    generator = torch.Generator().manual_seed(0)
    lengths, queries, slots, window = (9, 4), 3, 14, 5
    q = torch.randn(2, queries, 4, 16, generator=generator)
    k, v = (torch.randn(2, slots, 2, 16, generator=generator) for _ in range(2))
    position = torch.full((2, slots), -1)
    for row, n in enumerate(lengths):
        position[row, torch.randperm(slots, generator=generator)[:n]] = torch.arange(n)
    query_position = torch.tensor([[6, 7, 8], [2, 3, -1]])
    mask = cached_mask(position, query_position, window)
    out = attend_masked(*(x.transpose(1, 2) for x in (q, k, v)), mask).transpose(1, 2)
    for row in range(2):
        for i, p in enumerate(query_position[row].tolist()):
            if p < 0:
                assert out[row, i].isfinite().all()
                continue
            seen = (position[row] >= 0) & (position[row] <= p) & (position[row] > p - window)
            keys, values = (x[row, seen].repeat_interleave(2, dim=1).double() for x in (k, v))
            weight = (torch.einsum("hk,thk->ht", q[row, i].double(), keys) / 4).softmax(-1)
            expected = torch.einsum("ht,thk->hk", weight, values)
            torch.testing.assert_close(out[row, i].double(), expected, atol=1e-5, rtol=1e-5)


def test_padding_queries_always_see_something():
    empty = torch.full((2, 5), -1)
    mask = cached_mask(empty, torch.tensor([[0, -1], [-1, -1]]), 4)
    assert mask.any(dim=-1).tolist() == [[[False, True]], [[True, True]]]


def _document_attention(q, k, v, cu, window, causal):
    assert causal
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    document = torch.bucketize(torch.arange(len(q)), cu.long(), right=True)
    mask = attention.packed_mask(document[None], window)
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)[0].transpose(0, 1)


def varlen_2_10(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
    """Stand for torch 2.10's signature."""
    assert cu_seq_q is cu_seq_k
    return _document_attention(q, k, v, cu_seq_q, None, is_causal)


def varlen_2_11(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
    """Stand for torch 2.11's signature."""
    assert isinstance(window_size, tuple)
    left, right = window_size
    return _document_attention(q, k, v, cu_seq_q, None if left < 0 else left + 1, right == 0)


def varlen_2_13(
    q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size=(-1, -1), enable_gqa=False
):
    """Stand for torch 2.13's signature."""
    assert enable_gqa == (k.shape[1] != q.shape[1])
    return varlen_2_11(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, window_size=window_size)


def flash_varlen(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k, causal=False, window_size=(-1, -1)
):
    """Stand for the flash-attn package's signature."""
    left = window_size[0]
    return _document_attention(q, k, v, cu_seqlens_q, None if left < 0 else left + 1, causal)


@pytest.mark.parametrize("window", [None, 1, 6, 100])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize(
    ("kernel", "module", "name", "function"),
    [
        ("varlen", "torch.nn.attention.varlen", "varlen_attn", varlen_2_10),
        ("varlen", "torch.nn.attention.varlen", "varlen_attn", varlen_2_11),
        ("varlen", "torch.nn.attention.varlen", "varlen_attn", varlen_2_13),
        ("fa3", "torch.nn.attention.varlen", "varlen_attn", varlen_2_13),
        ("cudnn", "torch.nn.attention.varlen", "varlen_attn", varlen_2_13),
        ("flash_attn", "flash_attn", "flash_attn_varlen_func", flash_varlen),
    ],
)
def test_flash_kernels_are_called_as_their_version_wants(
    make_batch, monkeypatch, kernel, module, name, function, kv_heads, window
):
    fake = ModuleType(module)
    setattr(fake, name, function)
    monkeypatch.setitem(sys.modules, module, fake)
    batch = make_batch(LENGTHS, T)
    q, k, v = packed_inputs(torch.float32, kv_heads)
    monkeypatch.setattr(kernels, "chosen", lambda case: (kernel, "for the test"))
    meta = PackedMeta.build(batch, window, torch.bfloat16)
    assert meta.mask is None
    window = None if window == 100 else window  # longer than any row: none at all
    assert meta.window == window
    if function is varlen_2_10 and window is not None:
        with pytest.raises(ValueError, match=r"torch 2\.11"):
            attend_packed(q, k, v, meta)
        return
    expected = slow_packed(q, k, v, batch.cu_seqlens.tolist(), window)
    torch.testing.assert_close(
        attend_packed(q, k, v, meta).double(), expected, atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize(("kernel", "wanted"), [("varlen", "flash"), ("cudnn", "cudnn")])
def test_who_computes_is_pinned_where_torch_can_be_told(make_batch, monkeypatch, kernel, wanted):
    """From torch 2.14 on varlen_attn takes what `sdpa_kernel` allows, cuDNN before flash."""
    allowed: list[str] = []

    def varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, *, window_size=(-1, -1), enable_gqa=False):
        found = {
            "flash": torch.backends.cuda.flash_sdp_enabled(),
            "cudnn": torch.backends.cuda.cudnn_sdp_enabled(),
        }
        allowed.extend(name for name, enabled in found.items() if enabled)
        return q

    fake = ModuleType("torch.nn.attention.varlen")
    fake.varlen_attn = varlen_attn
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", fake)
    monkeypatch.setattr(kernels, "chosen", lambda case: (kernel, "for the test"))
    batch = make_batch(LENGTHS, T)
    meta = PackedMeta.build(batch, None, torch.bfloat16)
    for can_be_told in (False, True):
        monkeypatch.setattr(kernels, "honours_sdpa_kernel", lambda told=can_be_told: told)
        attend_packed(*packed_inputs(torch.bfloat16), meta)
    assert sorted(allowed[:2]) == ["cudnn", "flash"], "left as it is where it cannot be told"
    assert allowed[2:] == [wanted]
