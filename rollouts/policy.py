"""The model as a policy: many rows, each its own task, decoded in one batch with one cache.

Per decision and row: what is pending of the last action, the observation and ``<sep>`` go in as
one chunk; the action comes out one allowed id at a time. Rows whose history hides actions get all
dimensions from the same forward, since none of them is shown to the others. Where a task is
conditioned on the return to come, that is drawn first, tilted towards high ones, and read with the
rest of the memory; the action is decided behind it.

Joint rows (a history with ``joint``) get the ids of one action or of several from the state behind
``<sep>``, asked once for each. What is decided and not yet taken is due: while a row has such
actions the model is not run for it, and what it observes is read before it decides again.

    memory of a row   head | step 0 | step 1 | ... | observation <sep> | <- the action's ids
    after `window` decisions, or `reset`, it is empty and starts with the head again
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gato.envs.episode import Episode, flatten_value
from gato.model import GatoModel
from gato.rollouts.batching import (
    Chunk,
    Memory,
    Piece,
    States,
    check_sampling,
    choose,
    choose_returns,
)
from gato.rollouts.grammar import ActionPlan, Actions, action_count, tokens
from gato.rollouts.joint import Deciding, decide
from gato.threads import few_threads
from gato.tokenizers.serializer import CONTROL, Serializer
from gato.tokenizers.stream import TokenSequence, concatenate
from gato.tokenizers.task_codec import TaskCodec


@dataclass
class _Row:
    """One episode under way."""

    task: TaskCodec
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
class _Writing:
    """Rows of one task whose actions are being written."""

    rows: np.ndarray
    """int64 (L,)"""
    actions: Actions
    hides: bool
    """Whether the model is not shown its actions."""
    together: int | None
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
    def given(self) -> Tensor:
        """The states (L, D) that decide the next id of each row."""
        return self.states[self.rows, self.at]

    def push(self, ids: np.ndarray) -> None:
        """Take the next id (L,) of each row."""
        self.asked = self.actions.awaits_return
        self.actions.push(ids)
        self.at, self.left, self.written = self.at + 1, self.left - 1, True


Block = tuple[list[int], TokenSequence]
"""Rows L and their tokens L * n, row after row."""
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def decoding_dtype(model: GatoModel, precision: str | None = None) -> torch.dtype | None:
    """Return the dtype of the trunk's products, on a GPU the cache's too; None for the model's."""
    if precision is None:
        return torch.bfloat16 if model.table.weight.is_cuda else None
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be {' or '.join(PRECISIONS)}; got {precision!r}")
    return PRECISIONS[precision]


def _check_execute(execute: int | None, tasks: Sequence[TaskCodec]) -> None:
    """Raise ValueError where no task decides so many actions at once."""
    most = max(tasks, key=lambda task: task.history.joint)
    if execute is not None and execute > most.history.joint:
        raise ValueError(
            f"execute is how many are taken of the actions that one state decides, {execute}; got "
            f"{most.task.id!r}, trained with joint = {most.history.joint}, and no task with more. "
            f"Give at most that, or leave it out"
        )


