"""Batches on their way to the device: padded, pinned, and copied while the one before is computed.

    loader -> padded into pinned memory -> copied on a stream of its own -> the step

On a CPU a batch is taken as it comes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gato.static_shapes import Capacities
from gato.tokenizers.stream import TokenBatch


@dataclass(frozen=True)
class Fed:
    """A part of a batch, as it was drawn and as it is computed."""

    drawn: TokenBatch
    """Of arrays."""
    given: TokenBatch
    """Of tensors on the device, padded where shapes are static."""


class Feed:
    """The parts of one batch after another, on the device."""

    def __init__(
        self,
        loader: Iterator[TokenBatch],
        parts: int,
        device: torch.device,
        capacities: Capacities | None = None,
        ahead: bool = False,
    ) -> None:
        """Feed nothing yet.

        Args:
            loader: of parts of batches, in order.
            parts: of each batch.
            device: where they go.
            capacities: pad to these.
            ahead: bring the next batch to the device when one is taken.
        """
        self._loader, self._parts, self._device = loader, parts, device
        self._capacities, self._ahead = capacities, ahead
        self._stream: Any = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._next: list[Fed] | None = None
        self._failed: Exception | None = None

    def take(self) -> list[Fed] | list[TokenBatch]:
        """Return the parts of the next batch, on the device if that is done ahead.

        What is still on its way the device waits for by itself. What kept it from being brought is
        raised here, when all that is due after the batch before is done.
        """
        if self._failed is not None:
            failed, self._failed = self._failed, None
            raise failed
        if not self._ahead:
            return self._draw()
        found = self._next if self._next is not None else self._bring()
        self._next = None
        if self._stream is not None:
            now = torch.cuda.current_stream(self._device)
            now.wait_stream(self._stream)
            for fed in found:
                for tensor in _tensors(fed.given):
                    tensor.record_stream(now)  # its memory is not given away before it is read
        return found

    def fetch(self) -> None:
        """Begin to bring the batch after the one that is computed, if there is one."""
        if self._ahead and self._next is None and self._failed is None:
            try:
                self._next = self._bring()
            except StopIteration:
                pass
            except Exception as error:
                self._failed = error

    def _draw(self) -> list[TokenBatch]:
        return [next(self._loader) for _ in range(self._parts)]

    def _bring(self) -> list[Fed]:
        return [Fed(batch, self.give(batch)) for batch in self._draw()]

    def give(self, batch: TokenBatch) -> TokenBatch:
        """Return a batch on the device, or on its way there."""
        pin = self._stream is not None
        if self._capacities is not None:
            batch = self._capacities.pad(batch, pin=pin)
        elif pin:
            batch = _pinned(batch)
        if pin and batch.matches is not None:
            batch.matches = batch.matches.each(lambda x: torch.as_tensor(x).pin_memory())
        if self._stream is None:
            return batch.to(self._device)
        with torch.cuda.stream(self._stream):
            return batch.to(self._device, non_blocking=True)


def _pinned(batch: TokenBatch) -> TokenBatch:
    batch = batch.to("cpu")
    for name, value in vars(batch).items():
        if isinstance(value, Tensor):
            setattr(batch, name, value.pin_memory())
    for rows in batch.payload.values():
        for field, value in rows.items():
            if isinstance(value, Tensor):
                rows[field] = value.pin_memory()
    return batch


def _tensors(batch: TokenBatch) -> Sequence[Tensor]:
    found = [*vars(batch).values(), *(v for rows in batch.payload.values() for v in rows.values())]
    found += [] if batch.matches is None else vars(batch.matches).values()
    return [x for x in found if isinstance(x, Tensor)]
