"""What a training puts down to go on from: weights, optimizers, scales, memory and counters.

```
DIR/training/<steps>/    a folder gets this name when all of it is on disk; older ones then go
    counters.json        settings, steps, minutes, trials
    parameters.pt        tensors alone, read as such
    *.npy                scales of observations and rewards, and what SAC remembers
```
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from pickle import UnpicklingError  # which torch raises for what is no tensor
from typing import Any

import numpy as np

from gato.envs.files import array_bytes, sync_folder, write_synced

_MEMORY = ("observations", "next_observations", "actions", "rewards", "dones", "timeouts")


@dataclass(frozen=True)
class Check:
    """How the policy did at one moment of the training."""

    steps: int
    minutes: float
    mean_return: float
    success_rate: float | None

    @property
    def score(self) -> float:
        return self.mean_return if self.success_rate is None else self.success_rate


@dataclass
class Counters:
    """What a training has done so far; stands in ``DIR/training`` beside its weights."""

    settings: dict[str, Any]
    """Task, algorithm, copies and seed: those that a training cannot change as it goes on."""
    steps: int = 0
    minutes: float = 0.0
    updates: int = 0
    checks: list[Check] = field(default_factory=list)

    @property
    def best(self) -> Check | None:
        """The best trial; of equal ones the first, except that more return is better."""
        return max(self.checks, key=lambda c: (c.score, c.mean_return), default=None)


def save(training: Path, model: Any, worlds: Any, counters: Counters) -> None:
    """Put down all that going on needs, in a folder that gets its name when it is whole."""
    import torch

    new = training / f".{counters.steps}.new"
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    parameters = model.get_parameters()
    names = model._get_torch_save_params()[1]
    parameters["variables"] = {name: getattr(model, name).data for name in names}
    torch.save(parameters, new / "parameters.pt")
    for name, array in _arrays(model, worlds).items():
        write_synced(new / f"{name}.npy", array_bytes(array))
    write_synced(new / "counters.json", json.dumps(asdict(counters), indent=1).encode())
    sync_folder(new)
    shutil.rmtree(training / str(counters.steps), ignore_errors=True)
    new.rename(training / str(counters.steps))
    sync_folder(training)
    for old in training.iterdir():
        if old.name != str(counters.steps):
            shutil.rmtree(old, ignore_errors=True)


def restore(saved: Path, model: Any, worlds: Any, counters: Counters) -> None:
    """Give a new model what `save` put down.

    Raises:
        ValueError: where it is damaged.
    """
    import torch

    try:
        parameters = torch.load(saved / "parameters.pt", weights_only=True)
        for name, value in parameters.pop("variables").items():
            getattr(model, name).data.copy_(value)
        model.set_parameters(parameters, device="cpu")
        arrays = {path.stem: np.load(path, allow_pickle=False) for path in saved.glob("*.npy")}
        for name in ("obs_rms", "ret_rms"):
            for part in ("mean", "var", "count"):
                setattr(getattr(worlds, name), part, arrays[f"{name}.{part}"])
        if "memory.place" in arrays:
            memory = model.replay_buffer
            place, full = arrays["memory.place"].tolist()
            memory.pos, memory.full = place, bool(full)
            for name in _MEMORY:
                getattr(memory, name)[: memory.size()] = arrays[f"memory.{name}"]
    except (OSError, ValueError, RuntimeError, KeyError, EOFError, UnpicklingError) as error:
        reason = f"{type(error).__name__}: {error!s:.80}"
        raise ValueError(
            f"{saved} is damaged ({reason}). Remove it, or start anew with --no-resume."
        ) from error
    model.num_timesteps, model._n_updates = counters.steps, counters.updates


def newest(training: Path) -> Path | None:
    """Return the newest folder that was written whole."""
    names = [p.name for p in training.iterdir()] if training.is_dir() else []
    whole = [int(name) for name in names if name.isdigit()]
    return training / str(max(whole)) if whole else None


def read_counters(saved: Path) -> Counters:
    """Return the counters in a folder that `save` wrote.

    Raises:
        ValueError: where they are damaged.
    """
    try:
        data = json.loads((saved / "counters.json").read_text(encoding="utf-8"))
        return Counters(**{**data, "checks": [Check(**check) for check in data["checks"]]})
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{saved / 'counters.json'} is damaged ({error}). Start anew with --no-resume."
        ) from error


def _arrays(model: Any, worlds: Any) -> dict[str, np.ndarray]:
    """Return scales, and the memory of SAC as far as it is filled."""
    arrays = {}
    for name in ("obs_rms", "ret_rms"):
        scale = getattr(worlds, name)
        for part in ("mean", "var", "count"):
            arrays[f"{name}.{part}"] = np.asarray(getattr(scale, part), np.float64)
    memory = getattr(model, "replay_buffer", None)
    if memory is not None:
        arrays["memory.place"] = np.array([memory.pos, memory.full])
        arrays |= {f"memory.{name}": getattr(memory, name)[: memory.size()] for name in _MEMORY}
    return arrays
