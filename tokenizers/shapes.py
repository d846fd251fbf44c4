"""Few shapes instead of many, where numbers of rows differ from batch to batch.

Kernels are chosen, and on a CPU in bf16 compiled and kept, for every shape they meet: a run whose
batches hold ever other numbers of images and targets grows by gigabytes (oneDNN keeps about 0.7 MB
a shape).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

ROWS = 64
"""Rows of payload are embedded in multiples of so many while training."""


def in_blocks(compute: Callable[[Tensor], Tensor], x: Tensor, block: int) -> Tensor:
    """Return ``compute(x)`` (n, ...) of x (n, ...), computed on rows up to a multiple of `block`.

    Args:
        compute: what works on every row alone.
        x: (n, ...); rows of zeros are appended, and what they give is cut off again.
        block: of rows.
    """
    missing = -len(x) % block
    if not missing:
        return compute(x)
    return compute(torch.cat([x, x.new_zeros(missing, *x.shape[1:])]))[: len(x)]
