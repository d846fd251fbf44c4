"""What turns one hidden state into a state per slot, so that all ids of an action come at once.

Decoding one id after another takes a forward per id and a token per id in memory. Here the state h
of a step's last token gives one state per slot s, from which the same logits follow:

    h_s = h + down(gelu(gate) * value),  (gate, value) = up(h * (1 + scale_s) + shift_s)

The slot must change what is made of h: were an embedding only added to the result, every dimension
would rank its bins alike. `down` starts at zero, so that every slot starts as the next token does.

Legend: M targets, D width, S slots.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from gato.layers import FeedForward
from gato.model_config import ModelConfig


class JointHead(nn.Module):
    """A feed-forward layer over hidden states, modulated by the slot that is asked for."""

    def __init__(self, config: ModelConfig, slots: int) -> None:
        """Make the layer for slots 1 to `slots`; its size goes with the model's width."""
        super().__init__()
        self.scale = nn.Embedding(slots, config.width)
        self.shift = nn.Embedding(slots, config.width)
        self.ffn = FeedForward(replace(config, ffn_width=4 * config.width))
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draw the weights anew."""
        nn.init.zeros_(self.scale.weight)
        nn.init.normal_(self.shift.weight)  # as large as the states, which are normalised
        nn.init.normal_(self.ffn.up.weight, std=self.ffn.up.in_features**-0.5)
        nn.init.zeros_(self.ffn.down.weight)

    @property
    def slots(self) -> int:
        """The highest slot."""
        return self.scale.num_embeddings

    def forward(self, hidden: Tensor, slot: Tensor) -> Tensor:
        """Return states (..., D) for hidden states (..., D) and slots (...,) from 1."""
        index = slot - 1
        return hidden + self.ffn(hidden * (1.0 + self.scale(index)) + self.shift(index))
