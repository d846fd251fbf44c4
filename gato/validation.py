"""Validation: the loss on what every corpus holds out, teacher-forced, on the same batches always.

The batches are a function of the corpora alone, so that measurements of one run, and of runs with
other seeds, differ by their weights and by nothing else. Nothing is drawn from the random numbers
of training, and the model is put back as it was: a run with validation ends with the weights of
one without, on a CPU bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gato.corpus_config import Corpus
from gato.mixture import Mixture
from gato.model import GatoModel
from gato.tokenizers.serializer import Serializer

_SEED = 0  # not the run's: see above
_LOSS, _NLL, _COUNT = range(3)


class Validator:
    """Measures a model on the held-out items of corpora."""

    def __init__(
        self,
        corpora: Sequence[Corpus],
        serializer: Serializer,
        *,
        rows: int,
        row_length: int,
        batches: int,
    ) -> None:
        """Find what is held out.

        Args:
            corpora: those of the mixture; what one holds out is a corpus of its own.
            serializer: the one the corpora write with.
            rows: rows per batch.
            row_length: tokens per row.
            batches: batches per corpus.

        Raises:
            ValueError: where nothing is held out.
        """
        held = {c.config.name: c.held_out() for c in corpora if c.config.weight > 0}
        self.configs = [c.config for c in corpora if held.get(c.config.name) is not None]
        if not self.configs:
            raise ValueError(
                f"expected a corpus that holds something out (validation=0.02, say), to validate "
                f"on; none of {', '.join(held)} does. Or set validate_every=0."
            )
        self.mixtures = {
            name: Mixture(
                [corpus], serializer, rows=rows, row_length=row_length, seed=_SEED, contrast=False
            )
            for name, corpus in held.items()
            if corpus is not None
        }
        self.names, self.batches = list(self.mixtures), batches
        self.modalities, self.ordinal = serializer.names, serializer.ordinal_span()

    def run(
        self, model: GatoModel, device: torch.device, dtype: torch.dtype = torch.float32
    ) -> dict[str, Any]:
        """Return what a line of metrics says of the model: see `figures`."""
        return self.figures(self.sums(model, device, dtype))

    def sums(
        self,
        model: GatoModel,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        share: tuple[int, int] = (0, 1),
    ) -> Tensor:
        """Return (3, corpora, modalities): sums of loss and of -log p of targets, and their number.

        Args:
            model: left in the mode that it is in.
            device: where it is.
            dtype: of the computation, as in training.
            share: (i, n) measures the i-th of n shares of the batches; the sums of all shares add
                up to those of (0, 1).
        """
        size = (3, len(self.names), len(self.modalities))
        sums = torch.zeros(size, dtype=torch.float64, device=device)
        training = model.training
        model.eval()
        try:
            with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
                for corpus, mixture in enumerate(self.mixtures.values()):
                    for k in range(share[0], self.batches, share[1]):
                        torch.manual_seed(k)
                        self._add(sums[:, corpus], model, mixture, k, device, dtype)
        finally:
            model.train(training)
        return sums

    def _add(
        self,
        sums: Tensor,
        model: GatoModel,
        mixture: Mixture,
        k: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """Add the losses of batch k of one corpus to `sums` (3, modalities)."""
        batch = mixture.batch(k).to(device, non_blocking=True)
        spread = model.config.soft_bins
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            hidden = model(batch)  # (N, D)
            nll = model.batch_nll(hidden, batch)  # (M,)
            loss = nll
            if spread > 0:  # as training counts it
                loss = model.batch_nll(hidden, batch, self.ordinal, spread)
        for row, values in ((_LOSS, loss), (_NLL, nll), (_COUNT, torch.ones_like(nll))):
            sums[row].index_add_(0, batch.target_modality, values.double())

    def figures(self, sums: Tensor) -> dict[str, Any]:
        """Return the measurement as a line of metrics holds it.

        ``validation`` has for each corpus its ``loss``, counted as in training, its ``perplexity``
        (the exponential of the mean -log p of the exact targets), the number of ``targets`` and the
        same ``by_modality`` of the targets. ``validation_loss``, the mean over corpora by their
        weights, is left out where a loss is no number.
        """
        found = {}
        for name, table in zip(self.names, sums.unbind(1), strict=True):
            found[name] = _row(table.sum(1)) | {
                "by_modality": {
                    modality: _row(cell)
                    for modality, cell in zip(self.modalities, table.unbind(1), strict=True)
                    if cell[_COUNT] > 0
                }
            }
        weights = [c.weight * c.loss_weight for c in self.configs]
        losses = [row["loss"] for row in found.values()]
        line: dict[str, Any] = {"validation": found}
        if sum(weights) > 0 and None not in losses:
            total = sum(w * loss for w, loss in zip(weights, losses, strict=True))
            line["validation_loss"] = total / sum(weights)
        return line


def _row(cell: Tensor) -> dict[str, Any]:
    """Return the means of sums (3,); what is no number is None, as JSON has none."""
    loss, nll, count = cell.tolist()
    loss, nll = loss / count, nll / count
    return {
        "loss": loss if math.isfinite(loss) else None,
        "perplexity": math.exp(nll) if nll < 700 else None,
        "targets": int(count),
    }
