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

from collections import deque
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from gato.decoding import decoding_dtype
from gato.model import GatoModel
from gato.rollouts.batching import CHUNK, Chunk, Memory
from gato.rollouts.sampling import Sampling, choose, span_logits, text_spans
from gato.rollouts.spelling import Spelling
from gato.threads import few_threads
from gato.tokenizers.serializer import Serializer
from gato.tokenizers.stream import TokenSequence

__all__ = ["Delta", "Engine", "Sampling", "TokenLogprob"]

READ = 256
"""Tokens of prefixes read in one step, at most; beside them each other row reads one."""
FEW = 512
"""Tokens of a step that one thread of a CPU reads; for more there may be others."""


_Bytes = bytes


@dataclass(frozen=True)
class TokenLogprob:
    """One id that was written, how likely it was among those allowed, and the likeliest there."""

    token: str
    """What it spells; U+FFFD stands for bytes that are no whole character."""
    logprob: float
    bytes: _Bytes
    top: tuple[tuple[str, float, _Bytes], ...]
    """(token, logprob, bytes), the likeliest first; ``<eos>`` has no bytes."""


@dataclass(frozen=True)
class Delta:
    """What a request has written since its last one."""

    text: str
    tokens: int
    """Ids, those included whose text is held back or will never be shown, ``<eos>`` left out."""
    logprobs: tuple[TokenLogprob, ...] = ()
    """Of the ids of whose text something is shown by now; a stop string may begin inside the last,
    which is told whole."""
    finish: str | None = None
    """``stop`` after ``<eos>`` or before a stop string, ``length`` after `max_tokens`, ``error``
    where `error` says what is wrong; None while it goes on."""
    error: Exception | None = None


@dataclass(eq=False)
class _Request:
    """A text under way."""

    ticket: int
    prefix: TokenSequence
    sampling: Sampling
    generator: np.random.Generator
    spelling: Spelling
    read: int = 0
    """Tokens of the prefix that are in memory."""
    last: int = -1
    """The id written last, which is still to be read."""
    written: int = 0
    told: int = 0
    """Ids that deltas have counted so far."""
    held: deque[tuple[int, TokenLogprob]] = field(default_factory=deque)
    """What is to be told of ids, once more than so many characters are shown."""

    @property
    def left(self) -> int:
        """Tokens of the prefix still to be read."""
        return len(self.prefix) - self.read

    def part(self, most: int) -> int:
        """Return how many tokens to read next: `most`, or more where that cuts an image in two.

        Embedders take images whole; between two of them, and anywhere else, may be cut.
        """
        stop = min(self.read + max(most, 0), len(self.prefix))
        if most > 0:
            while self._inside[stop]:
                stop += 1
        return stop - self.read

    @cached_property
    def _inside(self) -> np.ndarray:
        """Bool (T + 1,), true before tokens that go on with what the one before them began."""
        inside = np.zeros(len(self.prefix) + 1, bool)
        for rows in self.prefix.payload.values():
            at = rows["at"]
            begins = np.append(True, np.diff(at) > 1)
            if "grid" in rows:  # cells of images: each begins with its first row and column
                begins |= (rows["grid"][:, :2] == 0).all(1)
            inside[at[~begins]] = True
        return inside

    def delta(self, text: str, finish: str | None) -> Delta | None:
        """Return what there is to show, if anything."""
        told = []
        while self.held and self.held[0][0] < self.spelling.shown:
            told.append(self.held.popleft()[1])
        if not (text or told or finish):
            return None
        new, self.told = self.written - self.told, self.written
        return Delta(text, new, tuple(told), finish)


