"""Training, top to bottom: corpora, serializer, model, loop.

A run is a pure function of its configuration and its data: batch k and the random numbers of step
k depend on (seed, k) alone, so a run that was killed and resumed ends where one that was not would
have: on a CPU bit for bit, on a GPU as far as its sums come out alike. A run whose data have
changed meanwhile does not go on.

What is due after a step is done in one order: losses are logged, validation is logged, a checkpoint
is saved, the checkpoint is evaluated. A checkpoint thus never knows of less than the log says, and
what a kill cut off is done again.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from gato import damage
from gato.bad_batch import NonFiniteLossError as NonFiniteLossError
from gato.checkpoint import counters_of, load_checkpoint, load_tensors, save_checkpoint
from gato.config import TrainConfig, require_same
from gato.contents import require_same_data
from gato.corpora import Corpus
from gato.distributed import World, joined, local_device
from gato.execution import Execution
from gato.feed import Feed
from gato.fitting import shared_serializer
from gato.flops import peak
from gato.loader import Loader
from gato.memory import SELDOM, give_back, resident
from gato.monitor import Watcher
from gato.profiling import Profiler
from gato.run_folder import left_behind, set_aside
from gato.run_log import Clock, Record, alone_in, made
from gato.step import Stepper
from gato.step import compute_dtype as compute_dtype
from gato.stopping import Stop, stop_on_signals
from gato.text_model import require_same_text_model
from gato.validation import Validator
from gato.warm_start import WarmStart

Evaluate = Callable[[Path], dict[str, float]]
"""Plays with a checkpoint and returns a score per task; higher is better."""


@dataclass
class Progress:
    """What a progress display needs, given to the callback once per line of losses."""

    step: int
    steps: int
    losses: dict[str, float]
    tokens_per_second: float
    seconds_left: float
    mfu: float | None = None
    """The share of the device's peak, see `gato.flops`."""
    contrast: dict[str, dict[str, float]] = field(default_factory=dict)
    """Of corpora whose pictures and words are matched: the loss of that, and the accuracy."""

    def figures(self, digits: int = 3) -> str:
        """Return every corpus' loss, and how many pairs are matched right, in one line."""
        told = [f"{name} {loss:.{digits}f}" for name, loss in self.losses.items()]
        told += [f"{name} matched {row['accuracy']:.2f}" for name, row in self.contrast.items()]
        return "  ".join(told)


def train(
    config: TrainConfig,
    out: str | Path,
    *,
    resume: bool = True,
    device: torch.device | str | None = None,
    text_model: bytes | None = None,
    start: WarmStart | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    workers: int = 0,
    watchers: Sequence[Watcher] | Callable[[], Sequence[Watcher]] = (),
    evaluate: Evaluate | None = None,
    skip_bad_shards: bool = False,
    verify: bool = False,
    execution: Execution | None = None,
) -> Path:
    """Train a model and return the folder of its last checkpoint.

    SIGTERM and SIGINT end it after the present step with a checkpoint; a second SIGINT at once.
    Under torchrun all processes call this alike, and process 0 writes.

    Args:
        config: the run.
        out: the run's folder; what is in it is gone on with where `resume` is set, else set aside.
        resume: go on from the newest checkpoint in `out`, if there is one.
        device: by default the GPU where there is one.
        text_model: a SentencePiece model to use instead of training one.
        start: the weights that a new run begins with, whose sizes `config` has (`settle`).
        on_progress: called once per line of losses.
        workers: processes that make batches ahead; results do not depend on them.
        watchers: told of every line of metrics and of events; or what makes them, which is called
            when no other run is in the folder.
        evaluate: called every ``eval_every`` steps.
        skip_bad_shards: leave damaged shards out, and say so; a run that goes on leaves out those
            that it began without.
        verify: compare the data with their checksums first; else only sizes and headers.
        execution: how it is computed; by default as suits the device.

    Raises:
        NonFiniteLossError: where the loss stops being a number; nothing of that step is kept.
        ValueError: where `out` holds a run with another configuration or text model, or data are
            damaged.
    """
    if config.eval_every and evaluate is None:
        raise ValueError("eval_every needs an `evaluate` that plays eval_tasks; got None")
    config.require_best()
    run = Path(out)
    device = local_device() if device is None else torch.device(device)
    with stop_on_signals() as stop, joined(device) as world, alone_in(run, world):
        watching = made(watchers, world, stop)
        going_on = world.from_first(lambda: "yes" if (run / "latest").is_file() else "no") == "yes"
        if not (going_on and resume):
            world.from_first(lambda: str(set_aside(run) if going_on or left_behind(run) else ""))
        begun = run if going_on and resume else None
        config = damage.agreed(
            config, begun, world, skip=skip_bad_shards, verify=verify, watchers=watching
        )
        if begun is not None:
            trainer = Trainer.resumed(config, run, device, world, execution)
            if text_model is not None:
                require_same_text_model(trainer.serializer, text_model, trainer.saved or run)
        else:
            if config.parts == 1:
                config = replace(config, parts=world.size)
            known = None if start is None else start.serializer(config.codec)
            serializer = shared_serializer(config, text_model, world, known)
            begin = None if start is None else start.fill
            trainer = Trainer(config, run, device, serializer, world, execution, begin)
            trainer.before = {} if start is None else start.data()
        trainer.stop = stop
        return trainer.run(on_progress, workers, watching, evaluate)


