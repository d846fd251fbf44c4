"""The layers of the trunk: normalisation, rotary positions, attention, feed-forward, block.

Legend: N tokens of a packed batch, B rows decoded, Q tokens of a chunk, D width, H query heads,
G key/value heads, K head width.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gato.attention import PackedMeta, attend_packed
from gato.model_config import ModelConfig


class RMSNorm(nn.Module):
    """Divide by the root mean square over the last axis, times a learned weight."""

    def __init__(self, width: int, eps: float) -> None:
        """Make a norm over the last axis, of size `width`."""
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Return x normalised over its last axis."""
        return rms_norm(x, self.weight, self.eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return x over its root mean square along the last axis, times `weight` (..., D).

    Eager CPU code takes `_RMSNorm`, 2.4 times as fast as torch's there, which is a chain of ops.
    """
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        if torch.is_inference_mode_enabled():  # the same, without what a gradient would need
            unit, _ = _normalised(x.float(), eps)
            return unit.mul_(weight)
        return _RMSNorm.apply(x, weight, eps)
    return F.rms_norm(x, x.shape[-1:], None, eps) * weight


def _normalised(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()
    scale = square.div_(x.shape[-1]).add_(eps).rsqrt_()
    return x * scale, scale


class _RMSNorm(torch.autograd.Function):
    """Forward and backward of RMSNorm in few passes over memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        unit, scale = _normalised(x.float(), eps)
        ctx.save_for_backward(unit, scale, weight)
        return unit * weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        unit, scale, weight = ctx.saved_tensors
        product = grad * unit
        grad_weight = product.sum_to_size(weight.shape)
        if weight.dim() == 1:
            mean = (product @ weight).div_(unit.shape[-1]).unsqueeze(-1)
        else:
            mean = (product * weight).mean(dim=-1, keepdim=True)
        return (grad * weight).addcmul_(unit, mean, value=-1).mul_(scale), grad_weight, None


def rotation_at(
    position: Tensor, head_dim: int, base: float, scaling: tuple[float, ...] = ()
) -> Tensor:
    """Return the turn of each pair of a head at each position (...,), for `rotate`.

    Angles are taken in float64: in float32 they are off by 0.03 rad at position 1e6. Only
    differences of positions matter to attention. A turn is its cosine and sine,
    (..., 1, K / 2, 2) in float32. `scaling` is that of `ModelConfig.rope_scaling`.
    """
    pair = torch.arange(0, head_dim, 2, device=position.device, dtype=torch.float64)
    frequency = base ** (-pair / head_dim)
    if scaling:
        frequency = _stretched(frequency, *scaling)
    angle = position[..., None, None].double() * frequency
    return torch.stack((angle.cos(), angle.sin()), dim=-1).float()


def _stretched(frequency: Tensor, factor: float, low: float, high: float, context: float) -> Tensor:
    """Return Llama 3's frequencies: slow ones slower by `factor`, those between less so.

    Slow ones turn fewer than `low` times in `context` tokens, fast ones more than `high` times.
    """
    turns = context * frequency / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return frequency * (kept + (1.0 - kept) / factor)


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Return x (..., H, K) in float32 with each pair (2i, 2i + 1) of a head turned.

    Eager CPU code takes complex numbers, one product per turn; what is compiled knows none.
    Convention: pairs are neighbours. Weights that pair i with i + K / 2 (Hugging Face) are
    reordered when they are loaded.
    """
    pairs = x.float().unflatten(-1, (-1, 2))  # (..., H, K / 2, 2)
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        turned = torch.view_as_complex(pairs) * torch.view_as_complex(rotation)
        return torch.view_as_real(turned).flatten(-2)
    (a, b), (cos, sin) = pairs.unbind(-1), rotation.unbind(-1)
    return torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)


class Attention(nn.Module):
    """Causal self-attention; queries, keys and values come from one product."""

    def __init__(self, config: ModelConfig) -> None:
        """Make the layer; `attend_packed` and the cache do the rest."""
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.heads, config.kv_heads, config.head_dim
        width = (config.heads + 2 * config.kv_heads) * config.head_dim
        self.qkv = nn.Linear(config.width, width, bias=config.qkv_bias)
        self.out = nn.Linear(config.heads * config.head_dim, config.width, bias=False)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None

    def project(self, x: Tensor, rotation: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries (..., H, K) and keys (..., G, K), rotated, and values (..., G, K)."""
        H, G = self.heads, self.kv_heads
        qkv = self.qkv(x).unflatten(-1, (H + 2 * G, self.head_dim))
        dtype = qkv.dtype
        qk, v = qkv[..., : H + G, :], qkv[..., H + G :, :]
        if self.q_norm is not None:
            q_weight, k_weight = self.q_norm.weight, self.k_norm.weight
            weight = torch.cat((q_weight.expand(H, -1), k_weight.expand(G, -1)))  # (H + G, K)
            qk = rms_norm(qk, weight, self.q_norm.eps)
        if rotation is not None:
            qk = rotate(qk, rotation)
        qk = qk.to(dtype)
        return qk[..., :H, :], qk[..., H:, :], v

    def forward(self, x: Tensor, rotation: Tensor | None, meta: PackedMeta) -> Tensor:
        """Return (N, D) for packed tokens x (N, D)."""
        q, k, v = self.project(x, rotation)
        return self.out(attend_packed(q, k, v, meta).flatten(-2))


class FeedForward(nn.Module):
    """Gated feed-forward layer; gate and value come from one product."""

    def __init__(self, config: ModelConfig) -> None:
        """Make the layer."""
        super().__init__()
        self.activation = F.silu if config.ffn == "swiglu" else F.gelu
        self.up = nn.Linear(config.width, config.ffn_width, bias=False)
        self.down = nn.Linear(config.ffn_width // 2, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., D) for x (..., D)."""
        if self.training and x.device.type == "cpu" and not torch.compiler.is_compiling():
            # two products: halves of one are strided, and gelu there takes twice the time
            gate, value = (F.linear(x, half) for half in self.up.weight.chunk(2))
        else:
            gate, value = self.up(x).chunk(2, dim=-1)
        return self.down(self.activation(gate) * value)


class Block(nn.Module):
    """One pre-norm transformer block."""

    def __init__(self, config: ModelConfig) -> None:
        """Make the block."""
        super().__init__()
        self.attention_norm = RMSNorm(config.width, config.norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = RMSNorm(config.width, config.norm_eps)
        self.ffn = FeedForward(config)

    def forward(self, x: Tensor, rotation: Tensor | None, meta: PackedMeta) -> Tensor:
        """Return (N, D) for packed tokens x (N, D)."""
        x = x + self.attention(self.attention_norm(x), rotation, meta)
        return x + self.ffn(self.ffn_norm(x))
