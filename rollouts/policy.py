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
from typing import Any

import numpy as np
import torch

from gato.decoding import decoding_dtype
from gato.envs.episode import Episode, flatten_value
from gato.model import GatoModel
from gato.rollouts.batching import Chunk, Memory, Piece
from gato.rollouts.grammar import ActionPlan, action_count
from gato.rollouts.joint import write_joint
from gato.rollouts.sampling import check_sampling
from gato.rollouts.writing import Row, Writing, begin, write
from gato.threads import few_threads
from gato.tokenizers.serializer import Serializer
from gato.tokenizers.stream import TokenSequence, concatenate
from gato.tokenizers.task_codec import TaskCodec

Block = tuple[list[int], TokenSequence]
"""Rows L and their tokens L * n, row after row."""


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
        self._plans: dict[str, ActionPlan] = {}
        self._prompts = dict(prompts or {})
        chosen = list(range(len(names)) if seeds is None else seeds)
        self.rows = [self._row(t, s) for t, s in zip(names, chosen, strict=True)]
        _check_execute(execute, [row.task for row in self.rows])
        self.memory = Memory(model, len(names), dtype=decoding_dtype(model, precision))

    @property
    def tasks(self) -> list[str]:
        """The task of each row."""
        return [row.task.task.id for row in self.rows]

    def _row(self, task_id: str, seed: int) -> Row:
        task = self.serializer.task(task_id)
        history = task.history
        warm = history.temperature if self.temperature is None else self.temperature
        at_once = history.hide_actions or history.joint > 0
        together = action_count(self.serializer, task) if at_once else None
        execute = min(self.execute or history.joint, history.joint) or 1
        generator = np.random.default_rng(seed)
        kappa = history.kappa if self.kappa is None else self.kappa
        plan = self._plans.setdefault(task_id, ActionPlan(self.serializer, task))
        head = self._head(task)
        return Row(task, plan, head, warm, generator, together, kappa, execute)

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
        temperatures: Mapping[int, float] | None = None,
    ) -> None:
        """Forget the episodes of the rows where `mask` (B,) is true; of all rows without one.

        Args:
            mask: bool (B,).
            seeds: by row; those given of reset rows start their random generators anew.
            tasks: by row; the tasks that reset rows play from now on.
            temperatures: by row; of the actions of reset rows, until they play another task.
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
            if temperatures is not None and row in temperatures:
                check_sampling(temperatures[row])
                self.rows[row].temperature = temperatures[row]
            self.rows[row].due = []
        self._forget(chosen)

    def shorten(self, execute: int) -> None:
        """Take at most so many of the actions that one state decides, where tasks decide more."""
        self.execute = execute
        for row in self.rows:
            row.execute = min(row.execute, execute)

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

    def check(self, row: int, observation: Any) -> None:
        """Raise ValueError for an observation outside the space of a row's task."""
        self._observed({row: observation}, [row])

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
        writing: list[Writing] = []
        joint: list[np.ndarray] = []
        for members in self._by_task(rows).values():
            where, some = np.array(members), [self.rows[r] for r in members]
            if some[0].task.history.joint and some[0].together:  # of no dimensions, none is asked
                joint.append(where)
            else:
                writing += begin(some, where, states, at[where])
        write(self.memory, self.serializer, writing)
        if joint:
            write_joint(self.model, self.rows, joint, states, at)

    def _by_task(self, rows: list[int]) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {}
        for r in rows:
            found.setdefault(self.rows[r].task.task.id, []).append(r)
        return found

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

    def _observed(
        self, observations: Sequence[Any] | Mapping[int, Any], rows: list[int]
    ) -> list[Block]:
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
