"""Stores that lie elsewhere, as folders of this machine that fill as they are read.

A store is opened from its manifest, which a process fetches anew unless it has lately; its shards
follow when they are read, each checked against the manifest's checksums. A mark in the folder says
where the store comes from, so that whoever opens it, in whatever process, can fetch what is
missing.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import time
import warnings
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from gato.envs.files import stores_below, write_atomically
from gato.envs.remote import RemoteFolder, filesystem, is_remote, shown

_MARK = ".remote.json"
_CHECKED = 3.0
"""Seconds in which a shard that was found whole is not looked at again."""
_TRUSTED = 60.0
"""Seconds in which a process does not ask again for the manifests at an address: a run that starts
opens its corpora several times."""
_LOOKED: dict[tuple[str, Path], tuple[float, list[Path]]] = {}
"""When the stores at an address were looked for, and where their mirrors are."""
_AT_ONCE = 16
"""Files that are fetched at a time."""
_TRIES = 100


def local(location: str | Path) -> Path:
    """Return where the stores at a location can be opened: the path itself, or their mirror.

    Raises:
        ValueError: for an address that cannot be read, or where no store lies.
    """
    if not is_remote(location):
        return Path(location)
    found = mirror(str(location))
    if found is None:
        raise ValueError(
            f"expected a store or a folder of stores at {shown(location)}; found none."
        )
    return found


def mirror(address: str) -> Path | None:
    """Return a local folder where the stores at an address can be opened; None where none lies.

    Their manifests are there when this returns, and of stores of records everything; the shards
    of episodes come as they are read.
    """
    folder = RemoteFolder(address)
    looked, stores = _LOOKED.get((address, folder.root), (-math.inf, []))
    if time.monotonic() - looked < _TRUSTED and all((s / _MARK).is_file() for s in stores):
        return folder.root
    try:
        names = _manifests(folder)
    except ConnectionError as error:
        stores = stores_below(folder.root)
        if not stores:
            raise
        warnings.warn(f"{error} Going on with what was fetched before.", stacklevel=2)
        _LOOKED[address, folder.root] = (time.monotonic(), stores)
        return folder.root
    for store in stores_below(folder.root) if folder.root.exists() else ():
        if store.relative_to(folder.root).as_posix() not in {n or "." for n in names}:
            (store / "manifest.json").unlink(missing_ok=True)  # no longer on the other side
    for name, content in names.items():
        store = folder.root / name
        store.mkdir(parents=True, exist_ok=True)
        where = folder.at(name)
        write_atomically(store / _MARK, json.dumps({"address": where}).encode())
        write_atomically(store / "manifest.json", content)
        _fetch_whole(RemoteStore(where, store), content)
    if not names:
        return None
    _LOOKED[address, folder.root] = (time.monotonic(), [folder.root / name for name in names])
    return folder.root


def _manifests(folder: RemoteFolder) -> dict[str, bytes]:
    """Return the manifests at an address by the names of their stores."""
    one = folder.read("manifest.json")
    if one is not None:
        return {"": one}
    fs, _ = filesystem(folder.address)
    with contextlib.suppress(Exception):
        fs.invalidate_cache()
    found = {}
    for name in folder.glob("**/manifest.json"):
        content = folder.read(name)
        hidden = any(part.startswith(".") for part in name.split("/"))
        if content is not None and not hidden:
            found[name.removesuffix("manifest.json").rstrip("/")] = content
    return found


def _fetch_whole(store: RemoteStore, content: bytes) -> None:
    """Fetch the files that a manifest names outside of shards: all of a store of records."""
    try:
        manifest = json.loads(content)
        files = manifest.get("sha256", {})
    except (ValueError, AttributeError):
        return  # a damaged manifest: opening the store will say so
    if files:
        store.hold()
        store.files(files)


def remote_store(path: Path) -> RemoteStore | None:
    """Return where the store in a folder of the cache comes from; None for any other folder."""
    try:
        told = json.loads((path / _MARK).read_bytes())
    except OSError:
        return None
    return RemoteStore(told["address"], path)


class RemoteStore:
    """The files of one store elsewhere, below the folder of its mirror."""

    def __init__(self, address: str, path: Path) -> None:
        self.address, self.path = address, path
        self.folder = RemoteFolder(address)
        # a store below the address that was asked for lies below that one's place
        inside = path.relative_to(self.folder.cache.root)
        self.folder.place, self.folder.base = inside.parts[0], "/".join(inside.parts[1:])
        self.folder.root = path
        self._seen: dict[str, float] = {}

    def need(self, shard: Mapping[str, Any], name: str = "") -> None:
        """Have a shard's files here, or one of them, and mark them as used.

        Raises:
            ValueError: for a file that is not what the manifest says.
            ConnectionError: where one must be fetched and cannot be.
        """
        key, now = f"{shard['name']}/{name}", time.monotonic()
        if now - self._seen.get(key, -_CHECKED) < _CHECKED:
            return
        names = [name] if name else list(shard["sha256"])
        self.files({f"{shard['name']}/{n}": shard["sha256"][n] for n in names})
        self._seen[key] = now

    def renew(self, shard: Mapping[str, Any], name: str = "") -> bool:
        """Fetch what another process has removed of a shard, or of one file of it.

        Returns whether anything was gone.

        For whoever found a file missing that was here: between `need` and the reading of a file
        may lie any time, as where a process is stopped for a while.
        """
        names = [name] if name else list(shard["sha256"])
        checksums = {f"{shard['name']}/{n}": shard["sha256"][n] for n in names}
        if all([self.folder.has(name, checksum) for name, checksum in checksums.items()]):
            return False
        self.files(checksums)
        return True

    def index(self, shards: Iterable[Mapping[str, Any]], names: Iterable[str]) -> None:
        """Have some small files of every shard here."""
        wanted = itertools.product(shards, names)
        self.files({f"{s['name']}/{n}": s["sha256"][n] for s, n in wanted if n in s["sha256"]})

    def hold(self) -> None:
        """Keep what is here as long as this process lives."""
        self.folder.cache.hold(self.folder.place)

    def files(self, checksums: Mapping[str, str]) -> None:
        """Have files here, several fetched at a time: most of the wait is for answers."""
        for _ in range(_TRIES):
            missing = [(n, c) for n, c in checksums.items() if not self.folder.has(n, c)]
            if not missing:
                return
            if len(missing) == 1:
                self.folder.file(*missing[0])
                continue
            with ThreadPoolExecutor(min(len(missing), _AT_ONCE)) as pool:
                for done in [pool.submit(self.folder.file, *one) for one in missing]:
                    done.result()
        raise ValueError(
            f"the cache at {self.folder.cache.root} is too small for all who use it: files of "
            f"{shown(self.address)} were removed before they were read. Allow it more: --cache-gb"
        )
