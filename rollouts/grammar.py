"""Actions being written: which ids may come next, and what values they make.

`ActionGrammar` writes one action and asks its modalities before every id. Where no id decides what
may follow it, which holds for numbers, `ActionPlan` knows all ranges beforehand, and
`RowsOfActions` writes the actions of many rows of a task at once, with the same outcome.

Legend: L rows, A ids of an action.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from gato.envs.episode import flatten_space, unflatten_value
from gato.rollouts.sampling import Spans
from gato.tokenizers.modality import Modality, Spec
from gato.tokenizers.serializer import CONTROL, Serializer
from gato.tokenizers.stream import TokenSequence
from gato.tokenizers.task_codec import TaskCodec


class ActionGrammar:
    """The ids written so far of one action, and which may come next.

    Leaves come in the stream's order; one whose length depends on its value ends with <eos>. Where
    the task is conditioned on the return to come, that is written first; it is not in the value.
    """

    def __init__(self, serializer: Serializer, task: TaskCodec) -> None:
        self.serializer, self.task = serializer, task
        self.written: list[list[int]] = [[] for _ in task.action]
        self._leaf = 0
        self.awaits_return = task.history.returns is not None
        """Whether the next id is the return to come."""
        self.allowed: Spans | None = self._allowed()
        """The spans of ids that may follow; None when the action is complete."""

    def _allowed(self) -> Spans | None:
        if self.awaits_return:
            ids = self.serializer.return_ids
            return ((ids[0], ids[-1] + 1),)
        while self._leaf < len(self.task.action):
            _, modality, spec = self.task.action[self._leaf]
            owner, offset = self.serializer.modalities[modality], self.serializer.offset[modality]
            prefix = np.array(self.written[self._leaf], np.int64)
            span = owner.allowed(prefix, spec)
            spans = () if span is None else ((span[0] + offset, span[1] + offset),)
            if owner.count(spec) is None:
                end = self.serializer.control["<eos>"]
                spans = (*spans, (end, end + 1))
            if spans:
                return spans
            self._leaf += 1
        return None

    def push(self, token: int) -> None:
        """Take the next id, one of those allowed."""
        if self.awaits_return:
            self.awaits_return = False
            self._last = (token, 0, -1)
            self.allowed = self._allowed()
            return
        _, modality, _ = self.task.action[self._leaf]
        self._last = (token, self._leaf, len(self.written[self._leaf]))
        if token == self.serializer.control["<eos>"]:
            self._leaf += 1
        else:
            self.written[self._leaf].append(token - self.serializer.offset[modality])
        self.allowed = self._allowed()

    def last(self) -> TokenSequence:
        """Return the id pushed last as the token that a model sees which is shown its actions."""
        token, leaf, place = self._last
        _, modality, spec = self.task.action[leaf]
        if place < 0 or token == self.serializer.control["<eos>"]:
            return single(token, self.serializer.number[CONTROL])
        local = np.array([token - self.serializer.offset[modality]])
        rows = self.serializer.modalities[modality].rows_of(local, spec, place)
        payload = {modality: {**rows, "at": np.zeros(1, np.int64)}} if rows else {}
        return single(token, self.serializer.number[modality], payload)

    def value(self) -> Any:
        """Return the complete action, an element of the task's action space."""
        space = self.task.task.action_space
        leaves = flatten_space(space, "action")
        flat = {}
        for (path, modality, spec), ids in zip(self.task.action, self.written, strict=True):
            decoded = self.serializer.modalities[modality].decode(np.array(ids, np.int64), spec)
            flat[path] = inside(leaves[path], decoded)
        return unflatten_value(space, flat, "action")


@dataclass(frozen=True, eq=False)
class _Leaf:
    """One leaf of an action."""

    path: str
    modality: Modality
    spec: Spec
    space: gym.Space
    offset: int
    number: int
    first: int
    """Where its ids begin among those of the action."""
    ranges: list[tuple[int, int]]


class ActionPlan:
    """Everything about a task's actions that does not depend on what is written."""

    def __init__(self, serializer: Serializer, task: TaskCodec) -> None:
        self.serializer, self.task = serializer, task

    @cached_property
    def leaves(self) -> list[_Leaf] | None:
        """The leaves; None where a range depends on the ids before it."""
        spaces_of = flatten_space(self.task.task.action_space, "action")
        leaves: list[_Leaf] = []
        first = 0
        for path, name, spec in self.task.action:
            modality, offset = self.serializer.modalities[name], self.serializer.offset[name]
            ranges = modality.ranges(spec)
            if ranges is None:
                return None
            number = self.serializer.number[name]
            leaves.append(
                _Leaf(path, modality, spec, spaces_of[path], offset, number, first, ranges)
            )
            first += len(ranges)
        return leaves

    @cached_property
    def spans(self) -> list[Spans]:
        """The ids that may come at each place, behind the return to come where there is one."""
        spans: list[Spans] = []
        if self.task.history.returns is not None:
            ids = self.serializer.return_ids
            spans.append(((ids[0], ids[-1] + 1),))
        for leaf in self.leaves or []:
            spans += [((start + leaf.offset, stop + leaf.offset),) for start, stop in leaf.ranges]
        return spans

    def begin(self, count: int) -> list[tuple[int, Actions]]:
        """Return what writes the actions of `count` rows, each with how many of them it writes."""
        if self.leaves is None:
            return [(1, OneAction(self.serializer, self.task)) for _ in range(count)]
        return [(count, RowsOfActions(self, count))]


