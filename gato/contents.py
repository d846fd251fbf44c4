"""Which data a run is trained on, as its checkpoints say it, and that it goes on with the same."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from gato.envs.episode import EVALUATION_SEED_START
from gato.envs.records import RecordStore
from gato.envs.store import EpisodeStore

_NUMBER = re.compile(r" \(\d+\)$")  # behind the name of a store that is not the first so called


def digests(stores: Iterable[EpisodeStore | RecordStore]) -> dict[str, str]:
    """Return per store, by the name of its task or data, a digest of what lies in it.

    It is that of the names and checksums in its manifest, without shards that are left out. Where
    the store lies has no part in it.
    """
    found: dict[str, str] = {}
    for store in stores:
        name = store.spec.id if isinstance(store, EpisodeStore) else store.name
        same = sum(other.partition(" (")[0] == name for other in found)
        found[f"{name} ({same + 1})" if same else name] = _digest(store)
    return found


def _digest(store: EpisodeStore | RecordStore) -> str:
    if isinstance(store, EpisodeStore):
        shards = [s for s in store.manifest["shards"] if s["name"] not in store.skipped]
        return _digest_of([[s["name"], s["sha256"]] for s in shards])
    return _digest_of(store.manifest["sha256"])


def _digest_of(sums: Any) -> str:
    return hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest()[:16]


def has_grown(store: RecordStore, contents: Mapping[str, Any]) -> bool:
    """Return whether a store begins with all records of one of its name that was trained on.

    Proved by reading them: as a store of their own they have the digest that it had. It cannot be
    where it was one of several in a checkpoint that does not know their sizes, as older ones.

    Args:
        store: as it is now.
        contents: `Corpus.contents` then.
    """
    stores = contents["stores"]
    whole = contents["records"] + contents.get("held_out", 0)
    sizes = contents.get("sizes", dict.fromkeys(stores, whole))
    return any(
        0 < sizes[name] <= len(store) and _digest_of(store.sums_of_first(sizes[name])) == digest
        for name, digest in stores.items()
        if _named(name, store.name)
    )


def known_as(digest: str, name: str, contents: Mapping[str, Any]) -> str | None:
    """Return what a store with that digest was called when it was trained on; None for no such.

    What is held out goes by that name, whatever the same data are called elsewhere.

    Args:
        digest: of the store.
        name: what it is called now; of several that were the same, one so called is taken.
        contents: `Corpus.contents` then.
    """
    found = [key for key, known in contents.get("stores", {}).items() if known == digest]
    if any(_named(key, name) for key in found):
        return name
    return _NUMBER.sub("", found[0]) if found else None


def _named(key: str, name: str) -> bool:
    """Return whether `digests` may call a store of that name so."""
    return name in (key, _NUMBER.sub("", key))


def evaluation_seeds(seeds: np.ndarray) -> list[int]:
    """Return [lowest, highest] of the seeds that `gato eval` may use; [] where there are none."""
    found = seeds[seeds >= EVALUATION_SEED_START]
    return [int(found.min()), int(found.max())] if len(found) else []


def require_same_data(
    began: Mapping[str, Mapping[str, Any]], now: Mapping[str, Mapping[str, Any]], run: Any
) -> None:
    """Raise ValueError where a run would go on with other data than it began with.

    Args:
        began: what its checkpoint says of each corpus; older ones know of no digests.
        now: `Corpus.contents` of each corpus that is drawn from.
        run: the run's folder.
    """
    for name, contents in now.items():
        before, after = began.get(name, {}).get("stores"), contents["stores"]
        if before is None or before == after:
            continue
        told = _differences(before, after)
        more = f", and {len(told) - 1} more stores differ" if len(told) > 1 else ""
        count = next(k for k in ("episodes", "records") if k in contents)
        raise ValueError(
            f"corpus {name!r}: expected the data that the run in {run} was begun with; got others: "
            f"{told[0]}{more} ({began[name].get(count)} {count} then, {contents[count]} now). "
            f"Train into another folder, or restore the data as they were."
        )


def known_before(
    now: Mapping[str, tuple[float, Mapping[str, Any]]], before: Mapping[str, Mapping[str, Any]]
) -> list[str]:
    """Return notes on what a run holds out although the weights that it begins with learnt it.

    They did unless they held out the same share, of data of the same name: of two shares, neither
    holds out all that the other does, however large it is (`gato.selection.held_out`).

    Args:
        now: of each corpus the share that it holds out, and `Corpus.contents`.
        before: what the weights were trained on (`WarmStart.data`).
    """
    notes = []
    for name, (held, contents) in now.items():
        for other, said in before.items():
            share = said.get("validation", 0.0)
            own = [(_NUMBER.sub("", key), digest) for key, digest in contents["stores"].items()]
            were = [(known_as(digest, called, said), called) for called, digest in own]
            if any(was and (share != held or was != called) for was, called in were):
                again = f". With validation={share:g} it would" if share not in (0.0, held) else ""
                notes.append(
                    f"corpus {name!r} holds out {held:g}, but the weights that this run begins "
                    f"with learnt what is held out, as {other} (which held out {share:g}"
                    f"{' of it by another name' if share == held else ''}): its "
                    f"validation says nothing about data that are new{again}"
                )
                break
    return notes


def _differences(before: Mapping[str, str], after: Mapping[str, str]) -> Sequence[str]:
    told = [f"the store of {k!r} is gone" for k in before if k not in after]
    told += [f"the store of {k!r} is new" for k in after if k not in before]
    changed = [k for k in before if k in after and before[k] != after[k]]
    return told + [
        f"the store of {k!r} has changed (was {before[k]}, is {after[k]})" for k in changed
    ]
