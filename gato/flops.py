"""Model FLOPs of a step, and the share of the device's peak that they come to (MFU).

Counted are products of matrices, two operations for each multiplication and addition, forward and
twice as much backward (PaLM, Chowdhery et al. 2022, arXiv 2204.02311, appendix B), of what the
mathematics needs, not of what a kernel does:

    blocks      3 * 2 * (weights of the blocks' matrices) per token
    attention   3 * 4 * layers * heads * head width per pair of a query and a key that it sees
    logits      3 * 2 * width * vocabulary per target; of joint targets, as many as their kind has
                ids, and the weights of the layer that makes their states
    embedders   3 times what their forward pass was counted to do per payload row

A token sees the earlier tokens of its own document (n (n + 1) / 2 pairs of n tokens), within the
window if there is one; padding at a row's end is counted as what it is, documents of its own. Not
counted: table look-ups, norms, activations, the optimizer, anything computed twice.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from gato.model import GatoModel
from gato.tokenizers.stream import TokenBatch

PEAKS = {
    "H100 PCIe": 1513e12 / 2,
    "H100 NVL": 1671e12 / 2,
    "H200 NVL": 1671e12 / 2,
    "H100": 1979e12 / 2,
    "H200": 1979e12 / 2,
    "A100": 312e12,
}
"""Dense bf16 FLOP/s by a part of the device's name, the first that fits: what NVIDIA's data sheets
tell, of Hopper with sparsity, which is twice as much.

A name that says no more is that of an SXM module.
"""

SHOTS, PATIENCE = 100, 0.3
"""Most tries at what a device can do at best, and the seconds that they may take together."""

_SAMPLE = 1024  # payload rows that an embedder is counted on, or a few images more


class FlopCounter:
    """Counts the model FLOPs of batches; embedders are counted on the first rows they meet."""

    def __init__(self, model: GatoModel) -> None:
        """Count what a token and a target cost."""
        c = model.config
        matrices = [p for p in model.blocks.parameters() if p.ndim == 2]
        self.per_token = 6 * sum(p.numel() for p in matrices)
        self.per_pair = 12 * c.layers * c.heads * c.head_dim
        self.per_target = 6 * c.width * model.vocabulary_size
        head = [] if model.joint is None else [p.numel() for p in model.joint.ffn.parameters()]
        self.per_joint = {
            kind: 6 * (c.width * (stop - start) + sum(head))
            for kind, (start, stop) in model.spans.items()
        }
        self.window = c.window
        self.per_row: dict[str, float] = {}
        self._nets, self._device = model.nets, model.table.weight.device

    def of(self, batch: TokenBatch) -> float:
        """Return the model FLOPs of training on a batch of arrays, as it was drawn."""
        total = float(self.per_token * len(batch.inputs))
        total += self.per_pair * pairs(batch.cu_seqlens, self.window)
        total += self.per_target * (len(batch.target_at) - sum(n for _, n in batch.joint))
        total += sum(self.per_joint[kind] * n for kind, n in batch.joint)
        for name, rows in batch.payload.items():
            if name not in self.per_row:
                self.per_row[name] = 3 * self._counted(name, rows)
            total += self.per_row[name] * len(rows["at"])
        return total

    def _counted(self, name: str, rows: Mapping[str, np.ndarray]) -> float:
        """Return the FLOPs of an embedder's forward pass per row."""
        n = _whole(rows, _SAMPLE)
        net: nn.Module = self._nets[name]
        some = {
            k: v[:n] if k.startswith("host_") else torch.from_numpy(v[:n]).to(self._device)
            for k, v in rows.items()
        }
        training = net.training
        devices = [self._device] if self._device.type == "cuda" else []
        try:
            net.eval()  # which computes no rows of padding
            with (
                torch.no_grad(),
                torch.random.fork_rng(devices),
                FlopCounterMode(display=False) as counter,
            ):
                net.forward(some)  # also where a call is compiled
        finally:
            net.train(training)
        return float(counter.get_total_flops()) / n


def _whole(rows: Mapping[str, Any], most: int) -> int:
    """Return the first number of rows from `most` on at which no image is cut apart."""
    if "host_size" not in rows:
        return min(most, len(rows["at"]))
    sizes, n = rows["host_size"], 0
    while n < min(most, len(sizes)):
        n += int(sizes[n][0]) * int(sizes[n][1])
    return n


def pairs(cu_seqlens: np.ndarray, window: int | None = None) -> int:
    """Return how many keys all queries of a packed batch see together."""
    n: np.ndarray = np.diff(np.asarray(cu_seqlens, np.int64))
    inside: np.ndarray = n if window is None else np.minimum(n, window)
    return int((inside * (inside + 1) // 2 + (n - inside) * inside).sum())


def peak(device: torch.device, dtype: torch.dtype) -> float | None:
    """Return the FLOP/s that a device can do at best, None where nobody knows.

    That of a GPU in bf16 is what its data sheet says, that of a CPU is measured, on the threads
    that there are.
    """
    if device.type == "cpu":
        return measured(dtype, torch.get_num_threads())
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return None
    return by_name(torch.cuda.get_device_name(device))


def by_name(device: str) -> float | None:
    """Return the peak of a GPU of this name."""
    return next((peak for name, peak in PEAKS.items() if name in device), None)


@functools.cache
def measured(dtype: torch.dtype, threads: int) -> float:
    """Return the FLOP/s of so many threads of this CPU at their best.

    That is the fastest matrix product of a few sizes on one thread, by its CPU time, times the
    threads: other processes take nothing from it, however busy the machine is.
    """
    best, before = 0.0, torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for n in (512, 768):
            a, b = (torch.ones(n, n, dtype=dtype) for _ in range(2))
            work = functools.partial(torch.mm, a, b, out=torch.empty(n, n, dtype=dtype))
            best = max(best, 2 * n**3 / shortest(functools.partial(thread_seconds, work)))
    finally:
        torch.set_num_threads(before)
    return threads * best


def thread_seconds(work: Callable[[], Any]) -> float:
    """Return the CPU time that this thread takes to do the work."""
    begun = time.thread_time()
    work()
    return time.thread_time() - begun


def shortest(shot: Callable[[], float]) -> float:
    """Return the least of what many calls return, within `PATIENCE`; the first one warms up."""
    shot()
    best, begun = shot(), time.perf_counter()
    for _ in range(SHOTS):
        best = min(best, shot())
        if time.perf_counter() - begun > PATIENCE:
            break
    return best
