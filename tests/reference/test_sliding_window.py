"""Trained under a sliding window, rolled out through a ring of the same size: the same function.

First the two ways to compute attention and the model, then the whole path: a policy plays an
episode several windows long, the episode is stored, a corpus writes it into one row, and the model
is asked, as in training, what it predicts there.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import rollout_world as world
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gato import kernels
from gato.attention import FEW, PackedMeta, attend_masked, attend_packed, cached_mask
from gato.corpus_config import CorpusConfig
from gato.envs.store import EpisodeStore, EpisodeWriter
from gato.episode_corpus import EpisodeCorpus
from gato.model_config import ModelConfig
from gato.rollouts.grammar import ActionGrammar
from gato.rollouts.policy import Policy
from gato.tokenizers.serializer import History
from gato.tokenizers.stream import TokenBatch, pack

ARM = "made/arm"


def oracle(q, k, v, boundaries, window):
    """Return attention (N, H, K), query by query, in double precision."""
    q, k, v = q.double(), k.double(), v.double()
    out, group = torch.zeros_like(q), q.shape[1] // k.shape[1]
    for i in range(len(q)):
        start = max(b for b in boundaries if b <= i)
        first = max(start, i + 1 - (window or i + 1))
        for h in range(q.shape[1]):
            weight = (k[first : i + 1, h // group] @ q[i, h] * q.shape[-1] ** -0.5).softmax(0)
            out[i, h] = weight @ v[first : i + 1, h // group]
    return out


@settings(max_examples=60)
@given(
    data=st.data(),
    kv_heads=st.sampled_from([1, 2, 3]),
    group=st.sampled_from([1, 2, 4]),
    head_dim=st.sampled_from([2, 8, 16]),
    window=st.one_of(st.none(), st.integers(1, 40)),
)
def test_packed_and_cached_attention_equal_the_oracle(data, kv_heads, group, head_dim, window):
    T, rows = 20, data.draw(st.integers(1, 3))
    cuts = data.draw(st.sets(st.integers(1, rows * T - 1), max_size=6))
    bounds = sorted({*cuts, *range(0, rows * T + 1, T)})
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    heads = kv_heads * group
    q, k, v = (
        torch.randn(rows * T, h, head_dim, generator=generator) for h in (heads, kv_heads, kv_heads)
    )
    expected = oracle(q, k, v, bounds, window)
    document = torch.bucketize(torch.arange(rows * T), torch.tensor(bounds), right=True)
    nothing = torch.zeros(rows * T, dtype=torch.int64)
    cu = torch.tensor([*bounds, *[rows * T] * 3], dtype=torch.int32)  # empty documents
    batch = TokenBatch(
        **{
            **dict.fromkeys(TokenBatch.__dataclass_fields__, nothing),
            **{"document": document, "cu_seqlens": cu, "payload": {}, "rows": rows},
            "row_length": T,
        }
    )
    for kernel in ("sdpa", "products", "documents"):
        with kernels.using(kernel):
            packed = attend_packed(q, k, v, PackedMeta.build(batch, window, torch.float32))
        torch.testing.assert_close(packed.double(), expected, atol=1e-5, rtol=1e-5)
    # the same documents as rows of a cache, their keys in any order
    for start, stop in pairwise(bounds):
        order = torch.randperm(stop - start, generator=generator)
        keys, values = (x[None, start:stop][:, order] for x in (k, v))
        for first in (start, max(start, stop - FEW)):  # many queries at once, and few
            asked = torch.arange(first - start, stop - start)[None]
            given = (x.transpose(1, 2) for x in (q[None, first:stop], keys, values))
            cached = attend_masked(*given, cached_mask(order[None], asked, window or T))
            got, wanted = cached[0].transpose(0, 1).double(), expected[first:stop]
            torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("window", [5, 16])
@torch.no_grad()
def test_a_packed_row_equals_decoding_through_the_ring(make_model, make_batch, kv_heads, window):
    """Episodes several windows long, several of them in a row, each decoded as a row of its own."""
    lengths = [[40, 8], [48], [3, 29, 16]]
    model = make_model(window=window, kv_heads=kv_heads, layers=3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)  # hidden states near 1, so that 1e-5 is absolute and relative
    batch = make_batch(lengths, 48)
    x = model.embed(batch.inputs, batch.local)
    expected = model(batch)
    bounds = np.unique(batch.cu_seqlens.numpy())
    documents = list(pairwise(bounds))
    cache = model.new_cache(len(documents), chunk=4)
    done = [0] * len(documents)
    rng = np.random.default_rng(0)
    while any(n < stop - start for n, (start, stop) in zip(done, documents, strict=True)):
        chunk, valid = torch.zeros(len(documents), 4, x.shape[1]), []
        for row, (start, stop) in enumerate(documents):
            n = min(int(rng.integers(0, 5)), stop - start - done[row])
            chunk[row, :n] = x[start + done[row] : start + done[row] + n]
            valid.append(int(n))
        hidden = model.decode(chunk, cache, torch.tensor(valid))
        for row, n in enumerate(valid):
            at = documents[row][0] + done[row]
            torch.testing.assert_close(hidden[row, :n], expected[at : at + n], atol=1e-5, rtol=1e-5)
            done[row] += n
    assert cache.lengths.max() > 2 * window, "the ring should wrap"


def play(policy: Policy, rows: int, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Return what each row saw (rows, steps + 1, 7) and did (rows, steps, 3)."""
    rng = np.random.default_rng(0)
    seen = rng.normal(size=(rows, steps + 1, 7)).astype(np.float32)
    done = [policy.select_action(list(seen[:, i])) for i in range(steps)]
    return seen, np.stack(done, axis=1)


