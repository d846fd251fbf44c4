"""Chunks of few shapes, each recorded once as a CUDA graph and replayed.

Decoding a token of a small model takes a GPU less time than a CPU needs to launch its kernels.
A graph launches them all at once, but holds on to shapes and addresses: a chunk is padded to the
next of the `BUCKETS` (see `batching.py`), copied into a buffer of its shape, and the cache, which
is as large as it will ever be from the start, is advanced by the graph itself. Nothing is read
back but the states, from which the ids are chosen.

    x (B, Q, D), valid (B,)  ->  the buffers of bucket Q  ->  replay  ->  states (B, Q, D)

On a CPU there are no graphs. There the same buffers, padding and functions run as they are, which
is how the tests see all of this but the recording.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

WARM = 3
"""Runs before a recording: libraries choose kernels and take their memory."""


@dataclass(frozen=True, eq=False)
class _Recorded:
    """One shape: its buffers, and what runs on them."""

    x: Tensor
    valid: Tensor
    out: Tensor
    replay: Callable[[], object]


class Graphs:
    """Runs a step of fixed shape on static buffers; as a graph where that is possible."""

    def __init__(
        self, step: Callable[[Tensor, Tensor], Tensor], state: tuple[Tensor, ...], capture: bool
    ) -> None:
        """Record nothing yet.

        Args:
            step: returns (B, Q, D) for x (B, Q, D) and valid (B,), and changes `state` in place.
                It may not wait for the device.
            state: what `step` reads and changes; put back after each run before a recording.
            capture: whether to record graphs, which needs CUDA; else every call runs `step`.
        """
        self.step, self.state, self.capture = step, state, capture
        self.recorded: dict[tuple[int, ...], _Recorded] = {}
        self._pool: tuple[int, int] | None = None

    def __call__(self, x: Tensor, valid: Tensor) -> Tensor:
        """Return (B, Q, D) for a chunk."""
        shape = tuple(x.shape)
        if shape not in self.recorded:
            self.recorded[shape] = self._record(x, valid)
        known = self.recorded[shape]
        known.x.copy_(x)
        known.valid.copy_(valid)
        known.replay()
        return known.out.clone()  # the next call of this shape is written over it

    def _record(self, x: Tensor, valid: Tensor) -> _Recorded:
        static, count, out = x.clone(), valid.clone(), torch.empty_like(x)

        def run() -> None:
            out.copy_(self.step(static, count))

        if not self.capture:
            return _Recorded(static, count, out, run)
        before = [tensor.clone() for tensor in self.state]
        stream = torch.cuda.Stream(x.device)
        stream.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(stream):
            for _ in range(WARM):
                run()
                for tensor, was in zip(self.state, before, strict=True):
                    tensor.copy_(was)  # else what a ring still holds would be written over
        torch.cuda.current_stream(x.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            run()
        self._pool = self._pool or graph.pool()
        return _Recorded(static, count, out, graph.replay)
