"""Causal attention: the one file that knows kernels.

`attend_packed` trains on rows of documents packed back to back; a token sees the earlier tokens of
its own document (and, with a window, only the last W of them). `attend_cached` decodes against a
ring of stored keys. Both compute the same function; tests compare every path with a slow twin.

    packed, CUDA in bf16 or fp16    variable-length flash attention: no mask is ever built
    packed, CPU in bf16             plain products: SDPA's CPU kernel is twice as slow in bf16
    packed, anything else           SDPA on (R, T) rows; a mask per batch is shared by all layers
    cached, everywhere              SDPA, mask from stored positions, shapes that never change

Legend: R rows, T tokens in a row, N = R * T, B rows decoded, Q queries per row, S cache slots,
H query heads, G key/value heads, K head width, W window.
"""

import importlib.util
import inspect
import math
import os
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gato.tokenizers.stream import TokenBatch

# In bf16 on a CPU, oneDNN compiles a kernel for every new shape, about 0.7 MB each, and keeps 1024
# of them twice: a run whose batches hold ever other numbers of images and targets then grows by
# gigabytes over its first thousands of steps. Shapes of every step stay among the last 128.
for _cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
    os.environ.setdefault(_cache, "128")

FLASH_DTYPES = (torch.bfloat16, torch.float16)
PRODUCTS_MAX_ROW = 512
"""Longer rows go to SDPA: plain products keep all (R, H, T, T) weights for the backward pass."""


@dataclass(frozen=True, eq=False)
class PackedMeta:
    """What attention must know of one packed batch, worked out once for all layers."""

    rows: int
    row_length: int
    cu_seqlens: Tensor
    """int32 document boundaries in the flat batch, padded with N."""
    window: int | None
    kernel: str
    """The choice of `packed_backend`."""
    mask: Tensor | None
    """(R, 1, T, T) bool, True where a query may look, or float, 0 there and -inf elsewhere; None
    where a flash kernel does without."""

    @classmethod
    def build(cls, batch: TokenBatch, window: int | None, dtype: torch.dtype) -> "PackedMeta":
        """Return the facts of `batch`, with a mask only if the kernel for `dtype` needs one."""
        rows, row_length = int(batch.rows), int(batch.row_length)
        document = batch.document
        mask = None
        kernel = packed_backend(document.device.type, dtype)
        if kernel not in _FLASH:
            mask = packed_mask(document.view(rows, row_length), window)
        if kernel == "products" and row_length <= PRODUCTS_MAX_ROW:
            mask = torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, -math.inf)
        return cls(rows, row_length, batch.cu_seqlens, window, kernel, mask)


def packed_mask(document: Tensor, window: int | None = None) -> Tensor:
    """Return (R, 1, T, T): same document, not in the future, at most W - 1 tokens back.

    For documents a a b and no window, rows are queries:  1 0 0 / 1 1 0 / 0 0 1.
    """
    T = document.shape[1]
    band = torch.ones(T, T, dtype=torch.bool, device=document.device).tril_()
    if window is not None and window < T:
        band &= torch.ones_like(band).triu_(1 - window)
    return ((document[:, :, None] == document[:, None, :]) & band).unsqueeze(1)


def attend_packed(q: Tensor, k: Tensor, v: Tensor, meta: PackedMeta) -> Tensor:
    """Return (N, H, K): attention of each token over its own document's past.

    Args:
        q: (N, H, K).
        k: (N, G, K), G a divisor of H.
        v: (N, G, K).
        meta: the packed batch, from `PackedMeta.build`.
    """
    if meta.mask is None:
        return _FLASH[meta.kernel](q, k, v, meta)
    N, H, K = q.shape
    rows = (meta.rows, meta.row_length)
    q, k, v = (x.view(*rows, -1, K).transpose(1, 2) for x in (q, k, v))  # (R, H or G, T, K)
    kernel = _products if meta.mask.is_floating_point() else _sdpa
    return kernel(q, k, v, meta.mask).transpose(1, 2).reshape(N, H, K)


def attend_cached(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    key_position: Tensor,
    query_position: Tensor,
    window: int,
) -> Tensor:
    """Return (B, Q, H, K): attention of each query over the stored keys of its window.

    Args:
        q: (B, Q, H, K), already rotated.
        k_cache: (B, S, G, K), already rotated, in any order.
        v_cache: (B, S, G, K).
        key_position: (B, S) absolute position of each slot, negative where it holds nothing.
        query_position: (B, Q) absolute positions, negative for queries that are padding.
        window: tokens a query sees, itself included.
    """
    mask = cached_mask(key_position, query_position, window)
    return attend_masked(q, k_cache, v_cache, mask)


