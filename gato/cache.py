"""The memory of a rollout: a ring of rotated keys and values per row.

Every row is on its own timestep and is reset on its own. A token at absolute position p lies in
slot p mod S of its row. S = window + chunk, so that a chunk can be written before its first query
looks back a whole window, and so that padding at a chunk's end, written as nothing (-1), falls
only on tokens that have left the window. Positions are stored, never derived from lengths:
nothing is renumbered when old tokens leave, and no shape ever changes.

    slot          0  1  2  3  4  5     window 4, chunk 2, 7 tokens written, then 1 and 1 of padding
    key_position  6  7 -1  3  4  5

What it computes is a full forward under a sliding window of the same size (memory in the manner of
Transformer-XL), not the re-encoding of a truncated window.

Legend: B rows, Q tokens in a chunk, S slots, G key/value heads, K head width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from gato.attention import cached_mask


@dataclass(frozen=True, eq=False)
class CacheStep:
    """Where one chunk goes and what its queries may see; shared by all layers."""

    position: Tensor
    """(B, Q) absolute positions, as if every token of the chunk were valid."""
    slot: Tensor
    """(B, Q) slot written by each token."""
    mask: Tensor
    """(B, 1, Q, S), True where a query may look."""


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
        shape = (layers, batch, self.slots, kv_heads, head_dim)
        # Zeros, not empty: masked slots have weight 0, and 0 times NaN would be NaN.
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.key_position = torch.full((batch, self.slots), -1, device=device)
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=device)
        """(B,) tokens seen by each row since its reset; the position of its next token."""

    @property
    def batch(self) -> int:
        """Number of rows."""
        return self.lengths.shape[0]

    def reset(self, mask: Tensor | None = None) -> None:
        """Forget everything in the rows where `mask` (B,) is True; in all rows without one."""
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
        self.key_position.masked_fill_(mask[:, None], -1)
        self.lengths.masked_fill_(mask, 0)

    def advance(self, tokens: int, valid: Tensor | None = None) -> CacheStep:
        """Make room for a chunk and return where it goes.

        Args:
            tokens: tokens Q per row in the chunk, padding included, at most `chunk`.
            valid: (B,) how many of them are real in each row, the first ones; None means all.
        """
        if not 1 <= tokens <= self.chunk:
            raise ValueError(
                f"a chunk holds 1 to {self.chunk} tokens; got {tokens}. Split it or make the cache "
                "with a larger chunk."
            )
        index = torch.arange(tokens, device=self.lengths.device)
        position = self.lengths[:, None] + index  # (B, Q)
        slot = position % self.slots
        query_position = position
        if valid is not None:
            query_position = position.where(index < valid[:, None], -1)
        self.key_position.scatter_(1, slot, query_position)
        self.lengths += tokens if valid is None else valid
        mask = cached_mask(self.key_position, query_position, self.window)
        return CacheStep(position, slot, mask)

    def write(self, layer: int, step: CacheStep, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k and v (B, Q, G, K) of one layer; return all its slots, each (B, S, G, K)."""
        index = step.slot[:, :, None, None].expand(k.shape)
        keys, values = self.keys[layer], self.values[layer]
        keys.scatter_(1, index, k.to(keys.dtype))
        values.scatter_(1, index, v.to(values.dtype))
        return keys, values
