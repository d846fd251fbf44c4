"""Data that lie elsewhere: `s3://`, `gs://`, `https://`, `hf://`, through fsspec and a cache.

Readers ask for the files they need (`open_folder`) or for all of them (`fetch`); for stores of our
own see `gato.envs.mirror`. Files are kept in ``$GATO_CACHE/remote``, or ``~/.cache/gato/remote``,
see `gato.envs.cache`; what is there can be used without a network, which is said.

Convention: whether a file has changed on the other side is told by its size and what else that side
says of it (an ETag, a time); where it says nothing, a change that keeps the size is not noticed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from gato.envs.cache import Cache
from gato.envs.files import write_atomically

_VERSION = ("size", "ETag", "etag", "mtime", "LastModified", "last_modified", "updated", "created")
_VERSION += ("md5Hash", "crc32c", "generation", "blob_id", "Content-MD5", "oid")
_PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "hf": "huggingface_hub"}
_PACKAGES |= dict.fromkeys(("http", "https"), "gato[remote]")
_BLOCK = 8 << 20


class NotThereError(ValueError):
    """Nothing lies at an address: it was reached, and said so."""


def is_remote(location: str | Path) -> bool:
    """Return whether a location is an address rather than a path."""
    return "://" in str(location)


def cache_folder() -> Path:
    """Return the folder of everything that can be made or fetched again."""
    return Path(os.environ.get("GATO_CACHE") or Path.home() / ".cache" / "gato")


def file_cache() -> Cache:
    """Return the cache of what was fetched."""
    return Cache(cache_folder() / "remote")


def fetch(address: str) -> Path:
    """Return a local copy of a file, or of a folder and all below it, kept while we run.

    Raises:
        ValueError: where nothing lies there, or it has no room in the cache.
        ConnectionError: where it cannot be reached and is not in the cache.
    """
    folder = RemoteFolder(address)
    folder.cache.hold(folder.place)
    whole = folder.cache.root / folder.place / ".whole.json"
    try:
        names = folder.names()
    except ConnectionError as error:
        names = _fetched(folder, whole)
        if not names:
            raise
        warnings.warn(f"{error} Going on with what was fetched before.", stacklevel=2)
        return folder.root
    for name in names:
        folder.file(name)
    write_atomically(whole, json.dumps(names).encode())
    return folder.root


def _fetched(folder: RemoteFolder, whole: Path) -> list[str]:
    """Return the names of all files, where all of them were fetched and are here still."""
    try:
        names: list[str] = json.loads(whole.read_bytes())
    except OSError:
        return []
    here = all(folder.cache.has(folder.place, f"{folder.base}/{n}".rstrip("/")) for n in names)
    return names if here else []


def fingerprint(address: str) -> list[list[str]]:
    """Return name and version of every file at an address."""
    folder = RemoteFolder(address)
    return [[name, folder.version(name)] for name in folder.names()]


class Folder:
    """A folder of somebody's data, and its files as they are needed."""

    def __init__(self, location: str) -> None:
        self.root = Path(location)

    def file(self, name: str) -> Path:
        """Return a file on this machine.

        Raises:
            ValueError: where there is none, or its name leads out of the folder.
        """
        _require_inside(name)
        path = self.root / name
        if not path.is_file():
            raise ValueError(f"expected a file {name} in {self.root}; there is none.")
        return path

    def exists(self, name: str) -> bool:
        return (self.root / name).is_file()

    def glob(self, pattern: str) -> list[str]:
        """Return the names of files that fit a pattern, sorted."""
        return sorted(p.relative_to(self.root).as_posix() for p in self.root.glob(pattern))


def open_folder(location: str) -> Folder:
    """Return a folder here or elsewhere."""
    return RemoteFolder(location) if is_remote(location) else Folder(location)