class Engine:
    """Continuous batching on the ring cache; for one thread.

    The first rows of the memory are those that run, in no order: where one ends, the last takes
    its place, so that a forward never looks at rows between them that are free.
    """

    def __init__(
        self,
        model: GatoModel,
        serializer: Serializer,
        rows: int = 16,
        precision: str | None = None,
        read: int = READ,
    ) -> None:
        """Make an engine in which nothing runs.

        Args:
            model: in evaluation mode.
            serializer: the checkpoint's.
            rows: the most requests B that write at the same time; others wait.
            precision: of the trunk's products, ``float32`` or ``bfloat16``; by default the model's
                own on a CPU, bfloat16 on a GPU.
            read: tokens of prefixes read in one step, at most.
        """
        if rows < 1 or read < 1:
            raise ValueError(f"rows and read must be at least 1; got {rows} and {read}")
        self.model, self.serializer = model, serializer
        self.rows, self.read = rows, read
        self.eos = serializer.control["<eos>"]
        self.spans = text_spans(serializer)
        self.allowed = np.concatenate([np.arange(start, stop) for start, stop in self.spans])
        """The ids that may come."""
        self.memory = Memory(model, rows, dtype=decoding_dtype(model, precision))
        self._number, self._names = serializer.number["text"], Spelling(serializer)
        self._running: list[_Request] = []  # by row
        self._waiting: deque[_Request] = deque()
        self._tickets = 0

    @property
    def running(self) -> int:
        """How many requests are being read or written."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """How many wait for a row."""
        return len(self._waiting)

    def submit(self, prefix: TokenSequence, sampling: Sampling, number: int = 0) -> int:
        """Take a request and return its ticket; it is read and written by the steps that follow.

        Args:
            prefix: what is to be gone on from.
            sampling: how.
            number: sets texts of one seed apart.

        Raises:
            ValueError: for a prefix that the model cannot read.
        """
        self.check(prefix)
        ticket, self._tickets = self._tickets, self._tickets + 1
        generator = np.random.default_rng([sampling.seed, number])
        spelling = Spelling(self.serializer, sampling.stop)
        self._waiting.append(_Request(ticket, prefix, sampling, generator, spelling))
        return ticket

    def check(self, prefix: TokenSequence) -> None:
        """Raise ValueError where the model cannot read a prefix; any thread may ask."""
        if not len(prefix):
            raise ValueError("expected a prefix of at least one token, such as <bos>; got none")
        most = self.model.vocabulary_size
        if prefix.ids.max() >= most:
            raise ValueError(f"ids of a prefix are below {most}; got {prefix.ids.max()}")
        for name in prefix.payload:
            if name not in self.model.nets:
                known = ", ".join(self.model.nets) or "none"
                raise ValueError(f"no net for payload {name!r}; this model has: {known}")

    def cancel(self, ticket: int) -> None:
        """Forget a request; nothing more comes of it. One that has ended is let be."""
        rows = [row for row, r in enumerate(self._running) if r.ticket == ticket]
        self._leave(rows)
        self._waiting = deque(r for r in self._waiting if r.ticket != ticket)

    def clear(self) -> None:
        """Forget all requests."""
        self._running, self._waiting = [], deque()
        self.memory.reset(np.ones(self.rows, bool))

    @torch.inference_mode()
    def step(self) -> list[tuple[int, Delta]]:
        """Admit who waits into free rows, read prefixes on, write one id of each other row.

        Returns:
            (ticket, delta) of those that have something to show or have ended.

        Raises:
            Exception: what the model raised, if it was not over one prefix; `clear` then, or
                nothing that runs can go on.
        """
        while self._waiting and len(self._running) < self.rows:
            self._running.append(self._waiting.popleft())
        deltas: list[tuple[int, Delta]] = []
        if not self._running:
            return deltas
        counts = self._counts()
        few = counts.sum() <= FEW
        config, device = self.model.config, self.model.table.weight.device
        with few_threads(config, device) if few else nullcontext():
            try:
                states = self.memory.read(self._chunk(counts), last=True)
            except Exception:
                failed = self._at_fault(counts)
                if not failed:
                    raise
                self._leave(list(failed))
                return [(ticket, Delta("", 0, (), "error", e)) for ticket, e in failed.values()]
            for request, count in zip(self._running, counts.tolist(), strict=False):
                request.read += count if request.left else 0
            rows = np.array([i for i, r in enumerate(self._running) if not r.left], np.int64)
            if len(rows):
                given = states[rows, counts[rows] - 1]
                ids = self._choose(given, rows)
                deltas = self._written(given, ids, rows)
        return deltas

    def _counts(self) -> np.ndarray:
        """Return how many tokens (B,) each row reads in this step; who came first, first."""
        counts = np.zeros(self.rows, np.int64)
        counts[: len(self._running)] = 1
        reading = [(r.ticket, row) for row, r in enumerate(self._running) if r.left]
        budget = self.read
        for _, row in sorted(reading):
            counts[row] = self._running[row].part(min(CHUNK, budget))
            budget -= int(counts[row])
        return counts

    def _chunk(self, counts: np.ndarray) -> Chunk:
        """Return what the rows read: a part of their prefix, or the id written last."""
        chunk = self.memory.chunk(counts, self.serializer.control)
        writing = []
        for row, request in enumerate(self._running):
            if not request.left:
                writing.append(row)
            elif counts[row]:
                chunk.write([row], self._part(request, int(counts[row])))
        if writing:
            ids = np.array([self._running[row].last for row in writing], np.int32)
            n = len(ids)
            numbers, nothing = np.full(n, self._number, np.uint8), np.zeros(n, np.float32)
            block = TokenSequence(ids, numbers, np.zeros(n, np.int16), nothing)
            chunk.write(np.array(writing), block)
        return chunk

    @staticmethod
    def _part(request: _Request, count: int) -> TokenSequence:
        if count == len(request.prefix):
            return request.prefix
        return request.prefix.slice(request.read, request.read + count)

    def _at_fault(self, counts: np.ndarray) -> dict[int, tuple[int, Exception]]:
        """Return (ticket, what is wrong) by row, where a prefix cannot be read on its own either.

        What is read is embedded before anything is remembered, so that the others can go on.
        """
        failed = {}
        for row, request in enumerate(self._running):
            if request.left and counts[row]:
                try:
                    chunk = Chunk(counts[row : row + 1], self.serializer.control)
                    chunk.write([0], self._part(request, int(counts[row])))
                    chunk.embed(self.model)
                except Exception as error:
                    failed[row] = request.ticket, error
        return failed

    def _choose(self, given: Tensor, rows: np.ndarray) -> np.ndarray:
        """Return the next id of `rows` (U,), behind the states `given` (U, D)."""
        requests = [self._running[row] for row in rows.tolist()]
        return choose(
            self.model,
            given,
            [self.spans] * len(rows),
            [r.sampling.temperature for r in requests],
            [r.generator for r in requests],
            [r.sampling.top_p for r in requests],
        )

    def _written(self, given: Tensor, ids: np.ndarray, rows: np.ndarray) -> list[tuple[int, Delta]]:
        """Take the next id of `rows`, let those leave that have ended, return what is to show."""
        told = self._logprobs(given, ids, rows)
        deltas, ended = [], []
        for row, token in zip(rows.tolist(), ids.tolist(), strict=True):
            request = self._running[row]
            spelling, sampling = request.spelling, request.sampling
            text, finish = "", None
            request.last = token
            if token == self.eos:
                text, finish = spelling.rest(), "stop"
            else:
                request.written += 1
                if row in told:
                    request.held.append((spelling.known, told[row]))
                text = spelling.push(token)
                if spelling.stopped:
                    finish = "stop"
                elif request.written >= sampling.max_tokens:
                    text, finish = text + spelling.rest(), "length"
            delta = request.delta(text, finish)
            if delta is not None:
                deltas.append((request.ticket, delta))
            if finish is not None:
                ended.append(row)
        self._leave(ended)
        return deltas

    def _logprobs(
        self, given: Tensor, ids: np.ndarray, rows: np.ndarray
    ) -> Mapping[int, TokenLogprob]:
        """Return by row what is to be told of its next id, where that is asked for."""
        asked = [
            (i, row, top)
            for i, row in enumerate(rows.tolist())
            if (top := self._running[row].sampling.top_logprobs) is not None and ids[i] != self.eos
        ]
        if not asked:
            return {}
        states = given[torch.tensor([i for i, _, _ in asked], device=given.device)]
        logprobs = span_logits(self.model, states, self.spans).log_softmax(-1).cpu()
        told = {}
        for (i, row, top), own in zip(asked, logprobs, strict=True):
            best, places = own.topk(min(top, len(own)))
            names = [self._spelled(int(self.allowed[k])) for k in places.tolist()]
            likeliest = zip(names, best.tolist(), strict=True)
            token, spelt = self._spelled(int(ids[i]))
            came = float(own[int(np.flatnonzero(self.allowed == ids[i])[0])])
            told[row] = TokenLogprob(
                token, came, spelt, tuple((t, p, b) for (t, b), p in likeliest)
            )
        return told

    def _spelled(self, token: int) -> tuple[str, bytes]:
        if token == self.eos:
            return "<eos>", b""
        spelt = self._names.bytes_of(token)
        return spelt.decode("utf-8", "replace"), spelt

    def _leave(self, rows: list[int]) -> None:
        """Free the rows of requests that have ended; the last that run take their places."""
        if not rows:
            return
        before = len(self._running)
        for row in sorted(rows, reverse=True):
            last = len(self._running) - 1
            if row != last:
                self.memory.move(last, row)
                self._running[row] = self._running[last]
            self._running.pop()
        free = np.zeros(self.rows, bool)
        free[len(self._running) : before] = True
        self.memory.reset(free)
