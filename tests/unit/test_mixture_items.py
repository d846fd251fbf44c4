"""Which items a corpus draws: return filters, balance among stores, what is held out, pairs."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gymnasium import spaces
from hypothesis import given
from hypothesis import strategies as st

from gato.config import TrainConfig, from_json, to_json
from gato.corpora import Corpus, CorpusConfig, open_corpus
from gato.envs.episode import Episode, TaskSpec
from gato.envs.store import EpisodeWriter, RecordWriter
from gato.fitting import make_serializer
from gato.selection import held_out
from gato.tokenizers.serializer import Serializer
from gato.tokenizers.stream import TokenSequence

WALK = TaskSpec(
    id="toy/walk-v0",
    observation_space=spaces.Box(-np.inf, np.inf, (2,), np.float32),
    action_space=spaces.Box(-1, 1, (1,), np.float32),
    max_steps=9,
    control_hz=10.0,
    instruction="walk",
)


def walk(spec: TaskSpec, seed: int, score: float, steps: int = 3) -> Episode:
    """Return an episode that shows its seed and scores so much."""
    observed = np.full((steps + 1, 2), seed, np.float32)
    actions = np.zeros((steps, *spec.action_space.shape), np.float32)
    rewards, no = np.zeros(steps, np.float32), np.zeros(steps, bool)
    rewards[-1] = score
    columns = {"observation": observed}, {"action": actions}
    success = score > 5 if spec.measure == "success" else None
    return Episode(spec.id, *columns, rewards, no, no, None, "walk", seed, success)


def store(path: Path, scores: list[float], spec: TaskSpec = WALK, steps: int = 3) -> Path:
    with EpisodeWriter(path, spec) as writer:
        for seed, score in enumerate(scores):
            writer.append(walk(spec, seed, score, steps))
    return path


def opened(path: Path, text_model: bytes, **options: object) -> Corpus:
    """Return the corpus at a path, its numbers left as they are."""
    config = CorpusConfig("walks", str(path), prompt=0.0, **options)
    serializer = Serializer(state={"text": {"text.model": text_model}})
    corpus = open_corpus(config, serializer)
    for one in getattr(corpus, "stores", ()):
        if hasattr(one, "spec"):
            wide = {"shape": [2], "codec": "quantile", "low": [-1e3] * 2, "high": [1e3] * 2}
            serializer.add_task(one.spec, {"observation": wide})
    return corpus


def seeds(corpus: Corpus, draws: int = 300) -> Counter:
    """Return how often each episode is drawn, by the seed it shows."""
    rng, seen = np.random.default_rng(0), Counter()
    for _ in range(draws):
        shown = corpus.sample(rng, 60).payload["continuous"]["value"][0]
        seen[round(float(shown) * 1e3)] += 1
    return seen


# ---- filters ---------------------------------------------------------------------------------

SCORES = [float(i) for i in range(10)]
EXPERT = replace(WALK, random_score=2.0, expert_score=10.0)
SUCCESS = replace(WALK, measure="success", random_score=0.0, expert_score=1.0)
FILTERS = [
    (WALK, {}, set(range(10))),
    (WALK, {"min_return": 7.0}, {7, 8, 9}),
    (WALK, {"top": 0.2}, {8, 9}),
    (WALK, {"top": 0.01}, {9}),
    (EXPERT, {"min_fraction": 0.5}, {6, 7, 8, 9}),  # 2 + 0.5 x 8
    (WALK, {"min_fraction": 0.8}, {8, 9}),  # of the store's best, 9
    (SUCCESS, {"min_fraction": 0.8}, {6, 7, 8, 9}),
    (WALK, {"min_return": 3.0, "top": 0.5}, {5, 6, 7, 8, 9}),
]


@pytest.mark.parametrize(("spec", "options", "kept"), FILTERS, ids=str)
def test_filters_keep_the_good_and_count_the_others(tmp_path, text_model, spec, options, kept):
    corpus = opened(store(tmp_path / "walks", SCORES, spec), text_model, **options)
    assert set(seeds(corpus)) == kept
    left_out = 10 - len(kept)
    assert corpus.contents().get("left_out", 0) == left_out
    assert corpus.contents()["episodes"] == len(kept)
    assert corpus.contents()["seeds"] == [min(kept), max(kept)]
    notes = corpus.notes()
    assert len(notes) == bool(left_out)
    assert not left_out or f"{left_out} of 10 episodes of 'toy/walk-v0' are left out" in notes[0]


def test_a_filter_that_leaves_nothing_is_an_error(tmp_path, text_model):
    path = store(tmp_path / "walks", SCORES)
    with pytest.raises(ValueError, match=r"'walks': none of the 10 .*walks reaches a return of 50"):
        opened(path, text_model, min_return=50.0)


def test_options_of_episodes_are_not_for_records(stores, text_model):
    with pytest.raises(ValueError, match=r"corpus 'walks': top is about .*; .* holds records"):
        opened(stores / "words", text_model, top=0.5)


# ---- balance ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("balance", "share"), [("tasks", 0.5), ("steps", 0.9), ("0.5", 0.75)])
def test_stores_are_balanced(tmp_path, text_model, balance, share):
    store(tmp_path / "all" / "big", [0.0] * 9)
    other = replace(WALK, id="toy/other-v0")
    with EpisodeWriter(tmp_path / "all" / "small", other) as writer:
        writer.append(walk(other, 50, 0.0))
    seen = seeds(opened(tmp_path / "all", text_model, balance=balance), 2000)
    assert abs(1 - seen[50] / 2000 - share) < 0.04


# ---- validation ------------------------------------------------------------------------------


@given(st.integers(0, 400), st.floats(0.01, 0.95), st.sampled_from(["a", "b"]))
def test_what_is_held_out_follows_from_place_and_name_alone(items, share, name):
    held = held_out(items, share, name)
    longer = held_out(items + 57, share, name)
    np.testing.assert_array_equal(longer[:items], held)  # a store that grows
    assert abs(held.sum() - share * items) <= 1 + 1e-6


def test_two_stores_hold_out_different_items():
    assert not np.array_equal(held_out(500, 0.1, "a"), held_out(500, 0.1, "b"))


@pytest.mark.parametrize("kind", ["episodes", "records"])
def test_what_is_held_out_is_never_trained_on(tmp_path, stores, text_model, kind):
    path = store(tmp_path / "walks", [1.0] * 40) if kind == "episodes" else stores / "words"
    whole = opened(path, text_model)
    corpus = opened(path, text_model, validation=0.2)
    held = corpus.held_out()
    assert whole.held_out() is None
    draw = seeds if kind == "episodes" else lambda c: texts(c)
    trained, kept, everything = (set(draw(c)) for c in (corpus, held, whole))
    assert not trained & kept
    assert trained | kept == everything
    assert len(kept) == 8
    counts = corpus.contents()
    assert (counts[kind], counts["held_out"]) == (32, 8)


def texts(corpus: Corpus) -> set[bytes]:
    rng = np.random.default_rng(0)
    return {corpus.sample(rng, 2000).ids.tobytes() for _ in range(600)}


def test_what_is_held_out_stays_so_where_a_shard_is_left_out(tmp_path, text_model):
    with EpisodeWriter(tmp_path / "walks", WALK, shard_steps=30) as writer:  # 10 episodes each
        for seed in range(40):
            writer.append(walk(WALK, seed, 0.0))
    damaged = sorted(p.name for p in (tmp_path / "walks").glob("shard-*"))[1]
    whole = opened(tmp_path / "walks", text_model, validation=0.2)
    part = opened(tmp_path / "walks", text_model, validation=0.2, skip=(damaged,))
    gone = set(range(10, 20))
    assert set(seeds(part)) == set(seeds(whole)) - gone
    assert set(seeds(part.held_out())) == set(seeds(whole.held_out())) - gone


@pytest.mark.parametrize("kind", ["caption", "pairs", "conversation", "document"])
def test_what_shows_one_picture_is_held_out_together(tmp_path, text_model, kind):
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (400, 16, 16, 3), np.uint8)

    def record(which: int, number: int) -> dict[str, Any]:
        text = f"words {number} of {which}"
        if kind == "document":
            return {"kind": kind, "text": text, "meta": {"group": f"text {which}"}}
        if kind == "caption":
            return {"kind": kind, "image": pictures[which], "text": text}
        if kind == "pairs":  # the first picture tells
            pairs = [(pictures[which], text), (rng.permutation(pictures[0]), "another")]
            return {"kind": kind, "pairs": [{"image": i, "text": t} for i, t in pairs]}
        asked = [{"type": "image", "image": pictures[which]}, {"type": "text", "text": "what?"}]
        told = [{"type": "text", "text": text}]
        said = [("user", asked), ("assistant", told)]
        return {"kind": kind, "messages": [{"role": r, "content": c} for r, c in said]}

    # most of them one after another, some far apart
    order = [(w, n) for w in range(400) for n in range(4)] + [(w, 4) for w in range(400)]
    with RecordWriter(tmp_path / "coco", "coco") as writer:
        for which, number in order:
            writer.append(record(which, number))
    corpus = opened(tmp_path / "coco", text_model, validation=0.02)
    corpus.stores[0].validate()
    sides = [{order[i][0] for i in side.items[0]} for side in (corpus, corpus.held_out())]
    assert not sides[0] & sides[1]
    assert [len(side) for side in sides] == [392, 8]
    assert corpus.contents()["held_out"] == 40
    with RecordWriter(tmp_path / "more", "coco") as writer:  # a store that grows
        for which, number in [*order[:800], *order[:50]]:
            writer.append(record(which, number))
    held = opened(tmp_path / "more", text_model, validation=0.02).held_out()
    assert {order[i % 800][0] for i in held.items[0]} == {w for w in sides[1] if w < 200}


def test_a_filter_comes_before_what_is_held_out(tmp_path, text_model):
    path = store(tmp_path / "walks", [float(i % 2) for i in range(60)])
    corpus = opened(path, text_model, validation=0.3, min_return=0.5)
    assert all(s % 2 for s in (*seeds(corpus), *seeds(corpus.held_out())))


def test_each_side_needs_an_item(tmp_path, text_model):
    few = next(x for x in (0.05, 0.1, 0.15) if not held_out(2, x, WALK.id).any())
    with pytest.raises(ValueError, match=r"validation=0\.\d+ holds out none of its 2 items; raise"):
        opened(store(tmp_path / "two", [1.0] * 2), text_model, validation=few)
    much = next(x for x in np.arange(0.1, 0.9, 0.05).tolist() if held_out(1, x, WALK.id).all())
    with pytest.raises(ValueError, match=r"leaves nothing to train on of the 1 items of 'toy/walk"):
        opened(store(tmp_path / "one", [1.0]), text_model, validation=much)


def test_scales_and_text_are_learnt_from_what_is_trained_on(tmp_path, tiny):
    scores = [1.0 if held else 0.0 for held in held_out(40, 0.2, WALK.id)]
    path = tmp_path / "walks"
    with EpisodeWriter(path, WALK) as writer:
        for seed, held in enumerate(scores):
            episode = walk(WALK, seed, 0.0)
            if held:
                episode.observations["observation"][:] = 1e6
            writer.append(episode)
    corpus = CorpusConfig("walks", str(path), validation=0.2)
    serializer = make_serializer(replace(tiny, corpora=(corpus,), text_pieces=270))
    assert max(serializer.task(WALK.id).observation[0][2]["high"]) < 100


# ---- pairs -----------------------------------------------------------------------------------


def parts_of(sequence: TokenSequence, serializer: Serializer) -> list[np.ndarray]:
    """Return the examples of a sequence, cut behind every <eos>."""
    ends = np.flatnonzero(sequence.ids == serializer.control["<eos>"]) + 1
    return np.split(sequence.ids[1:], ends[:-1] - 1)


def test_pairs_join_whole_examples_under_one_bos(stores, text_model):
    plain = opened(stores / "pictures", text_model)
    five = opened(stores / "pictures", text_model, pairs=5)
    serializer, rng = five.serializer, np.random.default_rng(0)
    records = [plain.stores[0][i] for i in range(30)]
    # captions differ in words only; their pictures lie in the payload
    known = {serializer.caption(r["image"], r["text"]).ids[1:].tobytes() for r in records}
    for _ in range(50):
        sequence = five.sample(rng, 1000)
        parts = parts_of(sequence, serializer)
        assert len(parts) == 5
        assert all(part.tobytes() in known for part in parts)
        assert np.count_nonzero(sequence.ids == serializer.control["<bos>"]) == 1
        patches = sequence.payload["image"]["at"]
        assert len(patches) == 5 * 2
        assert (sequence.ids[patches] == -1).all()
    one = opened(stores / "pictures", text_model, pairs=1)
    for _ in range(20):
        a, b = (c.sample(np.random.default_rng(3), 1000) for c in (one, plain))
        np.testing.assert_array_equal(a.ids, b.ids)


def test_as_many_pairs_as_fit_are_joined(stores, text_model):
    five, rng = opened(stores / "pictures", text_model, pairs=5), np.random.default_rng(0)
    counts = Counter()
    for _ in range(100):
        sequence = five.sample(rng, 40)
        assert len(sequence) <= 40
        counts[len(parts_of(sequence, five.serializer))] += 1
    assert 1 < max(counts) < 5


def test_pairs_are_for_pictures(stores, text_model):
    with pytest.raises(ValueError, match=r"pairs=5 joins captions .*words holds records without"):
        opened(stores / "words", text_model, pairs=5).sample(np.random.default_rng(0), 100)


# ---- what cannot be trained on ---------------------------------------------------------------


def test_an_empty_corpus_is_named_with_its_store(tmp_path, text_model):
    with EpisodeWriter(tmp_path / "none", WALK):
        pass
    with pytest.raises(ValueError, match=r"'walks' holds no episodes of 'toy/walk-v0': .*none is"):
        opened(tmp_path / "none", text_model)
    with RecordWriter(tmp_path / "blank", "blank"):
        pass
    with pytest.raises(ValueError, match=r"'walks' holds no records of 'blank': .*blank is empty"):
        opened(tmp_path / "blank", text_model)


def test_a_task_whose_actions_change_is_named_with_both_stores(tmp_path, text_model, tiny):
    wider = replace(WALK, action_space=spaces.Box(-1, 1, (2,), np.float32))
    store(tmp_path / "all" / "a", [0.0])
    store(tmp_path / "all" / "b", [0.0], wider)
    message = r"the action_space of 'toy/walk-v0' is .* in .*a and .* in .*b\. A task has one"
    with pytest.raises(ValueError, match=f"corpus 'walks': {message}"):
        opened(tmp_path / "all", text_model)
    corpora = tuple(CorpusConfig(n, str(tmp_path / "all" / n)) for n in "ab")
    with pytest.raises(ValueError, match=f"corpora 'a' and 'b': {message}"):
        make_serializer(replace(tiny, corpora=corpora), text_model)


def test_items_that_never_fit_are_named_with_their_store(tmp_path, text_model):
    corpus = opened(store(tmp_path / "walks", [0.0]), text_model)
    with pytest.raises(ValueError, match=r"one step takes 4 tokens .*walks needs a longer row"):
        corpus.sample(np.random.default_rng(0), 5)
    image = np.zeros((64, 64, 3), np.uint8)
    with RecordWriter(tmp_path / "large", "large") as writer:
        writer.append({"kind": "caption", "image": image, "text": "black"})
    with pytest.raises(ValueError, match=r"each of its 1 records takes .*large\. Train"):
        opened(tmp_path / "large", text_model).sample(np.random.default_rng(0), 12)


def test_settings_without_effect_are_told(tmp_path, stores, text_model):
    walks = store(tmp_path / "walks", [0.0])
    assert opened(walks, text_model, pairs=3, kappa=2.0).notes() == [
        "corpus 'walks': pairs = 3 has no effect; it is about records with pictures, and it holds "
        "episodes",
        "corpus 'walks': kappa = 2.0 has no effect; it needs returns = true",
    ]
    options = {"window": 4, "prompt_steps": 2, "hide_actions": 0.5, "temperature": 1.0}
    assert opened(walks, text_model, **options).notes() == []
    assert opened(walks, text_model, returns=True, kappa=2.0).notes() == []
    assert opened(stores / "pictures", text_model, pairs=2).notes() == []
    told = opened(stores / "pictures", text_model, **options, kappa=1.0).notes()
    assert [note.split()[2] for note in told] == [*options, "kappa"]
    assert told[0].endswith("window = 4 has no effect; it is about episodes, and it holds records")


def captions(path: Path, sizes: list[int]) -> Path:
    """Write captions of pictures of so many patches; which it is stands in the first pixel."""
    with RecordWriter(path, path.name) as writer:
        for number, size in enumerate(sizes):
            image = np.full((16, 16 * size, 3), number, np.uint8)
            writer.append({"kind": "caption", "image": image, "text": "a red ball and a blue door"})
    return path


def shown(corpus: Corpus, seed: int, draws: int, limit: int) -> list[int]:
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(draws):
        sequence = corpus.sample(rng, limit)
        assert len(sequence) <= limit
        assert sequence.target.any()
        found.append(int(sequence.payload["image"]["patch"][0].ravel()[0]))
    return found


def test_records_without_a_target_in_a_row_are_left_out_and_told_once(tmp_path, text_model, capsys):
    corpus = opened(captions(tmp_path / "few", [2, 60, 60, 3, 60]), text_model)
    drawn = shown(corpus, 0, 50, 40)
    assert set(drawn) == {0, 3}
    again = opened(tmp_path / "few", text_model)
    assert shown(again, 0, 50, 40) == drawn
    said = capsys.readouterr().err
    assert said.count("it is left out: its first row predicts nothing") == 2  # once for each
    (note,) = corpus.notes()
    assert f"{corpus.met['drawn'] - 50} of {corpus.met['drawn']} records drawn" in note
    assert note.endswith("are longer than a row and left out")


def test_one_record_among_many_that_are_left_out_is_found(tmp_path, text_model):
    captions(tmp_path / "all" / "a", [60] * 150)
    captions(tmp_path / "all" / "b", [60] * 149 + [2])
    corpus = opened(tmp_path / "all", text_model)
    assert shown(corpus, 0, 5, 40) == shown(corpus, 0, 5, 40) == [149] * 5


def test_records_that_are_cut_are_told(tmp_path, text_model, capsys):
    corpus = opened(captions(tmp_path / "long", [9]), text_model)
    length = len(corpus.sample(np.random.default_rng(0), 100))
    assert not corpus.notes()
    for _ in range(3):
        corpus.sample(np.random.default_rng(0), length - 2)
    assert capsys.readouterr().err.count("its end is cut off") == 1
    assert "3 of 4 records drawn are longer than a row and cut" in corpus.notes()[0]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"top": 0.0}, "top must be above 0 and at most 1; got 0.0"),
        ({"validation": 1.0}, "validation must be at least 0 and below 1; got 1.0"),
        ({"pairs": 0}, "pairs must be at least 1; got 0"),
        ({"kappa": -1.0}, "kappa must be a number of at least 0; got -1.0"),
        ({"balance": "evenly"}, "balance must be tasks, steps or a power from 0 to 1; got 'eve"),
        ({"balance": "2"}, "balance must be tasks, steps or a power from 0 to 1; got '2'"),
        ({"min_return": float("nan")}, "min_return must be finite; got nan"),
    ],
)
def test_settings_that_are_none_are_named(wrong, message):
    with pytest.raises(ValueError, match=f"corpus 'x': {message}"):
        CorpusConfig("x", "y", **wrong)


def test_old_configurations_read_and_new_ones_come_back(tiny):
    data = to_json(tiny)
    assert from_json(TrainConfig, data) == tiny
    added = ("balance", "min_fraction", "min_return", "top", "returns", "kappa", "pairs")
    for corpus in data["corpora"]:
        for name in (*added, "validation"):
            del corpus[name]
    del data["weigh"], data["draw"]
    assert from_json(TrainConfig, data) == tiny
