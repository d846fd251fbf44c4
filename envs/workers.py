"""Worker processes: how they are started, asked and replaced, and that none outlives its parent.

    pool.send(worker, message)   ->   handler(message) in that worker   ->   pool.receive()

Every message has one answer, a worker's answers come in the order of its messages. A worker that
has died, or was ended because it hung, is replaced when it is next sent something; what it was
asked is lost, and told. Handlers tick as they go, so that it is known how far a dead one came.

With no workers, the calling process answers itself: quicker to start and easier to debug, but it
survives neither a simulator that hangs nor one that ends its process.
"""

from __future__ import annotations

import contextlib
import math
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

Handler = Callable[[Any], Any]
Make = Callable[[Callable[[], None]], Handler]
"""Called once in each worker with what ticks; returns what answers its messages."""
Job = TypeVar("Job")
START_SECONDS = 300.0
"""Silence that is allowed a worker while it starts: its imports may wait for a busy disk."""


class _OneThreadEach:
    """Variables of the environment that are changed while anybody is inside."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._before: dict[str, str | None] = {}

    def enter(self) -> None:
        with self._lock:
            self._inside += 1
            if self._inside == 1:
                names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
                self._before = {name: os.environ.get(name) for name in names}
                os.environ.update(dict.fromkeys(names, "1"))

    def leave(self) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside:
                return
            for name, value in self._before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value


_one_thread_each = _OneThreadEach()


@contextlib.contextmanager
def one_thread_each() -> Iterator[None]:
    """Let processes started inside use one thread each: the workers are the parallelism.

    Several threads may be inside; the last that leaves puts the environment back.
    """
    _one_thread_each.enter()
    try:
        yield
    finally:
        _one_thread_each.leave()


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
    """A worker process ended, or was ended because it hung.

    `ticks` is how often it had ticked.
    """

    def __init__(self, reason: str, ticks: int) -> None:
        super().__init__(reason)
        self.ticks = ticks


class Pool:
    """`count` worker processes, each started when it is first sent something."""

    def __init__(self, count: int, make: Make, *, timeout: float | None = None) -> None:
        """Make a pool.

        Args:
            count: processes; with 0, messages are handled in this one, by `receive`.
            make: see `Make`.
            timeout: seconds without a tick or an answer after which a worker counts as hung.
        """
        if timeout is not None and not timeout > 0:
            raise ValueError(f"expected a timeout of more than 0 seconds; got {timeout}.")
        self.here = count == 0
        """Whether this process does the work."""
        self.count, self._make = max(count, 1), make
        self._timeout = None if timeout == math.inf else timeout
        self._handler: Handler | None = None
        self._queue: deque[Any] = deque()
        self._workers: list[_Worker | None] = [None] * count

    def send(self, worker: int, message: Any) -> None:
        """Ask a worker something. A death is told by `receive`, not here."""
        if self.here:
            self._queue.append(message)
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
            RuntimeError: where a worker process ended before it could be asked anything.
        """
        if self.here:
            with contextlib.redirect_stdout(sys.stderr):  # stdout is for results
                self._handler = self._handler or self._make(lambda: None)
                return [(0, self._handler(self._queue.popleft()))]
        asked = {w.pipe: i for i, w in enumerate(self._workers) if w is not None and w.waiting}
        assert asked, "nothing was asked, so no answer would ever come"
        answers: list[tuple[int, Any]] = []
        while not answers:
            ready = wait(list(asked), self._timeout and self._timeout / 10)
            answers += [(i, self._take(i)) for pipe, i in asked.items() if pipe in ready]
            answers += self._hung()
        for _, answer in answers:
            if isinstance(answer, Raised):
                raise answer.error
        return answers

    def kill(self) -> None:
        """Kill the worker processes, from any thread; who waits for them is told of their death."""
        for worker in self._workers:
            if worker is not None:
                with contextlib.suppress(ValueError):  # it is being closed already
                    worker.process.kill()

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
            code = worker.end(grace=1.0)
        self._workers[i] = None
        if worker.ticks.value < 0:
            raise RuntimeError(
                f"worker process ended at once, exit code {code}: memory ran out, or the calling "
                f"script starts work outside `if __name__ == '__main__':`. Try workers=0."
            )
        return WorkerDiedError(f"worker process ended, exit code {code}", worker.ticks.value)

    def _hung(self) -> Iterator[tuple[int, WorkerDiedError]]:
        for i, worker in enumerate(self._workers):
            if self._timeout is None or worker is None:
                continue
            started = worker.ticks.value >= 0
            limit = self._timeout if started else max(self._timeout, START_SECONDS)
            if worker.idle() < limit:
                continue
            worker.end()
            self._workers[i] = None
            what = "nothing came of it" if started else "it had not started"
            reason = f"worker process was ended: {what} in {limit:g} s"
            yield i, WorkerDiedError(reason, worker.ticks.value)


