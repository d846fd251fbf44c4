"""Watchers of a training run: TensorBoard, and Weights & Biases where it is asked for.

A watcher is told of every line that training writes to ``metrics.jsonl``, and of events:

```
start       step, steps        steps done before; lines of later steps are drawn anew
checkpoint  step, path
end         step, state, reason    as in `state.json`, see `gato.runs`
```

Nothing a watcher does decides what is trained, and one that fails does not end the run.
"""

from __future__ import annotations

from typing import Any, Protocol


class Watcher(Protocol):
    """What is told of a run as it goes on."""

    def metrics(self, line: dict[str, Any]) -> None:
        """Take a line of metrics.jsonl."""

    def event(self, kind: str, **facts: Any) -> None:
        """Take an event."""

    def close(self) -> None:
        """Write what is pending; nothing follows."""
