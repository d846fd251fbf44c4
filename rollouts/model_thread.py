"""One thread that owns a model; everyone else, in any thread, asks it.

    write    texts, all in one `Engine`: one step of it after the other
    act      sessions, each its own task and memory: all that wait are decided in one batch
    call     anything else that needs the model, one between two steps

In turns: none of the three waits for more than one step, one batch and one call, which is why a
long call is to be cut into several. What one request gets wrong reaches this request alone: a
text's sink gets a `Delta` with ``finish="error"`` and the exception, a future the exception. Where
the model fails, all it was working on fails, and the thread goes on; where it cannot even forget
what it was working on, the thread ends (`alive`).
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeVar

import torch

from gato.rollouts.agent import Agent
from gato.rollouts.engine import Delta, Engine, Sampling
from gato.rollouts.sessions import Busy, Decision, NoSession, Session, Sessions, State, settle
from gato.tokenizers.stream import TokenSequence

__all__ = ["Busy", "ModelThread", "NoSession", "Ticket"]

log = logging.getLogger("gato.serve")

Result = TypeVar("Result")
_Call = tuple[Future[Any], Callable[..., Any], tuple[Any, ...]]
_CLOSED = "the model's thread was closed"


@dataclass(eq=False)
class Ticket:
    """A text that was asked for."""

    prefix: TokenSequence
    sampling: Sampling
    sink: Callable[[Delta], None]
    wanted: bool = True
    """Whether the sink is still called."""


@dataclass(eq=False)
class _Turn:
    """What is to be done next."""

    gone: list[int]
    """Texts of the engine that nobody wants any more."""
    tickets: list[Ticket]
    """Texts that have found a row."""
    asked: list[Session]
    call: _Call | None


class ModelThread:
    """Owns the model from its start to `close`."""

    def __init__(
        self,
        agent: Agent,
        rows: int = 16,
        waiting: int = 64,
        sessions: int = 32,
        idle_seconds: float = 600.0,
        precision: str | None = None,
    ) -> None:
        """Start the thread.

        Args:
            agent: a loaded checkpoint. While the thread lives its model is the thread's alone;
                its serializer, and `prepare`, which only reads that, are anybody's.
            rows: the most texts written at the same time.
            waiting: the most texts that wait for a row, and the most calls that wait.
            sessions: the most sessions open at the same time.
            idle_seconds: a session that nothing is asked of for longer has ended.
            precision: see `Engine`.
        """
        model, serializer = agent.model, agent.serializer
        self._engine = Engine(model, serializer, rows, precision)
        self._device, self._most = model.table.weight.device, waiting
        self._changed = threading.Condition()  # guards all that follows
        self._sessions = Sessions(
            model, serializer, sessions, idle_seconds, precision, lock=self._changed
        )
        self._queue: deque[Ticket] = deque()
        self._running: dict[int, Ticket] = {}
        self._calls: deque[_Call] = deque()
        self._free = rows
        """Rows that were free when the last turn began."""
        self._closed, self._why = False, _CLOSED
        self._thread = threading.Thread(target=self._run, name="gato-model", daemon=True)
        self._thread.start()

    def __enter__(self) -> ModelThread:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # ---- in any thread -----------------------------------------------------------------------

    @property
    def alive(self) -> bool:
        """Whether it still answers; what is wrong where it does not is in the log."""
        return not self._closed and self._thread.is_alive()

    @property
    def running(self) -> int:
        """How many texts are being read or written."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """How many texts wait for a row."""
        return len(self._queue)

    @property
    def sessions(self) -> int:
        """How many sessions are open."""
        with self._changed:
            return len(self._sessions)

    def write(
        self, prefix: TokenSequence, sampling: Sampling, sink: Callable[[Delta], None]
    ) -> Ticket:
        """Have the text written that follows `prefix`.

        Args:
            prefix: what is to be gone on from.
            sampling: how.
            sink: called with every delta, in the model's thread, which it must not hold up; the
                last has a `finish`. Where it raises, the text is cancelled.

        Raises:
            Busy: where as many wait as may.
            ValueError: for a prefix that the model cannot read.
        """
        self._engine.check(prefix)
        ticket = Ticket(prefix, sampling, sink)
        with self._asking():
            if len(self._queue) >= self._most + self._free:
                raise Busy(f"{len(self._queue)} texts wait already, as many as may; try later")
            self._queue.append(ticket)
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Forget a text: its row is free at the next step, and its sink is not called again."""
        with self._changed:
            ticket.wanted = False
            if ticket in self._queue:
                self._queue.remove(ticket)

    def open_session(self, task: str, *, seed: int = 0, temperature: float | None = None) -> str:
        """Return the id of a new session, whose memory is empty.

        Raises:
            Busy: where as many are open as may, none of them idle for long enough.
            ValueError: for a task that the model does not know, no seed, and no temperature.
        """
        with self._asking():
            return self._sessions.open(task, seed, temperature)

    def close_session(self, id: str) -> None:
        """End a session; an action that it waits for fails, unless it is being decided.

        Raises:
            NoSession: where there is none.
        """
        with self._asking():
            future = self._sessions.close(id)
        if future is not None and future.set_running_or_notify_cancel():
            future.set_exception(NoSession(f"session {id!r} was closed"))

    def session(self, id: str) -> State:
        """Return how far a session is.

        Raises:
            NoSession: where there is none.
        """
        with self._changed:
            return self._sessions.state(id)

    def reset_session(self, id: str, seed: int | None = None) -> None:
        """Let a session's next observation be the first of an episode.

        Args:
            id: from `open_session`.
            seed: starts its random generator anew; without one it goes on.

        Raises:
            NoSession: where there is none.
            ValueError: while it waits for an action, and for no seed.
        """
        with self._asking():
            self._sessions.reset(id, seed)

    def act(self, id: str, observation: Any) -> Decision:
        """Return what will be the action; sessions that wait are decided in one batch.

        The future fails with ValueError for an observation outside its space, which the session
        then has not seen. Cancelled before it is begun, the session has not seen it either.

        Raises:
            NoSession: where there is none.
            ValueError: while the session waits for an action.
        """
        with self._asking():
            return self._sessions.ask(id, observation)

    def call(self, function: Callable[..., Result], *args: Any) -> Future[Result]:
        """Return what will be the result of `function(*args)`, run in the model's thread.

        Raises:
            Busy: where as many calls wait as may.
        """
        future: Future[Result] = Future()
        with self._asking():
            if len(self._calls) >= self._most:  # who has gone takes no place
                self._calls = deque(call for call in self._calls if not call[0].cancelled())
            if len(self._calls) >= self._most:
                raise Busy(f"{len(self._calls)} calls wait already, as many as may; try later")
            self._calls.append((future, function, args))
        return future

    def close(self) -> None:
        """End the thread; what still runs or waits fails. To be called from any other thread."""
        if threading.current_thread() is self._thread:
            raise RuntimeError("the model's thread cannot wait for its own end; close it elsewhere")
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    @contextmanager
    def _asking(self) -> Iterator[None]:
        """Let something be asked of the thread, if it is still there."""
        with self._changed:
            if self._closed:
                raise RuntimeError(self._why)
            yield
            self._changed.notify()

    # ---- in the model's thread ---------------------------------------------------------------

    def _run(self) -> None:
        try:
            if self._device.type == "cuda":
                torch.cuda.set_device(self._device)  # each thread has its own, at first the first
            while (turn := self._next()) is not None:
                try:
                    self._take(turn)
                except Exception as wrong:  # of the device, say: who comes next may have more luck
                    log.exception("the model failed")
                    self._lose(turn, wrong)
                    self._engine.clear()
        except Exception as wrong:
            log.exception("the model's thread has ended; nothing more can be asked of it")
            self._why = f"the model's thread has ended: {type(wrong).__name__}: {wrong}"
        finally:
            self._end(RuntimeError(self._why))

    def _has_work(self) -> bool:
        work = (self._closed, self._queue, self._running, self._calls, self._sessions.asked)
        return any(work)

    def _next(self) -> _Turn | None:
        """Wait for work; return every text that finds a row and at most one call, None at the end.

        Only books are kept here: what the device is asked would hold up all who ask for the lock.
        """
        with self._changed:
            self._changed.wait_for(self._has_work)
            if self._closed:
                return None
            gone = [number for number, ticket in self._running.items() if not ticket.wanted]
            for number in gone:
                del self._running[number]
            free = self._engine.rows - len(self._running)
            tickets = [self._queue.popleft() for _ in range(min(free, len(self._queue)))]
            self._free = free - len(tickets)
            asked, self._sessions.asked = self._sessions.asked, []
            return _Turn(gone, tickets, asked, self._calls.popleft() if self._calls else None)

    def _take(self, turn: _Turn) -> None:
        for number in turn.gone:
            self._engine.cancel(number)
        for ticket in turn.tickets:
            self._running[self._engine.submit(ticket.prefix, ticket.sampling)] = ticket
        if turn.call is not None:
            future, function, args = turn.call
            if future.set_running_or_notify_cancel():
                try:
                    result = function(*args)
                except BaseException as error:
                    future.set_exception(error)
                else:
                    future.set_result(result)
        self._sessions.decide(turn.asked)
        if self._running:
            for number, delta in self._engine.step():
                ticket = self._running[number]
                if delta.finish is not None:
                    del self._running[number]
                if delta.finish == "error":
                    log.error("the model failed at one text", exc_info=delta.error)
                self._tell(ticket, delta)

    def _lose(self, turn: _Turn, error: Exception) -> None:
        """Tell all whose work the model had begun, or was to begin in this turn."""
        self._fail([*self._running.values(), *turn.tickets], error)
        self._running.clear()
        self._sessions.lose(turn.asked, error)
        if turn.call is not None:
            settle(turn.call[0], error)

    @staticmethod
    def _tell(ticket: Ticket, delta: Delta) -> None:
        if ticket.wanted:
            try:
                ticket.sink(delta)
            except Exception:  # nobody listens any more
                ticket.wanted = False
            if delta.finish is not None:
                ticket.wanted = False

    def _fail(self, tickets: Iterable[Ticket], error: Exception) -> None:
        for ticket in tickets:
            self._tell(ticket, Delta("", 0, (), "error", error))

    def _end(self, error: Exception) -> None:
        """Tell all that still wait."""
        with self._changed:
            self._closed = True
            tickets = [*self._running.values(), *self._queue]
            futures = [future for future, _, _ in self._calls]
            futures += [s.future for s in self._sessions.asked if s.future is not None]
            self._queue.clear()
            self._running.clear()
            self._calls.clear()
            self._sessions.asked = []
        self._fail(tickets, error)
        for future in futures:
            settle(future, error)
