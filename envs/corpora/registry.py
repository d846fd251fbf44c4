"""The corpora by name: what exists, its records, and how to write them to disk.

A corpus is one module of this folder: ``COUNTS`` and ``records(split, seed, count)``. Simulators
and data sets are imported only when records are asked for.
"""

from __future__ import annotations

import difflib
import importlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from gato.envs.corpora.common import Split, check_split

CORPORA = ("bindings", "dialogues", "digits", "documents", "frames", "scenes", "shapes")


def names() -> tuple[str, ...]:
    """Return the names of the corpora, sorted."""
    return CORPORA


def records(
    name: str, split: Split, seed: int = 0, count: int | None = None, **options: Any
) -> Iterator[dict[str, Any]]:
    """Yield records of a corpus in the form that `RecordWriter` takes.

    Args:
        name: one of `names()`.
        split: ``train`` or ``heldout``; no record of one is in the other, whatever the seed.
        seed: the same seed gives the same records.
        count: how many; the corpus' own number where none are asked for.
        options: of the corpus, such as ``tasks`` of the dialogues.

    Raises:
        ValueError: for an unknown name or split, a negative count, or a missing package.
    """
    check_split(split)
    if count is not None and count < 0:
        raise ValueError(f"expected a count of records of at least 0; got {count}.")
    yield from _corpus(name).records(split, seed, count, **options)


def build(
    name: str,
    out: str | Path,
    split: Split,
    seed: int = 0,
    count: int | None = None,
    **options: Any,
) -> Path:
    """Write records to a `RecordStore` at `out` and return its path."""
    from gato.envs.records import RecordWriter

    made = records(name, split, seed, count, **options)
    first = list(itertools.islice(made, 1))  # a wrong argument fails before a folder is made
    with RecordWriter(out, name) as writer:
        for record in itertools.chain(first, made):
            writer.append(record)
    return Path(out)


def _corpus(name: str) -> ModuleType:
    if name not in CORPORA:
        close = difflib.get_close_matches(name, CORPORA, n=2, cutoff=0.4) or CORPORA
        raise ValueError(f"expected a known corpus; got {name!r} (closest: {', '.join(close)}).")
    return importlib.import_module(f"gato.envs.corpora.{name}")
