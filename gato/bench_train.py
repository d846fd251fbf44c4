"""`gato bench train`: tokens/s of the trainer, beside a bare loop on batches at hand."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch

from gato.bench_common import ARM, GAME, Result, made_up, pace, result, wait
from gato.config import TrainConfig
from gato.corpora import CorpusConfig
from gato.envs.records import RecordWriter
from gato.envs.store import EpisodeWriter
from gato.fitting import make_serializer
from gato.model_config import quickstart
from gato.optim import OptimConfig
from gato.tokenizers.spaces import CodecOptions
from gato.tokenizers.stream import TokenBatch
from gato.train import Trainer


def train_bench(repeats: int) -> list[Result]:
    """Return tokens/s of training on a mixture of an arm, a game and text."""
    with tempfile.TemporaryDirectory() as folder:
        config = mixture_of(Path(folder))
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        serializer = make_serializer(config)
        trainer = Trainer(config, Path(folder) / "run", device, serializer)
        bare = Trainer(config, Path(folder) / "bare", device, serializer)
        steps, first = 3, 4
        tokens = steps * config.rows * config.model.context
        _train(trainer, range(first))  # caches fill, kernels are chosen
        ours, theirs = [], []
        for block in range(repeats):
            indices = range(first + block * steps, first + (block + 1) * steps)
            batches = [bare.mixture.batch(k).to(device) for k in indices]
            theirs.append(pace(partial(_bare, bare, batches), tokens))
            ours.append(pace(partial(_train, trainer, indices), tokens))
    against = "forward, backward and step of the same model on the same batches at hand"
    return [result("train: arm, game and text, bfloat16", ours, "tokens/s", theirs, against)]


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


def _train(trainer: Trainer, indices: Sequence[int]) -> None:
    for k in indices:
        trainer.train_step(trainer.mixture.batch(k))
    wait(trainer.device)


def _bare(trainer: Trainer, batches: Sequence[TokenBatch]) -> None:
    model, optimizers = trainer.model, trainer.optimizers
    for batch in batches:
        with torch.autocast(
            trainer.device.type, trainer.dtype, enabled=trainer.dtype != torch.float32
        ):
            loss = model.loss(batch, ordinal=trainer.ordinal)
        (loss * batch.target_weight).mean().backward()
        optimizers.step(1e-4)
    wait(trainer.device)
