"""The model as a policy: many rows, each its own task, decoded in one batch with one cache.

Per decision and row: what is pending of the last action, the observation and ``<sep>`` go in as
one chunk; the action comes out one allowed id at a time. Rows whose history hides actions get all
dimensions from the same forward, since none of them is shown to the others. Where a task is
conditioned on the return to come, that is drawn first, tilted towards high ones, and read with the
rest of the memory; the action is decided behind it.

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
from gato.rollouts.batching import Chunk, Memory, check_sampling, choose, choose_returns
from gato.rollouts.grammar import ActionGrammar, action_count, single
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
    """Decisions in memory."""
    pending: list[TokenSequence] = field(default_factory=list)
    """What is still to be read of the last action and, where actions were due, of observations."""
    due: list[tuple[Any, list[TokenSequence]]] = field(default_factory=list)
    """Actions that are decided and still to be taken, and what the model is then shown of them."""
    empty: bool = True
    """Whether nothing is in memory, not even the head."""


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
                ``joint`` above 1; by default all.

        Raises:
            ValueError: for a task the model does not know.
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
        self.memory = Memory(model, len(names))
        self._masked = single(serializer.control["<masked>"], serializer.number[CONTROL])

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
                generator = self.rows[row].generator
                self.rows[row] = self._row(tasks[row], 0)
                self.rows[row].generator = generator
            if seeds is not None:
                self.rows[row].generator = np.random.default_rng(seeds[row])
            self.rows[row].due = []
        self._forget(chosen)

    def _forget(self, rows: np.ndarray) -> None:
        if rows.any():
            self.memory.reset(rows)
            for row in np.flatnonzero(rows):
                self.rows[row].pending, self.rows[row].steps = [], 0
                self.rows[row].empty = True

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
            ValueError: for an observation outside its space, naming task and key.
        """
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
        self._forget(full)
        due = [r for r in rows if self.rows[r].due]
        deciding = [r for r in rows if not self.rows[r].due] if due else rows
        self._follow(observations, due)
        if deciding:
            self._decide(observations, deciding)
        for r in rows:
            actions[r], shown = self.rows[r].due.pop(0)
            self.rows[r].pending += shown
            self.rows[r].steps += 1
        return actions

    def _follow(self, observations: Sequence[Any], rows: list[int]) -> None:
        """Keep what rows observe whose action is due, to be read before they decide again.

        What the memory will have forgotten by then is never read.
        """
        read = []
        for r in rows:
            window, ahead = self.rows[r].task.history.window, len(self.rows[r].due)
            if not window or self.rows[r].steps + ahead < window:
                read.append(r)
        for members, block in self._observed(observations, read):
            n = len(block) // len(members)
            for i, r in enumerate(members):
                self.rows[r].pending.append(block.slice(i * n, (i + 1) * n))

    def _decide(self, observations: Sequence[Any], rows: list[int]) -> None:
        """Let the model decide what these rows do next: an action, or several in a joint row."""
        chunk, at = self._chunk(observations, rows)
        states = self.memory.read(chunk)
        for r in rows:
            self.rows[r].pending, self.rows[r].empty = [], False
        joint = [r for r in rows if self.rows[r].task.history.joint]
        others = [r for r in rows if not self.rows[r].task.history.joint]
        if others:
            grammars = {r: ActionGrammar(self.serializer, self.rows[r].task) for r in others}
            self._write(grammars, states, at)
            for r in others:
                self.rows[r].due.append((grammars[r].value(), []))
        if joint:
            self._write_joint(joint, states, at)

    def _write_joint(self, rows: list[int], states: Tensor, at: np.ndarray) -> None:
        """Decide all actions that are due in these rows from the states (B, Q, D) at `at` (B,)."""
        counts = {r: self.rows[r].together or 0 for r in rows}
        slots = max(self.rows[r].execute * counts[r] for r in rows)
        slot = torch.arange(1, slots + 1, device=states.device)
        given = states[rows, at[rows]][:, None].expand(-1, slots, -1)  # (U, S, D)
        found = self.model.joint(given, slot.expand(len(rows), -1))
        place = {r: i for i, r in enumerate(rows)}
        for k in range(max(self.rows[r].execute for r in rows)):
            taking = [r for r in rows if k < self.rows[r].execute]
            grammars = {r: ActionGrammar(self.serializer, self.rows[r].task) for r in taking}
            shown: dict[int, list[TokenSequence]] = {r: [] for r in taking}
            for i in range(max(counts[r] for r in taking)):
                unfinished = [r for r in taking if i < counts[r]]
                which = [place[r] for r in unfinished]
                ids = self._choose(
                    unfinished, grammars, found[which, [k * counts[r] + i for r in unfinished]]
                )
                for r, token in zip(unfinished, ids.tolist(), strict=True):
                    grammars[r].push(token)
                    if not self.rows[r].task.history.hide_actions:
                        shown[r].append(grammars[r].last())
            for r in taking:
                self.rows[r].due.append((grammars[r].value(), shown[r]))

    def _chunk(self, observations: Sequence[Any], rows: list[int]) -> tuple[Chunk, np.ndarray]:
        """Return what the rows read before they act, and where (B,) the first id is decided."""
        before = {
            r: [*([self.rows[r].head] if self.rows[r].empty else []), *self.rows[r].pending]
            for r in rows
        }
        blocks = self._observed(observations, rows)
        lengths, fill = np.zeros((2, len(self.rows)), np.int64)
        for members, block in blocks:
            lengths[members] = len(block) // len(members)
        for r in rows:
            history = self.rows[r].task.history
            if history.returns is None and not history.joint:  # else the return to come is first
                fill[r] = (self.rows[r].together or 1) - 1
            lengths[r] += fill[r] + sum(len(p) for p in before[r])
        chunk = Chunk(lengths, self.serializer.control)
        for r in rows:
            for piece in before[r]:
                chunk.write([r], piece)
        for members, block in blocks:
            chunk.write(members, block)
        chunk.fill(np.array(rows), fill[rows])
        return chunk, lengths - 1 - fill

    def _observed(
        self, observations: Sequence[Any], rows: list[int]
    ) -> list[tuple[list[int], TokenSequence]]:
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

    def _write(self, grammars: Mapping[int, ActionGrammar], states: Tensor, at: np.ndarray) -> None:
        """Complete every row's action, one id of each unfinished row at a time.

        Args:
            grammars: by row.
            states: (B, Q, D) of the chunk just read.
            at: (B,) position in the chunk whose state decides the first id.
        """
        unfinished = list(grammars)
        source = dict.fromkeys(grammars, states)  # by row: where its next id's state lies
        left = {r: 1 if grammars[r].awaits_return else self.rows[r].together for r in grammars}
        while unfinished:
            if len({id(source[r]) for r in unfinished}) == 1:
                current = source[unfinished[0]][unfinished, at[unfinished]]  # (U, D)
            else:
                current = torch.stack([source[r][r, at[r]] for r in unfinished])  # (U, D)
            ids = self._choose(unfinished, grammars, current)
            for r, token in zip(unfinished, ids.tolist(), strict=True):
                hides = self.rows[r].task.history.hide_actions and not grammars[r].awaits_return
                grammars[r].push(token)
                self.rows[r].pending = [self._masked if hides else grammars[r].last()]
                at[r], left[r] = at[r] + 1, (left[r] or 1) - 1
            unfinished = [r for r in unfinished if grammars[r].allowed is not None]
            waiting = [r for r in unfinished if not left[r]]
            if waiting:
                source |= dict.fromkeys(waiting, self._read(waiting))
                at[waiting] = 0
                left |= {r: self.rows[r].together for r in waiting}

    def _choose(
        self, rows: list[int], grammars: Mapping[int, ActionGrammar], states: Tensor
    ) -> np.ndarray:
        """Return the next id of each row, decided by its state in (U, D)."""
        asked = np.array([grammars[r].awaits_return for r in rows])
        ids = np.zeros(len(rows), np.int64)
        for which, returns in ((np.flatnonzero(~asked), False), (np.flatnonzero(asked), True)):
            if not len(which):
                continue
            chosen = [rows[i] for i in which]
            given = states if len(which) == len(rows) else states[which]
            generators = [self.rows[r].generator for r in chosen]
            spans = [grammars[r].allowed for r in chosen]
            offered = [s for s in spans if s is not None]
            if returns:
                kappas = [self.rows[r].kappa for r in chosen]
                ids[which] = choose_returns(self.model, given, offered[0], kappas, generators)
            else:
                warmth = [self.rows[r].temperature for r in chosen]
                ids[which] = choose(self.model, given, offered, warmth, generators)
        return ids

    def _read(self, waiting: list[int]) -> Tensor:
        """Read what is pending of these rows; return the states (B, Q, D) behind each token.

        Of a row whose ids are decided together, this is the return to come, and <masked> in place
        of all ids but the last.
        """
        lengths, fill = np.zeros((2, len(self.rows)), np.int64)
        fill[waiting] = [(self.rows[r].together or 1) - 1 for r in waiting]
        lengths[waiting] = 1 + fill[waiting]
        chunk = Chunk(lengths, self.serializer.control)
        for r in waiting:
            chunk.write([r], self.rows[r].pending[0])
        chunk.fill(np.array(waiting), fill[waiting])
        return self.memory.read(chunk)
