"""Messages as OpenAI writes them, pictures as data URIs, to ours and back; pictures of any size.

    ours      {"type": "image", "image": uint8 (H, W, 3)}
    theirs    {"type": "image_url", "image_url": {"url": "data:image/png;base64,..."}}

Nothing but a data URI is ever read as a picture: no path, no address.
"""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gato.envs.readers.pictures import open_image
from gato.envs.readers.reader import LONGEST, PATCH, fit_image
from gato.rollouts.conversation import Message

MAX_PATCHES = (LONGEST // PATCH) ** 2
"""Of a picture, so that it leaves room for words."""


def fitting(picture: np.ndarray) -> np.ndarray:
    """Return a picture of any size, uint8 (H, W, 3), as the model reads it.

    It is brought to the size that it has in records, and so was trained on: what is said about a
    file in a chat is what is said about it in an evaluation.
    """
    return np.asarray(fit_image(picture))


def to_openai(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Return messages in OpenAI's form; content that is words alone is one string."""
    return [{"role": m["role"], "content": _theirs(m["content"])} for m in messages]


def from_openai(messages: Any) -> list[Message]:
    """Return messages of OpenAI's form as ours; roles and their order are not looked at.

    Raises:
        ValueError: saying what is expected, for what is no list of messages of words and pictures.
    """
    if not isinstance(messages, list):
        raise ValueError(f"expected a list of messages; got {type(messages).__name__}")
    found = []
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise ValueError(f"a message has a role and content; got {message!r:.100}")
        content = message["content"]
        if not isinstance(content, str | list):
            raise ValueError(
                f"the content of message {number} must be text or a list of parts; got "
                f"{type(content).__name__}"
            )
        if isinstance(content, list):
            content = [_part(part, number) for part in content]
        found.append({"role": message["role"], "content": content})
    return found


def data_uri(picture: np.ndarray) -> str:
    """Return a picture as a data URI of a PNG, which keeps every pixel."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(picture)).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def picture_of(uri: Any) -> np.ndarray:
    """Return the picture of a data URI as the model reads it.

    Raises:
        ValueError: for any other address, and for what is no picture.
    """
    if not isinstance(uri, str):
        raise ValueError(f"expected a picture as a data URI; got {type(uri).__name__}")
    head, comma, body = uri.partition(",")
    head = head.lower()
    if not comma or not head.startswith("data:image/") or not head.endswith(";base64"):
        raise ValueError(
            f"expected a picture as a data URI, data:image/png;base64,...; got {uri!r:.60}. "
            f"Pictures at addresses and in files are not fetched."
        )
    try:
        return fitting(open_image(base64.b64decode(body, validate=True)))
    except binascii.Error as error:
        raise ValueError(f"expected a data URI in base64; {error}") from error


def _theirs(content: Any) -> Any:
    if isinstance(content, str):
        return content
    if all(part["type"] == "text" for part in content):
        return "".join(part["text"] for part in content)
    return [
        {"type": "image_url", "image_url": {"url": data_uri(part["image"])}}
        if part["type"] == "image"
        else {"type": "text", "text": part["text"]}
        for part in content
    ]


def _part(part: Any, number: int) -> Mapping[str, Any]:
    match part:
        case {"type": "text", "text": str(text)}:
            return {"type": "text", "text": text}
        case {"type": "image_url", "image_url": {"url": uri}}:
            return {"type": "image", "image": picture_of(uri)}
    raise ValueError(f"a part of message {number} must be a text or an image_url; got {part!r:.60}")
