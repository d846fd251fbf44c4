"""Watchers of a training run: TensorBoard, and Weights & Biases where it is asked for.

A watcher is told of every line that training writes to ``metrics.jsonl``, and of events:

```
start       step, steps            steps done before; lines of later steps are drawn anew
note        text                   what a person should know
checkpoint  step, path
end         step, state, reason    as in `state.json`, see `gato.runs`
```

Nothing a watcher does decides what is trained, and one that fails is told of and left out from
then on; the run goes on.
"""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from gato.envs.files import write_atomically
from gato.telling import tell

Say = Callable[[str], None]


class Watcher(Protocol):
    """What is told of a run as it goes on."""

    def metrics(self, line: dict[str, Any]) -> None:
        """Take a line of metrics.jsonl."""

    def event(self, kind: str, **facts: Any) -> None:
        """Take an event."""

    def close(self) -> None:
        """Write what is pending; nothing follows."""


class Watchers:
    """Many watchers as one; those that fail are left out."""

    def __init__(self, watchers: Sequence[Watcher], say: Say = tell) -> None:
        self._watchers, self._say = list(watchers), say

    def metrics(self, line: dict[str, Any]) -> None:
        """Take a line of metrics.jsonl."""
        self._tell(lambda watcher: watcher.metrics(line))

    def event(self, kind: str, **facts: Any) -> None:
        """Take an event."""
        self._tell(lambda watcher: watcher.event(kind, **facts))

    def close(self) -> None:
        """Write what is pending; nothing follows."""
        self._tell(lambda watcher: watcher.close())
        self._watchers = []

    def _tell(self, how: Callable[[Watcher], None]) -> None:
        for watcher in list(self._watchers):
            try:
                how(watcher)
            except Exception as error:  # whatever it is, hours of training are worth more
                self._watchers.remove(watcher)
                name = type(watcher).__name__
                self._say(
                    f"{name} stops watching ({type(error).__name__}: {error}); training goes on"
                )


class TensorBoard:
    """Draws every number of every line as a curve, in files below ``tensorboard/`` of a run.

    A run that goes on writes another file, which tells readers to forget the points of steps that
    are drawn anew: every step is shown once.
    """

    def __init__(self, run: Path) -> None:
        """Make a watcher; its first file is written with the first line.

        Raises:
            ImportError: where TensorBoard is not installed.
        """
        from torch.utils.tensorboard import SummaryWriter

        self._make, self._folder, self._begun = SummaryWriter, run / "tensorboard", 0
        self._writer: Any = None

    def metrics(self, line: dict[str, Any]) -> None:
        """Add a point to each curve."""
        if self._writer is None:
            _put_before(self._folder, int(time.time()))
            self._writer = self._make(str(self._folder), purge_step=self._begun + 1)
        step, moment = line["step"], line.get("time", time.time())
        for name, value in numbers(line):
            self._writer.add_scalar(name, value, step, walltime=moment)
        self._writer.flush()  # a kill must not take what the next run will not draw again

    def event(self, kind: str, **facts: Any) -> None:
        """Remember from which step on points are drawn."""
        if kind == "start":
            self._begun = facts["step"]

    def close(self) -> None:
        """Close the file."""
        if self._writer is not None:
            self._writer.close()


def _put_before(folder: Path, now: int) -> None:
    """Let the names of all files of curves say that they were begun before `now`.

    Readers take files in the order of the seconds in their names; another of the same second, or a
    clock that was set back, would make the end of a run its beginning.
    """
    names = [path.name.split(".", 4) for path in sorted(folder.glob("events.out.tfevents.*.*"))]
    seconds = [int(name[3]) if name[3].isdecimal() else now for name in names]
    if max(seconds, default=0) < now:
        return
    for i, name in enumerate(names):
        earlier = [*name[:3], f"{now - len(names) + i:010d}", name[4]]
        os.rename(folder / ".".join(name), folder / ".".join(earlier))


class WandB:
    """Reports every line to a project of Weights & Biases, a run that goes on to the same run.

    Steps that a resumed run takes again are left out by W&B: it has them. ``WANDB_MODE=offline``
    keeps everything in the run's folder, for ``wandb sync``.
    """

    def __init__(
        self, run: Path, project: str, config: Mapping[str, Any], anew: bool = False
    ) -> None:
        """Begin, before anything is trained; `anew` as another run than the one before.

        Raises:
            ValueError: where wandb is not installed, nobody is logged in, or the run has been
                reported to another project.
        """
        try:
            import wandb
        except ImportError as error:
            raise ValueError(
                f"--wandb needs Weights & Biases, which does not import ({error}). "
                f'Install it: pip install "gato[wandb]"'
            ) from error
        file = run / "wandb.json"
        known = json.loads(file.read_text()) if file.exists() and not anew else {}
        if known.get("project", project) != project:
            raise ValueError(
                f"expected --wandb {known['project']}, the project that {run} was reported to; got "
                f"{project}. Train into another folder for another project."
            )
        known = {"project": project, "id": known.get("id", secrets.token_hex(4))}
        run.mkdir(parents=True, exist_ok=True)
        try:
            self._run = wandb.init(
                project=project,
                id=known["id"],
                name=run.name,
                dir=str(run),
                config=dict(config),
                resume="allow",
            )
        except Exception as error:  # its own kinds, of which it has many
            raise ValueError(
                f"Weights & Biases could not begin: {error}. Log in with `wandb login`, or set "
                f"WANDB_MODE=offline and sync later."
            ) from error
        write_atomically(file, json.dumps(known).encode())

    def metrics(self, line: dict[str, Any]) -> None:
        """Report a line."""
        self._run.log(dict(numbers(line)), step=line["step"])

    def event(self, kind: str, **facts: Any) -> None:
        """Note how the run ended."""
        if kind == "end":
            self._run.summary["state"] = facts.get("state")

    def close(self) -> None:
        """Send what is pending."""
        self._run.finish()


def open_watchers(
    run: Path,
    config: Mapping[str, Any],
    wandb: str | None = None,
    say: Say = tell,
    anew: bool = False,
) -> list[Watcher]:
    """Return the watchers of a run: TensorBoard where it is installed, W&B where asked for.

    Args:
        run: the run's folder.
        config: the run's configuration as JSON-able data.
        wandb: the project to report to.
        say: told once where TensorBoard is missing.
        anew: the run does not go on with what lies in its folder.

    Raises:
        ValueError: where W&B was asked for and cannot begin.
    """
    watchers: list[Watcher] = []
    try:
        watchers.append(TensorBoard(run))
    except ImportError:
        say('no curves without TensorBoard; it comes with: pip install "gato[monitor]"')
    if wandb is not None:
        watchers.append(WandB(run, wandb, config, anew))
    return watchers


def numbers(line: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield the numbers of a line of metrics with the names of their curves.

    >>> list(numbers({"step": 3, "lr": 0.1, "losses": {"arm": 2.0}, "time": 17.0}))
    [('run/lr', 0.1), ('losses/arm', 2.0)]
    """
    for key, value in line.items():
        if isinstance(value, Mapping):
            yield from _below(key, value)
        elif key not in ("step", "time"):
            yield from _below("run", {key: value})


def _below(name: str, values: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _below(f"{name}/{key}", value)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{name}/{key}", float(value)
