"""Pictures and words in tar archives, as WebDataset has them.

The files of one example follow each other and share a name up to its first dot: ``0017.jpg``
with ``0017.txt`` or ``0017.json``. A location is an archive, a folder of them, or a pattern with
braces, here or elsewhere: ``s3://bucket/train-{000..127}.tar``. Archives are
read from their beginning to their end and nothing of them is unpacked to disk; of links and devices
in them nothing is read. What is packed small may be large: names, members and examples are bounded.

An example with a picture and words is a caption, one with words alone a document.
"""

from __future__ import annotations

import itertools
import re
import tarfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Self

from gato.envs.readers import pictures
from gato.envs.readers.json_stream import parse_json
from gato.envs.readers.pictures import note, read_picture
from gato.envs.readers.reader import BadItem, ReadOptions, Source
from gato.envs.readers.untrusted import (
    READ_ERRORS,
    check_options,
    checked_fields,
    checked_text,
    decoded,
    files,
    size_of,
)
from gato.envs.remote import is_remote, open_folder

FORMAT = "webdataset"
EXTRA = ""
IGNORES = ("clip_actions",)
ADDRESSES = True  # shards elsewhere are fetched one by one, and need not all fit on this disk
SHARDS = (".tar", ".tgz")  # and .tar.gz
WORDS = ("txt", "text", "caption")
IN_JSON = ("caption", "text")
MAX_MEMBER = MAX_EXAMPLE = pictures.MAX_BYTES
MAX_HEADER = 1 << 20
"""Bytes of long names and other attributes, of one member or of all of an archive."""
MAX_FILES = 1000
"""Of one example."""
_MOST = 100_000  # shards that a pattern may stand for
_PICTURES = tuple(s[1:] for s in pictures.SUFFIXES)
_SURVEYED = 20  # examples that are looked at before reading
_ABOUT = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)

Example = dict[str, bytes | BadItem]


def recognises(location: str) -> bool:
    """Return whether there are tar archives."""
    return bool(shards(location, glance=True))


def open_source(location: str, options: ReadOptions) -> Source:
    """Return the captioned pictures and texts of all shards, in the order of their names."""
    check_options(options, FORMAT, ("image", "text"), splits=False)
    paths = shards(location)
    here = [Path(p) for p in paths if not is_remote(p)]
    missing = [p for p in here if not p.is_file()]
    if not paths or missing:
        also = (
            f"{missing[0]} and {len(missing) - 1} more are missing" if missing else "none is there"
        )
        raise ValueError(f"expected tar archives at {location}; {also}.")
    named = [options.columns[n].lower() for n in ("image", "text") if n in options.columns]
    wanted = {*_PICTURES, *WORDS, "json", *named}
    seen: dict[str, None] = {}
    reason = ""
    for _, example in itertools.islice(_examples(paths, wanted), _SURVEYED):
        if isinstance(example, BadItem):
            reason = reason or f" {example.where}: {example.reason}."
        else:
            seen.update(dict.fromkeys(_parts(example)))
    mapping = _mapping(list(seen), options, location, reason)
    size = f"{size_of(here) / 1e6:.1f} MB" if here else "each fetched when it is read"
    notes = [f"shards: {len(paths)}, {size}"]
    if set(mapping["image"]) & set(seen):
        notes.append(note(options))
    names = {n: ours for ours, several in mapping.items() for n in several}
    fields = {name: names.get(name, "left out") for name in seen}
    read = partial(_read, paths, wanted, mapping, options)
    return Source(FORMAT, location, "records", read, fields=fields, notes=notes)


def place(location: str) -> str:
    """Return the folder of the shards that a pattern names; other locations as they are."""
    if "{" in location and not is_remote(location) and not Path(location).exists():
        return str(Path(location.split("{")[0] + "x").parent)
    return location


def shards(location: str, *, glance: bool = False) -> list[str]:
    """Return the archives of a location; those that a pattern names, whether there or not."""
    if "{" in location and not Path(location).exists():
        found = expand(location)
        return found if all(_is_shard(p) for p in found) else []
    if not is_remote(location):
        return [str(p) for p in files(location, SHARDS, glance=glance)]
    if _is_shard(location):
        return [location]
    names = open_folder(location).glob("**/*")
    return [f"{location.rstrip('/')}/{name}" for name in names if _is_shard(name)]


