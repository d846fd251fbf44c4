"""What a policy keeps of its rows, and the ids of their actions, chosen one after another.

The first id of an action comes from the state behind ``<sep>``. What follows comes from the states
behind the ids before it, which are read for that; or, where the history hides actions, from the
``<masked>`` tokens that were read with ``<sep>``.

Legend: L rows of a task, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gato.model import GatoModel
from gato.rollouts.batching import Memory, Piece, States
from gato.rollouts.grammar import ActionPlan, Actions, tokens
from gato.rollouts.sampling import choose, choose_returns
from gato.tokenizers.serializer import CONTROL, Serializer
from gato.tokenizers.stream import TokenSequence
from gato.tokenizers.task_codec import TaskCodec


@dataclass
class Row:
    """One episode under way."""

    task: TaskCodec
    plan: ActionPlan
    head: TokenSequence
    """What an empty memory reads first: the instruction and the prompt."""
    temperature: float
    generator: np.random.Generator
    together: int | None
    """How many ids of an action come from one forward; None where each waits for the last."""
    kappa: float
    """How far the return to come is tilted upwards, where the task is conditioned on it."""
    execute: int
    """Actions taken of a chunk before the next is decided."""
    steps: int = 0
    """Actions taken since the memory was empty, or held the head alone."""
    pending: list[Piece] = field(default_factory=list)
    """What is still to be read of the last action and, where actions were due, of observations."""
    due: list[tuple[Any, list[Piece]]] = field(default_factory=list)
    """Actions that are decided and still to be taken, and what the model is then shown of them."""
    read: TokenSequence | None = None
    """The head that is in memory; None where nothing is."""


@dataclass
class Writing:
    """Rows of one task whose actions are being written."""

    rows: list[Row]
    where: np.ndarray
    """int64 (L,): which rows of the policy these are."""
    actions: Actions
    left: int
    """How many ids the states at hand still decide."""
    states: States
    at: np.ndarray
    """int64 (L,): where in each row's share of the chunk lies the state that decides next."""
    asked: bool = False
    """Whether the last id was the return to come."""
    written: bool = False
    """Whether there is an id yet; an action of no dimensions has none."""

    @property
    def hides(self) -> bool:
        """Whether the model is not shown its actions."""
        return self.rows[0].task.history.hide_actions

    @property
    def given(self) -> Tensor:
        """The states (L, D) that decide the next id of each row."""
        return self.states[self.where, self.at]

    def push(self, ids: np.ndarray) -> None:
        """Take the next id (L,) of each row."""
        self.asked = self.actions.awaits_return
        self.actions.push(ids)
        self.at, self.left, self.written = self.at + 1, self.left - 1, True

    def finish(self, shown: Sequence[TokenSequence]) -> None:
        """Let the rows have their complete actions, and the model then be shown tokens (L,)."""
        for i, (row, action) in enumerate(zip(self.rows, self.actions.values(), strict=True)):
            row.due.append((action, [Piece(s, i, len(self.rows)) for s in shown]))


def begin(rows: Sequence[Row], where: np.ndarray, states: States, at: np.ndarray) -> list[Writing]:
    """Return what writes the actions of a task's rows, in one or one by one.

    Args:
        rows: of one task.
        where: int64 (L,), which rows of the policy they are.
        states: of a chunk that they read.
        at: int64 (L,), where in their shares of it the states lie that decide the first ids.
    """
    done, writing = 0, []
    for count, actions in rows[0].plan.begin(len(rows)):
        part = slice(done, done + count)
        left = 1 if actions.awaits_return else rows[0].together or 1
        writing.append(Writing(list(rows[part]), where[part], actions, left, states, at[part]))
        done += count
    return writing


def write(memory: Memory, serializer: Serializer, writing: Sequence[Writing]) -> None:
    """Complete every row's action, one id of each unfinished row at a time."""
    unfinished = [w for w in writing if w.actions.allowed is not None]  # not of no dimensions
    while unfinished:
        ids = choose_next(memory.model, unfinished)
        done = 0
        for w in unfinished:
            w.push(ids[done : done + len(w.rows)])
            done += len(w.rows)
        unfinished = [w for w in unfinished if w.actions.allowed is not None]
        waiting = [w for w in unfinished if not w.left]
        if waiting:
            _read(memory, serializer, waiting)
    for w in writing:
        w.finish([_shown(serializer, w)] if w.written else [])


def choose_next(model: GatoModel, writing: Sequence[Writing]) -> np.ndarray:
    """Return the next id of each row of `writing`, one after another."""
    ids = []
    for returns in (False, True):  # neighbours of one kind are decided at once
        some = [w for w in writing if w.actions.awaits_return == returns]
        if not some:
            continue
        states = torch.cat([w.given for w in some]) if len(some) > 1 else some[0].given
        rows = [row for w in some for row in w.rows]
        spans = [w.actions.allowed for w in some for _ in w.rows]
        offered = [s for s in spans if s is not None]
        generators = [row.generator for row in rows]
        if returns:
            kappas = [row.kappa for row in rows]
            chosen = choose_returns(model, states, offered[0], kappas, generators)
        else:
            warmth = [row.temperature for row in rows]
            chosen = choose(model, states, offered, warmth, generators)
        if len(some) == len(writing):
            return chosen
        ids.append(chosen)
    whole = np.zeros(sum(len(w.rows) for w in writing), np.int64)
    kind = np.repeat([w.actions.awaits_return for w in writing], [len(w.rows) for w in writing])
    whole[~kind], whole[kind] = ids
    return whole


def _shown(serializer: Serializer, w: Writing) -> TokenSequence:
    """Return what the model sees (L,) of the ids written last."""
    if not w.hides or w.asked:
        return w.actions.last()
    masked = serializer.control["<masked>"]
    return tokens(np.full(len(w.rows), masked), serializer.number[CONTROL])


def _read(memory: Memory, serializer: Serializer, waiting: Sequence[Writing]) -> None:
    """Read the ids written last, to decide the next from the states behind them.

    Of rows whose ids are decided together, these are the return to come, and <masked> in place
    of all ids but the last.
    """
    lengths = np.zeros(len(memory.lengths), np.int64)
    for w in waiting:
        w.left, w.at = w.rows[0].together or 1, np.zeros(len(w.rows), np.int64)
        lengths[w.where] = w.left
    chunk = memory.chunk(lengths, serializer.control)
    for w in waiting:
        chunk.write(w.where, _shown(serializer, w))
        chunk.fill(w.where, np.full(len(w.rows), w.left - 1))
    states = memory.read(chunk, last=bool((lengths <= 1).all()))
    for w in waiting:
        w.states = states
