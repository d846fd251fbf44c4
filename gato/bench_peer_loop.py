"""A plain loop of the shape of the strongest open peer's, JAT (Gallouédec et al. 2024).

Written after the description of that project (arXiv 2402.09844), in plain PyTorch: what `gato bench
peer` is measured beside. One embedding of what is observed and one of the action a step; a causal
transformer in float32 with learned positions; batches of one; keys and values grown by
concatenation and cut off at the window. It is no slower than the original, see the lab log.

    read at step t    observation t-1 | action t-1 | observation t | no action yet
    remembered        all of it but the last two, at most `window` of them

Like the peer, it reads the step before once more, predicts the next observation beside the action,
repeats numbers until they are 377, and takes integers for words of a vocabulary of 50,257. A loop
that is `lean` does none of this: what the shape could do without its habits.

Legend: B rows, L steps, T = 2 L embeddings, D width, H heads, K head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

NUMBERS, WORDS, POSITIONS = 377, 50_257, 512
OBSERVED, ACTIONS, BUTTONS = 39, 4, 18
SIDE, STACK = 84, 4
"""Pixels along a frame's side, and frames seen at once."""

Past = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Trunk:
    """The size of a transformer; the feed-forward layer is four times as wide."""

    width: int
    layers: int
    head_dim: int

    @property
    def heads(self) -> int:
        return self.width // self.head_dim


SMALL, LARGE = Trunk(128, 4, 32), Trunk(768, 12, 64)


class Block(nn.Module):
    """One pre-norm transformer block."""

    def __init__(self, trunk: Trunk) -> None:
        super().__init__()
        width, self.trunk = trunk.width, trunk
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, mask: Tensor, past: tuple[Tensor, Tensor] | None) -> Any:
        """Return x (B, T, D) and all keys and values (B, H, S, K)."""
        B, T, D = x.shape
        qkv = self.qkv(self.norm1(x)).view(B, T, 3, self.trunk.heads, self.trunk.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, T, K)
        if past is not None:
            k, v = torch.cat((past[0], k), 2), torch.cat((past[1], v), 2)
        scores = torch.baddbmm(mask, q.flatten(0, 1), k.flatten(0, 1).mT)  # (B * H, T, S)
        seen = scores.softmax(-1) @ v.flatten(0, 1)
        x = x + self.out(seen.view(B, -1, T, self.trunk.head_dim).transpose(1, 2).reshape(B, T, D))
        x = x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))
        return x, (k, v)


class Attended(nn.Module):
    """A channel's weight, decided by the means of all channels (squeeze and excitation)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.down = nn.Linear(channels, channels // 8, bias=False)
        self.up = nn.Linear(channels // 8, channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.up(self.down(x.mean((2, 3))).relu()).sigmoid()
        return x * weight[:, :, None, None]


def frame_encoder(width: int) -> nn.Module:
    """Return a net from four frames of 84 x 84 to one embedding."""
    layers: list[nn.Module] = []
    for a, b in ((STACK, 32), (32, 64), (64, 128)):
        layers += [nn.Conv2d(a, b, 3, 2, 1), nn.InstanceNorm2d(b), nn.LeakyReLU(), Attended(b)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(128 * 11 * 11, width))


def frame_decoder(width: int) -> nn.Module:
    """Return a net from one state to four frames of 88 x 88, of which 84 x 84 count."""
    layers: list[nn.Module] = [nn.Linear(width, 128 * 11 * 11), nn.Unflatten(1, (128, 11, 11))]
    for a, b in ((128, 64), (64, 32)):
        layers += [nn.ConvTranspose2d(a, b, 3, 2, 1, 1), nn.InstanceNorm2d(b), nn.LeakyReLU()]
        layers.append(Attended(b))
    return nn.Sequential(*layers, nn.ConvTranspose2d(32, STACK, 3, 2, 1, 1), nn.Tanh())


class Peer(nn.Module):
    """Two embeddings a step, a plain trunk, and what is predicted from its states."""

    def __init__(self, trunk: Trunk, *, frames: bool, lean: bool = False) -> None:
        """Make the model.

        Args:
            trunk: its size.
            frames: whether frames are seen and one button of 18 is pressed; else 39 numbers are
                seen and 4 given.
            lean: without the peer's habits, see above.
        """
        super().__init__()
        width = trunk.width
        self.trunk, self.frames, self.lean = trunk, frames, lean
        self.seen = NUMBERS if not lean else OBSERVED + 1
        acted = (BUTTONS if frames else ACTIONS) if lean else (WORDS if frames else NUMBERS)
        self.encode: nn.Module = frame_encoder(width) if frames else nn.Linear(self.seen, width)
        self.act_in: nn.Module = nn.Embedding(acted, width) if frames else nn.Linear(acted, width)
        self.act_out = nn.Linear(width, acted, bias=not frames)
        self.decode: nn.Module = frame_decoder(width) if frames else nn.Linear(width, self.seen)
        if not (frames or lean):  # one map of numbers, whether they are observed or acted
            self.act_in, self.decode = self.encode, self.act_out
        self.place = nn.Embedding(POSITIONS, width)
        self.blocks = nn.ModuleList(Block(trunk) for _ in range(trunk.layers))
        self.norm = nn.LayerNorm(width)

    def embed_observed(self, observed: Tensor) -> Tensor:
        """Return (B, L, D) for numbers (B, L, 40), the reward among them, or for frames."""
        if self.frames:
            x: Tensor = self.encode(observed.flatten(0, 1))
            return x.view(*observed.shape[:2], -1)
        return self.encode(self.repeated(observed))

    def embed_acted(self, acted: Tensor) -> Tensor:
        """Return (B, L, D) for numbers (B, L, 4) or for buttons (B, L)."""
        return self.act_in(acted if self.frames else self.repeated(acted))

    def repeated(self, numbers: Tensor) -> Tensor:
        """Return numbers (..., n) repeated until they are as many as the map takes."""
        if self.lean:
            return numbers
        n = numbers.shape[-1]
        return numbers.repeat(*[1] * (numbers.dim() - 1), -(-NUMBERS // n))[..., :NUMBERS]

    def run(self, x: Tensor, past: Past | None = None) -> tuple[Tensor, Past]:
        """Return states (B, T, D) of new embeddings, and all keys and values."""
        B, T = x.shape[:2]
        before = 0 if not past else past[0][0].shape[2]
        x = x + self.place.weight[before : before + T]
        full = x.new_full((T, before + T), -torch.inf).triu_(before + 1)
        mask = full.expand(B * self.trunk.heads, -1, -1)
        now: Past = []
        for i, block in enumerate(self.blocks):
            x, kept = block(x, mask, past[i] if past else None)
            now.append(kept)
        return self.norm(x), now

    def loss(self, observed: Tensor, acted: Tensor) -> Tensor:
        """Return the loss of actions, and of observations in so far as the peer has one."""
        x = torch.stack((self.embed_observed(observed), self.embed_acted(acted)), 2)
        states, _ = self.run(x.flatten(1, 2))
        decided = self.act_out(states[:, ::2])
        if self.frames:
            loss = F.cross_entropy(decided.flatten(0, 1), acted.flatten())
        else:
            loss = F.mse_loss(decided, self.repeated(acted))
        if self.lean:
            return loss
        expected = self._expected(states[:, 1:-1:2])
        target = observed[:, 1:] if self.frames else self.repeated(observed[:, 1:])
        return 0.995 * loss + 0.005 * F.mse_loss(expected, target)

    def _expected(self, states: Tensor) -> Tensor:
        """Return the next observation behind each action's state (B, L, D)."""
        if not self.frames:
            return self.decode(states)
        x: Tensor = self.decode(states.flatten(0, 1))
        return x[..., :SIDE, :SIDE].view(*states.shape[:2], STACK, SIDE, SIDE)

    @property
    def nothing(self) -> Tensor:
        """The action that stands where none is decided yet."""
        return torch.zeros(1, 1, dtype=torch.int64) if self.frames else torch.zeros(1, 1, ACTIONS)