def expand(pattern: str) -> list[str]:
    """Return what a pattern with braces stands for.

    >>> expand("a-{08..10}.{x,y}")
    ['a-08.x', 'a-08.y', 'a-09.x', 'a-09.y', 'a-10.x', 'a-10.y']
    """
    choices, total = [], 1
    for piece in re.split(r"(\{[^{}]*\})", pattern):
        if not piece.startswith("{"):
            choices.append([piece])
            continue
        inner = piece[1:-1]
        if numbers := re.fullmatch(r"(\d{1,18})\.\.(\d{1,18})", inner):
            first, last = numbers.groups()
            total *= abs(int(last) - int(first)) + 1
            if total > _MOST:
                raise ValueError(f"expected at most {_MOST} shards; {pattern} stands for more.")
            step = 1 if int(first) <= int(last) else -1
            digits = len(first) if first.startswith("0") or len(first) == len(last) else 1
            found = range(int(first), int(last) + step, step)
            choices.append([f"{n:0{digits}d}" for n in found])
        else:
            choices.append(inner.split(","))
            total *= len(choices[-1])
    if total > _MOST:
        raise ValueError(f"expected at most {_MOST} shards; {pattern} stands for more.")
    return ["".join(parts) for parts in itertools.product(*choices)]


def _is_shard(name: str) -> bool:
    return name.lower().endswith((*SHARDS, ".tar.gz"))


def _examples(paths: list[str], wanted: set[str]) -> Iterator[tuple[str, Example | BadItem]]:
    """Yield the files of every example by ending, or what is wrong with an archive."""
    for path in paths:
        key, example, size = None, Example(), 0
        try:
            for name, content in _members(path, wanted):
                base, ending = _split(name)
                if base != key:
                    if example:
                        yield f"{path}: {key}", example
                    key, example, size = base, {}, 0
                size += len(content) if isinstance(content, bytes) else 0
                if size > MAX_EXAMPLE or len(example) >= MAX_FILES:
                    most = f"{MAX_EXAMPLE >> 20} MiB or {MAX_FILES} files"
                    content, ending, example = (
                        BadItem("", f"an example of more than {most}"),
                        "",
                        {},
                    )
                elif ending in example:
                    content = BadItem("", f"two files of ending {ending!r} in one example")
                example[ending] = content
        except (tarfile.TarError, ValueError, *READ_ERRORS) as error:
            where = f"{path}, from {key or 'its beginning'} on"
            yield where, BadItem(where, f"nothing from here on can be read: {error}")
            continue  # what came last may lack one of its files
        if example:
            yield f"{path}: {key}", example


class _Header(tarfile.TarInfo):
    """A header; a damaged one would end the reading as the archive's end does."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> Self:
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # the end, as it should be
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"{error} where a file or the archive's end is due") from error

    def _proc_member(self, archive: _Archive) -> tarfile.TarInfo:
        """Read what follows a header, of which `tarfile` holds everything in memory."""
        if self.type in _ABOUT:
            archive.told += max(self.size, MAX_HEADER >> 6)  # each is read inside the one before
            if self.type == tarfile.XGLTYPE:
                archive.kept += max(self.size, 0)
            if max(archive.told, archive.kept) > MAX_HEADER:
                raise tarfile.ReadError(f"a header of more than {MAX_HEADER >> 20} MiB")
        if self.type == tarfile.GNUTYPE_SPARSE:
            raise tarfile.ReadError("a file with holes, as GNU tar makes them with --sparse")
        found: tarfile.TarInfo = super()._proc_member(archive)  # type: ignore[misc]
        return found

    def _proc_gnusparse_10(self, *told: Any) -> None:
        raise tarfile.ReadError("a file with holes, as GNU tar makes them with --sparse")


class _Archive(tarfile.TarFile):
    """An archive that counts the bytes of headers."""

    tarinfo = _Header
    told = 0
    """About the member that is due."""
    kept = 0
    """About all members."""


def _members(path: str, wanted: set[str]) -> Iterator[tuple[str, bytes | BadItem]]:
    """Yield the names of an archive's files with what is in them, of unwanted endings nothing."""
    file = open_folder(path).file("") if is_remote(path) else Path(path)
    with _Archive.open(file, "r|*") as archive:
        for member in archive:
            archive.members = []  # type: ignore[attr-defined]  # or it would remember every one
            archive.told = 0
            hidden = member.name.rsplit("/", 1)[-1].startswith((".", "__"))
            if member.isdir() or hidden:
                continue
            if not member.isfile():
                yield member.name, BadItem("", "a link or a device in an archive")
            elif _split(member.name)[1] not in wanted:
                yield member.name, b""
            elif member.size > MAX_MEMBER:
                yield member.name, BadItem("", f"a file of more than {MAX_MEMBER >> 20} MiB")
            else:
                content = archive.extractfile(member)
                yield member.name, content.read() if content else b""


