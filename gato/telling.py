"""What a run says on stderr and stdout: that nobody reads it any more neither stops nor fails it.

Ctrl-C on ``gato train ... 2>&1 | tee log`` ends tee too: whatever is said from then on meets a
broken pipe, and what is to be said last is that everything was saved. Nor does a terminal obey what
is said: models write anything, and files have any name.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import select
import sys
from collections.abc import Iterator
from typing import Any, TextIO

_CONTROL = {
    **{code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"},
    0x7F: 0x2421,
    **dict.fromkeys(range(0x80, 0xA0), 0xFFFD),
}
"""What a terminal would obey, and the sign that is shown in its place."""


def printable(text: str) -> str:
    r"""Return a text without what a terminal would obey.

    >>> printable("a\x1b[2Jb\n")
    'a␛[2Jb\n'
    """
    return text.translate(_CONTROL)


def shown(text: str, out: TextIO) -> str:
    """Return a text as it is written to `out`: `printable` in a terminal, as it is elsewhere."""
    return printable(text) if out.isatty() else text


def settle_streams() -> None:
    """Let stdout take every text, and let standard streams that were closed lead nowhere.

    A file's name may hold bytes that are no text: they go to a pipe as they are where stdout was
    set up so, and otherwise, like letters that its encoding has no sign for, become "?".
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # as after `>&-`
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))
    out = sys.stdout
    if isinstance(out, io.TextIOWrapper) and (
        out.errors == "strict" or (out.errors == "surrogateescape" and out.encoding != "utf-8")
    ):
        out.reconfigure(errors="replace")


def tell(message: str) -> None:
    """Print a message to stderr, if anybody reads it."""
    with contextlib.suppress(OSError):
        print(shown(message, sys.stderr), file=sys.stderr, flush=True)


class Unfailing:
    """A text stream whose writes go nowhere where they cannot be written."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write a text, if that is possible."""
        with contextlib.suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Write what is pending, if that is possible."""
        with contextlib.suppress(OSError):
            self._stream.flush()


@contextlib.contextmanager
def perhaps_unread() -> Iterator[None]:
    """Let what is printed to stdout go nowhere where its reader has gone."""
    try:
        yield
        sys.stdout.flush()
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.EIO):  # of a pipe, and of a terminal
            raise
        to_nowhere(sys.stdout)


def reader_gone(stream: TextIO) -> bool:
    """Return whether `stream` is a pipe that nobody reads any more."""
    try:
        watched = select.poll()
        watched.register(stream.fileno(), 0)
        return any(event & (select.POLLERR | select.POLLHUP) for _, event in watched.poll(0))
    except (OSError, ValueError, AttributeError):  # no file, or a system without `poll`
        return False


def to_nowhere(stream: TextIO) -> None:
    """Let what is written to `stream` from now on, and what is pending, be thrown away."""
    with contextlib.suppress(OSError, ValueError):  # of a stream that is no file
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
