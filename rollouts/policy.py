"""The model as a policy: many rows, each its own task, decoded in one batch with one cache.

Per decision and row: what is pending of the last action, the observation and ``<sep>`` go in as
one chunk; the action comes out one allowed id at a time. Rows whose history hides actions get all
dimensions from the same forward, since none of them is shown to the others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gato.envs.episode import Episode, flatten_value, unflatten_value
from gato.model import GatoModel
from gato.rollouts.batching import Sampling, embed_chunk, sample
from gato.tokenizers.serializer import Serializer, TaskCodec
from gato.tokenizers.stream import TokenSequence, concatenate


class ActionGrammar:
    """The ids written so far of one action, and which may come next."""

    def __init__(self, serializer: Serializer, task: TaskCodec) -> None:
        self.serializer, self.leaves = serializer, task.action
        self.written: list[list[int]] = [[]]
        self.shown: list[TokenSequence] = []

    def allowed(self) -> tuple[int, int] | None:
        """Return the range of stream ids that may follow; None when the action is complete."""
        while len(self.written) <= len(self.leaves):
            _, modality, spec = self.leaves[len(self.written) - 1]
            prefix = np.array(self.written[-1], np.int64)
            span = self.serializer.modalities[modality].allowed(prefix, spec)
            if span is not None:
                offset = self.serializer.offset[modality]
                return span[0] + offset, span[1] + offset
            if len(self.written) == len(self.leaves):
                return None
            self.written.append([])
        return None

    def push(self, token: int) -> None:
        """Take the next id, one of those that `allowed` returned."""
        _, modality, spec = self.leaves[len(self.written) - 1]
        owner = self.serializer.modalities[modality]
        local = token - self.serializer.offset[modality]
        rows = owner.rows_of(np.array([[local]]), spec, len(self.written[-1]))
        self.written[-1].append(local)
        payload = {}
        if rows:
            payload[modality] = {k: v.reshape(1, *v.shape[2:]) for k, v in rows.items()}
            payload[modality]["at"] = np.zeros(1, np.int64)
        number = self.serializer.number[modality]
        self.shown.append(_token(token, number, payload))

    def value(self) -> dict[str, Any]:
        """Return the action's leaves by path."""
        return {
            path: self.serializer.modalities[modality].decode(np.array(ids), spec)
            for (path, modality, spec), ids in zip(self.leaves, self.written, strict=True)
        }

    def count(self) -> int:
        """Return how many ids the whole action takes.

        Raises:
            ValueError: where that depends on the ids (text).
        """
        counts = [self.serializer.modalities[m].count(spec) for _, m, spec in self.leaves]
        if any(c is None for c in counts):
            raise ValueError("an action that contains text has no fixed number of tokens")
        return sum(c for c in counts if c is not None)


def _token(token: int, number: int, payload: dict[str, Any] | None = None) -> TokenSequence:
    return TokenSequence(
        np.array([token], np.int32),
        np.array([number], np.uint8),
        np.zeros(1, np.int16),
        np.ones(1, np.float32),
        payload or {},
    )


