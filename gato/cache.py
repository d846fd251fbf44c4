"""The memory of a rollout: a ring of rotated keys and values per row.

Every row is on its own timestep and is reset on its own. A token at absolute position p lies in
slot p mod S of its row. S = window + chunk, so that a chunk can be written before its first query
looks back a whole window, and so that padding at a chunk's end, written as nothing (-1), falls
only on tokens that have left the window. Positions are stored, never derived from lengths:
nothing is renumbered when old tokens leave, and what is stored keeps its shape and place.

    slot          0  1  2  3  4  5     window 4, chunk 2, 7 tokens written, then 1 and 1 of padding
    key_position  6  7 -1  3  4  5

What it computes is a full forward under a sliding window of the same size (memory in the manner of
Transformer-XL), not the re-encoding of a truncated window.

Two ways to write a chunk, one function: `advance` takes B x Q tokens, padding included, and never
asks the device anything, its shapes those of its arguments, as a CUDA graph must; `place` takes the
N tokens that are real and looks at slots in use alone, which is cheaper on a CPU.

Legend: B rows, Q tokens in a chunk, N tokens written, S slots, U slots looked at, G key/value
heads, K head width.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gato.attention import cached_mask

USED = 16
"""Slots are looked at in multiples of so many."""
LOOKS = 10
"""Rows next to each other that have as many tokens look without padding, in at most so many parts;
where there are more, all look at once, padded to the longest."""


@dataclass(frozen=True, eq=False)
class Look:
    """Rows next to each other, their queries and what these may see."""

    rows: slice
    """R rows."""
    tokens: slice
    """Their tokens among the N of the chunk."""
    used: int
    """Slots U that they look at, from the first on: the others hold nothing yet."""
    shape: tuple[int, int]
    """(R, Q), the grid of queries."""
    at: Tensor | None
    """The place of each token in the grid; None where they fill it in order."""
    mask: Tensor
    """(R, 1, Q, U): 0 where a query may look, -inf elsewhere."""

    def to_grid(self, q: Tensor) -> Tensor:
        """Return (R, H, Q, K) of the queries of all tokens (N, H, K)."""
        R, Q = self.shape
        q = q[self.tokens]
        if self.at is not None:
            grid = q.new_zeros(R * Q, *q.shape[1:])
            q = grid.index_copy_(0, self.at, q)
        if Q == 1:
            return q.unsqueeze(2)
        return q.view(R, Q, *q.shape[1:]).transpose(1, 2)

    def from_grid(self, x: Tensor) -> Tensor:
        """Return (n, H * K) for what was attended (R, H, Q, K), n of the N tokens."""
        R, Q = self.shape
        flat = (x if Q == 1 else x.transpose(1, 2)).reshape(R * Q, -1)
        return flat if self.at is None else flat.index_select(0, self.at)


@dataclass(frozen=True, eq=False)
class CacheStep:
    """Where one chunk goes and who looks at what; shared by all layers."""

    position: Tensor
    """(N,) absolute positions, as if every token of the chunk were valid."""
    index: Tensor
    """(N * 2G,) place of each token's keys and values among all B * 2G * S of a layer."""
    looks: tuple[Look, ...]
    """Of all tokens, in their order."""

    def last(self, counts: np.ndarray) -> tuple[CacheStep, Tensor] | None:
        """Return the step of nothing but each row's last token, and which (M,) these are of N.

        None where these are all. `counts` (B,) is what `KVCache.place` was given.
        """
        wanted = torch.from_numpy(np.cumsum(counts)[counts > 0] - 1)
        if len(wanted) == len(self.position):
            return None
        looks, done = [], 0
        for look in self.looks:
            (R, Q), own = look.shape, counts[look.rows]
            active = np.flatnonzero(own)
            place = torch.from_numpy(np.arange(R) * Q + np.maximum(own, 1) - 1)
            mask = look.mask.reshape(R * Q, -1)[place].view(R, 1, 1, -1)
            at = None if len(active) == R else torch.from_numpy(active)
            tokens = slice(done, done + len(active))
            looks.append(Look(look.rows, tokens, look.used, (R, 1), at, mask))
            done += len(active)
        return CacheStep(self.position[wanted], self.index, tuple(looks)), wanted


