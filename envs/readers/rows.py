"""What the rows of a table become, by its columns; ``--columns`` says it where names differ.

    messages [+ images]         a conversation; parts of type image stand for the images in turn
    image + question + answer   a question about a picture
    image + text                a caption, or one for each of several texts; a label is its name
    text                        a document

Columns are described as the features of Hugging Face's `datasets`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from gato.envs.readers import chat, vqa
from gato.envs.readers.pictures import MAX_BYTES, read_picture
from gato.envs.readers.reader import ReadOptions
from gato.envs.readers.text import documents
from gato.envs.readers.untrusted import below, checked_text

OURS = ("messages", "images", "image", "question", "answer", "text")
TEXTS = ("text", "caption", "captions", "sentence", "sentences")
ANSWERS = ("answer", "answers", "multiple_choice_answer")
Make = Callable[[Mapping[str, Any]], Iterable[Mapping[str, Any]]]


def plan(
    features: Mapping[str, Any],
    options: ReadOptions,
    folder: Path | None,
    location: str,
    hub: str = "",
) -> tuple[dict[str, str], Make]:
    """Return which columns become what, and the function from a row to its records.

    Args:
        features: by column; pictures come undecoded, as bytes or {"bytes": ..., "path": ...}.
        options: how columns are called, and how large pictures are to be.
        folder: of the data, where pictures that are files must lie below it; None on a hub.
        location: for messages.
        hub: ``owner/name`` of the data set on a hub; pictures that are files must be its own.

    Raises:
        ValueError: where no rule fits the columns, naming them.
    """
    said = ", ".join(f"{n} ({_kind(f)})" for n, f in features.items())[:800]
    for ours, theirs in options.columns.items():
        if theirs not in features:
            raise ValueError(f"expected a column {theirs!r} for {ours} at {location}; got {said}.")

    def find(ours: str, fits: Callable[[Any], bool], *names: str) -> str:
        if ours in options.columns:
            return options.columns[ours]
        return next((n for n in (ours, *names) if n in features and fits(features[n])), "")

    picture = partial(_picture, folder=folder, hub=hub, options=options)
    messages = find("messages", is_list)
    shown = find("image", _is_picture) or _only(features, _is_picture)
    if messages:
        several = find("images", is_list) or shown
        fields = {messages: "messages"} | ({several: "images"} if several else {})
        talk = partial(_conversation, messages, several, picture, folder, options)
        return fields, talk
    question, answer = find("question", _is_words), find("answer", _is_words, *ANSWERS)
    if shown and question and answer:
        fields = {shown: "image", question: "question", answer: "answer"}

        def asked(row: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
            yield vqa.conversation(picture(row[shown]), row[question], row[answer])

        return fields, asked
    text = find("text", _is_words, *TEXTS) or _only(features, _is_words)
    text = text or (_only(features, _is_label) if shown else "")
    if not text:
        raise ValueError(
            f"expected a column of text, or of messages, at {location}; got {said}. "
            f"Say which it is: --columns text=NAME."
        )
    words = partial(_words, text, features[text])
    if shown:
        return {shown: "image", text: "text"}, partial(_captions, shown, words, picture)
    return {text: "text"}, lambda row: (d for t in words(row) for d in documents(t))


def _conversation(
    messages: str,
    images: str,
    picture: Callable[[Any], Any],
    folder: Path | None,
    options: ReadOptions,
    row: Mapping[str, Any],
) -> Iterator[dict[str, Any]]:
    held = row[images] if images else []
    waiting = list(held if isinstance(held, list) else [held] if held is not None else [])

    def shown(part: Mapping[str, Any]) -> Any:
        url = part.get("image_url")
        if url is not None:
            url = url.get("url") if isinstance(url, dict) else url
            return chat.picture_at(url, folder, options)
        if not waiting:
            raise ValueError(f"more places for pictures in {messages!r} than pictures")
        return picture(waiting.pop(0))

    whole = list(chat.conversation(row[messages], shown))
    if waiting:
        raise ValueError(f"fewer places for pictures in {messages!r} than pictures in {images!r}")
    yield from whole


def _captions(
    image: str,
    words: Callable[[Mapping[str, Any]], list[str]],
    picture: Callable[[Any], Any],
    row: Mapping[str, Any],
) -> Iterator[dict[str, Any]]:
    texts, shown = words(row), picture(row[image])
    for text in texts:
        yield {"kind": "caption", "image": shown, "text": text.strip()}


def _words(name: str, feature: Any, row: Mapping[str, Any]) -> list[str]:
    value = row[name]
    if _is_label(feature) and isinstance(value, int):
        if not 0 <= value < feature.num_classes:  # the hub writes -1 where there is none
            raise ValueError(f"expected a class of {feature.num_classes} as {name!r}")
        value = feature.int2str(value)
    texts = value if isinstance(value, list) else [value]
    if not texts:
        raise ValueError(f"expected text as {name!r}; got none")
    return [checked_text(text, name) for text in texts]


def _picture(cell: Any, *, folder: Path | None, hub: str, options: ReadOptions) -> Any:
    """Return the picture of a cell: bytes, or a file of the data set."""
    content = cell.get("bytes") if isinstance(cell, dict) else cell
    path = cell.get("path") if isinstance(cell, dict) else None
    if isinstance(content, bytes):
        return read_picture(content, options)
    if isinstance(path, str) and folder is not None:
        return read_picture(below(folder, path), options)
    if isinstance(path, str) and hub:
        return read_picture(_fetched(path, hub), options)
    raise ValueError("no picture")


def _fetched(path: str, hub: str) -> bytes:
    """Return a file of a data set on the hub, or a member of an archive there.

    A data set says itself which files it names, and what opens them knows chains of addresses that
    lead to any host and to the files of this machine: only the data set's own are asked for.

    Raises:
        ValueError: for any other address, and for what cannot be fetched.
    """
    *archive, file = path.split("::")
    named = re.fullmatch(r"hf://datasets/([\w.-]+(?:/[\w.-]+)?)(?:@[\w.~%-]+)?/(.+)", file)
    own = re.fullmatch(rf"hf://datasets/{re.escape(hub)}(?:@[\w.~%-]+)?/([^?#\\]+)", file, re.I)
    inside = archive == [] or (len(archive) == 1 and archive[0].startswith("zip://"))
    if not own or not inside or {"..", ".", ""} & set(own[1].split("/")):
        hint = f"; if that is its name, open hf:{named[1]}" if named and "/" not in hub else ""
        raise ValueError(f"expected a picture of {hub} itself as a file; got {path!r:.200}{hint}")
    import fsspec

    try:
        with fsspec.open(path, "rb") as opened:
            return bytes(opened.read(MAX_BYTES + 1))
    except Exception as error:  # the network and damaged archives end it in every way there is
        told = str(error) or type(error).__name__
        raise ValueError(f"a picture that cannot be fetched: {told:.200}") from error


def _only(features: Mapping[str, Any], fits: Callable[[Any], bool]) -> str:
    """Return the one column that fits; "" where there is none or more."""
    found = [name for name, feature in features.items() if fits(feature)]
    return found[0] if len(found) == 1 else ""


def _is_picture(feature: Any) -> bool:
    return (
        _kind(feature) == "Image"
        or getattr(feature, "dtype", "") in ("binary", "large_binary")
        or (isinstance(feature, dict) and "bytes" in feature)
    )


def _is_words(feature: Any) -> bool:
    item = _item(feature) if is_list(feature) else feature
    return getattr(item, "dtype", "") in ("string", "large_string")


def _is_label(feature: Any) -> bool:
    return _kind(feature) == "ClassLabel"


def is_list(feature: Any) -> bool:
    """Return whether a column holds several values in each row."""
    return isinstance(feature, list) or _kind(feature) in ("List", "LargeList", "Sequence")


def _item(feature: Any) -> Any:
    return feature[0] if isinstance(feature, list) else feature.feature


def _kind(feature: Any) -> str:
    name = type(feature).__name__
    return str(getattr(feature, "dtype", name)) if name == "Value" else name
