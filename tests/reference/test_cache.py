"""Decoding through the ring equals one full forward under the same sliding window."""

import pytest
import torch

from gato.cache import KVCache


def full_forward(model, make_batch, x):
    """Return hidden states of x (T, D) as one document, in one pass."""
    return model.trunk(x, make_batch([[len(x)]], len(x)))


def random_stream(model, length, seed):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, model.vocabulary_size, (length,), generator=generator)
    return model.embed(ids, torch.arange(length) % 7).detach()


def decode_ragged(model, cache, streams, rng, most, start=None):
    """Decode each row's stream in chunks of its own lengths; return hidden states per row."""
    done = list(start or [0] * len(streams))
    pieces = [[] for _ in streams]
    while any(d < len(s) for d, s in zip(done, streams, strict=True)):
        Q = int(torch.randint(1, most + 1, (1,), generator=rng))
        x = torch.full((len(streams), Q, streams[0].shape[1]), 1e3)  # loud padding
        valid = torch.zeros(len(streams), dtype=torch.int64)
        for row, stream in enumerate(streams):
            n = min(int(torch.randint(0, Q + 1, (1,), generator=rng)), len(stream) - done[row])
            x[row, :n] = stream[done[row] : done[row] + n]
            valid[row] = n
        hidden = model.decode(x, cache, valid)
        assert hidden.isfinite().all()
        for row, n in enumerate(valid.tolist()):
            pieces[row].append(hidden[row, :n])
            done[row] += n
    return [torch.cat(p) for p in pieces]


@pytest.mark.parametrize("kv_heads", [4, 2])
@torch.no_grad()
def test_ragged_rows_equal_the_full_forward_through_three_wraps(make_model, make_batch, kv_heads):
    model = make_model(window=24, kv_heads=kv_heads)
    cache = model.new_cache(3, chunk=8)
    lengths = (3 * cache.slots + 5, 3 * cache.slots + 17, 40)  # each row on its own timestep
    streams = [random_stream(model, n, seed) for seed, n in enumerate(lengths)]
    hidden = decode_ragged(model, cache, streams, torch.Generator().manual_seed(0), 8)
    for got, stream in zip(hidden, streams, strict=True):
        expected = full_forward(model, make_batch, stream)
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    assert cache.lengths.tolist() == list(lengths)


@torch.no_grad()
def test_a_reset_row_starts_over_and_the_others_go_on(make_model, make_batch):
    model = make_model(window=16)
    cache = model.new_cache(3, chunk=8)
    rng = torch.Generator().manual_seed(1)
    streams = [random_stream(model, n, 10 + n) for n in (90, 55, 70)]
    half = [s[: len(s) // 2] for s in streams]
    first = decode_ragged(model, cache, half, rng, 8)
    cache.reset(torch.tensor([False, True, False]))
    assert cache.lengths.tolist() == [45, 0, 35]
    assert (cache.key_position >= 0).any(dim=1).tolist() == [True, False, True]
    fresh = random_stream(model, 61, 99)
    rest = [streams[0][45:], fresh, streams[2][35:]]
    second = decode_ragged(model, cache, rest, rng, 8)
    for row, stream in ((0, streams[0]), (2, streams[2])):
        expected = full_forward(model, make_batch, stream)
        got = torch.cat((first[row], second[row]))
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(
        second[1], full_forward(model, make_batch, fresh), atol=1e-4, rtol=1e-4
    )
    cache.reset()
    assert cache.lengths.tolist() == [0, 0, 0]
    assert (cache.key_position == -1).all()


@torch.no_grad()
def test_one_token_at_a_time_equals_a_prefill(make_model):
    model = make_model(window=12)
    stream = random_stream(model, 40, 3)
    one, many = model.new_cache(1, chunk=4), model.new_cache(1, chunk=40)
    steps = torch.cat([model.decode(stream[None, i : i + 1], one) for i in range(40)], dim=1)
    torch.testing.assert_close(steps, model.decode(stream[None], many), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_chunks_longer_than_the_cache_takes_are_split(make_model):
    model = make_model(window=12)
    x = torch.stack([random_stream(model, 22, s) for s in range(3)])
    valid = torch.tensor([22, 3, 9])
    small, large = model.new_cache(3, chunk=4), model.new_cache(3, chunk=32)
    got, expected = model.decode(x, small, valid), model.decode(x, large, valid)
    for row, n in enumerate(valid.tolist()):
        torch.testing.assert_close(got[row, :n], expected[row, :n], atol=1e-4, rtol=1e-4)
    assert small.lengths.tolist() == valid.tolist()


@torch.no_grad()
def test_a_cache_without_window_keeps_the_context(make_model, make_batch):
    model = make_model()  # context 48, no window
    stream = random_stream(model, 48, 5)
    cache = model.new_cache(1)
    assert cache.window == 48
    torch.testing.assert_close(
        model.decode(stream[None], cache)[0],
        full_forward(model, make_batch, stream),
        atol=1e-4,
        rtol=1e-4,
    )


@torch.no_grad()
def test_far_positions_turn_as_near_ones_do(make_model):
    model = make_model(window=16)
    stream = random_stream(model, 30, 6)[None]
    near, far = model.new_cache(1), model.new_cache(1)
    far.lengths += 1_000_000
    torch.testing.assert_close(
        model.decode(stream, near), model.decode(stream, far), atol=1e-4, rtol=1e-4
    )


def test_stored_positions_are_those_of_the_last_window_of_each_row():
    """The peers' bug: positions derived from the length of a truncated cache collapse."""
    cache = KVCache(layers=1, batch=2, window=6, kv_heads=1, head_dim=2, chunk=3)
    totals = torch.tensor([0, 0])
    for step in range(40):
        valid = torch.tensor([1 + step % 3, step % 2])
        cache.advance(3, valid)
        totals += valid
        for row in range(2):
            stored = cache.key_position[row][cache.key_position[row] >= 0].tolist()
            assert len(set(stored)) == len(stored)
            kept = range(max(0, int(totals[row]) - cache.window), int(totals[row]))
            assert set(kept) <= set(stored)


def test_shapes_never_change(make_model):
    model = make_model(window=8)
    cache = model.new_cache(2, chunk=4)
    storage = cache.store.data_ptr(), cache.key_position.data_ptr(), cache.lengths.data_ptr()
    with torch.no_grad():
        for _ in range(10):
            model.decode(torch.zeros(2, 4, 32), cache, torch.tensor([4, 2]))
    cache.reset(torch.tensor([True, False]))
    assert storage == (
        cache.store.data_ptr(),
        cache.key_position.data_ptr(),
        cache.lengths.data_ptr(),
    )


def test_misuse_is_refused():
    cache = KVCache(layers=1, batch=2, window=6, kv_heads=1, head_dim=2, chunk=3)
    with pytest.raises(ValueError, match="1 to 3 tokens; got 4"):
        cache.advance(4)
    with pytest.raises(ValueError, match="one entry per row"):
        cache.reset(torch.tensor([True]))
    with pytest.raises(ValueError, match="window and chunk"):
        KVCache(layers=1, batch=2, window=0, kv_heads=1, head_dim=2)