class KVCache:
    """Preallocated keys and values of every layer; see the module's drawing."""

    def __init__(
        self,
        layers: int,
        batch: int,
        window: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        chunk: int = 64,
    ) -> None:
        """Allocate an empty cache.

        Args:
            layers: number of blocks.
            batch: number of rows B.
            window: tokens a query sees, itself included.
            kv_heads: key and value heads G.
            head_dim: width K of one head.
            dtype: of the stored keys and values.
            device: of everything.
            chunk: most tokens of one row that may be written at once.
        """
        if window < 1 or chunk < 1:
            raise ValueError(f"window and chunk must be at least 1; got {window} and {chunk}.")
        self.window, self.chunk, self.slots = window, chunk, window + chunk
        shape = (layers, batch, 2 * kv_heads, self.slots, head_dim)
        # Zeros, not empty: masked slots have weight 0, and 0 times NaN would be NaN.
        self.store = _zeros(shape, dtype, torch.device(device))
        """(layers, B, 2G, S, K): keys of G heads, then values."""
        self._flat = [layer.view(-1, head_dim) for layer in self.store]
        self.key_position = torch.full((batch, self.slots), -1, device=device)
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=device)
        """(B,) tokens seen by each row since its reset; the position of its next token."""
        self.kv_heads, self._head = kv_heads, torch.arange(2 * kv_heads, device=device)

    @property
    def batch(self) -> int:
        """Number of rows."""
        return self.lengths.shape[0]

    def reset(self, mask: Tensor | None = None, kept: Tensor | None = None) -> None:
        """Forget everything in the rows where `mask` (B,) is True; in all rows without one.

        Args:
            mask: bool (B,).
            kept: (B,) the first tokens that these rows are not to forget; none may have left the
                ring.
        """
        if mask is None:
            self.key_position.fill_(-1)
            self.lengths.zero_()
            return
        mask = torch.as_tensor(mask, dtype=torch.bool, device=self.lengths.device)
        if mask.shape != self.lengths.shape:
            raise ValueError(
                f"reset mask must have shape {tuple(self.lengths.shape)}, one entry per row; "
                f"got {tuple(mask.shape)}."
            )
        kept = torch.zeros_like(self.lengths) if kept is None else kept
        forgotten = mask[:, None] & (self.key_position >= kept[:, None])
        self.key_position.masked_fill_(forgotten, -1)
        self.lengths.copy_(torch.where(mask, kept, self.lengths))

    def advance(self, tokens: int, valid: Tensor | None = None) -> CacheStep:
        """Make room for a chunk and return where it goes.

        Args:
            tokens: tokens Q per row in the chunk, padding included, at most `chunk`.
            valid: (B,) how many of them are real in each row, the first ones; None means all.
        """
        self._check(tokens)
        device = self.lengths.device
        inside = torch.arange(tokens, device=device)
        position = self.lengths[:, None] + inside  # (B, Q)
        slot = position % self.slots
        query_position = position
        if valid is not None:
            query_position = position.where(inside < valid[:, None], -1)
        self.key_position.scatter_(1, slot, query_position)
        self.lengths += tokens if valid is None else valid
        mask = self._mask(self.key_position, query_position)
        row = torch.arange(self.batch, device=device)
        index = self._index(row[:, None].expand(slot.shape).reshape(-1), slot.reshape(-1))
        rows, everything = slice(0, self.batch), slice(0, self.batch * tokens)
        look = Look(rows, everything, self.slots, (self.batch, tokens), None, mask)
        return CacheStep(position.reshape(-1), index, (look,))

    def place(self, counts: np.ndarray) -> CacheStep:
        """Make room for `counts` (B,) tokens, row after row without padding; on the CPU.

        What is returned looks only at rows that have tokens, and at slots in use.
        """
        self._check(int(counts.max()))
        lengths, key_position = self.lengths.numpy(), self.key_position.numpy()
        row = np.repeat(np.arange(len(counts)), counts)
        inside = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
        position = lengths[row] + inside
        slot = position % self.slots
        key_position[row, slot] = position
        lengths += counts
        bounds = np.flatnonzero(np.diff(counts, prepend=-1, append=-1))
        spans = [(a, b) for a, b in itertools.pairwise(bounds.tolist()) if counts[a]]
        if len(spans) > LOOKS:
            spans = [(spans[0][0], spans[-1][1])]
        looks, done = [], 0
        for first, stop in spans:
            n = int(counts[first:stop].sum())
            tokens = slice(done, done + n)
            at = (row[tokens] - first, inside[tokens])
            looks.append(self._look(slice(first, stop), tokens, counts, position[tokens], at))
            done += n
        index = self._index(torch.from_numpy(row), torch.from_numpy(slot))
        return CacheStep(torch.from_numpy(position), index, tuple(looks))

    def _look(
        self,
        rows: slice,
        tokens: slice,
        counts: np.ndarray,
        position: np.ndarray,
        at: tuple[np.ndarray, np.ndarray],
    ) -> Look:
        """Return what `rows` look at whose tokens have these positions and places in the rows."""
        R, Q = rows.stop - rows.start, int(counts[rows].max())
        longest = int(self.lengths.numpy()[rows].max())
        used = min(self.slots, -(-longest // USED) * USED)
        full = len(position) == R * Q
        query, place = position, at[0] * Q + at[1]
        if not full:
            query = np.full(R * Q, -1)
            query[place] = position
        mask = self._mask(self.key_position[rows, :used], torch.from_numpy(query).view(R, Q))
        return Look(rows, tokens, used, (R, Q), None if full else torch.from_numpy(place), mask)

    def _check(self, tokens: int) -> None:
        if not 1 <= tokens <= self.chunk:
            raise ValueError(
                f"a chunk holds 1 to {self.chunk} tokens; got {tokens}. Split it or make the cache "
                "with a larger chunk."
            )

    def _mask(self, key_position: Tensor, query_position: Tensor) -> Tensor:
        mask = cached_mask(key_position, query_position, self.window)
        # Added, not bool: SDPA would make it so in every layer.
        return torch.zeros(mask.shape, dtype=self.store.dtype, device=mask.device).masked_fill_(
            ~mask, -math.inf
        )

    def _index(self, row: Tensor, slot: Tensor) -> Tensor:
        heads = row[:, None] * len(self._head) + self._head  # (N, 2G)
        return (heads * self.slots + slot[:, None]).view(-1)

    def write(self, layer: int, step: CacheStep, k: Tensor, v: Tensor) -> None:
        """Store k and v (N, G, K) of one layer."""
        flat, K = self._flat[layer], k.shape[-1]
        flat.index_copy_(0, step.index, torch.cat((k, v), 1).view(-1, K).to(flat.dtype))

    def seen(self, layer: int, look: Look) -> tuple[Tensor, Tensor]:
        """Return the keys and values of one layer that rows look at, each (R, G, U, K)."""
        K = self.store.shape[-1]
        head = self.slots * K
        row = 2 * self.kv_heads * head
        size, stride = (look.shape[0], self.kv_heads, look.used, K), (row, head, K, 1)
        first = (layer * self.batch + look.rows.start) * row
        return (
            self.store.as_strided(size, stride, first),
            self.store.as_strided(size, stride, first + row // 2),
        )


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return zeros; on a CPU their memory is not taken before it is written."""
    size = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or not size:
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(size, np.uint8)).view(dtype).view(shape)
