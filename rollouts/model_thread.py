"""One thread that owns a model; everyone else, in any thread, asks it.

    write    texts, all in one `Engine`: a step of it after the other
    act      sessions, each its own task and memory: all that wait are decided in one batch
    call     anything else that needs the model, between two steps

In turns, so that none of the three waits for long. What one request gets wrong reaches this request
alone: a text's sink gets a `Delta` with ``finish="error"``, and a future the exception.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

from gato.rollouts.agent import Agent
from gato.rollouts.engine import Delta, Sampling
from gato.tokenizers.stream import TokenSequence

Result = TypeVar("Result")


class Busy(RuntimeError):
    """Too many wait already; come back later."""


class NoSession(ValueError):
    """There is no such session, or no longer."""


@dataclass(frozen=True, eq=False)
class Ticket:
    """A text that was asked for."""

    number: int


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
            agent: a loaded checkpoint, which nobody else may use while the thread lives.
            rows: the most texts written at the same time.
            waiting: the most texts that wait for a row, and the most calls that wait.
            sessions: the most sessions open at the same time.
            idle_seconds: a session that nothing was asked of for so long makes room for another.
            precision: see `Engine`.
        """
        raise NotImplementedError

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
        raise NotImplementedError

    def cancel(self, ticket: Ticket) -> None:
        """Forget a text: its row is free at the next step, and its sink is not called again."""
        raise NotImplementedError

    def open_session(self, task: str, *, seed: int = 0, temperature: float | None = None) -> str:
        """Return the id of a new session, whose memory is empty.

        Raises:
            Busy: where as many are open as may, none of them idle for long enough.
            ValueError: for a task that the model does not know, and no temperature.
        """
        raise NotImplementedError

    def close_session(self, id: str) -> None:
        """Forget a session; an action that it waits for fails.

        Raises:
            NoSession: where there is none.
        """
        raise NotImplementedError

    def reset_session(self, id: str, seed: int | None = None) -> None:
        """Let a session's next observation be the first of an episode.

        Args:
            id: from `open_session`.
            seed: starts its random generator anew; without one it goes on.

        Raises:
            NoSession: where there is none.
            ValueError: while it waits for an action.
        """
        raise NotImplementedError

    def act(self, id: str, observation: Any) -> Future[Any]:
        """Return what will be the action; sessions that wait are decided in one batch.

        The future fails with ValueError for an observation outside its space, which the session
        then has not seen.

        Raises:
            NoSession: where there is none.
            ValueError: while the session waits for an action.
        """
        raise NotImplementedError

    def call(self, function: Callable[..., Result], *args: Any) -> Future[Result]:
        """Return what will be the result of `function(*args)`, run in the model's thread.

        Raises:
            Busy: where as many calls wait as may.
        """
        raise NotImplementedError

    def close(self) -> None:
        """End the thread; what still runs or waits fails. To be called from any other thread."""
        raise NotImplementedError
