"""LoRA: matrices of the trunk stay as they are, and products of two thin ones are added to them.

W becomes W + (alpha / rank) up down, with down (rank, in) drawn at random and up (out, rank) zero
at the start (Hu et al. 2021, arXiv 2106.09685). The sum is a parametrization of the weight, so that
whoever asks a layer for its weight gets it; a loaded checkpoint has it merged. It saves the state
of the optimizer and of averages, not the time of a step, nor its memory: the sums are kept for the
backward pass, as much as the trunk once more. Under bfloat16 what is added is rounded to it while
training; what is merged is not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.utils import parametrize

from gato.model import GatoModel

LAYERS = ("qkv", "out", "up", "down")


@dataclass(frozen=True)
class LoraConfig:
    """What is added to the trunk's matrices."""

    rank: int = 0
    """Rank of what is added, of which alone the trunk then learns; 0 adds nothing."""
    alpha: float = 16.0
    """What is added counts alpha / rank times."""
    layers: tuple[str, ...] = LAYERS
    """To which matrices: qkv and out of attention, up and down of the feed-forward layers."""

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise ValueError(f"lora.rank must be at least 0; got {self.rank}")
        if not 0.0 < self.alpha < math.inf:
            raise ValueError(f"lora.alpha must be a number above 0; got {self.alpha}")
        unknown = [name for name in self.layers if name not in LAYERS]
        if unknown or not self.layers:
            raise ValueError(
                f"lora.layers must be some of {', '.join(LAYERS)}; got {', '.join(self.layers)}"
            )


class LowRank(nn.Module):
    """Adds the product of two thin matrices to a weight."""

    def __init__(self, weight: Tensor, rank: int, alpha: float) -> None:
        """Begin with nothing added to `weight` (out, in)."""
        super().__init__()
        out, wide = weight.shape
        self.down = nn.Parameter(weight.new_empty(rank, wide).normal_(std=wide**-0.5))
        self.up = nn.Parameter(weight.new_zeros(out, rank))
        self.scale = alpha / rank

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight with what is added."""
        return weight + self.scale * (self.up @ self.down)


def add_lora(model: GatoModel, config: LoraConfig) -> None:
    """Add to the matrices of a model's blocks; nothing else of blocks and their norm is trained."""
    if not config.rank:
        return
    for part in (model.blocks, model.norm):
        part.requires_grad_(False)
    for name, layer in list(model.blocks.named_modules()):
        if isinstance(layer, nn.Linear) and name.rpartition(".")[2] in config.layers:
            added = LowRank(layer.weight, config.rank, config.alpha)
            parametrize.register_parametrization(layer, "weight", added)


def merge_lora(model: nn.Module) -> None:
    """Let matrices be what they are with what is added to them."""
    for layer in list(model.modules()):
        if parametrize.is_parametrized(layer, "weight"):
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
    model.requires_grad_(True)
