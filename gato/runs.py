"""Runs as their files tell of them: what each is doing, how far it is, its last figures.

A run's folder holds ``metrics.jsonl``, a line per event, and ``state.json``, written by training
where its state changes:

```
{
  "format": 1,
  "state": "running" | "stopped" | "finished" | "failed",
  "reason": null, or one sentence: what ended it before its last step
  "step": 500, "steps": 10000     steps done when this was written, and those wanted
  "updated": 1763712000.0         when this was written, Unix seconds
  "host": "name", "pid": 4711, "pid_began": 123456    the process, and when the kernel began it
}
```

A line of metrics is one of

```
{"step": 20, "losses": {corpus: loss}, "lr": ..., "tokens_per_second": ..., "time": ...}
{"step": 500, "validation": {corpus: {"loss": ..., "perplexity": ...}}, "validation_loss": ..., ...}
{"step": 500, "evaluation": {task: score}, ...}
```

A process that is gone while the state says ``running`` has died: that is found here, from its pid,
because a killed process writes nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from pathlib import Path
from typing import Any, Literal

from gato.envs.files import write_atomically

FORMAT = 1
State = Literal["running", "stopped", "finished", "failed"]
STATES = ("running", "stopped", "finished", "failed")
STATE_FILE = "state.json"


def write_state(
    run: Path, state: State, step: int, steps: int, reason: str | None = None
) -> dict[str, Any]:
    """Write the state of a run that this process trains, and return what was written."""
    assert state in STATES, state
    found = {
        "format": FORMAT,
        "state": state,
        "reason": reason,
        "step": step,
        "steps": steps,
        "updated": time.time(),
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "pid_began": _began(os.getpid()),
    }
    run.mkdir(parents=True, exist_ok=True)
    write_atomically(run / STATE_FILE, json.dumps(found, indent=1).encode())
    return found


def _began(pid: int) -> int | None:
    """Return when the kernel began a process, in its ticks: numbers of processes are used again."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        # the name of the program, in brackets, may hold anything
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    return None