def cached_mask(key_position: Tensor, query_position: Tensor, window: int) -> Tensor:
    """Return (B, 1, Q, S), True where a query may look.

    A padding query may look anywhere: its result is never read, but it must stay finite.
    """
    key, query = key_position[:, None, :], query_position[:, :, None]
    mask = (key >= 0) & (key <= query) & (key > query - window)
    return (mask | (query < 0)).unsqueeze(1)


def attend_masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Return (B, Q, H, K) for q (B, Q, H, K), k and v (B, S, G, K), mask (B, 1, Q, S)."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return _sdpa(q, k, v, mask).transpose(1, 2)


def describe_backend(device: torch.device | str, dtype: torch.dtype) -> str:
    """Return one line: the kernel used for training on `device` in `dtype`, and why."""
    kind = torch.device(device).type
    kernel, reason = _choose(kind, dtype)
    name = str(dtype).removeprefix("torch.")
    return f"attention: {kernel} on {kind} in {name} ({reason}); decoding: sdpa over the cache"


@torch.compiler.assume_constant_result
def packed_backend(device_type: str, dtype: torch.dtype) -> str:
    """Return the kernel for packed rows: "varlen", "flash_attn", "products" or "sdpa"."""
    return _choose(device_type, dtype)[0]


@cache
def _choose(device_type: str, dtype: torch.dtype) -> tuple[str, str]:
    if device_type == "cpu" and dtype == torch.bfloat16:
        return "products", "faster than SDPA's CPU kernel in bf16; one mask per batch"
    if device_type != "cuda":
        return "sdpa", "flash kernels need CUDA; one mask per batch"
    if dtype not in FLASH_DTYPES:
        return "sdpa", "flash kernels need bf16 or fp16; one mask per batch"
    if torch.version.hip is None and torch.cuda.get_device_capability() < (8, 0):
        return "sdpa", "flash kernels need compute capability 8.0; one mask per batch"
    if importlib.util.find_spec("torch.nn.attention.varlen") is not None:
        return "varlen", f"torch {torch.__version__} has varlen_attn"
    if importlib.util.find_spec("flash_attn") is not None:
        return "flash_attn", "the flash-attn package is installed"
    return "sdpa", "neither torch's varlen_attn nor flash-attn found; one mask per batch"


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    grouped = k.shape[1] != q.shape[1]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)


def _products(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    repeats = q.shape[1] // k.shape[1]
    if repeats > 1:
        k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)  # (R, H, T, T)
    return scores.add_(bias).softmax(dim=-1) @ v


def _varlen(q: Tensor, k: Tensor, v: Tensor, meta: PackedMeta) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    extra: dict[str, Any] = {}
    if _varlen_accepts("window_size"):  # torch >= 2.11
        extra["window_size"] = (-1 if meta.window is None else meta.window - 1, 0)
    elif meta.window is None:  # torch 2.10
        extra["is_causal"] = True
    else:
        raise ValueError(
            f"a sliding window needs torch 2.11 or later on CUDA; got torch {torch.__version__}. "
            "Upgrade torch or set window to None."
        )
    if k.shape[1] != q.shape[1] and _varlen_accepts("enable_gqa"):
        extra["enable_gqa"] = True
    # One tensor object for both: cuDNN takes a causal window only if it is told so.
    cu, longest = meta.cu_seqlens, meta.row_length
    return varlen_attn(q, k, v, cu, cu, longest, longest, **extra)


def _flash_attn(q: Tensor, k: Tensor, v: Tensor, meta: PackedMeta) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    window = (-1, -1) if meta.window is None else (meta.window - 1, 0)
    cu, longest = meta.cu_seqlens, meta.row_length
    return flash_attn_varlen_func(
        q, k, v, cu, cu, longest, longest, causal=True, window_size=window
    )


@torch.compiler.assume_constant_result
def _varlen_accepts(parameter: str) -> bool:
    from torch.nn.attention.varlen import varlen_attn

    return parameter in inspect.signature(varlen_attn).parameters


_FLASH = {"varlen": _varlen, "flash_attn": _flash_attn}
