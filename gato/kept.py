"""Written sequences kept in memory, bounded in bytes over all corpora of a process.

Corpora are sampled uniformly, so which of their items are kept does not matter: the first to come
stay, and when the room is used up nothing is added. Memory then no longer changes.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from gato.tokenizers.stream import TokenSequence


class Room:
    """Bytes that all `Kept` of a process share."""

    def __init__(self, limit: int) -> None:
        self.limit, self.used = limit, 0


ROOM = Room(96 << 20)
"""Of this process. A worker process has its share of as much."""


class Kept:
    """A corpus' written items, as many as there is room for. A copy in another process is empty."""

    largest = 1 << 20
    """Bytes of an item above which it is not kept: long episodes of frames are read by window."""

    def __init__(self, room: Room = ROOM) -> None:
        self._room, self._used = room, 0
        self._items: dict[Any, Any] = {}

    def __reduce__(self) -> tuple[type[Kept], tuple[()]]:
        return Kept, ()

    def __del__(self) -> None:
        self._room.used -= self._used

    def __len__(self) -> int:
        return len(self._items)

    def get(self, key: Any) -> Any:
        return self._items.get(key)

    def takes(self, size: float) -> bool:
        """Return whether an item of `size` bytes would be kept."""
        return size <= self.largest and self._room.used + size <= self._room.limit

    def put(self, key: Any, item: Any, size: int) -> None:
        """Keep `item`, of `size` bytes, if there is room."""
        if self.takes(size) and key not in self._items:
            self._items[key] = item
            self._used += size
            self._room.used += size


def bytes_of(sequence: TokenSequence) -> int:
    """Return the bytes that a sequence takes, its Python objects included."""
    columns = [sequence.ids, sequence.modality, sequence.local, sequence.target, sequence.hidden]
    columns += [column for rows in sequence.payload.values() for column in rows.values()]
    if sequence.joint is not None:
        columns += list(vars(sequence.joint).values())
    arrays = [column for column in columns if isinstance(column, np.ndarray)]
    return sum(128 + array.nbytes for array in arrays) + 512
