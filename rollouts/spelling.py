"""Ids of text as characters while they come: whole ones, and nothing of a stop string.

A character may take the bytes of several ids; it is shown when the last of them has come. What
could still become a stop string is held back until it cannot.

    ids     "go " | E2 | 82 | AC | " S" | "TO" | "P"      stop: "STOP"
    shown   "go "             U+20AC   " "              and the text has ended
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from gato.tokenizers.hf_text import EACH_BYTE
from gato.tokenizers.serializer import Serializer
from gato.tokenizers.text import Text


def text_modality(serializer: Serializer) -> Text:
    """Return what cuts and spells the text of a checkpoint."""
    text = serializer.modalities["text"]
    assert isinstance(text, Text)
    return text


def text_of(serializer: Serializer, ids: Sequence[int]) -> str:
    """Return the characters of stream ids of text; one that is cut off at the end is left out."""
    spelling = Spelling(serializer)
    return "".join(map(spelling.push, ids))


class Spelling:
    """The text of one row."""

    def __init__(self, serializer: Serializer, stop: Sequence[str] = ()) -> None:
        """Begin a text that ends before any of the strings of `stop`."""
        self.text, self.offset = text_modality(serializer), serializer.offset["text"]
        self.stop = tuple(stop)
        self.stopped = False
        """Whether a stop string has come."""
        self.shown = 0
        """Characters returned so far."""
        self._decoder = codecs.getincrementaldecoder("utf-8")(EACH_BYTE)
        self._held = ""
        self._longest = max(map(len, self.stop), default=0)
        self._bare = not self.text.prefixed

    @property
    def known(self) -> int:
        """How many characters there are, those that are held back included."""
        return self.shown + len(self._held)

    def bytes_of(self, token: int) -> bytes:
        """Return what a stream id of text spells."""
        return self.text.bytes_of(token - self.offset)

    def push(self, token: int) -> str:
        """Return what can be shown after one more stream id."""
        more = self._decoder.decode(self.bytes_of(token))
        if not self._bare and more:
            more, self._bare = more.removeprefix(" "), True
        self._held += more
        if not self.stop:
            return self.rest()
        found = _first(self._held, self.stop)
        if found is not None:
            self.stopped = True
            shown, self._held = self._held[:found], ""
            self.shown += len(shown)
            return shown
        at = _open(self._held, self.stop, self._longest)
        shown, self._held = self._held[:at], self._held[at:]
        self.shown += len(shown)
        return shown

    def rest(self) -> str:
        """Return what was held back, the text having ended; bytes of no whole character are not."""
        shown, self._held = self._held, ""
        self.shown += len(shown)
        return shown


def _first(text: str, stop: Sequence[str]) -> int | None:
    """Return where the stop string begins that is complete first; the longest of several."""
    found = [(at + len(s), at) for s in stop if (at := text.find(s)) >= 0]
    return min(found)[1] if found else None


def _open(text: str, stop: Sequence[str], longest: int) -> int:
    """Return where what could become a stop string begins."""
    for at in range(max(0, len(text) - longest + 1), len(text)):
        if any(s.startswith(text[at:]) for s in stop):
            return at
    return len(text)