class PeerAgent:
    """One episode under way: a batch of one and a memory that is concatenated at every step."""

    def __init__(self, model: Peer, window: int) -> None:
        """Start with an empty memory of at most `window` embeddings."""
        self.model, self.window = model, window
        self.past: Past | None = None
        self.last: tuple[Tensor, Tensor] | None = None

    @torch.no_grad()
    def act(self, observation: np.ndarray, reward: float = 0.0) -> Any:
        """Return the action: numbers, or a button drawn from its distribution."""
        model, device = self.model, self.model.place.weight.device
        if model.frames:
            seen = torch.from_numpy(observation).to(device).permute(2, 0, 1).float() / 127.5 - 1
        else:
            seen = torch.from_numpy(np.append(observation, np.float32(reward))).to(device)
        seen = seen[None, None]  # (1, 1, ...)
        states = (self._lean if model.lean else self._whole)(seen)
        decided = model.act_out(states)[0]  # (1, ids) or, of both steps that were read, (2, ids)
        decided = decided[-1, : BUTTONS if model.frames else ACTIONS]
        if model.frames:
            acted = torch.multinomial(decided.softmax(-1), 1)[None]
            action: Any = int(acted)
        else:
            acted, action = decided[None, None], decided.tolist()
        self.last = seen, acted
        return action

    def _whole(self, seen: Tensor) -> Tensor:
        """Read the last step again, then this one; return the states of what was observed."""
        model, acted = self.model, self.model.nothing.to(seen.device)
        if self.last is not None:
            seen = torch.cat((self.last[0], seen), 1)
            acted = torch.cat((self.last[1], acted), 1)
        x = torch.stack((model.embed_observed(seen), model.embed_acted(acted)), 2)
        states, now = model.run(x.flatten(1, 2), self.past)
        model._expected(states[:, 1::2])
        self.past = [(self._cut(k[:, :, :-2]), self._cut(v[:, :, :-2])) for k, v in now]
        return states[:, ::2]

    def _lean(self, seen: Tensor) -> Tensor:
        """Read the last action, then what is observed; return the state of the latter."""
        x = self.model.embed_observed(seen)
        if self.last is not None:
            x = torch.cat((self.model.embed_acted(self.last[1]), x), 1)
        states, now = self.model.run(x, self.past)
        self.past = [(self._cut(k), self._cut(v)) for k, v in now]
        return states[:, -1:]

    def _cut(self, kept: Tensor) -> Tensor:
        return kept[:, :, -self.window :]
