"""What a run learns from its data before its first step: the text model, and scales of numbers."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from gato.config import TrainConfig
from gato.corpora import Corpus, EpisodeCorpus, open_corpus
from gato.text_model import equal_parts
from gato.tokenizers.modality import Spec
from gato.tokenizers.serializer import History, Serializer
from gato.tokenizers.text import MODEL_FILE, train_text_model

_TEXT_CHARACTERS = 2_000_000  # as much text as the text model and the run's start can afford
_SCALE_ROWS = 20_000


def make_serializer(config: TrainConfig, text_model: bytes | None = None) -> Serializer:
    """Return the serializer of a run: text model trained, tasks added, scales fitted."""
    bare = Serializer(config.codec, {"text": {MODEL_FILE: text_model}} if text_model else None)
    corpora = [open_corpus(c, bare) for c in config.corpora]
    if text_model is None:
        words = equal_parts(corpora, _TEXT_CHARACTERS)
        text_model = train_text_model(words, config.text_pieces, seed=config.seed)
    serializer = Serializer(config.codec, {"text": {MODEL_FILE: text_model}})
    scales = fit_scales(corpora, config)
    for corpus in corpora:
        if isinstance(corpus, EpisodeCorpus):
            c = corpus.config
            history = History(c.window, c.hide_actions >= 1, c.temperature)
            for store in corpus.stores:
                serializer.add_task(store.spec, scales.get(store.spec.id), history)
    return serializer


def fit_scales(corpora: list[Corpus], config: TrainConfig) -> dict[str, dict[str, Spec]]:
    """Return per task and path the fitted spec of observed numbers.

    Scales are shared by leaves of one suite with one name and shape, so that the same number means
    the same thing in related tasks.
    """
    scratch = Serializer(config.codec)
    pools: dict[tuple[str, str, str], list[np.ndarray]] = {}
    members: list[tuple[str, str, str, Spec, tuple[str, str, str]]] = []
    for corpus in corpora:
        if not isinstance(corpus, EpisodeCorpus):
            continue
        for store in corpus.stores:
            task = scratch.add_task(store.spec)
            for path, modality, spec in task.observation:
                if not scratch.modalities[modality].fits:
                    continue
                key = (store.spec.suite, path, json.dumps(spec["shape"]))
                members.append((store.spec.id, path, modality, spec, key))
                pools.setdefault(key, []).extend(_columns(store, path))
    fitted: dict[str, dict[str, Spec]] = {}
    for task_id, path, modality, spec, key in members:
        fitted.setdefault(task_id, {})[path] = scratch.modalities[modality].fit(pools[key], spec)
    return fitted


def _columns(store: Any, path: str) -> list[np.ndarray]:
    columns, rows = [], 0
    for i in np.linspace(0, len(store) - 1, min(len(store), 200)).astype(int):
        columns.append(np.asarray(store.episode(int(i)).observations[path]))
        rows += len(columns[-1])
        if rows >= _SCALE_ROWS:
            break
    return columns
