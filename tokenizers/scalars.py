"""What every modality of real numbers shares: normalisation, bins, and embedding by value.

Measured (Meta-World reach, same data and steps): an id table alone reaches 0.10 success, numeric
features of the value beside it 0.90. So scalars enter by value and leave by bin.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor, nn

from gato.tokenizers.modality import Spec

BINS = 1024
MU, M = 100.0, 256.0  # Gato section 2.1


def mu_law(x: np.ndarray) -> np.ndarray:
    """Return sgn(x) log(mu |x| + 1) / log(mu M + 1), clipped to [-1, 1] (Gato section 2.1)."""
    wide = np.asarray(x, np.float64)
    squeezed = np.log1p(MU * np.minimum(np.abs(wide), M)) / math.log1p(MU * M)
    return np.copysign(squeezed, wide)


def inverse_mu_law(y: np.ndarray) -> np.ndarray:
    """Return x with mu_law(x) == y, for y in [-1, 1]."""
    return np.sign(y) * np.expm1(np.abs(y) * math.log1p(MU * M)) / MU


def to_bin(unit: np.ndarray) -> np.ndarray:
    """Return the bin 0..1023 of values in [-1, 1]; +1.0 falls in the last bin."""
    return np.clip(np.floor((unit + 1.0) * (BINS / 2)), 0, BINS - 1).astype(np.int32)


def bin_centre(bins: np.ndarray) -> np.ndarray:
    """Return the centre, in (-1, 1), of each bin."""
    return (np.asarray(bins, np.float64) + 0.5) * (2.0 / BINS) - 1.0


def normalise(flat: np.ndarray, spec: Spec) -> np.ndarray:
    """Return values (L, d) scaled as ``spec["codec"]`` says; [low, high] becomes [-1, 1]."""
    if spec["codec"] == "mu_law":
        return mu_law(flat)
    middle, half = _middle_and_half(spec)
    with np.errstate(over="ignore"):  # what lies that far outside may become infinite
        unit = (flat.astype(np.float64) - middle) / np.where(half > 0, half, 1.0)
    return np.where(half > 0, unit, 0.0)


def denormalise(unit: np.ndarray, spec: Spec) -> np.ndarray:
    """Return the values (d,) whose normalised form is `unit`."""
    if spec["codec"] == "mu_law":
        return inverse_mu_law(unit)
    middle, half = _middle_and_half(spec)
    return middle + unit * half


def _middle_and_half(spec: Spec) -> tuple[np.ndarray, np.ndarray]:
    """Return (low + high) / 2 and (high - low) / 2, also where low + high would overflow."""
    low, high = np.array(spec["low"], np.float64) / 2, np.array(spec["high"], np.float64) / 2
    return low + high, high - low


def quantile_scales(columns: Iterable[np.ndarray], spec: Spec) -> Spec:
    """Return `spec` scaled per dimension so that 98% of the data lies within [-1, 1]."""
    data = np.concatenate([np.asarray(c, np.float64).reshape(len(c), -1) for c in columns])
    low, high = np.quantile(data, [0.01, 0.99], axis=0)
    return {**spec, "codec": "quantile", "low": low.tolist(), "high": high.tolist()}


class ValueFeatures(nn.Module):
    """Fourier features of numbers around [-1, 1]: x, sin and cos of pi x 2^k for k = -1 .. 6."""

    octaves = range(-1, 7)
    size = 1 + 2 * len(octaves)

    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        scale = torch.tensor([math.pi * 2.0**k for k in self.octaves])
        self.register_buffer("scale", scale, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return features (..., size) of values (...)."""
        angles = x.unsqueeze(-1) * self.scale
        return torch.cat([x.unsqueeze(-1), angles.sin(), angles.cos()], -1)
