"""Token sequences of different lengths as one padded chunk, read into a cache; ids drawn from it.

Legend: B rows, Q tokens of the chunk, D width, U rows that draw, n tokens per row of a block.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gato.cache import KVCache
from gato.model import GatoModel
from gato.tokenizers.stream import TokenSequence, to_device

CHUNK = 64
"""Tokens of one row read at once, at most; longer pieces are split."""
STEP = 16
"""Tokens by which a memory grows."""
EXPECTED = 0.95
"""Mass of the returns to come that may be drawn."""
Spans = tuple[tuple[int, int], ...]
"""Ranges [start, stop) of stream ids that may come next."""


class Chunk:
    """What B rows read next: written piece by piece, padded at the rows' ends."""

    def __init__(self, lengths: np.ndarray, control: dict[str, int]) -> None:
        """Make room for `lengths` (B,) tokens; `control` has the ids of <pad> and <masked>."""
        self.lengths = lengths
        self.masked = control["<masked>"]
        shape = (len(lengths), int(lengths.max(initial=1)))
        self.inputs = np.full(shape, control["<pad>"], np.int64)
        self.local = np.zeros(shape, np.int64)
        self.filled = np.zeros(len(lengths), np.int64)
        self._payload: dict[str, list[dict[str, np.ndarray]]] = {}

    def write(self, rows: Sequence[int] | np.ndarray, block: TokenSequence) -> None:
        """Append n tokens to each of L rows; `block` holds L * n tokens, row after row."""
        where = np.asarray(rows)
        n = len(block) // len(where)
        if n == 0:
            return
        start = self.filled[where]
        columns = start[:, None] + np.arange(n)  # (L, n)
        shown = (
            block.ids if block.hidden is None else np.where(block.hidden, self.masked, block.ids)
        )
        self.inputs[where[:, None], columns] = shown.reshape(-1, n)
        self.local[where[:, None], columns] = block.local.reshape(-1, n)
        for name, fields in block.payload.items():
            share, offset = np.divmod(fields["at"], n)
            at = where[share] * self.inputs.shape[1] + start[share] + offset
            self._payload.setdefault(name, []).append({**fields, "at": at})
        self.filled[where] += n

    def fill(self, rows: np.ndarray, counts: np.ndarray) -> None:
        """Append `counts` (L,) <masked> tokens to each of L rows."""
        for row, count in zip(rows, counts, strict=True):
            self.inputs[row, self.filled[row] : self.filled[row] + count] = self.masked
        self.filled[rows] += counts

    def embed(self, model: GatoModel) -> Tensor:
        """Return the embeddings (B, Q, D)."""
        assert (self.filled == self.lengths).all(), "a chunk must be written in full"
        device = model.table.weight.device
        payload = {}
        for name, pieces in self._payload.items():
            joined = {k: np.concatenate([p[k] for p in pieces]) for k in pieces[0]}
            payload[name] = to_device(joined, lambda v: torch.from_numpy(v).to(device))
        inputs, local = (
            torch.from_numpy(a.reshape(-1)).to(device) for a in (self.inputs, self.local)
        )
        return model.embed(inputs, local, payload).view(*self.inputs.shape, -1)


