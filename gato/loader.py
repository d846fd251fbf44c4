"""Parts of batches in order, computed here or ahead of time in worker processes.

Every part is a pure function of (seed, step, part), so however many workers there are, and whichever
of them computes a part, the same bytes arrive.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol, Self

from gato.tokenizers.stream import TokenBatch


class Parts(Protocol):
    """What a loader needs of a mixture."""

    def part(self, index: int, part: int) -> TokenBatch:
        """Return part `part` of batch `index`: a pure function of the two."""


class Loader:
    """Iterates (first_step, parts[0]), (first_step, parts[1]), ..., (first_step + 1, parts[0]), ...

    Use it as a context manager, or close it: worker processes end with it.
    """

    def __init__(
        self,
        mixture: Parts,
        first_step: int = 0,
        parts: Sequence[int] = (0,),
        workers: int = 0,
        *,
        stop: int | None = None,
    ) -> None:
        """Start loading.

        Args:
            mixture: what the batches are drawn from.
            first_step: the index of the first batch.
            parts: which parts of every batch to give, in this order: those of this rank.
            workers: processes that compute parts ahead; 0 computes each here when it is asked for.
            stop: the index of the batch before which iteration ends; without it there is no end.
        """
        self.mixture, self.parts, self.stop = mixture, tuple(parts), stop
        self._at = first_step * len(self.parts)

    def __iter__(self) -> Iterator[TokenBatch]:
        return self

    def __next__(self) -> TokenBatch:
        step, part = divmod(self._at, len(self.parts))
        if self.stop is not None and step >= self.stop:
            raise StopIteration
        found = self.mixture.part(step, self.parts[part])
        self._at += 1
        return found

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the workers; what they computed ahead is dropped."""