@torch.no_grad()
def predicted(model, serializer, corpus: EpisodeCorpus, context: int) -> list[tuple[int, int]]:
    """Return the logged id and the likeliest allowed one of every action of one drawn row."""
    sequence = corpus.sample(np.random.default_rng(0), context)
    batch = pack([[sequence]], context, serializer.control).to("cpu")
    states = model(batch)[batch.target_at - 1]
    found, grammar = [], None
    for logits, logged in zip(model.logits(states), batch.target_ids.tolist(), strict=True):
        if grammar is None or grammar.allowed is None:
            grammar = ActionGrammar(serializer, serializer.task(ARM))
        ((start, stop),) = grammar.allowed
        found.append((logged, start + int(logits[start:stop].argmax())))
        grammar.push(logged)
    return found


@pytest.mark.parametrize("hide", [False, True], ids=["shown", "hidden"])
def test_what_a_policy_did_is_what_training_would_predict(tmp_path, hide):
    serializer = world.make_serializer(History(hide_actions=hide), "scalar")
    sizes = {"window": 40, "context": 512, "heads": 4, "head_dim": 8, "kv_heads": 2}
    model = world.make_model(serializer, **sizes)
    steps, rows = 40, 3
    policy = Policy(model, serializer, [ARM] * rows)
    assert model.config.memory == 40
    seen, done = play(policy, rows, steps)
    for row in range(rows):
        episode = replace(
            world.make_episode(ARM, steps),
            observations={"observation": seen[row]},
            actions={"action": done[row]},
        )
        with EpisodeWriter(tmp_path / str(row), world.SPECS[ARM]) as writer:
            writer.append(episode)
        whole = CorpusConfig(
            "arm", str(tmp_path / str(row)), start=1.0, prompt=0.0, hide_actions=float(hide)
        )
        corpus = EpisodeCorpus(whole, [EpisodeStore(tmp_path / str(row))], serializer)
        found = predicted(model, serializer, corpus, 512)
        assert len(found) == 3 * steps
        assert all(logged == likeliest for logged, likeliest in found)
        # without the window the same weights would have done otherwise
        model.config = replace(model.config, window=None)
        found = predicted(model, serializer, corpus, 512)
        model.config = replace(model.config, window=40)
        assert any(logged != likeliest for logged, likeliest in found)


def test_rows_must_hold_whole_episodes_where_windows_begin_with_them(tmp_path):
    serializer = world.make_serializer(History())
    with EpisodeWriter(tmp_path / "arm", world.SPECS[ARM]) as writer:
        for steps in (4, 30, 6):
            writer.append(world.make_episode(ARM, steps, seed=steps))
    store = EpisodeStore(tmp_path / "arm")
    config = CorpusConfig("arm", str(tmp_path / "arm"), start=1.0, prompt=0.0)
    corpus, rng = EpisodeCorpus(config, [store], serializer), np.random.default_rng(0)
    with pytest.raises(ValueError, match=r"of the 30 steps of episode 1 .* row of 64 tokens"):
        corpus.sample(rng, 64)
    lengths = {len(corpus.sample(rng, 512)) for _ in range(30)}
    assert len(lengths) == 3, "whole episodes, each as often as any other"
    sometimes = EpisodeCorpus(replace(config, start=0.5), [store], serializer)
    assert len({len(sometimes.sample(rng, 512)) for _ in range(60)}) > 3
    prompted = EpisodeCorpus(replace(config, prompt=1.0), [store], serializer)

    def draw(times: int, row_length: int) -> None:
        for _ in range(times):
            prompted.sample(rng, row_length)

    with pytest.raises(ValueError, match=r"take a longer model\.context, or a lower start"):
        draw(30, max(lengths))  # there is no room for the prompt


def test_settings_that_contradict_each_other_are_refused():
    sizes = {"layers": 1, "width": 8, "heads": 1, "head_dim": 8, "ffn_width": 8, "context": 16}
    assert ModelConfig(**sizes, window=16).memory == 16
    assert ModelConfig(**sizes, window=4).memory == 4
    assert ModelConfig(**sizes).memory == 16
    with pytest.raises(ValueError, match="at most context=16, the tokens of a row; got 17"):
        ModelConfig(**sizes, window=17)
    with pytest.raises(ValueError, match="leave out the steps behind them"):
        CorpusConfig("arm", "there", start=1.0, window=4)
    with pytest.raises(ValueError, match="start is a probability"):
        CorpusConfig("arm", "there", start=1.5)
