"""Parts of batches in order, computed here or ahead of time in worker processes.

    worker 0   (k, p)          (k, p + 2) ...     |
    worker 1          (k, p + 1)          ...     |  pipes -> a thread here -> the trainer

Every part is a pure function of (seed, step, part), so the same bytes arrive however many workers
there are. Worker w of W computes every W-th part from its first; nothing is asked of it, and a pipe
that nobody reads holds it back.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import queue
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import get_context, resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.util import Finalize
from typing import Any, Protocol, Self

from gato.envs.workers import Raised, die_with_parent, one_thread_each
from gato.kept import ROOM
from gato.memory import give_back
from gato.telling import tell
from gato.tokenizers.stream import TokenBatch

GIVE_BACK_EVERY = 32
"""Parts that a worker computes before it gives freed memory back."""

_AHEAD = 2  # parts that lie ready here; each worker holds one more
_RESTARTS = 1  # of each worker


class Parts(Protocol):
    """What a loader needs of a mixture."""

    def part(self, index: int, part: int) -> TokenBatch:
        """Return part `part` of batch `index`: a pure function of the two."""


class Loader:
    """Iterates (first_step, parts[0]), (first_step, parts[1]), ..., (first_step + 1, parts[0]), ...

    Use it as a context manager, or close it: worker processes end with it.
    """

    def __init__(
        self,
        mixture: Parts,
        first_step: int = 0,
        parts: Sequence[int] = (0,),
        workers: int = 0,
        *,
        stop: int | None = None,
        say: Callable[[str], None] | None = None,
    ) -> None:
        """Start loading.

        Args:
            mixture: what the batches are drawn from.
            first_step: the index of the first batch.
            parts: which parts of every batch to give, in this order: those of this rank.
            workers: processes that compute parts ahead; 0 computes each here when it is asked for.
            stop: the index of the batch before which iteration ends; without it there is no end.
            say: told when a worker that died is started again; by default, stderr is.

        Raises:
            ValueError: for a negative number of workers, or without parts.
        """
        if workers < 0 or not parts:
            raise ValueError(f"expected workers of 0 or more and parts; got {workers} and {parts}.")
        self.mixture, self.parts = mixture, tuple(parts)
        self._at = first_step * len(self.parts)
        self._end = None if stop is None else stop * len(self.parts)
        self._crew: _Crew | None = None
        if workers and (self._end is None or self._at < self._end):
            plan = _Plan(mixture, self.parts, self._at, workers, self._end)
            self._crew = _Crew(plan, say or _to_stderr)
            # also where the interpreter ends first: before it waits for its child processes
            self._close = Finalize(self, self._crew.close, exitpriority=10)

    def __iter__(self) -> Iterator[TokenBatch]:
        return self

    def __next__(self) -> TokenBatch:
        """Return the next part.

        Raises:
            ValueError: what went wrong with the data, from whichever process.
            RuntimeError: where a worker process died twice.
        """
        if self._end is not None and self._at >= self._end:
            raise StopIteration
        if self._crew is None:
            step, part = divmod(self._at, len(self.parts))
            found = self.mixture.part(step, self.parts[part])
        else:
            found = self._crew.next()
        self._at += 1
        return found

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the workers; what they computed ahead is dropped."""
        if self._crew is not None:
            self._close()


@dataclass(frozen=True)
class _Plan:
    """Which parts there are to compute: `at` counts parts over all steps."""

    mixture: Parts
    parts: tuple[int, ...]
    first: int
    workers: int
    end: int | None

    def compute(self, at: int) -> TokenBatch:
        step, part = divmod(at, len(self.parts))
        return self.mixture.part(step, self.parts[part])


