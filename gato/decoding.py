"""The trunk over a cache: what `GatoModel.decode` runs, made for many small calls.

It computes what a full forward does, with the weights as `Decoder` found them: in the model's own
precision it holds the parameters themselves, in another one copies of the large matrices; the small
norms of queries and keys are joined, which copies them. Weights that change need a new one. The
residual stream, norms and rotations stay in float32. On a CPU a forward of one token per row is
bound by the number of operations, not by arithmetic, so that there are as few as can be.

Legend: N tokens, D width, H query heads, G key/value heads, K head width, M tokens asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gato.attention import attend_masked
from gato.cache import CacheStep, KVCache
from gato.layers import Block, rms_norm, rotate, rotation_at

TABLE = 2048
"""Positions whose rotations are kept; others are worked out anew."""
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def decoding_dtype(model: Any, precision: str | None = None) -> torch.dtype:
    """Return the dtype of a `GatoModel`'s products in decoding, on a GPU the cache's too.

    Args:
        model: that decodes.
        precision: one of `PRECISIONS`; by default bfloat16 on a GPU, else the model's own.
    """
    weight: Tensor = model.table.weight
    if precision is None:
        return torch.bfloat16 if weight.is_cuda else weight.dtype
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be {' or '.join(PRECISIONS)}; got {precision!r}")
    return PRECISIONS[precision]


@dataclass(frozen=True, eq=False)
class _Layer:
    """What one block needs."""

    attention_norm: Tensor
    qkv: Tensor
    bias: Tensor | None
    qk_norm: Tensor | None
    """(H + G, K)"""
    out: Tensor
    ffn_norm: Tensor
    up: Tensor
    gate: Tensor
    """The first half of `up`, and `value` the second; views."""
    value: Tensor
    down: Tensor


class Decoder:
    """Runs a model's blocks over a cache."""

    def __init__(self, model: Any, dtype: torch.dtype | None = None) -> None:
        """Take the weights of a `GatoModel`; in `dtype`, where it is not the model's own."""
        self.config, self.norm = model.config, model.norm.weight
        weight = model.blocks[0].attention.qkv.weight
        self.dtype = dtype or weight.dtype
        self.activation = model.blocks[0].ffn.activation
        G = model.blocks[0].attention.kv_heads
        self.lean = weight.device.type == "cpu"
        """Whether norms and rotations are spelt out, in the fewest operations."""
        self.eps = torch.tensor(self.config.norm_eps)
        self.split = [self.config.heads + G, G]
        self.split_qk = [self.config.heads, G]
        self.layers = [self._layer(block) for block in model.blocks]

    def _layer(self, block: Block) -> _Layer:
        a, f, H, G = block.attention, block.ffn, self.config.heads, block.attention.kv_heads
        qk_norm = None
        if a.q_norm is not None and a.k_norm is not None:
            parts = a.q_norm.weight.expand(H, -1), a.k_norm.weight.expand(G, -1)
            qk_norm = torch.cat(parts).detach()
        bias = None if a.qkv.bias is None else a.qkv.bias.to(self.dtype)
        qkv, out, up, down = (m.weight.to(self.dtype) for m in (a.qkv, a.out, f.up, f.down))
        norms = block.attention_norm.weight, block.ffn_norm.weight
        return _Layer(norms[0], qkv, bias, qk_norm, out, norms[1], up, *up.chunk(2), down)

    def __call__(
        self,
        x: Tensor,
        memory: KVCache,
        step: CacheStep,
        last: tuple[CacheStep, Tensor] | None = None,
    ) -> Tensor:
        """Return hidden states (N, D) of tokens x (N, D), after storing their keys and values.

        Args:
            x: from `GatoModel.embed`.
            memory: that stores them.
            step: where they go.
            last: where only some states are asked for, what `CacheStep.last` returned: then (M, D)
                is returned, and the last block computes no others.
        """
        rotation = self._turns(step.position)
        for layer in range(len(self.layers) - 1):
            x = self._block(layer, x, rotation, memory, step, None)
        x = self._block(len(self.layers) - 1, x, rotation, memory, step, last)
        return self._normalised(x, self.norm)

    def _block(
        self,
        number: int,
        x: Tensor,
        rotation: Tensor,
        memory: KVCache,
        step: CacheStep,
        last: tuple[CacheStep, Tensor] | None,
    ) -> Tensor:
        w, dtype, N = self.layers[number], self.dtype, len(x)
        qkv = F.linear(self._normalised(x, w.attention_norm).to(dtype), w.qkv, w.bias)
        qkv = qkv.view(N, -1, self.config.head_dim)  # (N, H + 2G, K)
        qk, v = qkv.split_with_sizes(self.split, 1)
        if w.qk_norm is not None:
            qk = self._normalised(qk, w.qk_norm)
        if number not in self.config.no_rope:
            qk = self._rotated(qk, rotation)
        q, k = qk.split_with_sizes(self.split_qk, 1)
        memory.write(number, step, k, v)
        if last is not None:
            step, wanted = last
            x, q = x.index_select(0, wanted), q.index_select(0, wanted)
        q = q.to(memory.store.dtype)
        attended = [
            look.from_grid(attend_masked(look.to_grid(q), *memory.seen(number, look), look.mask))
            for look in step.looks
        ]
        joined = attended[0] if len(attended) == 1 else torch.cat(attended)
        x = x + F.linear(joined.to(dtype), w.out)
        h = self._normalised(x, w.ffn_norm).to(dtype)
        if self.lean:  # two products: gelu over strided halves of one takes twice the time
            gate, value = F.linear(h, w.gate), F.linear(h, w.value)
        else:
            gate, value = F.linear(h, w.up).chunk(2, -1)
        return x + F.linear(self.activation(gate).mul_(value), w.down)

    def _normalised(self, x: Tensor, weight: Tensor) -> Tensor:
        if not self.lean:
            return rms_norm(x, weight, self.config.norm_eps)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        scale = torch.addcmul(self.eps, norm, norm, value=1.0 / x.shape[-1]).rsqrt_()
        return (x * scale).mul_(weight)

    def _rotated(self, x: Tensor, rotation: Tensor) -> Tensor:
        if not self.lean:
            return rotate(x, rotation)
        N, heads, K = x.shape
        pairs = torch.view_as_complex(x.float().reshape(N, heads, K // 2, 2))
        return torch.view_as_real(pairs * torch.view_as_complex(rotation)).view(N, heads, K)

    def _turns(self, position: Tensor) -> Tensor:
        c = self.config
        how = c.head_dim, c.rope_base, c.rope_scaling
        eager_cpu = position.device.type == "cpu" and not torch.compiler.is_compiling()
        if eager_cpu and int(position.max()) < TABLE:
            return _table(*how)[position]
        return rotation_at(position, *how)


@cache
def _table(head_dim: int, base: float, scaling: tuple[float, ...]) -> Tensor:
    """Return the rotations of the first positions; on the CPU."""
    with torch.inference_mode(False), torch.no_grad():
        return rotation_at(torch.arange(TABLE), head_dim, base, scaling)
