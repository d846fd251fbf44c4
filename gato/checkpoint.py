"""A checkpoint: one self-sufficient folder, written whole or not at all, and never unpickled.

    config.json          the run's configuration, what it was trained on, the serializer's tasks
                         and scales
    vocabulary.json      the ledger of id ranges
    model.safetensors    weights
    ema.safetensors      their average over the steps, where the run keeps one
    text.model           the SentencePiece model, or the tokenizer.json of the language model that
                         the run began with, and what that says of its text (text.json)
    training/            optimizer state and counters; only needed to go on training

A run's folder holds ``step-N`` checkpoints, ``latest``, a file naming the newest complete one, and
``best``, which names the best one where the run measures that.
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
from gato.tokenizers.serializer import Serializer
from gato.tokenizers.text import MODEL_FILE, TEXT_FILES, TOKENIZER_FILE

FORMAT = 1
_REQUIRED = ("config.json", "vocabulary.json", "model.safetensors")


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
    _sweep(run)
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
        _remove(final)  # a run that was killed before `latest` named this one does it again
        os.replace(temporary, final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    point(run, "latest", final)
    if best:
        point(run, "best", final)
    tidy(run, keep)
    return final


def tidy(run: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints, `latest` and `best`; and what a kill left."""
    _sweep(run)
    pointed = {pointed_at(run, name) for name in ("latest", "best")}
    for old in sorted(run.glob("step-*"))[:-keep]:
        if old.name not in pointed:
            _remove(old)


def _sweep(run: Path) -> None:
    for left_over in run.glob(".step-*"):
        shutil.rmtree(left_over)


def _bytes(tensors: dict[str, Tensor]) -> bytes:
    return save({n: t.detach().cpu().contiguous() for n, t in tensors.items()})


def _remove(checkpoint: Path) -> None:
    """Remove a checkpoint; killed anywhere, no half of one is left under its name."""
    if checkpoint.exists():
        hidden = checkpoint.with_name(f".{checkpoint.name}.old")
        os.replace(checkpoint, hidden)
        shutil.rmtree(hidden)


def point(run: Path, name: str, checkpoint: Path) -> None:
    """Let ``run/latest`` or ``run/best`` name a checkpoint."""
    write_synced(run / f".{name}.new", checkpoint.name.encode())
    os.replace(run / f".{name}.new", run / name)
    sync_folder(run)


def pointed_at(run: Path, name: str) -> str | None:
    """Return the name of the checkpoint that ``run/latest`` or ``run/best`` names."""
    try:
        return (run / name).read_bytes().decode(errors="replace").strip()
    except FileNotFoundError:
        return None


def set_aside(run: Path) -> Path:
    """Move a run that lies in its folder into ``earlier-N`` in it; return that folder.

    What was left behind when this was killed goes where the rest of it went.
    """
    number = 1
    while (run / f"earlier-{number}").exists():
        number += 1
    aside, before = run / f"earlier-{number}", run / f"earlier-{number - 1}"
    begun = pointed_at(before, "latest")
    if begun and not (run / "latest").exists() and not (before / begun).exists():
        aside = before
    aside.mkdir(exist_ok=True)
    # `latest` goes first: killed in between, what is left is no run; the checkpoint that it names
    # goes last, so that what is left is known to belong to it
    names = ["latest", "best", "metrics.jsonl", "state.json", "tensorboard"]
    steps = sorted(run.glob("step-*"))
    for path in [*(run / name for name in names), *run.glob("bad-batch-*"), *steps]:
        if path.exists():
            os.replace(path, aside / path.name)
    return aside


def left_behind(run: Path) -> bool:
    """Return whether checkpoints of an earlier run lie in a folder that holds none any more.

    They would push those of a new run out, as newer ones.
    """
    return not (run / "latest").is_file() and any(
        path.exists() for path in (run / "best", *run.glob("step-*"))
    )


