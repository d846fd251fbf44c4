"""`gato runs`: what each run is doing, how far it is and its last figures, from its files alone.

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
    and, where a corpus asks for it: "contrast": {corpus: {"loss": ..., "accuracy": ...}}
{"step": 500, "validation": {corpus: {"loss": ..., "perplexity": ...}}, "validation_loss": ..., ...}
{"step": 500, "evaluation": {task: score}, ...}
```

A process that is gone while the state says ``running`` has died: that is found here, from its pid,
because a killed process writes nothing.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from gato.envs.files import write_atomically

FORMAT = 1
State = Literal["running", "stopped", "finished", "failed"]
STATES = ("running", "stopped", "finished", "failed")
STATE_FILE = "state.json"
_NOT_AS_WRITTEN = (ValueError, TypeError, OverflowError, RecursionError)


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


def find_runs(root: Path) -> Iterator[Path]:
    """Yield the folders of runs at or below `root`; stores and hidden folders are passed by.

    Raises:
        ValueError: where there is no such folder.
    """
    if not root.is_dir():
        raise ValueError(f"expected a folder of runs; there is none at {root}.")
    for folder, below, files in os.walk(root):
        if {STATE_FILE, "metrics.jsonl", "latest"} & set(files):
            yield Path(folder)
            below[:] = []  # a run's own folders
        elif "manifest.json" in files:
            below[:] = []
        below[:] = sorted(name for name in below if not name.startswith("."))


def describe(run: Path) -> dict[str, Any]:
    """Return what the files of a run tell of it; what is wrong with them stands under ``faults``.

    ``state`` is one of `STATES`, ``died`` (the process is gone), ``elsewhere`` (it runs on another
    host, where its pid cannot be looked at) or ``unknown`` (there is no readable state.json).
    """
    faults: list[str] = []
    state = _state(run, faults)
    lines = _Lines(run / "metrics.jsonl", faults)
    checkpoint = _checkpoint(run, faults)
    steps = state.get("steps")
    known = [state.get("step"), lines.training.get("step"), checkpoint[1]]
    step = max((n for n in known if n is not None), default=None)
    now = _now(state)
    return {
        "run": str(run),
        "state": now,
        "reason": _reason(now, state),
        "step": step,
        "steps": steps,
        "seconds_left": _left(state, lines, step) if now == "running" else None,
        "tokens_per_second": lines.training.get("tokens_per_second"),
        "losses": lines.training.get("losses", {}),
        "validation": lines.validation,
        "best_validation": lines.best,
        "evaluation": lines.evaluation,
        "checkpoint": checkpoint[0],
        "updated": max(state.get("updated", 0.0), lines.training.get("time", 0.0)) or None,
        "host": state.get("host"),
        "pid": state.get("pid"),
        "faults": faults,
    }


def row(found: dict[str, Any]) -> dict[str, Any]:
    """Return what a table shows of a run that `describe` described."""
    best, scores = found["best_validation"], found["evaluation"]
    return {
        "run": found["run"],
        "state": found["state"],
        "step": found["step"],
        "of": found["steps"],
        "left": _duration(found["seconds_left"]),
        "tokens/s": found["tokens_per_second"],
        "losses": _pairs(found["losses"]),
        "best validation": None if best is None else f"{best['loss']:.3f} at {best['step']}",
        "evaluation": None if scores is None else _pairs(scores["scores"]),
    }


def _pairs(values: dict[str, Any]) -> str:
    numbers = {k: v for k, v in values.items() if isinstance(v, int | float)}
    return "  ".join(f"{name} {value:.3g}" for name, value in numbers.items()) or "-"


def _duration(seconds: float | None) -> str | None:
    if seconds is None or not math.isfinite(seconds):
        return None
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"


class _Lines:
    """The lines of metrics that a list of runs shows, of a file of any length."""

    def __init__(self, path: Path, faults: list[str]) -> None:
        self.training: dict[str, Any] = {}
        self.before: dict[str, Any] = {}
        """The line of training before the last."""
        self.validation: dict[str, Any] | None = None
        self.best: dict[str, Any] | None = None
        self.evaluation: dict[str, Any] | None = None
        damaged = 0
        try:
            with path.open("rb") as file:
                for line in file:
                    # the last line may be half written just now
                    damaged += not self._take(line) and line.endswith(b"\n")
        except FileNotFoundError:
            return
        except OSError as error:
            faults.append(f"{path.name} cannot be read: {error.strerror}")
        if damaged:
            told = "1 line is" if damaged == 1 else f"{damaged} lines are"
            faults.append(f"{path.name}: {told} damaged")

    def _take(self, text: bytes) -> bool:
        try:
            line = json.loads(text)
            step = int(line["step"])
            moment = float(line.get("time", 0.0))
        except (*_NOT_AS_WRITTEN, KeyError, AttributeError):
            return False
        if isinstance(line.get("losses"), dict):
            self.before, self.training = self.training, line | {"step": step, "time": moment}
        if isinstance(line.get("validation"), dict):
            loss = line.get("validation_loss")
            self.validation = {"step": step, "loss": loss, "corpora": line["validation"]}
            number = isinstance(loss, int | float) and math.isfinite(loss)
            if number and (self.best is None or loss < self.best["loss"]):
                self.best = {"step": step, "loss": loss}
        if isinstance(line.get("evaluation"), dict):
            self.evaluation = {"step": step, "scores": line["evaluation"]}
        return True


def _state(run: Path, faults: list[str]) -> dict[str, Any]:
    file = run / STATE_FILE
    try:
        found = json.loads(file.read_bytes())
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            raise ValueError(f"it is of another format than {FORMAT}")
        if found.get("state") not in STATES:
            raise ValueError(f"it says {found.get('state')!r:.60}, which is no state")
        for name, kind in (("step", int), ("steps", int), ("updated", float), ("pid", int)):
            if not isinstance(found.get(name), kind) or found[name] < 0:
                raise ValueError(f"{name} is {found.get(name)!r:.60}")
    except FileNotFoundError:
        faults.append(f"there is no {STATE_FILE}: the run has not begun, or is of an older version")
    except OSError as error:
        faults.append(f"{STATE_FILE} cannot be read: {error.strerror}")
    except _NOT_AS_WRITTEN as error:
        faults.append(f"{STATE_FILE} is damaged: {error}")
    else:
        return found
    return {}


def _checkpoint(run: Path, faults: list[str]) -> tuple[str | None, int | None]:
    """Return the name of the newest checkpoint and its step."""
    try:
        name = (run / "latest").read_bytes().decode(errors="replace").strip()
    except FileNotFoundError:
        return None, None
    except OSError as error:
        faults.append(f"latest cannot be read: {error.strerror}")
        return None, None
    number = name.removeprefix("step-")
    if not name.startswith("step-") or not number.isdecimal() or not (run / name).is_dir():
        faults.append(f"latest names {name!r:.60}, which is no checkpoint of the run")
        return None, None
    missing = [f for f in ("config.json", "model.safetensors") if not (run / name / f).is_file()]
    if missing:
        faults.append(f"the checkpoint {name} has no {missing[0]}")
    return name, int(number)


def _now(state: dict[str, Any]) -> str:
    if not state or state["state"] != "running":
        return str(state.get("state", "unknown"))
    if state.get("host") != socket.gethostname():
        return "elsewhere"
    return "running" if _alive(state["pid"], state.get("pid_began")) else "died"


def _alive(pid: int, began: int | None) -> bool:
    """Return whether a process lives, and is the one that began then."""
    if pid < 1:
        return False
    try:
        os.kill(pid, 0)
    except PermissionError:  # another user's, but there
        pass
    except (OSError, OverflowError):
        return False
    return began is None or _began(pid) in (began, None)


def _reason(now: str, state: dict[str, Any]) -> str | None:
    if now == "died":
        return f"process {state['pid']} is gone without a word"
    if now == "elsewhere":
        return f"process {state['pid']} on {state.get('host')}"
    reason = state.get("reason")
    return None if reason is None else " ".join(str(reason).split())


def _left(state: dict[str, Any], lines: _Lines, step: int | None) -> float | None:
    """Return the seconds that the rest takes at the pace of the last lines of this process."""
    last, first = lines.training, lines.before
    if not last or last["time"] < state["updated"]:
        return None  # none since it began
    if not first or first["time"] < state["updated"] or first["step"] >= last["step"]:
        first = {"step": state["step"], "time": state["updated"]}
    done = last["step"] - first["step"]
    if done <= 0 or step is None:
        return None
    return max(0.0, (state["steps"] - step) * (last["time"] - first["time"]) / done)
