"""One step of training: forward, backward, sum over processes, look, update.

Every part of a batch is computed by itself and gradients add up. Before the weights are touched it
is known that the loss and the gradient are numbers: on a CPU because the host looks, on a GPU
because the update is kept from happening there, see `gato.finite`. On a GPU the host waits for the
device nowhere in a step.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gato.bad_batch import NonFiniteLossError, Part, refuse
from gato.checkpoint import build_model
from gato.config import TrainConfig
from gato.corpora import open_corpus
from gato.distributed import World
from gato.execution import Execution, compile_parts, quietly
from gato.feed import Fed, Feed
from gato.finite import Gate, Losses
from gato.flops import FlopCounter
from gato.mixture import Mixture
from gato.model import GatoModel
from gato.optim import Average, Optimizers
from gato.parts import freeze
from gato.static_shapes import MEASURED, Capacities, Key
from gato.telling import tell
from gato.tokenizers.serializer import Serializer
from gato.tokenizers.stream import TokenBatch

Begin = Callable[[GatoModel, Serializer], Sequence[str]]
"""Puts into a new model the weights that it is to begin with; returns what is to be told."""


class Stepper:
    """What a step of a run needs and changes."""

    def __init__(
        self,
        config: TrainConfig,
        run: Path,
        device: torch.device,
        serializer: Serializer,
        world: World | None = None,
        execution: Execution | None = None,
        begin: Begin | None = None,
    ) -> None:
        self.config, self.folder, self.device, self.serializer = config, run, device, serializer
        self.world = world or World()
        self.execution = (execution or Execution()).on(device)
        self.share = self.world.share(config.parts)
        torch.manual_seed(config.seed)
        model = build_model(config, serializer)
        if begin is not None:
            for note in begin(model, serializer):
                if self.world.rank == 0:
                    tell(note)
        freeze(model, config.freeze)
        self.model = model.to(device).train()
        spans = {name: serializer.layout.span(name) for name, _ in serializer.layout.ranges}
        self.optimizers = Optimizers(self.model, config.optim, spans)
        if self.optimizers.idle and self.world.rank == 0:
            idle = ", ".join(self.optimizers.idle)
            tell(f"optim.rates of {idle} do nothing: this run trains nothing of that name")
        self.average = Average(self.model, config.ema) if config.ema else None
        self.names = {id(p): n for n, p in self.model.named_parameters()}
        self.corpora = [open_corpus(c, serializer) for c in config.corpora]
        self.mixture = Mixture.of(config, self.corpora, serializer)
        self.step = 0
        # per corpus: loss and targets; where pairs are matched also loss, right ones and all
        kinds = 2 if self.model.contrast is None else 5
        self.sums = torch.zeros(kinds, len(self.mixture.names), dtype=torch.float64, device=device)
        self.flops = FlopCounter(self.model)
        self.work = 0.0
        """Model FLOPs of this process's parts since the last line of losses."""
        self.dtype = compute_dtype(config.precision, device)
        self.ordinal = serializer.ordinal_span()
        self.gate = Gate(device) if self.execution.lagged else None
        self.capacities: Capacities | None = None
        self._compiled_for: dict[Key, int] | None = None
        if self.execution.compile == "yes":
            compile_parts(self.model, self.execution.backend)
        self.prepare()

    def prepare(self) -> None:
        """Make what a loop around the steps needs beside them."""

    def measured(self) -> Capacities | None:
        """Return the shape of all batches, measured on the first ones, where shapes are static."""
        if self.execution.static and self.capacities is None:
            self.capacities = self.room()
            first = range(min(MEASURED, self.config.steps))
            self.capacities.measure(self.mixture.part(k, p) for k in first for p in self.share)
            self.agree()
        return self.capacities

    def agree(self) -> None:
        """Let every process have room for the largest batch of any, where shapes are static."""
        if self.capacities is not None and self.world.size > 1:
            states = self.world.from_all(json.dumps(self.capacities.state()))
            self.capacities.load(*map(json.loads, states))

    def room(self) -> Capacities:
        """Return capacities that have seen nothing yet; those of one process tell."""
        return Capacities(len(self.mixture.names), tell if self.world.rank == 0 else lambda _: None)

    def train_step(self, *parts: TokenBatch | Fed) -> None:
        """Take one optimizer step on this process's parts of a batch from the mixture."""
        n = len(self.mixture.names)
        told = torch.zeros(1 + self.sums.numel(), dtype=torch.float64, device=self.device)
        losses, drawn = [], []
        for part, batch in zip(self.share, parts, strict=False):
            given = batch.given if isinstance(batch, Fed) else self._given(batch)
            drawn.append(batch.drawn if isinstance(batch, Fed) else batch)
            with self._perhaps_compiling():
                loss, nll, corpus, matched = self._backward(part, given)
            losses.append((nll, corpus))
            # one row more for the targets of padding, which belong to no corpus
            sums = torch.zeros(len(self.sums), n + 1, dtype=torch.float64, device=self.device)
            sums[0].index_add_(0, corpus, nll.double())
            sums[1].index_add_(0, corpus, torch.ones_like(nll, dtype=torch.float64))
            if given.matches is not None:
                sums[2:].index_add_(1, given.matches.corpus, matched)
            told[0] += loss
            told[1:] += sums[:, :n].flatten()
            self.work += self.flops.of(drawn[-1])
        self.world.sum(told)
        self.world.sum_gradients(self.optimizers.parameters)
        self._update(told, drawn, losses)

    def _perhaps_compiling(self) -> contextlib.AbstractContextManager[Any]:
        """Keep the compiler's warnings to itself where shapes are new.

        Only there: whoever changes filters lets everything that was warned of be warned of again.
        """
        sizes = None if self.capacities is None else dict(self.capacities.sizes)
        if self.execution.compile != "yes" or (sizes is not None and sizes == self._compiled_for):
            return contextlib.nullcontext()
        self._compiled_for = sizes
        return quietly()

    def _given(self, batch: TokenBatch) -> TokenBatch:
        (fed,) = Feed(iter([batch]), 1, self.device, self.measured(), ahead=True).take()
        assert isinstance(fed, Fed)
        return fed.given  # what is still on its way there the device waits for by itself

    def _backward(self, part: int, batch: TokenBatch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Add a part's gradients; return its share of the loss, its targets' losses and corpora.

        Last come, of its matched pairs, (3, I): the loss, whether it is right, and ones.
        """
        # Convention: every step and part draws its random numbers anew from (seed, step, part).
        torch.manual_seed(self.config.seed * 1_000_003 + self.step + part * 1_000_000_007)
        tensors = batch.to(self.device, non_blocking=True)
        spread = self.config.model.soft_bins
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            hidden = self.model(tensors)  # (N, D)
            nll = self.model.batch_nll(hidden, tensors, self.ordinal, spread)  # (M,)
        tokens = self.config.rows * self.config.model.context
        loss = (nll * tensors.target_weight).sum() / tokens
        told = torch.zeros(0)
        if tensors.matches is not None:
            apart, right = self.model.match(hidden, tensors.matches)  # (I,)
            loss = loss + (apart * tensors.matches.weight).mean() / self.config.parts
            told = torch.stack([apart.detach(), right, torch.ones_like(apart)]).double()
        loss.backward()
        return loss.detach(), nll.detach(), tensors.target_corpus, told

    def _update(self, told: Tensor, drawn: Sequence[TokenBatch], losses: Sequence[Losses]) -> None:
        """Change the weights, where the loss and the gradient are numbers."""
        norm, closed = self.optimizers.norm(), None
        if self.gate is not None:
            closed = self.gate.ask(self.step, told[0], norm, drawn, losses)
            told = torch.where(closed > 0, 0.0, told)
        else:
            loss, length = torch.stack([told[0], norm.double()]).tolist()
            if not (math.isfinite(loss) and math.isfinite(length)):
                raise self._refuse(self.step, loss, length, drawn, losses)
        rate = self.config.optim.rate(self.step, self.config.steps)
        self.optimizers.step(rate, norm, closed)
        if self.model.contrast is not None:
            self.model.contrast.bound()
        if self.average is not None:
            self.average.update(self.step, closed)
        self.step += 1
        self.sums += told[1:].view_as(self.sums)
        self.settle(unread=1)

    def settle(self, unread: int = 0) -> None:
        """Make sure that the steps so far were taken, but for the newest `unread`.

        Raises:
            NonFiniteLossError: where one was not, and the ones after it neither.
        """
        asked = None if self.gate is None else self.gate.refused(unread)
        if asked is not None:
            self.step = asked.step
            raise self._refuse(asked.step, *asked.told, asked.batches, asked.losses)

    def _refuse(
        self,
        step: int,
        loss: float,
        norm: float,
        drawn: Sequence[TokenBatch],
        losses: Sequence[Losses],
    ) -> NonFiniteLossError:
        found, names = [], self.mixture.names
        for number, batch, (nll, corpus) in zip(self.share, drawn, losses, strict=False):
            real = nll[corpus < len(names)]  # the others are padding
            found.append(Part(number, batch, real.float().cpu().numpy()))
        return refuse(self.folder, step, loss, norm, found, names, self.world)


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype that a precision of the configuration stands for on a device."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch.bfloat16 if name == "bfloat16" else torch.float32
