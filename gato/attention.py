"""Causal attention: the one file that calls kernels; `kernels.py` chooses among them.

`attend_packed` trains on rows of documents packed back to back; a token sees the earlier tokens of
its own document (and, with a window, only the last W of them). `attend_masked` decodes against a
ring of stored keys, by `cached_mask`. Both compute the same function; tests compare every path with
a slow twin.

    packed, CUDA in bf16 or fp16    variable-length flash attention: no mask is ever built
    packed, CPU, long rows          SDPA in each document alone: the pairs that no mask has to hide
    packed, CPU in bf16             plain products: SDPA's CPU kernel is twice as slow in bf16
    packed, anything else           SDPA on (R, T) rows; a mask per batch is shared by all layers
    cached, everywhere              SDPA, mask from stored positions; on a GPU, of few shapes

Legend: R rows, T tokens in a row, N = R * T, B rows decoded, Q queries per row, S cache slots,
H query heads, G key/value heads, K head width, W window.
"""

import contextlib
import inspect
import math
import os
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gato import kernels
from gato.tokenizers.stream import TokenBatch

# In bf16 on a CPU, oneDNN compiles a kernel for every new shape, about 0.7 MB each, and keeps 1024
# of them twice: a run whose batches hold ever other numbers of images and targets then grows by
# gigabytes over its first thousands of steps. Shapes of every step stay among the last 128.
for _cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
    os.environ.setdefault(_cache, "128")

