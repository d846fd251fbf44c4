"""A conversation in the terminal, and images read from files."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

MAX_PATCHES = 64
"""Larger images are shrunk to as many 16 x 16 patches, so that they leave room for words."""

HELP = "/image FILE shows an image, /reset begins anew, /quit (or Ctrl-D) ends"


def read_image(path: Path) -> np.ndarray:
    """Return an image file as uint8 (H, W, 3), shrunk where it has too many patches.

    Raises:
        ValueError: for a file that is missing or not an image.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as opened:
            picture = opened.convert("RGB")
    except UnidentifiedImageError as error:
        raise ValueError(f"expected an image at {path}; its format is not known.") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"expected an image at {path}; it cannot be read ({error}).") from error
    width, height = picture.size
    if math.ceil(width / 16) * math.ceil(height / 16) > MAX_PATCHES:
        scale = (MAX_PATCHES * 256 / (width * height)) ** 0.5
        most = 16 * MAX_PATCHES
        width, height = (min(most, max(16, int(n * scale) // 16 * 16)) for n in (width, height))
        longest = 16 * (MAX_PATCHES // (min(width, height) // 16))
        width, height = min(width, longest), min(height, longest)
        picture = picture.resize((width, height), Image.Resampling.BOX)
    return np.asarray(picture, np.uint8)


def message(text: str, image: np.ndarray | None) -> dict[str, Any]:
    """Return a user's message, its image (if any) before its text."""
    content: list[dict[str, Any]] = [] if image is None else [{"type": "image", "image": image}]
    return {"role": "user", "content": [*content, {"type": "text", "text": text}]}


def answer(
    agent: Any,
    prompt: str,
    image: np.ndarray | None,
    sampling: Mapping[str, Any],
    *,
    stream: bool,
) -> str:
    """Return the agent's answer to one message, printed as it comes where `stream` is set."""
    return _reply(agent, [message(prompt, image)], sampling, stream)


def _reply(
    agent: Any, messages: list[dict[str, Any]], sampling: Mapping[str, Any], stream: bool
) -> str:
    if not stream:
        return str(agent.chat(messages, **sampling))
    said = []
    for piece in agent.chat_stream(messages, **sampling):
        print(piece, end="", flush=True)
        said.append(piece)
    print()
    return "".join(said)


def converse(agent: Any, image: np.ndarray | None, sampling: Mapping[str, Any]) -> None:
    """Talk until the input ends; an error of one line does not end the conversation."""
    messages: list[dict[str, Any]] = []
    print(HELP)
    while (line := _line()) is not None:
        command, _, rest = line.strip().partition(" ")
        match command:
            case "":
                continue
            case "/quit":
                return
            case "/reset":
                messages, image = [], None
                continue
        try:
            if command == "/image":
                image = read_image(Path(rest.strip()))
                continue
            if command.startswith("/"):
                raise ValueError(f"{command} is no command: {HELP}")
            turn = [*messages, message(line.strip(), image)]
            said = _reply(agent, turn, sampling, stream=True)
        except ValueError as error:
            print(error, file=sys.stderr)
            continue
        content = [{"type": "text", "text": said}]
        messages, image = [*turn, {"role": "assistant", "content": content}], None


def _line() -> str | None:
    try:
        return input("> ")
    except EOFError:
        print()
        return None
