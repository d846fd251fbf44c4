"""Shares of what is drawn: even quotas, weights by tokens or by samples, parts and their purity."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from gato.config import TrainConfig
from gato.corpora import CorpusConfig, open_corpus
from gato.envs.records import RecordWriter
from gato.fitting import make_serializer
from gato.loader import Loader
from gato.mixture import Mixture, _stretch
from gato.mixture_shares import realised
from gato.model_config import ModelConfig
from gato.tokenizers.serializer import Serializer
from gato.tokenizers.stream import TokenSequence

LENGTH = 256
WEIGHTS = {"arm": 0.25, "grid": 0.2, "pictures": 0.1, "questions": 0.2, "talks": 0.15, "words": 0.1}


@dataclass
class Lengths:
    """A corpus of sequences of given lengths, and nothing in them."""

    config: CorpusConfig
    lengths: np.ndarray

    def sample(self, rng: np.random.Generator, limit: int) -> TokenSequence:
        n = int(rng.choice(self.lengths))
        one = np.ones(n, np.float32)
        return TokenSequence(np.zeros(n, np.int32), np.zeros(n, np.uint8), np.zeros(n, int), one)

    def contents(self) -> dict[str, Any]:
        return {}

    def held_out(self) -> None:
        return None

    def notes(self) -> list[str]:
        return []


def of_lengths(serializer: Serializer, **corpora: tuple[float, list[int]]) -> list[Lengths]:
    """Return corpora by name from (weight, lengths)."""
    return [Lengths(CorpusConfig(n, n, w), np.array(x)) for n, (w, x) in corpora.items()]


@pytest.fixture(scope="module")
def six(stores, text_model, tmp_path_factory) -> tuple[list, Serializer]:
    """Return two suites, captions, questions about pictures, chat and text."""
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("questions") / "questions"
    with RecordWriter(path, "questions") as writer:
        for i in range(40):
            parts = [{"type": "image", "image": rng.integers(0, 255, (32, 32, 3), np.uint8)}]
            parts += [{"type": "text", "text": f"is it {i}? " * (1 + i % 5)}]
            answer = [{"type": "text", "text": "yes" if i % 2 else "no, it is another"}]
            turns = [("user", parts), ("assistant", answer)]
            messages = [{"role": role, "content": content} for role, content in turns]
            writer.append({"kind": "conversation", "messages": messages})
    paths = {n: stores / n for n in WEIGHTS} | {"questions": path}
    configs = tuple(CorpusConfig(n, str(paths[n]), w) for n, w in WEIGHTS.items())
    model = ModelConfig(layers=1, width=32, heads=2, head_dim=16, ffn_width=64, context=LENGTH)
    serializer = make_serializer(TrainConfig(model, corpora=configs), text_model)
    return [open_corpus(c, serializer) for c in configs], serializer


def shares(mixture: Mixture, tokens: int, row: int = 0) -> np.ndarray:
    found = realised(mixture, tokens)[0][row]
    return found / found.sum()


@pytest.mark.parametrize("weigh", ["tokens", "samples"])
def test_six_corpora_get_their_shares_within_a_hundredth(six, weigh):
    corpora, serializer = six
    made = Mixture(corpora, serializer, rows=16, row_length=LENGTH, draw="even", weigh=weigh)
    got = shares(made, 200_000, row=["tokens", "samples"].index(weigh))
    np.testing.assert_allclose(got, list(WEIGHTS.values()), atol=0.01)


@pytest.mark.parametrize(("weigh", "row"), [("tokens", 0), ("samples", 1)])
def test_random_drawing_holds_in_the_long_run(six, weigh, row):
    corpora, serializer = six
    made = Mixture(corpora, serializer, rows=16, row_length=LENGTH, weigh=weigh)
    np.testing.assert_allclose(shares(made, 300_000, row), list(WEIGHTS.values()), atol=0.03)


def test_rows_are_as_full_as_they_were(six):
    corpora, serializer = six
    made = Mixture(corpora, serializer, rows=16, row_length=LENGTH, draw="even")
    found, batches = realised(made, 100_000)
    assert found[0].sum() / (batches * 16 * LENGTH) > 0.95


@pytest.mark.parametrize("rows", [4, 64])
def test_shares_hold_where_a_part_is_less_than_a_sequence_of_each(six, rows):
    # four rows hold about one sequence of each of two corpora
    corpora = of_lengths(six[1], long=(0.3, [256]), mixed=(0.3, [20, 250]), short=(0.4, [8, 12]))
    made = Mixture(corpora, six[1], rows=rows, row_length=LENGTH, draw="even")
    np.testing.assert_allclose(shares(made, 300_000), [0.3, 0.3, 0.4], atol=0.02)


def test_long_and_short_sequences_keep_their_frequencies(six):
    corpora = of_lengths(six[1], mixed=(0.5, [20, 120]), short=(0.5, [4]))
    made = Mixture(corpora, six[1], rows=4, row_length=LENGTH, draw="even")
    lengths = [len(s) for k in range(400) for c, s in made.sequences(k) if c == 0]
    assert abs(np.mean(np.array(lengths) == 20) - 0.5) < 0.03


def test_what_is_left_of_a_sequence_is_distributed_as_along_a_line():
    # the slow twin: sequences laid end to end, looked at in many places
    costs, rng = np.array([3, 5, 5, 20]), np.random.default_rng(0)
    ends = np.cumsum(rng.choice(costs, 20_000))
    places = rng.uniform(0, ends[-1], 20_000)
    left = ends[np.searchsorted(ends, places, side="right")] - places
    drawn = np.interp(rng.random(20_000), *_stretch(costs))
    for quantile in (0.1, 0.25, 0.5, 0.75, 0.9):
        np.testing.assert_allclose(
            np.quantile(drawn, quantile), np.quantile(left, quantile), atol=0.35
        )


def test_an_even_batch_is_a_function_of_seed_batch_and_part(six):
    corpora, serializer = six
    first, second = (
        Mixture(corpora, serializer, rows=8, row_length=LENGTH, seed=3, parts=2, draw="even")
        for _ in range(2)
    )
    wanted = {(k, p): first.part(k, p) for k in (0, 7) for p in (0, 1)}
    for k, p in ((7, 1), (0, 0), (7, 0), (0, 1)):
        np.testing.assert_array_equal(second.part(k, p).inputs, wanted[k, p].inputs)
    assert not np.array_equal(wanted[0, 0].inputs, wanted[0, 1].inputs)


def test_what_does_not_fit_is_left_out_of_all_alike(six):
    corpora = of_lengths(six[1], long=(0.5, [100]), short=(0.5, [7]))
    made = Mixture(corpora, six[1], rows=4, row_length=LENGTH, draw="even")
    rng, lengths = np.random.default_rng(0), np.array([100] * 8 + [7] * 100)
    gone = np.zeros(2)
    for _ in range(2000):
        kept = made._trim(rng, lengths)
        assert lengths[kept].sum() <= made._fill * 4 * LENGTH
        assert (np.diff(kept) > 0).all()
        out = np.delete(lengths, kept)
        gone += np.sum(out == 100), np.sum(out == 7)
    np.testing.assert_allclose(gone[0] / 8, gone[1] / 100, rtol=0.1)


def test_settings_that_are_none_are_named(tiny):
    with pytest.raises(ValueError, match="weigh must be tokens or samples; got 'words'"):
        replace(tiny, weigh="words")
    with pytest.raises(ValueError, match="draw must be random or even; got 'odd'"):
        replace(tiny, draw="odd")


def test_batches_from_any_step_are_the_same_bytes_from_worker_processes(six):
    corpora, serializer = six
    options = {"rows": 4, "row_length": LENGTH, "seed": 3, "parts": 2, "draw": "even"}
    here = Mixture(corpora, serializer, **options)
    begin = int(np.random.default_rng(0).integers(1000))
    wanted = [here.part(begin + k, p) for k in range(5) for p in (0, 1)]
    with Loader(Mixture(corpora, serializer, **options), begin, (0, 1), workers=1) as loader:
        for batch, got in zip(wanted, loader, strict=False):
            for name in ("inputs", "local", "document", "target_ids", "target_weight"):
                assert getattr(batch, name).tobytes() == getattr(got, name).tobytes()
            for modality, rows in batch.payload.items():
                for field, values in rows.items():
                    assert values.tobytes() == got.payload[modality][field].tobytes()
