"""Token sequences of different lengths as one padded chunk for the decoder.

Legend: B rows, Q tokens of the chunk, D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from gato.model import GatoModel
from gato.tokenizers.stream import TokenSequence, concatenate


def embed_chunk(
    model: GatoModel, sequences: Sequence[TokenSequence], pad: int, masked: int
) -> tuple[Tensor, Tensor]:
    """Return embeddings (B, Q, D) of B sequences, padded at their ends, and their lengths (B,)."""
    device = model.table.weight.device
    lengths = np.array([len(s) for s in sequences])
    B, Q = len(sequences), int(lengths.max())
    inputs = np.full((B, Q), pad, np.int64)
    local = np.zeros((B, Q), np.int64)
    for i, s in enumerate(sequences):
        inputs[i, : len(s)] = s.ids if s.hidden is None else np.where(s.hidden, masked, s.ids)
        local[i, : len(s)] = s.local
    joined = concatenate([_rows_only(s) for s in sequences]).payload
    starts = np.cumsum(lengths) - lengths
    payload = {}
    for name, rows in joined.items():
        row = np.searchsorted(starts, rows["at"], side="right") - 1
        at = rows["at"] - starts[row] + row * Q
        fields = {k: torch.from_numpy(np.ascontiguousarray(v)) for k, v in rows.items()}
        payload[name] = {k: v.to(device) for k, v in fields.items()}
        payload[name]["at"] = torch.from_numpy(at).to(device)
    flat = (torch.from_numpy(a.reshape(-1)).to(device) for a in (inputs, local))
    x = model.embed(*flat, payload).view(B, Q, -1)
    return x, torch.from_numpy(lengths).to(device)


def _rows_only(sequence: TokenSequence) -> TokenSequence:
    return TokenSequence(
        sequence.ids, sequence.modality, sequence.local, sequence.target, sequence.payload
    )


def sample(logits: Tensor, low: np.ndarray, high: np.ndarray, settings: Sampling) -> np.ndarray:
    """Return one id per row (B,), drawn from [low, high) of logits (B, V)."""
    ids = torch.arange(logits.shape[1], device=logits.device)
    bounds = torch.from_numpy(np.stack([low, high])).to(logits.device)
    outside = (ids < bounds[0, :, None]) | (ids >= bounds[1, :, None])
    masked = logits.float().masked_fill(outside, -torch.inf)
    return settings.choose(masked).cpu().numpy()


class Sampling:
    """How ids are drawn: one temperature and one random generator per row.

    A row's draws depend on its own generator alone, not on its neighbours in the batch.
    """

    def __init__(
        self, temperature: Sequence[float], seeds: Sequence[int], top_p: float = 1.0
    ) -> None:
        if not 0.0 < top_p <= 1.0 or any(t < 0 for t in temperature):
            raise ValueError(
                f"temperature must not be negative and top_p must be in (0, 1]; got {temperature} "
                f"and {top_p}"
            )
        self.temperature = np.array(temperature, np.float32)
        self.top_p = top_p
        self.generators = [np.random.default_rng(seed) for seed in seeds]

    def choose(self, logits: Tensor) -> Tensor:
        """Return (B,) ids; logits (B, V) are -inf where an id is not allowed."""
        if not self.temperature.any():
            return logits.argmax(-1)
        warm = torch.from_numpy(self.temperature).to(logits.device)[:, None]
        scaled = logits / warm.clamp(min=1e-6)
        if self.top_p < 1.0:
            scaled = _nucleus(scaled, self.top_p)
        uniform = np.stack([g.random(logits.shape[1], np.float32) for g in self.generators])
        noise = -np.log(-np.log(np.clip(uniform, 1e-20, 1 - 1e-7)))  # Gumbel
        drawn = (scaled + torch.from_numpy(noise).to(logits.device)).argmax(-1)
        return torch.where(warm[:, 0] > 0, drawn, logits.argmax(-1))


def _nucleus(logits: Tensor, top_p: float) -> Tensor:
    """Return logits with all but the smallest set of ids of mass `top_p` at -inf."""
    ordered, order = logits.sort(-1, descending=True)
    mass = ordered.softmax(-1).cumsum(-1)
    beyond = mass - ordered.softmax(-1) >= top_p
    return torch.full_like(logits, -torch.inf).scatter(
        -1, order, ordered.masked_fill(beyond, -torch.inf)
    )
