"""JSON that nobody has checked, one value in memory at a time, however large the file.

A line or a value that cannot be read is a `BadItem` where reading can go on behind it, and the
last thing that is yielded where it cannot.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from gato.envs.readers.reader import BadItem
from gato.envs.readers.untrusted import READ_ERRORS, decoded, open_bytes, plain_suffix

LINES = (".jsonl", ".ndjson")
SUFFIXES = (*LINES, ".json")
MAX_VALUE = 64 << 20
"""Bytes of one line or one value; a picture as a data URI has to fit."""
_CHUNK = 1 << 20


def json_items(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield (where, value) of a file of JSON lines, or of a JSON list; a BadItem as value."""
    if plain_suffix(path) in LINES:
        yield from json_lines(path)
        return
    number = 0
    try:
        for key, value in json_values(path):
            if key:
                yield str(path), BadItem(str(path), "expected a list of objects; got an object")
                return
            yield f"{path}, item {number}", value
            number += 1
    except (ValueError, *READ_ERRORS) as error:
        where = f"{path}, item {number}"
        yield where, BadItem(where, f"nothing from here on can be read: {error}")


def json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield (``file:line``, value) of a file of JSON lines; a BadItem as value."""
    for where, line in _lines(path):
        if isinstance(line, BadItem):
            yield where, line
            continue
        try:
            yield where, parse_json(line)
        except ValueError as error:
            yield where, BadItem(where, str(error))


def json_values(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield (key, value) of what a JSON file holds.

    Of a list, every item under the key ""; of an object, every field under its name, and where a
    field is a list, every item of it under that name.

    Raises:
        ValueError: for a file that is no JSON, at the place where it stops being that.
    """
    with open_bytes(path) as file:
        text = _Text(file, path)
        match text.skip():
            case "[":
                yield from (("", value) for value in text.items())
            case "{":
                for key in text.fields():
                    if text.skip() == "[":
                        yield from ((key, value) for value in text.items())
                    else:
                        yield key, text.value()
            case _:
                yield "", text.value()
        if text.skip():
            raise text.error("more follows the JSON value")


def first_value(path: Path) -> tuple[str, Any]:
    """Return the first value of a file with its key, as `json_values` and `json_lines` give it.

    A file that holds none, or cannot be read, gives ("", None).
    """
    try:
        if plain_suffix(path) in LINES:
            return "", next(json_lines(path))[1]
        return next(json_values(path))
    except (StopIteration, ValueError, *READ_ERRORS):
        return "", None


def parse_json(raw: bytes) -> Any:
    """Return the value in `raw`; raises ValueError, also for one nested too deep."""
    text = decoded(raw)
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("JSON nested too deep") from None
    except ValueError as error:
        raise ValueError(f"broken JSON: {getattr(error, 'msg', error)}") from error


def _lines(path: Path) -> Iterator[tuple[str, bytes | BadItem]]:
    """Yield the lines that are not blank."""
    number = 0
    try:
        with open_bytes(path) as file:
            while line := file.readline(MAX_VALUE + 1):
                number += 1
                where, long = f"{path}:{number}", len(line) > MAX_VALUE
                while long and line and not line.endswith(b"\n"):
                    line = file.readline(MAX_VALUE)
                if long:
                    yield where, BadItem(where, f"a line of more than {MAX_VALUE >> 20} MiB")
                elif line.strip():
                    yield where, line
    except READ_ERRORS as error:
        where = f"{path}:{number + 1}"
        yield where, BadItem(where, f"nothing from here on can be read: {error}")


class _Text:
    """A text read a chunk at a time, and the place in it."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self.file, self.path, self.buffer, self.at, self.passed = file, path, "", 0, 0
        self.codec = codecs.getincrementaldecoder("utf-8-sig")()
        self.json, self.ended = json.JSONDecoder(), False

    def error(self, reason: str) -> ValueError:
        return ValueError(f"{self.path}, character {self.passed + self.at}: broken JSON: {reason}")

    def more(self, size: int = _CHUNK) -> bool:
        """Read on; return whether there may be more."""
        if self.ended:
            return False
        try:
            raw = self.file.read(size)
            added = self.codec.decode(raw, final=not raw)
        except UnicodeDecodeError as error:
            raise self.error(f"expected UTF-8; {error.reason}") from error
        except READ_ERRORS as error:
            raise self.error(str(error)) from error
        self.passed += self.at
        self.buffer, self.at, self.ended = self.buffer[self.at :] + added, 0, not raw
        return True

    def skip(self, wanted: str = "") -> str:
        """Go past blanks and, where it must stand there, `wanted`; return what stands there."""
        while True:
            while self.at < len(self.buffer) and self.buffer[self.at] in " \t\r\n":
                self.at += 1
            if self.at < len(self.buffer) or not self.more():
                break
        found = self.buffer[self.at : self.at + 1]
        if wanted and found != wanted:
            raise self.error(f"expected {wanted!r}; got {found or 'the end'!r}")
        self.at += bool(wanted)
        return found

    def value(self) -> Any:
        """Return the value that begins here."""
        self.skip()
        size = _CHUNK
        while True:
            reason = ""
            try:
                value, end = self.json.raw_decode(self.buffer, self.at)
                if end + 2 < len(self.buffer) or self.ended:  # 1 might go on as 1.5 or 1e+5
                    self.at = end
                    return value
            except RecursionError:
                raise self.error("nested too deep") from None
            except ValueError as error:
                reason = str(getattr(error, "msg", error))
            if len(self.buffer) - self.at > MAX_VALUE:
                raise self.error(reason or f"a value of more than {MAX_VALUE >> 20} MiB")
            if not self.more(size) and reason:
                raise self.error(reason)
            size *= 2  # so that what is parsed again stays below what is parsed

    def items(self) -> Iterator[Any]:
        """Yield the items of the list that begins here."""
        self.skip("[")
        if self.skip() != "]":
            yield self.value()
            while self.skip() != "]":
                self.skip(",")
                yield self.value()
        self.skip("]")

    def fields(self) -> Iterator[str]:
        """Yield the names of the object that begins here; its values are to be read in between."""
        self.skip("{")
        while self.skip() != "}":
            if self.skip() != '"':
                raise self.error("expected a name in quotes")
            key = self.value()
            self.skip(":")
            yield key
            if self.skip() != "}":
                self.skip(",")
        self.skip("}")
