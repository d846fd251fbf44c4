"""What a corpus is asked for: roles and weights; how a sample is written is the serializer's."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, Protocol

import numpy as np

from gato.tokenizers.stream import TokenSequence


@dataclass(frozen=True)
class CorpusConfig:
    """One corpus of a mixture."""

    name: str
    """What it is called in logs."""
    path: str
    """A store, or a folder of stores (one per task); how often each is drawn, `balance` says."""
    weight: float = 1.0
    """Its share of the tokens of a batch, relative to the other corpora."""
    window: int = 0
    """Steps per episode window; 0 takes as many as fit in a row. The policy's memory is the same
    number of steps, so that what is trained is what is deployed."""
    start: float = 0.0
    """Probability that a window begins where its episode does, as the memory does at rollout; else
    it begins anywhere. 1 is for rows that hold whole episodes, see `ModelConfig.window`."""
    prompt: float = 0.25
    """Probability that a window is preceded by steps of another episode of the same task."""
    prompt_steps: int = 1
    """Steps of a prompt; half of them are an episode's last steps, half lie anywhere."""
    hide_actions: float = 0.0
    """Probability that a step's action tokens are shown as <masked>; 1 also at rollout."""
    joint: int = 0
    """Steps whose actions are all predicted at once from one state, this step's and those after
    it; 0 predicts one id after another. With hide_actions = 1 a step is then its observation."""
    temperature: float = 0.0
    """Temperature of the actions sampled at rollout; 0 takes the likeliest."""
    loss_weight: float = 1.0
    """Weight of the corpus' mean loss, beside its share of the tokens."""
    balance: str = "tasks"
    """How a corpus of several stores chooses one: ``tasks``, each as often as any other;
    ``steps``, by its steps or records; or a power of those, as text: ``"0.5"``."""
    min_fraction: float | None = None
    """Of an episode's score: the part of the way from the random to the expert score below which
    it is left out; of the store's best return where the task has no expert score in returns."""
    min_return: float | None = None
    """Return below which an episode is left out."""
    top: float = 1.0
    """Share of a store's episodes that is kept, those of the highest returns."""
    returns: bool = False
    """Whether the return to come is predicted before every action, and asked to be high at
    rollout."""
    kappa: float = 10.0
    """How much: the model's distribution over the return to come, from 0 (lowest of the data) to
    1, is tilted by exp(kappa x return)."""
    pairs: int = 1
    """Captions, or questions about pictures, per sequence (five in Gato section 2.3)."""
    contrast: float = 0.0
    """Weight of the loss of telling which caption belongs to which picture, of those in one part
    of a batch, beside the tokens' loss; 0 for none. Needs captions of pictures."""
    validation: float = 0.0
    """Share of the episodes or records that is never trained on, chosen by their number."""
    skip: tuple[str, ...] = ()
    """Damaged shards that are left out, as store/shard below `path`: what a run began with, it
    goes on with. See `gato.damage`."""

    def __post_init__(self) -> None:
        self._check_filters()
        if not 0 <= self.weight < math.inf or self.window < 0 or self.prompt_steps < 1:
            raise ValueError(
                f"corpus {self.name!r}: weight and window must not be negative and prompt_steps "
                f"must be at least 1; got {self.weight}, {self.window} and {self.prompt_steps}"
            )
        if self.joint < 0 or (self.joint and self.returns):
            raise ValueError(
                f"corpus {self.name!r}: joint must not be negative, and 0 where returns are "
                f"predicted; got {self.joint}"
            )
        if self.start == 1.0 and self.window:
            raise ValueError(
                f"corpus {self.name!r}: windows of {self.window} steps that all begin at step 0 "
                f"(start = 1) leave out the steps behind them; take window = 0 or a lower start"
            )
        for name in ("start", "prompt", "hide_actions"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"corpus {self.name!r}: {name} is a probability")

    def _check_filters(self) -> None:
        """Raise ValueError where a choice among items is none."""
        wrong = {
            "top must be above 0 and at most 1": not 0.0 < self.top <= 1.0,
            "validation must be at least 0 and below 1": not 0.0 <= self.validation < 1.0,
            "pairs must be at least 1": self.pairs < 1,
            "kappa must be a number of at least 0": not 0.0 <= self.kappa < math.inf,
            "loss_weight must be a number of at least 0": not 0.0 <= self.loss_weight < math.inf,
            "contrast must be a number of at least 0": not 0.0 <= self.contrast < math.inf,
            "pairs must be 1 beside contrast, which takes captions one by one": self.contrast > 0
            and self.pairs > 1,
            "temperature must be a number of at least 0": not 0.0 <= self.temperature < math.inf,
            "min_fraction must be finite": not math.isfinite(self.min_fraction or 0.0),
            "min_return must be finite": not math.isfinite(self.min_return or 0.0),
        }
        for rule in (r for r, broken in wrong.items() if broken):
            raise ValueError(
                f"corpus {self.name!r}: {rule}; got {getattr(self, rule.split()[0])!r}"
            )
        self.power()

    def power(self) -> float:
        """Return the power of a store's size that its chance is proportional to.

        Raises:
            ValueError: where `balance` is neither a name nor a number from 0 to 1.
        """
        try:
            power = {"tasks": 0.0, "steps": 1.0}.get(self.balance)
            power = float(self.balance) if power is None else power
        except ValueError:
            power = math.nan
        if not 0.0 <= power <= 1.0:
            raise ValueError(
                f"corpus {self.name!r}: balance must be tasks, steps or a power from 0 to 1; "
                f"got {self.balance!r}"
            )
        return power


_OF_EPISODES = (
    *("window", "start", "prompt", "prompt_steps", "hide_actions", "temperature", "kappa"),
    "joint",
)


def without_effect(config: CorpusConfig, *, episodes: bool) -> list[str]:
    """Return a sentence for every kind of setting that asks for something in vain.

    Args:
        config: of the corpus.
        episodes: whether it holds episodes, or else records.
    """
    asked = [
        f.name
        for f in fields(CorpusConfig)
        if getattr(config, f.name) and getattr(config, f.name) != f.default
    ]
    if episodes:
        vain = {
            "is about records with pictures, and it holds episodes": {"pairs", "contrast"},
            "needs returns = true": set() if config.returns else {"kappa"},
        }
    else:
        vain = {"is about episodes, and it holds records": set(_OF_EPISODES)}
    return [
        f"corpus {config.name!r}: {name} = {getattr(config, name)} has no effect; it {why}"
        for why, names in vain.items()
        for name in asked
        if name in names
    ]


class Corpus(Protocol):
    """A source of sequences of at most `limit` tokens."""

    config: CorpusConfig

    def sample(self, rng: np.random.Generator, limit: int) -> TokenSequence:
        """Return one sequence; a pure function of the generator's state."""

    def contents(self) -> dict[str, Any]:
        """Return how much it holds, a digest of each store and, of episodes, the range of seeds.

        Checkpoints keep it.
        """

    def held_out(self) -> Corpus | None:
        """Return the corpus of what is never trained on; None where nothing is held out."""

    def notes(self) -> list[str]:
        """Return what a person should know: what is left out and why, what has no effect."""
