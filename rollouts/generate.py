"""Text out of the model: batched generation with a cache, streaming, and likelihoods of candidates.

Only text ids and ``<eos>`` can be generated (see `engine.py`): a role token is never among the ids
allowed, and no text of a user becomes one, since control tokens have ids of their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from gato.model import LOGITS, GatoModel
from gato.rollouts.engine import Delta, Engine, Sampling
from gato.rollouts.sampling import span_logits, text_spans
from gato.tokenizers.serializer import Serializer
from gato.tokenizers.stream import TokenBatch, TokenSequence, concatenate, pack

BATCH_TOKENS = 16_384
"""Tokens of prefixes read together."""
ROWS = 64
"""Texts written at the same time."""


def generate(
    model: GatoModel,
    serializer: Serializer,
    prefixes: Sequence[TokenSequence],
    *,
    max_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    stop: Sequence[str] = (),
) -> list[str]:
    """Return the text that follows each prefix, up to ``<eos>`` or `max_tokens`.

    Args:
        model: in evaluation mode.
        serializer: the checkpoint's.
        prefixes: sequences to go on from.
        max_tokens: the most ids per text.
        temperature: 0 takes the likeliest id.
        top_p: mass of the ids drawn from.
        seed: of the draws; the first prefix gets the text that `stream` gives.
        stop: strings before which a text ends.
    """
    texts = [""] * len(prefixes)
    if not prefixes:
        return texts
    sampling = Sampling(max_tokens, temperature, top_p, seed, tuple(stop))
    engine = Engine(model, serializer, min(ROWS, len(prefixes)), read=BATCH_TOKENS)
    # Those of like length are read together, and the longest first.
    order = sorted(range(len(prefixes)), key=lambda i: -len(prefixes[i]))
    place = {engine.submit(prefixes[i], sampling, number=i): i for i in order}
    for ticket, delta in _written(engine):
        texts[place[ticket]] += delta.text
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
    stop: Sequence[str] = (),
) -> Iterator[str]:
    """Yield the text that follows `prefix` as it is written, in whole characters."""
    sampling = Sampling(max_tokens, temperature, top_p, seed, tuple(stop))
    yield from (d.text for d in write(model, serializer, prefix, sampling) if d.text)


def write(
    model: GatoModel, serializer: Serializer, prefix: TokenSequence, sampling: Sampling
) -> Iterator[Delta]:
    """Yield what is written after `prefix`, its end with how it ended."""
    engine = Engine(model, serializer, rows=1)
    engine.submit(prefix, sampling)
    yield from (delta for _, delta in _written(engine))


def _written(engine: Engine) -> Iterator[tuple[int, Delta]]:
    """Yield (ticket, delta) until all is written."""
    while engine.running or engine.waiting:
        for ticket, delta in engine.step():
            if delta.error is not None:
                raise delta.error
            yield ticket, delta


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
        blocks = states.split(max(1, LOGITS // len(ids)))
        likeliest = torch.cat([span_logits(model, block, spans).argmax(-1) for block in blocks])
        best = ids[likeliest.cpu().numpy()]
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
    given = context.without_targets()
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
