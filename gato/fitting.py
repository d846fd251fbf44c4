"""What a run learns from its data before its first step: the text model, and scales of numbers."""

from __future__ import annotations

import base64
import json
from dataclasses import replace

import numpy as np

from gato.config import TrainConfig
from gato.corpora import Corpus, CorpusConfig, EpisodeCorpus, open_corpus
from gato.distributed import World
from gato.envs.store import EpisodeStore
from gato.selection import require_same_task
from gato.telling import tell
from gato.text_model import checked, equal_parts, fewer
from gato.tokenizers.modality import Spec
from gato.tokenizers.serializer import Serializer
from gato.tokenizers.task_codec import History, to_come
from gato.tokenizers.text import MODEL_FILE, train_text_model

_TEXT_CHARACTERS = 2_000_000  # as much text as the text model and the run's start can afford
_SCALE_ROWS = 20_000


def make_serializer(
    config: TrainConfig, text_model: bytes | None = None, known: Serializer | None = None
) -> Serializer:
    """Return the serializer of a run: text model trained, tasks added, scales fitted.

    Args:
        config: the run.
        text_model: a SentencePiece model to use instead of training one.
        known: what the weights read and write that the run begins with: its text and ids are kept,
            and its tasks with their scales.
    """
    if known is None:
        bare = Serializer(config.codec, {"text": {MODEL_FILE: text_model}} if text_model else None)
    else:
        bare = Serializer(config.codec, known.state(), known.layout)
    corpora = [open_corpus(c, bare) for c in config.corpora]
    if known is None:
        serializer = _new_serializer(config, text_model, corpora)
    else:
        serializer = Serializer(config.codec, known.state(), known.layout, known.tasks.values())
    scales = fit_scales(corpora, config)
    for name, task in serializer.tasks.items():
        fits = {p: spec for p, m, spec in task.observation if serializer.modalities[m].fits}
        scales[name] = {**scales.get(name, {}), **fits}
    played = [c for c in corpora if isinstance(c, EpisodeCorpus)]
    returns = fit_returns(played)
    for corpus in played:
        c = corpus.config
        for store in corpus.stores:
            name = store.spec.id
            history = history_of(c)
            if c.returns:
                history = replace(history, returns=returns[name], kappa=c.kappa)
            serializer.add_task(store.spec, scales.get(name), history)
    return serializer


def _new_serializer(
    config: TrainConfig, text_model: bytes | None, corpora: list[Corpus]
) -> Serializer:
    """Return a serializer with a text model that was given or is trained on the corpora."""
    if text_model is None:
        words = equal_parts(corpora, _TEXT_CHARACTERS)
        text_model = train_text_model(words, config.text_pieces, seed=config.seed)
        for note in fewer(text_model, config.text_pieces):
            tell(note)
    else:
        checked(text_model, "text_model")
    return Serializer(config.codec, {"text": {MODEL_FILE: text_model}})


def history_of(corpus: CorpusConfig) -> History:
    """Return what a policy remembers of a corpus' tasks, but for the range of their returns."""
    hides = corpus.hide_actions >= 1
    return History(corpus.window, hides, corpus.temperature, joint=corpus.joint)


def fit_returns(corpora: list[EpisodeCorpus]) -> dict[str, tuple[float, float]]:
    """Return per task the lowest and highest return to come, where corpora ask for it.

    Raises:
        ValueError: where two corpora show one task differently, or one asks and the other does not.
    """
    first: dict[str, tuple[EpisodeCorpus, EpisodeStore]] = {}
    found: dict[str, tuple[float, float]] = {}
    for corpus in corpora:
        for store, items in zip(corpus.stores, corpus.items, strict=True):
            name = store.spec.id
            other, shown = first.setdefault(name, (corpus, store))
            both = f"corpora {other.config.name!r} and {corpus.config.name!r}"
            require_same_task(both, shown, store)
            if other.config.returns != corpus.config.returns:
                raise ValueError(
                    f"{both} hold episodes of {name!r}, and one of them is to predict returns; set "
                    f"returns in both or in none"
                )
            if other.config.joint != corpus.config.joint:
                raise ValueError(
                    f"{both} hold episodes of {name!r} with joint = {other.config.joint} and "
                    f"{corpus.config.joint}; set it to the same in both"
                )
            if corpus.config.returns:
                spread = np.linspace(0, len(items) - 1, min(len(items), 200)).astype(int)
                some = [to_come(np.asarray(store.column(int(i), "rewards"))) for i in items[spread]]
                pool = np.concatenate([*some, store.returns[items], found.get(name, ())])
                found[name] = float(pool.min()), float(pool.max())
    return found


def shared_serializer(
    config: TrainConfig,
    text_model: bytes | None,
    world: World,
    known: Serializer | None = None,
) -> Serializer:
    """Return the serializer of a run: made by process 0, the same in all."""
    if world.size == 1:
        return make_serializer(config, text_model, known)

    def make() -> str:
        made = make_serializer(config, text_model, known)
        state = {
            modality: {name: base64.b64encode(part).decode() for name, part in parts.items()}
            for modality, parts in made.state().items()
        }
        return json.dumps([made.to_json(), state])

    described, coded = json.loads(world.from_first(make))
    state = {m: {n: base64.b64decode(c) for n, c in parts.items()} for m, parts in coded.items()}
    return Serializer.from_json(described, state)


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
        for store, items in zip(corpus.stores, corpus.items, strict=True):
            task = scratch.add_task(store.spec)
            for path, modality, spec in task.observation:
                if not scratch.modalities[modality].fits:
                    continue
                key = (store.spec.suite, path, json.dumps(spec["shape"]))
                members.append((store.spec.id, path, modality, spec, key))
                pools.setdefault(key, []).extend(_columns(store, items, path))
    fitted: dict[str, dict[str, Spec]] = {}
    for task_id, path, modality, spec, key in members:
        fitted.setdefault(task_id, {})[path] = scratch.modalities[modality].fit(pools[key], spec)
    return fitted


def _columns(store: EpisodeStore, items: np.ndarray, path: str) -> list[np.ndarray]:
    columns, rows = [], 0
    for i in items[np.linspace(0, len(items) - 1, min(len(items), 200)).astype(int)]:
        columns.append(np.asarray(store.column(int(i), "observations", path)))
        rows += len(columns[-1])
        if rows >= _SCALE_ROWS:
            break
    return columns
