"""Joint actions: the ids of one or of several, each decided from the state behind ``<sep>``.

They are chosen for all rows and slots at once; where an id decides what those after it may be,
slot by slot.

Legend: L rows of a task, n ids due in each of them, D model width.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gato.model import GatoModel
from gato.rollouts.batching import States
from gato.rollouts.grammar import ActionPlan
from gato.rollouts.sampling import Draws, Spans, choose
from gato.rollouts.writing import Row, Writing, begin, choose_next


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


def write_joint(
    model: GatoModel,
    rows: Sequence[Row],
    tasks: Sequence[np.ndarray],
    states: States,
    at: np.ndarray,
) -> None:
    """Decide all actions that are due in the rows of joint tasks, from one state each.

    Args:
        model: whose head of joint actions is asked.
        rows: all rows of the policy.
        tasks: of each task, int64 (L,), which of them decide.
        states: of the chunk that they read.
        at: int64, by row of the policy, where in its share of the chunk its state lies.
    """
    deciding, counts = [], []
    for members in tasks:
        some = [rows[r] for r in members.tolist()]
        warmth, generators = [r.temperature for r in some], [r.generator for r in some]
        deciding.append(Deciding(some[0].plan, some[0].execute, warmth, generators))
        counts.append(some[0].execute * (some[0].together or 0))
    every = np.concatenate(tasks)
    due = np.repeat(counts, [len(m) for m in tasks])  # by row: how many ids
    first = np.cumsum(due) - due
    of = np.repeat(np.arange(len(every)), due)
    slot = np.arange(len(of)) - first[of] + 1
    given = states[every, at[every]]
    which, asked = (torch.from_numpy(x).to(given.device) for x in (of, slot))
    found = model.joint(given[which], asked)  # (ids due, D)
    start = np.zeros(len(rows), np.int64)
    start[every] = first
    sizes = [len(m) * n for m, n in zip(tasks, counts, strict=True)]
    shares = [x.unflatten(0, (-1, n)) for x, n in zip(found.split(sizes), counts, strict=True)]
    ids = decide(model, deciding, shares)
    for members, chosen in zip(tasks, ids, strict=True):
        some = [rows[r] for r in members.tolist()]
        for k in range(some[0].execute):
            place = np.full(len(members), k * (some[0].together or 0))
            for w in begin(some, members, States(found, start), place):
                _take(model, w, chosen)


def _take(model: GatoModel, w: Writing, ids: np.ndarray | None) -> None:
    """Let rows have an action of these ids (L, n), or of those that are chosen in turn."""
    shown = []
    while w.actions.allowed is not None:
        w.push(choose_next(model, [w]) if ids is None else ids[:, w.at[0]])
        if not w.hides:
            shown.append(w.actions.last())
    w.finish(shown)