class Memory:
    """The cache of B rows, never larger than what they have read so far.

    Until a row has read as many tokens as the model's memory holds, nothing has left the ring, so
    a smaller ring computes the same and costs less.
    """

    def __init__(self, model: GatoModel, rows: int) -> None:
        self.model = model
        self.lengths = np.zeros(rows, np.int64)
        self.cache = self._new(rows, min(STEP, model.config.memory), STEP)

    def _new(self, rows: int, window: int, chunk: int) -> KVCache:
        c, weight = self.model.config, self.model.table.weight
        assert c.kv_heads is not None
        return KVCache(
            c.layers, rows, window, c.kv_heads, c.head_dim, weight.dtype, weight.device, chunk
        )

    @torch.inference_mode()
    def reset(self, rows: np.ndarray) -> None:
        """Forget everything in the rows where `rows` (B,) is true."""
        self.cache.reset(torch.from_numpy(rows).to(self.cache.lengths.device))
        self.lengths[rows] = 0

    @torch.inference_mode()
    def read(self, chunk: Chunk) -> Tensor:
        """Return the hidden states (B, Q, D) of a chunk's tokens, and remember them."""
        self._reserve(int((self.lengths + chunk.lengths).max()), int(chunk.lengths.max()))
        x = chunk.embed(self.model)
        valid = torch.from_numpy(chunk.lengths).to(x.device)
        self.lengths += chunk.lengths
        return self.model.decode(x, self.cache, valid)

    @torch.inference_mode()
    def keep(self, rows: np.ndarray) -> None:
        """Go on with these rows only, in this order."""
        old, index = self.cache, torch.from_numpy(rows).to(self.cache.lengths.device)
        self.cache = self._new(len(rows), old.window, old.chunk)
        self.cache.keys.copy_(old.keys[:, index])
        self.cache.values.copy_(old.values[:, index])
        self.cache.key_position.copy_(old.key_position[index])
        self.cache.lengths.copy_(old.lengths[index])
        self.lengths = self.lengths[rows]

    def _reserve(self, tokens: int, chunk: int) -> None:
        """Have room for rows of so many tokens, and for so many at once."""
        most, old = self.model.config.memory, self.cache
        window = max(old.window, min(most, -(-tokens // STEP) * STEP))
        chunk = max(old.chunk, min(CHUNK, -(-chunk // STEP) * STEP))
        wrapped = (self.lengths > old.window).any()
        if wrapped or (window, chunk) == (old.window, old.chunk):
            return
        # Nothing has left the old ring: every token still lies in the slot of its position.
        self.cache = self._new(old.batch, window, chunk)
        kept = min(old.slots, self.cache.slots)
        self.cache.keys[:, :, :kept] = old.keys[:, :, :kept]
        self.cache.values[:, :, :kept] = old.values[:, :, :kept]
        self.cache.key_position[:, :kept] = old.key_position[:, :kept]
        self.cache.lengths.copy_(old.lengths)


def choose(
    model: GatoModel,
    states: Tensor,
    spans: Sequence[Spans],
    temperatures: Sequence[float],
    generators: Sequence[np.random.Generator],
    top_p: float = 1.0,
) -> np.ndarray:
    """Return one id per row (U,), drawn from what the row's spans allow.

    A row's draw depends on its own state and generator alone, not on its neighbours.

    Args:
        model: whose logits decide.
        states: (U, D) hidden states.
        spans: per row, the ids that may come.
        temperatures: per row; 0 takes the likeliest id.
        generators: per row; drawn from only where the temperature is positive.
        top_p: the mass of the smallest set of ids to draw from.
    """
    chosen = np.zeros(len(spans), np.int64)
    for allowed in dict.fromkeys(spans):
        rows = [i for i, s in enumerate(spans) if s == allowed]
        logits = span_logits(model, states if len(rows) == len(spans) else states[rows], allowed)
        best = logits.argmax(-1).cpu().numpy()
        for i, row in enumerate(rows):
            if temperatures[row] > 0:
                best[i] = _draw(logits[i], temperatures[row], generators[row], top_p)
        ids = np.concatenate([np.arange(start, stop) for start, stop in allowed])
        chosen[rows] = ids[best]
    return chosen


def choose_returns(
    model: GatoModel,
    states: Tensor,
    spans: Spans,
    kappas: Sequence[float],
    generators: Sequence[np.random.Generator],
) -> np.ndarray:
    """Return one id per row (U,) of the return to come: what the model expects, tilted upwards.

    Drawn in proportion to p(return) exp(kappa x level from 0 to 1) (Lee et al. 2022), among the
    levels that make up most of the model's mass: those it hardly ever expects would else win by
    the tilt alone.
    """
    logits = span_logits(model, states, spans).double().cpu().numpy()  # (U, levels)
    level = np.linspace(0.0, 1.0, logits.shape[1])
    chosen = np.zeros(len(logits), np.int64)
    for i, (row, kappa, generator) in enumerate(zip(logits, kappas, generators, strict=True)):
        tilted = np.where(_likely(row, EXPECTED), row + kappa * level, -np.inf)
        chosen[i] = spans[0][0] + _draw(torch.from_numpy(tilted), 1.0, generator, 1.0)
    return chosen


def span_logits(model: GatoModel, states: Tensor, spans: Spans) -> Tensor:
    """Return the logits (U, ids in the spans) in float32."""
    weight = model.table.weight if model.head is None else model.head.weight
    parts = [F.linear(states, weight[start:stop]) for start, stop in spans]
    return torch.cat(parts, -1).float() if len(parts) > 1 else parts[0].float()


def _draw(logits: Tensor, temperature: float, generator: np.random.Generator, top_p: float) -> int:
    scaled = logits.double().cpu().numpy() / temperature
    probability = np.exp(scaled - scaled.max())
    probability /= probability.sum()
    if top_p < 1.0:
        probability[~_likely(scaled, top_p)] = 0.0
    cumulative = np.cumsum(probability)
    drawn = np.searchsorted(cumulative, generator.random() * cumulative[-1], side="right")
    return int(min(drawn, len(cumulative) - 1))


def _likely(logits: np.ndarray, mass: float) -> np.ndarray:
    """Return bool, true in the smallest set of ids that holds `mass` of the probability."""
    probability = np.exp(logits - logits.max())
    probability /= probability.sum()
    order = np.argsort(-probability, kind="stable")
    before = np.cumsum(probability[order]) - probability[order]
    kept = np.zeros(len(logits), bool)
    kept[order[before < mass]] = True
    return kept


def check_sampling(temperature: float, top_p: float = 1.0) -> None:
    """Raise ValueError where these are no sampling settings."""
    if not temperature >= 0 or not np.isfinite(temperature):
        raise ValueError(f"temperature must be a number of at least 0; got {temperature}")
    if not 0.0 < top_p <= 1.0:
        raise ValueError(f"top_p must be in (0, 1]; got {top_p}")
