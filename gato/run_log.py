"""What a run tells while it lasts: ``metrics.jsonl``, its state, its watchers, its best checkpoint.

The log holds whole lines of steps that count, and nothing else: a run that was killed goes on from
its last checkpoint, and the lines it wrote after that are dropped, for they will be written again.
`gato.runs` says what lines and states hold.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from gato.config import TrainConfig
from gato.distributed import World
from gato.envs.files import lock_folder, write_atomically
from gato.monitor import Watcher, Watchers
from gato.run_folder import point, pointed_at, tidy
from gato.runs import State, write_state
from gato.stopping import Stop


class Log:
    """The open metrics.jsonl, and what its lines say of the run's best step."""

    def __init__(self, path: Path, step: int, tasks: Collection[str] = ()) -> None:
        """Open the log of a run that goes on from `step`.

        Args:
            path: of the file.
            step: what was written of later ones is dropped.
            tasks: a step is judged by its mean score on these, and only if it has them all: others
                would be compared on other tasks. By default by what it has.
        """
        self.path, self._tasks = path, tasks
        self.measured: dict[str, dict[int, float]] = {"validation": {}, "evaluation": {}}
        """Per kind of measurement, the score of each step that has one; higher is better. That of
        a step that is not judged is no number."""
        path.parent.mkdir(parents=True, exist_ok=True)
        written = path.read_text(errors="replace") if path.exists() else ""
        kept = "".join(line + "\n" for line in written.splitlines() if self._keep(line, step))
        if kept != written:
            write_atomically(path, kept.encode())
        self.file = path.open("a")

    def _keep(self, text: str, step: int) -> bool:
        try:
            line = json.loads(text)
            kept = bool(line["step"] <= step)
        except (ValueError, KeyError, TypeError):
            return False  # half a line, from the instant the process was killed or the disk full
        if kept:
            self._note(line)
        return kept

    def _note(self, line: dict[str, Any]) -> None:
        if "validation_loss" in line:
            self.measured["validation"][line["step"]] = -line["validation_loss"]
        if line.get("evaluation"):
            scores = line["evaluation"]
            judged = [scores.get(task, math.nan) for task in self._tasks or scores]
            self.measured["evaluation"][line["step"]] = sum(judged) / len(judged)

    def write(self, line: dict[str, Any]) -> None:
        """Append a line.

        Raises:
            OSError: for a full disk, say, naming the file.
        """
        try:
            self.file.write(json.dumps(line) + "\n")
            self.file.flush()
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error
        self._note(line)

    def sync(self) -> None:
        """Wait until the lines are on disk: a checkpoint never knows more than the log."""
        os.fsync(self.file.fileno())

    def best(self, kind: str) -> int | None:
        """Return the step with the best measurement of a kind, the first of equals."""
        scores = {k: v for k, v in self.measured[kind].items() if math.isfinite(v)}
        return max(scores, key=scores.__getitem__) if scores else None

    def close(self) -> None:
        """Close the file."""
        self.file.close()


