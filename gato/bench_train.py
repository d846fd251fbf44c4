"""`gato bench train`: tokens/s of the trainer, beside a bare loop on batches at hand.

    trunks of 1M, 3M and 10M    beside forward, backward and step on batches that lie ready
    1M, as `gato train` has it  beside the same steps without lines, progress and checkpoints
    train_gato_79m, _364m, _1b  the paper's sizes, where they are named: on a CPU one or two rows
                                a step, which says little of a GPU

On a CPU batches are made as they go, as without workers; on a GPU workers make them ahead and they
are brought to the GPU while one is computed, as `gato train` does there.

The floor is the model FLOPs (see `gato.flops`) at the device's peak, so that the share of it is
MFU. Beside it stand what part of the time was spent waiting for data, and the memory.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Self

import numpy as np
import torch

from gato import presets
from gato.bench_common import ARM, GAME, Result, made_up, pace, result, wait
from gato.bench_machine import device
from gato.config import TrainConfig
from gato.corpora import CorpusConfig
from gato.envs.records import RecordWriter
from gato.envs.store import EpisodeWriter
from gato.feed import Feed
from gato.fitting import make_serializer
from gato.flops import peak
from gato.loader import Loader
from gato.memory import resident
from gato.model_config import ModelConfig, quickstart
from gato.optim import OptimConfig
from gato.tokenizers.serializer import Serializer
from gato.tokenizers.spaces import CodecOptions
from gato.tokenizers.stream import TokenBatch
from gato.train import Trainer

STEPS = 3
"""In a block, which is what is timed."""
GPU_ROUNDS, GPU_WORKERS = 10, 8
"""On a GPU a block is so many times as long, and so many processes, but no more than there are
cores, make batches; steps on those that lay ready when it began are taken before it."""
WARMUP = 4
RUN_STEPS, LOG_EVERY = 20, 20
"""Of the run as `gato train` has it, which begins at a multiple of them and so has one line and one
checkpoint: a line as often, and a checkpoint twelve times as often, as quickstart has them."""
AHEAD = 4
"""Batches that lie ready beside those of the workers: the loader's and the feed's, or one more."""
ROWS = {"gato_79m": (64, 2), "gato_364m": (32, 1), "gato_1b": (16, 1)}
"""Rows of 1024 tokens a step, on a GPU and on a CPU."""


def sizes() -> dict[str, ModelConfig]:
    """Return models of one, three and ten million parameters in the trunk."""
    small = quickstart()
    middle = replace(
        small, layers=6, width=192, heads=3, kv_heads=None, head_dim=64, ffn_width=1280
    )
    large = replace(small, layers=8, width=320, heads=5, kv_heads=None, head_dim=64, ffn_width=1920)
    return {"1M": small, "3M": middle, "10M": large}


def train_bench(repeats: int) -> list[Result]:
    """Return tokens/s of training on a mixture of an arm, a game and text."""
    results = []
    with tempfile.TemporaryDirectory() as folder:
        config = mixture_of(Path(folder))
        serializer = make_serializer(config)
        for name, model in sizes().items():
            made = replace(config, model=model)
            trainer = Trainer(made, Path(folder) / name, device(), serializer)
            results.append(_beside_bare(f"train: a trunk of {name}", trainer, repeats))
            if name == "1M":
                results.append(_as_a_command(trainer, repeats))
    return results


def train_gato_79m_bench(repeats: int) -> list[Result]:
    """Return tokens/s of training the paper's smallest size."""
    return _paper("gato_79m", repeats)


def train_gato_364m_bench(repeats: int) -> list[Result]:
    """Return tokens/s of training the paper's middle size."""
    return _paper("gato_364m", repeats)


def train_gato_1b_bench(repeats: int) -> list[Result]:
    """Return tokens/s of training the paper's full size."""
    return _paper("gato_1b", repeats)


def _paper(name: str, repeats: int) -> list[Result]:
    """Return tokens/s of a preset, with the vocabulary that it would have."""
    preset, on = presets.preset(name), device()
    rows = ROWS[name][0 if on.type == "cuda" else 1]
    with tempfile.TemporaryDirectory() as folder:
        made = mixture_of(Path(folder))
        config = replace(preset, corpora=made.corpora, text_pieces=made.text_pieces)
        config = replace(config, rows=rows, precision="bfloat16", steps=1000, draw="random")
        small = make_serializer(config)
        layout = small.layout.append("reserved", preset.text_pieces - config.text_pieces)
        tasks = small.tasks.values()
        serializer = Serializer(config.codec, small.state(), layout, tasks)
        trainer = Trainer(config, Path(folder) / "run", on, serializer)
        case = f"train: {name}, {rows} rows of {config.model.context} tokens"
        few = on.type != "cuda"
        return [_beside_bare(case, trainer, repeats, 1 if few else STEPS, 1 if few else WARMUP)]


