"""Language tasks by their ids, and where their records come from.

KIND/NAME is the held-out split of a corpus, made anew: its seed is an evaluation's (`evaluate`), so
that whoever tunes on the records that quickstart holds out has not seen these. But digits and
documents are lists, of which a seed changes the order alone, and so are the digits that bindings
and dialogues show. KIND/PLACE is data: a folder of records, or whatever `gato train --data` reads,
imported on the fly. Of data that the checkpoint was trained on, only what the run held out for
validation is read, and records that are copies of trained ones are left out (`never_trained`).

A picture with several captions is one record with several references.
"""

from __future__ import annotations

import difflib
import fnmatch
import hashlib
import itertools
import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from gato.checkpoint import Checkpoint
from gato.contents import digests
from gato.envs import registry as worlds
from gato.envs.corpora import registry as corpora
from gato.envs.files import stores_below
from gato.envs.mirror import mirror
from gato.envs.readers import importing
from gato.envs.records import RecordStore, images_of
from gato.envs.remote import is_remote
from gato.envs.store import open_store
from gato.rollouts.agent import Agent
from gato.rollouts.measures import KINDS, MEASURES
from gato.rollouts.metrics import Options, Record
from gato.rollouts.never_trained import identity, never_trained, without_copies

RECORDS = 200
"""Made of a corpus where no number is asked for."""
OF_PICTURES = ("caption", "classify", "retrieve")
"""Kinds that read a picture once, with all its texts."""
REPEATS = 1000
"""Records in a row that were there before, or are of another kind, after which no new ones are
looked for: a corpus such as the digits is a list."""


Gallery = dict[str, list[np.ndarray | None]]
"""Per task, the picture of each of its result's ``samples``."""


@dataclass
class Found:
    """The records of a task."""

    records: list[Record]
    source: dict[str, Any]
    """Where they come from: the corpus and its seed, or the place."""
    notes: list[str] = field(default_factory=list)
    """What a person should know of them."""


def is_language(task_id: str) -> bool:
    """Return whether an id is a language task's, known or not."""
    return task_id.partition("/")[0] in KINDS


