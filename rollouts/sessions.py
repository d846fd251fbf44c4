"""Episodes under way that others play: each a row of one policy, with a task and memory of its own.

Who asks keeps books (`open`, `ask`, ...); who owns the model decides (`decide`) for all that wait
at once. What has not been asked for anything for a while has ended, and is told so when it asks
again: nothing is dropped to make room for another.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gato.model import GatoModel
from gato.rollouts.policy import Policy
from gato.rollouts.sampling import check_sampling
from gato.tokenizers.serializer import Serializer

ENDED = 1000
"""Sessions that have ended of which is known why."""


class Busy(RuntimeError):
    """Too many wait already; come back later."""


class NoSession(ValueError):
    """There is no such session, or no longer."""


def settle(future: Future[Any], error: Exception) -> None:
    """Let a future fail, unless it has ended or nobody wants it."""
    try:
        future.set_exception(error)
    except InvalidStateError:
        return


class Decision(Future[Any]):
    """What will be an action."""

    step: int
    """Which of its episode it is, from 1."""


@dataclass(frozen=True)
class State:
    """How far a session is."""

    task: str
    steps: int
    """Actions since its episode began."""
    waits: bool
    """Whether it waits for an action."""
    left: float
    """Seconds until it has ended, if nothing is asked of it."""


@dataclass(eq=False)
class Session:
    """One of them."""

    task: str
    row: int
    seed: int | None
    """Where its random generator starts at the next reset; None lets it go on."""
    temperature: float | None
    used: float
    """When something was asked of it last."""
    new: bool = True
    """Whether its row still plays what another session did."""
    fresh: bool = True
    """Whether what it observes next is the first of an episode."""
    steps: int = 0
    """Actions since its episode began."""
    observation: Any = None
    future: Decision | None = field(default=None, repr=False)
    """What it waits for."""


class Sessions:
    """At most so many episodes; all but `decide` is called with the lock held."""

    def __init__(
        self,
        model: GatoModel,
        serializer: Serializer,
        most: int = 32,
        idle_seconds: float = 600.0,
        precision: str | None = None,
        *,
        lock: AbstractContextManager[Any] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Have none yet.

        Args:
            model: in evaluation mode.
            serializer: the checkpoint's.
            most: the most sessions at the same time.
            idle_seconds: a session that nothing is asked of for longer has ended.
            precision: see `Policy`.
            lock: which may be taken again by who has it.
            clock: gives the seconds.
        """
        self.model, self.serializer, self.precision = model, serializer, precision
        self.most, self.idle_seconds, self.clock = most, idle_seconds, clock
        self.lock = lock or threading.RLock()
        self.asked: list[Session] = []
        """Those that wait for an action and are not being decided yet."""
        self._open: dict[str, Session] = {}
        self._ended: dict[str, str] = {}
        self._policy: Policy | None = None

    def __len__(self) -> int:
        self._expire()
        return len(self._open)

    def open(self, task: str, seed: int = 0, temperature: float | None = None) -> str:
        """Return the id of a new session.

        Raises:
            Busy: where there are as many as may be.
            ValueError: for a task that the model does not know, no seed, and no temperature.
        """
        self.serializer.task(task)
        if temperature is not None:
            check_sampling(temperature)
        np.random.default_rng(seed)
        self._expire()
        taken = {s.row for s in self._open.values()}
        if len(taken) >= self.most:
            raise Busy(
                f"{len(taken)} sessions are open, as many as may be; close one, or wait until one "
                f"has been idle for {self.idle_seconds:g} seconds"
            )
        row = next(r for r in range(self.most) if r not in taken)
        id = secrets.token_urlsafe(16)
        self._open[id] = Session(task, row, seed, temperature, self.clock())
        return id

    def state(self, id: str) -> State:
        """Return how far a session is; this does not count as use."""
        s = self._found(id)
        waits = s.future is not None
        left = self.idle_seconds - (0.0 if waits else self.clock() - s.used)
        return State(s.task, s.steps, waits, max(left, 0.0))

    def close(self, id: str) -> Future[Any] | None:
        """End a session, and return what it waits for that will now never come."""
        session = self._found(id)
        self._end(id, "was closed")
        if session not in self.asked:
            return None
        self.asked.remove(session)
        return session.future

    def reset(self, id: str, seed: int | None = None) -> None:
        """Let what a session observes next be the first of an episode."""
        session = self._idle(id)
        if seed is not None:
            np.random.default_rng(seed)
        session.fresh, session.seed = True, session.seed if seed is None else seed
        session.steps = 0

    def ask(self, id: str, observation: Any) -> Decision:
        """Let a session wait for an action."""
        session = self._idle(id)
        future = Decision()
        future.step = session.steps + 1
        session.observation, session.future = observation, future
        self.asked.append(session)
        return future

    def decide(self, asked: Sequence[Session]) -> None:
        """Give sessions their actions; what is wrong with one is given to this one alone."""
        wanted = []
        for session in asked:
            assert session.future is not None
            if session.future.set_running_or_notify_cancel():
                wanted.append(session)
            else:
                with self.lock:
                    session.future = session.observation = None
        if not wanted:
            return
        try:
            actions = self._actions(wanted)
        except Exception as error:
            refused = {s: wrong for s in wanted if (wrong := self._refused(s)) is not None}
            if not refused:  # something broke in the midst of it: their memories are not to be had
                self.lose(wanted, error)
                return
            for session, wrong in refused.items():
                self._finish(session, error=wrong)
            try:  # an observation is refused before anything is read
                wanted = [s for s in wanted if s not in refused]
                actions = self._actions(wanted) if wanted else []
            except Exception as again:
                self.lose(wanted, again)
                return
        for session in wanted:
            self._finish(session, actions[session.row])

    def _actions(self, asked: Sequence[Session]) -> list[Any]:
        """Return the action of each row that is asked for."""
        if self._policy is None:
            tasks = [asked[0].task] * self.most
            self._policy = Policy(self.model, self.serializer, tasks, precision=self.precision)
        policy = self._policy
        observations: list[Any] = [None] * self.most
        active = np.zeros(self.most, bool)
        for session in asked:
            if session.fresh:
                self._renew(policy, session)
            observations[session.row], active[session.row] = session.observation, True
        return list(policy.select_action(observations, active))

    def _renew(self, policy: Policy, session: Session) -> None:
        """Let a session's row begin an episode."""
        row, mask = session.row, np.arange(self.most) == session.row
        warm = None if session.temperature is None else {row: session.temperature}
        policy.reset(
            mask,
            seeds=None if session.seed is None else {row: session.seed},
            tasks={row: session.task} if session.new else None,
            temperatures=warm,
        )
        session.new = session.fresh = False
        session.seed = None

    def _refused(self, session: Session) -> ValueError | None:
        """Return what is wrong with a session's observation, as far as can be told."""
        if self._policy is None:  # not even that could be made
            return None
        try:
            self._policy.check(session.row, session.observation)
        except ValueError as error:
            return error
        except Exception as error:
            return ValueError(
                f"expected an element of the observation space of {session.task!r}; reading it "
                f"failed with {type(error).__name__}: {error}"
            )
        return None

    def _finish(self, session: Session, action: Any = None, error: Exception | None = None) -> None:
        with self.lock:
            future, session.future, session.observation = session.future, None, None
            session.used = self.clock()
            session.steps += error is None
        assert future is not None
        if error is None:
            future.set_result(action)
        else:
            settle(future, error)

    def lose(self, asked: Sequence[Session], error: Exception) -> None:
        """End those of the sessions that still wait: their memory may be in disorder."""
        with self.lock:
            lost = [session for session in asked if session.future is not None]
            for id, session in list(self._open.items()):
                if session in lost:
                    self._end(id, f"was lost: {type(error).__name__}: {error}")
        for session in lost:
            self._finish(session, error=error)

    def _found(self, id: str) -> Session:
        self._expire()
        if id not in self._open:
            why = self._ended.get(id, "is not known here")
            raise NoSession(f"session {id!r:.60} {why}; open another")
        return self._open[id]

    def _idle(self, id: str) -> Session:
        session = self._found(id)
        if session.future is not None:
            raise ValueError(f"session {id!r} waits for an action already; wait for it first")
        session.used = self.clock()
        return session

    def _expire(self) -> None:
        now = self.clock()
        for id, session in list(self._open.items()):
            if session.future is None and now - session.used > self.idle_seconds:
                self._end(id, f"ended after {self.idle_seconds:g} seconds without use")

    def _end(self, id: str, why: str) -> None:
        del self._open[id]
        self._ended[id] = why
        while len(self._ended) > ENDED:
            del self._ended[next(iter(self._ended))]
