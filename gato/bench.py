"""`gato bench`: speed beside a baseline, on made-up tasks.

Everything is measured beside a baseline on the same machine in the same minute, block by block in
turns, and the medians are reported. No simulator takes part, so it runs wherever gato does; all
but the last two, which take long and are measured only where they are named.

    serializer   tokens/s of one core       beside the floor that the design asks for
    train        tokens/s of the trainer    beside forward, backward and step on batches at hand
    rollout      steps/s of 8 rows, cached  beside one row, the whole context anew for every token
    data         speed and memory of reading   see `gato.bench_data`
    collect      episodes/s of two workers  beside one, from the command to complete stores
"""

from __future__ import annotations

import difflib
import os
import platform
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any

import torch

from gato.bench_collect import collect_bench
from gato.bench_common import Result
from gato.bench_data import data_bench
from gato.bench_rollout import rollout_bench
from gato.bench_serializer import serializer_bench
from gato.bench_train import train_bench

BENCHES: dict[str, Callable[[int], list[Result]]] = {
    "serializer": serializer_bench,
    "train": train_bench,
    "rollout": rollout_bench,
    "data": data_bench,
    "collect": collect_bench,
}
LONG = ("data", "collect")
"""Those that take a minute or more."""


def run(names: Sequence[str] = (), repeats: int = 5) -> dict[str, Any]:
    """Return what the benches `names` measured; where none is named, all without simulators.

    Raises:
        ValueError: for a name that is no bench, with the closest.
    """
    for name in names:
        if name not in BENCHES:
            close = difflib.get_close_matches(name, BENCHES) or list(BENCHES)
            raise ValueError(f"expected a bench, such as {' or '.join(close)}; got {name!r}")
    chosen = list(dict.fromkeys(names)) or [name for name in BENCHES if name not in LONG]
    packages = ("gato", "torch", "numpy", "gymnasium")
    return {
        "name": " ".join(chosen),
        "hardware": _hardware(),
        "versions": {"python": platform.python_version(), **{p: _version(p) for p in packages}},
        "results": [result for name in chosen for result in BENCHES[name](repeats)],
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except ImportError:
        return "not installed"


def _hardware() -> str:
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    name = platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads{gpu}"
