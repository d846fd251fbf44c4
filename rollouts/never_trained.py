"""Which records of data a checkpoint was never trained on.

A store that was trained on is known by its digest, wherever it lies: of it, only what the run held
out is read. So it is of one in the same place that has only grown since; one that has changed is
refused, since what was held out is known by its number alone. Of any other store, records are left
out that are the same, word for word and pixel for pixel, as one that was trained on: these are
looked up where the run's corpora still lie. What a checkpoint's ancestors were trained on is known
by its digest alone, and that is said.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gato.checkpoint import Checkpoint
from gato.contents import digests, has_grown, known_as
from gato.corpus_config import CorpusConfig
from gato.envs.files import stores_below
from gato.envs.records import RecordStore
from gato.envs.store import open_store
from gato.rollouts.metrics import Record
from gato.selection import divide

MOST = 1_000_000
"""Records of a corpus that others are looked up among; that takes some ten seconds."""


def identity(record: Record) -> str:
    """Return a short digest of a record, the same wherever it lies."""
    digest = hashlib.sha256()

    def plain(value: Any) -> Any:
        if isinstance(value, np.ndarray):
            digest.update(repr(value.shape).encode() + np.ascontiguousarray(value).tobytes())
            return None
        return repr(value)

    told = {key: value for key, value in record.items() if key != "meta"}
    digest.update(json.dumps(told, sort_keys=True, default=plain).encode())
    return digest.hexdigest()[:12]


def never_trained(store: RecordStore, checkpoint: Checkpoint, notes: list[str]) -> np.ndarray:
    """Return the records of a store that were never trained on, as far as can be told.

    Args:
        store: to be read.
        checkpoint: what was trained.
        notes: is told what is left out, and what could not be looked up.

    Raises:
        ValueError: where all were, or it has changed since.
    """
    left = np.arange(len(store))
    whole = False
    (digest,) = digests([store]).values()
    for name, contents in checkpoint.data.items():
        known, grown = known_as(digest, store.name, contents), False
        if "validation" in contents:  # of a checkpoint that this one began with
            config = CorpusConfig(name, "", validation=contents["validation"])
        else:
            config = next(c for c in checkpoint.config.corpora if c.name == name)
            grown = not known and _has_grown(store, config, contents)
        if not known and not grown:
            continue
        whole = True
        if not config.validation:
            raise _all_trained(f"at {store.path}", name)
        mask = np.ones(len(store), bool)
        (held,) = divide(config, [mask], [known or store.name], numbers=[store.groups()], held=True)
        left = np.intersect1d(left, held)
        notes.append(
            f"{store.path} was trained on{', and has grown since' if grown else ''}: only the "
            f"{len(held)} of its {len(store)} records are read that the run "
            f"{'holds' if grown else 'held'} out"
        )
    return left if whole else without_copies(store, f"at {store.path}", checkpoint, notes)


def _all_trained(where: str, name: str) -> ValueError:
    return ValueError(
        f"expected records that were not trained on; those {where} were, all of them, as "
        f"corpus {name!r}. Evaluate on others, or train with --validation."
    )


def _has_grown(store: RecordStore, config: CorpusConfig, contents: Mapping[str, Any]) -> bool:
    """Return whether a store is what a corpus read in its place, with more records behind it.

    Raises:
        ValueError: where it may be that, but changed: what was held out is at other numbers then.
    """
    if "records" not in contents or not _lies_in(store, config):
        return False
    if "stores" in contents and has_grown(store, contents):
        return True
    if _trained(config, contents) is None:  # else it lies beside what was read, as that was
        raise ValueError(
            f"expected records that were not trained on; those at {store.path} have changed since "
            f"corpus {config.name!r} was read there, by more than new ones at their end: which of "
            f"them were trained on is not known. Evaluate on others, or restore them."
        )
    return False


def _lies_in(store: RecordStore, config: CorpusConfig) -> bool:
    """Return whether a store, changed as it may be, lies where a corpus was read."""
    return store.path.resolve().is_relative_to(Path(config.path).resolve())


def without_copies(
    records: RecordStore | Sequence[Record], where: str, checkpoint: Checkpoint, notes: list[str]
) -> np.ndarray:
    """Return which of some records, that lie or were made somewhere, are no copies of trained ones.

    Raises:
        ValueError: where all are.
    """
    left = np.ones(len(records), bool)
    own = [
        (next(c for c in checkpoint.config.corpora if c.name == name), contents)
        for name, contents in checkpoint.data.items()
        if "records" in contents and "validation" not in contents
    ]
    by_words: dict[bytes, list[int]] = {}
    for i, words in enumerate(_words(records) if own else ()):
        by_words.setdefault(words, []).append(i)
    identities = [""] * len(records)  # as they are needed
    unknown: list[str] = []
    for config, contents in own:
        left_before = left.sum()
        there = _trained(config, contents)
        if there is None:
            unknown.append(f"{config.name!r} ({config.path})")
        for trained, items in there or ():
            here = set(items.tolist())
            for k, words in enumerate(_words(trained)):
                if k not in here or not any(left[i] for i in by_words.get(words, ())):
                    continue
                same = identity(trained[k])
                for i in by_words[words]:
                    identities[i] = identities[i] or identity(records[i])
                    left[i] &= identities[i] != same
        if not left.any():
            raise _all_trained(where, config.name)
        if gone := int(left_before - left.sum()):
            notes.append(
                f"{gone} of the {len(records)} records {where} were trained on, as corpus "
                f"{config.name!r}: they are left out"
            )
    before = [n for n, c in checkpoint.data.items() if "records" in c and "validation" in c]
    for names, why in (
        (before, "a checkpoint that this one began with learnt these, known as whole stores alone"),
        (unknown, f"these corpora are not where they were, or hold more than {MOST:,} records"),
    ):
        if names:
            more = f" and {len(names) - 2} more" if len(names) > 2 else ""
            notes.append(
                f"whether some of the records {where} were trained on is not known: {why}: "
                f"{', '.join(names[:2])}{more}"
            )
    return np.flatnonzero(left)


def _trained(
    config: CorpusConfig, contents: Mapping[str, Any]
) -> list[tuple[RecordStore, np.ndarray]] | None:
    """Return the stores of a corpus and which of their records were trained on.

    None where they do not lie there as they were, or are too large to be looked through.
    """
    place = Path(config.path)
    found = [open_store(f) for f in stores_below(place)] if place.is_dir() else []
    records = [s for s in found if isinstance(s, RecordStore)]
    known = contents.get("stores", {}).values()
    there = [s for s in records if set(digests([s]).values()) & set(known)]
    if not there or len(there) < len(known) or sum(map(len, there)) > MOST:
        return None
    masks = [np.ones(len(s), bool) for s in there]
    groups = [s.groups() for s in there]
    chosen = divide(config, masks, [s.name for s in there], numbers=groups)
    return list(zip(there, chosen, strict=True))


def _words(records: RecordStore | Sequence[Record]) -> Iterator[bytes]:
    """Yield a digest of what each record says, whatever it shows."""
    for record in records.words() if isinstance(records, RecordStore) else records:
        told = {key: value for key, value in record.items() if key != "meta"}
        line = json.dumps(told, sort_keys=True, default=lambda image: None)
        yield hashlib.sha256(line.encode()).digest()[:8]
