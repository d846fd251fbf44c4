"""Multiple choice: the likeliest of given answers, by their words' mean log-likelihood.

A long answer is less likely than a short one whatever it says, so choices compete by their
log-likelihood per token, ``<eos>`` included. The plain sum, *unnormalised*, stands beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from gato.model import GatoModel
from gato.rollouts.generate import log_likelihoods
from gato.rollouts.metrics import Figure
from gato.tokenizers.serializer import Serializer
from gato.tokenizers.stream import TokenSequence, concatenate

MOST_CHOICES = 1000
AT_ONCE = 4096
"""Choices whose sequences are written before any is scored, to bound the memory."""


class Scores(NamedTuple):
    """What a model makes of the choices of one question, in their order."""

    total: np.ndarray
    """Log-likelihood of each, in nats."""
    mean: np.ndarray
    """Per token."""

    def probabilities(self) -> np.ndarray:
        """Return each choice's share by `mean`."""
        weights = np.exp(self.mean - self.mean.max())
        return np.asarray(weights / weights.sum())


def judge(
    model: GatoModel,
    serializer: Serializer,
    contexts: Sequence[TokenSequence],
    choices: Sequence[Sequence[str]],
) -> list[Scores]:
    """Return the scores of each context's choices as what follows it, many at once.

    Args:
        model: in evaluation mode.
        serializer: the checkpoint's.
        contexts: what stands before the answer.
        choices: per context, two or more different texts.

    Raises:
        ValueError: for choices that are none, or one that does not fit the model's memory.
    """
    for texts in {id(c): c for c in choices}.values():
        check_choices(texts)
    found: list[tuple[float, int]] = []
    pending: list[TokenSequence] = []
    cut: dict[str, TokenSequence] = {}  # the same labels follow many pictures
    end = serializer.control_piece("<eos>", target=1.0)
    for context, texts in zip(contexts, choices, strict=True):
        given = context.without_targets()
        for text in texts:
            if text not in cut:
                cut[text] = concatenate([serializer.text(text, 1.0), end])
            sequence = concatenate([given, cut[text]])
            _require_fits(len(sequence), model.config.memory, text)
            pending.append(sequence)
        if len(pending) >= AT_ONCE:
            found += log_likelihoods(model, serializer, pending)
            pending = []
    found += log_likelihoods(model, serializer, pending)
    total, tokens = np.array(found, float).reshape(-1, 2).T
    ends = np.cumsum([len(c) for c in choices])[:-1]
    parts = zip(np.split(total, ends), np.split(total / tokens, ends), strict=True)
    return [Scores(*part) for part in parts][: len(contexts)]


def check_choices(choices: Sequence[str]) -> None:
    """Raise ValueError for choices that nobody could choose among."""
    good = not isinstance(choices, str) and 2 <= len(choices) <= MOST_CHOICES and all(choices)
    if not good or len(set(choices)) != len(choices):
        raise ValueError(
            f"expected 2 to {MOST_CHOICES} different choices, none of them empty; got "
            f"{list(choices)!r:.200}."
        )


def _require_fits(tokens: int, memory: int, choice: str) -> None:
    if tokens > memory:
        raise ValueError(
            f"the model remembers {memory} tokens; a question and the choice {choice!r:.60} take "
            f"{tokens}. Use a shorter question, shorter choices or smaller pictures."
        )


def chosen_figures(
    scores: Sequence[Scores], right: Sequence[int], records: Sequence[int]
) -> dict[str, Figure]:
    """Return accuracy, length-normalised and not.

    Args:
        scores: of each question.
        right: the place of each question's true answer.
        records: the number of the record that each question is about.
    """

    def hits(part: str) -> list[bool]:
        return [
            bool(getattr(s, part).argmax() == place) for s, place in zip(scores, right, strict=True)
        ]

    return {
        "accuracy": per_record(records, hits("mean")),
        "accuracy_unnormalised": per_record(records, hits("total")),
    }


def per_record(records: Sequence[int], values: Sequence[Any]) -> Figure:
    """Return the mean of values, of which several may be about one record."""
    rows = {number: np.zeros(2) for number in records}
    for number, value in zip(records, values, strict=True):
        rows[number] += (float(value), 1.0)
    return Figure(np.array(list(rows.values())).reshape(-1, 2), records=list(rows))
