"""A sample costs the same out of any store, and is what the whole episode would have given."""

from __future__ import annotations

import gc
import json
import statistics
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gymnasium import spaces

from gato.bench_common import made_up
from gato.bench_data import ARM, sparse_store
from gato.config import TrainConfig
from gato.corpora import CorpusConfig, EpisodeCorpus, open_corpus
from gato.envs import store_reader
from gato.envs.episode import ANY_TEXT, Episode, TaskSpec
from gato.envs.store import EpisodeStore, EpisodeWriter, RecordStore
from gato.fitting import make_serializer
from gato.kept import ROOM, Kept, Room
from gato.memory import resident
from gato.mixture import Mixture
from gato.tokenizers.serializer import Serializer
from gato.tokenizers.spaces import CodecOptions
from gato.tokenizers.stream import TokenSequence

TALK = TaskSpec(
    id="toy/talk-v0",
    observation_space=spaces.Dict(
        {"said": ANY_TEXT(), "seen": spaces.Box(0, 255, (16, 16, 3), np.uint8)}
    ),
    action_space=spaces.Dict(
        {"go": spaces.Box(-1, 1, (2,), np.float32), "say": spaces.Discrete(3, start=1)}
    ),
    max_steps=60,
    control_hz=10.0,
    instruction="answer what is said",
)


def talk_episode(seed: int, steps: int = 40) -> Episode:
    """Return an episode whose texts change every few steps, their lengths from 0 to 60 letters."""
    rng = np.random.default_rng(seed)
    lines = ["the red ball is open " * int(n) for n in rng.integers(0, 4, steps)]
    said = [lines[k - k % 3] + str(seed * (k % 7 == 0)) for k in range(steps)]
    action = {
        "go": rng.uniform(-1, 1, (steps, 2)).astype(np.float32),
        "say": rng.integers(1, 4, steps),
    }
    no = np.zeros(steps, bool)
    return Episode(
        task=TALK.id,
        observations={
            "said": [*said, "the end"],
            "seen": rng.integers(0, 256, (steps + 1, 16, 16, 3), np.uint8),
        },
        actions={k: v[::-1].copy() for k, v in action.items()},
        targets=action,
        rewards=rng.normal(size=steps).astype(np.float32),
        terminated=no,
        truncated=no,
        instruction=TALK.instruction,
        seed=seed,
    )


@pytest.fixture(scope="module")
def talks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("scale") / "talks"
    with EpisodeWriter(path, TALK, shard_steps=120) as writer:
        for seed in range(8):
            writer.append(talk_episode(seed, steps=20 + 5 * (seed % 5)))
    return path


def assert_same(a: TokenSequence, b: TokenSequence) -> None:
    for name in ("ids", "modality", "local", "target", "hidden"):
        x, y = getattr(a, name), getattr(b, name)
        assert (x is None) == (y is None)
        if x is not None:
            assert x.dtype == y.dtype
            np.testing.assert_array_equal(x, y)
    assert list(a.payload) == list(b.payload)
    for modality, rows in a.payload.items():
        assert list(rows) == list(b.payload[modality])
        for key, column in rows.items():
            np.testing.assert_array_equal(column, b.payload[modality][key])


def keep_whole(corpus: EpisodeCorpus) -> None:
    """Let a corpus cut its windows from whole episodes: the slow twin."""
    corpus.kept = Kept(Room(1 << 40))
    for which, store in enumerate(corpus.stores):
        for index in range(len(store)):
            returns = corpus._returns(store, index)
            whole = corpus.serializer.episode(store.episode(index), returns)
            corpus.kept.put((which, index), whole, 0)


@pytest.mark.parametrize("name", ["arm", "grid", "talks"])
@pytest.mark.parametrize(
    "asked",
    [
        {"prompt": 0.0},
        {"prompt": 0.6, "prompt_steps": 3, "window": 5},
        {"prompt": 0.5, "hide_actions": 0.5, "returns": True},
    ],
)
def test_a_window_is_what_the_whole_episode_gives(
    tiny: TrainConfig, stores: Path, talks: Path, text_model: bytes, name: str, asked: dict
) -> None:
    path = talks if name == "talks" else stores / name
    config = replace(tiny, corpora=(CorpusConfig(name, str(path), **asked),))
    serializer = make_serializer(config, text_model)
    read, whole = (open_corpus(config.corpora[0], serializer) for _ in range(2))
    read.kept = Kept(Room(0))
    keep_whole(whole)
    for limit in (130 if name == "talks" else 60, 150, 301, 2000):
        for seed in range(40):
            one, other = (np.random.default_rng(seed) for _ in range(2))
            assert_same(read.sample(one, limit), whole.sample(other, limit))
            assert one.random() == other.random()
    assert len(read.kept) == 0


