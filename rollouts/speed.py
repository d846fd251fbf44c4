"""How fast episodes are played, and what the time goes into.

    wall clock    | model | waiting for simulators | the rest: messages, dealing out, starting |
    each worker   | simulator ........ | idle |

Where the model takes most of it, a larger batch or fewer workers help; where waiting does, more
workers or cores.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal


@dataclass
class Speed:
    """Filled in while `runner.run` plays; read by its thread at any time, as in `on_played`."""

    workers: int = 0
    """Processes that step simulators; with 0, this one does."""
    steps: int = 0
    """Actions taken, those of episodes that are played once more included."""
    batches: int = 0
    """Times that the model was asked for the actions of some rows."""
    model_seconds: float = 0.0
    simulator_seconds: float = 0.0
    """Steps, resets and starts of environments, and what experts thought, all workers together."""
    waiting_seconds: float = 0.0
    """In which this process had nothing to decide; with 0 workers, in which it was a simulator."""
    _began: float | None = None
    _seconds: float = 0.0

    @contextmanager
    def running(self, workers: int) -> Iterator[None]:
        """Measure the whole."""
        self.workers, self._began = workers, time.perf_counter()
        try:
            yield
        finally:
            self._seconds, self._began = self.seconds, None

    @contextmanager
    def counting(self, what: Literal["model", "waiting"]) -> Iterator[None]:
        """Add the time that is spent inside."""
        began, name = time.perf_counter(), f"{what}_seconds"
        try:
            yield
        finally:
            setattr(self, name, getattr(self, name) + time.perf_counter() - began)

    @property
    def seconds(self) -> float:
        """Wall clock until now, or the end."""
        if self._began is None:
            return self._seconds
        return self._seconds + time.perf_counter() - self._began

    def figures(self) -> dict[str, Any]:
        """Return all of it as JSON-able data."""
        seconds = self.seconds
        return {
            "steps": self.steps,
            "seconds": round(seconds, 3),
            "steps_per_second": round(self.steps / seconds, 1) if seconds else 0.0,
            "model_seconds": round(self.model_seconds, 3),
            "simulator_seconds": round(self.simulator_seconds, 3),
            "waiting_seconds": round(self.waiting_seconds, 3),
            "workers": self.workers,
            "mean_batch": round(self.steps / self.batches, 2) if self.batches else 0.0,
        }

    def __str__(self) -> str:
        """Return it in one line."""
        return describe(self.figures())


def describe(figures: Mapping[str, Any]) -> str:
    """Return `Speed.figures` in one line."""
    seconds = figures["seconds"] or 1.0
    model, waiting = (figures[f"{what}_seconds"] / seconds for what in ("model", "waiting"))
    busy = figures["simulator_seconds"] / seconds
    workers = max(figures["workers"], 1)
    return (
        f"{figures['steps_per_second']:,.0f} steps/s of {figures['mean_batch']:.1f} rows a batch; "
        f"model {model:.0%} of the time, waiting for simulators {waiting:.0%}; simulators "
        f"{busy / workers:.0%} of the time of {workers} {'worker' if workers == 1 else 'workers'}"
    )
