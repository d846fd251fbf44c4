"""Commands about data: describe it, check it, take it in from other formats and give it out."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from gato import telling
from gato.envs import registry
from gato.envs.episode import TaskSpec, flatten_space
from gato.envs.files import require_place, stores_below
from gato.envs.mirror import local, mirror, remote_store
from gato.envs.readers import formats, importing
from gato.envs.readers.leaves import describe
from gato.envs.readers.publishing import staged
from gato.envs.readers.reader import ReadOptions, Source
from gato.envs.remote import file_cache, is_remote, shown
from gato.printing import print_json, print_table, progress_bar

Arguments = argparse.Namespace


def data(chosen: Arguments) -> None:
    """Do one of the things that `gato data` does."""
    if chosen.action is None:
        chosen.help()
        return
    actions: dict[str, Callable[[Arguments], None]] = {
        "info": info,
        "validate": validate,
        "import": import_data,
        "export": export,
        "text-model": text_model,
        "make": make,
    }
    set_cache(chosen)
    actions[chosen.action](chosen)


def text_model(chosen: Arguments) -> None:
    """Train a text model."""
    from gato.run_commands import text_model as run

    run(chosen)


def make(chosen: Arguments) -> None:
    """Write one of our own corpora of words and pictures to a store."""
    from gato.envs.corpora import registry
    from gato.envs.store import open_store

    out: Path = chosen.out
    require_place(out, "a folder for the store")
    if out.exists() and any(out.iterdir()):
        raise ValueError(
            f"expected a new folder as --out; something lies at {out} already. Choose another."
        )
    with staged(out, wait=False) as beside:  # a killed one leaves nothing at `out`
        made = registry.build(
            chosen.corpus, beside / "store", chosen.split, chosen.seed, chosen.count
        )
        made.replace(out)
    told = {"store": str(out), "items": len(open_store(out)), "split": chosen.split}
    if chosen.json:
        print_json(told)
    else:
        print(f"{told['items']} records in {out}")


def set_cache(chosen: Arguments) -> None:
    """Bound the cache of what is fetched, where the command line says so."""
    if getattr(chosen, "cache_gb", None) is not None:
        file_cache().set_limit(chosen.cache_gb)


def stores_at(path: str | Path) -> list[Path]:
    """Return the stores in a folder, or the store that it is; of an address, their mirrors."""
    found = stores_below(local(path))
    if not found:
        raise ValueError(f"expected a store or a folder of stores at {path}; found none.")
    return found


def with_imports(paths: list[str], skip_bad: bool = False) -> list[str]:
    """Return paths of stores: what is no store is imported into the cache first.

    What an import has left out or changed is said on stderr, also where it was made before; of
    several processes that start together one imports, the others wait, and the first says it.
    """
    from gato.distributed import is_first

    found = []
    for path in paths:
        if _is_ours(path, "auto"):
            found.append(str(local(path)))
            continue
        try:
            with _bar(path) as progress:
                folder = importing.cached(path, skip_bad=skip_bad, progress=progress)
        except ValueError as error:
            raise ValueError(
                f"{error} (to import it with other options: gato data import {path} --out STORE)"
            ) from error
        for line in _changes(importing.origin(folder)) if is_first() else ():
            telling.tell(f"{path}: {line}")
        found.append(str(folder))
    return found


def _changes(told: dict[str, Any]) -> Iterator[str]:
    """Yield a line for everything that an import has left out or changed."""
    for skipped in told["skipped"]:
        yield f"left out {skipped['items']}: {skipped['reason']} (first: {skipped['first']})"
    for what, count in told["counts"].items():
        yield f"{what}: {count:,}"


def info(chosen: Arguments) -> None:
    """Describe stores, and data of other formats."""
    from gato.token_estimate import Estimate

    estimate = Estimate()
    rows: list[dict[str, Any]] = []
    foreign: list[dict[str, Any]] = []
    faults: list[ValueError] = []
    for location in chosen.locations:
        try:
            if _is_ours(location, chosen.format):
                for folder in stores_at(location):
                    _try(rows, faults, partial(_describe_store, folder, estimate))
            else:
                source = formats.open_source(location, chosen.format, read_options(chosen))
                foreign.append(_describe_source(source, estimate))
        except ValueError as error:  # the others are looked at all the same
            faults.append(error)
    if chosen.json:
        print_json(rows + foreign)
    else:
        if rows:
            print_table([{k: v for k, v in row.items() if k != "tasks"} for row in rows])
        for described in foreign:
            _print_source(described)
    _raise(faults)


def validate(chosen: Arguments) -> None:
    """Read everything once."""
    from gato.envs.store import open_store

    rows: list[dict[str, Any]] = []
    faults: list[ValueError] = []
    for location in chosen.locations:
        try:
            if not _is_ours(location, chosen.format):
                rows.append(_validate_source(location, chosen, faults))
                continue
            for folder in stores_at(location):
                row = {"store": str(folder), "valid": False, "items": None}
                rows.append(row)
                try:
                    store = open_store(folder)
                    store.validate()
                    row |= {"valid": True, "items": len(store)}
                except ValueError as error:
                    faults.append(error)
        except ValueError as error:
            faults.append(error)
    if chosen.json:
        print_json(rows)
    elif rows:
        print_table(rows)
    _raise(faults)


def import_data(chosen: Arguments) -> None:
    """Take data of another format into stores."""
    require_place(chosen.out, "a folder for stores")
    source = formats.open_source(chosen.source, chosen.format, read_options(chosen))
    for spec in source.tasks.values() if chosen.task else ():
        require_task(spec)
    with _bar(chosen.source) as progress:
        summary = importing.import_source(
            source, chosen.out, skip_bad=chosen.skip_bad, progress=progress
        )
    told = {"stores": [str(path) for path in summary.stores], **summary.to_json()}
    if chosen.json:
        print_json({"source": chosen.source, "format": source.format, **told})
        return
    for line in (*_changes(told), *told["notes"], *told["stores"]):
        print(telling.shown(line, sys.stdout))


def require_task(spec: TaskSpec) -> None:
    """Refuse data under the id of one of our tasks whose spaces are others.

    Raises:
        ValueError: naming the first leaf that differs.
    """
    try:
        ours = registry.spec(spec.id)
    except ValueError:  # an id of its own, or of a task whose simulator is not installed
        return
    for role in ("observation", "action"):
        wanted, found = (
            {path: leaf.shape for path, leaf in flatten_space(space, role).items()}
            for space in (getattr(ours, f"{role}_space"), getattr(spec, f"{role}_space"))
        )
        if wanted != found:
            raise ValueError(
                f"expected the {role}s of {spec.id!r}, {wanted}; got {found}. Give these data a "
                f"--task of their own."
            )


def export(chosen: Arguments) -> None:
    """Write stores as data sets of another format."""
    from gato.envs.store import EpisodeStore, open_store

    folders = stores_at(chosen.store)
    opened = [open_store(folder) for folder in folders]
    stores = [store for store in opened if isinstance(store, EpisodeStore) and len(store)]
    if len(stores) < len(opened):
        other = next(s for s in opened if not isinstance(s, EpisodeStore) or not len(s))
        raise ValueError(f"expected stores with episodes at {chosen.store}; {other.path} has none.")
    if chosen.images is not None and chosen.format != "lerobot":
        raise ValueError(f"expected --images with --format lerobot; got {chosen.format!r}.")
    options = {} if chosen.images is None else {"images": chosen.images}
    with _bar(str(chosen.store)) as progress:
        written = formats.export(stores, chosen.format, chosen.out, progress, **options)
    rows: list[dict[str, Any]] = [
        {"store": str(store.path), "written": str(folder), "episodes": len(store)}
        for store, folder in zip(stores, written, strict=True)
    ]
    if chosen.format == "lerobot":
        from gato.envs.readers.lerobot_writer import loss_of

        for row in rows:
            row["lost of pictures"] = loss_of(Path(row["written"])) or "nothing"
    if chosen.json:
        print_json(rows)
    else:
        print_table(rows)


def read_options(chosen: Arguments) -> ReadOptions:
    """Return what the command line asks of a reader."""
    names = ("task", "instruction", "split", "limit", "image_size", "columns", "clip_actions")
    given = {n: getattr(chosen, n) for n in names if getattr(chosen, n, None) is not None}
    return replace(ReadOptions(), **given)


@contextmanager
def _bar(what: str) -> Iterator[formats.Progress]:
    with progress_bar() as bar:
        line = bar.add_task(Path(what).name or what, total=None)
        yield lambda done, total: bar.update(line, completed=done, total=total)


def _is_ours(location: str, format: str) -> bool:
    if format != "auto":
        return False
    return (
        mirror(location) is not None if is_remote(location) else importing.is_store(Path(location))
    )


def _try(
    rows: list[dict[str, Any]], faults: list[ValueError], describe: Callable[[], dict[str, Any]]
) -> None:
    try:
        rows.append(describe())
    except ValueError as error:
        faults.append(error)


def _raise(faults: list[ValueError]) -> None:
    if faults:
        more = f" (and {len(faults) - 1} more faults)" if len(faults) > 1 else ""
        raise ValueError(f"{faults[0]}{more}")


def _describe_store(folder: Path, estimate: Any) -> dict[str, Any]:
    from gato.envs.store import EpisodeStore, open_store

    store = open_store(folder)
    afar = remote_store(folder)  # of which only what was needed so far lies here
    size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    row: dict[str, Any] = {"store": str(folder) if afar is None else shown(afar.address)}
    row |= {"items": len(store), "steps": None, "hours": None, "mean_return": None}
    row |= {"success_rate": None, "megabytes": None if afar else round(size / 1e6, 1)}
    if isinstance(store, EpisodeStore) and len(store):
        row["steps"] = int(store.lengths.sum())
        row["hours"] = row["steps"] / store.spec.control_hz / 3600
        row["mean_return"] = float(store.returns.mean())
        if store.spec.measure == "success":
            row["success_rate"] = sum(bool(s) for s in store.successes) / len(store)
    row["tokens"] = estimate.store(store)
    if isinstance(store, EpisodeStore):
        row["tasks"] = {store.spec.id: _describe_task(store.spec)}
    return row


def _describe_source(source: Source, estimate: Any) -> dict[str, Any]:
    tokens, faults = estimate.source(source)
    return {
        "location": source.location,
        "format": source.format,
        "kind": source.kind,
        "items": source.items,
        "steps": source.steps,
        "hours": source.hours,
        "tokens": tokens,
        "fields": source.fields,
        "tasks": {task: _describe_task(spec) for task, spec in source.tasks.items()},
        "notes": [*source.notes, *faults],
    }


def _describe_task(spec: TaskSpec) -> dict[str, Any]:
    return {
        "instruction": spec.instruction,
        "observations": _leaves(spec.observation_space, "observation"),
        "actions": _leaves(spec.action_space, "action"),
    }


def _leaves(space: Any, name: str) -> dict[str, str]:
    return {path: describe(leaf) for path, leaf in flatten_space(space, name).items()}


def _print_source(told: dict[str, Any]) -> None:
    shown = ("location", "format", "kind", "items", "steps", "hours", "tokens")
    print_table([{name: told[name] for name in shown}])
    if told["fields"]:
        print_table([{"field": k, "becomes": v} for k, v in told["fields"].items()])
    for task, about in told["tasks"].items():
        print(f"{task}: {about['instruction']}" if about["instruction"] else task)
        rows = [
            {"": role, "path": path, "space": leaf}
            for role in ("observations", "actions")
            for path, leaf in about[role].items()
        ]
        print_table(rows)
    for note in told["notes"]:
        print(note)


def _validate_source(location: str, chosen: Arguments, faults: list[ValueError]) -> dict[str, Any]:
    """Read and check every item of a source; name the first that is bad and count the others."""
    source = formats.open_source(location, chosen.format, read_options(chosen))
    with _bar(location) as progress:
        summary = importing.check_source(source, progress)
    bad = sum(summary.skipped.values())
    if bad:
        reason, where = next(iter(summary.first.items()))
        faults.append(ValueError(f"{bad} of {summary.kept + bad} items; {where}: {reason}"))
    return {"store": location, "valid": not bad and summary.kept > 0, "items": summary.kept}
