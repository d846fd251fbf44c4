"""Texts: plain files, JSON lines, JSON lists and Parquet tables, each text one document.

A plain file is one document, or several between the lines ``<|endoftext|>``. A text of more than
65,536 characters becomes several documents, cut behind a blank line, else a line, else a word:
a run draws a window of a document, and long ones would be cut into tokens whole each time. What was
one text has one ``meta["group"]``, so that it is held out for validation together.
"""

from __future__ import annotations

import codecs
import hashlib
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from gato.envs.readers import arrow, json_stream
from gato.envs.readers.json_stream import json_items
from gato.envs.readers.reader import BadItem, ReadOptions, Source
from gato.envs.readers.untrusted import (
    READ_ERRORS,
    below,
    check_options,
    checked_fields,
    checked_text,
    each,
    files,
    open_bytes,
    plain_suffix,
    refuse_utf_16,
    size_of,
)

FORMAT = "text"
EXTRA = "readers"
IGNORES = ("image_size", "clip_actions")
PLAIN = (".txt", ".text", ".md", ".rst")
PARQUET = (".parquet",)
TABLES = (*json_stream.SUFFIXES, *PARQUET)
LONGEST = 65_536
SEPARATOR = "<|endoftext|>"
_SMALL = 16 << 20  # bytes that are read once more to count documents


def recognises(location: str) -> bool:
    """Return whether there are files of text; asked last, as many a folder has a README."""
    return bool(files(location, (*PLAIN, *TABLES), glance=True))


def open_source(location: str, options: ReadOptions) -> Source:
    """Return the documents of a file, or of a folder and all below it.

    Where a folder has tables (JSON, Parquet), the plain files beside them are left out.
    """
    check_options(options, FORMAT, ("text",), splits=False)
    tables, plain = files(location, TABLES), files(location, PLAIN)
    paths = tables or plain
    if not paths and Path(location).is_file():
        paths = [Path(location)]  # whatever it is called: --format text says what it is
    if not paths:
        raise ValueError(f"expected files {', '.join((*PLAIN, *TABLES))} at {location}; got none.")
    field = options.columns.get("text", "text")
    fields = _fields(paths[0], field)
    counts: Counter[str] = Counter()
    read = partial(_read, Path(location), paths, field, counts)
    kinds = Counter(plain_suffix(p) or p.name for p in paths)
    notes = ["files: " + ", ".join(f"{n} {kind}" for kind, n in sorted(kinds.items()))]
    if tables and plain:
        notes.append(f"plain files beside tables, left out: {len(plain)}")
    items = sum(not isinstance(i, BadItem) for i in read()) if size_of(paths) <= _SMALL else None
    counts.clear()
    return Source(
        FORMAT, location, "records", read, items=items, fields=fields, notes=notes, counts=counts
    )


def _fields(path: Path, field: str) -> dict[str, str]:
    """Return the first file's fields and what becomes of them; raises where it has no text."""
    if plain_suffix(path) in PARQUET:
        names = arrow.column_names(path)
    elif plain_suffix(path) in json_stream.SUFFIXES:
        first = next((v for _, v in json_items(path) if isinstance(v, dict)), None)
        if first is None:
            return {}  # reading will say what is there instead
        names = list(first)
    else:
        return {"(file)": "document"}
    if field not in names:
        raise ValueError(
            f"expected a field {field!r} in {path}; got {', '.join(names)[:500]}. "
            f"Say which is the text: --columns text=NAME."
        )
    return {name: "document" if name == field else "left out" for name in names}


def _read(location: Path, paths: list[Path], field: str, counts: Counter[str]) -> Iterator[Any]:
    def rows(value: Any) -> Iterator[dict[str, Any]]:
        yield from documents(checked_text(checked_fields(value, field)[field], field), counts)

    for path in paths:
        if location.is_dir():
            try:
                below(location, str(path.relative_to(location)), "the file")
            except ValueError as error:
                yield BadItem(str(path), str(error))
                continue
        if plain_suffix(path) in PARQUET:
            yield from each(arrow.values(path, [field]), rows)
        elif plain_suffix(path) in json_stream.SUFFIXES:
            yield from each(json_items(path), rows)
        else:
            called = path.relative_to(location).as_posix() if path != location else path.name
            yield from each(_plain_texts(path, called, counts), partial(_plain, counts))


def _plain(counts: Counter[str], told: tuple[str, str]) -> Iterator[dict[str, Any]]:
    text, group = told
    yield from documents(checked_text(text, "(file)"), counts, group)


def documents(
    text: str, counts: Counter[str] | None = None, group: str = ""
) -> Iterator[dict[str, Any]]:
    """Yield a text as one document, or as several where it is long.

    Args:
        text: the whole text, or what is at hand of it.
        counts: where the cuts are counted.
        group: of the whole text, where this is a piece of it.
    """
    if len(text) > LONGEST and not group:
        group = hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:16]
    meta = {"meta": {"group": group}} if group else {}
    for number, piece in enumerate(_pieces(text)):
        if number and counts is not None:
            counts["cuts of long texts"] += 1
        yield {"kind": "document", "text": piece, **meta}


def _plain_texts(path: Path, called: str, counts: Counter[str]) -> Iterator[tuple[str, Any]]:
    """Yield the texts of a plain file and their groups; of a long text, what is at hand of it."""
    codec, buffer, found = codecs.getincrementaldecoder("utf-8-sig")(), "", 0
    where, number, group = str(path), 0, ""  # of the text that the buffer begins with
    try:
        with open_bytes(path) as file:
            raw = file.read(LONGEST)
            refuse_utf_16(raw)
            while raw:
                *texts, buffer = (buffer + codec.decode(raw)).split(SEPARATOR)
                whole = [(text, "" if i else group) for i, text in enumerate(texts)]
                number, group = number + len(texts), "" if texts else group
                # a separator that the chunk cuts in two lies behind what is taken here
                while len(buffer) > 2 * LONGEST:
                    stop = _cut(buffer)
                    group = f"{called}, text {number}"
                    whole.append((buffer[:stop], group))
                    buffer = buffer[stop:]
                    counts["cuts of long texts"] += 1
                for text, of in whole:
                    if text.strip():
                        found += 1
                        yield where, (text.strip(), of)
                raw = file.read(LONGEST)
            buffer += codec.decode(b"", final=True)
    except UnicodeDecodeError as error:
        yield where, BadItem(where, f"expected UTF-8 to the end; {error.reason}")
    except (ValueError, *READ_ERRORS) as error:
        yield where, BadItem(where, str(error))
    else:
        if buffer.strip():
            yield where, (buffer.strip(), group)
        elif not found:
            yield where, BadItem(where, "an empty file")


def _pieces(text: str) -> Iterator[str]:
    while len(text) > LONGEST:
        stop = _cut(text)
        if text[:stop].strip():
            yield text[:stop].strip()
        text = text[stop:]
    if text.strip():
        yield text


def _cut(text: str) -> int:
    """Return where to cut a text: behind a blank line, a line or a word, if not too far back."""
    for mark in ("\n\n", "\n", " "):
        at = text.rfind(mark, LONGEST // 2, LONGEST)
        if at > 0:
            return at + len(mark)
    return LONGEST
