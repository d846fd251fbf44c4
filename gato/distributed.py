"""Several processes that train one model: who computes what, and how they agree.

``torchrun --nproc_per_node=2 -m gato.cli train ...`` starts them: over gloo on CPUs, over NCCL on
GPUs. A batch is ``parts`` parts; process r of W takes parts [r P / W, (r + 1) P / W), gradients are
summed, and every process takes the same step. A single process that adds up the same parts ends
where several do, on CPUs bit for bit where they are two. Parts are distinct samples of the same
data, drawn with replacement: the data are not divided among processes. Process 0 alone writes and
prints; what it writes lies where all can read it.

Without torchrun there is one process, and nothing here does anything.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

_BUCKET = 16_000_000  # numbers summed at once: few messages, little memory beside the gradients
_PATIENCE = timedelta(hours=1)  # for process 0, which evaluates while the others wait


class OtherProcessError(RuntimeError):
    """Another process of this run failed, and said why."""


@dataclass(frozen=True)
class World:
    """The processes of a run; by default this one alone."""

    rank: int = 0
    size: int = 1

    def share(self, parts: int) -> range:
        """Return which of the `parts` parts of a batch this process computes.

        Raises:
            ValueError: where they cannot be shared equally.
        """
        if parts % self.size:
            raise ValueError(
                f"expected a number of processes that divides the run's {parts} parts; got "
                f"{self.size}. Start with another number, or a new run with --parts {self.size}."
            )
        each = parts // self.size
        return range(self.rank * each, (self.rank + 1) * each)

    def sum(self, tensor: Tensor) -> Tensor:
        """Add up `tensor` over all processes, in place, and return it."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def any(self, flags: Sequence[bool]) -> list[bool]:
        """Return of each flag whether it is set in any process; waits for no device."""
        if self.size == 1:
            return list(flags)
        counts = torch.tensor(flags, dtype=torch.int32)  # on the CPU, so over gloo
        return [bool(count) for count in self.sum(counts).tolist()]

    def from_all(self, told: str) -> list[str]:
        """Return, in every process, what each of them tells, in the order of their ranks."""
        if self.size == 1:
            return [told]
        content = b"." + told.encode()  # never empty: no buffer is made of no bytes
        lengths = torch.zeros(self.size, dtype=torch.int64)  # on the CPU, so over gloo
        lengths[self.rank] = len(content)
        sizes = self.sum(lengths).tolist()
        buffers = torch.zeros(self.size, max(sizes), dtype=torch.uint8)
        buffers[self.rank, : len(content)] = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        rows = self.sum(buffers)
        return [bytes(row[:n].numpy())[1:].decode() for row, n in zip(rows, sizes, strict=True)]

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Add up gradients over all processes; a parameter that none of them used keeps none."""
        if self.size == 1:
            return
        used = self.any([p.grad is not None for p in parameters])
        chosen = [p for p, u in zip(parameters, used, strict=True) if u]
        for bucket in _buckets(chosen):
            flat = torch.cat([_gradient(p).flatten() for p in bucket])
            pieces = torch.split(self.sum(flat), [p.numel() for p in bucket])
            for p, piece in zip(bucket, pieces, strict=True):
                _gradient(p).copy_(piece.view_as(p))

    def from_first(self, work: Callable[[], str]) -> str:
        """Return, in every process, what `work` returns in process 0, which alone does it.

        Raises:
            OtherProcessError: in the others, where it failed in process 0.
        """
        if self.size == 1:
            return work()
        content, failure = b"", None
        if self.rank == 0:
            try:
                content = b"." + work().encode()  # never empty: no bytes stand for a failure
            except BaseException as error:  # told to those that wait, then raised again
                failure = error
        length = torch.tensor([len(content)])
        dist.broadcast(length, 0)
        if failure is not None:
            raise failure
        if not length.item():
            raise OtherProcessError("process 0 of the run failed; its own message says why")
        buffer = torch.zeros(int(length.item()), dtype=torch.uint8)
        if self.rank == 0:
            buffer = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        dist.broadcast(buffer, 0)
        return bytes(buffer.numpy())[1:].decode()


def _gradient(parameter: nn.Parameter) -> Tensor:
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


def _buckets(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    bucket: list[nn.Parameter] = []
    for p in parameters:
        if bucket and sum(q.numel() for q in bucket) + p.numel() > _BUCKET:
            yield bucket
            bucket = []
        bucket.append(p)
    if bucket:
        yield bucket


def is_first() -> bool:
    """Return whether this process is the one that prints; known before `joined`."""
    return int(os.environ.get("RANK", "0")) == 0


def local_device() -> torch.device:
    """Return the device of this process: its GPU where there is one, else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


@contextlib.contextmanager
def joined(device: torch.device) -> Iterator[World]:
    """Yield the world that torchrun's environment describes, joined for as long as this lasts."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield World()
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
        dist.init_process_group("cpu:gloo,cuda:nccl", timeout=_PATIENCE)
    else:
        dist.init_process_group("gloo", timeout=_PATIENCE)
    yield World(dist.get_rank(), size)
    # Only after a good end: where a process failed, the others would be waited for in vain.
    dist.destroy_process_group()