class Policy:
    """Decides for B rows at once; row i plays ``tasks[i]``."""

    def __init__(
        self,
        model: GatoModel,
        serializer: Serializer,
        tasks: Sequence[str],
        *,
        temperature: float | None = None,
        seeds: Sequence[int] | None = None,
        prompts: Mapping[str, Episode] | None = None,
    ) -> None:
        """Make a policy whose memory is empty.

        Args:
            model: in evaluation mode.
            serializer: the checkpoint's.
            tasks: the task of each row.
            temperature: of the actions; by default what each task was trained for.
            seeds: of each row's random generator.
            prompts: per task, an episode to be shown before the first step.

        Raises:
            ValueError: for a task the model does not know.
        """
        self.model, self.serializer = model, serializer
        self.tasks = [serializer.task(t) for t in tasks]
        warmth = [t.history.temperature if temperature is None else temperature for t in self.tasks]
        self.sampling = Sampling(warmth, list(seeds or range(len(tasks))))
        self.prompts = {
            t: serializer.episode(e).window(0, len(e)) for t, e in (prompts or {}).items()
        }
        self.cache = model.new_cache(len(tasks), chunk=128)
        self.heads: list[TokenSequence | None] = [None] * len(tasks)
        self.pending: list[list[TokenSequence]] = [[] for _ in tasks]
        self.steps = np.zeros(len(tasks), np.int64)
        self.reset()

    def reset(
        self,
        mask: Sequence[bool] | np.ndarray | None = None,
        seeds: Sequence[int] | None = None,
    ) -> None:
        """Forget the episodes of the rows where `mask` (B,) is true; of all rows without one."""
        chosen = np.ones(len(self.tasks), bool) if mask is None else np.asarray(mask, bool)
        self._restart(chosen)
        if seeds is not None:
            for row in np.flatnonzero(chosen):
                self.sampling.generators[row] = np.random.default_rng(seeds[row])

    def _restart(self, rows: np.ndarray) -> None:
        if not rows.any():
            return
        self.cache.reset(torch.from_numpy(rows))
        for row in np.flatnonzero(rows):
            task = self.tasks[row]
            self.heads[row] = self.serializer.head(task.task.id)
            if task.task.id in self.prompts:
                parts = [self.heads[row], self.prompts[task.task.id]]
                self.heads[row] = concatenate([p for p in parts if p is not None])
            self.pending[row] = []
            self.steps[row] = 0

    @torch.no_grad()
    def select_action(
        self, observations: Sequence[Any], active: Sequence[bool] | np.ndarray | None = None
    ) -> list[Any]:
        """Return one action per row, an element of its task's action space.

        Args:
            observations: one per row, elements of the rows' observation spaces.
            active: rows that want an action; the others' memory stays and they get None.
        """
        rows = range(len(self.tasks)) if active is None else np.flatnonzero(active)
        rows = [int(r) for r in rows]
        if not rows:
            return [None] * len(self.tasks)
        self._restart_full(rows)
        grammars = {r: ActionGrammar(self.serializer, self.tasks[r]) for r in rows}
        hidden_counts = {
            r: grammars[r].count() if self.tasks[r].history.hide_actions else 1 for r in rows
        }
        chunks = [_EMPTY] * len(self.tasks)
        for r in rows:
            chunks[r] = self._chunk(r, observations[r], hidden_counts[r])
        states, lengths = self._decode(chunks)
        last = (lengths - 1).clamp(min=0)
        self._write(rows, grammars, states, last, hidden_counts)
        actions: list[Any] = [None] * len(self.tasks)
        for r in rows:
            space = self.tasks[r].task.action_space
            actions[r] = unflatten_value(space, grammars[r].value(), "action")
            self.steps[r] += 1
        return actions

    def _restart_full(self, rows: list[int]) -> None:
        full = np.zeros(len(self.tasks), bool)
        for r in rows:
            window = self.tasks[r].history.window
            full[r] = bool(window) and self.steps[r] >= window
        self._restart(full)

    def _chunk(self, row: int, observation: Any, n_action: int) -> TokenSequence:
        """Return what row `row` has to read before it can act."""
        task = self.tasks[row]
        flat = flatten_value(task.task.observation_space, observation, "observation")
        parts = [] if self.heads[row] is None else [self.heads[row]]
        parts += self.pending[row]
        parts.append(self.serializer.observation(task.task.id, flat))
        parts += [self._masked()] * (n_action - 1)
        self.heads[row], self.pending[row] = None, []
        return concatenate([p for p in parts if p is not None])

    def _masked(self) -> TokenSequence:
        return _token(self.serializer.control["<masked>"], self.serializer.number["control"])

    def _decode(self, chunks: list[TokenSequence]) -> tuple[Tensor, Tensor]:
        pad, masked = (self.serializer.control[t] for t in ("<pad>", "<masked>"))
        x, lengths = embed_chunk(self.model, chunks, pad, masked)
        return self.model.decode(x, self.cache, lengths), lengths

    def _write(
        self,
        rows: list[int],
        grammars: dict[int, ActionGrammar],
        states: Tensor,
        last: Tensor,
        hidden_counts: dict[int, int],
    ) -> None:
        """Complete every row's action, one id of each unfinished row at a time."""
        index = torch.arange(len(self.tasks), device=states.device)
        offset = torch.tensor(
            [1 - hidden_counts.get(r, 1) for r in range(len(self.tasks))], device=states.device
        )
        at = last + offset
        unfinished = list(rows)
        slot = 0
        current = states[index, at.clamp(min=0)]  # (B, D)
        while unfinished:
            low, high = np.zeros((2, len(self.tasks)), np.int64)
            high += 1
            for r in unfinished:
                span = grammars[r].allowed()
                assert span is not None
                low[r], high[r] = span
            ids = sample(self.model.logits(current), low, high, self.sampling)
            for r in unfinished:
                grammars[r].push(int(ids[r]))
            written = unfinished
            unfinished = [r for r in unfinished if grammars[r].allowed() is not None]
            for r in written:
                hides = self.tasks[r].history.hide_actions
                if r not in unfinished:
                    self.pending[r] = [self._masked() if hides else grammars[r].shown[-1]]
            if not unfinished:
                return
            slot += 1
            current = self._next(unfinished, grammars, states, at, slot)

    def _next(
        self,
        unfinished: list[int],
        grammars: dict[int, ActionGrammar],
        states: Tensor,
        at: Tensor,
        slot: int,
    ) -> Tensor:
        """Return the states (B, D) that predict id number `slot` of each unfinished row."""
        index = torch.arange(len(self.tasks), device=states.device)
        ahead = states[index, (at + slot).clamp(max=states.shape[1] - 1)]
        shown = [r for r in unfinished if not self.tasks[r].history.hide_actions]
        if not shown:
            return ahead
        chunks = [_EMPTY] * len(self.tasks)
        for r in shown:
            chunks[r] = grammars[r].shown[-1]
        decoded, _ = self._decode(chunks)
        mask = torch.zeros(len(self.tasks), dtype=torch.bool, device=states.device)
        mask[shown] = True
        return torch.where(mask[:, None], decoded[:, 0], ahead)


_EMPTY = replace(
    _token(0, 0),
    ids=np.zeros(0, np.int32),
    modality=np.zeros(0, np.uint8),
    local=np.zeros(0, np.int16),
    target=np.zeros(0, np.float32),
)