def resolve(path: str | Path) -> Path:
    """Return the checkpoint folder that `path` stands for.

    It is a checkpoint, a run, its file ``latest`` or ``best``, or what `gato quickstart` wrote.

    Raises:
        ValueError: where there is none, or it lacks a file.
    """
    folder, pointer = Path(path), "latest"
    if folder.name in ("latest", "best") and folder.is_file():
        folder, pointer = folder.parent, folder.name
    if (folder / "model" / "latest").is_file():  # what `gato quickstart` wrote
        folder = folder / "model"
    named = pointed_at(folder, pointer) if (folder / pointer).is_file() else None
    if named is not None:
        with _older_told(folder):
            if not named:
                raise ValueError(f"{folder / pointer} is empty: it should name a checkpoint")
            if not (folder / named).is_dir():
                raise ValueError(f"{folder / pointer} names {named!r}, which is not in {folder}")
        folder = folder / named
    if not folder.is_dir():
        raise ValueError(f"expected a checkpoint folder at {path}; there is no such folder")
    missing = _missing(folder)
    if missing:
        with _older_told(folder.parent, folder):
            raise ValueError(
                f"{folder} is not a complete checkpoint: {', '.join(missing)} missing. Give a "
                f"folder that `gato train` wrote."
            )
    return folder


@contextlib.contextmanager
def _older_told(run: Path, damaged: Path | None = None) -> Iterator[None]:
    """Let an error about a run's checkpoint name the newest other one that is whole.

    It is not taken by itself: whoever goes on from it gives up the steps since.
    """
    try:
        yield
    except ValueError as error:
        others = (p for p in sorted(run.glob("step-*"), reverse=True) if p != damaged)
        whole = next((p.name for p in others if _is_whole(p)), None)
        if whole is None or not (damaged is None or damaged.name.startswith("step-")):
            raise
        raise ValueError(
            f"{str(error).rstrip('.')}. {whole} beside it is whole: use {run / whole}, or write "
            f"{whole} into {run / 'latest'} to go on from there."
        ) from error


def _is_whole(folder: Path) -> bool:
    """Return whether a checkpoint has all its files, none cut off."""
    try:
        found = json.loads((folder / "config.json").read_bytes())["format"]
        json.loads((folder / "vocabulary.json").read_bytes())
        for file in folder.rglob("*.safetensors"):
            with safe_open(str(file), "pt"):  # compares its length with what its header says
                pass
    except (OSError, ValueError, KeyError, TypeError, SafetensorError):
        return False
    return found == FORMAT and not _missing(folder)


def _missing(folder: Path) -> list[str]:
    missing = [name for name in _REQUIRED if not (folder / name).is_file()]
    texts = (MODEL_FILE, TOKENIZER_FILE)
    return missing + ([] if any((folder / name).is_file() for name in texts) else [MODEL_FILE])


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
    except (ValueError, TypeError, KeyError, AttributeError) as error:
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
    with _older_told(folder.parent, folder):
        return _load(folder, device, averaged, merged)


def _load(folder: Path, device: torch.device | str, averaged: bool, merged: bool) -> Checkpoint:
    try:
        described = json.loads((folder / "config.json").read_text())
        layout = json.loads((folder / "vocabulary.json").read_text())
    except ValueError as error:
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
    except (TypeError, ValueError) as error:
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
    with _opened(file) as found:
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
    stores = corpus.get("stores", {})
    held = corpus.get("validation", 0.0)
    known = isinstance(stores, dict) and isinstance(held, int | float)
    return known and all(isinstance(n, int) for p in low_high for n in p)


def _state(folder: Path) -> dict[str, dict[str, bytes]]:
    there = [name for name in TEXT_FILES if (folder / name).is_file()]
    return {"text": {name: (folder / name).read_bytes() for name in there}}


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file.

    Raises:
        ValueError: for a damaged or truncated file.
    """
    folder = path.parent.parent if path.parent.name == "training" else path.parent
    with _older_told(folder.parent, folder):
        return _tensors(path)


def _tensors(path: Path) -> dict[str, Tensor]:
    with _opened(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Open a safetensors file; raise ValueError where it is damaged or truncated."""
    try:
        with safe_open(str(path), "pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged or truncated: {error}") from error
