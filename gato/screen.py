"""What a terminal shows and keeps of a conversation: small pictures, and a history of lines.

A picture is drawn in half blocks, two pixels to a character, where the terminal has colours.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import numpy as np

from gato.envs.remote import cache_folder

COLUMNS, ROWS = 40, 32
"""Pixels of a picture in the terminal, at most; it takes half as many lines."""
LINES = 1000
"""Of the history."""


def show_picture(picture: np.ndarray, out: TextIO) -> None:
    """Draw a picture, uint8 (H, W, 3), where `out` is a terminal with colours."""
    from rich.console import Console

    console = Console(file=out, highlight=False)
    if not console.is_terminal or console.color_system in (None, "standard"):
        return
    from PIL import Image
    from rich.color import Color
    from rich.style import Style
    from rich.text import Text

    height, width = picture.shape[:2]
    scale = min(1.0, min(COLUMNS, console.width) / width, ROWS / height)
    size = max(1, round(width * scale)), max(2, round(height * scale / 2) * 2)
    small = np.asarray(Image.fromarray(np.ascontiguousarray(picture)).resize(size))
    for upper, lower in zip(small[::2].tolist(), small[1::2].tolist(), strict=True):
        line = Text()
        for above, below in zip(upper, lower, strict=True):
            line.append("▀", Style(color=Color.from_rgb(*above), bgcolor=Color.from_rgb(*below)))
        console.print(line)


@contextlib.contextmanager
def history() -> Iterator[None]:
    """Let lines be edited and called back, also those of other times where they can be kept.

    They lie in the cache's folder, for its owner's eyes only; where nothing can be written there,
    or the system has no readline, there is no history.
    """
    try:
        import readline
    except ImportError:
        yield
        return
    import sys

    file = cache_folder() / "chat-history"
    if not sys.stdin.isatty():  # a script's lines are nobody's history
        yield
        return
    with contextlib.suppress(OSError):
        readline.read_history_file(file)
    readline.set_history_length(LINES)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            _private(file)
            readline.write_history_file(file)


def _private(file: Path) -> None:
    """Make a file that others cannot read, if there is none."""
    file.parent.mkdir(parents=True, exist_ok=True)
    os.close(os.open(file, os.O_WRONLY | os.O_CREAT, 0o600))