class Record:
    """Everything a run tells. All processes call it alike; process 0 writes."""

    def __init__(self, folder: Path, config: TrainConfig, world: World) -> None:
        self.folder, self.config, self.world = folder, config, world
        self.log: Log | None = None  # of process 0, while the run lasts
        self.watchers = Watchers(())

    def begin(self, step: int, watchers: Sequence[Watcher]) -> None:
        """Open the log of a run that goes on from `step`."""

        def work() -> str:
            for left_over in self.folder.glob(".*.tmp"):  # of a process killed while it wrote
                left_over.unlink()
            self.log = Log(self.folder / "metrics.jsonl", step, self.config.eval_tasks)
            if self.config.keep_best:  # a kill may have come before
                self._point_at_best()
            tidy(self.folder, self.config.keep_last)
            self.watchers = Watchers(watchers)
            self.running(step)
            self.watchers.event("start", step=step, steps=self.config.steps)
            return ""

        self.world.from_first(work)

    def running(self, step: int) -> None:
        """Tell how far it is; called in process 0 alone."""
        if self.log is not None:
            self._state("running", step, None)

    def sync(self) -> None:
        """Wait until the lines are on disk; called in process 0 alone."""
        if self.log is not None:
            self.log.sync()

    def write(self, line: dict[str, Any]) -> None:
        """Append a line, and show it to the watchers."""

        def work() -> str:
            assert self.log is not None
            self.log.write(line)
            self.watchers.metrics(line)
            return ""

        self.world.from_first(work)

    def has(self, kind: str, step: int) -> bool:
        """Return whether a step has a line of this kind; called in process 0 alone."""
        return self.log is not None and step in self.log.measured[kind]

    def is_best(self, kind: str, step: int) -> bool:
        """Return whether `step` is the best so far; point at the best, if there is a checkpoint."""
        if not self.config.keep_best or kind != self._judged:
            return False
        return self.world.from_first(lambda: str(self._point_at_best())) == str(step)

    @property
    def _judged(self) -> str:
        return "evaluation" if self.config.eval_every else "validation"

    def _point_at_best(self) -> int | None:
        """Let ``best`` name the best step's checkpoint, if there is one; return that step."""
        assert self.log is not None
        step = self.log.best(self._judged)
        name = f"step-{step or 0:08d}"
        if (self.folder / name).is_dir() and pointed_at(self.folder, "best") != name:
            point(self.folder, "best", self.folder / name)
        return step

    def end(self, step: int, reason: BaseException | str | None) -> None:
        """Close the log, and tell how the run ended and why."""
        if self.log is None:
            return
        state: State = "finished" if step == self.config.steps else "stopped"
        if isinstance(reason, BaseException):
            state = "stopped" if isinstance(reason, KeyboardInterrupt) else "failed"
            reason = str(reason) or type(reason).__name__
        with contextlib.suppress(OSError):  # a full disk: that its process is gone tells as much
            self._state(state, step, reason)
        self.watchers.event("end", step=step, state=state, reason=reason)
        self.watchers.close()
        with contextlib.suppress(OSError):  # of a line that did not fit, which was told
            self.log.close()
        self.log = None

    def _state(self, state: State, step: int, reason: str | None) -> None:
        write_state(self.folder, state, step, self.config.steps, reason)


def made(
    watchers: Sequence[Watcher] | Callable[[], Sequence[Watcher]], world: World, stop: Stop
) -> list[Watcher]:
    """Return the watchers of a run, made now if they are not yet; none but in process 0."""
    found: list[Watcher] = []

    def work() -> str:
        if not callable(watchers):
            found.extend(watchers)
            return ""
        try:
            with stop.interrupting():  # some ask for an answer from afar
                found.extend(watchers())
        except KeyboardInterrupt:
            if stop.reason is None:
                raise
            # the run saves and stops as at any other time, unwatched
        return ""

    world.from_first(work)
    return found


class Clock:
    """Time since a run went on, and since its last line of losses."""

    def __init__(self, step: int) -> None:
        self.begun = self.told_at = time.perf_counter()
        self.first = self.told = step
        self.waited = 0.0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Count what passes as waiting for data."""
        asked = time.perf_counter()
        yield
        self.waited += time.perf_counter() - asked

    @contextlib.contextmanager
    def apart(self) -> Iterator[None]:
        """Count what passes as no part of training's pace, but of the time that is left."""
        began = time.perf_counter()
        yield
        self.told_at += time.perf_counter() - began

    def lap(self, step: int) -> tuple[int, float, float]:
        """Return steps, seconds and seconds waited since the last call."""
        now = time.perf_counter()
        found = step - self.told, now - self.told_at, self.waited
        self.told, self.told_at, self.waited = step, now, 0.0
        return found

    def seconds_left(self, step: int, steps: int) -> float:
        """Return how long the rest will take at the pace so far."""
        return (time.perf_counter() - self.begun) / (step - self.first) * (steps - step)


@contextlib.contextmanager
def alone_in(run: Path, world: World) -> Iterator[None]:
    """Hold the lock of a run's folder: two runs in one would remove each other's files."""
    with contextlib.ExitStack() as held:

        def lock() -> str:
            run.mkdir(parents=True, exist_ok=True)
            held.callback(os.close, lock_folder(run, wait=False))
            return ""

        world.from_first(lock)
        try:
            yield
        except BaseException:
            with contextlib.suppress(OSError):  # it holds something, as a rule
                run.rmdir()
            raise
