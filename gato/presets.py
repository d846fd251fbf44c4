"""Training runs that have a name: functions that return a `TrainConfig`.

The three sizes of the paper come with its hyperparameters, its scalar observations under mu-law
and its patch embedder. They hold no corpora: those are named on the command line.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from gato import model_config, quickstart
from gato.checkpoint import build_model
from gato.config import TrainConfig
from gato.corpora import CorpusConfig
from gato.mixture_file import in_home
from gato.model import parameter_table
from gato.model_config import ModelConfig
from gato.optim import OptimConfig
from gato.tokenizers.serializer import Serializer
from gato.tokenizers.spaces import CodecOptions
from gato.tokenizers.vocabulary import VocabularyLayout

PAPER_PARAMETERS = {"gato_79m": 79e6, "gato_364m": 364e6, "gato_1b": 1.18e9}
"""What the paper calls its sizes (Gato table 5)."""

LEFT_OPEN = (
    "The paper's table gives layers, width, heads and one feed-forward size and leaves open what "
    "its totals count. Here that size is gate and value together, the token table is shared with "
    "the logits, and the patch embedder, value features and positions are counted."
)


def quickstart_run() -> TrainConfig:
    """Return the run of `gato quickstart`, sized for two CPU cores."""
    return quickstart.recipe(Path("runs/quickstart/data"), 1000)


def few_shot() -> TrainConfig:
    """Return the run that learns to learn from examples, on the corpus ``bindings``.

    A picture is one token and so is a word. That a word is looked up among the examples comes at
    once, after about 250 steps.
    """
    return TrainConfig(
        model=ModelConfig(
            layers=4,
            width=128,
            heads=4,
            head_dim=32,
            ffn_width=512,
            context=40,
            qk_norm=True,
        ),
        optim=OptimConfig(lr=2e-3, warmup=100, cooldown=0.4),
        embedders={"image": {"embedder": "conv"}},
        corpora=(CorpusConfig("bindings", "runs/few_shot/data/bindings"),),
        text_pieces=400,
        rows=48,
        steps=1500,
        precision="float32",
    )


def _paper(model: ModelConfig, lr: float) -> TrainConfig:
    """Return a run with the hyperparameters of Gato appendix C.

    The paper's rate falls by a cosine to a tenth of its peak, ours in a line to the same value;
    its stochastic depth of 0.1 is left out.
    """
    return TrainConfig(
        model=model,
        codec=CodecOptions(observations="scalar", scales="mu_law"),
        optim=OptimConfig(
            lr=lr, warmup=15_000, cooldown=1.0, final=0.1, weight_decay=0.1, muon=False
        ),
        embedders={"image": {"embedder": "patch"}},
        text_pieces=32_000,
        rows=512,
        steps=1_000_000,
        draw="even",
    )


def gato_79m() -> TrainConfig:
    """Return the run of Gato's smallest size."""
    return _paper(model_config.gato_79m(), 1e-4)


def gato_364m() -> TrainConfig:
    """Return the run of Gato's middle size."""
    return _paper(model_config.gato_364m(), 2e-4)


def gato_1b() -> TrainConfig:
    """Return the run of Gato's full size."""
    return _paper(model_config.gato_1b(), 1e-4)


PRESETS: dict[str, Callable[[], TrainConfig]] = {
    "quickstart": quickstart_run,
    "few_shot": few_shot,
    "gato_79m": gato_79m,
    "gato_364m": gato_364m,
    "gato_1b": gato_1b,
}


def preset(name: str) -> TrainConfig:
    """Return the run called `name`.

    Raises:
        ValueError: for an unknown name, with the closest known ones.
    """
    if name not in PRESETS:
        close = difflib.get_close_matches(name, PRESETS, n=2, cutoff=0.4)
        hint = f"closest: {', '.join(close)}" if close else f"known: {', '.join(PRESETS)}"
        raise ValueError(f"expected a known preset; got {name!r} ({hint}).")
    return PRESETS[name]()


def with_data(config: TrainConfig, data: Sequence[str], *, add: bool = False) -> TrainConfig:
    """Return the run on the corpora ``NAME=PATH[:WEIGHT]`` instead of its own.

    A corpus whose name the run already knows keeps its window, prompts and history.

    Args:
        config: the run.
        data: the corpora.
        add: keep the others that the run has.

    Raises:
        ValueError: for an argument of another form.
    """
    known = {c.name: c for c in config.corpora}
    corpora = []
    for argument in data:
        name, equals, rest = argument.partition("=")
        path, colon, number = rest.rpartition(":")
        if not colon or not _is_number(number):
            path, number = rest, ""
        if not (name and equals and path):
            raise ValueError(f"expected --data NAME=PATH[:WEIGHT]; got {argument!r}.")
        corpus = dataclasses.replace(known.get(name, CorpusConfig(name, path)), path=in_home(path))
        if number and not 0 < float(number) < math.inf:
            raise ValueError(f"expected a positive weight in --data {argument!r}; got {number}.")
        if number:
            corpus = dataclasses.replace(corpus, weight=float(number))
        corpora.append(corpus)
    names = [c.name for c in corpora]
    if len(set(names)) != len(names):
        raise ValueError(f"corpora need different names; got {names}")
    if add:
        given = {c.name: c for c in corpora}
        others = [given.pop(c.name, c) for c in config.corpora]
        corpora = [*others, *given.values()]
    return dataclasses.replace(config, corpora=tuple(corpora))


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def parameters(config: TrainConfig) -> dict[str, int]:
    """Return the parameters of a run's model by component, and their total; allocates none."""
    with torch.device("meta"):
        model = build_model(config, untaught(config))
    return parameter_table(model)


def untaught(config: TrainConfig) -> Serializer:
    """Return the serializer of a run before it has met data: of its size, without words."""
    bare = Serializer(config.codec)
    sizes = {n: m.vocabulary for n, m in bare.modalities.items() if m.vocabulary}
    layout = VocabularyLayout.build({**sizes, "text": config.text_pieces})
    return Serializer(config.codec, layout=layout)
