"""A folder of files that can be fetched again, at most so many bytes of them.

A file appears whole or not at all. Room is made before anything is written, also for a content
whose size nobody tells. Where room is needed, the files that were not used for longest go; what was
used in the last seconds stays, and so does what a living process has asked to keep whole. A tenth
of the cache goes at once where it may, so that its files are not walked for every one that comes.
Any number of processes and threads may share the folder: locks are the system's, and end with the
process that holds them.

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
import io
import json
import os
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from gato.envs.files import sync_folder, write_atomically

GIGABYTES = 20.0
"""Size of a cache for which nobody has said another."""
GRACE = 10.0
"""Seconds after its last use in which a file stays, so that who has asked for it can open it."""
SPARE = 0.1
"""Share of the cache that is made free where room is needed: so it is not needed soon again."""
SETTLED = 6.0
"""How many times GRACE a file must not have been used to go for the sake of spare room alone."""
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
            if size > reserved:
                if size > self.limit:  # before others go for nothing
                    raise self._too_small(size)
                self._make_room(size - reserved, temporary, size)
                reserved = size

        try:
            with _Growing(temporary, reserve) as file:
                download(file, reserve)
                file.truncate()
                file.flush()
                os.fsync(file.fileno())
            with temporary.open("rb") as written:
                checksum = hashlib.file_digest(written, "sha256").hexdigest()
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)
        return checksum

    def _make_room(self, size: int, file: Path | None = None, length: int = 0) -> None:
        """Remove files until so many bytes more are within the bound.

        Args:
            size: bytes that come.
            file: where they come, made as long as it will be: it counts before it is written.
            length: of that file then.
        """
        while True:
            with self._lock("room"):
                wait = None
                total = self._total()
                if total is None or total + size > self.limit:
                    total, wait = self._remove(size)
                else:
                    total += size
                # a count that a kill leaves behind is too high, which the next one corrects
                self._count_file.write_text(str(total))
                if wait is None:
                    if file is not None:
                        os.truncate(file, length)
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
            rest = GRACE - (now - used) / 1e9
            spare = total <= limit
            if total <= limit * (1 - SPARE) or (spare and rest > GRACE * (1 - SETTLED)):
                break
            name = os.path.basename(path)
            if name.startswith(".") or name in KEPT:
                continue
            if place in kept or self._is_held(place):
                kept.add(place)
                continue
            if rest > 0:
                soonest = rest if soonest is None else min(soonest, rest)
                continue
            if self._remove_unused(path, used):
                total -= bytes_
        if total <= limit:
            return total, None
        if soonest is not None:
            return total - size, min(soonest, 0.2) + 0.01
        raise self._too_small(total)

    def _remove_unused(self, path: str, used: int) -> bool:
        """Remove a file unless it was used meanwhile; return whether it is gone."""
        try:
            if os.stat(path).st_atime_ns != used:
                return False
            os.unlink(path)
        except FileNotFoundError:
            return True
        place, name = os.path.relpath(path, self.root).split(os.sep, 1)
        self._stamp(place, name).unlink(missing_ok=True)
        return True

    def _too_small(self, needed: int) -> ValueError:
        return ValueError(
            f"the cache at {self.root} may hold {self.limit / 1e9:g} GB, and at least "
            f"{needed / 1e9:.3g} GB are needed at once. Allow it more: "
            f"--cache-gb {needed / 1e9 * 1.1:.2g}"
        )

    def _files(self) -> Iterator[tuple[int, int, str, str]]:
        """Yield when each file was last used, its size, place and path; unfinished ones too."""
        for place in _entries(self.root):
            if place.name == "locks" or not place.is_dir():
                continue
            folders = [place.path]
            while folders:
                for entry in _entries(folders.pop()):
                    if entry.is_dir(follow_symlinks=False):
                        if entry.name != ".stamps":
                            folders.append(entry.path)
                        continue
                    with contextlib.suppress(FileNotFoundError):
                        stat = entry.stat()
                        if entry.name.startswith(".") and self._abandoned(Path(entry.path)):
                            os.unlink(entry.path)
                        else:
                            yield stat.st_atime_ns, stat.st_size, place.name, entry.path

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


class _Growing(io.BufferedWriter):
    """A new file for which room is made before each block; a content is written from its start."""

    def __init__(self, path: Path, reserve: Callable[[int], None]) -> None:
        super().__init__(io.FileIO(path, "w"))
        self._reserve = reserve

    def write(self, content: Any, /) -> int:
        self._reserve(self.tell() + memoryview(content).nbytes)
        return super().write(content)


def _entries(folder: str | Path) -> list[os.DirEntry[str]]:
    """Return what is in a folder; nothing of one that is gone."""
    try:
        with os.scandir(folder) as found:
            return list(found)
    except FileNotFoundError:
        return []


def _flock(descriptor: int, *, shared: bool = False, wait: bool = True) -> bool:
    """Lock an open file; return False where another holds it and this may not wait."""
    import fcntl  # not on Windows

    how = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB)
    try:
        fcntl.flock(descriptor, how)
    except BlockingIOError:
        return False
    return True
