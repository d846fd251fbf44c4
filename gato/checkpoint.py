"""A checkpoint: one self-sufficient folder, written whole or not at all, and never unpickled.

config.json          the run's configuration, what it was trained on, the serializer's tasks
                     and scales
vocabulary.json      the ledger of id ranges
model.safetensors    weights
ema.safetensors      their average over the steps, where the run keeps one
text.model           the SentencePiece model, or the tokenizer.json of the language model that
                     the run began with, and what that says of its text (text.json)
training/            optimizer state and counters; only needed to go on training

`gato.run_folder` says where they lie.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from gato.config import TrainConfig, from_json, to_json
from gato.envs.files import sync_folder, write_synced
from gato.lora import add_lora, merge_lora
from gato.model import GatoModel
from gato.run_folder import FORMAT, older_told, point, remove, resolve, sweep, tidy
from gato.tokenizers.serializer import Serializer
from gato.tokenizers.text import TEXT_FILES

_DAMAGE = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""What reading a value of another kind or size than was written can end in."""


@dataclass
class Checkpoint:
    """A loaded checkpoint."""

    path: Path
    config: TrainConfig
    serializer: Serializer
    model: GatoModel
    step: int
    averaged: bool = False
    """Whether the model has the averaged weights instead of the last step's."""
    data: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Of each corpus what it was trained on, as `Corpus.contents` says; empty where unknown.

    Those of checkpoints that it began with are among them, as ``NAME of CHECKPOINT``, and say
    beside it how much of them was held out (``validation``).
    """


def build_model(config: TrainConfig, serializer: Serializer) -> GatoModel:
    """Return the model of a run, with the embedders of every modality that has one."""
    options = serializer.net_options()
    nets = {}
    for name, modality in serializer.modalities.items():
        chosen = {**options.get(name, {}), **config.embedders.get(name, {})}
        net = modality.net(config.model.width, chosen)
        if net is not None:
            nets[name] = net
    model = GatoModel(
        config.model,
        serializer.layout.size,
        serializer.control["<masked>"],
        nets,
        serializer.slots(),
        serializer.spans(),
        contrast=any(c.weight > 0 and c.contrast > 0 for c in config.corpora),
    )
    add_lora(model, config.lora)
    return model


def save_checkpoint(
    run: Path,
    step: int,
    config: TrainConfig,
    serializer: Serializer,
    model: GatoModel,
    training: dict[str, Tensor] | None = None,
    counters: dict[str, Any] | None = None,
    keep: int = 2,
    data: dict[str, dict[str, Any]] | None = None,
    average: dict[str, Tensor] | None = None,
    best: bool = False,
) -> Path:
    """Write ``run/step-N`` and point ``run/latest`` at it; killed anywhere, the last one loads.

    Args:
        run: the run's folder.
        step: N.
        config: the run's configuration.
        serializer: how it writes.
        model: with the weights of the last step.
        training: the optimizer's state.
        counters: what else training goes on with.
        keep: how many of the newest checkpoints stay; `latest` and `best` always do.
        data: of each corpus what it holds.
        average: averaged parameters by name.
        best: point ``run/best`` at it too.

    Raises:
        OSError: for a full disk, say; the previous checkpoint is left as it was.
    """
    final = run / f"step-{step:08d}"
    temporary = run / f".step-{step:08d}.{os.getpid()}"
    run.mkdir(parents=True, exist_ok=True)
    sweep(run)
    try:
        (temporary / "training").mkdir(parents=True)
        described = {
            "format": FORMAT,
            "step": step,
            "train": to_json(config),
            "data": data or {},
            "serializer": serializer.to_json(),
        }
        write_synced(temporary / "config.json", json.dumps(described, indent=1).encode())
        layout = json.dumps(serializer.layout.to_json(), indent=1)
        write_synced(temporary / "vocabulary.json", layout.encode())
        for parts in serializer.state().values():
            for name, content in parts.items():
                write_synced(temporary / name, content)
        weights = model.state_dict()
        write_synced(temporary / "model.safetensors", _bytes(weights))
        if average is not None:
            write_synced(temporary / "ema.safetensors", _bytes({**weights, **average}))
        if training is not None:
            write_synced(temporary / "training" / "optimizer.safetensors", _bytes(training))
            counted = json.dumps(counters or {}).encode()
            write_synced(temporary / "training" / "counters.json", counted)
            sync_folder(temporary / "training")
        sync_folder(temporary)
        remove(final)  # a run that was killed before `latest` named this one does it again
        os.replace(temporary, final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    point(run, "latest", final)
    if best:
        point(run, "best", final)
    tidy(run, keep)
    return final


def _bytes(tensors: dict[str, Tensor]) -> bytes:
    return save({n: t.detach().cpu().contiguous() for n, t in tensors.items()})


def saved_config(run: Path) -> TrainConfig | None:
    """Return the configuration of the run in a folder; None where there is none.

    Raises:
        ValueError: where its newest checkpoint cannot be read.
    """
    if not (run / "latest").is_file():
        return None
    file = resolve(run) / "config.json"
    try:
        return cast(TrainConfig, from_json(TrainConfig, json.loads(file.read_bytes())["train"]))
    except _DAMAGE as error:
        raise ValueError(f"{file} is damaged: {error}") from error


def load_checkpoint(
    path: str | Path,
    device: torch.device | str = "cpu",
    *,
    averaged: bool = True,
    merged: bool = True,
) -> Checkpoint:
    """Return the checkpoint at `path`, a checkpoint folder or a run's folder.

    Args:
        path: see `resolve`.
        device: of the model.
        averaged: take the averaged weights where the checkpoint holds them.
        merged: add what LoRA learnt to the matrices it belongs to; training goes on without.

    Raises:
        ValueError: for a missing, truncated or foreign checkpoint, saying what is wrong.
    """
    folder = resolve(path)
    with older_told(folder.parent, folder):
        return _load(folder, device, averaged, merged)


def _load(folder: Path, device: torch.device | str, averaged: bool, merged: bool) -> Checkpoint:
    try:
        described = json.loads((folder / "config.json").read_text())
        layout = json.loads((folder / "vocabulary.json").read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{folder}: config.json or vocabulary.json is damaged: {error}") from error
    written = described.get("format") if isinstance(described, dict) else None
    if written != FORMAT:
        raise ValueError(
            f"{folder}: expected checkpoint format {FORMAT}, got {written!r}; "
            f"it was not written by this version of gato"
        )
    try:
        step = int(described["step"])
        if layout != described["serializer"]["layout"]:
            raise ValueError("vocabulary.json does not belong to this config.json")
        config = from_json(TrainConfig, described["train"])
        data = _data(described.get("data", {}))
        serializer = Serializer.from_json(described["serializer"], _state(folder))
        model = build_model(config, serializer)
    except KeyError as error:
        raise ValueError(f"{folder}: config.json is damaged: {error} is missing") from error
    except _DAMAGE as error:
        raise ValueError(f"{folder}: this checkpoint cannot be read: {error}") from error
    averaged = averaged and config.ema > 0
    file = folder / ("ema.safetensors" if averaged else "model.safetensors")
    _fill(model, file, folder)
    if merged:
        merge_lora(model)
    model = model.to(device).eval()
    return Checkpoint(folder, config, serializer, model, step, averaged, data)


@torch.no_grad()
def _fill(model: GatoModel, file: Path, folder: Path) -> None:
    """Read weights into a model one after another, so that memory holds no second model."""
    wanted = model.state_dict()
    with opened(file) as found:
        held = {name: tuple(found.get_slice(name).get_shape()) for name in found.keys()}
        wrong = [name for name, t in wanted.items() if held.get(name) != tuple(t.shape)]
        if wrong or len(held) != len(wanted):
            name = (wrong or sorted(set(held) - set(wanted)))[0]
            raise ValueError(f"{folder}: {file.name} does not fit its config.json at {name!r}")
        for name, tensor in wanted.items():
            tensor.copy_(found.get_tensor(name))


def _data(found: Any) -> dict[str, dict[str, Any]]:
    """Return what a checkpoint says it was trained on, checked as far as it is used."""
    for name, corpus in dict(found).items():
        if not isinstance(corpus, dict) or not _said_well(corpus):
            raise ValueError(f"what it says of corpus {name!r} is damaged: {corpus!r:.100}")
    return dict(found)


def _said_well(corpus: dict[str, Any]) -> bool:
    low_high = [corpus.get("seeds", (0, 0)), corpus.get("evaluation_seeds") or (0, 0)]
    if not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in low_high):
        return False
    stores, held = corpus.get("stores", {}), corpus.get("validation", 0.0)
    if not isinstance(stores, dict) or not isinstance(held, int | float):
        return False
    sizes = corpus.get("sizes", dict.fromkeys(stores, 0))
    if not isinstance(sizes, dict) or sizes.keys() != stores.keys():
        return False
    counts = [corpus.get(name, 0) for name in ("records", "held_out")]
    return all(isinstance(n, int) for row in (*low_high, counts, sizes.values()) for n in row)


def _state(folder: Path) -> dict[str, dict[str, bytes]]:
    there = [name for name in TEXT_FILES if (folder / name).is_file()]
    return {"text": {name: (folder / name).read_bytes() for name in there}}


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file.

    Raises:
        ValueError: for a damaged or truncated file.
    """
    folder = path.parent.parent if path.parent.name == "training" else path.parent
    with older_told(folder.parent, folder):
        return _tensors(path)


@contextlib.contextmanager
def counters_of(checkpoint: Path) -> Iterator[Any]:
    """Give a `with` block what training goes on with, beside the optimizer's state.

    Raises:
        ValueError: where the file is missing or damaged, as far as the block makes use of it.
    """
    file = checkpoint / "training" / "counters.json"
    with older_told(checkpoint.parent, checkpoint):
        try:
            yield json.loads(file.read_bytes())
        except (OSError, *_DAMAGE) as error:
            told = f"{error} is missing" if isinstance(error, KeyError) else error
            raise ValueError(f"{file} is damaged: {told}") from error


def _tensors(path: Path) -> dict[str, Tensor]:
    with opened(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Any]:
    """Open a safetensors file.

    Raises:
        ValueError: where it is damaged or truncated, or lacks what is read of it.
    """
    try:
        with safe_open(str(path), "pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged or truncated: {error}") from error