def test_only_the_steps_of_a_window_are_written(tmp_path, monkeypatch):
    with EpisodeWriter(tmp_path, ARM) as writer:
        writer.append(made_up(ARM, 3000))
    corpus = numbers(tmp_path)
    written = []
    window = EpisodeStore.window
    monkeypatch.setattr(
        EpisodeStore,
        "window",
        lambda store, i, a, b, **rest: written.append(b - a) or window(store, i, a, b, **rest),
    )
    monkeypatch.setattr(EpisodeStore, "episode", None)
    rng, per_step = np.random.default_rng(0), 39 + 1 + 4
    corpus.sample(rng, 1024)
    written.clear()
    for _ in range(50):
        corpus.sample(rng, 1024)
    assert max(written) <= 1024 // per_step
    assert len(written) <= 51


def numbers(path: Path) -> EpisodeCorpus:
    """Return the corpus of a store of numbers, read from its files."""
    serializer = Serializer(CodecOptions(scales="mu_law"))
    serializer.add_task(ARM)
    corpus = open_corpus(CorpusConfig("numbers", str(path), prompt=0.0), serializer)
    corpus.kept = Kept(Room(0))
    return corpus


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a store of ten million steps."""
    path = tmp_path_factory.mktemp("scale") / "large"
    sparse_store(path, ARM, 10_000_000)
    return path


def seconds(work: Callable[[], object]) -> float:
    """Return the processor time of a call: others may use this machine."""
    begun = time.process_time()
    work()
    return time.process_time() - begun


def test_ten_million_steps_open_at_once(large):
    store = EpisodeStore(large)
    assert (int(store.ends[-1]), len(store)) == (10_000_000, 100_000)
    assert min(seconds(lambda: EpisodeStore(large)) for _ in range(3)) < 0.3


def test_ten_million_steps_are_sampled_like_ten_thousand(large, tmp_path, monkeypatch):
    sparse_store(tmp_path / "small", ARM, 10_000)
    corpora = numbers(large), numbers(tmp_path / "small")
    times: list[list[float]] = [[], []]
    for block in range(9):
        for corpus, found in zip(corpora, times, strict=True):
            rng = np.random.default_rng(block)
            found.append(seconds(lambda c=corpus, r=rng: [c.sample(r, 256) for _ in range(25)]))
    slow, fast = (statistics.median(found[2:]) for found in times)
    assert slow < 1.5 * fast

    rows: list[int] = []
    read = store_reader.read_rows

    def counted(*what: object) -> np.ndarray:
        found = read(*what)
        rows.append(len(found))
        return found

    monkeypatch.setattr(store_reader, "read_rows", counted)
    counts = []
    for corpus in corpora:
        rows.clear()
        for seed in range(20):
            corpus.sample(np.random.default_rng(seed), 256)
        counts.append((len(rows), max(rows)))
    assert counts[0] == counts[1]


def test_two_ranks_draw_distinct_samples(large, monkeypatch):
    """Drawn with replacement, of ten million steps: what two draw twice is next to nothing."""
    corpus = numbers(large)
    mixture = Mixture([corpus], corpus.serializer, rows=4, row_length=512, parts=2)
    drawn: list[tuple[int, int]] = []
    window = EpisodeStore.window

    def seen(store: EpisodeStore, i: int, a: int, b: int, **rest: object) -> Episode:
        drawn.extend((i, step) for step in range(a, b))
        return window(store, i, a, b, **rest)

    monkeypatch.setattr(EpisodeStore, "window", seen)
    ranks = []
    for rank in range(2):
        drawn.clear()
        for k in range(10):
            mixture.part(k, rank)
        ranks.append(set(drawn))
    assert all(len(steps) > 200 for steps in ranks)
    assert not ranks[0] & ranks[1]


# ---- memory ------------------------------------------------------------------------------------


def test_what_is_kept_is_bounded_and_let_go(tiny, stores, text_model):
    room = Room(60_000)
    serializer = make_serializer(tiny, text_model)
    corpora = [open_corpus(c, serializer) for c in tiny.corpora]
    for corpus in corpora:
        corpus.kept = Kept(room)
    rng = np.random.default_rng(0)
    for _ in range(150):
        for corpus in corpora:
            corpus.sample(rng, 96)
    assert 0.8 * room.limit < room.used <= room.limit
    assert sum(len(corpus.kept) for corpus in corpora) > 10
    del corpora, corpus
    gc.collect()
    assert room.used == 0


def test_bytes_are_counted_as_they_are_taken(tiny, stores, text_model):
    serializer = make_serializer(tiny, text_model)
    corpora = [open_corpus(c, serializer) for c in tiny.corpora]
    room = Room(1 << 30)
    for corpus in corpora:
        corpus.sample(np.random.default_rng(0), 96)
        corpus.kept = Kept(room)
    gc.collect()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for seed in range(200):
            for corpus in corpora:
                corpus.sample(np.random.default_rng(seed), 96)
        gc.collect()
        taken = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert 0.6 < taken / room.used < 1.4


def test_memory_stays_flat_while_batches_are_drawn(tiny, stores, text_model, monkeypatch):
    monkeypatch.setattr(ROOM, "limit", ROOM.used)
    serializer = make_serializer(tiny, text_model)
    corpora = [open_corpus(c, serializer) for c in tiny.corpora]
    mixture = Mixture(corpora, serializer, rows=4, row_length=96)
    taken = []
    for k in range(300):
        mixture.part(k, 0)
        if k in (99, 299):
            taken.append(resident())
    assert taken[1] < 1.02 * taken[0]


# ---- files of another age ------------------------------------------------------------------------


def test_many_texts_are_read_singly_and_old_stores_as_before(tmp_path, monkeypatch):
    def write(path: Path) -> EpisodeStore:
        with EpisodeWriter(path, TALK) as writer:
            for seed in range(3):
                episode = talk_episode(seed)
                texts = [
                    f"{text} é{k} " + "x" * 50
                    for k, text in enumerate(episode.observations["said"])
                ]
                writer.append(
                    replace(episode, observations={**episode.observations, "said": texts})
                )
        return EpisodeStore(path)

    new = write(tmp_path / "new")
    assert new.manifest["shards"][0]["texts"] > 100
    monkeypatch.setattr("gato.envs.store_writer.TEXT_BYTES", 1 << 30)
    old = write(tmp_path / "old")
    assert "texts" not in old.manifest["shards"][0]
    (a,), (b,) = ((tmp_path / n).glob("*/texts.json") for n in ("new", "old"))
    assert a.read_bytes() == b.read_bytes()
    for i in range(3):
        assert new.episode(i).observations["said"] == old.episode(i).observations["said"]
        window = new.window(i, 5, 9)
        assert window.observations["said"] == old.column(i, "observations", "said")[5:9]
        assert window.instruction == TALK.instruction
    monkeypatch.setattr(store_reader, "_json", None)  # which reads all of them
    new.window(0, 3, 4)


def test_actions_may_be_words(tmp_path):
    answers = TaskSpec(
        id="toy/answers-v0",
        observation_space=TALK.observation_space,
        action_space=spaces.Dict({"answer": ANY_TEXT()}),
        max_steps=60,
        control_hz=1.0,
    )
    with EpisodeWriter(tmp_path, answers) as writer:
        for seed in range(2):
            words = {"answer": [f"yes {k % 3}" for k in range(40)]}
            episode = replace(talk_episode(seed), task=answers.id, actions=words, targets=words)
            writer.append(episode)
    store = EpisodeStore(tmp_path)
    store.validate()
    assert store.episode(1).actions == {"answer": [f"yes {k % 3}" for k in range(40)]}
    assert store.window(0, 4, 6).targets == {"answer": ["yes 1", "yes 2"]}


def test_records_without_their_lines_ends_are_read(stores, tmp_path):
    new = RecordStore(stores / "words")
    for file in (stores / "words").iterdir():
        if file.name != "records.ends.npy":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    del manifest["sha256"]["records.ends.npy"]
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    old = RecordStore(tmp_path)
    assert list(old) == list(new)
    assert old[-1] == new[39]
