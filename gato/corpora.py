"""Corpora: stores on disk as sources of token sequences, each sample a pure function of its rng."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from gato.corpus_config import Corpus, CorpusConfig
from gato.envs.files import stores_below
from gato.envs.mirror import local
from gato.envs.records import RecordStore
from gato.envs.store import EpisodeStore, open_store
from gato.episode_corpus import EpisodeCorpus
from gato.record_corpus import RecordCorpus
from gato.tokenizers.serializer import Serializer

__all__ = ["Corpus", "CorpusConfig", "EpisodeCorpus", "RecordCorpus", "open_corpus"]


def open_corpus(config: CorpusConfig, serializer: Serializer) -> Corpus:
    """Return the corpus at ``config.path``, adding its tasks to the serializer where new.

    Raises:
        ValueError: where no store lies there, or it is empty.
    """
    root = local(config.path)
    folders = stores_below(root)
    if not folders:
        raise ValueError(
            f"corpus {config.name!r}: expected a store or a folder of stores at {root}; found none"
        )
    found = [(f, skipped_of(config, root, f)) for f in folders]
    stores = [open_store(f, shards) for f, shards in found if shards is not None]
    stores = [s for s in stores if len(s) or not getattr(s, "skipped", ())]
    if not stores:
        raise ValueError(
            f"corpus {config.name!r}: all of it at {root} is damaged: make it again, or leave "
            f"{config.name!r} out of --data or of the mixture's file"
        )
    records = [s for s in stores if isinstance(s, RecordStore)]
    episodes = [s for s in stores if isinstance(s, EpisodeStore)]
    if records and episodes:
        raise ValueError(
            f"corpus {config.name!r}: expected stores of one kind at {root}; got episodes in "
            f"{episodes[0].path} and records in {records[0].path}"
        )
    if records:
        return RecordCorpus(config, records, serializer)
    return EpisodeCorpus(config, episodes, serializer)


def skipped_of(config: CorpusConfig, root: Path, store: Path) -> list[str] | None:
    """Return the shards of a store that a corpus leaves out; None for the whole store."""
    place = store.relative_to(root).as_posix()
    skipped = [PurePosixPath(entry) for entry in config.skip]
    if PurePosixPath(place) in skipped:
        return None
    return [entry.name for entry in skipped if entry.parent == PurePosixPath(place)]
