"""Batches are a function of (seed, k); corpora get their share; samples are what they say."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gato.config import TrainConfig
from gato.corpora import CorpusConfig, open_corpus
from gato.envs.episode import Episode
from gato.envs.store import EpisodeStore, EpisodeWriter, RecordWriter
from gato.fitting import make_serializer
from gato.mixture import Mixture
from gato.tokenizers.serializer import Serializer
from gato.tokenizers.stream import TokenBatch, TokenSequence

LENGTH = 96


@pytest.fixture(scope="module")
def written(stores: Path, text_model: bytes) -> Serializer:
    """Return a serializer that knows the tasks of the stores; numbers stay as they are."""
    serializer = Serializer(state={"text": {"text.model": text_model}})
    for name in ("arm", "grid"):
        task = EpisodeStore(stores / name).spec
        big = {"shape": [5], "codec": "quantile", "low": [-4e3] * 5, "high": [4e3] * 5}
        serializer.add_task(task, {"observation": big})
    return serializer


def corpus(serializer: Serializer, stores: Path, name: str, **options: object):
    return open_corpus(CorpusConfig(name, str(stores / name), **options), serializer)


def mixture(serializer: Serializer, tiny: TrainConfig, **changes: object) -> Mixture:
    corpora = [open_corpus(c, serializer) for c in tiny.corpora]
    return Mixture(corpora, serializer, **{"rows": 4, "row_length": LENGTH, "seed": 7, **changes})


def assert_same_batch(a: TokenBatch, b: TokenBatch) -> None:
    for name, value in vars(a).items():
        if name != "payload":
            np.testing.assert_array_equal(value, getattr(b, name))
    assert a.payload.keys() == b.payload.keys()
    for name, rows in a.payload.items():
        for key, value in rows.items():
            np.testing.assert_array_equal(value, b.payload[name][key])


def test_a_batch_is_a_function_of_seed_and_index(written, tiny):
    first, second = mixture(written, tiny), mixture(written, tiny)
    wanted = [first.batch(k) for k in range(6)]
    for k in (5, 0, 3, 3):  # whatever was drawn before
        assert_same_batch(second.batch(k), wanted[k])
    assert not np.array_equal(wanted[0].inputs, wanted[1].inputs)
    other = mixture(written, tiny, seed=8)
    assert not np.array_equal(other.batch(0).inputs, wanted[0].inputs)


def test_a_batch_is_its_parts_one_after_another(written, tiny):
    whole, parts = mixture(written, tiny, parts=2), mixture(written, tiny, parts=2)
    batch = whole.batch(5)
    pieces = [parts.part(5, p) for p in (1, 0)][::-1]  # drawn in another order
    assert [p.rows for p in pieces] == [2, 2]
    for name in ("inputs", "local", "position", "target_ids", "target_weight", "target_corpus"):
        joined = np.concatenate([getattr(p, name) for p in pieces])
        np.testing.assert_array_equal(joined, getattr(batch, name))
    n = len(pieces[0].inputs)
    at = np.concatenate([p.target_at + n * i for i, p in enumerate(pieces)])
    np.testing.assert_array_equal(at, batch.target_at)
    assert not np.array_equal(pieces[0].inputs, pieces[1].inputs)
    one = mixture(written, tiny)
    assert_same_batch(one.part(3, 0), one.batch(3))
    with pytest.raises(ValueError, match="a part is one of 2, from 0; got 2"):
        parts.part(0, 2)
    with pytest.raises(ValueError, match="rows must be a multiple of parts; got 4 rows in 3"):
        mixture(written, tiny, parts=3)


def test_batches_are_valid_and_nearly_full(written, tiny):
    made = mixture(written, tiny, rows=8)
    filled = []
    for k in range(30):
        batch = made.batch(k)
        batch.validate()
        filled.append(np.mean(batch.inputs != written.control["<pad>"]))
        assert (batch.target_weight > 0).all()
        assert batch.target_corpus.max() < len(made.names)
    assert np.mean(filled) > 0.93


def test_tokens_are_shared_by_weight(written, tiny):
    made = mixture(written, tiny, rows=8)
    tokens = np.zeros(len(made.names))
    for k in range(150):
        batch = made.batch(k)
        # a document's corpus is that of its targets; padding has none
        owner = np.full(int(batch.document.max()) + 1, -1)
        owner[batch.document[batch.target_at]] = batch.target_corpus
        for i in range(len(tokens)):
            tokens[i] += np.sum(owner[batch.document] == i)
    weights = np.array([c.config.weight for c in made.corpora])
    np.testing.assert_allclose(tokens / tokens.sum(), weights / weights.sum(), rtol=0.1)


def test_every_corpus_counts_by_its_share_however_rarely_it_predicts(written, tiny):
    made = mixture(written, tiny, rows=8)
    weight = np.zeros(len(made.names))
    for k in range(150):
        batch = made.batch(k)
        np.add.at(weight, batch.target_corpus, batch.target_weight)
    wanted = np.array([c.config.weight for c in made.corpora])
    np.testing.assert_allclose(weight / weight.sum(), wanted / wanted.sum(), rtol=0.1)
    corpora = (replace(tiny.corpora[0], loss_weight=5.0), *tiny.corpora[1:])
    heavy = mixture(written, replace(tiny, corpora=corpora))
    np.testing.assert_allclose(heavy._target_weight[0], 5 * made._target_weight[0], rtol=1e-5)


def test_a_mixture_needs_something_to_draw(written, tiny, stores):
    with pytest.raises(ValueError, match="positive weight"):
        mixture(written, replace(tiny, corpora=(replace(tiny.corpora[0], weight=0.0),)))
    with pytest.raises(ValueError, match=r"expected a store or a folder of stores at .*nowhere"):
        corpus(written, stores, "nowhere")
    for wrong in ({"weight": -1.0}, {"prompt": 1.5}, {"hide_actions": -0.1}, {"prompt_steps": 0}):
        with pytest.raises(ValueError, match="corpus 'arm'"):
            corpus(written, stores, "arm", **wrong)


# ---- samples ---------------------------------------------------------------------------------


def steps_of(sequence: TokenSequence) -> list[tuple[int, int]]:
    """Return (episode, step) of every step in a sample of the arm, as its numbers tell."""
    rows = sequence.payload["continuous"]
    observed = rows["value"][(rows["dimension"] == 4) & (sequence.local[rows["at"]] > 0)]
    return [divmod(round(float(v) * 4000), 100) for v in observed]


def test_windows_are_contiguous_and_every_step_is_as_likely(written, stores):
    arm = corpus(written, stores, "arm", window=3, prompt=0.0)
    rng, seen = np.random.default_rng(0), Counter()
    lengths = EpisodeStore(stores / "arm").lengths
    for _ in range(3000):
        steps = steps_of(arm.sample(rng, LENGTH))
        episode, first = steps[0]
        assert len(steps) == min(3, lengths[episode] - first)
        assert steps == [(episode, first + i) for i in range(len(steps))]
        seen[steps[0]] += 1
    assert len(seen) == lengths.sum()
    assert max(seen.values()) < 5 * 3000 / lengths.sum()


def test_a_window_without_limit_fills_the_row(written, stores):
    arm = corpus(written, stores, "arm", prompt=0.0)
    rng = np.random.default_rng(1)
    lengths = EpisodeStore(stores / "arm").lengths
    for _ in range(100):
        sequence = arm.sample(rng, 60)
        steps = steps_of(sequence)
        ended = steps[-1][1] == lengths[steps[0][0]] - 1
        assert len(sequence) <= 60
        assert ended or len(sequence) > 60 - 9  # a step takes 8 tokens


def test_prompts_are_steps_of_another_episode_half_of_them_its_end(written, stores):
    arm = corpus(written, stores, "arm", window=2, prompt=0.4, prompt_steps=2)
    rng = np.random.default_rng(2)
    lengths = EpisodeStore(stores / "arm").lengths
    prompted = ends = 0
    for _ in range(1500):
        steps = steps_of(arm.sample(rng, LENGTH))
        if len({episode for episode, _ in steps}) == 1:
            continue
        prompted += 1
        (other, first), (same, second), *window = steps
        assert other == same != window[0][0]
        assert second == first + 1
        assert len({episode for episode, _ in window}) == 1
        ends += second == lengths[other] - 1
    assert 0.35 < prompted / 1500 < 0.45
    assert 0.5 < ends / prompted < 0.75  # half of them, and some that lie anywhere


@pytest.mark.parametrize("share", [0.0, 0.6, 1.0])
def test_whole_steps_of_actions_are_hidden(written, stores, share):
    arm = corpus(written, stores, "arm", window=4, prompt=0.3, hide_actions=share)
    rng = np.random.default_rng(3)
    hidden = []
    for _ in range(300):
        sequence = arm.sample(rng, LENGTH)
        assert (sequence.target == 1).sum() == 2 * len(steps_of(sequence))
        mask = np.zeros(len(sequence), bool) if sequence.hidden is None else sequence.hidden
        assert not (mask & (sequence.target == 0)).any()
        actions = mask[sequence.target > 0].reshape(-1, 2)
        assert (actions[:, 0] == actions[:, 1]).all()
        hidden += actions[:, 0].tolist()
    assert abs(np.mean(hidden) - share) < 0.05


def test_a_step_that_does_not_fit_is_named(written, stores):
    arm = corpus(written, stores, "arm")
    with pytest.raises(ValueError, match=r"corpus 'arm': one step takes 8 tokens and . are left"):
        arm.sample(np.random.default_rng(0), 7)


def test_long_texts_give_windows_of_themselves(written, stores):
    words = corpus(written, stores, "words")
    rng = np.random.default_rng(0)
    whole = [written.document(words.stores[0][i]["text"]).ids for i in range(40)]
    for _ in range(200):
        sequence = words.sample(rng, 40)
        assert len(sequence) <= 40
        assert sequence.ids[0] == written.control["<bos>"]
        assert sequence.target[0] == 0
        assert (sequence.target[1:] == 1).all()
        part = bytes(sequence.ids[1:])
        assert any(part in bytes(ids) for ids in whole)


def test_long_conversations_are_cut_but_not_in_an_image(written, tmp_path):
    ask = [{"type": "image", "image": np.zeros((32, 48, 3), np.uint8)}]
    answer = [{"type": "text", "text": "red"}]
    turns = [{"role": "user", "content": ask}, {"role": "assistant", "content": answer}]
    with RecordWriter(tmp_path / "long", "long") as writer:
        writer.append({"kind": "conversation", "messages": turns * 4})
    long, rng = corpus(written, tmp_path, "long"), np.random.default_rng(0)
    whole = long.sample(rng, 1000)
    for limit in range(14, len(whole)):
        cut = long.sample(rng, limit)
        assert limit - 6 < len(cut) <= limit
        assert len(cut.payload["image"]["at"]) % 6 == 0
        np.testing.assert_array_equal(cut.ids, whole.ids[: len(cut)])
    with pytest.raises(
        ValueError, match=r"corpus 'long': each of its 1 records takes .* a longer row"
    ):
        long.sample(rng, 8)


def test_an_episode_alone_has_no_prompt(written, tmp_path, stores):
    store = EpisodeStore(stores / "arm")
    with EpisodeWriter(tmp_path / "one", store.spec) as writer:
        writer.append(store.episode(0))
    one = corpus(written, tmp_path, "one", prompt=1.0, window=2)
    steps = steps_of(one.sample(np.random.default_rng(0), LENGTH))
    assert len(steps) <= 2


def test_expert_targets_are_written_where_actions_carry_noise(written, stores):
    episode = EpisodeStore(stores / "arm").episode(1)
    clean = {"action": -np.asarray(episode.actions["action"])}
    noisy = Episode(**{**vars(episode), "targets": clean})
    expected = Episode(**{**vars(episode), "actions": clean})
    a, b = (written.episode(e).steps for e in (noisy, expected))
    np.testing.assert_array_equal(a.ids, b.ids)


def test_scales_are_shared_within_a_suite_and_fitted_on_the_data(tiny, stores):
    serializer = make_serializer(tiny)
    ((_, modality, spec),) = serializer.task("toy/arm-v0").observation
    assert modality == "vector"
    assert spec["codec"] == "quantile"
    observed = [EpisodeStore(stores / "arm").episode(i).observations for i in range(20)]
    data = np.concatenate([o["observation"] for o in observed])
    np.testing.assert_allclose(spec["low"], np.quantile(data, 0.01, axis=0), rtol=0.05, atol=0.2)
    assert serializer.task("toy/arm-v0").history.window == 4
    assert not serializer.task("toy/arm-v0").history.hide_actions