class _Crew:
    """The workers and the thread that reads from them in turn. It does not know its loader."""

    def __init__(self, plan: _Plan, say: Callable[[str], None]) -> None:
        self._plan, self._say = plan, say
        self._closed = threading.Event()
        self._ready: queue.Queue[Any] = queue.Queue(_AHEAD)
        self._workers = [_Worker(plan, w, plan.first + w) for w in range(plan.workers)]
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def next(self) -> TokenBatch:
        if self._closed.is_set():
            raise ValueError("expected a loader that is open; this one was closed.")
        found = self._ready.get()
        if isinstance(found, Exception):
            self.close()
            raise found
        return found

    def close(self) -> None:
        self._closed.set()
        for worker in self._workers:
            worker.process.kill()  # which the thread notices where it waits for one
        while self._thread.is_alive():  # it may stand before a full queue
            with contextlib.suppress(queue.Empty):
                self._ready.get(timeout=0.01)
        for worker in self._workers:
            worker.end()

    def _read(self) -> None:
        plan, at = self._plan, self._plan.first
        try:
            while not self._closed.is_set() and (plan.end is None or at < plan.end):
                self._ready.put(self._receive((at - plan.first) % plan.workers, at))
                at += 1
        except Exception as error:
            if not self._closed.is_set():
                self._ready.put(error)

    def _receive(self, number: int, at: int) -> TokenBatch:
        while True:
            worker = self._workers[number]
            try:
                found = worker.receive()
            except (EOFError, OSError):
                self._replace(number, at)
                continue
            if isinstance(found, Raised):
                raise found.error
            return found

    def _replace(self, number: int, at: int) -> None:
        """Start a dead worker again at the part that it owes."""
        if self._closed.is_set():
            raise EOFError
        worker = self._workers[number]
        code = worker.end(grace=1.0)
        step = at // len(self._plan.parts)
        told = f"data worker {number} (process {worker.process.pid}) ended, {_reason(code)}, "
        told += f"before batch {step}"
        if worker.restarts == _RESTARTS:
            hint = (
                ""
                if worker.answered
                else ("; or the calling script starts work outside `if __name__ == '__main__':`")
            )
            raise RuntimeError(
                f"{told}, for the second time: memory ran out, or a file that it reads cannot be "
                f"read{hint}. Try without workers."
            )
        self._say(f"{told}; it is started again")
        self._workers[number] = _Worker(self._plan, number, at, worker.restarts + 1)
        if self._closed.is_set():  # meanwhile, so that this one was not killed
            self._workers[number].end()


class _Worker:
    """One process and the pipe from it."""

    def __init__(self, plan: _Plan, number: int, at: int, restarts: int = 0) -> None:
        context = get_context("spawn")
        self._pipe, theirs = context.Pipe(duplex=False)
        self.process = context.Process(
            target=_serve, args=(theirs, plan, at), name=f"data worker {number}", daemon=True
        )
        with one_thread_each(), _deaf_to_sigterm():
            self.process.start()
        theirs.close()
        self.restarts, self.answered = restarts, False

    def receive(self) -> Any:
        sizes, head = pickle.loads(self._pipe.recv_bytes())
        buffers = [bytearray(size) for size in sizes]
        for buffer in buffers:
            if buffer:
                self._pipe.recv_bytes_into(buffer)
        self.answered = True
        return pickle.loads(head, buffers=buffers)

    def end(self, grace: float = 0.0) -> int | None:
        """End the process and return its exit code."""
        if grace:
            self.process.join(grace)
        if self.process.is_alive():
            self.process.kill()
        self.process.join()
        self._pipe.close()
        return self.process.exitcode


@contextlib.contextmanager
def _deaf_to_sigterm() -> Iterator[None]:
    """Let a process started inside not be ended by SIGTERM; this one hears of it afterwards.

    A SIGTERM to all processes of a run ends the trainer in its own time, and the workers with it.
    """
    resource_tracker.ensure_running()  # which otherwise starts inside, and unblocks it
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve(pipe: Connection, plan: _Plan, at: int) -> None:
    """Send every part that is this worker's, until there are no more or nobody reads."""
    die_with_parent()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.dup2(2, 1)  # stdout is for results
    ROOM.limit //= plan.workers
    while plan.end is None or at < plan.end:
        found: TokenBatch | Raised
        try:
            found = plan.compute(at)
        except Exception as error:
            found = Raised(error)
        try:
            _send(pipe, found)
        except OSError:
            return
        if isinstance(found, Raised):
            return
        at += plan.workers
        if at // plan.workers % GIVE_BACK_EVERY == 0:
            give_back()


def _send(pipe: Connection, found: Any) -> None:
    buffers: list[pickle.PickleBuffer] = []
    head = pickle.dumps(found, protocol=5, buffer_callback=buffers.append)
    views = [buffer.raw() for buffer in buffers]
    pipe.send_bytes(pickle.dumps(([len(view) for view in views], head)))
    for view in views:
        if view:
            pipe.send_bytes(view)


def _reason(code: int | None) -> str:
    """Return what an exit code says."""
    if code is None or code >= 0:
        return f"exit code {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"killed by signal {-code}"


def _to_stderr(told: str) -> None:
    tell(f"gato: {told}")