class RemoteFolder(Folder):
    """A folder elsewhere; or one file, whose name in it is ""."""

    def __init__(self, address: str) -> None:
        self.address = address.rstrip("/") if not address.endswith("://") else address
        self.cache = file_cache()
        self.place = hashlib.sha256(self.address.encode()).hexdigest()[:16]
        self.base = PurePosixPath(re.sub(r"[?#].*", "", self.address)).name or "data"
        self.root = self.cache.root / self.place / self.base
        self._info: dict[str, Mapping[str, Any]] = {}
        self._fresh: set[str] = set()

    def file(self, name: str, sha256: str | None = None) -> Path:
        """Return a file on this machine, fetched where this version of it is not there.

        Args:
            name: its path in the folder.
            sha256: of its content, where that is known: then nobody is asked for its version.
        """
        _require_inside(name)
        inside = f"{self.base}/{name}".rstrip("/")
        path = self.cache.root / self.place / inside
        if name in self._fresh and self.cache.has(self.place, inside):
            return path
        try:
            version = self.version(name) if sha256 is None else f"sha256 {sha256}"
            path = self.cache.get(
                self.place, inside, version, partial(self._download, name), sha256=sha256
            )
        except ConnectionError as error:
            if not self.cache.has(self.place, inside):
                raise
            warnings.warn(f"{error} Going on with what was fetched before.", stacklevel=2)
        except ValueError as error:
            raise ValueError(f"{shown(self.at(name))}: {error}") from error
        self._fresh.add(name)
        return path

    def has(self, name: str, sha256: str) -> bool:
        """Return whether a file of that checksum is here, and mark it as used."""
        return self.cache.has(self.place, f"{self.base}/{name}", f"sha256 {sha256}")

    def exists(self, name: str) -> bool:
        if name in self._fresh:
            return True
        try:
            self._info_of(name)
        except NotThereError:
            return False
        except ConnectionError:
            if not self.cache.has(self.place, f"{self.base}/{name}"):
                raise
        return True

    def glob(self, pattern: str) -> list[str]:
        """Return the names of files that fit a pattern; none where the other side lists nothing.

        Raises:
            ValueError: where we may not look.
        """
        fs, path = filesystem(self.address)
        try:
            found = fs.glob(f"{path}/{pattern}")
            if not found and not _is_web(fs):
                fs.ls(path)  # which says what we may not see; the other passes over it
        except PermissionError as error:
            with told(self.address):
                raise error
        except Exception:  # a server that does not list its folders says so in every way there is
            return []
        return sorted(str(f)[len(path) :].strip("/") for f in found if str(f).startswith(path))

    def names(self) -> list[str]:
        """Return the names of all files; [""] for a file."""
        fs, path = filesystem(self.address)
        with told(self.address):
            fs.invalidate_cache()
            web = _is_web(fs)
            one = bool(PurePosixPath(self.base).suffix) if web else fs.isfile(path)
        if one:
            self._info_of("")
            return [""]
        with told(self.address):
            found = fs.find(path + "/" if web else path, detail=True)
        if not found:
            hint = ", or the server does not list them: `gato data import` may do" if web else ""
            raise ValueError(f"expected files at {shown(self.address)}; there are none{hint}.")
        names = []
        for file, info in found.items():
            name = str(file)[len(path) :].strip("/")
            self._info[name] = info
            names.append(name)
        return sorted(names)

    def version(self, name: str) -> str:
        """Return what tells this content of a file from others."""
        info = self._info_of(name)
        return json.dumps({k: str(info[k]) for k in _VERSION if info.get(k) is not None})

    def read(self, name: str) -> bytes | None:
        """Return what a small file holds now; None where there is none.

        Raises:
            ValueError: where we may not look, or a package is missing.
            ConnectionError: where it cannot be reached.
        """
        fs, _ = filesystem(self.address)
        try:
            with told(self.at(name)):
                return bytes(fs.cat_file(self.at(name)))
        except NotThereError:
            return None

    def _info_of(self, name: str) -> Mapping[str, Any]:
        if name not in self._info:
            fs, path = filesystem(self.at(name))
            with told(self.at(name)):
                info = fs.info(path)
                if info.get("type") == "directory":
                    raise FileNotFoundError(path)
                self._info[name] = info
        return self._info[name]

    def at(self, name: str) -> str:
        """Return the address of a file."""
        return f"{self.address}/{name}" if name else self.address

    def _download(self, name: str, file: BinaryIO, reserve: Callable[[int], None]) -> None:
        fs, path = filesystem(self.at(name))
        with told(self.at(name)):
            source = fs.open(path, "rb", cache_type="none")
        with source:
            size = getattr(source, "size", None)
            if size:
                reserve(size)
            while True:
                with told(self.at(name)):
                    block = source.read(_BLOCK)
                if not block:
                    break
                file.write(block)  # what is wrong here is wrong with the cache, not the address


@cache
def _fsspec() -> Any:
    try:
        import fsspec
    except ImportError as error:
        raise ValueError(
            f"addresses need fsspec, which does not import ({error}). Install it: "
            'pip install "gato[remote]"'
        ) from error
    return fsspec


def filesystem(address: str) -> tuple[Any, str]:
    """Return fsspec's file system of an address, and the path in it."""
    with told(address):
        fs, path = _fsspec().core.url_to_fs(address)
        return fs, str(path).rstrip("/")


def _is_web(fs: Any) -> bool:
    """Return whether it calls everything a file; and to look inside one is to fetch it."""
    return "http" in (fs.protocol if isinstance(fs.protocol, tuple) else (fs.protocol,))


@contextlib.contextmanager
def told(address: str) -> Iterator[None]:
    """Turn what fsspec and its back ends raise into sentences that name the address."""
    where = shown(address)
    try:
        yield
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        reason = _unreached(error)
        if reason is not None:
            raise _unreachable(where, reason) from error
        raise NotThereError(f"expected a file at {where}; there is none.") from error
    except ImportError as error:
        scheme = where.split("://")[0]
        package = _PACKAGES.get(scheme)
        hint = f' Install it: pip install "{package}"' if package else ""
        raise ValueError(f"{scheme}:// needs a package of its own: {error}.{hint}") from error
    except PermissionError as error:
        raise ValueError(
            f"no access to {where}: {error}. Sign in as that service's own tools ask for."
        ) from error
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    except Exception as error:
        raise _unreachable(where, error) from error


def _unreached(error: BaseException) -> BaseException | None:
    """Return why a file was not looked for, where fsspec calls that "not found" all the same."""
    cause = error.__cause__
    while cause is not None:
        connection = isinstance(cause, OSError) and not isinstance(cause, FileNotFoundError)
        if connection or getattr(cause, "status", 404) not in (404, 410):
            return cause
        cause = cause.__cause__
    return None


def _unreachable(where: str, reason: BaseException) -> ConnectionError:
    said = " ".join(shown(str(reason)).split()) or type(reason).__name__
    return ConnectionError(f"cannot reach {where}: {said}. Check the address and the network.")


def shown(address: str | Path) -> str:
    """Return an address without the name and password that may stand in it."""
    return re.sub(r"://[^/@]*@", "://", re.sub(r"\?.*", "", str(address)))


def _require_inside(name: str) -> None:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\0" in name:
        raise ValueError(f"expected a file below the data's folder; got {name!r:.200}.")