class OneAction:
    """One row's action, written as if it were many."""

    def __init__(self, serializer: Serializer, task: TaskCodec) -> None:
        self._grammar = ActionGrammar(serializer, task)

    @property
    def awaits_return(self) -> bool:
        """Whether the next id is the return to come."""
        return self._grammar.awaits_return

    @property
    def allowed(self) -> Spans | None:
        """The spans of ids that may follow; None when the action is complete."""
        return self._grammar.allowed

    def push(self, ids: np.ndarray) -> None:
        """Take the next id (1,), one of those allowed."""
        self._grammar.push(int(ids[0]))

    def last(self) -> TokenSequence:
        """Return the id pushed last as the token that a model sees which is shown its actions."""
        return self._grammar.last()

    def values(self) -> list[Any]:
        """Return the complete action."""
        return [self._grammar.value()]


class RowsOfActions:
    """The actions of L rows of one task, an id of each at a time; see the module."""

    def __init__(self, plan: ActionPlan, count: int) -> None:
        assert plan.leaves is not None
        self._plan, self._leaves, self._spans = plan, plan.leaves, plan.spans
        self._ids = np.zeros((count, len(self._spans)), np.int64)
        self._written = 0
        self._returns = int(plan.task.history.returns is not None)

    @property
    def awaits_return(self) -> bool:
        """Whether the next id is the return to come."""
        return self._written < self._returns

    @property
    def allowed(self) -> Spans | None:
        """The spans of ids that may follow; None when the actions are complete."""
        return self._spans[self._written] if self._written < len(self._spans) else None

    def push(self, ids: np.ndarray) -> None:
        """Take the next id (L,) of each, one of those allowed."""
        self._ids[:, self._written] = ids
        self._written += 1

    def last(self) -> TokenSequence:
        """Return the ids pushed last as tokens (L,) of a model that is shown its actions."""
        at = self._written - 1
        ids = self._ids[:, at]
        place = at - self._returns
        if place < 0:
            return tokens(ids, self._plan.serializer.number[CONTROL])
        leaf = next(f for f in reversed(self._leaves) if f.first <= place)
        local = (ids - leaf.offset)[:, None]
        rows = leaf.modality.rows_of(local, leaf.spec, place - leaf.first)
        payload = {}
        if rows:
            fields = {k: v.reshape(len(ids), *v.shape[2:]) for k, v in rows.items()}
            payload = {leaf.modality.name: {**fields, "at": np.arange(len(ids))}}
        return tokens(ids, leaf.number, payload)

    def values(self) -> list[Any]:
        """Return the complete actions, elements of the task's action space."""
        ids = self._ids[:, self._returns :]
        columns = {}
        for leaf in self._leaves:
            local = ids[:, leaf.first : leaf.first + len(leaf.ranges)] - leaf.offset
            decoded = leaf.modality.decode_many(local, leaf.spec)
            if isinstance(leaf.space, spaces.Box):
                within = inside(leaf.space, decoded)
                columns[leaf.path] = [within[i, ...] for i in range(len(ids))]  # arrays, no numbers
            else:
                columns[leaf.path] = [inside(leaf.space, one) for one in decoded]
        space = self._plan.task.task.action_space
        if list(columns) == ["action"] and not isinstance(space, spaces.Dict | spaces.Tuple):
            return columns["action"]
        return [
            unflatten_value(space, {path: column[i] for path, column in columns.items()}, "action")
            for i in range(len(ids))
        ]


Actions = OneAction | RowsOfActions


def action_count(serializer: Serializer, task: TaskCodec) -> int | None:
    """Return how many ids an action of the task takes; None where that depends on the ids."""
    counts = [serializer.modalities[m].count(spec) for _, m, spec in task.action]
    return None if None in counts else sum(c for c in counts if c is not None)


def single(
    token: int, number: int, payload: dict[str, dict[str, np.ndarray]] | None = None
) -> TokenSequence:
    """Return one action token as a sequence."""
    return tokens(np.array([token]), number, payload)


def tokens(
    ids: np.ndarray, number: int, payload: dict[str, dict[str, np.ndarray]] | None = None
) -> TokenSequence:
    """Return action tokens (L,), one of each of L rows, as a sequence."""
    n = len(ids)
    return TokenSequence(
        ids.astype(np.int32),
        np.full(n, number, np.uint8),
        np.zeros(n, np.int16),
        np.ones(n, np.float32),
        payload or {},
    )


def inside(space: gym.Space, value: Any) -> Any:
    """Return a decoded leaf as an element of its space: its type, bounds and characters."""
    match space:
        case spaces.Box():
            return np.asarray(np.clip(value, space.low, space.high), space.dtype)
        case spaces.MultiDiscrete() | spaces.MultiBinary():
            return np.asarray(value, space.dtype).reshape(space.shape)
        case spaces.Discrete():
            return np.int64(value)
        case spaces.Text():
            return _text_inside(space, value)
    raise TypeError(f"no action is decoded into a {type(space).__name__}")


def _text_inside(space: spaces.Text, text: str) -> str:
    cut = text[: space.max_length]
    if not space.contains(cut):
        cut = "".join(c for c in text if c in space.character_set)[: space.max_length]
    missing = max(space.min_length - len(cut), 0)
    return cut + space.character_list[0] * missing if missing else cut