def _beside_bare(
    case: str, trainer: Trainer, repeats: int, steps: int = STEPS, warmup: int = WARMUP
) -> Result:
    """Return tokens/s of a trainer's steps, beside a bare loop on batches at hand."""
    gpu = trainer.device.type == "cuda"
    _train(trainer, range(warmup))  # caches fill, kernels are chosen, models are compiled
    if gpu:
        torch.cuda.reset_peak_memory_stats(trainer.device)
    rounds = GPU_ROUNDS if gpu else 1
    tokens = rounds * steps * trainer.config.rows * trainer.config.model.context
    ours, theirs, waited, work = [], [], 0.0, 0.0
    with contextlib.ExitStack() as stack:
        driven = stack.enter_context(Driven(trainer, warmup)) if gpu else None
        for block in range(repeats):
            at = range(warmup + block * steps, warmup + (block + 1) * steps)
            batches = [trainer._given(trainer.mixture.batch(k)) for k in at]
            theirs.append(pace(partial(_bare, trainer, batches * rounds), tokens))
            waits: list[float] = []
            run = partial(_train, trainer, at, waits)
            if driven is not None:
                driven.take(driven.ready)
                run = partial(driven.take, rounds * steps, waits)
            trainer.work, begun = 0.0, time.perf_counter()
            ours.append(pace(run, tokens))
            waited += sum(waits) / (time.perf_counter() - begun) / repeats
            work += trainer.work / tokens / repeats
    best = peak(trainer.device, trainer.dtype)
    against = "forward, backward and step of the same model on the same batches at hand"
    made = result(
        f"{case}, bfloat16",
        ours,
        "tokens/s",
        theirs,
        against,
        floor=None if best is None else best / work,
        floor_from="model FLOPs at the device's peak: the share of it is MFU",
    )
    return made | {"data_wait": waited, "memory_mb": _memory(trainer.device)}


def _memory(device: torch.device) -> float:
    """Return the MB that a GPU held at most, or that this process holds."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resident()


def _as_a_command(trainer: Trainer, repeats: int) -> Result:
    """Return tokens/s of a run with lines, curves, progress and a checkpoint, beside steps alone.

    Both make their batches as they go.
    """
    from gato.monitor import open_watchers
    from gato.preparation import Shown
    from gato.printing import progress_bar

    tokens = RUN_STEPS * trainer.config.rows * trainer.config.model.context
    ours, theirs = [], []
    trainer.step = at = -(-trainer.step // RUN_STEPS) * RUN_STEPS
    for _ in range(repeats):
        first, at = at, at + RUN_STEPS
        theirs.append(pace(partial(_train, trainer, range(first, at)), tokens))
        trainer.step, last = first, at  # the same batches once more
        trainer.config = replace(
            trainer.config, steps=last, log_every=LOG_EVERY, save_every=RUN_STEPS
        )
        with progress_bar() as bar:
            shown = Shown(bar, last)
            watchers = [*open_watchers(trainer.folder, {}, None), shown]
            ours.append(pace(partial(trainer.run, shown.progress, 0, watchers), tokens))
    lines = (trainer.folder / "metrics.jsonl").read_text().splitlines()
    against = "the same steps without lines, curves, progress and checkpoints"
    case = "train: a trunk of 1M as gato train has it, bfloat16"
    made = result(case, ours, "tokens/s", theirs, against)
    return made | {"data_wait": json.loads(lines[-1])["data_wait"], "memory_mb": resident()}


def mixture_of(folder: Path) -> TrainConfig:
    """Return a run on an arm, a game and text, made up in `folder`."""
    for task, episodes in ((ARM, 40), (GAME, 6)):
        with EpisodeWriter(folder / task.id, task) as writer:
            for i in range(episodes):
                writer.append(made_up(task, 100, seed=i))
    rng = np.random.default_rng(0)
    words = "the a red green ball box door goes to of and is in on it robot reads writes".split()
    with RecordWriter(folder / "text", "text") as records:
        for _ in range(400):
            records.append({"kind": "document", "text": " ".join(rng.choice(words, 60))})
    return TrainConfig(
        model=quickstart(),
        codec=CodecOptions(observations="vector"),
        optim=OptimConfig(warmup=10),
        corpora=(
            CorpusConfig("arm", str(folder / ARM.id), 2.0, window=4),
            CorpusConfig("game", str(folder / GAME.id), 2.0, window=2),
            CorpusConfig("text", str(folder / "text"), 1.0),
        ),
        embedders={"image": {"embedder": "conv"}},
        text_pieces=320,
        precision="bfloat16",
        rows=8,
        steps=1000,
    )


def _train(trainer: Trainer, indices: Sequence[int], waits: list[float] | None = None) -> None:
    """Take steps on batches that are made one after another; note how long each took to make."""
    for k in indices:
        begun = time.perf_counter()
        batch = trainer.mixture.batch(k)
        if waits is not None:
            waits.append(time.perf_counter() - begun)
        trainer.train_step(batch)
    trainer.settle()
    wait(trainer.device)


class Driven:
    """Steps of a trainer on batches that workers make ahead, brought to the device as in a run."""

    def __init__(self, trainer: Trainer, first: int, workers: int | None = None) -> None:
        """Start the workers; the first batch is `first`."""
        workers = min(GPU_WORKERS, os.cpu_count() or 1) if workers is None else workers
        self.trainer, self.ready = trainer, workers + AHEAD
        self._loader = Loader(trainer.mixture, first, trainer.share, workers)
        self._feed = Feed(
            self._loader, len(trainer.share), trainer.device, trainer.measured(), ahead=True
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._loader.close()

    def take(self, steps: int, waits: list[float] | None = None) -> None:
        """Take so many steps; note how long the trainer waited for each batch."""
        for _ in range(steps):
            begun = time.perf_counter()
            parts = self._feed.take()
            waited = time.perf_counter() - begun
            self.trainer.train_step(*parts)
            begun = time.perf_counter()
            self._feed.fetch()
            if waits is not None:
                waits.append(waited + time.perf_counter() - begun)
        self.trainer.settle()
        wait(self.trainer.device)


def _bare(trainer: Trainer, batches: Sequence[TokenBatch]) -> None:
    """Take steps on batches that lie on the device, and nothing else."""
    model, optimizers = trainer.model, trainer.optimizers
    for batch in batches:
        with torch.autocast(
            trainer.device.type, trainer.dtype, enabled=trainer.dtype != torch.float32
        ):
            loss = model.loss(batch, ordinal=trainer.ordinal)
        (loss * batch.target_weight).mean().backward()
        optimizers.step(1e-4)
    wait(trainer.device)