class Trainer(Stepper):
    """The state of a run and its loop."""

    def prepare(self) -> None:
        """Make what the loop needs beside a step."""
        self.stop = Stop()
        self.saved: Path | None = None
        self.validator = self._validator(self.corpora) if self.config.validate_every else None
        self.record = Record(self.folder, self.config, self.world)
        self.evaluate: Evaluate | None = None
        self.before: dict[str, dict[str, Any]] = {}
        """What the weights that the run began with were trained on."""

    @classmethod
    def resumed(
        cls,
        config: TrainConfig,
        run: Path,
        device: torch.device,
        world: World | None = None,
        execution: Execution | None = None,
    ) -> Trainer:
        """Return the trainer as it was when the newest checkpoint of `run` was saved."""
        saved = load_checkpoint(run, device, averaged=False, merged=False)
        if config.parts == 1:  # however many processes began it
            config = replace(config, parts=saved.config.parts)
        require_same(saved.config, config, run)
        trainer = cls(config, run, device, saved.serializer, world, execution)
        own = trainer.contents()
        require_same_data(saved.data, own, run)
        trainer.before = {name: said for name, said in saved.data.items() if name not in own}
        trainer.model.load_state_dict(saved.model.state_dict())
        if trainer.average is not None:
            trainer.average.load(load_tensors(saved.path / "ema.safetensors"))
        state = load_tensors(saved.path / "training" / "optimizer.safetensors")
        trainer.optimizers.load_tensors(state, trainer.names)
        trainer.step, trainer.saved = saved.step, saved.path
        with counters_of(saved.path) as counters:
            sums = torch.tensor(counters["sums"], dtype=torch.float64, device=device)
            trainer.sums = sums.view_as(trainer.sums)
            if trainer.execution.static and "capacities" in counters:
                trainer.capacities = trainer.room()
                trainer.capacities.load(counters["capacities"])
        return trainer

    def contents(self) -> dict[str, dict[str, Any]]:
        """Return of each corpus what it holds."""
        return {c.config.name: c.contents() for c in self.mixture.corpora}

    def _validator(self, corpora: Sequence[Corpus]) -> Validator:
        config = self.config
        return Validator(
            corpora,
            self.serializer,
            rows=config.rows // config.parts,
            row_length=config.model.context,
            batches=config.validate_batches,
        )

    # ---- the loop ----------------------------------------------------------------------------

    def run(
        self,
        on_progress: Callable[[Progress], None] | None = None,
        workers: int = 0,
        watchers: Sequence[Watcher] = (),
        evaluate: Evaluate | None = None,
    ) -> Path:
        """Train to the last step, or until told to stop; return the checkpoint's folder."""
        self.evaluate = evaluate
        try:
            self.record.begin(self.step, watchers)
            saved = self._loop(on_progress, workers)
        except BaseException as error:
            self.record.end(self.step, error)
            raise
        self.record.end(self.step, self.stop.reason)
        return saved

    def _loop(self, on_progress: Callable[[Progress], None] | None, workers: int) -> Path:
        config, clock = self.config, Clock(self.step)
        again = self.saved is not None and self.step and self._due(config.eval_every)
        if again and not self._stopping():
            self._evaluate()  # where a kill came before
        with Loader(self.mixture, self.step, self.share, workers, stop=config.steps) as loader:
            chosen = self.execution
            feed = Feed(loader, len(self.share), self.device, self.measured(), bool(chosen.ahead))
            profiled = chosen.profile if self.world.rank == 0 else 0  # all would write one file
            profiler = Profiler(self.folder, profiled, self.step, config.steps)
            while self.step < config.steps and not self._stopping():
                with clock.waiting():
                    parts = feed.take()
                profiler.before(self.step)
                self.train_step(*parts)
                with clock.waiting():
                    feed.fetch()
                self._attend(clock, on_progress)
                profiler.after(self.step)
            profiler.end()
        self.settle()
        if self.saved is None or self.saved.name != f"step-{self.step:08d}":
            self.save()
        assert self.saved is not None
        return self.saved

    def _stopping(self) -> bool:
        return self.world.any([self.stop.reason is not None])[0]

    def _due(self, every: int) -> bool:
        """Return whether what is done every so many steps, and at the end, is done now."""
        return every > 0 and (self.step % every == 0 or self.step == self.config.steps)

    # ---- what is due after a step ------------------------------------------------------------

    def _attend(self, clock: Clock, on_progress: Callable[[Progress], None] | None) -> None:
        """Log, validate, save and evaluate, in this order, as far as it is due."""
        config, improved = self.config, False
        every = (config.log_every, config.validate_every, config.save_every, config.eval_every)
        if any(self._due(n) for n in every):
            self.settle()
        if self._due(config.log_every):
            give_back(SELDOM)
            line = self._metrics(clock)
            self.record.write(line)
            if on_progress is not None and self.world.rank == 0:
                rate = line["tokens_per_second"]
                left = clock.seconds_left(self.step, config.steps)
                on_progress(
                    Progress(
                        self.step,
                        config.steps,
                        line["losses"],
                        rate,
                        left,
                        line.get("mfu"),
                        line.get("contrast", {}),
                    )
                )
        if self._due(config.validate_every):
            with clock.apart():
                improved = self._validate()
        if self._due(config.save_every) or self._due(config.eval_every) or improved:
            self.save(best=improved)
        if self._due(config.eval_every) and not self._stopping():
            with clock.apart():
                self._evaluate()

    def _metrics(self, clock: Clock) -> dict[str, Any]:
        """Return a line of metrics about the steps since the last one."""
        names = self.mixture.names
        total, count, *matched = self.sums.tolist()
        self.sums.zero_()
        losses = {n: t / c for n, t, c in zip(names, total, count, strict=True) if c}
        contrast = {
            n: {"loss": t / c, "accuracy": right / c}
            for n, t, right, c in zip(names, *(matched or [[]] * 3), strict=False)
            if c
        }
        steps, seconds, waited = clock.lap(self.step)
        tokens = steps * self.config.rows * self.config.model.context
        work, self.work = self.work, 0.0
        best = peak(self.device, self.dtype)
        return {
            "step": self.step,
            "losses": losses,
            **({"contrast": contrast} if contrast else {}),
            "lr": self.config.optim.rate(self.step - 1, self.config.steps),
            "tokens_per_second": tokens / seconds,
            **({} if best is None else {"mfu": work / seconds / best}),
            "data_wait": waited / seconds,
            "memory_mb": resident(),
            "time": time.time(),
        }

    def _validate(self) -> bool:
        """Log the loss on what corpora hold out; return whether a checkpoint is due for it."""
        assert self.validator is not None
        with self._weights_to_judge(), self.execution.uncompiled():
            share = (self.world.rank, self.world.size)
            sums = self.validator.sums(self.model, self.device, self.dtype, share)
        line = self.validator.figures(self.world.sum(sums))
        self.record.write({"step": self.step, **line, "time": time.time()})
        return self.record.is_best("validation", self.step)

    def _evaluate(self) -> None:
        """Let the checkpoint of this step play, and log its scores, unless that has been done."""

        def work() -> str:
            assert self.saved is not None
            assert self.evaluate is not None
            if self.record.has("evaluation", self.step):
                return "null"
            try:
                with self.stop.interrupting():
                    return json.dumps(self.evaluate(self.saved))
            except KeyboardInterrupt:
                if self.stop.reason is None:
                    raise
                return "null"  # the run that goes on evaluates

        scores = json.loads(self.world.from_first(work))
        if scores:
            self.record.write({"step": self.step, "evaluation": scores, "time": time.time()})
        self.record.is_best("evaluation", self.step)

    def _weights_to_judge(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self.average is None else self.average.in_place()

    def save(self, best: bool = False) -> Path:
        """Write a checkpoint of the present step and return its folder."""
        self.agree()
        self.saved = Path(self.world.from_first(lambda: str(self._save(best))))
        self.record.watchers.event("checkpoint", step=self.step, path=str(self.saved))
        return self.saved

    def _counters(self) -> dict[str, Any]:
        """Return what training goes on with, beside the optimizer's state."""
        counters: dict[str, Any] = {"sums": self.sums.tolist()}
        if self.capacities is not None:
            counters["capacities"] = self.capacities.state()
        return counters

    def _save(self, best: bool) -> Path:
        try:
            self.record.sync()
            saved = save_checkpoint(
                self.folder,
                self.step,
                self.config,
                self.serializer,
                self.model,
                self.optimizers.tensors(self.names),
                self._counters(),
                keep=self.config.keep_last,
                data={**self.before, **self.contents()},
                average=None if self.average is None else self.average.values,
                best=best,
            )
            self.record.running(self.step)
        except OSError as error:
            before = "the one before it is whole" if self.saved else "there is none before it"
            reason = f"{error.strerror} while saving step {self.step}; {before}"
            raise OSError(error.errno, reason, str(self.folder)) from error
        return saved
