"""Parts of a model by name: which parameters they have, and which of them are not to be changed.

The ``trunk`` is the blocks and the norm behind them, ``embedders`` are the nets of payload rows;
``table`` embeds ids, ``head`` makes logits where it is not tied to the table, ``local`` embeds
places inside a step; ``joint``, ``contrast`` and ``lora`` are what they are called.
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

PARTS = ("trunk", "embedders", "table", "head", "local", "joint", "contrast", "lora")
_PART_OF = {"blocks": "trunk", "norm": "trunk", "nets": "embedders"}


def part_of(name: str) -> str:
    """Return the part that a parameter belongs to.

    >>> part_of("blocks.0.ffn.up.weight"), part_of("nets.image.weight"), part_of("norm.weight")
    ('trunk', 'embedders', 'trunk')
    """
    if is_added(name):
        return "lora"
    first = name.partition(".")[0]
    return _PART_OF.get(first, first)


def is_added(name: str) -> bool:
    """Return whether a parameter is of what LoRA adds to a matrix."""
    return ".parametrizations." in name and not name.endswith(".original")


def plain(name: str) -> str:
    """Return a parameter's name as it is where LoRA adds nothing."""
    return name.replace(".parametrizations.", ".").removesuffix(".original")


def freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """Let parameters stay as they are: they get no gradient, and the optimizer holds none of them.

    Args:
        model: whose parameters they are.
        patterns: parts, or patterns over names such as ``blocks.0.*``.

    Raises:
        ValueError: where a pattern matches nothing, or nothing is left to train.
    """
    named = dict(model.named_parameters())
    for pattern in patterns:
        found = [n for n in named if part_of(n) == pattern or fnmatchcase(plain(n), pattern)]
        if not found:
            known = ", ".join(dict.fromkeys(map(part_of, named)))
            raise ValueError(
                f"freeze must name parts ({known}) or match parameters such as "
                f"{plain(next(iter(named)))}; {pattern!r} matches none"
            )
        for name in found:
            named[name].requires_grad_(False)
    if not any(p.requires_grad for p in named.values()):
        raise ValueError(f"freeze leaves nothing to train; got {', '.join(patterns)}")
