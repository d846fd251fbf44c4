"""Every kernel that can be had equals the masked reference in float32, with its gradients."""

from __future__ import annotations

import pytest
import torch

from gato import kernels
from gato.attention import (
    PackedMeta,
    attend_masked,
    attend_packed,
    cached_mask,
    packed_mask,
)
from gato.kernels import Case

ROW = {"cuda": 256, "cpu": 64}
TOLERANCE = {torch.bfloat16: (1e-2, 2e-2), torch.float16: (2e-3, 4e-3), torch.float32: (1e-5, 1e-5)}
"""Of the result and of the gradients, in norm."""
DTYPES = {"cuda": tuple(TOLERANCE), "cpu": (torch.bfloat16, torch.float32)}


def drawn(device, dtype, tokens, heads, kv_heads, head_dim):
    """Return queries, keys and values whose numbers the devices share, and float32 twins."""
    generator = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(tokens, h, head_dim, generator=generator).to(device, dtype).requires_grad_()
        for h in (heads, kv_heads, kv_heads)
    ]
    return inputs, [x.detach().float().requires_grad_() for x in inputs]


@pytest.mark.parametrize("window", [None, 1, 17, 300])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("head_dim", [32, 64, 128])
def test_every_kernel_equals_the_masked_reference_with_gradients(
    device, make_batch, at_hand, error, head_dim, kv_heads, window
):
    batch = make_batch()
    mask = packed_mask(batch.document.view(batch.rows, batch.row_length), window)
    reference = PackedMeta(batch.rows, batch.row_length, batch.cu_seqlens, window, "sdpa", mask)
    for dtype in DTYPES[device]:
        tokens = batch.inputs.numel()
        inputs, twins = drawn(device, dtype, tokens, 4, kv_heads, head_dim)
        expected = attend_packed(*twins, reference)
        (expected**2).sum().backward()
        largest = max(twin.grad.norm().item() for twin in twins)
        for name in ("auto", *at_hand(dtype, head_dim)):
            with kernels.using(name):
                meta = PackedMeta.build(batch, window, dtype, head_dim)
                out = attend_packed(*inputs, meta)
            assert name in ("auto", meta.kernel)
            assert (meta.mask is None) == (meta.kernel in (*kernels.FLASH, "documents"))
            assert out.dtype == dtype
            forward, backward = TOLERANCE[dtype]
            assert error(out, expected) < forward, (name, dtype)
            (out.float() ** 2).sum().backward()
            for x, twin in zip(inputs, twins, strict=True):
                if window == 1 and twin is not twins[2]:  # the only weight is 1, whatever q and k
                    assert x.grad.norm() < 3 * backward * largest, (name, dtype)
                else:
                    assert error(x.grad, twin.grad) < backward, (name, dtype)
                x.grad = None


def test_a_flash_kernel_is_taken_where_there_is_a_gpu(device, at_hand):
    for dtype in (torch.bfloat16, torch.float16):
        kernel, why = kernels.chosen(Case(device, dtype, 1024, 64))
        if device == "cuda":
            assert kernel in kernels.FLASH, why
            assert kernel in at_hand(dtype)
        else:
            assert kernel not in kernels.FLASH
    long_rows, _ = kernels.chosen(Case(device, torch.float32, 1024, 64))
    assert long_rows == ("sdpa" if device == "cuda" else "documents")
    assert f"sdpa on {device} in float32" in kernels.describe(device, torch.float32)


@pytest.mark.parametrize("documents", ["one", "two", "ever so many"])
def test_documents_of_all_lengths(device, make_batch, error, documents):
    T, dtype = ROW[device], torch.bfloat16
    singles = T - T // 5
    lengths = {"one": [T], "two": [T - 1, 1], "ever so many": [1] * singles}[documents]
    batch = make_batch(0, [lengths] * 2)
    inputs, twins = drawn(device, dtype, 2 * T, 4, 2, 64)
    out = attend_packed(*inputs, PackedMeta.build(batch, None, dtype, 64))
    meta = PackedMeta.build(batch, None, torch.float32, 64)
    assert error(out, attend_packed(*twins, meta)) < 1e-2
    if documents == "ever so many":  # a token that sees itself alone is its own value
        values = inputs[2][:singles].repeat_interleave(2, dim=1)
        torch.testing.assert_close(out[:singles], values)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@torch.no_grad()
def test_cached_attention_equals_packed(device, make_batch, error, kv_heads):
    """The last tokens of every row of a batch, by a cache whose slots lie in any order."""
    T, window, last = ROW[device], 40, 5
    batch = make_batch(0, [[T]] * 3)
    order = torch.randperm(T, generator=torch.Generator().manual_seed(0)).to(device)
    position = order.expand(3, T)
    asked = torch.arange(T - last, T, device=device).expand(3, last)
    for dtype in DTYPES[device]:
        inputs, twins = drawn(device, dtype, 3 * T, 4, kv_heads, 64)
        expected = attend_packed(*twins, PackedMeta.build(batch, window, torch.float32, 64))
        q, k, v = (x.view(3, T, -1, 64) for x in inputs)
        given = (x.transpose(1, 2) for x in (q[:, -last:], k[:, order], v[:, order]))
        got = attend_masked(*given, cached_mask(position, asked, window)).transpose(1, 2)
        assert error(got, expected.view(3, T, 4, 64)[:, -last:]) < TOLERANCE[dtype][0], dtype


def test_a_batch_twice_is_the_same_to_the_bit(device, make_batch):
    batch, dtype = make_batch(), torch.bfloat16
    inputs, _ = drawn(device, dtype, batch.inputs.numel(), 4, 2, 64)
    meta = PackedMeta.build(batch, None, dtype, 64)
    assert torch.equal(attend_packed(*inputs, meta), attend_packed(*inputs, meta))
