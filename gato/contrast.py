"""What tells which words belong to which picture: a small head beside the logits, and its loss.

The state after what is shown and the state after what is said are each projected to a unit vector;
pairs that belong together come close, those of one batch that do not are pushed apart (CLIP,
Radford et al. 2021, arXiv 2103.00020). Where several pictures of a batch have the same words, each
of them is right for those words and none is pushed away (UniCL, Yang et al. 2022, arXiv
2204.03610): words stand once in what a process reads at a time, however often they are said.

Legend: I shown, U different texts, D width of the trunk, E of the embedding.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDEST = 512
"""Of an embedding; narrower trunks have one of their own width."""
SHARPEST = 100.0
"""The similarities' largest factor (as in CLIP)."""
_FIRST = 10.0  # the factor to begin with


class ContrastHead(nn.Module):
    """Two linear maps to unit vectors, and the factor of their similarity."""

    def __init__(self, width: int) -> None:
        """Make the head of a trunk of that width."""
        super().__init__()
        size = min(width, WIDEST)
        self.shown = nn.Linear(width, size, bias=False)
        self.said = nn.Linear(width, size, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(math.log(_FIRST)))
        for linear in (self.shown, self.said):
            nn.init.normal_(linear.weight, std=width**-0.5)

    def embed_shown(self, states: Tensor) -> Tensor:
        """Return unit vectors (..., E) of states (..., D) after what is shown."""
        return F.normalize(F.linear(states.float(), self.shown.weight), dim=-1)

    def embed_said(self, states: Tensor) -> Tensor:
        """Return unit vectors (..., E) of states (..., D) after what is said."""
        return F.normalize(F.linear(states.float(), self.said.weight), dim=-1)

    @property
    def scale(self) -> Tensor:
        """The factor of similarities, a scalar."""
        return self.log_scale.clamp(max=math.log(SHARPEST)).exp()

    @torch.no_grad()
    def bound(self) -> None:
        """Bring the factor back to its bound after a step; beyond, it would have no gradient."""
        self.log_scale.clamp_(max=math.log(SHARPEST))

    def forward(self, shown: Tensor, said: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss (I,) of each pair, and whether its words come first for it (I,).

        Args:
            shown: (I, D) states.
            said: (U, D) states, of texts that differ.
            which: (I,) the text that each of what is shown has.
        """
        with torch.autocast(shown.device.type, enabled=False):
            near = self.scale * self.embed_shown(shown) @ self.embed_said(said).T  # (I, U)
        return pair_losses(near, which), near.argmax(1) == which


def pair_losses(near: Tensor, which: Tensor) -> Tensor:
    """Return (I,): the mean of both directions' cross-entropies, 0 where all is as it should be.

    Towards words, what is shown has one right text. Towards what is shown, a text has its m right
    ones alike, which are at best 1/m each: the -log of that is taken off.

    Args:
        near: (I, U) similarities, scaled.
        which: (I,) the text of each row.
    """
    own = near.gather(1, which[:, None]).squeeze(1)
    alike = torch.zeros_like(near[0]).index_add_(0, which, torch.ones_like(own))  # (U,)
    to_said = near.logsumexp(1) - own
    to_shown = near.logsumexp(0)[which] - own - alike[which].log()
    return (to_said + to_shown) / 2
