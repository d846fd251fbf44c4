"""Which id comes next: those that may, how likely they are, and how one of them is drawn.

Legend: U rows that draw, D width, n ids that may come.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gato.model import GatoModel
from gato.tokenizers.serializer import Serializer
from gato.tokenizers.text import Text

LIKELY, MANY = 256, 4096
"""Of more ids than `MANY` the likeliest are looked for among so many first: putting all of 150,000
in order takes 8 ms."""
COLDEST = 1e-6
"""Lower temperatures draw as this one does: the likeliest id, without infinite numbers."""
EXPECTED = 0.95
"""Mass of the returns to come that may be drawn."""
Spans = tuple[tuple[int, int], ...]
"""Ranges [start, stop) of stream ids that may come next."""


def text_spans(serializer: Serializer) -> Spans:
    """Return the ids that a text may go on with: those that spell something, and ``<eos>`` last."""
    text, first = serializer.modalities["text"], serializer.offset["text"]
    assert isinstance(text, Text)
    end = serializer.control["<eos>"]
    return (*((first + a, first + b) for a, b in text.spans()), (end, end + 1))


class Draws(Protocol):
    """Gives the numbers that ids are drawn by; a `np.random.Generator` does."""

    def random(self) -> float:
        """Return the next number in [0, 1)."""


@dataclass(frozen=True)
class Sampling:
    """How a text is written."""

    max_tokens: int = 128
    """The most ids."""
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
        for name, least in (("max_tokens", 1), ("seed", 0), ("top_logprobs", 0)):
            value = getattr(self, name)
            if name == "top_logprobs" and value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name} must be an integer of at least {least}; got {value!r}")
        if isinstance(self.stop, str) or not all(isinstance(s, str) and s for s in self.stop):
            raise ValueError(f"stop must be strings of one or more characters; got {self.stop!r}")


def choose(
    model: GatoModel,
    states: Tensor,
    spans: Sequence[Spans],
    temperatures: Sequence[float],
    generators: Sequence[Draws],
    top_p: float | Sequence[float] = 1.0,
) -> np.ndarray:
    """Return one id per row (U,), drawn from what the row's spans allow.

    A row's draw depends on its own state and generator alone, not on its neighbours.

    Args:
        model: whose logits decide.
        states: (U, D) hidden states.
        spans: per row, the ids that may come.
        temperatures: per row; 0 takes the likeliest id.
        generators: per row; drawn from only where the temperature is positive.
        top_p: the mass of the smallest set of ids to draw from, of all rows or by row.
    """
    chosen = np.zeros(len(spans), np.int64)
    masses = np.broadcast_to(np.asarray(top_p, np.float64), len(spans))
    warm = np.asarray(temperatures) > 0
    for allowed in dict.fromkeys(spans):
        rows = np.array([i for i, s in enumerate(spans) if s is allowed or s == allowed])
        logits = span_logits(model, states if len(rows) == len(spans) else states[rows], allowed)
        if logits.device.type == "cpu":
            best = logits.numpy().argmax(-1)  # faster than torch's
        else:
            best = logits.argmax(-1).cpu().numpy()
        drawn = np.flatnonzero(warm[rows])
        if len(drawn):
            own = [rows[i] for i in drawn]
            best[drawn] = _draw(
                logits[torch.from_numpy(drawn)].double().cpu().numpy(),
                np.array([temperatures[i] for i in own]),
                [generators[i] for i in own],
                masses[own],
            )
        ids = np.concatenate([np.arange(start, stop) for start, stop in allowed])
        chosen[rows] = ids[best]
    return chosen


def choose_returns(
    model: GatoModel,
    states: Tensor,
    spans: Spans,
    kappas: Sequence[float],
    generators: Sequence[Draws],
) -> np.ndarray:
    """Return one id per row (U,) of the return to come: what the model expects, tilted upwards.

    Drawn in proportion to p(return) exp(kappa x level from 0 to 1) (Lee et al. 2022), among the
    levels that make up most of the model's mass: those it hardly ever expects would else win by
    the tilt alone.
    """
    logits = span_logits(model, states, spans).double().cpu().numpy()  # (U, levels)
    level = np.linspace(0.0, 1.0, logits.shape[1])
    probability = np.exp(logits - logits.max(1, keepdims=True))
    probability /= probability.sum(1, keepdims=True)
    likely = _likely(probability, np.full(len(logits), EXPECTED))
    tilted = np.where(likely, logits + np.asarray(kappas)[:, None] * level, -np.inf)
    ones = np.ones(len(logits))
    return spans[0][0] + _draw(tilted, ones, generators, ones)


def span_logits(model: GatoModel, states: Tensor, spans: Spans) -> Tensor:
    """Return the logits (U, ids in the spans) in float32."""
    weight = model.table.weight if model.head is None else model.head.weight
    parts = [F.linear(states, weight[start:stop]) for start, stop in spans]
    return torch.cat(parts, -1).float() if len(parts) > 1 else parts[0].float()


def _draw(
    logits: np.ndarray,
    temperatures: np.ndarray,
    generators: Sequence[Draws],
    top_p: np.ndarray,
) -> np.ndarray:
    """Return a place (U,) in each row of logits (U, n), by one number of each row's generator."""
    scaled = logits / np.maximum(temperatures, COLDEST)[:, None]
    probability = np.exp(scaled - scaled.max(1, keepdims=True))
    probability /= probability.sum(1, keepdims=True)
    random = np.array([g.random() for g in generators])
    narrow = np.flatnonzero(top_p < 1.0)
    if len(narrow):
        part = probability[narrow]
        probability[narrow] = np.where(_likely(part, top_p[narrow]), part, 0.0)
    cumulative = np.cumsum(probability, axis=1)
    # at most the last that may come: rounded, a number just below 1 may reach the whole mass
    drawn: np.ndarray = (cumulative <= (random * cumulative[:, -1])[:, None]).sum(1)
    last = logits.shape[1] - 1 - (probability[:, ::-1] > 0).argmax(1)
    return np.minimum(drawn, last)


