"""How a run is computed: compiled or not, on which shapes, with or without waiting for the device.

None of it decides what is trained, so it is no part of a run's configuration and may differ when a
run goes on; but sums come out otherwise in their last bits.

On static shapes two things more differ. The places inside patches that are drawn in training are
drawn for padding too, so they depend on the capacities, which checkpoints keep. And an embedder
whose modality is absent from a batch gets a gradient of zeros instead of none: its optimizer's
state fades, and it is decayed where it is.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from gato.model import GatoModel

COMPILE = ("auto", "yes", "no")


@dataclass(frozen=True)
class Execution:
    """Choices that are the device's to make unless somebody makes them."""

    compile: str = "auto"
    """``yes``, ``no`` or ``auto``: on a GPU."""
    backend: str = "inductor"
    """What compiles, by its name in ``torch.compile``."""
    static: bool | None = None
    """Whether all batches are padded to one shape; None does on a GPU and where it compiles."""
    lagged: bool | None = None
    """Whether a loss that is no number is read a step late; None does on a GPU. See `finite.py`."""
    ahead: bool | None = None
    """Whether the next batch is brought to the device while one is computed; None: on a GPU."""
    profile: int = 0
    """Steps to profile, once the first ones are over; 0 for none."""

    def __post_init__(self) -> None:
        if self.compile not in COMPILE:
            raise ValueError(f"compile must be one of {', '.join(COMPILE)}; got {self.compile!r}")
        if self.profile < 0:
            raise ValueError(f"profile must be at least 0 steps; got {self.profile}")

    def on(self, device: torch.device) -> Execution:
        """Return the choices with those made that were left to the device."""
        gpu = device.type == "cuda"
        compiled = self.compile == "yes" or (self.compile == "auto" and gpu)
        return replace(
            self,
            compile="yes" if compiled else "no",
            static=(gpu or compiled) if self.static is None else self.static,
            lagged=gpu if self.lagged is None else self.lagged,
            ahead=gpu if self.ahead is None else self.ahead,
        )

    def uncompiled(self) -> contextlib.AbstractContextManager[Any]:
        """Compute in what this returns as if nothing were compiled: on shapes that ever differ."""
        if self.compile != "yes":
            return contextlib.nullcontext()
        return torch.compiler.set_stance("force_eager")

    def describe(self, device: torch.device) -> str:
        """Return one line: whether the model is compiled, and why."""
        chosen = self.on(device)
        if chosen.compile == "no":
            why = "as asked" if self.compile == "no" else f"the default on a {device.type}"
            return f"model: not compiled ({why})"
        why = "as asked" if self.compile == "yes" else f"the default on a {device.type}"
        return f"model: blocks and embedders compiled by {self.backend} ({why}); static shapes"


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Let what compiles meanwhile not warn of what it does itself."""
    with warnings.catch_warnings():
        # torch's tracer asks whether what it is given has a gradient, and torch warns of it
        warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor")
        yield


def compile_parts(model: GatoModel, backend: str) -> None:
    """Let the model's blocks, embedders and losses be compiled when they are first called.

    Blocks share one graph however many there are, so that a deep model compiles no longer than a
    shallow one. Embedders of images are one graph where `static_shapes.py` has grouped these by
    their sizes; where it has not, what reads the sizes on the host breaks the graph.
    """
    model.compiled = True
    for block in model.blocks:
        block.compile(backend=backend, dynamic=False, fullgraph=True)
    for net in model.nets.values():
        net.compile(backend=backend, dynamic=False)
    model.target_nll = torch.compile(  # type: ignore[method-assign]
        model.target_nll, backend=backend, dynamic=False
    )
