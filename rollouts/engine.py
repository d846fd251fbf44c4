"""Text for many requests at once: rows of one memory that requests join and leave at any time.

    row 0   read read write write write write end | read write write ...   the next that waited
    row 1        read read read read  write write write write write ...
    row 2   read write end | ...

Every step writes one id of each row whose prefix has been read, and reads on in the prefixes of the
others, so many tokens in all and no more, so that nobody waits long for a long one. What a row
writes depends on its own prefix and `Sampling` alone. Only ids of text and ``<eos>`` can come; what
is shown of them is whole characters, and nothing of a stop string.

Legend: B rows.
"""

from __future__ import annotations

from dataclasses import dataclass

from gato.model import GatoModel
from gato.rollouts.batching import check_sampling
from gato.tokenizers.serializer import Serializer
from gato.tokenizers.stream import TokenSequence


@dataclass(frozen=True)
class Sampling:
    """How a text is written."""

    max_tokens: int = 128
    """The most ids, ``<eos>`` included."""
    temperature: float = 0.0
    """0 takes the likeliest id."""
    top_p: float = 1.0
    """Mass of the ids drawn from."""
    seed: int = 0
    """Of the draws."""
    stop: tuple[str, ...] = ()
    """The text ends before the first of these that it would hold."""
    top_logprobs: int | None = None
    """How many of the likeliest ids are told with their logprobs; None tells no logprobs."""

    def __post_init__(self) -> None:
        check_sampling(self.temperature, self.top_p)
        for name, least in (("max_tokens", 1), ("seed", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name} must be an integer of at least {least}; got {value!r}")
        if isinstance(self.stop, str) or not all(isinstance(s, str) and s for s in self.stop):
            raise ValueError(f"stop must be strings of one or more characters; got {self.stop!r}")
        if self.top_logprobs is not None and self.top_logprobs < 0:
            raise ValueError(f"top_logprobs must be at least 0; got {self.top_logprobs}")


@dataclass(frozen=True)
class TokenLogprob:
    """One id that was written, how likely it was among those allowed, and the likeliest there."""

    token: str
    """What it spells; U+FFFD stands for bytes that are no whole character."""
    logprob: float
    bytes: bytes
    top: tuple[tuple[str, float, bytes], ...]
    """(token, logprob, bytes), the likeliest first; ``<eos>`` has no bytes."""


@dataclass(frozen=True)
class Delta:
    """What a request has written since its last one."""

    text: str
    tokens: int
    """Ids, those included whose text is held back or will never be shown, ``<eos>`` left out."""
    logprobs: tuple[TokenLogprob, ...] = ()
    """Of the ids whose text is shown by now."""
    finish: str | None = None
    """``stop`` after ``<eos>`` or before a stop string, ``length`` after `max_tokens`, ``error``
    where `error` says what is wrong; None while it goes on."""
    error: Exception | None = None


class Engine:
    """Continuous batching on the ring cache; for one thread."""

    def __init__(
        self,
        model: GatoModel,
        serializer: Serializer,
        rows: int = 16,
        precision: str | None = None,
    ) -> None:
        """Make an engine in which nothing runs.

        Args:
            model: in evaluation mode.
            serializer: the checkpoint's.
            rows: the most requests B that write at the same time; others wait.
            precision: of the trunk's products, ``float32`` or ``bfloat16``; by default the model's
                own on a CPU, bfloat16 on a GPU.
        """
        raise NotImplementedError

    @property
    def running(self) -> int:
        """How many requests are being read or written."""
        raise NotImplementedError

    @property
    def waiting(self) -> int:
        """How many wait for a row."""
        raise NotImplementedError

    def submit(self, prefix: TokenSequence, sampling: Sampling, number: int = 0) -> int:
        """Take a request and return its ticket; it is read and written by the steps that follow.

        Args:
            prefix: what is to be gone on from.
            sampling: how.
            number: sets texts of one seed apart.

        Raises:
            ValueError: for a prefix that the model cannot read.
        """
        raise NotImplementedError

    def cancel(self, ticket: int) -> None:
        """Forget a request; nothing more comes of it. One that has ended is let be."""
        raise NotImplementedError

    def step(self) -> list[tuple[int, Delta]]:
        """Admit who waits into free rows, read prefixes on, write one id of each other row.

        Returns:
            (ticket, delta) of those that have something to show or have ended.
        """
        raise NotImplementedError