class Policy:
    """Decides for B rows at once; row i plays ``tasks[i]``."""

    def __init__(
        self,
        model: GatoModel,
        serializer: Serializer,
        tasks: str | Sequence[str],
        *,
        temperature: float | None = None,
        seeds: Sequence[int] | None = None,
        prompts: Mapping[str, Episode] | None = None,
        kappa: float | None = None,
        execute: int | None = None,
        precision: str | None = None,
    ) -> None:
        """Make a policy whose memory is empty.

        Args:
            model: in evaluation mode.
            serializer: the checkpoint's.
            tasks: the task of each row; one task makes a policy of one row, which takes one
                observation and returns one action.
            temperature: of the actions; by default what each task was trained for.
            seeds: of each row's random generator; by default its index.
            prompts: per task, steps of an episode to be shown before the first step.
            kappa: how far returns to come are tilted upwards; by default what each task was
                trained for.
            execute: actions taken of those that one state decides, where a task was trained with
                ``joint`` above 1; by default all. Where tasks decide fewer, theirs are all.
            precision: of the trunk's products, ``float32`` or ``bfloat16``; by default the model's
                own on a CPU, bfloat16 on a GPU. The cache has it on a GPU; on a CPU it keeps the
                model's own.

        Raises:
            ValueError: for a task the model does not know, and where no task decides as many
                actions at once as `execute`.
        """
        if execute is not None and execute < 1:
            raise ValueError(f"execute must be at least 1; got {execute}")
        if temperature is not None:
            check_sampling(temperature)
        if kappa is not None and not 0.0 <= kappa < math.inf:
            raise ValueError(f"kappa must be a number of at least 0; got {kappa}")
        self.model, self.serializer, self.temperature = model, serializer, temperature
        self.kappa, self.execute = kappa, execute
        self.single = isinstance(tasks, str)
        names = [tasks] if isinstance(tasks, str) else list(tasks)
        if not names:
            raise ValueError("a policy needs at least one task; got none")
        self._heads: dict[str, TokenSequence] = {}
        self._prompts = dict(prompts or {})
        chosen = list(range(len(names)) if seeds is None else seeds)
        self.rows = [self._row(t, s) for t, s in zip(names, chosen, strict=True)]
        _check_execute(execute, [row.task for row in self.rows])
        self.memory = Memory(model, len(names), dtype=decoding_dtype(model, precision))
        self._plans: dict[str, ActionPlan] = {}

    @property
    def tasks(self) -> list[str]:
        """The task of each row."""
        return [row.task.task.id for row in self.rows]

    def _row(self, task_id: str, seed: int) -> _Row:
        task = self.serializer.task(task_id)
        history = task.history
        warm = history.temperature if self.temperature is None else self.temperature
        at_once = history.hide_actions or history.joint > 0
        together = action_count(self.serializer, task) if at_once else None
        execute = min(self.execute or history.joint, history.joint) or 1
        generator = np.random.default_rng(seed)
        kappa = history.kappa if self.kappa is None else self.kappa
        return _Row(task, self._head(task), warm, generator, together, kappa, execute)

    def _head(self, task: TaskCodec) -> TokenSequence:
        name = task.task.id
        if name not in self._heads:
            head = self.serializer.head(name)
            if name in self._prompts:
                shown = self.serializer.episode(self._prompts[name])
                steps = shown.window(0, len(shown))
                if task.history.hide_actions:
                    steps = steps.hide(self.serializer.actions_in(steps))
                head = concatenate([head, steps])
                if len(head) > self.model.config.memory // 2:
                    raise ValueError(
                        f"{name!r}: a prompt of {len(steps)} tokens is more than half of the "
                        f"{self.model.config.memory} that the model remembers; give fewer steps"
                    )
            self._heads[name] = head
        return self._heads[name]

    def reset(
        self,
        mask: Sequence[bool] | np.ndarray | None = None,
        *,
        seeds: Sequence[int] | Mapping[int, int] | None = None,
        tasks: Sequence[str] | Mapping[int, str] | None = None,
    ) -> None:
        """Forget the episodes of the rows where `mask` (B,) is true; of all rows without one.

        Args:
            mask: bool (B,).
            seeds: by row; those given of reset rows start their random generators anew.
            tasks: by row; the tasks that reset rows play from now on.
        """
        chosen = np.ones(len(self.rows), bool) if mask is None else np.asarray(mask, bool)
        if chosen.shape != (len(self.rows),):
            raise ValueError(f"mask must have one entry per row, {len(self.rows)}; got {mask!r}")
        for row in np.flatnonzero(chosen).tolist():
            if tasks is not None:
                old = self.rows[row]
                self.rows[row] = self._row(tasks[row], 0)
                self.rows[row].generator, self.rows[row].read = old.generator, old.read
            if seeds is not None:
                self.rows[row].generator = np.random.default_rng(seeds[row])
            self.rows[row].due = []
        self._forget(chosen)

    def _forget(self, rows: np.ndarray) -> None:
        """Forget the episodes of `rows` (B,) bool, but not a head that is to be read again."""
        if not rows.any():
            return
        kept, whole = np.zeros(len(rows), np.int64), self.memory.whole()
        for r in np.flatnonzero(rows).tolist():
            row = self.rows[r]
            row.pending, row.steps = [], 0
            if row.read is not row.head or not whole[r]:
                row.read = None
            else:
                kept[r] = len(row.head)
        self.memory.reset(rows, kept)

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows only, in this order; a batch of finished episodes costs time."""
        self.rows = [self.rows[i] for i in rows]
        self.memory.keep(np.asarray(rows, np.int64))

    @torch.inference_mode()
    def select_action(self, observations: Any, active: Any = None) -> Any:
        """Return one action per row, an element of its task's action space.

        Args:
            observations: one per row, elements of the rows' observation spaces; one observation
                where the policy was made for one task.
            active: bool (B,), rows that want an action; the others' memory stays as it is and
                they get None.

        Raises:
            ValueError: for an observation outside its space, naming task and key; no row has then
                read or done anything.
        """
        with few_threads(self.model.config, self.model.table.weight.device):
            return self._selected(observations, active)

    def _selected(self, observations: Any, active: Any) -> Any:
        if self.single:
            return self._act([observations], [0])[0]
        if len(observations) != len(self.rows):
            raise ValueError(f"expected {len(self.rows)} observations; got {len(observations)}")
        rows = range(len(self.rows)) if active is None else np.flatnonzero(active).tolist()
        return self._act(observations, list(rows))

    def _act(self, observations: Sequence[Any], rows: list[int]) -> list[Any]:
        actions: list[Any] = [None] * len(self.rows)
        if not rows:
            return actions
        full = np.zeros(len(self.rows), bool)
        for r in rows:
            window = self.rows[r].task.history.window
            full[r] = bool(window) and self.rows[r].steps >= window
        due = [r for r in rows if self.rows[r].due]
        deciding = [r for r in rows if not self.rows[r].due] if due else rows
        # An observation may be refused, so that all are encoded before anything changes.
        followed = self._observed(observations, [r for r in due if self._is_read(r, full[r])])
        decided = self._observed(observations, deciding)
        self._forget(full)
        for members, block in followed:
            for i, r in enumerate(members):
                self.rows[r].pending.append(Piece(block, i, len(members)))
        if deciding:
            self._decide(decided, deciding)
        for r in rows:
            actions[r], shown = self.rows[r].due.pop(0)
            self.rows[r].pending += shown
            self.rows[r].steps += 1
        return actions

    def _is_read(self, row: int, full: bool) -> bool:
        """Return whether what a row observes whose action is due will be read at all.

        What the memory will have forgotten when it decides again is not, and one that is `full` is
        forgotten first.
        """
        window, ahead = self.rows[row].task.history.window, len(self.rows[row].due)
        return not window or (0 if full else self.rows[row].steps) + ahead < window

    def _decide(self, observed: list[Block], rows: list[int]) -> None:
        """Let the model decide what these rows do next: an action, or several in a joint row."""
        chunk, at = self._chunk(observed, rows)
        states = self.memory.read(chunk, last=bool((at[rows] == chunk.lengths[rows] - 1).all()))
        for r in rows:
            self.rows[r].pending, self.rows[r].read = [], self.rows[r].head
        writing: list[_Writing] = []
        joint: list[np.ndarray] = []
        for members in self._by_task(rows).values():
            where, first = np.array(members), self.rows[members[0]]
            if first.task.history.joint and first.together:  # of no dimensions, nothing is asked
                joint.append(where)
            else:
                writing += self._begin(where, states, at[where])
        self._write(writing)
        if joint:
            self._write_joint(joint, states, at)
        for w in writing:
            shown = [self._shown(w)] if w.written else []
            for i, (r, action) in enumerate(zip(w.rows.tolist(), w.actions.values(), strict=True)):
                self.rows[r].due.append((action, [Piece(s, i, len(w.rows)) for s in shown]))

    def _by_task(self, rows: list[int]) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {}
        for r in rows:
            found.setdefault(self.rows[r].task.task.id, []).append(r)
        return found

    def _plan(self, task: TaskCodec) -> ActionPlan:
        name = task.task.id
        if name not in self._plans:
            self._plans[name] = ActionPlan(self.serializer, task)
        return self._plans[name]

    def _begin(self, rows: np.ndarray, states: States, at: np.ndarray) -> list[_Writing]:
        """Return what writes the actions of a task's `rows` (L,), in one or one by one."""
        row, done, writing = self.rows[rows[0]], 0, []
        for count, actions in self._plan(row.task).begin(len(rows)):
            part = slice(done, done + count)
            left = 1 if actions.awaits_return else row.together or 1
            hides = row.task.history.hide_actions
            writing.append(
                _Writing(rows[part], actions, hides, row.together, left, states, at[part])
            )
            done += count
        return writing

    def _write_joint(self, tasks: Sequence[np.ndarray], states: States, at: np.ndarray) -> None:
        """Decide all actions that are due in the rows of joint tasks, from one state each."""
        deciding, counts = [], []
        for members in tasks:
            rows = [self.rows[r] for r in members.tolist()]
            warmth, generators = [r.temperature for r in rows], [r.generator for r in rows]
            plan, steps = self._plan(rows[0].task), rows[0].execute
            deciding.append(Deciding(plan, steps, warmth, generators))
            counts.append(steps * (rows[0].together or 0))
        every = np.concatenate(tasks)
        due = np.repeat(counts, [len(m) for m in tasks])  # by row: how many ids
        first = np.cumsum(due) - due
        of = np.repeat(np.arange(len(every)), due)
        slot = np.arange(len(of)) - first[of] + 1
        given = states[every, at[every]]
        which, asked = (torch.from_numpy(x).to(given.device) for x in (of, slot))
        found = self.model.joint(given[which], asked)  # (ids due, D)
        begin = np.zeros(len(self.rows), np.int64)
        begin[every] = first
        sizes = [len(m) * n for m, n in zip(tasks, counts, strict=True)]
        shares = [x.unflatten(0, (-1, n)) for x, n in zip(found.split(sizes), counts, strict=True)]
        ids = decide(self.model, deciding, shares)
        for members, chosen in zip(tasks, ids, strict=True):
            row = self.rows[members[0]]
            for k in range(row.execute):
                place = np.full(len(members), k * (row.together or 0))
                for w in self._begin(members, States(found, begin), place):
                    self._take(w, chosen)

    def _take(self, w: _Writing, ids: np.ndarray | None) -> None:
        """Let rows have an action of these ids (L, n), or of those that are chosen in turn."""
        shown = []
        while w.actions.allowed is not None:
            w.push(self._choose([w]) if ids is None else ids[:, w.at[0]])
            if not w.hides:
                shown.append(w.actions.last())
        for i, (r, action) in enumerate(zip(w.rows.tolist(), w.actions.values(), strict=True)):
            self.rows[r].due.append((action, [Piece(s, i, len(w.rows)) for s in shown]))

    def _chunk(self, blocks: list[Block], rows: list[int]) -> tuple[Chunk, np.ndarray]:
        """Return what the rows read before they act, and where (B,) the first id is decided."""
        before = [
            [
                *([] if self.rows[r].read is not None else [Piece(self.rows[r].head, 0, 1)]),
                *self.rows[r].pending,
            ]
            for r in rows
        ]
        lengths, fill = np.zeros((2, len(self.rows)), np.int64)
        for members, block in blocks:
            lengths[members] = len(block) // len(members)
        for r, pieces in zip(rows, before, strict=True):
            history = self.rows[r].task.history
            if history.returns is None and not history.joint:  # else the return to come is first
                fill[r] = (self.rows[r].together or 1) - 1
            lengths[r] += fill[r] + sum(len(p) for p in pieces)
        chunk = self.memory.chunk(lengths, self.serializer.control)
        chunk.write_pieces(rows, before)
        for members, block in blocks:
            chunk.write(members, block)
        chunk.fill(np.array(rows), fill[rows])
        return chunk, lengths - 1 - fill

    def _observed(self, observations: Sequence[Any], rows: list[int]) -> list[Block]:
        """Return the observations' tokens, rows of equal layout written in one go."""
        groups: dict[tuple[str, ...], list[tuple[int, dict[str, Any]]]] = {}
        for r in rows:
            task = self.rows[r].task
            flat = flatten_value(task.task.observation_space, observations[r], "observation")
            texts = [flat[p] for p, _, _ in task.observation if isinstance(flat[p], str)]
            groups.setdefault((task.task.id, *texts), []).append((r, flat))
        blocks = []
        for (name, *_), members in groups.items():
            paths = [p for p, _, _ in self.serializer.task(name).observation]
            columns = {p: [flat[p] for _, flat in members] for p in paths}
            blocks.append(([r for r, _ in members], self.serializer.observations(name, columns)))
        return blocks

    def _write(self, writing: list[_Writing]) -> None:
        """Complete every row's action, one id of each unfinished row at a time."""
        unfinished = [w for w in writing if w.actions.allowed is not None]  # not of no dimensions
        while unfinished:
            ids = self._choose(unfinished)
            done = 0
            for w in unfinished:
                w.push(ids[done : done + len(w.rows)])
                done += len(w.rows)
            unfinished = [w for w in unfinished if w.actions.allowed is not None]
            waiting = [w for w in unfinished if not w.left]
            if waiting:
                self._read(waiting)

    def _choose(self, writing: list[_Writing]) -> np.ndarray:
        """Return the next id of each row of `writing`, one after another."""
        ids = []
        for returns in (False, True):  # neighbours of one kind are decided at once
            some = [w for w in writing if w.actions.awaits_return == returns]
            if not some:
                continue
            states = torch.cat([w.given for w in some]) if len(some) > 1 else some[0].given
            rows = [self.rows[r] for w in some for r in w.rows.tolist()]
            spans = [w.actions.allowed for w in some for _ in w.rows]
            offered = [s for s in spans if s is not None]
            generators = [row.generator for row in rows]
            if returns:
                kappas = [row.kappa for row in rows]
                chosen = choose_returns(self.model, states, offered[0], kappas, generators)
            else:
                warmth = [row.temperature for row in rows]
                chosen = choose(self.model, states, offered, warmth, generators)
            if len(some) == len(writing):
                return chosen
            ids.append(chosen)
        whole = np.zeros(sum(len(w.rows) for w in writing), np.int64)
        kind = np.repeat([w.actions.awaits_return for w in writing], [len(w.rows) for w in writing])
        whole[~kind], whole[kind] = ids
        return whole

    def _shown(self, w: _Writing) -> TokenSequence:
        """Return what the model sees (L,) of the ids written last."""
        if not w.hides or w.asked:
            return w.actions.last()
        masked = self.serializer.control["<masked>"]
        return tokens(np.full(len(w.rows), masked), self.serializer.number[CONTROL])

    def _read(self, waiting: list[_Writing]) -> None:
        """Read the ids written last, to decide the next from the states behind them.

        Of rows whose ids are decided together, these are the return to come, and <masked> in place
        of all ids but the last.
        """
        lengths = np.zeros(len(self.rows), np.int64)
        for w in waiting:
            w.left, w.at = w.together or 1, np.zeros(len(w.rows), np.int64)
            lengths[w.rows] = w.left
        chunk = self.memory.chunk(lengths, self.serializer.control)
        for w in waiting:
            chunk.write(w.rows, self._shown(w))
            chunk.fill(w.rows, np.full(len(w.rows), w.left - 1))
        states = self.memory.read(chunk, last=bool((lengths <= 1).all()))
        for w in waiting:
            w.states = states
