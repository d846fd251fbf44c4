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
from gato.tokenizers.modality import Modality, Spec
from gato.tokenizers.stream import JointTargets
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
    joint: int = 0
    """Steps whose actions are all predicted from one hidden state; 0 for one id after another."""

    def __post_init__(self) -> None:
        if self.joint < 0:
            raise ValueError(f"joint must be at least 0; got {self.joint}")

    @property
    def bare(self) -> bool:
        """Whether a step is its observation alone: actions are predicted beside it, never shown."""
        return self.joint > 0 and self.hide_actions


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


def joint_ids(task: TaskCodec, modalities: Mapping[str, Modality]) -> int:
    """Return how many ids an action of a task takes whose actions are predicted jointly.

    Raises:
        ValueError: naming the leaf whose number of ids depends on its value, and for a task that is
            conditioned on returns.
    """
    name, total = task.task.id, 0
    for path, modality, spec in task.action:
        count = modalities[modality].count(spec)
        if count is None:
            raise ValueError(
                f"{name}: {path!r} is {modality}, whose number of ids depends on its value; joint "
                f"= {task.history.joint} needs numbers or integers. Set joint = 0."
            )
        total += count
    if task.history.returns is not None:
        raise ValueError(
            f"{name}: expected joint = 0 where returns to come are predicted, from which the "
            f"action follows; got joint = {task.history.joint}"
        )
    return total


def joint_targets(
    ids: np.ndarray, modality: np.ndarray, steps: tuple[int, int], chunk: int, at: np.ndarray
) -> JointTargets:
    """Return what steps [start, stop) predict: their actions and those of the steps after them.

    Args:
        ids: int32 (T, k) of the actions of all steps.
        modality: uint8 (k,).
        steps: start and stop.
        chunk: actions that one state predicts; those after the last of all steps are left out.
        at: (stop - start,) the tokens whose states predict.

    >>> ids = np.array([[5], [6], [7]], np.int32)
    >>> found = joint_targets(ids, np.zeros(1, np.uint8), (1, 3), 2, np.array([3, 7]))
    >>> found.at.tolist(), found.slot.tolist(), found.ids.tolist()
    ([3, 3, 7], [1, 2, 1], [6, 7, 7])
    """
    k = ids.shape[1]
    step = np.arange(*steps)[:, None] + np.arange(chunk)  # (L, C)
    shape = (*step.shape, k)
    there = np.broadcast_to((step < len(ids))[..., None], shape)
    slot = np.arange(1, chunk * k + 1, dtype=np.int16).reshape(1, chunk, k)
    return JointTargets(
        np.broadcast_to(at[:, None, None], shape)[there],
        np.broadcast_to(slot, shape)[there],
        ids[np.minimum(step, len(ids) - 1)][there],
        np.broadcast_to(modality, shape)[there],
        np.ones(int(there.sum()), np.float32),
    )


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
