"""What a corpus is asked for: roles and weights; how a sample is written is the serializer's."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from gato.tokenizers.stream import TokenSequence


@dataclass(frozen=True)
class CorpusConfig:
    """One corpus of a mixture."""

    name: str
    """What it is called in logs."""
    path: str
    """A store, or a folder of stores (one per task), sampled equally."""
    weight: float = 1.0
    """Its share of the tokens of a batch, relative to the other corpora."""
    window: int = 0
    """Steps per episode window; 0 takes as many as fit in a row. The policy's memory is the same
    number of steps, so that what is trained is what is deployed."""
    prompt: float = 0.25
    """Probability that a window is preceded by steps of another episode of the same task."""
    prompt_steps: int = 1
    """Steps of a prompt; half of them are an episode's last steps, half lie anywhere."""
    hide_actions: float = 0.0
    """Probability that a step's action tokens are shown as <masked>; 1 also at rollout."""
    temperature: float = 0.0
    """Temperature of the actions sampled at rollout; 0 takes the likeliest."""
    loss_weight: float = 1.0
    """Weight of the corpus' mean loss, beside its share of the tokens."""

    def __post_init__(self) -> None:
        if not 0 <= self.weight < math.inf or self.window < 0 or self.prompt_steps < 1:
            raise ValueError(
                f"corpus {self.name!r}: weight and window must not be negative and prompt_steps "
                f"must be at least 1; got {self.weight}, {self.window} and {self.prompt_steps}"
            )
        for name in ("prompt", "hide_actions"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"corpus {self.name!r}: {name} is a probability")


class Corpus(Protocol):
    """A source of sequences of at most `limit` tokens."""

    config: CorpusConfig

    def sample(self, rng: np.random.Generator, limit: int) -> TokenSequence:
        """Return one sequence; a pure function of the generator's state."""

    def contents(self) -> dict[str, Any]:
        """Return how much it holds and, of episodes, the range of seeds: kept in checkpoints."""
