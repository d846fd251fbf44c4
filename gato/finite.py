"""Whether the loss and the gradient of a step are numbers, known before the weights are touched.

On a CPU the host looks at once. On a GPU it would have to wait for the device in every step, so
there the device itself keeps the update from happening, and those of all later steps; the host
reads of it a step late, while the device is busy with the next one, and then refuses the step that
was at fault with the batch that it was taken on. Weights, optimizer and average are then what they
were before that step.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Losses = tuple[Tensor, Tensor]
"""Of a part's targets, those of padding among them; and the corpora that these belong to."""


@dataclass
class Asked:
    """A step of which it is not known yet whether it was taken."""

    step: int
    numbers: Tensor
    """(2,) float64 on the host: the loss and the gradient's norm, once `copied` has happened."""
    copied: Any
    """A CUDA event, or None where nothing has to be waited for."""
    batches: Sequence[Any]
    """Of the step, as they were drawn."""
    losses: Sequence[Losses]

    @property
    def told(self) -> tuple[float, float]:
        """The loss and the gradient's norm; waits for the copy."""
        if self.copied is not None:
            self.copied.synchronize()
        loss, norm = self.numbers.tolist()
        return loss, norm

    @property
    def finite(self) -> bool:
        """Whether both are numbers."""
        return all(map(math.isfinite, self.told))


class Gate:
    """Closed for good by the first step whose loss or gradient is no number."""

    def __init__(self, device: torch.device) -> None:
        """Make an open gate."""
        self.closed = torch.zeros((), dtype=torch.float32, device=device)
        """1 where no step may change anything any more, else 0."""
        self._device = device
        self._pending: deque[Asked] = deque()

    def ask(
        self,
        step: int,
        loss: Tensor,
        norm: Tensor,
        batches: Sequence[Any],
        losses: Sequence[Losses],
    ) -> Tensor:
        """Close the gate where the loss or the norm is no number; return `closed`."""
        finite = loss.isfinite() & norm.isfinite()
        self.closed = torch.maximum(self.closed, (~finite).to(self.closed.dtype))
        on_gpu = self._device.type == "cuda"
        numbers = torch.empty(2, dtype=torch.float64, pin_memory=on_gpu)
        numbers.copy_(torch.stack([loss.double(), norm.double()]), non_blocking=True)
        copied = None
        if on_gpu:
            copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            copied.record()
        self._pending.append(Asked(step, numbers, copied, batches, losses))
        return self.closed

    def refused(self, unread: int = 0) -> Asked | None:
        """Return the step that closed the gate, if one of those asked about did.

        Args:
            unread: of the newest steps, which are left for later: to look at them is to wait.
        """
        while len(self._pending) > unread:
            asked = self._pending.popleft()
            if not asked.finite:
                return asked
        return None
