"""What the time of a step goes to: a table, and a trace for chrome://tracing or Perfetto."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from gato.telling import tell

WARMUP = 10
"""Steps before those that are profiled: caches fill, models are compiled, kernels are chosen."""
_ROWS = 25


class Profiler:
    """Profiles some steps of a run, once."""

    def __init__(self, folder: Path, steps: int, first: int, last: int) -> None:
        """Make a profiler that has not begun.

        Args:
            folder: of the run, where the trace is written.
            steps: to profile; 0 profiles nothing.
            first: the step that the run goes on from.
            last: the step that the run ends at, which leaves fewer to warm up where it is near.
        """
        warmup = min(WARMUP, max(0, last - first - steps))
        self._begin, self._steps, self._folder = first + warmup, steps, folder
        self._left = last - first
        self._running: Any = None
        self._done = 0

    def before(self, step: int) -> None:
        """Begin where `step`, which follows, is the first to be profiled."""
        if self._steps and self._running is None and step == self._begin:
            activities = [torch.profiler.ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(torch.profiler.ProfilerActivity.CUDA)
            self._running = torch.profiler.profile(activities=activities)
            self._running.__enter__()

    def after(self, step: int) -> None:
        """End where `step` steps are done and the last to be profiled is among them."""
        if self._running is not None:
            self._done = step - self._begin
            if self._done >= self._steps:
                self.end()

    def end(self) -> None:
        """Write what was found; where nothing was profiled though it was asked for, say why."""
        if self._running is None:
            if self._steps:
                late = f"it ended before step {self._begin + 1}, the first to be profiled"
                why = late if self._left > 0 else "it has taken all of its steps; give it more"
                tell(f"there is nothing to profile in this run: {why}")
            return
        running, self._running, self._steps = self._running, None, 0
        running.__exit__(None, None, None)
        trace = self._folder / "profile.json"
        running.export_chrome_trace(str(trace))
        by = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        table = running.key_averages().table(sort_by=by, row_limit=_ROWS)
        tell(
            f"{table}\nprofiled {self._done} steps; the trace, for chrome://tracing, is in {trace}"
        )
