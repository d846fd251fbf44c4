"""Conversations in the form of OpenAI's messages, as JSON lines or a JSON list.

    {"messages": [{"role": "system" | "user" | "assistant", "content": str | [part, ...]}, ...]}
    part    {"type": "text", "text": str} | {"type": "image_url", "image_url": {"url": str}}

A picture is a ``data:`` URI, or a file below the folder that holds the JSON; nothing is fetched.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from gato.envs.readers import json_stream
from gato.envs.readers.json_stream import first_value, json_items
from gato.envs.readers.pictures import note, read_picture
from gato.envs.readers.reader import BadItem, ReadOptions, Source
from gato.envs.readers.untrusted import (
    below,
    check_options,
    checked_fields,
    checked_text,
    each,
    files,
    size_of,
)
from gato.envs.records import ROLES

FORMAT = "chat"
EXTRA = ""
IGNORES = ("clip_actions",)
BESIDE = True
_NOT_WORDS = ("tool_calls", "function_call", "audio", "refusal")
_SMALL = 16 << 20


def recognises(location: str) -> bool:
    """Return whether the first JSON object of a file, or of a folder's first, has messages."""
    found = files(location, json_stream.SUFFIXES, glance=True)
    first = first_value(found[0])[1] if found else None
    return isinstance(first, dict) and isinstance(first.get("messages"), list)


def open_source(location: str, options: ReadOptions) -> Source:
    """Return the conversations of a file, or of all files in a folder and below it."""
    check_options(options, FORMAT, ("messages",), splits=False)
    paths = files(location, json_stream.SUFFIXES)
    if not paths:
        raise ValueError(
            f"expected files {', '.join(json_stream.SUFFIXES)} at {location}; got none."
        )
    field = options.columns.get("messages", "messages")
    first = first_value(paths[0])[1]
    if isinstance(first, dict) and field not in first:
        raise ValueError(
            f"expected a field {field!r} in {paths[0]}; got {', '.join(first)[:500]}. "
            f"Say which holds the messages: --columns messages=NAME."
        )
    names = list(first) if isinstance(first, dict) else [field]
    fields = {n: "conversation" if n == field else "left out" for n in names}
    read = partial(_read, paths, field, options)
    notes = [f"files: {len(paths)}", note(options)]
    return Source(
        FORMAT, location, "records", read, items=_count(paths), fields=fields, notes=notes
    )


def conversation(
    messages: Any, picture: Callable[[Mapping[str, Any]], Any]
) -> Iterator[dict[str, Any]]:
    """Yield the record of a list of messages.

    Args:
        messages: what the data hold.
        picture: returns the picture that a part of a message stands for.

    Raises:
        ValueError: for what a conversation of ours cannot hold, naming the field.
    """
    if not isinstance(messages, list) or not messages:
        raise ValueError("expected a list of messages")
    made = []
    for message in messages:
        role = checked_fields(message, "role", "content")["role"]
        if role not in ROLES:
            raise ValueError(f"expected a role of {', '.join(ROLES)}; got {str(role)[:50]!r}")
        for name in _NOT_WORDS:
            if message.get(name):
                raise ValueError(f"a message with {name!r} is more than text and pictures")
        if message.get("weight") == 0:
            raise ValueError("a message with 'weight' 0 is not to be learnt; every answer is")
        content = [_part(part, picture) for part in _parts(message["content"])]
        made.append({"role": role, "content": content})
    if all(m["role"] != "assistant" for m in made):
        raise ValueError("no message of the assistant: there is nothing to learn")
    yield {"kind": "conversation", "messages": made}


def picture_at(url: Any, folder: Path | None, options: ReadOptions) -> Any:
    """Return the picture of a ``data:`` URI, or of a file below `folder` where there is one.

    Raises:
        ValueError: for any other address, and for what is no picture.
    """
    if not isinstance(url, str):
        raise ValueError(f"expected a picture's address; got {type(url).__name__}")
    scheme = url.split(":", 1)[0].lower() if ":" in url[:20] else ""
    if scheme == "data":
        head, comma, body = url.partition(",")
        if not comma or not head.lower().endswith(";base64"):
            raise ValueError("expected a data URI in base64")
        try:
            return read_picture(base64.b64decode(body, validate=True), options)
        except binascii.Error as error:
            raise ValueError(f"expected a data URI in base64; {error}") from error
    if folder is None or "://" in url or scheme in ("http", "https", "file", "ftp"):
        raise ValueError(
            "expected a data URI, or a file beside the data; got another address, and pictures "
            "are not fetched"
        )
    return read_picture(below(folder, url), options)


def _parts(content: Any) -> list[Any]:
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise ValueError(f"expected text or parts as 'content'; got {type(content).__name__}")
    return content


def _part(part: Any, picture: Callable[[Mapping[str, Any]], Any]) -> dict[str, Any]:
    kind = checked_fields(part, "type")["type"]
    if kind == "text":
        return {"type": "text", "text": checked_text(part.get("text"), "text")}
    if kind in ("image_url", "image"):
        return {"type": "image", "image": picture(part)}
    raise ValueError(f"expected a part of type text or image_url; got {str(kind)[:50]!r}")


def _read(paths: list[Path], field: str, options: ReadOptions) -> Iterator[Any]:
    for path in paths:

        def picture(part: Mapping[str, Any], folder: Path = path.parent) -> Any:
            url = part.get("image_url")
            return picture_at(url.get("url") if isinstance(url, dict) else url, folder, options)

        def record(value: Any, picture: Any = picture) -> Iterator[dict[str, Any]]:
            yield from conversation(checked_fields(value, field)[field], picture)

        yield from each(json_items(path), record)


def _count(paths: list[Path]) -> int | None:
    """Return how many values there are that can be parsed, where that is quickly found."""
    if size_of(paths) > _SMALL:
        return None
    return sum(not isinstance(v, BadItem) for path in paths for _, v in json_items(path))
