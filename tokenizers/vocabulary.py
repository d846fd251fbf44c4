"""Which ids belong to whom: disjoint ranges held as data, in an append-only ledger.

    [0, V) text | continuous 1024 | discrete 1024 | control tokens and their spares | padding

Unlike Gato, whose discrete values share the first text ids, no two ranges overlap here.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

RETURN_LEVELS = 32
RETURN_TOKENS = tuple(f"<return {i}>" for i in range(RETURN_LEVELS))
"""The return to come, from the lowest to the highest of a task's data."""
CONTROL_TOKENS = (
    "<bos>",
    "<eos>",
    "<sep>",
    "<pad>",
    "<masked>",
    "<system>",
    "<user>",
    "<assistant>",
    *RETURN_TOKENS,
)
CONTROL_SLOTS = 64
"""Control ids reserved, named or spare: naming a spare one later moves no id."""


@dataclass(frozen=True)
class VocabularyLayout:
    """The ledger of id ranges; saved in the checkpoint, refused on mismatch.

    >>> layout = VocabularyLayout.build({"text": 300, "continuous": 1024})
    >>> layout.start("continuous"), layout.control("<bos>"), layout.size % 128
    (300, 1324, 0)
    """

    ranges: tuple[tuple[str, int], ...]
    """(name, size) in the order of their ids."""
    control_tokens: tuple[str, ...] = CONTROL_TOKENS

    @classmethod
    def build(cls, sizes: Mapping[str, int]) -> VocabularyLayout:
        """Return the layout of these modalities in Gato's order, control tokens behind them."""
        order = [n for n in ("text", "continuous", "discrete") if n in sizes]
        rest = sorted(n for n in sizes if n not in order)
        ranges = [(name, sizes[name]) for name in order + rest if sizes[name] > 0]
        return cls((*ranges, ("control", CONTROL_SLOTS)))

    def __post_init__(self) -> None:
        names = [name for name, _ in self.ranges]
        if len(set(names)) != len(names) or any(size <= 0 for _, size in self.ranges):
            raise ValueError(f"ranges must be named once each and not be empty; got {self.ranges}")
        if len(self.control_tokens) > dict(self.ranges).get("control", 0):
            raise ValueError(f"{len(self.control_tokens)} control tokens do not fit their range")
        starts, position = {}, 0
        for name, size in self.ranges:
            starts[name] = position
            position += size
        object.__setattr__(self, "_starts", starts)
        object.__setattr__(self, "_used", position)

    def append(self, name: str, size: int) -> VocabularyLayout:
        """Return a layout with one more range behind the others; no existing id moves."""
        return VocabularyLayout((*self.ranges, (name, size)), self.control_tokens)

    @property
    def size(self) -> int:
        """Ids in the embedding table: all ranges, padded to a multiple of 128."""
        return -(-self._used // 128) * 128  # type: ignore[attr-defined]

    def start(self, name: str) -> int:
        """Return the first id of a range."""
        starts: dict[str, int] = self._starts  # type: ignore[attr-defined]
        if name not in starts:
            close = difflib.get_close_matches(name, starts)
            raise ValueError(f"no ids are reserved for {name!r}; known: {close or list(starts)}")
        return starts[name]

    def span(self, name: str) -> tuple[int, int]:
        """Return [start, stop) of a range."""
        start = self.start(name)
        return start, start + dict(self.ranges)[name]

    def owner(self, token: int) -> str | None:
        """Return the range that `token` lies in; None for padding ids."""
        for name, _ in self.ranges:
            start, stop = self.span(name)
            if start <= token < stop:
                return name
        return None

    def control(self, token: str) -> int:
        """Return the id of a control token."""
        if token not in self.control_tokens:
            raise ValueError(f"control tokens are {self.control_tokens}; got {token!r}")
        return self.start("control") + self.control_tokens.index(token)

    def to_json(self) -> dict[str, Any]:
        """Return the ledger as JSON-able data."""
        return {
            "ranges": [list(r) for r in self.ranges],
            "control_tokens": list(self.control_tokens),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> VocabularyLayout:
        """Return the layout that `to_json` described."""
        ranges: Sequence[Sequence[Any]] = data["ranges"]
        return cls(tuple((str(n), int(s)) for n, s in ranges), tuple(data["control_tokens"]))
