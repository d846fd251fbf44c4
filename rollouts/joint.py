"""The ids of joint actions, chosen for all rows and slots at once.

Legend: L rows of a task, n ids due in each of them, D model width.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gato.model import GatoModel
from gato.rollouts.batching import Draws, Spans, choose
from gato.rollouts.grammar import ActionPlan


@dataclass(frozen=True)
class Deciding:
    """The rows of one task that decide the actions of some steps."""

    plan: ActionPlan
    steps: int
    temperatures: Sequence[float]
    """(L,)"""
    generators: Sequence[np.random.Generator]
    """(L,)"""

    @property
    def known(self) -> bool:
        """Whether no id decides what those after it may be, so that all can be chosen at once."""
        return self.plan.leaves is not None

    def draws(self, row: int) -> Iterable[Draws]:
        """Return n generators: what the row's own gives, in the order of the slots.

        In whatever order ids are then chosen, a row's do not depend on its neighbours.
        """
        n, own = self.steps * len(self.plan.spans), self.generators[row]
        if not self.temperatures[row] > 0:
            return [own] * n
        return map(_Drawn, own.random(n))


class _Drawn:
    """A random number that a row's generator has given, for one choice."""

    def __init__(self, number: float) -> None:
        self.number = number

    def random(self) -> float:
        return self.number


def decide(
    model: GatoModel, tasks: Sequence[Deciding], states: Sequence[Tensor]
) -> list[np.ndarray | None]:
    """Return of each task its ids (L, n), or None where they are not `known` beforehand.

    Args:
        model: whose logits decide.
        tasks: those whose rows decide.
        states: of each task (L, n, D), a state for every id.
    """
    known = [i for i, task in enumerate(tasks) if task.known]
    found: list[np.ndarray | None] = [None] * len(tasks)
    if not known:
        return found
    spans: list[Spans] = []
    warmth: list[float] = []
    generators: list[Draws] = []
    for task in (tasks[i] for i in known):
        for row, temperature in enumerate(task.temperatures):
            spans += task.plan.spans * task.steps
            warmth += [temperature] * (task.steps * len(task.plan.spans))
            generators += task.draws(row)
    given = torch.cat([states[i].flatten(0, 1) for i in known])
    chosen = choose(model, given, spans, warmth, generators)
    ends = np.cumsum([states[i].shape[0] * states[i].shape[1] for i in known])
    for i, ids in zip(known, np.split(chosen, ends[:-1]), strict=True):
        found[i] = ids.reshape(states[i].shape[:2])
    return found