def _likely(probability: np.ndarray, mass: np.ndarray) -> np.ndarray:
    """Return bool (U, n), true in the smallest set of ids that holds `mass` (U,) of each row.

    Of equally likely ids the first are in it.
    """
    if probability.shape[1] <= MANY:
        return _down_to(probability, probability, mass)
    few = np.partition(probability, -LIKELY, axis=1)[:, -LIKELY:]
    enough = few.sum(1) > mass + 1e-9
    kept = np.empty(probability.shape, bool)
    for rows, highest in ((enough, few), (~enough, probability)):
        kept[rows] = _down_to(probability[rows], highest[rows], mass[rows])
    return kept


def _down_to(probability: np.ndarray, highest: np.ndarray, mass: np.ndarray) -> np.ndarray:
    """Return what `_likely` does, of rows whose `highest` ones, in any order, hold the mass."""
    highest = np.sort(highest, axis=1)[:, ::-1]
    count = (np.cumsum(highest, axis=1) - highest < mass[:, None]).sum(1)
    lowest = highest[np.arange(len(count)), count - 1][:, None]
    kept: np.ndarray = probability >= lowest
    for row in np.flatnonzero(kept.sum(1) > count):
        equal = np.flatnonzero(probability[row] == lowest[row])
        kept[row, equal[count[row] - kept[row].sum() :]] = False
    return kept


def check_sampling(temperature: float, top_p: float = 1.0) -> None:
    """Raise ValueError where these are no sampling settings."""
    if not temperature >= 0 or not np.isfinite(temperature):
        raise ValueError(f"temperature must be a number of at least 0; got {temperature}")
    if not 0.0 < top_p <= 1.0:
        raise ValueError(f"top_p must be in (0, 1]; got {top_p}")
