"""The pictures of a folder by words or by another picture.

Every picture is embedded once: vectors are kept beside everything else that can be made again, per
folder and checkpoint, and taken from there while a file has the size and time that it had. The
file of vectors is replaced whole, and is nothing but numbers and names: a damaged one is made anew.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from gato.envs.files import write_atomically
from gato.envs.readers.pictures import SUFFIXES, read_picture
from gato.envs.readers.reader import ReadOptions
from gato.envs.remote import cache_folder
from gato.rollouts.retrieval import embed_images, embed_texts, rank
from gato.telling import tell

if TYPE_CHECKING:
    from gato.rollouts.agent import Agent

FORMAT = "gato-search-1"
AT_ONCE = 64
"""Pictures read and embedded together."""
_NAMED = 5  # damaged pictures named in an error

Progress = Callable[[int, int], None]
"""Told how many pictures are embedded, of how many."""
Stamp = tuple[str, int, int]
"""A picture's path below its folder, size in bytes, and time of change in nanoseconds."""


@dataclass(frozen=True)
class Found:
    """A picture that was searched for."""

    path: Path
    score: float
    """The inner product with what was asked, from -1 to 1."""


@dataclass
class Index:
    """The pictures of a folder."""

    folder: Path
    paths: list[str]
    """Below the folder, in their order."""
    rows: np.ndarray
    """float32 (n, E) unit vectors."""
    skipped: list[tuple[str, str]]
    """Pictures that cannot be read, and why."""

    def nearest(self, query: np.ndarray, top: int) -> list[Found]:
        """Return the pictures nearest to a unit vector (E,), nearest first."""
        (places,), (near,) = rank(query[None], self.rows, top)
        return [
            Found(self.folder / self.paths[k], float(s)) for k, s in zip(places, near, strict=True)
        ]


def search(
    agent: Agent, index: Index, text: str | None = None, image: Any = None, top: int = 5
) -> list[Found]:
    """Return the pictures of a folder that fit words, or look like a picture.

    Raises:
        ValueError: where neither or both are given, or the text is empty.
    """
    if (text is None) == (image is None) or text == "":
        raise ValueError("expected words to search by, or a picture; give one of the two.")
    query = embed_texts(agent, [text]) if text is not None else embed_images(agent, [image])
    return index.nearest(query[0], top)


def index_folder(
    agent: Agent,
    folder: str | Path,
    *,
    skip_bad: bool = False,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> Index:
    """Return the pictures of a folder and of those below it, hidden ones left out.

    Args:
        agent: a checkpoint with a contrastive head.
        folder: where the pictures lie.
        skip_bad: leave out those that cannot be read, and name them in the result.
        cache: where vectors are kept; by default in gato's cache. Where it cannot be written,
            that is said on stderr, and nothing is kept.
        progress: told as pictures are embedded.

    Raises:
        ValueError: where there are no pictures; or one cannot be read, with its name. What was
            embedded is kept all the same.
    """
    embed_texts(agent, [])  # raises at once where there is no head
    root = Path(folder)
    stamps = pictures_in(root)
    if not stamps:
        raise ValueError(f"expected pictures ({', '.join(SUFFIXES)}) in {root}; found none.")
    kept_in = (cache or cache_folder() / "search") / f"{_key(agent, root)}.safetensors"
    known = _read(kept_in)
    missing = [stamp for stamp in stamps if stamp not in known]
    bad: list[tuple[str, str]] = []
    if progress is not None:
        progress(len(stamps) - len(missing), len(stamps))
    try:
        for start in range(0, len(missing), AT_ONCE):
            some = missing[start : start + AT_ONCE]
            found, damaged = _embed(agent, root, some)
            known.update(found)
            bad += damaged
            if progress is not None:
                progress(len(stamps) - len(missing) + start + len(some), len(stamps))
    finally:  # also where it is interrupted
        there = [stamp for stamp in stamps if stamp in known]
        if missing and there:
            _keep(kept_in, {stamp: known[stamp] for stamp in there})
    if bad and not skip_bad:
        told = "; ".join(f"{path}: {why}" for path, why in bad[:_NAMED])
        more = f"; and {len(bad) - _NAMED} more" if len(bad) > _NAMED else ""
        raise ValueError(
            f"{len(bad)} of {len(stamps)} pictures in {root} cannot be read ({told}{more}). Take "
            f"them away, or leave them out with --skip-bad."
        )
    if not there:
        raise ValueError(f"none of the {len(stamps)} pictures in {root} can be read.")
    rows = np.stack([known[stamp] for stamp in there])
    return Index(root, [path for path, _, _ in there], rows, bad)


def pictures_in(folder: Path) -> list[Stamp]:
    """Return the picture files of a folder and of those below it, by name; no hidden ones.

    Raises:
        ValueError: where there is no such folder.
    """
    if not folder.is_dir():
        raise ValueError(f"expected a folder of pictures; got {folder}.")
    found = []
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            path = Path(place) / name
            if path.suffix.lower() in SUFFIXES and not name.startswith(".") and path.is_file():
                about = path.stat()
                below = path.relative_to(folder).as_posix()
                found.append((below, about.st_size, about.st_mtime_ns))
    return sorted(found)


def _embed(
    agent: Agent, root: Path, stamps: Sequence[Stamp]
) -> tuple[dict[Stamp, np.ndarray], list[tuple[str, str]]]:
    """Return the vectors of pictures, and those that cannot be read with the reason."""
    read: dict[Stamp, np.ndarray] = {}
    bad = []
    for stamp in stamps:
        try:
            read[stamp] = read_picture(root / stamp[0], ReadOptions())
        except (ValueError, OSError) as error:
            bad.append((stamp[0], str(error)))
    rows = embed_images(agent, list(read.values()))
    return dict(zip(read, rows, strict=True)), bad


def _key(agent: Agent, root: Path) -> str:
    """Return the name of what is kept of a folder for a checkpoint."""
    checkpoint = agent.checkpoint
    weights = "ema.safetensors" if checkpoint.averaged else "model.safetensors"
    digest = hashlib.sha256()
    for name in ("config.json", weights):
        with (checkpoint.path / name).open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    digest.update(str(root.resolve()).encode("utf-8", "surrogateescape"))
    return digest.hexdigest()[:32]


def _read(path: Path) -> dict[Stamp, np.ndarray]:
    """Return what is kept; nothing where there is nothing, or it is damaged."""
    try:
        with safe_open(str(path), "np") as file:
            about = file.metadata() or {}
            if about.get("format") != FORMAT:
                return {}
            rows = file.get_tensor("rows")
        stamps = [(str(p), int(size), int(time)) for p, size, time in json.loads(about["pictures"])]
        return dict(zip(stamps, rows, strict=True))
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):
        return {}


def _keep(path: Path, known: dict[Stamp, np.ndarray]) -> None:
    """Write vectors for the next time; where that cannot be, say so: this time needs no file."""
    about = {"format": FORMAT, "pictures": json.dumps(list(known))}
    content = save({"rows": np.stack(list(known.values()))}, metadata=about)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content)
    except OSError as error:
        tell(
            f"pictures are embedded anew next time: what they gave cannot be kept in {path.parent} "
            f"({error.strerror or error}); name another folder in GATO_CACHE"
        )
