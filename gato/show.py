"""The stream as a table that a person can read: any task's or store's tokens, one per line.

Without a checkpoint the text model is a small one, trained on the text at hand, so that the ids
of text and of everything behind it in the vocabulary are not those of any trained model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from gato import bad_batch
from gato.envs import registry
from gato.envs.episode import Episode, TaskSpec
from gato.envs.play import play
from gato.envs.records import RecordStore
from gato.envs.score import RandomExpert
from gato.envs.store import EpisodeStore, open_store
from gato.tokenizers.describe import describe
from gato.tokenizers.serializer import Serializer
from gato.tokenizers.spaces import CodecOptions
from gato.tokenizers.stream import TokenSequence, concatenate
from gato.tokenizers.task_codec import History, to_come
from gato.tokenizers.text import MODEL_FILE, train_text_model

CODECS = {
    "scalar": CodecOptions(observations="scalar", scales="mu_law"),
    "vector": CodecOptions(observations="vector"),
}
"""Gato's one token per number, and our groups of numbers in one token."""

TEXT_PIECES = 320
"""The 256 bytes and a few pieces: a text model for showing, not for training."""


def show(
    what: str,
    *,
    steps: int = 2,
    seed: int = 0,
    index: int = 0,
    codec: str | None = None,
    checkpoint: str | Path | None = None,
    returns: bool = False,
    joint: int = 0,
    shown: bool = False,
    frame_cell: int | None = None,
    pairs: int = 1,
) -> list[dict[str, Any]]:
    """Return the tokens of a task's or store's example: one dict of plain values each.

    Args:
        what: a task id, which its expert then plays, or a folder that holds a store or, of a run,
            a bad batch.
        steps: of an episode; its head stands before them.
        seed: of the episode played.
        index: of the episode or record in a store, or of the document at fault in a bad batch.
        codec: ``scalar`` (the default) or ``vector``.
        checkpoint: write the tokens as this model reads them, instead of by `codec`.
        returns: write the return to come before every action; a checkpoint says so itself.
        joint: actions predicted beside every step, which is its observation alone; a checkpoint
            says so itself.
        shown: of `joint`, let actions stand in the stream too, where later steps see them.
        frame_cell: pixels along a side of what one token shows of a task's frames; by default 16,
            or what a checkpoint says.
        pairs: captions, or questions about pictures, from `index` on, as one sequence.

    Raises:
        ValueError: for what is neither a known task nor a store.
    """
    if steps < 1:
        raise ValueError(f"expected at least 1 step; got {steps}.")
    if checkpoint is not None and (codec, frame_cell) != (None, None):
        raise ValueError(
            "expected a codec, a frame_cell or a checkpoint, which has its own; got both."
        )
    if checkpoint is not None and (returns or joint):
        raise ValueError("expected returns, joint or a checkpoint, which says so itself; got both.")
    if shown and not joint:
        raise ValueError("shown is how actions beside steps are written: expected joint too.")
    if pairs < 1:
        raise ValueError(f"expected at least 1 as pairs; got {pairs}.")
    folder = Path(what)
    if (folder / "manifest.json").is_file():
        store = open_store(folder)
        if isinstance(store, RecordStore):
            records = [_at(store, i, folder) for i in range(index, index + pairs)]
            texts = [text for record in records for text in _record_texts(record)]
            serializer = _serializer(texts, codec, checkpoint)
            return describe(serializer, serializer.pairs([_record(serializer, r) for r in records]))
        spec, episode = store.spec, _at(store, index, folder)
    elif (folder / "about.json").is_file():
        serializer = _serializer([], None, checkpoint or folder.parent)
        return describe(serializer, bad_batch.read(folder, index, serializer))
    elif folder.is_dir():
        raise ValueError(f"expected a store or a task id; {what} is a folder without a manifest.")
    else:
        spec = registry.spec(what)
        episode = _played(spec, steps, seed)
    texts = list(_episode_texts(spec, episode))
    serializer = _serializer(texts, codec, checkpoint, frame_cell)
    if checkpoint is None:
        due = _returns(episode) if returns else None
        hides = joint > 0 and not shown
        serializer.add_task(spec, history=History(0, hides, returns=due, joint=joint))
    written = serializer.episode(episode)
    return describe(
        serializer, concatenate([written.head, written.window(0, min(steps, len(written)))])
    )


def _returns(episode: Episode) -> tuple[float, float]:
    """Return between what the returns to come of one episode lie."""
    pool = to_come(episode.rewards)
    return min(0.0, float(pool.min())), float(pool.max())


def table(tokens: list[dict[str, Any]], console: Console) -> None:
    """Print tokens as a table; those the model learns to predict stand out."""
    shown = Table(box=None, header_style="dim", pad_edge=False)
    for heading in tokens[0]:
        shown.add_column(heading, justify="left" if heading in ("modality", "value") else "right")
    for token in tokens:
        cells = ["" if v is None else _cell(v) for v in token.values()]
        shown.add_row(*map(escape, cells), style="bold green" if token["target"] else None)
    console.print(shown)


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else ""
    if isinstance(value, dict):
        return "  ".join(f"{k} {_cell(v)}" for k, v in value.items())
    if isinstance(value, list):
        return " ".join(_cell(v) for v in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _at(store: EpisodeStore | RecordStore, index: int, folder: Path) -> Any:
    if not 0 <= index < len(store):
        raise ValueError(f"expected an index in [0, {len(store)}) for {folder}; got {index}.")
    return store.episode(index) if isinstance(store, EpisodeStore) else store[index]


def _played(spec: TaskSpec, steps: int, seed: int) -> Episode:
    """Return the first steps of the expert's episode, or of a random one where there is none."""
    env = gym.wrappers.TimeLimit(registry.make(spec.id), steps)
    try:
        known = registry.has_expert(spec.id)
        expert = registry.make_expert(spec.id) if known else RandomExpert(spec)
        return play(env, expert, spec, seed, noise=0.0)
    finally:
        env.close()


def _serializer(
    texts: list[str],
    codec: str | None,
    checkpoint: str | Path | None,
    frame_cell: int | None = None,
) -> Serializer:
    if checkpoint is not None:
        from gato.checkpoint import load_checkpoint

        return load_checkpoint(checkpoint).serializer
    if codec is not None and codec not in CODECS:
        raise ValueError(f"expected a codec of {', '.join(CODECS)}; got {codec!r}.")
    model = train_text_model(texts, TEXT_PIECES)
    options = CODECS[codec or "scalar"]
    if frame_cell is not None:
        options = replace(options, frame_cell=frame_cell)
    return Serializer(options, {"text": {MODEL_FILE: model}})


def _episode_texts(spec: TaskSpec, episode: Episode) -> Iterator[str]:
    yield spec.instruction or spec.id
    for column in episode.observations.values():
        if not isinstance(column, np.ndarray):
            yield from dict.fromkeys(column)


def _record_texts(record: dict[str, Any]) -> Iterator[str]:
    if "text" in record:
        yield record["text"]
    yield from (pair["text"] for pair in record.get("pairs", ()))
    for message in record.get("messages", ()):
        yield from (part["text"] for part in message["content"] if part["type"] == "text")


def _record(serializer: Serializer, record: dict[str, Any]) -> TokenSequence:
    match record["kind"]:
        case "document":
            return serializer.document(record["text"])
        case "caption":
            return serializer.caption(record["image"], record["text"])
        case "pairs":
            return serializer.captions((p["image"], p["text"]) for p in record["pairs"])
    return serializer.conversation(record["messages"])
