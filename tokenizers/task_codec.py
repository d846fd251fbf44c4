"""How one task is written, and what a policy remembers of it: what a checkpoint keeps of a task.

With return-conditioning (Multi-game Decision Transformer, Lee et al. 2022) every step carries the
return to come, the sum of the rewards from this step to the episode's end, as one of a few levels.
It stands between ``<sep>`` and the action, so that it is predicted from all that is observed up to
this step and the action is predicted from it. Before the observation, where the Decision
Transformer has it, it would have to be guessed before the step is seen, and every return to come
of an episode would be the last one less a reward, which is not known at rollout either.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from gato.envs.episode import TaskSpec
from gato.tokenizers.modality import Spec
from gato.tokenizers.vocabulary import RETURN_LEVELS


@dataclass(frozen=True)
class History:
    """What a policy remembers of an episode: decided in training, the same at rollout."""

    window: int = 0
    """Steps after which the memory starts anew; 0 keeps as many tokens as the model's window."""
    hide_actions: bool = False
    """Whether the model sees <masked> in place of its own actions."""
    temperature: float = 0.0
    """Temperature of sampled actions; 0 takes the likeliest."""
    returns: tuple[float, float] | None = None
    """Where the return to come is predicted before every action: the lowest and highest of the
    data, between which it is cut into levels."""
    kappa: float = 0.0
    """How far the return drawn at rollout is tilted towards high ones."""


@dataclass(frozen=True)
class TaskCodec:
    """How one task is written: (path, modality, spec) of every leaf, and what is remembered."""

    task: TaskSpec
    observation: tuple[tuple[str, str, Spec], ...]
    action: tuple[tuple[str, str, Spec], ...]
    history: History = History()

    def to_json(self) -> dict[str, Any]:
        return {
            "task": self.task.to_json(),
            "observation": [list(leaf) for leaf in self.observation],
            "action": [list(leaf) for leaf in self.action],
            "history": asdict(self.history),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TaskCodec:
        observation, action = (
            tuple((p, m, dict(s)) for p, m, s in data[k]) for k in ("observation", "action")
        )
        known = dict(data["history"])
        if known.get("returns") is not None:
            low, high = known["returns"]
            known["returns"] = (float(low), float(high))
        history = History(**known)
        return cls(TaskSpec.from_json(data["task"]), observation, action, history)


def return_levels(to_come: np.ndarray, history: History) -> np.ndarray:
    """Return the level 0 .. RETURN_LEVELS - 1 of returns to come, cut off at those of the data."""
    assert history.returns is not None
    low, high = history.returns
    share = (np.asarray(to_come, np.float64) - low) / (high - low if high > low else 1.0)
    return np.clip(np.floor(share * RETURN_LEVELS), 0, RETURN_LEVELS - 1).astype(np.int64)


def to_come(rewards: np.ndarray) -> np.ndarray:
    """Return the sums of the rewards from each step to the last.

    >>> to_come(np.array([1.0, 0.0, 2.0])).tolist()
    [3.0, 2.0, 2.0]
    """
    return np.cumsum(np.asarray(rewards, np.float64)[::-1])[::-1]
