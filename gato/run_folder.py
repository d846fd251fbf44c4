"""The folder of a run: its checkpoints, and which of them is the latest and which the best.

It holds ``step-N`` checkpoints, ``latest``, a file naming the newest complete one, and ``best``,
which names the best one where the run measures that.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open

from gato.envs.files import sync_folder, write_synced
from gato.tokenizers.text import MODEL_FILE, TOKENIZER_FILE

FORMAT = 1
_REQUIRED = ("config.json", "vocabulary.json", "model.safetensors")


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


def tidy(run: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints, `latest` and `best`; and what a kill left."""
    sweep(run)
    pointed = {pointed_at(run, name) for name in ("latest", "best")}
    for old in sorted(run.glob("step-*"))[:-keep]:
        if old.name not in pointed:
            remove(old)


def sweep(run: Path) -> None:
    """Remove checkpoints that were being written when a run was killed."""
    for left_over in run.glob(".step-*"):
        shutil.rmtree(left_over)


def remove(checkpoint: Path) -> None:
    """Remove a checkpoint; killed anywhere, no half of one is left under its name."""
    if checkpoint.exists():
        hidden = checkpoint.with_name(f".{checkpoint.name}.old")
        os.replace(checkpoint, hidden)
        shutil.rmtree(hidden)


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
        with older_told(folder):
            if not named:
                raise ValueError(f"{folder / pointer} is empty: it should name a checkpoint")
            if not (folder / named).is_dir():
                raise ValueError(f"{folder / pointer} names {named!r}, which is not in {folder}")
        folder = folder / named
    if not folder.is_dir():
        raise ValueError(f"expected a checkpoint folder at {path}; there is no such folder")
    missing = _missing(folder)
    if missing:
        with older_told(folder.parent, folder):
            raise ValueError(
                f"{folder} is not a complete checkpoint: {', '.join(missing)} missing. Give a "
                f"folder that `gato train` wrote."
            )
    return folder


@contextlib.contextmanager
def older_told(run: Path, damaged: Path | None = None) -> Iterator[None]:
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
        if (folder / "training").is_dir():
            json.loads((folder / "training" / "counters.json").read_bytes())["sums"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError):
        return False
    return found == FORMAT and not _missing(folder)


def _missing(folder: Path) -> list[str]:
    missing = [name for name in _REQUIRED if not (folder / name).is_file()]
    texts = (MODEL_FILE, TOKENIZER_FILE)
    return missing + ([] if any((folder / name).is_file() for name in texts) else [MODEL_FILE])
