"""Training, top to bottom: corpora, serializer, model, loop.

A run is a pure function of its configuration and its data: batch k and the random numbers of step
k depend on (seed, k) alone, so a run that was killed and resumed ends bit for bit where one that
was not would have.
"""

from __future__ import annotations

import contextlib
import json
import math
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gato.checkpoint import build_model, load_checkpoint, load_tensors, save_checkpoint
from gato.config import TrainConfig
from gato.corpora import open_corpus
from gato.fitting import make_serializer
from gato.mixture import Mixture
from gato.optim import Optimizers
from gato.tokenizers.serializer import Serializer
from gato.tokenizers.stream import TokenBatch


@dataclass
class Progress:
    """What a progress display needs, given to the callback once per line of metrics."""

    step: int
    steps: int
    losses: dict[str, float]
    tokens_per_second: float
    seconds_left: float


class NonFiniteLossError(RuntimeError):
    """The loss of a step was NaN or infinite; the weights are those of the step before."""


def train(
    config: TrainConfig,
    out: str | Path,
    *,
    resume: bool = True,
    device: torch.device | str | None = None,
    text_model: bytes | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> Path:
    """Train a model and return the folder of its last checkpoint.

    Args:
        config: the run.
        out: the run's folder; what is in it is gone on with where `resume` is set.
        resume: go on from the newest checkpoint in `out`, if there is one.
        device: by default the GPU where there is one.
        text_model: a SentencePiece model to use instead of training one.
        on_progress: called once per line of metrics.

    Raises:
        NonFiniteLossError: where the loss stops being a number; nothing of that step is kept.
        ValueError: where `out` holds a run with another configuration.
    """
    run = Path(out)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if resume and (run / "latest").is_file():
        trainer = Trainer.resumed(config, run, device)
    else:
        trainer = Trainer(config, run, device, make_serializer(config, text_model))
    return trainer.run(on_progress)


class Trainer:
    """The state of a run and its loop."""

    def __init__(
        self, config: TrainConfig, run: Path, device: torch.device, serializer: Serializer
    ) -> None:
        self.config, self.folder, self.device, self.serializer = config, run, device, serializer
        torch.manual_seed(config.seed)
        self.model = build_model(config, serializer).to(device).train()
        self.optimizers = Optimizers(self.model, config.optim)
        self.names = {id(p): n for n, p in self.model.named_parameters()}
        corpora = [open_corpus(c, serializer) for c in config.corpora]
        self.mixture = Mixture(
            corpora,
            serializer,
            rows=config.rows,
            row_length=config.model.context,
            seed=config.seed,
        )
        self.step = 0
        self.stop = False
        self.saved: Path | None = None
        n = len(self.mixture.names)
        self.sums = torch.zeros(2, n, dtype=torch.float64, device=device)
        self.dtype = compute_dtype(config.precision, device)
        self.ordinal = serializer.ordinal_span()

    @classmethod
    def resumed(cls, config: TrainConfig, run: Path, device: torch.device) -> Trainer:
        """Return the trainer as it was when the newest checkpoint of `run` was saved."""
        saved = load_checkpoint(run, device)
        if saved.config != config:
            raise ValueError(
                f"{run} holds a run with another configuration. Resume with the one it was started "
                f"with, or train into another folder."
            )
        trainer = cls(config, run, device, saved.serializer)
        trainer.model.load_state_dict(saved.model.state_dict())
        state = load_tensors(saved.path / "training" / "optimizer.safetensors")
        trainer.optimizers.load_tensors(state, trainer.names)
        counters = json.loads((saved.path / "training" / "counters.json").read_text())
        trainer.step, trainer.saved = saved.step, saved.path
        trainer.sums = torch.tensor(counters["sums"], dtype=torch.float64, device=device)
        return trainer

    def run(self, on_progress: Callable[[Progress], None] | None = None) -> Path:
        """Train to the last step, or until told to stop; return the checkpoint's folder."""
        config, metrics = self.config, self.folder / "metrics.jsonl"
        self.folder.mkdir(parents=True, exist_ok=True)
        _keep_lines(metrics, self.step)
        begun, first = time.perf_counter(), self.step
        clock, waited, told = begun, 0.0, first
        with _signals(self), open(metrics, "a") as log:
            while self.step < config.steps and not self.stop:
                asked = time.perf_counter()
                batch = self.mixture.batch(self.step)
                waited += time.perf_counter() - asked
                self.train_step(batch)
                if self.step % config.log_every == 0 or self.step == config.steps:
                    now = time.perf_counter()
                    line = self._metrics(self.step - told, now - clock, waited)
                    clock, waited, told = now, 0.0, self.step
                    log.write(json.dumps(line) + "\n")
                    log.flush()
                    if on_progress is not None:
                        pace = (now - begun) / (self.step - first)
                        left = pace * (config.steps - self.step)
                        rate = line["tokens_per_second"]
                        on_progress(Progress(self.step, config.steps, line["losses"], rate, left))
                if self.step % config.save_every == 0 and self.step < config.steps:
                    self.save()
        done = self.saved is not None and self.saved.name == f"step-{self.step:08d}"
        return self.saved if self.saved is not None and done else self.save()

    def train_step(self, batch: TokenBatch) -> None:
        """Take one optimizer step on a batch from the mixture."""
        # Convention: every step draws its random numbers anew from (seed, step).
        torch.manual_seed(self.config.seed * 1_000_003 + self.step)
        tensors = batch.to(self.device, non_blocking=True)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            nll = self.model.loss(tensors, ordinal=self.ordinal)  # (M,)
        loss = (nll * tensors.target_weight).sum() / (batch.rows * batch.row_length)
        loss.backward()
        rate = self.config.optim.rate(self.step, self.config.steps)
        self._require_finite(loss, batch)
        self.optimizers.step(rate)
        self.step += 1
        self.sums[0].index_add_(0, tensors.target_corpus, nll.detach().double())
        self.sums[1].index_add_(0, tensors.target_corpus, torch.ones_like(nll, dtype=torch.float64))

    def _require_finite(self, loss: Tensor, batch: TokenBatch) -> None:
        if math.isfinite(loss.item()):
            return
        corpora = sorted({self.mixture.names[i] for i in np.unique(batch.target_corpus)})
        raise NonFiniteLossError(
            f"the loss of step {self.step} is {loss.item()}; the batch draws on "
            f"{', '.join(corpora)}. Lower optim.lr or look at that data; the last checkpoint in "
            f"{self.folder} is whole."
        )

    def _metrics(self, steps: int, seconds: float, waited: float) -> dict[str, Any]:
        """Return a line of metrics after `steps` that took `seconds`, `waited` of them for data."""
        total, count = self.sums.tolist()
        self.sums.zero_()
        losses = {n: t / c for n, t, c in zip(self.mixture.names, total, count, strict=True) if c}
        tokens = steps * self.config.rows * self.config.model.context
        return {
            "step": self.step,
            "losses": losses,
            "lr": self.config.optim.rate(self.step - 1, self.config.steps),
            "tokens_per_second": tokens / seconds,
            "data_wait": waited / seconds,
            "time": time.time(),
        }

    def save(self) -> Path:
        """Write a checkpoint of the present step and return its folder."""
        self.saved = save_checkpoint(
            self.folder,
            self.step,
            self.config,
            self.serializer,
            self.model,
            self.optimizers.tensors(self.names),
            {"sums": self.sums.tolist()},
            data={c.config.name: c.contents() for c in self.mixture.corpora},
        )
        return self.saved


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype that a precision of the configuration stands for on a device."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch.bfloat16 if name == "bfloat16" else torch.float32


def _keep_lines(path: Path, step: int) -> None:
    """Drop the lines of steps after `step`: they were lost with the process that wrote them."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except ValueError:
            continue  # half a line, from the instant the process was killed
    path.write_text("".join(line + "\n" for line in kept))


@contextlib.contextmanager
def _signals(trainer: Trainer) -> Iterator[None]:
    """Let SIGTERM and SIGINT end the run after the present step, with a checkpoint."""

    def request_stop(signum: int, frame: Any) -> None:
        trainer.stop = True

    try:
        before = {s: signal.signal(s, request_stop) for s in (signal.SIGTERM, signal.SIGINT)}
    except ValueError:  # not the main thread: the caller handles signals
        yield
        return
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
