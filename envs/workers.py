"""Worker processes: how they are started, asked and replaced, and that none outlives its parent.

    pool.send(worker, message)   ->   handler(message) in that worker   ->   pool.receive()

Every message has one answer, a worker's answers come in the order of its messages. A worker that
has died is replaced when it is next sent something; what it was asked is lost, and told.
"""

from __future__ import annotations

import os
import pickle
import signal
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from typing import Any

Handler = Callable[[Any], Any]


@contextmanager
def one_thread_each() -> Iterator[None]:
    """Let processes started inside use one thread each: the workers are the parallelism."""
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def die_with_parent() -> None:
    """Leave Ctrl-C to the parent, and no orphan where it is killed: a worker would not notice."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = parent_process()
    assert parent is not None, "only a worker process has a parent to watch"

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class WorkerDiedError(RuntimeError):
    """A worker process ended, or was ended because it gave no answer in time."""


class Pool:
    """`count` workers, each started when it is first sent something; one is this process itself."""

    def __init__(
        self, count: int, make: Callable[[], Handler], *, timeout: float | None = None
    ) -> None:
        """Make a pool.

        Args:
            count: workers; with 1, messages are handled in this process, by `receive`.
            make: called once in each worker; what it returns answers the messages.
            timeout: seconds without an answer after which a worker counts as hung, and is killed.
        """
        self.count, self._make, self._timeout = count, make, timeout
        self._handler: Handler | None = None
        self._here: deque[Any] = deque()
        self._workers: list[_Worker | None] = [None] * count

    def send(self, worker: int, message: Any) -> None:
        """Ask a worker something. A death is told by `receive`, not here."""
        if self.count == 1:
            self._here.append(message)
            return
        found = self._workers[worker]
        if found is None:
            found = self._workers[worker] = _Worker(self._make)
        found.send(message)

    def receive(self) -> list[tuple[int, Any]]:
        """Return at least one answer as (worker, answer); a `WorkerDiedError` stands for a death.

        A dead worker's other messages are lost with it.

        Raises:
            Exception: what a handler raised, with its traceback as a note.
        """
        if self.count == 1:
            self._handler = self._handler or self._make()
            return [(0, self._handler(self._here.popleft()))]
        asked = {w.pipe: i for i, w in enumerate(self._workers) if w is not None and w.waiting}
        assert asked, "nothing was asked, so no answer would ever come"
        answers: list[tuple[int, Any]] = []
        while not answers:
            for pipe in wait(list(asked), self._patience()):
                i = asked[pipe]  # type: ignore[index]
                answers.append((i, self._take(i)))
            for i, late in self._late():
                answers.append((i, late))
        for _, answer in answers:
            if isinstance(answer, _Raised):
                raise answer.error
        return answers

    def close(self) -> None:
        """End the worker processes, whatever they are doing."""
        for worker in self._workers:
            if worker is not None:
                worker.end()
        self._workers = [None] * self.count

    def _take(self, i: int) -> Any:
        worker = self._workers[i]
        assert worker is not None
        try:
            return worker.receive()
        except (EOFError, OSError):
            self._workers[i] = None
            return WorkerDiedError(f"worker process ended, exit code {worker.end(grace=1.0)}")

    def _patience(self) -> float | None:
        """Return for how long nothing can become late."""
        if self._timeout is None:
            return None
        since = [w.since for w in self._workers if w is not None and w.waiting]
        return max(0.0, min(since) + self._timeout - time.monotonic())

    def _late(self) -> Iterator[tuple[int, WorkerDiedError]]:
        for i, worker in enumerate(self._workers):
            if self._timeout is None or worker is None or not worker.waiting:
                continue
            if time.monotonic() - worker.since >= self._timeout and not worker.pipe.poll():
                worker.end()
                self._workers[i] = None
                yield (
                    i,
                    WorkerDiedError(
                        f"worker process gave no answer in {self._timeout:g} s and was ended"
                    ),
                )


class _Raised:
    """Carries what a handler raised to the parent."""

    def __init__(self, error: Exception) -> None:
        try:
            error.add_note(traceback.format_exc())
            pickle.loads(pickle.dumps(error))
        except Exception:  # an exception of a simulator's own kind may not travel
            error = RuntimeError(f"{type(error).__name__}: {error}")
        self.error = error


class _Worker:
    """One process, the pipe to it, and how many answers it owes."""

    def __init__(self, make: Callable[[], Handler]) -> None:
        context = get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, make), daemon=True)
        with one_thread_each():
            self.process.start()
        theirs.close()
        self.waiting = 0
        self.since = 0.0
        """When it was given work while it had none, or gave its last answer."""

    def send(self, message: Any) -> None:
        if not self.waiting:
            self.since = time.monotonic()
        self.waiting += 1
        try:
            self.pipe.send(message)
        except OSError:
            pass  # it has died: its pipe is at its end, which `receive` finds

    def receive(self) -> Any:
        answer = self.pipe.recv()
        self.waiting -= 1
        self.since = time.monotonic()
        return answer

    def end(self, grace: float = 0.0) -> int | None:
        """End the process and return its exit code."""
        self.pipe.close()
        if grace:
            self.process.join(grace)
        if self.process.is_alive():
            self.process.kill()
        self.process.join()
        return self.process.exitcode


def _serve(pipe: Connection, make: Callable[[], Handler]) -> None:
    """Answer messages until the other end closes."""
    die_with_parent()
    handler = make()
    while True:
        try:
            message = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            answer = handler(message)
        except Exception as error:
            answer = _Raised(error)
        try:
            pipe.send(answer)
        except OSError:
            return