def _split(name: str) -> tuple[str, str]:
    """Return what the files of an example share, and what they differ in.

    >>> _split("a.b/0017.left.JPG")
    ('a.b/0017', 'left.jpg')
    """
    folder, _, last = name.rpartition("/")
    base, _, ending = last.partition(".")
    return f"{folder}/{base}" if folder else base, ending.lower()


def _parts(example: Example) -> list[str]:
    """Return the endings of an example, and the fields inside its JSON as ``json.caption``."""
    found = []
    for ending, content in example.items():
        inside: Any = None
        if ending == "json" and isinstance(content, bytes):
            try:
                inside = parse_json(content)
            except ValueError:
                inside = None  # reading will say so
        found += [f"json.{n}" for n in inside] if isinstance(inside, dict) else [ending]
    return found


def _mapping(
    seen: list[str], options: ReadOptions, location: str, reason: str
) -> dict[str, list[str]]:
    """Return where pictures and words may stand in an example, best first.

    Raises:
        ValueError: where there are no words, or not what the user named.
    """
    mapping: dict[str, list[str]] = {}
    usual = {"image": _PICTURES, "text": (*WORDS, *(f"json.{n}" for n in IN_JSON))}
    for ours, theirs in usual.items():
        named = options.columns.get(ours)
        if named is None:
            mapping[ours] = list(theirs)
            continue
        mapping[ours] = [n for n in (named.lower(), f"json.{named}", named) if n in seen][:1]
        if not mapping[ours]:
            raise ValueError(
                f"expected {named!r} in the examples of {location}; got "
                f"{', '.join(seen)[:500] or 'none'}.{reason}"
            )
    if not set(mapping["text"]) & set(seen):
        raise ValueError(
            f"expected words ({', '.join(usual['text'])}) in the examples of {location}; got "
            f"{', '.join(seen)[:500] or 'none'}. Say which they are: --columns text=NAME.{reason}"
        )
    return mapping


def _read(
    paths: list[str], wanted: set[str], mapping: dict[str, list[str]], options: ReadOptions
) -> Iterator[dict[str, Any] | BadItem]:
    for where, example in _examples(paths, wanted):
        if isinstance(example, BadItem):
            yield example
            continue
        try:
            yield _record(example, mapping, options)
        except ValueError as error:
            yield BadItem(where, str(error))


def _record(
    example: Example, mapping: dict[str, list[str]], options: ReadOptions
) -> dict[str, Any]:
    for content in example.values():
        if isinstance(content, BadItem):
            raise ValueError(content.reason)
    text = _words(example, mapping["text"])
    shown = [n for n in mapping["image"] if n in example]
    if not shown:
        return {"kind": "document", "text": text}
    content = example[shown[0]]
    assert isinstance(content, bytes)
    return {"kind": "caption", "image": read_picture(content, options), "text": text}


def _words(example: Example, names: list[str]) -> str:
    inside: Any = None
    for name in names:
        if name.startswith("json.") and "json" in example:
            content = example["json"]
            assert isinstance(content, bytes)
            inside = checked_fields(parse_json(content)) if inside is None else inside
            if inside.get(name[5:]) is not None:
                return checked_text(inside[name[5:]], name).strip()
        elif name in example:
            content = example[name]
            assert isinstance(content, bytes)
            return checked_text(decoded(content), name).strip()
    raise ValueError(f"an example without words ({', '.join(names)})")