def deal(pool: Pool, jobs: Iterable[Job], tries: int = 1) -> Iterator[tuple[Job, Any, float]]:
    """Yield jobs as they are done, each with its answer and the seconds it took; close the pool.

    A worker is sent its next job before its last answer is yielded. Where a worker dies, its job
    is done anew, up to `tries` times in all; then the `WorkerDiedError` is the answer.
    """
    waiting = deque((job, 1) for job in jobs)
    asked: dict[int, tuple[Job, int, float]] = {}

    def ask(worker: int) -> None:
        if waiting:
            job, tried = waiting.popleft()
            asked[worker] = job, tried, time.monotonic()
            pool.send(worker, job)

    try:
        for worker in range(pool.count):
            ask(worker)
        while asked:
            for worker, answer in pool.receive():
                job, tried, since = asked.pop(worker)
                again = isinstance(answer, WorkerDiedError) and tried < tries
                if again:
                    waiting.appendleft((job, tried + 1))
                ask(worker)
                if not again:
                    yield job, answer, time.monotonic() - since
    finally:
        pool.close()


class Raised:
    """Carries what a handler raised to the parent."""

    def __init__(self, error: Exception) -> None:
        told = traceback.format_exc()
        try:
            error.add_note(told)
            pickle.loads(pickle.dumps(error))
        except Exception:  # an exception of a simulator's own kind may not travel
            error = RuntimeError(f"{type(error).__name__}: {error}")
            error.add_note(told)
        self.error = error


class _Worker:
    """One process, the pipe to it, and how many answers it owes."""

    def __init__(self, make: Make) -> None:
        context = get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.ticks = context.RawValue("q", -1)
        """How often it has ticked; negative before it can be asked."""
        arguments = (theirs, self.ticks, make)
        self.process = context.Process(target=_serve, args=arguments, daemon=True)
        with one_thread_each():
            self.process.start()
        theirs.close()
        self.waiting = 0
        self._seen, self._since = -1, 0.0

    def send(self, message: Any) -> None:
        if not self.waiting:
            self._since = time.monotonic()
        self.waiting += 1
        with contextlib.suppress(OSError):  # it has died: `receive` finds its pipe at the end
            self.pipe.send(message)

    def receive(self) -> Any:
        answer = self.pipe.recv()
        self.waiting -= 1
        self._since = time.monotonic()
        return answer

    def idle(self) -> float:
        """Return for how long it owes an answer and has done nothing that can be seen."""
        if self.ticks.value != self._seen:
            self._seen, self._since = self.ticks.value, time.monotonic()
        if not self.waiting or self.pipe.poll():
            return 0.0
        return time.monotonic() - self._since

    def end(self, grace: float = 0.0) -> int | None:
        """End the process and return its exit code."""
        self.pipe.close()
        if grace:
            self.process.join(grace)
        if self.process.is_alive():
            self.process.kill()
        self.process.join()
        return self.process.exitcode


def _serve(pipe: Connection, ticks: Any, make: Make) -> None:
    """Answer messages until the other end closes."""
    die_with_parent()
    os.dup2(2, 1)  # what a simulator prints goes to stderr: stdout is for results

    def tick() -> None:
        ticks.value += 1

    handler = make(tick)
    tick()
    while True:
        try:
            message = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            answer = handler(message)
        except Exception as error:
            answer = Raised(error)
        try:
            pipe.send(answer)
        except OSError:
            return


def last_words(told: str) -> str:
    """Return the message at the end of a traceback, its first line."""
    lines = told.strip().splitlines()
    stack = [i for i, line in enumerate(lines) if line.startswith("  ")]
    return lines[stack[-1] + 1] if stack and stack[-1] + 1 < len(lines) else lines[-1]
