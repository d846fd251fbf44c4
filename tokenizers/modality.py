"""The contract of a modality, and the registry that finds every modality by its file.

A modality turns values into tokens and back (numpy, pure, run in data workers) and may bring one
small `nn.Module` that embeds its payload rows on the device. It owns geometry and its decoding
grammar; it does not own order, positions or packing (the stream does) nor whether it is trained
on (the corpus does). Adding one file here with a class under `@register` adds a modality.

Legend: L values encoded at once, n tokens per value, D model width.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

if TYPE_CHECKING:  # listing tasks reads this file, and torch takes seconds to import
    from torch import nn

Spec = dict[str, Any]
"""JSON-able description of one value: shape, bounds, scales. Travels in the checkpoint."""


@dataclass
class Segment:
    """The tokens of L values of one modality, n tokens each."""

    ids: np.ndarray
    """int32 (L, n), local ids from 0; -1 where a token has no id."""
    rows: dict[str, np.ndarray] = field(default_factory=dict)
    """Payload by field, each (L, n, ...): one row per token."""


class Modality:
    """Base of all modalities; the host side of the contract."""

    name: ClassVar[str]
    predicts: ClassVar[Literal["ids"] | None] = "ids"
    """``ids`` where the model can emit the modality, None where it is only read."""
    vocabulary: int = 0
    """How many ids it owns in the shared vocabulary."""

    fits: ClassVar[bool] = False
    """Whether `fit` learns from data."""
    ordinal: ClassVar[bool] = False
    """Whether ids are in the order of values, so that targets may be spread over neighbours."""

    def count(self, spec: Spec) -> int | None:
        """Return n, the tokens per value; None where it depends on the value (text)."""
        raise NotImplementedError

    def encode(self, values: Any, spec: Spec, key: str = "value") -> Segment:
        """Return the tokens of L values. `values` is (L, ...); `key` names it in errors.

        Raises:
            ValueError: for a value outside the spec (NaN, infinite, wrong shape).
        """
        raise NotImplementedError

    def decode(self, ids: np.ndarray, spec: Spec) -> Any:
        """Return the value of one sequence of local ids (n,); total on what `allowed` admits."""
        raise NotImplementedError(f"{self.name} is read, never emitted")

    def allowed(self, prefix: np.ndarray, spec: Spec) -> tuple[int, int] | None:
        """Return the range [start, stop) of local ids that may follow; None when complete."""
        return None

    def ranges(self, spec: Spec) -> list[tuple[int, int]] | None:
        """Return what `allowed` says of every token of a value; None where an id decides another's.

        Where it says so, values are written many at once: `rows_of` is given (L, n) ids too.
        """
        return None

    def decode_many(self, ids: np.ndarray, spec: Spec) -> Any:
        """Return the values of L sequences of local ids (L, n)."""
        return [self.decode(one, spec) for one in ids]

    def rows_of(self, ids: np.ndarray, spec: Spec, first: int) -> dict[str, np.ndarray]:
        """Return the payload rows (n, ...) of emitted local ids, the first being token `first`."""
        return {}

    def describe(
        self, token: int, row: Mapping[str, np.ndarray], options: Mapping[str, Any]
    ) -> Any:
        """Return what a person reads for one token: a number, a string, a list or a dict of them.

        Args:
            token: its local id, -1 where it has none.
            row: its payload by field, empty where it has none.
            options: those that `net` is given.
        """
        return next((_readable(v) for v in row.values()), token)

    def example(self, rng: np.random.Generator) -> tuple[Any, Spec]:
        """Return (values with L = 2, spec); feeds the conformance tests."""
        raise NotImplementedError

    def fit(self, columns: Iterable[np.ndarray], spec: Spec) -> Spec:
        """Return `spec` with the scales that the data of `columns` asks for."""
        return spec

    def net(self, width: int, options: Mapping[str, Any]) -> nn.Module | None:
        """Return the embedder of payload rows, or None where ids suffice."""
        return None

    def state(self) -> dict[str, bytes]:
        """Return fitted parts by file name, saved in the checkpoint (a text model, say)."""
        return {}

    def load_state(self, state: Mapping[str, bytes]) -> None:
        """Restore what `state` returned."""


def _readable(array: np.ndarray) -> Any:
    """Return an array as numbers that JSON holds, rounded to what a person reads."""
    if array.dtype.kind != "f":
        return array.tolist()
    return (np.round(np.asarray(array, np.float64), 4) + 0.0).tolist()  # no minus zero


_REGISTRY: dict[str, type[Modality]] = {}


def register(cls: type[Modality]) -> type[Modality]:
    """Add a modality class to the registry under its name."""
    known = _REGISTRY.get(cls.name)
    if known is not None and known.__qualname__ != cls.__qualname__:
        raise ValueError(f"two modalities are called {cls.name!r}: {known} and {cls}; rename one")
    _REGISTRY[cls.name] = cls
    return cls


def modality_classes() -> dict[str, type[Modality]]:
    """Return every modality by name, found in this folder and in installed packages."""
    package = importlib.import_module("gato.tokenizers")
    for module in sorted(m.name for m in pkgutil.iter_modules(package.__path__)):
        importlib.import_module(f"gato.tokenizers.{module}")
    for entry in entry_points(group="gato.modalities"):
        entry.load()
    return dict(sorted(_REGISTRY.items()))


def require_finite(values: np.ndarray, key: str) -> None:
    """Raise ValueError naming `key` and the index of the first NaN or infinite entry."""
    finite = np.isfinite(values)
    if not finite.all():
        index = tuple(int(i) for i in np.argwhere(~finite)[0])
        raise ValueError(
            f"{key!r} must be finite; got {values[index]} at index {index} (the first index counts "
            f"steps). Repair the data or drop the episode."
        )