def matching(patterns: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the language tasks that patterns name, each once, and the patterns of other tasks.

    Raises:
        ValueError: for an unknown corpus or place, or a misspelt kind, with the closest.
    """
    found: dict[str, None] = {}
    others = []
    for pattern in patterns:
        kind, _, what = pattern.partition("/")
        if kind not in KINDS:
            _check_suite(pattern)
            others.append(pattern)
        elif set(what) & set("*?["):
            named = [n for n in KINDS[kind].corpora if fnmatch.fnmatchcase(n, what)]
            if not named:
                raise ValueError(
                    f"expected a pattern that matches a corpus; {pattern!r} matches none of "
                    f"{', '.join(KINDS[kind].corpora)}."
                )
            found.update(dict.fromkeys(f"{kind}/{name}" for name in named))
        else:
            _check_place(kind, what)
            found[pattern] = None
    return list(found), others


def _check_suite(pattern: str) -> None:
    """Raise ValueError for a misspelt kind; what is no kind at all is the registry's to judge."""
    suite, slash, what = pattern.partition("/")
    close = difflib.get_close_matches(suite, KINDS, n=1, cutoff=0.7)
    if slash and close and suite not in worlds.SUITES:
        raise ValueError(
            f"expected a suite or a kind of language task ({', '.join(KINDS)}); got {pattern!r} "
            f"(closest: {close[0]}/{what})."
        )


def _check_place(kind: str, what: str) -> None:
    known = what in corpora.names() or is_remote(what) or ":" in what
    if what and (known or Path(what).exists()):
        return
    of_kind = KINDS[kind].corpora
    close = difflib.get_close_matches(what, of_kind, n=2, cutoff=0.4) or of_kind
    raise ValueError(
        f"expected a corpus ({', '.join(of_kind)}) or the place of data behind {kind}/; got "
        f"{what!r}, and there is no such file or folder (closest: "
        f"{', '.join(f'{kind}/{name}' for name in close)})."
    )


def records_of(
    task_id: str, seed: int, count: int | None = None, checkpoint: Checkpoint | None = None
) -> Found:
    """Return the records of a task.

    Args:
        task_id: see the module.
        seed: of a corpus' records; of data, chooses which `count` are taken.
        count: how many; by default `RECORDS` of a corpus, and all of data.
        checkpoint: what was trained on is left out.

    Raises:
        ValueError: where there are none of the kind, or all were trained on.
    """
    kind, _, what = task_id.partition("/")
    if what in corpora.names():
        wanted = RECORDS if count is None else count
        made, notes = _made(kind, what, seed, wanted), list[str]()
        if checkpoint is not None:
            new = without_copies(made, f"of the corpus {what!r}", checkpoint, notes)
            made = [made[i] for i in new.tolist()]
        source = {"corpus": what, "split": "heldout", "seed": seed}
        return Found(made, source, notes + _fewer(task_id, len(made), count))
    stores, notes = _stores(what)
    held = [
        np.arange(len(store)) if checkpoint is None else never_trained(store, checkpoint, notes)
        for store in stores
    ]
    taken = itertools.islice(_read(kind, stores, held, seed if count else None), count)
    found = list(taken)
    if not found:
        kinds = Counter(
            store[int(i)]["kind"] for store in stores[:8] for i in range(len(store))[:99]
        )
        told = ", ".join(f"{n} of kind {k}" for k, n in kinds.items()) or "it is empty"
        raise ValueError(
            f"expected records for {kind} ({KINDS[kind].about}) at {what}; found none: {told}."
        )
    source = {"place": what, "stores": digests(stores)}
    return Found(found, source, notes + _fewer(task_id, len(found), count))


def _fewer(task_id: str, found: int, wanted: int | None) -> list[str]:
    if wanted is None or found >= wanted:
        return []
    return [f"{task_id} has {found} different records, not the {wanted} asked for"]


def measure(
    agent: Agent,
    task_ids: Sequence[str],
    seed: int,
    count: int | None = None,
    options: Options | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    gallery: Gallery | None = None,
) -> dict[str, dict[str, Any]]:
    """Return the results of language tasks, as JSON-able data.

    Args:
        agent: a loaded checkpoint.
        task_ids: see the module.
        seed: of records, see `records_of`.
        count: records of each task; see `records_of`.
        options: of the measures.
        progress: called with a task, its records measured and how many there are.
        gallery: is given the pictures of the examples.
    """
    options = options or Options()
    found = {task: records_of(task, seed, count, agent.checkpoint) for task in task_ids}
    rows = {}
    for task, of in found.items():
        began = time.perf_counter()
        kind = task.partition("/")[0]
        groups = _groups(of.records)
        row = MEASURES[kind](agent, of.records, replace(options, groups=groups))
        pictures = [sample.pop("image", None) for sample in row["samples"]]
        if gallery is not None:
            gallery[task] = pictures
        rows[task] = {
            "kind": kind,
            "source": of.source,
            **row,
            "records": [identity(record) for record in of.records],
            "groups": list(groups),
            "notes": [*of.notes, *row.get("notes", ())],
            "seconds": round(time.perf_counter() - began, 3),
        }
        if progress is not None:
            progress(task, len(of.records), len(of.records))
    return rows


def _groups(records: Sequence[Record]) -> tuple[int, ...]:
    """Return which records belong together, by number; nothing where each is on its own.

    As in stores, those of one ``meta["group"]`` do, and else those whose first picture is the same.
    """
    numbers: dict[Any, int] = {}
    keys = [_together(record, i) for i, record in enumerate(records)]
    found = tuple(numbers.setdefault(key, len(numbers)) for key in keys)
    return found if len(numbers) < len(records) else ()


def _together(record: Record, number: int) -> Any:
    """Return what records have in common that belong together."""
    named = (record.get("meta") or {}).get("group")
    if named is not None:
        return json.dumps(named, sort_keys=True)
    first = next(images_of(record), None)
    if first is None:
        return number
    return first.shape, hashlib.sha256(np.ascontiguousarray(first).tobytes()).digest()


def summary(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return what stands over all language tasks: nothing is averaged across them."""
    return {
        "tasks": len(rows),
        "records": sum(row["count"] for row in rows.values()),
        "metrics": {
            task: {name: metric["value"] for name, metric in row["metrics"].items()}
            for task, row in rows.items()
        },
    }


# ---- corpora ---------------------------------------------------------------------------------


def _made(kind: str, name: str, seed: int, wanted: int) -> list[Record]:
    """Return different records of a corpus' held-out split."""
    found: dict[Any, Record] = {}
    in_vain = 0
    endless = corpora.records(name, "heldout", seed, count=1 << 40)
    for record in endless:
        if len(found) >= wanted or in_vain >= REPEATS:
            break
        key = _picture(record) if kind in OF_PICTURES else identity(record)
        in_vain += 1
        if KINDS[kind].fits(record) and key not in found:
            found[key], in_vain = record, 0
    if not found:
        raise ValueError(
            f"expected a corpus with records for {kind} ({KINDS[kind].about}); {name!r} has none. "
            f"Choose of {', '.join(KINDS[kind].corpora)}."
        )
    return list(found.values())


def _picture(record: Record) -> Any:
    image = record.get("image")
    return None if image is None else (image.shape, image.tobytes())


# ---- data ------------------------------------------------------------------------------------


def _stores(place: str) -> tuple[list[RecordStore], list[str]]:
    """Return the stores of records at a place, which is imported where it is of another format."""
    notes: list[str] = []
    if is_remote(place):
        folder = mirror(place) or _imported(place, notes)
    else:
        folder = Path(place) if importing.is_store(Path(place)) else _imported(place, notes)
    stores = [open_store(f) for f in stores_below(folder)]
    records = [store for store in stores if isinstance(store, RecordStore)]
    if not records:
        raise ValueError(
            f"expected records at {place}; found episodes, which are evaluated as tasks."
        )
    return records, notes


def _imported(place: str, notes: list[str]) -> Path:
    try:
        folder = importing.cached(place)
    except ValueError as error:
        raise ValueError(
            f"{error} (That is an option of the import: gato data import {place} --out STORE; then "
            f"name the store. Pictures without words have nothing to be measured by: see gato "
            f"caption, gato search.)"
            if "--format" in str(error)
            else f"{error} (to import it with other options: gato data import {place} --out STORE)"
        ) from error
    told = importing.origin(folder)
    notes += [f"{what}: {number:,}" for what, number in told["counts"].items()]
    return folder


def _read(
    kind: str, stores: Sequence[RecordStore], allowed: Sequence[np.ndarray], seed: int | None
) -> Iterator[Record]:
    """Yield records of a kind, drawn at random where there is a seed; captions of a picture as one.

    What belongs together is read together, so that memory holds one group at a time.
    """
    groups: list[tuple[int, np.ndarray]] = []
    for number, (store, items) in enumerate(zip(stores, allowed, strict=True)):
        of = store.groups()[items]
        order = np.argsort(of, kind="stable")
        cuts = np.flatnonzero(np.diff(of[order])) + 1
        groups += [(number, part) for part in np.split(items[order], cuts) if len(part)]
    order = np.arange(len(groups))
    if seed is not None:
        order = np.random.default_rng(seed).permutation(order)
    for place in order.tolist():
        number, items = groups[place]
        found = (stores[number][int(i)] for i in items)
        fitting = [record for record in found if KINDS[kind].fits(record)]
        yield from _joined(fitting) if kind in OF_PICTURES else fitting


def _joined(captions: Iterable[Record]) -> Iterator[Record]:
    """Yield one record per picture, with all its texts as references."""
    texts: dict[Any, list[str]] = {}
    first: dict[Any, Record] = {}
    for record in captions:
        key = _picture(record)
        first.setdefault(key, record)
        texts.setdefault(key, []).append(record["text"])
    for key, record in first.items():
        more = texts[key][1:]
        meta = dict(record.get("meta") or {})
        yield {**record, "meta": {**meta, "references": more}} if more else record
