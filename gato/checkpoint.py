"""A checkpoint: one self-sufficient folder, written whole or not at all, and never unpickled.

    config.json          the run's configuration, what it was trained on, the serializer's tasks
                         and scales
    vocabulary.json      the ledger of id ranges
    model.safetensors    weights
    text.model           the SentencePiece model (each modality's fitted parts lie under its name)
    training/            optimizer state and counters; only needed to go on training

A run's folder holds ``step-N`` checkpoints and ``latest``, a file naming the newest complete one.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from gato.config import TrainConfig, from_json, to_json
from gato.envs.files import sync_folder, write_synced
from gato.model import GatoModel
from gato.tokenizers.serializer import Serializer

FORMAT = 1
_REQUIRED = ("config.json", "vocabulary.json", "model.safetensors", "text.model")


@dataclass
class Checkpoint:
    """A loaded checkpoint."""

    path: Path
    config: TrainConfig
    serializer: Serializer
    model: GatoModel
    step: int
    data: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Of each corpus what it was trained on, as `Corpus.contents` says; empty where unknown."""


def build_model(config: TrainConfig, serializer: Serializer) -> GatoModel:
    """Return the model of a run, with the embedders of every modality that has one."""
    options = serializer.net_options()
    nets = {}
    for name, modality in serializer.modalities.items():
        chosen = {**options.get(name, {}), **config.embedders.get(name, {})}
        net = modality.net(config.model.width, chosen)
        if net is not None:
            nets[name] = net
    return GatoModel(config.model, serializer.layout.size, serializer.control["<masked>"], nets)


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
) -> Path:
    """Write ``run/step-N`` and point ``run/latest`` at it; killed anywhere, the last one loads.

    Raises:
        OSError: for a full disk, say; the previous checkpoint is left as it was.
    """
    final = run / f"step-{step:08d}"
    temporary = run / f".step-{step:08d}.{os.getpid()}"
    run.mkdir(parents=True, exist_ok=True)
    for left_over in run.glob(".step-*"):
        shutil.rmtree(left_over)
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
        weights = {n: t.detach().cpu().contiguous() for n, t in model.state_dict().items()}
        write_synced(temporary / "model.safetensors", save(weights))
        if training is not None:
            tensors = {n: t.detach().cpu().contiguous() for n, t in training.items()}
            write_synced(temporary / "training" / "optimizer.safetensors", save(tensors))
            counted = json.dumps(counters or {}).encode()
            write_synced(temporary / "training" / "counters.json", counted)
        sync_folder(temporary)
        if final.exists():
            shutil.rmtree(final)
        os.replace(temporary, final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    write_synced(run / ".latest.new", final.name.encode())
    os.replace(run / ".latest.new", run / "latest")
    sync_folder(run)
    for old in sorted(run.glob("step-*"))[:-keep]:
        shutil.rmtree(old)
    return final


def resolve(path: str | Path) -> Path:
    """Return the checkpoint folder that `path`, a checkpoint, a run or a quickstart, stands for.

    Raises:
        ValueError: where there is none, or it lacks a file.
    """
    folder = Path(path)
    if (folder / "model" / "latest").is_file():  # what `gato quickstart` wrote
        folder = folder / "model"
    if (folder / "latest").is_file():
        named = (folder / "latest").read_bytes().decode(errors="replace").strip()
        if not (folder / named).is_dir():
            raise ValueError(f"{folder / 'latest'} names {named!r}, which is not in {folder}")
        folder = folder / named
    if not folder.is_dir():
        raise ValueError(f"expected a checkpoint folder at {path}; there is no such folder")
    missing = [name for name in _REQUIRED if not (folder / name).is_file()]
    if missing:
        raise ValueError(
            f"{folder} is not a complete checkpoint: {', '.join(missing)} missing. Give a folder "
            f"that `gato train` wrote."
        )
    return folder


def load_checkpoint(path: str | Path, device: torch.device | str = "cpu") -> Checkpoint:
    """Return the checkpoint at `path`, a checkpoint folder or a run's folder.

    Raises:
        ValueError: for a missing, truncated or foreign checkpoint, saying what is wrong.
    """
    folder = resolve(path)
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
    weights = load_tensors(folder / "model.safetensors")
    wanted = model.state_dict()
    wrong = [n for n, t in wanted.items() if n not in weights or weights[n].shape != t.shape]
    if wrong or len(weights) != len(wanted):
        name = (wrong or sorted(set(weights) - set(wanted)))[0]
        raise ValueError(f"{folder}: model.safetensors does not fit its config.json at {name!r}")
    model.load_state_dict(weights)
    return Checkpoint(folder, config, serializer, model.to(device).eval(), step, data)


def _data(found: Any) -> dict[str, dict[str, Any]]:
    """Return what a checkpoint says it was trained on, checked as far as it is used."""
    for name, corpus in dict(found).items():
        low, high = corpus.get("seeds", (0, 0)) if isinstance(corpus, dict) else (None, None)
        if not isinstance(low, int) or not isinstance(high, int):
            raise ValueError(f"what it says of corpus {name!r} is damaged: {corpus!r:.100}")
    return dict(found)


def _state(folder: Path) -> dict[str, dict[str, bytes]]:
    return {"text": {"text.model": (folder / "text.model").read_bytes()}}


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file.

    Raises:
        ValueError: for a damaged or truncated file.
    """
    try:
        with safe_open(str(path), "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged or truncated: {error}") from error
