"""`gato bench attention`: every kernel that this machine has, beside SDPA with a mask.

    packed   rows of documents of random lengths, forward and forward with backward; GFLOP/s of the
             pairs of tokens that see each other, whatever a kernel computes besides
    cached   one step of decoding, all rows looking at a full ring; GB/s of keys and values

The floor counts two products forward and four backward, or every byte once. Each kernel's result
is held against the same in float32: one that is wrong is no result. Those that cannot be had here
are named with the reason.

Legend: R rows, T tokens in a row, N = R * T, B rows decoded, Q queries per row, S cache slots,
H query heads, G key/value heads, K head width.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gato import kernels
from gato.attention import PackedMeta, attend_masked, attend_packed, cached_mask
from gato.bench_common import Result, calls_that_last, in_turns, result
from gato.bench_machine import device, floor_seconds
from gato.telling import tell
from gato.tokenizers.stream import TokenBatch, TokenSequence, pack

ALONE, DENSE = "SDPA, each document on its own", "SDPA, every row one document"
"""What SDPA with a mask is measured beside, on a CPU and on a GPU: there, attending hundreds of
documents one after another would measure how fast Python launches kernels."""
CUDNN = "sdpa by cuDNN"


@dataclass(frozen=True)
class Packed:
    """The shapes of one batch of documents."""

    name: str
    rows: int
    length: int
    heads: int
    kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class Ring:
    """The shapes of one step of decoding."""

    name: str
    rows: int
    slots: int
    heads: int
    kv_heads: int
    head_dim: int
    queries: int = 1


CPU_PACKED = (
    Packed("8 x 256, 2 heads of 64", 8, 256, 2, 2, 64),
    Packed("1 x 1024, 24 heads of 32", 1, 1024, 24, 24, 32),
)
CPU_RINGS = (Ring("16 rows x 256, 2 heads of 64", 16, 256, 2, 2, 64),)
GPU_PACKED = (
    Packed("64 x 1024, 24 heads of 32", 64, 1024, 24, 24, 32),
    Packed("64 x 1024, 12 heads of 128", 64, 1024, 12, 12, 128),
    Packed("64 x 1024, 16 heads of 128, 4 of keys", 64, 1024, 16, 4, 128),
)
GPU_RINGS = (
    Ring("32 rows x 1024, 24 heads of 32", 32, 1024, 24, 24, 32),
    Ring("256 rows x 1024, 24 heads of 32", 256, 1024, 24, 24, 32),
    Ring("256 rows x 1024, 16 heads of 128, 4 of keys", 256, 1024, 16, 4, 128),
)
LEAST = 0.03
"""Seconds of a repeat."""
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 1e-2}


def attention_bench(repeats: int) -> list[Result]:
    """Return how fast attention is computed, packed and cached; see the head of this file."""
    on = device()
    gpu = on.type == "cuda"
    results = []
    for shape in GPU_PACKED if gpu else CPU_PACKED:
        for dtype in (torch.bfloat16,) if gpu else (torch.float32, torch.bfloat16):
            results += _packed(shape, dtype, on, repeats)
    for ring in GPU_RINGS if gpu else CPU_RINGS:
        results.append(_cached(ring, torch.bfloat16 if gpu else torch.float32, on, repeats))
    return results


# ---- packed documents ------------------------------------------------------------------------


def _packed(shape: Packed, dtype: torch.dtype, on: torch.device, repeats: int) -> list[Result]:
    lengths = documents(shape.rows, shape.length)
    batch = _batch(lengths, shape.length).to(on)
    q, k, v = _noise(shape, batch.inputs.numel(), dtype, on)
    oracle = _attend(q.float(), k.float(), v.float(), _masked(batch, torch.float32))
    ways = _kernels(batch, shape, dtype)
    for name, meta in list(ways.items()):
        with _computing(name, shape, batch, dtype):
            try:
                error = _error(_attend(q, k, v, meta), oracle)
                _run(q, k, v, meta, backward=True)
            except RuntimeError as failure:
                if name != CUDNN:  # the others were asked whether they can
                    raise
                tell(f"{shape.name}, {str(dtype)[6:]}: no {name}: {failure}")
                del ways[name]
                continue
        if not error < TOLERANCE[dtype]:
            raise RuntimeError(f"attention by {name} is wrong: error {error:.2g} on {shape.name}")
    results = []
    for backward in (False, True):
        works = {name: partial(_run, q, k, v, meta, backward) for name, meta in ways.items()}
        if on.type == "cuda":
            works[DENSE] = partial(_dense, shape, q, k, v, backward)
        else:
            works[ALONE] = partial(_one_by_one, lengths, shape, q, k, v, backward)
        calls = calls_that_last(works["sdpa"], on, LEAST)
        times: dict[str, list[float]] = {name: [] for name in works}
        for _ in range(repeats):
            for name, work in works.items():
                with _computing(name, shape, batch, dtype):
                    times[name] += in_turns(1, work, device=on, calls=calls, clock=_clock())[0]
        results += _results(shape, dtype, on, lengths, times, backward)
    return results


def _clock() -> Callable[[], float]:
    """Return the clock that other processes disturb least."""
    return time.process_time if torch.get_num_threads() == 1 else time.perf_counter


def documents(rows: int, length: int, seed: int = 0) -> list[list[int]]:
    """Return the documents' lengths in every row, which they fill: sixteenths of it, 1 to 8.

    They are few because oneDNN makes a kernel for every length, where each is attended alone.
    """
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(rows):
        row: list[int] = []
        while sum(row) < length:
            row.append(min(length // 16 * int(rng.integers(1, 9)), length - sum(row)))
        found.append(row)
    return found


def _batch(lengths: list[list[int]], length: int) -> TokenBatch:
    def sequence(n: int) -> TokenSequence:
        ids, modality = np.zeros(n, np.int32), np.zeros(n, np.uint8)
        return TokenSequence(ids, modality, np.zeros(n, np.int16), np.zeros(n, np.float32))

    rows = [[sequence(n) for n in row] for row in lengths]
    return pack(rows, length, {"<pad>": 0, "<masked>": 1})


def _noise(
    shape: Packed, tokens: int, dtype: torch.dtype, on: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator(on).manual_seed(0)

    def one(heads: int) -> Tensor:
        size = (tokens, heads, shape.head_dim)
        return torch.randn(size, device=on, generator=generator).to(dtype).requires_grad_()

    return one(shape.heads), one(shape.kv_heads), one(shape.kv_heads)


def _masked(batch: TokenBatch, dtype: torch.dtype) -> PackedMeta:
    """Return the facts of a batch for SDPA with a mask."""
    with kernels.using("sdpa"):
        return PackedMeta.build(batch, None, dtype)


def _kernels(batch: TokenBatch, shape: Packed, dtype: torch.dtype) -> dict[str, PackedMeta]:
    """Return the kernels that can be had, the one to compare with first; tell of the others."""
    found, refused = {"sdpa": _masked(batch, dtype)}, dict[str, list[str]]()
    for name in kernels.NAMES:
        if name in ("auto", "sdpa"):
            continue
        try:
            with kernels.using(name):
                found[name] = PackedMeta.build(batch, None, dtype, shape.head_dim)
        except ValueError as error:
            reason = str(error).partition(": ")[2].partition(". ")[0]
            refused.setdefault(reason, []).append(name)
    for reason, names in refused.items():
        tell(f"{shape.name}, {str(dtype)[6:]}: no {', '.join(names)}: {reason}")
    if batch.document.device.type == "cuda":
        found[CUDNN] = found["sdpa"]
    return found


@contextlib.contextmanager
def _computing(name: str, shape: Packed, batch: TokenBatch, dtype: torch.dtype) -> Iterator[None]:
    """Let the kernel `name` compute for as long as this lasts."""
    if name == CUDNN:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            yield
        return
    with kernels.using(name if name in kernels.NAMES else "auto"):
        kind = batch.document.device.type
        kernels.chosen(kernels.Case(kind, dtype, shape.length, shape.head_dim))  # activates it
        yield


def _attend(q: Tensor, k: Tensor, v: Tensor, meta: PackedMeta) -> Tensor:
    with torch.no_grad():
        return attend_packed(q, k, v, meta)


def _error(got: Tensor, expected: Tensor) -> float:
    difference = (got.double() - expected.double()).norm() / expected.double().norm()
    return float(difference)


def _run(q: Tensor, k: Tensor, v: Tensor, meta: PackedMeta, backward: bool) -> None:
    with torch.set_grad_enabled(backward):
        out = attend_packed(q, k, v, meta)
        if backward:
            torch.autograd.grad(out, (q, k, v), out)


def _one_by_one(
    lengths: list[list[int]], shape: Packed, q: Tensor, k: Tensor, v: Tensor, backward: bool
) -> None:
    """Attend within each document on its own, without a mask: nothing is packed."""
    sizes = [n for row in lengths for n in row]
    grouped = shape.heads != shape.kv_heads
    with torch.set_grad_enabled(backward):
        parts, start = [], 0
        for n in sizes:
            a, b, c = (x[start : start + n].transpose(0, 1)[None] for x in (q, k, v))
            one = F.scaled_dot_product_attention(a, b, c, is_causal=True, enable_gqa=grouped)
            parts.append(one[0].transpose(0, 1))
            start += n
        out = torch.cat(parts)
        if backward:
            torch.autograd.grad(out, (q, k, v), out)


def _dense(shape: Packed, q: Tensor, k: Tensor, v: Tensor, backward: bool) -> None:
    """Attend within each row as if it were one document: no mask, and more pairs."""
    grouped = shape.heads != shape.kv_heads
    with torch.set_grad_enabled(backward):
        size = (shape.rows, shape.length, -1, shape.head_dim)
        a, b, c = (x.view(size).transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(a, b, c, is_causal=True, enable_gqa=grouped)
        if backward:
            torch.autograd.grad(out, (q, k, v), out)


def _results(
    shape: Packed,
    dtype: torch.dtype,
    on: torch.device,
    lengths: list[list[int]],
    times: dict[str, list[float]],
    backward: bool,
) -> list[Result]:
    operations, moved = costs(shape, lengths, dtype, backward)
    unit, scale = ("TFLOP/s", 1e12) if on.type == "cuda" else ("GFLOP/s", 1e9)
    rates = {name: [operations / t / scale for t in taken] for name, taken in times.items()}
    floor = operations / floor_seconds(on, dtype, operations, moved) / scale
    bare = DENSE if DENSE in rates else ALONE
    what = "forward and backward" if backward else "forward"
    return [
        result(
            f"attention: {shape.name}, {str(dtype)[6:]}, {what}: {name}",
            rate,
            unit,
            rates[bare if name == "sdpa" else "sdpa"],
            bare if name == "sdpa" else "SDPA with a mask",
            floor=floor,
            floor_from=f"{operations / 1e9:.3g} G operations, {moved / 1e6:.3g} MB",
        )
        for name, rate in rates.items()
        if name != bare
    ]


def costs(
    shape: Packed, lengths: list[list[int]], dtype: torch.dtype, backward: bool
) -> tuple[float, float]:
    """Return the operations and bytes that attention of these documents cannot do without.

    Two products of every pair of tokens forward; backward four more, of the gradients of queries,
    keys, values and weights. All tensors are read or written once.
    """
    pairs = sum(n * (n + 1) // 2 for row in lengths for n in row)
    operations = 4.0 * pairs * shape.heads * shape.head_dim
    tokens, size = shape.rows * shape.length, dtype.itemsize
    moved = 2.0 * tokens * (shape.heads + shape.kv_heads) * shape.head_dim * size
    return (3 * operations, 3 * moved) if backward else (operations, moved)


# ---- the ring --------------------------------------------------------------------------------


def _cached(shape: Ring, dtype: torch.dtype, on: torch.device, repeats: int) -> Result:
    generator = torch.Generator(on).manual_seed(0)
    size = (shape.rows, shape.kv_heads, shape.slots, shape.head_dim)
    keys, values = (torch.randn(size, device=on, generator=generator).to(dtype) for _ in range(2))
    queries = (shape.rows, shape.heads, shape.queries, shape.head_dim)
    q = torch.randn(queries, device=on, generator=generator).to(dtype)
    mask = _ring_mask(shape, dtype, on)
    grouped = shape.heads != shape.kv_heads

    @torch.inference_mode()
    def bare() -> None:
        F.scaled_dot_product_attention(q, keys, values, enable_gqa=grouped)

    ours = torch.inference_mode()(partial(attend_masked, q, keys, values, mask))
    calls = calls_that_last(ours, on, LEAST)
    times = in_turns(repeats, ours, bare, device=on, calls=calls, clock=_clock())
    moved = 2.0 * keys.numel() * dtype.itemsize
    operations = 4.0 * shape.rows * shape.queries * shape.heads * shape.slots * shape.head_dim
    rates, plain = ([moved / t / 1e9 for t in taken] for taken in times)
    return result(
        f"attention: {shape.name}, {str(dtype)[6:]}: cached",
        rates,
        "GB/s",
        plain,
        "SDPA over the same keys, without a mask",
        floor=moved / floor_seconds(on, dtype, operations, moved) / 1e9,
        floor_from=f"{moved / 1e6:.3g} MB of keys and values",
    )


def _ring_mask(shape: Ring, dtype: torch.dtype, on: torch.device) -> Tensor:
    """Return (B, 1, Q, S): 0 where a query may look, -inf where a token has left the window."""
    slot = torch.arange(shape.slots, device=on)
    seen = shape.slots * 3 // 2  # tokens so far: the ring has gone round once and a half
    position = slot + shape.slots * (slot < seen - shape.slots)
    query = torch.arange(seen - shape.queries, seen, device=on)
    window = shape.slots - shape.queries
    look = cached_mask(position.expand(shape.rows, -1), query.expand(shape.rows, -1), window)
    mask = torch.zeros(look.shape, dtype=dtype, device=on)
    return mask.masked_fill_(~look, -math.inf)