FEW = 4
"""Queries of one head at which heads of a group are laid side by side on a CPU."""


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
    where a kernel does without."""
    bounds: tuple[int, ...] = ()
    """Where documents begin and the last ends, if they are attended one after another."""
    band: Tensor | None = None
    """(n, n) bool for the longest of them, where the window is shorter."""

    @classmethod
    def build(
        cls,
        batch: TokenBatch,
        window: int | None,
        dtype: torch.dtype,
        head_dim: int | None = None,
        compiled: bool = False,
    ) -> "PackedMeta":
        """Return the facts of `batch`, with a mask only if the kernel for `dtype` needs one.

        Args:
            batch: of tensors.
            window: tokens that one sees, itself included; None for all of a document.
            dtype: that attention is computed in.
            head_dim: width of one head.
            compiled: whether what attends is, and wants nothing that differs from batch to batch.
        """
        rows, row_length = int(batch.rows), int(batch.row_length)
        if window is not None and window >= row_length:
            window = None  # no document is longer, and kernels are faster without
        document = batch.document
        mask = None
        kernel = packed_backend(document.device.type, dtype, row_length, head_dim)
        if kernel == "documents":
            bounds = () if compiled else _bounds(batch.cu_seqlens)
            if bounds:
                longest = max(stop - start for start, stop in pairwise(bounds))
                band = None if window is None or longest <= window else _band(longest, window)
                facts = (rows, row_length, batch.cu_seqlens, window, kernel)
                return cls(*facts, mask=None, bounds=bounds, band=band)
            kernel = "sdpa"
        if kernel not in kernels.FLASH:
            mask = packed_mask(document.view(rows, row_length), window)
            if kernel == "products":
                mask = torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, -math.inf)
        return cls(rows, row_length, batch.cu_seqlens, window, kernel, mask)


def packed_mask(document: Tensor, window: int | None = None) -> Tensor:
    """Return (R, 1, T, T): same document, not in the future, at most W - 1 tokens back.

    For documents a a b and no window, rows are queries:  1 0 0 / 1 1 0 / 0 0 1.
    """
    band = _band(document.shape[1], window, document.device)
    return ((document[:, :, None] == document[:, None, :]) & band).unsqueeze(1)


def _band(n: int, window: int | None, device: torch.device | None = None) -> Tensor:
    """Return (n, n) bool: not in the future, at most W - 1 tokens back."""
    band = torch.ones(n, n, dtype=torch.bool, device=device).tril_()
    if window is not None and window < n:
        band &= torch.ones_like(band).triu_(1 - window)
    return band


def _bounds(cu_seqlens: Tensor) -> tuple[int, ...]:
    """Return where documents begin and the last ends; () where they are many and short."""
    if torch.compiler.is_compiling():
        return ()
    bounds = tuple(dict.fromkeys(cu_seqlens.tolist()))
    short = bounds[-1] < kernels.SHORT * (len(bounds) - 1)
    return () if short and not kernels.asked_for("documents") else bounds


def attend_packed(q: Tensor, k: Tensor, v: Tensor, meta: PackedMeta) -> Tensor:
    """Return (N, H, K): attention of each token over its own document's past.

    Args:
        q: (N, H, K).
        k: (N, G, K), G a divisor of H.
        v: (N, G, K).
        meta: the packed batch, from `PackedMeta.build`.
    """
    if meta.bounds:
        return _documents(q, k, v, meta)
    if meta.mask is None:
        flash = _flash_attn if meta.kernel == "flash_attn" else _varlen
        return flash(q, k, v, meta)
    N, H, K = q.shape
    rows = (meta.rows, meta.row_length)
    q, k, v = (x.view(*rows, -1, K).transpose(1, 2) for x in (q, k, v))  # (R, H or G, T, K)
    kernel = _products if meta.mask.is_floating_point() else _sdpa
    return kernel(q, k, v, meta.mask).transpose(1, 2).reshape(N, H, K)


def cached_mask(key_position: Tensor, query_position: Tensor, window: int) -> Tensor:
    """Return (B, 1, Q, S), True where a query may look.

    A padding query may look anywhere: its result is never read, but it must stay finite.

    Args:
        key_position: (B, S) absolute position of each slot, negative where it holds nothing.
        query_position: (B, Q) absolute positions, negative for queries that are padding.
        window: tokens a query sees, itself included.
    """
    key, query = key_position[:, None, :], query_position[:, :, None]
    mask = (key >= 0) & (key <= query) & (key > query - window)
    return (mask | (query < 0)).unsqueeze(1)


def attend_masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Return (B, H, Q, K) for q (B, H, Q, K), k and v (B, G, S, K), mask (B, 1, Q, S).

    Queries and keys are rotated already, and keys lie in any order. The mask is that of
    `cached_mask`, or 0 where that is True and -inf elsewhere.
    """
    return _sdpa(q, k, v, mask)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def packed_backend(
    device_type: str,
    dtype: torch.dtype,
    row_length: int | None = None,
    head_dim: int | None = None,
) -> str:
    """Return the kernel for packed rows, a name of `kernels.py`."""
    return kernels.chosen(kernels.Case(device_type, dtype, row_length, head_dim))[0]


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Return (B, H, Q, K) for k and v (B, G, S, K), mask (B, 1, Q, S).

    Heads that share keys are queries side by side, whose keys are then read once: for one query of
    four heads each 0.6 of the time in fp32 on a CPU and 0.15 in bf16, and on CUDA with a mask only
    the slowest of SDPA's kernels would know groups.
    """
    B, H, Q, K = q.shape
    G = k.shape[1]
    if G < H and (q.is_cuda or Q <= FEW):
        q, mask = q.reshape(B, G, H // G * Q, K), mask.repeat(1, 1, H // G, 1)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).reshape(B, H, Q, K)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=G < H)


def _products(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    repeats = q.shape[1] // k.shape[1]
    if repeats > 1:
        k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)  # (R, H, T, T)
    return scores.add_(bias).softmax(dim=-1) @ v


def _documents(q: Tensor, k: Tensor, v: Tensor, meta: PackedMeta) -> Tensor:
    """Attend within one document after another: 1.3 to 7 times as fast as under a mask."""
    found, grouped = [], k.shape[1] < q.shape[1]
    for start, stop in pairwise(meta.bounds):
        a, b, c = (x[start:stop].transpose(0, 1)[None] for x in (q, k, v))  # (1, H or G, n, K)
        mask = None
        if meta.band is not None and meta.window is not None and stop - start > meta.window:
            mask = meta.band[: stop - start, : stop - start]
        out = F.scaled_dot_product_attention(
            a, b, c, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped
        )
        found.append(out[0].transpose(0, 1))
    return torch.cat(found)


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
    with _by(meta.kernel):
        out: Any = varlen_attn(q, k, v, cu, cu, longest, longest, **extra)
        return out


def _by(kernel: str) -> contextlib.AbstractContextManager[None]:
    """Say who computes: from torch 2.14 on cuDNN would, which some cards run at a fifth."""
    if not kernels.honours_sdpa_kernel():
        return contextlib.nullcontext()
    from torch.nn.attention import SDPBackend, sdpa_kernel

    cudnn = kernel == "cudnn"
    return sdpa_kernel(SDPBackend.CUDNN_ATTENTION if cudnn else SDPBackend.FLASH_ATTENTION)


def _flash_attn(q: Tensor, k: Tensor, v: Tensor, meta: PackedMeta) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    window = (-1, -1) if meta.window is None else (meta.window - 1, 0)
    cu, longest = meta.cu_seqlens, meta.row_length
    return flash_attn_varlen_func(
        q, k, v, cu, cu, longest, longest, causal=True, window_size=window
    )


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _varlen_accepts(parameter: str) -> bool:
    from torch.nn.attention.varlen import varlen_attn

    return parameter in inspect.signature(varlen_attn).parameters
