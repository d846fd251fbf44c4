"""`gato bench`: speed beside a baseline, on made-up tasks.

Everything is measured beside a baseline on the same machine in the same minute, in turns, and the
medians over the repeats are reported with their spread; beside each figure stands its floor, where
one is known: what it would be if only the operations or bytes that the work cannot do without cost
time, at this machine's measured peak. No simulator takes part, but in `collect`, so the benches run
wherever gato does. Where none is named, those run that take less than a minute or two.

    serializer   tokens/s of one core       beside what is asked of it
    train        tokens/s of the trainer    beside forward, backward and step on batches at hand
    rollout      steps/s of 8 rows, cached  beside one row, the whole context anew for every token
    suites       steps/s of 16 rows, 4 suites   beside one row at a time; `suites_long`: flat cost
    latency      milliseconds of one live decision   beside what 20 Hz leaves
    serve        ids/s of 16 texts at the same time    beside one after the other
    attention    every kernel that this machine has  beside SDPA with a mask
    peer         rollouts and training      beside a loop of the strongest open peer's shape
    data         speed and memory of reading   see `gato.bench_data`
    collect      episodes/s of two workers  beside one, from the command to complete stores
"""

from __future__ import annotations

import difflib
import importlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from gato import bench_machine, kernels
from gato.bench_common import Result


@dataclass(frozen=True)
class Bench:
    """One bench: `NAME_bench` of the module `gato.bench_NAME`, its name cut off at a ``_``."""

    about: str
    seconds: int
    """What it takes on two CPU cores, with `REPEATS`."""
    always: bool = True
    """Whether it runs where none is named."""

    @staticmethod
    def run(name: str, repeats: int) -> list[Result]:
        """Return what the bench of this name measured."""
        found: Callable[[int], list[Result]]
        module = importlib.import_module(f"gato.bench_{name.partition('_')[0]}")
        found = getattr(module, f"{name}_bench")
        return found(repeats)


BENCHES = {
    "serializer": Bench("tokens/s of writing whole episodes, one core", 5),
    "train": Bench("tokens/s of the trainer, beside a bare loop on batches at hand", 90),
    "rollout": Bench("steps/s of rows decided together with a cache, beside the plain loop", 30),
    "suites": Bench("16 rows of 4 suites decided in one batch, beside one at a time", 100),
    "suites_long": Bench("steps 4,000 to 5,000 of an episode beside its first", 150, False),
    "latency": Bench("milliseconds of one live decision, quickstart and gato_79m", 40),
    "serve": Bench("ids/s of 16 texts written at the same time, beside one after the other", 20),
    "attention": Bench("every kernel of attention that this machine has, beside SDPA's mask", 30),
    "peer": Bench("rollouts and training beside a loop of JAT's shape, 128 x 4", 150, False),
    "peer_large": Bench("the same at 768 x 12, the size that JAT released", 900, False),
    "train_gato_79m": Bench("tokens/s of training 79M parameters; a CPU takes 2 rows", 120, False),
    "train_gato_364m": Bench("the same of 364M parameters; a CPU takes one row", 300, False),
    "train_gato_1b": Bench("the same of 1.18B: 20 GB of memory, on a CPU one row", 1200, False),
    "data": Bench("speed and memory of reading stores, small and of ten million steps", 90, False),
    "collect": Bench("episodes/s of two workers of three simulators", 150, False),
}
REPEATS = 5


def run(
    names: Sequence[str] = (),
    repeats: int = REPEATS,
    told: Callable[[str], object] = lambda message: None,
) -> dict[str, Any]:
    """Return what the benches `names` measured; where none is named, those that are quick.

    A bench that fails is told and named in the record; the others run.

    Args:
        names: of `BENCHES`.
        repeats: of everything measured.
        told: takes a line before each bench, and one where something spoils what is measured.

    Raises:
        ValueError: for a name that is no bench, with the closest.
    """
    chosen = list(dict.fromkeys(names)) or [n for n, bench in BENCHES.items() if bench.always]
    check_names(chosen)
    device, machine = bench_machine.device(), bench_machine.machine()
    record: dict[str, Any] = {
        "name": " ".join(chosen),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "hardware": bench_machine.in_words(machine),
        "machine": machine,
        "versions": bench_machine.versions(),
        "warning": None,
        "attention": kernels.describe(device, torch.bfloat16),
        "peaks": bench_machine.peaks(device),
        "repeats": repeats,
        "seconds": {},
        "failed": {},
        "results": [],
    }
    _note_load(record, None, told)
    told(record["attention"])
    for name in chosen:
        told(f"{name}: {BENCHES[name].about}")
        begun, worked = time.perf_counter(), bench_machine.worked()
        try:
            found = BENCHES[name].run(name, repeats)
            record["results"] += [{**result, "bench": name} for result in found]
        except Exception as error:
            if len(chosen) == 1:
                raise
            record["failed"][name] = f"{type(error).__name__}: {error}"
            told(f"{name} failed: {record['failed'][name]}")
        record["seconds"][name] = round(time.perf_counter() - begun, 1)
        _note_load(record, bench_machine.load_of_others(worked), told)
    return record


def _note_load(record: dict[str, Any], load: float | None, told: Callable[[str], object]) -> None:
    """Keep the worst load of others in the record; tell the first time that it is too much.

    At the start it is the system's, in which nothing of the benches is yet; afterwards what others
    have computed while a bench ran.
    """
    machine = record["machine"]
    if load is not None:
        machine["load"] = max(load, machine["load"] or 0.0)
    warning = bench_machine.warning(machine)
    if warning and not record["warning"]:
        told(warning)
    record["warning"] = warning


def check_names(names: Sequence[str]) -> None:
    """Raise ValueError for a name that is no bench, with the closest."""
    for name in names:
        if name not in BENCHES:
            close = difflib.get_close_matches(name, BENCHES) or list(BENCHES)
            raise ValueError(f"expected a bench, such as {' or '.join(close)}; got {name!r}")
