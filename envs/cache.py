"""A folder of files that can be fetched again, at most so many bytes of them.

A file appears whole or not at all. Where room is needed, the files that were not used for longest
go; what was used in the last seconds stays, and so does what a living process has asked to keep
whole. Any number of processes and threads may share the folder: locks are the system's, and end
with the process that holds them.

```
<root>/settings.json            how large it may be
<root>/locks/                   who fetches what; who needs a place whole
<root>/<place>/.stamps/<name>   the version of a file
<root>/<place>/<name>           a file; hidden ones belong to the cache
```
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from gato.envs.files import sync_folder, write_atomically

GIGABYTES = 20.0
"""Size of a cache for which nobody has said another."""
GRACE = 10.0
"""Seconds after its last use in which a file stays, so that who has asked for it can open it."""
KEPT = ("manifest.json",)
"""Files that stay: small, and without them the others are of no use."""
_STRIPES = 64
Download = Callable[[BinaryIO, Callable[[int], None]], None]
"""Writes a content into a file; says how large it will be before, where it knows."""


_HELD: dict[tuple[int, Path], int] = {}
"""Descriptors of the places that a process needs whole; to close one would let go."""


class Cache:
    """Files under `root`, fetched where they are not there yet."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @property
    def limit(self) -> int:
        """The bytes that it may hold."""
        try:
            told = json.loads((self.root / "settings.json").read_bytes())
            return round(float(told["gigabytes"]) * 1e9)
        except (OSError, ValueError, KeyError, TypeError):
            return round(GIGABYTES * 1e9)

    def set_limit(self, gigabytes: float) -> None:
        """Set how large the cache may be, for all who use it from now on."""
        if not 0 < gigabytes < 1e9:
            raise ValueError(f"expected a positive size of the cache in GB; got {gigabytes}.")
        self.root.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"gigabytes": gigabytes})
        write_atomically(self.root / "settings.json", text.encode())
        self._make_room(0)

    def get(
        self,
        place: str,
        name: str,
        version: str,
        download: Download,
        *,
        sha256: str | None = None,
    ) -> Path:
        """Return a file, fetched where this version of it is not there.

        Args:
            place: a folder of the cache.
            name: the file's path in it.
            version: what tells this content from earlier ones.
            download: writes the content into the file that it is given.
            sha256: of the content, where it is known; another content is fetched once more.

        Raises:
            ValueError: where the content is not of that checksum, or has no room.
        """
        path = self.root / place / name
        if self.has(place, name, version):
            return path
        with self._lock(self._stripe(f"{place}/{name}")):
            if self.has(place, name, version):  # another has fetched it meanwhile
                return path
            path.parent.mkdir(parents=True, exist_ok=True)
            for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
                left.unlink(missing_ok=True)  # of one that was killed: only we may fetch it now
            got = self._fetch(path, download)
            if sha256 is not None and got != sha256:
                got = self._fetch(path, download)
                if got != sha256:
                    path.unlink(missing_ok=True)
                    raise ValueError(
                        f"expected sha256 {sha256[:12]} for {path.name}; got {got[:12]}, twice."
                    )
            stamp = self._stamp(place, name)
            stamp.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(stamp, version.encode())
        return path

    def has(self, place: str, name: str, version: str | None = None) -> bool:
        """Return whether a file is there, of that version, and mark it as used."""
        path = self.root / place / name
        try:
            if version is not None and self._stamp(place, name).read_bytes() != version.encode():
                return False
            os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))
        except OSError:
            return False
        return True

    def hold(self, place: str) -> None:
        """Keep everything in a place as long as this process lives."""
        key = (os.getpid(), self.root / place)
        if key not in _HELD:
            _HELD[key] = self._open_lock(f"place-{place}")
            _flock(_HELD[key], shared=True)

    def used(self) -> int:
        """Return the bytes that the cache holds."""
        return sum(size for _, size, _, _ in self._files())

    def _fetch(self, path: Path, download: Download) -> str:
        """Download a file, let it take its place and return its checksum."""
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        reserved = 0

        def reserve(size: int) -> None:
            nonlocal reserved
            self._make_room(size, temporary)
            reserved = size

        try:
            temporary.touch()
            with temporary.open("r+b") as file:
                download(file, reserve)
                file.truncate()
                got = file.tell()
                if got > reserved:  # more than the other side has told
                    self._make_room(got - reserved, here=True)
                file.flush()
                os.fsync(file.fileno())
            with temporary.open("rb") as file:
                checksum = hashlib.file_digest(file, "sha256").hexdigest()
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)
        return checksum

    def _make_room(self, size: int, reserve: Path | None = None, *, here: bool = False) -> None:
        """Remove files until the cache is within its bound.

        Args:
            size: bytes that come now.
            reserve: a file that becomes as large, and counts, though nothing is written yet.
            here: whether they have come already.
        """
        while True:
            with self._lock("room"):
                wait = None
                total = self._total()
                if total is None or total + size > self.limit:
                    total, wait = self._remove(0 if here else size)
                else:
                    total += size
                # a count that a kill leaves behind is too high, which the next one corrects
                self._count_file.write_text(str(total))
                if wait is None:
                    if reserve is not None:
                        os.truncate(reserve, size)
                    return
            time.sleep(wait)

    @property
    def _count_file(self) -> Path:
        return self.root / "locks" / "total"

    def _total(self) -> int | None:
        """Return the bytes as last counted and added to; never less than there are."""
        try:
            return int(self._count_file.read_text())
        except (OSError, ValueError):
            return None

    def _remove(self, size: int) -> tuple[int, float | None]:
        """Remove what was not used for longest.

        Returns the bytes there are, `size` more included, and the seconds to wait before more can
        be removed, or None where there is room.
        """
        limit, files = self.limit, sorted(self._files())
        total = size + sum(f[1] for f in files)
        now, kept, soonest = time.time_ns(), set[str](), None
        for used, bytes_, place, path in files:
            if total <= limit:
                return total, None
            if path.name.startswith(".") or path.name in KEPT:
                continue
            if place in kept or self._is_held(place):
                kept.add(place)
                continue
            rest = GRACE - (now - used) / 1e9
            if rest > 0:
                soonest = rest if soonest is None else min(soonest, rest)
                continue
            path.unlink(missing_ok=True)
            total -= bytes_
        if total <= limit:
            return total, None
        if soonest is not None:
            return total - size, min(soonest, 0.2) + 0.01
        raise ValueError(
            f"the cache at {self.root} may hold {limit / 1e9:g} GB, and {total / 1e9:.3g} GB are "
            f"needed at once. Allow it more: --cache-gb {total / 1e9 * 1.1:.2g}"
        )

    def _files(self) -> list[tuple[int, int, str, Path]]:
        """Return when each file was last used, its size, place and path; unfinished ones too."""
        found = []
        for place in self.root.iterdir() if self.root.exists() else ():
            if place.name == "locks" or not place.is_dir():
                continue
            for folder, folders, names in os.walk(place):
                folders[:] = [f for f in folders if f != ".stamps"]
                for name in names:
                    path = Path(folder, name)
                    with contextlib.suppress(FileNotFoundError):
                        stat = path.stat()
                        if self._abandoned(path):
                            path.unlink()
                        else:
                            found.append((stat.st_atime_ns, stat.st_size, place.name, path))
        return found

    def _abandoned(self, path: Path) -> bool:
        """Return whether a file is one that a process was fetching when it was killed."""
        parts = path.name.split(".")
        if parts[0] or parts[-1] != "tmp" or not parts[-2].isdecimal():
            return False
        try:
            os.kill(int(parts[-2]), 0)
        except ProcessLookupError:
            return True
        except OSError:  # of another user
            return False
        return False

    def _is_held(self, place: str) -> bool:
        descriptor = self._open_lock(f"place-{place}")
        try:
            return not _flock(descriptor, wait=False)
        finally:
            os.close(descriptor)

    def _stamp(self, place: str, name: str) -> Path:
        return self.root / place / ".stamps" / name

    def _stripe(self, key: str) -> str:
        return f"{zlib.crc32(key.encode()) % _STRIPES:02d}"

    def _open_lock(self, name: str) -> int:
        folder = self.root / "locks"
        folder.mkdir(parents=True, exist_ok=True)
        return os.open(folder / name, os.O_RDWR | os.O_CREAT, 0o666)

    @contextlib.contextmanager
    def _lock(self, name: str) -> Iterator[None]:
        descriptor = self._open_lock(name)
        try:
            _flock(descriptor)
            yield
        finally:
            os.close(descriptor)


def _flock(descriptor: int, *, shared: bool = False, wait: bool = True) -> bool:
    """Lock an open file; return False where another holds it and this may not wait."""
    import fcntl  # not on Windows

    how = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB)
    try:
        fcntl.flock(descriptor, how)
    except BlockingIOError:
        return False
    return True
