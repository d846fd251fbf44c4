"""Text out of the model: batched generation with a cache, streaming, and likelihoods of candidates.

Only text ids and ``<eos>`` can be generated: a role token is never among the ids allowed, and no
text of a user becomes one, since control tokens have ids of their own.

Legend: B rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from gato.model import GatoModel
from gato.rollouts.batching import Memory, check_sampling, choose, span_logits, text_spans
from gato.tokenizers.serializer import Serializer
from gato.tokenizers.stream import TokenBatch, TokenSequence, concatenate, pack
from gato.tokenizers.text import Text

BATCH_TOKENS = 16_384
"""Tokens of prefixes read together."""


class Writer:
    """Continues B prefixes, one id of each at a time."""

    def __init__(
        self,
        model: GatoModel,
        serializer: Serializer,
        prefixes: Sequence[TokenSequence],
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> None:
        check_sampling(temperature, top_p)
        self.model, self.serializer = model, serializer
        self.temperature, self.top_p = temperature, top_p
        self.eos = serializer.control["<eos>"]
        self.spans = text_spans(serializer)
        self.generators = [np.random.default_rng([seed, i]) for i in range(len(prefixes))]
        self.written: list[list[int]] = [[] for _ in prefixes]
        self.ended = np.zeros(len(prefixes), bool)
        self._rows = np.arange(len(prefixes))  # which prefix each row of the memory goes on from
        self._memory = Memory(model, len(prefixes))
        self._next: list[TokenSequence] = list(prefixes)

    @torch.inference_mode()
    def step(self) -> list[tuple[int, int]]:
        """Write one more id of every row that has not ended; return (row, id) pairs."""
        running = ~self.ended[self._rows]
        if 2 * np.count_nonzero(running) <= len(running):
            self._memory.keep(np.flatnonzero(running))
            self._rows = self._rows[running]
            running = np.ones(len(self._rows), bool)
        if not len(self._rows):
            return []
        rows = np.flatnonzero(running)
        lengths = np.zeros(len(self._rows), np.int64)
        lengths[rows] = [len(self._next[self._rows[r]]) for r in rows]
        chunk = self._memory.chunk(lengths, self.serializer.control)
        for r in rows.tolist():
            chunk.write([r], self._next[self._rows[r]])
        states = self._memory.read(chunk, last=True)[rows, lengths[rows] - 1]
        members = self._rows[rows].tolist()
        ids = choose(
            self.model,
            states,
            [self.spans] * len(rows),
            [self.temperature] * len(rows),
            [self.generators[m] for m in members],
            self.top_p,
        )
        pairs = list(zip(members, ids.tolist(), strict=True))
        for member, token in pairs:
            if token == self.eos:
                self.ended[member] = True
            else:
                self.written[member].append(token)
                self._next[member] = self._shown(token)
        return pairs

    def _shown(self, token: int) -> TokenSequence:
        number = np.array([self.serializer.number["text"]], np.uint8)
        return TokenSequence(
            np.array([token], np.int32), number, np.zeros(1, np.int16), np.zeros(1, np.float32)
        )


def generate(
    model: GatoModel,
    serializer: Serializer,
    prefixes: Sequence[TokenSequence],
    *,
    max_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> list[str]:
    """Return the text that follows each prefix, up to ``<eos>`` or `max_tokens`.

    Args:
        model: in evaluation mode.
        serializer: the checkpoint's.
        prefixes: sequences to go on from.
        max_tokens: the most ids per text.
        temperature: 0 takes the likeliest id.
        top_p: mass of the ids drawn from.
        seed: of the draws.
    """
    texts = [""] * len(prefixes)
    for members in _batches([len(p) for p in prefixes]):
        writer = Writer(
            model,
            serializer,
            [prefixes[i] for i in members],
            temperature=temperature,
            top_p=top_p,
            seed=seed,
        )
        for _ in range(max_tokens):
            if not writer.step():
                break
        for i, ids in zip(members, writer.written, strict=True):
            texts[i] = text_of(serializer, complete(serializer, ids))
    return texts


def stream(
    model: GatoModel,
    serializer: Serializer,
    prefix: TokenSequence,
    *,
    max_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> Iterator[str]:
    """Yield the text that follows `prefix` as it is written, in whole characters."""
    writer = Writer(model, serializer, [prefix], temperature=temperature, top_p=top_p, seed=seed)
    said = ""
    for _ in range(max_tokens):
        if not writer.step():
            return
        text = text_of(serializer, complete(serializer, writer.written[0]))
        if len(text) > len(said):
            yield text[len(said) :]
            said = text


def text_of(serializer: Serializer, ids: Sequence[int]) -> str:
    """Return the string of stream ids of text."""
    offset = serializer.offset["text"]
    return str(serializer.modalities["text"].decode(np.array(ids, np.int64) - offset, {}))


def complete(serializer: Serializer, ids: Sequence[int]) -> list[int]:
    """Return `ids` without those at the end that begin a character and do not end it."""
    text, offset = serializer.modalities["text"], serializer.offset["text"]
    assert isinstance(text, Text)
    return list(ids[: len(ids) - text.unfinished([i - offset for i in ids])])


@torch.inference_mode()
def log_likelihoods(
    model: GatoModel, serializer: Serializer, sequences: Sequence[TokenSequence]
) -> list[tuple[float, int]]:
    """Return per sequence the log-likelihood of its targets (sum, in nats) and their number."""
    device = model.table.weight.device
    results = [(0.0, 0)] * len(sequences)
    for members in _batches([len(s) for s in sequences]):
        batch, of = _packed(serializer, [sequences[i] for i in members])
        nll = model.loss(batch.to(device), soft_bins=0.0).double().cpu().numpy()
        sums = np.bincount(of, nll, minlength=len(members))
        counts = np.bincount(of, minlength=len(members))
        for k, i in enumerate(members):
            results[i] = (-float(sums[k]), int(counts[k]))
    return results


@torch.inference_mode()
def foreseen(
    model: GatoModel, serializer: Serializer, sequences: Sequence[TokenSequence]
) -> list[list[bool]]:
    """Return, for each text of each sequence that ends with ``<eos>``, whether it is the likeliest.

    All texts of a sequence are judged in one forward: where each id is the likeliest of those
    allowed after the true ones before it, generating greedily would have written it.
    """
    device = model.table.weight.device
    end = serializer.control["<eos>"]
    spans = text_spans(serializer)
    ids = np.concatenate([np.arange(start, stop) for start, stop in spans])
    results: list[list[bool]] = [[] for _ in sequences]
    for members in _batches([len(s) for s in sequences]):
        batch, of = _packed(serializer, [sequences[i] for i in members])
        states = model(batch.to(device))[torch.from_numpy(batch.state_at).to(device)]
        best = ids[span_logits(model, states, spans).argmax(-1).cpu().numpy()]
        right = best == batch.target_ids
        begin = 0
        for stop in np.flatnonzero(batch.target_ids == end) + 1:
            results[members[of[begin]]].append(bool(right[begin:stop].all()))
            begin = int(stop)
    return results


def _packed(
    serializer: Serializer, sequences: Sequence[TokenSequence]
) -> tuple[TokenBatch, np.ndarray]:
    """Return a batch of one sequence per row, and for each target the sequence it is of."""
    length = -(-max(len(s) for s in sequences) // 16) * 16
    numbers = [[k] for k in range(len(sequences))]
    batch = pack([[s] for s in sequences], length, serializer.control, numbers)
    return batch, batch.target_corpus


def score(
    model: GatoModel, serializer: Serializer, context: TokenSequence, candidates: Sequence[str]
) -> list[tuple[float, int]]:
    """Return the log-likelihood of each candidate and ``<eos>`` after `context`, and the tokens."""
    given = TokenSequence(
        context.ids,
        context.modality,
        context.local,
        np.zeros(len(context), np.float32),
        context.payload,
        context.hidden,
    )
    end = serializer.control_piece("<eos>", target=1.0)
    sequences = [concatenate([given, serializer.text(c, 1.0), end]) for c in candidates]
    return log_likelihoods(model, serializer, sequences)


def _batches(lengths: Sequence[int]) -> list[list[int]]:
    """Return indices in batches of like lengths, of at most `BATCH_TOKENS` tokens with padding."""
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not batches or (len(batches[-1]) + 1) * lengths[batches[-1][0]] > BATCH_TOKENS:
            batches.append([])
        batches[-1].append(i)
    return batches
