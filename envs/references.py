"""Reference scores: what a random policy, the expert and a person reach, in one table.

`scores.csv` holds a row per task and policy, with how it was measured; `gato experts score --write`
measures rows anew and replaces them. Human means come from the literature and name it.

```
task,policy,measure,mean,std,episodes,first_seed,expert,versions,source
```
`mean` and `std` are over episodes, of the return or, where `measure` says so, of success (0 or 1);
`expert` is the kind of expert that played and its settings.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path

from gato.envs.files import lock_folder, write_atomically

TABLE = Path(__file__).with_name("scores.csv")
POLICIES = ("random", "expert", "human")


@dataclass(frozen=True)
class Reference:
    """One row of the table."""

    task: str
    policy: str
    """``random``, ``expert`` or ``human``."""
    measure: str
    mean: float
    std: float | None
    """Over episodes; None where the literature names none."""
    episodes: int | None
    first_seed: int | None
    """Of the first episode; the others follow."""
    expert: str
    versions: str
    source: str

    def describe(self) -> str:
        """Return where the figure comes from, in words."""
        if self.episodes is None:
            return f"{self.policy}: {self.source}"
        who = f"{self.policy} ({self.expert})" if self.expert else self.policy
        return (
            f"{who}: {self.source}, {self.episodes} episodes from seed {self.first_seed}, "
            f"{self.versions}"
        )


@cache
def references() -> dict[str, dict[str, Reference]]:
    """Return the table: by task id, then by policy."""
    return _load()


def _load() -> dict[str, dict[str, Reference]]:
    with TABLE.open(encoding="utf-8", newline="") as file:
        rows = [_read(row) for row in csv.DictReader(file)]
    table: dict[str, dict[str, Reference]] = {}
    for row in rows:
        table.setdefault(row.task, {})[row.policy] = row
    return table


def write(rows: Iterable[Reference]) -> None:
    """Replace these rows of the table, or add them; the file stays whole if this is killed.

    Processes that write at the same time wait for each other, so none loses another's rows.
    """
    with _locked(TABLE.parent):
        table = {(r.task, r.policy): r for by in _load().values() for r in by.values()}
        table |= {(r.task, r.policy): r for r in rows}
        text = io.StringIO()
        writer = csv.DictWriter(text, [f.name for f in fields(Reference)], lineterminator="\n")
        writer.writeheader()
        for row in sorted(table.values(), key=lambda r: (r.task, POLICIES.index(r.policy))):
            writer.writerow({k: _cell(v) for k, v in asdict(row).items()})
        write_atomically(TABLE, text.getvalue().encode())
    references.cache_clear()


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder; the table itself cannot carry one, since it is replaced."""
    descriptor = lock_folder(folder, wait=True)
    try:
        yield
    finally:
        os.close(descriptor)  # and with it the lock


def _read(row: dict[str, str]) -> Reference:
    numbers = {
        "mean": float(row["mean"]),
        "std": float(row["std"]) if row["std"] else None,
        "episodes": int(row["episodes"]) if row["episodes"] else None,
        "first_seed": int(row["first_seed"]) if row["first_seed"] else None,
    }
    return Reference(**{**row, **numbers})  # type: ignore[arg-type]


def _cell(value: object) -> str:
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)
