"""Token sequences of different lengths as one chunk, read into a cache.

Legend: B rows, N tokens of the chunk, D width, U states asked for, n tokens per row of a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gato.cache import KVCache
from gato.decoding import Decoder
from gato.model import GatoModel
from gato.rollouts.graphs import Graphs
from gato.tokenizers.stream import TokenSequence, to_device

CHUNK = 64
"""Tokens of one row read at once, at most; longer pieces are split."""
STEP = 16
"""The slots of a memory, and the most tokens it takes at once, are multiples of this."""
BUCKETS = (1, 8, 16, 32, CHUNK)
"""Lengths of a chunk where shapes must not change."""


@dataclass(frozen=True, eq=False)
class Piece:
    """One row's share of a block of tokens that L rows have."""

    block: TokenSequence
    index: int
    rows: int
    """How many rows L the block has."""

    def __len__(self) -> int:
        return len(self.block) // self.rows


class Chunk:
    """What B rows read next: written piece by piece, row after row without padding.

    Where all shapes must stay the same, every row has room for `width` tokens instead.
    """

    def __init__(
        self, lengths: np.ndarray, control: dict[str, int], width: int | None = None
    ) -> None:
        """Make room for `lengths` (B,) tokens; `control` has the ids of <pad> and <masked>."""
        self.lengths = lengths
        self.masked = control["<masked>"]
        if width is None:
            self.start, total = np.cumsum(lengths) - lengths, int(lengths.sum())
        else:
            self.start, total = np.arange(len(lengths)) * width, len(lengths) * width
        self.inputs = np.full(total, control["<pad>"], np.int64)
        self.local = np.zeros(total, np.int64)
        self.next = self.start.copy()
        """(B,) where each row's next token is written."""
        self._payload: dict[str, list[dict[str, np.ndarray]]] = {}

    def write(self, rows: Sequence[int] | np.ndarray, block: TokenSequence) -> None:
        """Append n tokens to each of L rows; `block` holds L * n tokens, row after row."""
        where = np.asarray(rows)
        n = len(block) // len(where)
        if n == 0:
            return
        start = self.next[where]
        at = start if n == 1 else (start[:, None] + np.arange(n)).reshape(-1)  # (L * n,)
        shown = (
            block.ids if block.hidden is None else np.where(block.hidden, self.masked, block.ids)
        )
        self.inputs[at] = shown
        self.local[at] = block.local
        for name, fields in block.payload.items():
            self._payload.setdefault(name, []).append({**fields, "at": at[fields["at"]]})
        self.next[where] += n

    def write_pieces(self, rows: Sequence[int], pieces: Sequence[Sequence[Piece]]) -> None:
        """Append to each row its pieces; those of one block, where all are there, in one go."""
        for k in range(max((len(p) for p in pieces), default=0)):
            blocks: dict[int, list[tuple[int, Piece]]] = {}
            for row, some in zip(rows, pieces, strict=True):
                if k < len(some):
                    blocks.setdefault(id(some[k].block), []).append((row, some[k]))
            for members in blocks.values():
                block, count = members[0][1].block, members[0][1].rows
                if [p.index for _, p in members] == list(range(count)):
                    self.write([row for row, _ in members], block)
                    continue
                n = len(block) // count
                for row, piece in members:
                    self.write([row], block.slice(piece.index * n, (piece.index + 1) * n))

    def fill(self, rows: np.ndarray, counts: np.ndarray) -> None:
        """Append `counts` (L,) <masked> tokens to each of L rows."""
        if counts.any():
            inside = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
            self.inputs[np.repeat(self.next[rows], counts) + inside] = self.masked
            self.next[rows] += counts

    def embed(self, model: GatoModel) -> Tensor:
        """Return the embeddings (N, D)."""
        assert (self.next == self.start + self.lengths).all(), "a chunk must be written in full"
        device = model.table.weight.device
        payload = {}
        for name, pieces in self._payload.items():
            joined = pieces[0]
            if len(pieces) > 1:
                joined = {k: np.concatenate([p[k] for p in pieces]) for k in joined}
            payload[name] = to_device(joined, lambda v: _tensor(v).to(device))
        inputs, local = (torch.from_numpy(a).to(device) for a in (self.inputs, self.local))
        return model.embed(inputs, local, payload)


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array if array.flags.writeable else array.copy())


