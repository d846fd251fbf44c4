"""A training run as one frozen value: model, codecs, corpora, optimizer and budget."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from gato.corpus_config import CorpusConfig
from gato.lora import LoraConfig
from gato.model_config import ModelConfig
from gato.optim import OptimConfig
from gato.tokenizers.spaces import CodecOptions

_LARGEST_SEED = 1 << 43
"""A step's random numbers begin at about a million times as much, which must be below 2^64."""


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides the outcome of a run, given its data."""

    model: ModelConfig
    codec: CodecOptions = field(default_factory=CodecOptions)
    optim: OptimConfig = field(default_factory=OptimConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Thin matrices to learn beside the trunk's, which then stay as they are."""
    freeze: tuple[str, ...] = ()
    """What is not trained: parts (``trunk``, ``embedders``, ``table``, ``head`` and others), or
    patterns over names of parameters such as ``blocks.0.*``."""
    init_from: str = ""
    """The folder of the weights that the run began with; empty where they were drawn."""
    corpora: tuple[CorpusConfig, ...] = ()
    embedders: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Per modality, options of its embedder: ``{"image": {"embedder": "conv"}}``."""
    weigh: str = "tokens"
    """What the corpora's weights are shares of: ``tokens`` or ``samples`` (sequences)."""
    draw: str = "random"
    """How a batch is shared: ``even`` gives every corpus its share of every batch, ``random``
    draws a corpus for every sequence, so that shares hold in the long run only."""
    text_pieces: int = 2048
    """Size of the SentencePiece model trained on the corpora's text where none is given."""
    rows: int = 16
    """Rows per batch; a row has ``model.context`` tokens."""
    parts: int = 1
    """Parts that a batch is computed in, one after another or each by a process of its own. Where
    this is 1, a new run under torchrun has one part per process."""
    steps: int = 1000
    """Optimizer steps of the whole run."""
    seed: int = 0
    """Chooses the weights a run begins with and every sample, from 0 to 2^43."""
    precision: str = "auto"
    """``float32``, ``bfloat16`` (autocast) or ``auto``: bfloat16 on a GPU, float32 on a CPU."""
    log_every: int = 20
    """Steps per line of metrics.jsonl."""
    save_every: int = 500
    """Steps between checkpoints."""
    keep_last: int = 2
    """Checkpoints kept, the newest ones."""
    keep_best: bool = False
    """Keep the best one too: by the mean score of an evaluation that could play every task, where
    there is one; else by the validation loss."""
    ema: float = 0.0
    """How much an average of the weights keeps at every step, such as 0.999; 0 for no average.
    Where there is one, it is what is validated, evaluated and loaded."""
    validate_every: int = 0
    """Steps between measurements of the loss on what corpora hold out; 0 for never."""
    validate_batches: int = 8
    """Batches per corpus of such a measurement, the same ones every time."""
    eval_tasks: tuple[str, ...] = ()
    """Tasks that are played while training goes on; never at the seeds of `gato eval`."""
    eval_every: int = 0
    """Steps between evaluations on `eval_tasks`; 0 for never."""
    eval_episodes: int = 5
    """Episodes per task of such an evaluation."""

    def __post_init__(self) -> None:
        if self.precision not in ("auto", "float32", "bfloat16"):
            raise ValueError(f"precision must be auto, float32 or bfloat16; got {self.precision!r}")
        for name, known in (("weigh", ("tokens", "samples")), ("draw", ("random", "even"))):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name} must be {' or '.join(known)}; got {getattr(self, name)!r}"
                )
        for name in ("rows", "parts", "steps", "log_every", "save_every", "keep_last"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")
        if self.rows % self.parts:
            raise ValueError(
                f"rows must be a multiple of parts; got {self.rows} rows in {self.parts} parts"
            )
        if not 0 <= self.seed <= _LARGEST_SEED:
            raise ValueError(f"seed must be from 0 to {_LARGEST_SEED}; got {self.seed}")
        if not 0.0 <= self.ema < 1.0:
            raise ValueError(f"ema must be in [0, 1); got {self.ema}")
        for name, least in (
            ("validate_every", 0),
            ("validate_batches", 1),
            ("eval_every", 0),
            ("eval_episodes", 1),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}; got {getattr(self, name)}")
        if bool(self.eval_tasks) != bool(self.eval_every):
            raise ValueError(
                f"eval_tasks and eval_every go together: which tasks, and every how many steps; "
                f"got {list(self.eval_tasks)} and {self.eval_every}"
            )
        names = [c.name for c in self.corpora]
        if len(set(names)) != len(names):
            raise ValueError(f"corpora need different names; got {names}")

    def require_best(self) -> None:
        """Raise ValueError where the best checkpoint is to be kept and nothing is measured.

        Not a rule of the value itself: `gato train` settles what is validated after it was read.
        """
        if self.keep_best and not (self.validate_every or self.eval_every):
            raise ValueError(
                "keep_best needs something to be best at: set validate_every, and let corpora hold "
                "something out (validation); or set eval_tasks and eval_every"
            )


WATCHING = (
    *("log_every", "save_every", "keep_last", "keep_best", "validate_every", "validate_batches"),
    *("eval_tasks", "eval_every", "eval_episodes"),
)
"""What decides nothing but how a run is watched and kept: it may change when a run goes on."""


def require_same(saved: TrainConfig, wanted: TrainConfig, run: Any) -> None:
    """Raise ValueError, naming what differs, where a run would go on otherwise than it began."""
    changed = [
        told
        for f in dataclasses.fields(saved)
        if f.name not in WATCHING
        for told in _differences(f.name, getattr(saved, f.name), getattr(wanted, f.name))
    ]
    if changed:
        raise ValueError(
            f"{run} holds a run with another configuration: {'; '.join(changed)}. Resume with the "
            f"one it was started with, or train into another folder."
        )


_NONE = object()


def _differences(name: str, was: Any, now: Any) -> Iterator[str]:
    """Yield what differs, each by its full name: ``corpora.text.weight was 1.0, is 2.0``."""
    if was == now:
        return
    before, after = _parts(was), _parts(now)
    if before is not None and after is not None:
        for key in {**before, **after}:
            yield from _differences(f"{name}.{key}", before.get(key, _NONE), after.get(key, _NONE))
        if list(before) != list(after) and set(before) == set(after):
            yield f"{name} stood in the order {', '.join(before)}, stand as {', '.join(after)}"
    elif was is _NONE:
        yield f"{name} was not there, is {_short(now)}"
    elif now is _NONE:
        yield f"{name} was {_short(was)}, is not there"
    else:
        yield f"{name} was {_short(was)}, is {_short(now)}"


def _parts(value: Any) -> dict[str, Any] | None:
    """Return the named parts of a value, if it has any."""
    if dataclasses.is_dataclass(value):
        return {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): v for k, v in value.items()}
    if isinstance(value, tuple) and value and all(isinstance(v, CorpusConfig) for v in value):
        return {corpus.name: corpus for corpus in value}
    return None


def _short(value: Any) -> str:
    return repr(value) if len(repr(value)) <= 80 else f"{value!r:.77}..."


def to_json(config: Any) -> dict[str, Any]:
    """Return a frozen configuration as JSON-able data."""
    data: dict[str, Any] = dataclasses.asdict(config)
    return data


def from_json(cls: type, data: Mapping[str, Any]) -> Any:
    """Return the configuration that `to_json` described.

    Raises:
        ValueError: for a field that the class does not have.
    """
    hints = typing.get_type_hints(cls)
    unknown = sorted(set(data) - set(hints))
    if unknown:
        raise ValueError(
            f"{cls.__name__} has no field {unknown[0]!r}; this file was written by another version"
        )
    return cls(**{name: _value(hints[name], value) for name, value in data.items()})


def _value(hint: Any, value: Any) -> Any:
    if dataclasses.is_dataclass(hint):
        return from_json(typing.cast(type, hint), value)
    if typing.get_origin(hint) is tuple:
        item = typing.get_args(hint)[0]
        return tuple(_value(item, v) for v in value)
    if isinstance(hint, types.UnionType) and isinstance(value, dict):
        return next(_value(h, value) for h in typing.get_args(hint) if h is not type(None))
    return value
