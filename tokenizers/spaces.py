"""Which modality a leaf space becomes: `singledispatch` over Gymnasium's spaces."""

from __future__ import annotations

from dataclasses import dataclass
from functools import singledispatch

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from gato.tokenizers.cells import LARGE, PATCH, stacked
from gato.tokenizers.modality import Spec

STACK = 16
"""The most images that one observation may be a stack of."""


@dataclass(frozen=True)
class CodecOptions:
    """Choices among codecs; a preset fixes them and the checkpoint records them."""

    observations: str = "scalar"
    """``scalar``: Gato's one token per number. ``vector``: groups of numbers in one token."""
    vector_group: int = 13
    """Scalars per vector token."""
    symbol_size: int = 16
    """Values per integer of a symbol token; larger spaces fall back to one token per integer."""
    symbol_axes: int = 1
    """Trailing axes of an integer tensor that make up one symbol token."""
    symbol_group: int = 3
    """Integers per symbol token; tensors with other groups get one token per integer."""
    scales: str = "quantile"
    """``quantile`` (fitted, stored) or ``mu_law`` (Gato) for observed real numbers."""
    frame_cell: int = 16
    """Pixels along the side of the cell that one token shows of what a task observes: 16, 32 or 64.
    Pictures in documents and conversations keep Gato's 16."""
    text_tokens: int = 64
    """The most tokens a generated text action may have."""

    def __post_init__(self) -> None:
        if self.observations not in ("scalar", "vector"):
            raise ValueError(f"observations must be scalar or vector; got {self.observations!r}")
        if self.scales not in ("quantile", "mu_law"):
            raise ValueError(f"scales must be quantile or mu_law; got {self.scales!r}")
        if self.vector_group < 1:
            raise ValueError(f"vector_group must be at least 1; got {self.vector_group}")
        if self.frame_cell not in (PATCH, *LARGE):
            known = ", ".join(map(str, (PATCH, *LARGE)))
            raise ValueError(f"frame_cell must be one of {known}; got {self.frame_cell!r}")


@singledispatch
def codec(space: gym.Space, role: str, options: CodecOptions, key: str) -> tuple[str, Spec]:
    """Return (modality name, spec) of a leaf `space` in a role, ``observation`` or ``action``.

    Raises:
        TypeError: for a space no modality reads.
        ValueError: for an action Box with infinite bounds, or a stack of too many images.
    """
    raise TypeError(
        f"{key!r}: expected a Box, Discrete, MultiDiscrete, MultiBinary or Text space; got "
        f"{type(space).__name__}. Wrap the environment so that its spaces are among these."
    )


@codec.register
def _box(space: spaces.Box, role: str, options: CodecOptions, key: str) -> tuple[str, Spec]:
    shape = list(space.shape)
    if role == "action":
        if not space.is_bounded():
            raise ValueError(
                f"{key!r}: an action Box must have finite bounds to be binned; got {space}. "
                f"Wrap the environment with gymnasium.wrappers.RescaleAction or ClipAction."
            )
        low, high = (b.reshape(-1).astype(float).tolist() for b in (space.low, space.high))
        spec = {"shape": shape, "codec": "uniform", "bounded": True, "low": low, "high": high}
        return "continuous", {**spec, "dtype": str(space.dtype)}
    if _is_image(space):
        if (count := stacked(shape)[0]) > STACK:
            raise ValueError(
                f"{key!r}: a stack holds at most {STACK} images; got {count}, of shape {shape}. "
                f"Stack fewer, the stack's axis first; where these are no images, wrap the "
                f"environment so that they are real numbers (gymnasium.wrappers.DtypeObservation)."
            )
        if options.frame_cell == PATCH:
            return "image", {"shape": shape}
        return "frame", {"shape": shape, "cell": options.frame_cell}
    if options.observations == "vector":
        return "vector", {
            "shape": shape,
            "group": options.vector_group,
            "codec": "mu_law",  # until fitted on data, if it is to be
            "fitted": options.scales == "quantile",
        }
    return "continuous", {"shape": shape, "codec": options.scales, **_unit(space, options)}


def _unit(space: spaces.Box, options: CodecOptions) -> Spec:
    if options.scales == "mu_law":
        return {}
    n = int(np.prod(space.shape, dtype=np.int64))
    return {"low": [-1.0] * n, "high": [1.0] * n}  # until fitted on data


def _is_image(space: spaces.Box) -> bool:
    """Return whether a Box holds an image, or a stack of them."""
    if space.dtype != np.uint8 or len(space.shape) not in (2, 3, 4):
        return False
    shape = stacked(space.shape)[1]
    if shape != space.shape and space.high.max() != 255:
        return False  # planes of a board, not pictures
    depth = len(shape) == 2 or shape[2] in (1, 3)
    return depth and min(shape[:2]) >= PATCH


@codec.register
def _discrete(
    space: spaces.Discrete, role: str, options: CodecOptions, key: str
) -> tuple[str, Spec]:
    return "discrete", {"shape": [], "sizes": [int(space.n)], "start": int(space.start)}


@codec.register
def _multi_discrete(
    space: spaces.MultiDiscrete, role: str, options: CodecOptions, key: str
) -> tuple[str, Spec]:
    shape, size = list(space.nvec.shape), int(space.nvec.max())
    start = space.start.reshape(-1).tolist() if space.start.any() else 0
    group = int(np.prod(shape[-options.symbol_axes :]))
    small = size <= options.symbol_size and len(shape) > options.symbol_axes
    fits = small and group == options.symbol_group and start == 0
    if role == "observation" and options.observations == "vector" and fits:
        return "symbols", {"shape": shape, "group": group, "size": options.symbol_size}
    return "discrete", {"shape": shape, "sizes": space.nvec.reshape(-1).tolist(), "start": start}


@codec.register
def _multi_binary(
    space: spaces.MultiBinary, role: str, options: CodecOptions, key: str
) -> tuple[str, Spec]:
    shape = list(space.shape)
    return "discrete", {"shape": shape, "sizes": [2] * int(np.prod(shape)), "start": 0}


@codec.register
def _text(space: spaces.Text, role: str, options: CodecOptions, key: str) -> tuple[str, Spec]:
    return "text", {"max_tokens": min(int(space.max_length), options.text_tokens)}