class States:
    """The hidden states behind a chunk's tokens, by row and place in the row's share of it."""

    def __init__(self, hidden: Tensor, start: np.ndarray) -> None:
        """`hidden` (N, D); row i's tokens begin at `start[i]`."""
        self.hidden, self.start = hidden, start

    def __getitem__(self, at: tuple[Any, Any]) -> Tensor:
        """Return (U, D) for rows (U,) and places (U,)."""
        rows, places = at
        index = torch.from_numpy(self.start[rows] + np.asarray(places))
        return self.hidden[index.to(self.hidden.device)]


class Memory:
    """The cache of B rows. Only what has been read of it so far is looked at, or takes memory.

    Where a shape must not change (`static`), chunks are padded to the next of `BUCKETS` tokens and
    all slots are looked at; on a GPU that is replayed as a CUDA graph (see `graphs.py`).
    """

    def __init__(
        self,
        model: GatoModel,
        rows: int,
        static: bool | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Make an empty memory.

        Args:
            model: in evaluation mode.
            rows: how many rows B.
            static: whether shapes must not change; by default where the model is on a GPU.
            dtype: of the trunk's matrices and, on a GPU, of the cache; by default the model's. On
                a CPU the cache always has the model's.
        """
        self.model, self.decoder = model, Decoder(model, dtype)
        self.lengths = np.zeros(rows, np.int64)
        self.static = model.table.weight.device.type != "cpu" if static is None else static
        self.cache = self._new(rows, CHUNK if self.static else STEP)
        self.graphs = self._graphs()

    def _graphs(self) -> Graphs:
        state = (self.cache.key_position, self.cache.lengths)
        return Graphs(self._advance, state, capture=self.cache.store.is_cuda)

    def _new(self, rows: int, chunk: int) -> KVCache:
        c, weight = self.model.config, self.model.table.weight
        assert c.kv_heads is not None
        chunk += -(c.memory + chunk) % STEP  # whole steps of slots, which kernels like
        device = weight.device
        # On a CPU, attention of few queries takes five times as long over keys in bfloat16.
        dtype = weight.dtype if device.type == "cpu" else self.decoder.dtype
        return KVCache(c.layers, rows, c.memory, c.kv_heads, c.head_dim, dtype, device, chunk)

    def chunk(self, lengths: np.ndarray, control: dict[str, int]) -> Chunk:
        """Return a chunk of `lengths` (B,) tokens to be written, and then to be read."""
        if not self.static:
            return Chunk(lengths, control)
        most = int(lengths.max())
        parts, rest = divmod(most, BUCKETS[-1])
        return Chunk(lengths, control, parts * BUCKETS[-1] + bucket(rest) if rest else most)

    @torch.inference_mode()
    def reset(self, rows: np.ndarray, kept: np.ndarray | None = None) -> None:
        """Forget the rows where `rows` (B,) is true, but for their first `kept` (B,) tokens."""
        device = self.cache.lengths.device
        kept = np.zeros_like(self.lengths) if kept is None else kept
        assert not kept[rows].any() or self.whole()[rows & (kept > 0)].all()
        self.cache.reset(torch.from_numpy(rows).to(device), torch.from_numpy(kept).to(device))
        self.lengths = np.where(rows, kept, self.lengths)

    def whole(self) -> np.ndarray:
        """Return bool (B,), true where no token has left the ring since the row was forgotten."""
        return self.lengths <= self.cache.window

    @torch.inference_mode()
    def read(self, chunk: Chunk, last: bool = False) -> States:
        """Return the hidden states of a chunk's tokens, and remember them.

        Args:
            chunk: from `chunk`.
            last: whether only the state behind each row's last token will be asked for.
        """
        lengths = chunk.lengths
        self._reserve(int(lengths.max()))
        dtype, weight = self.decoder.dtype, self.model.table.weight
        half = dtype != weight.dtype
        with torch.autocast(weight.device.type, dtype) if half else nullcontext():
            x = chunk.embed(self.model).float()
        self.lengths = self.lengths + lengths
        if self.static:
            return States(self._grid(x, lengths), chunk.start)
        if lengths.max() > self.cache.chunk:
            return States(self._in_parts(x, lengths), chunk.start)
        step = self.cache.place(lengths)
        asked = step.last(lengths) if last else None
        hidden = self.decoder(x, self.cache, step, asked)
        if asked is None:
            return States(hidden, chunk.start)
        return States(hidden, np.cumsum(lengths > 0) - lengths)  # where its last is, less its rest

    def _grid(self, x: Tensor, lengths: np.ndarray) -> Tensor:
        """Return (N, D) for tokens with padding; all shapes are among few."""
        grid = x.view(len(lengths), -1, x.shape[-1])
        hidden = []
        for part, some in enumerate(grid.split(CHUNK, dim=1)):
            valid = np.clip(lengths - part * CHUNK, 0, some.shape[1])
            hidden.append(self.graphs(some, torch.from_numpy(valid).to(x.device)))
        return torch.cat(hidden, dim=1).flatten(0, 1)

    def _advance(self, x: Tensor, valid: Tensor) -> Tensor:
        """Return (B, Q, D) for a chunk x (B, Q, D) with `valid` (B,) tokens in each row."""
        step = self.cache.advance(x.shape[1], valid)
        return self.decoder(x.flatten(0, 1), self.cache, step).view(x.shape)

    def _in_parts(self, x: Tensor, lengths: np.ndarray) -> Tensor:
        """Return (N, D) for tokens without padding, of which rows have more than fit at once."""
        size, out = self.cache.chunk, torch.empty_like(x)
        inside = np.arange(len(x)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        for part in range(-(-int(lengths.max()) // size)):
            at = torch.from_numpy(np.flatnonzero(inside // size == part))
            step = self.cache.place(np.clip(lengths - part * size, 0, size))
            out[at] = self.decoder(x[at], self.cache, step)
        return out

    @torch.inference_mode()
    def move(self, source: int, target: int) -> None:
        """Let row `target` hold what row `source` does, which holds it too until it is reset."""
        cache, used = self.cache, min(int(self.lengths[source]), self.cache.slots)
        cache.store[:, target, :, :used] = cache.store[:, source, :, :used]
        cache.key_position[target] = cache.key_position[source]
        cache.lengths[target] = cache.lengths[source]
        self.lengths[target] = self.lengths[source]

    @torch.inference_mode()
    def keep(self, rows: np.ndarray) -> None:
        """Go on with these rows only, in this order."""
        old, index = self.cache, torch.from_numpy(rows).to(self.cache.lengths.device)
        self.lengths = self.lengths[rows]
        self.cache = self._new(len(rows), old.chunk)
        self._copy(old, index)
        self.graphs = self._graphs()

    def _reserve(self, chunk: int) -> None:
        """Have room for chunks of so many tokens at once."""
        old = self.cache
        chunk = min(CHUNK, -(-chunk // STEP) * STEP)
        if chunk > old.chunk and self.whole().all():
            self.cache = self._new(old.batch, chunk)
            self._copy(old, torch.arange(old.batch, device=old.lengths.device))

    def _copy(self, old: KVCache, rows: Tensor) -> None:
        # Nothing is in the slots behind the longest row's; and in a larger ring, while nothing has
        # left the old one, every token lies in the slot of its position too.
        used = min(int(self.lengths.max(initial=0)), old.slots)
        self.cache.store[..., :used, :] = old.store[:, rows, :, :used]
        self.cache.key_position[:, :used] = old.key_position[rows, :used]
        self.cache.lengths.copy_(old.lengths[rows])


def bucket(tokens: int) -> int:
    """Return the least of `BUCKETS` that holds so many tokens."""
    return next(b for b in BUCKETS if b >= tokens)
