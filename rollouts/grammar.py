"""One action being written: which ids may come next, and what value they make."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from gato.envs.episode import flatten_space, unflatten_value
from gato.rollouts.batching import Spans
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


def action_count(serializer: Serializer, task: TaskCodec) -> int | None:
    """Return how many ids an action of the task takes; None where that depends on the ids."""
    counts = [serializer.modalities[m].count(spec) for _, m, spec in task.action]
    return None if None in counts else sum(c for c in counts if c is not None)


def single(
    token: int, number: int, payload: dict[str, dict[str, np.ndarray]] | None = None
) -> TokenSequence:
    """Return one action token as a sequence."""
    return TokenSequence(
        np.array([token], np.int32),
        np.array([number], np.uint8),
        np.zeros(1, np.int16),
        np.ones(1, np.float32),
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
