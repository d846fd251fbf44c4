"""Every registered modality keeps the contract; a new file is tested with no new test."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
import torch

from gato.tokenizers.modality import Modality, Segment, modality_classes
from gato.tokenizers.serializer import Serializer
from gato.tokenizers.stream import pack

CLASSES = modality_classes()
NAMES = list(CLASSES)
WIDTH = 16
emits = pytest.mark.parametrize(
    "modality", [n for n in NAMES if CLASSES[n].predicts is not None], indirect=True
)
embeds = pytest.mark.parametrize(
    "modality", [n for n in NAMES if CLASSES[n].net is not Modality.net], indirect=True
)


@pytest.fixture(params=NAMES)
def modality(request: pytest.FixtureRequest, serializer: Serializer) -> Modality:
    return serializer.modalities[request.param]


@pytest.fixture
def encoded(modality: Modality) -> tuple[object, dict, Segment]:
    values, spec = modality.example(np.random.default_rng(0))
    return values, spec, modality.encode(values, spec)


def rows_of(segment: Segment) -> dict[str, torch.Tensor]:
    flat = {k: v.reshape(-1, *v.shape[2:]) for k, v in segment.rows.items()}
    return {k: torch.from_numpy(np.array(v)) for k, v in flat.items()}


def net_of(modality: Modality) -> torch.nn.Module:
    torch.manual_seed(0)
    return modality.net(WIDTH, {}).eval()


def random_admitted(modality: Modality, spec: dict, rng: np.random.Generator) -> np.ndarray:
    """Return a random sequence that the grammar admits, each id drawn from its range."""
    ids: list[int] = []
    while (span := modality.allowed(np.array(ids, np.int64), spec)) is not None:
        start, stop = span
        assert 0 <= start < stop <= modality.vocabulary
        edge = [start, stop - 1]
        ids.append(int(rng.choice([*edge, rng.integers(start, stop)])))
        assert len(ids) < 10_000
    return np.array(ids, np.int64)


def test_ids_lie_in_their_range_and_counts_agree(modality, encoded):
    values, spec, segment = encoded
    length, n = segment.ids.shape
    assert length == len(values) == 2
    assert segment.ids.dtype == np.int32
    assert segment.ids.min() >= -1
    assert segment.ids.max() < max(modality.vocabulary, 0) or modality.vocabulary == 0
    if modality.vocabulary == 0:
        assert (segment.ids == -1).all()
    assert modality.count(spec) in (n, None)
    assert all(rows.shape[:2] == (length, n) for rows in segment.rows.values())
    assert json.loads(json.dumps(spec)) == spec


def test_decoding_inverts_encoding(modality, encoded):
    _, spec, segment = encoded
    if modality.predicts is None:
        with pytest.raises(NotImplementedError, match=modality.name):
            modality.decode(segment.ids[0], spec)
        return
    for ids in segment.ids:
        value = modality.decode(ids, spec)
        again = modality.encode([value], spec)
        np.testing.assert_array_equal(again.ids[0], ids)


def test_the_grammar_admits_what_is_encoded_and_ends_there(modality, encoded):
    _, spec, segment = encoded
    if modality.predicts is None:
        assert modality.allowed(np.zeros(0, np.int64), spec) is None
        return
    for ids in segment.ids:
        for i, token in enumerate(ids):
            start, stop = modality.allowed(ids[:i], spec)
            assert start <= token < stop
        if modality.count(spec) is not None:
            assert modality.allowed(ids, spec) is None


@emits
def test_whatever_the_grammar_admits_decodes(modality, encoded):
    _, spec, _ = encoded
    rng = np.random.default_rng(1)
    for _ in range(50):
        ids = random_admitted(modality, spec, rng)
        segment = modality.encode([modality.decode(ids, spec)], spec)
        if modality.count(spec) is not None:
            np.testing.assert_array_equal(segment.ids[0], ids)


@emits
def test_emitted_tokens_carry_the_rows_they_would_have_carried(modality, encoded):
    _, spec, segment = encoded
    written = modality.encode([modality.decode(segment.ids[0], spec)], spec)
    for i in range(segment.ids.shape[1]):
        emitted = modality.rows_of(segment.ids[0, i : i + 1], spec, i)
        assert emitted.keys() == written.rows.keys()
        for key, rows in emitted.items():
            np.testing.assert_allclose(rows[0], written.rows[key][0, i], atol=1e-6)


def test_encoding_is_deterministic_pure_and_by_value(modality, encoded):
    values, spec, segment = encoded
    again, again_spec = modality.example(np.random.default_rng(0))
    assert again_spec == spec
    np.testing.assert_array_equal(values, again)
    copy = pickle.loads(pickle.dumps(segment))
    for i in range(2):
        alone = modality.encode(values[i : i + 1], spec)
        np.testing.assert_array_equal(alone.ids[0], copy.ids[i])
        for key, rows in alone.rows.items():
            np.testing.assert_array_equal(rows[0], copy.rows[key][i])


def test_state_restores_the_modality(modality, encoded):
    values, spec, segment = encoded
    other = type(modality)()
    state = modality.state()
    assert all(isinstance(content, bytes) for content in state.values())
    if state:
        other.load_state(state)
    assert other.vocabulary == modality.vocabulary
    np.testing.assert_array_equal(other.encode(values, spec).ids, segment.ids)


@embeds
def test_rows_are_embedded_independently_of_their_batch_mates(modality, encoded):
    net, (_, _, segment) = net_of(modality), encoded
    other = modality.encode(*modality.example(np.random.default_rng(7)))
    first, second = rows_of(segment), rows_of(other)
    both = {k: torch.cat([first[k], second[k]]) for k in first}
    with torch.no_grad():
        alone, joined = net(first), net(both)
    assert alone.shape == (segment.ids.size, WIDTH)
    assert alone.isfinite().all()
    torch.testing.assert_close(joined[: len(alone)], alone, atol=1e-6, rtol=1e-5)


@embeds
def test_every_parameter_of_the_net_gets_a_gradient(modality, encoded):
    net, (_, _, segment) = net_of(modality), encoded
    weight = torch.randn(segment.ids.size, WIDTH, generator=torch.Generator().manual_seed(0))
    (net(rows_of(segment)) * weight).sum().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_rows_survive_the_stream(modality, encoded, serializer):
    _, _, segment = encoded
    piece = serializer.piece(modality.name, segment)
    batch = pack([[piece, piece]], 2 * len(piece) + 3, serializer.control)
    batch.validate()
    start = serializer.offset.get(modality.name, 0)
    expected = np.where(segment.ids < 0, -1, segment.ids + start).reshape(-1)
    np.testing.assert_array_equal(batch.inputs[: len(piece)], expected)
    for key, rows in segment.rows.items():
        flat = rows.reshape(-1, *rows.shape[2:])
        np.testing.assert_array_equal(
            batch.payload[modality.name][key], np.concatenate([flat, flat])
        )


def test_a_registered_class_needs_no_other_file(monkeypatch, text_model):
    from gato.tokenizers import modality as registry

    class Dice(Modality):
        """Six ids."""

        name = "dice"
        vocabulary = 6

    monkeypatch.setitem(registry._REGISTRY, "dice", Dice)
    serializer = Serializer(state={"text": {"text.model": text_model}})
    start, stop = serializer.layout.span("dice")
    assert stop - start == 6
    assert serializer.names.index("dice") == serializer.number["dice"]
    with pytest.raises(ValueError, match="two modalities are called 'dice'"):
        registry.register(type("Other", (Modality,), {"name": "dice"}))
