"""Round trips and bounds of every codec, over values a simulator or a person may come up with."""

from __future__ import annotations

import json

import numpy as np
import pytest
from gymnasium import spaces
from hypothesis import assume, example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from gato.envs.episode import space_from_json, space_to_json
from gato.tokenizers.continuous import Continuous
from gato.tokenizers.discrete import BASE, Discrete, digits
from gato.tokenizers.image import Image
from gato.tokenizers.scalars import BINS, bin_centre, inverse_mu_law, mu_law, normalise, to_bin
from gato.tokenizers.spaces import CodecOptions, codec
from gato.tokenizers.symbols import Symbols
from gato.tokenizers.vector import Vector

CONTINUOUS, DISCRETE, VECTOR, SYMBOLS, IMAGE = (
    cls() for cls in (Continuous, Discrete, Vector, Symbols, Image)
)
FLOATS = (np.float16, np.float32, np.float64)
INTEGERS = (np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64)


def finite(dtype: type) -> st.SearchStrategy[float]:
    """Return every finite float of a dtype, huge and subnormal ones included."""
    return st.floats(width=8 * np.dtype(dtype).itemsize, allow_nan=False, allow_infinity=False).map(
        dtype
    )


def action_spec(low, high, dtype, shape=(1,)) -> dict:
    box = spaces.Box(low, high, shape, dtype)
    name, spec = codec(box, "action", CodecOptions(), "toy: action")
    assert name == "continuous"
    return spec


@st.composite
def box_and_action(draw: st.DrawFn) -> tuple[spaces.Box, np.ndarray]:
    dtype = draw(st.sampled_from(FLOATS))
    low, high = sorted(draw(st.tuples(finite(dtype), finite(dtype))))
    low, high = low + dtype(0), high + dtype(0)  # no -0.0
    inside = st.floats(float(low), float(high), width=8 * np.dtype(dtype).itemsize)
    action = draw(st.one_of(st.just(low), st.just(high), inside))
    return spaces.Box(low, high, (1,), dtype), np.array([[action]], dtype)


@given(box_and_action())
def test_actions_come_back_within_half_a_bin_and_inside_their_box(pair):
    box, action = pair
    spec = action_spec(box.low, box.high, box.dtype.type)
    segment = CONTINUOUS.encode(action, spec, "toy: action")
    assert 0 <= segment.ids.min() <= segment.ids.max() < BINS
    assert (np.abs(segment.rows["value"]) <= 1).all()
    back = CONTINUOUS.decode(segment.ids[0], spec)
    assert back.dtype == box.dtype
    assert box.contains(back)
    low, high, x = (float(v) for v in (box.low[0], box.high[0], action[0, 0]))
    half_bin = high / (2 * BINS) - low / (2 * BINS)
    rounding = float(np.spacing(np.maximum(np.abs(box.low), np.abs(box.high)))[0])
    assert abs(float(back[0]) / 2 - x / 2) <= half_bin / 2 * (1 + 1e-6) + rounding


@given(st.sampled_from(INTEGERS), st.data())
def test_integer_boxes_come_back_exactly_up_to_1024_values(dtype, data):
    info = np.iinfo(dtype)
    low = data.draw(st.integers(int(info.min), int(info.max)).filter(lambda x: abs(x) < 2**50))
    high = data.draw(st.integers(low, min(low + BINS - 1, int(info.max))))
    x = data.draw(st.one_of(st.just(low), st.just(high), st.integers(low, high)))
    spec = action_spec(dtype(low), dtype(high), dtype)
    segment = CONTINUOUS.encode(np.array([[x]], dtype), spec)
    back = CONTINUOUS.decode(segment.ids[0], spec)
    assert back.dtype == dtype
    assert back[0] == x


@pytest.mark.parametrize("x", [1.0, np.nextafter(np.float32(1), 0), -1.0, 0.0, -0.0, 5e-324])
def test_plus_one_is_the_last_bin_and_not_the_next_modality(x):
    spec = action_spec(-1, 1, np.float32)
    token = int(CONTINUOUS.encode(np.array([[x]]), spec).ids[0, 0])
    assert token == min(int((x + 1) * 512), 1023)


@given(st.integers(0, BINS - 1))
def test_a_bins_centre_lies_in_its_bin(token):
    assert to_bin(bin_centre(np.array([token])))[0] == token
    value = bin_centre(np.array([token]))
    np.testing.assert_allclose(mu_law(inverse_mu_law(value)), value, atol=1e-12)


@given(st.sampled_from(FLOATS).flatmap(finite))
@example(np.float64(1.7e308))
@example(np.float64(5e-324))
@example(np.float32(1e-45))
def test_any_finite_observation_is_written_and_read_back_to_mu_laws_precision(x):
    spec = {"shape": [1], "codec": "mu_law"}
    segment = CONTINUOUS.encode(np.array([[x]]), spec)
    token = int(segment.ids[0, 0])
    assert 0 <= token < BINS
    assert np.isfinite(segment.rows["value"]).all()
    back = CONTINUOUS.decode(segment.ids[0], spec)[0]
    clipped = float(np.clip(float(x), -256, 256))
    step = 1 / BINS * (1 + 1e-5) + 1e-6
    assert abs(mu_law(np.array(back)) - mu_law(np.array(clipped))) <= step
    group = VECTOR.encode(np.array([[x]]), {**spec, "group": 13})
    assert np.isfinite(group.rows["values"]).all()


@given(
    hnp.arrays(np.float64, (3, 4), elements=finite(np.float64)),
    hnp.arrays(np.float64, (2, 4), elements=finite(np.float64)),
)
def test_scales_fitted_on_any_data_give_finite_inputs(data, other):
    for modality in (CONTINUOUS, VECTOR):
        spec = {"shape": [4], "group": 3, "codec": "quantile"}
        fitted = modality.fit([data, data[:1]], spec)
        for values in (data, other):
            segment = modality.encode(values, fitted)
            assert all(np.isfinite(rows).all() for rows in segment.rows.values())


def test_vectors_keep_mu_law_where_it_is_asked_for():
    space = spaces.Box(-np.inf, np.inf, (2,), np.float32)
    for scales in ("mu_law", "quantile"):
        options = CodecOptions(observations="vector", scales=scales)
        _, spec = codec(space, "observation", options, "toy: hand")
        assert VECTOR.fit([np.eye(2)], spec)["codec"] == scales


def test_fitted_scales_put_the_data_between_minus_one_and_one():
    data = np.random.default_rng(0).normal(5.0, 3.0, (5000, 2))
    fitted = VECTOR.fit([data[:1000], data[1000:]], {"shape": [2], "group": 2, "codec": "mu_law"})
    inside = np.abs(normalise(data, fitted)) <= 1
    assert 0.975 < inside.mean() < 0.985


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("modality", [CONTINUOUS, VECTOR], ids=lambda m: m.name)
def test_what_is_not_finite_is_refused_with_key_and_index(modality, bad):
    values = np.zeros((3, 2, 2), np.float32)
    values[2, 0, 1] = bad
    spec = {"shape": [2, 2], "codec": "mu_law", "group": 13}
    with pytest.raises(ValueError, match=r"'toy: hand'.*finite.*(nan|inf).*\(2, 1\)"):
        modality.encode(values, spec, "toy: hand")


@pytest.mark.parametrize(
    ("low", "high", "x"),
    [
        (-1, 1, 1.01),
        (-1, 1, -19.8),
        (0, 0, 1),
        (3, 3, -7),
        (0, 1e-30, 1e-8),
        (-3e38, 3e38, 3.3e38),
    ],
)
def test_an_action_outside_its_box_is_refused(low, high, x):
    spec = action_spec(np.float32(low), np.float32(high), np.float32, (2,))
    inside = np.full((4, 2), low, np.float32)
    CONTINUOUS.encode(inside, spec, "toy: action")
    inside[3, 1] = x
    with pytest.raises(ValueError, match=r"'toy: action' must be in \[.*at dim 1; got"):
        CONTINUOUS.encode(inside, spec, "toy: action")


@given(st.floats(-(2.0**99), 2.0**99, width=32))
def test_an_action_computed_in_double_precision_may_touch_its_box(edge):
    spec = action_spec(np.float32(edge), np.float32(edge + abs(edge) + 1), np.float32)
    CONTINUOUS.encode(np.array([[float(edge) * (1 + np.sign(edge) * 1e-9)]]), spec)


@pytest.mark.parametrize(("low", "high"), [(-np.inf, np.inf), (0, np.inf), (-np.inf, 0)])
def test_an_infinite_box_is_no_action(low, high):
    box = spaces.Box(low, high, (3,), np.float32)
    with pytest.raises(ValueError, match=r"'toy: action'.*finite bounds.*RescaleAction"):
        codec(box, "action", CodecOptions(), "toy: action")
    assert codec(box, "observation", CodecOptions(), "toy: hand")[0] == "continuous"


# ---- integers --------------------------------------------------------------------------------

SIZES = st.one_of(
    st.integers(1, 5),
    st.sampled_from([1023, 1024, 1025, 1024**2 - 1, 1024**2, 1024**2 + 1, 2**62]),
    st.integers(1, 2**62),
)


@st.composite
def integers_in_spec(draw: st.DrawFn) -> tuple[dict, np.ndarray]:
    sizes = draw(st.lists(SIZES, min_size=1, max_size=4))
    start = draw(st.one_of(st.just(0), st.integers(-(2**31), 2**31)))
    value = [draw(st.one_of(st.just(n - 1), st.just(0), st.integers(0, n - 1))) for n in sizes]
    spec = {"shape": [len(sizes)], "sizes": sizes, "start": start}
    return spec, np.array([value], np.int64) + start


@given(integers_in_spec())
def test_integers_come_back_exactly(pair):
    spec, values = pair
    segment = DISCRETE.encode(values, spec)
    assert 0 <= segment.ids.min() <= segment.ids.max() < BASE
    assert segment.ids.shape == (1, DISCRETE.count(spec))
    np.testing.assert_array_equal(DISCRETE.decode(segment.ids[0], spec), values[0])


@given(integers_in_spec(), st.data())
def test_the_grammar_of_digits_never_leaves_the_range(pair, data):
    spec, _ = pair
    ids: list[int] = []
    while (span := DISCRETE.allowed(np.array(ids, np.int64), spec)) is not None:
        start, stop = span
        ids.append(data.draw(st.one_of(st.just(stop - 1), st.integers(start, stop - 1))))
    assert len(ids) == DISCRETE.count(spec)
    number, at = [], 0
    for size in spec["sizes"]:
        n = digits(size)
        number.append(sum(d * BASE ** (n - 1 - i) for i, d in enumerate(ids[at : at + n])))
        at += n
    assert all(0 <= v < size for v, size in zip(number, spec["sizes"], strict=True))
    np.testing.assert_array_equal(
        DISCRETE.decode(np.array(ids), spec), np.array(number) + spec["start"]
    )


@given(integers_in_spec(), st.sampled_from([-1, 1]), st.data())
def test_an_integer_outside_its_range_is_refused(pair, side, data):
    spec, values = pair
    entry = data.draw(st.integers(0, len(spec["sizes"]) - 1))
    beyond = -1 if side < 0 else spec["sizes"][entry]
    values[0, entry] = spec["start"] + beyond
    with pytest.raises(ValueError, match=rf"'toy: button' must be in.*entry {entry}\."):
        DISCRETE.encode(values, spec, "toy: button")


@pytest.mark.parametrize("dtype", [*INTEGERS, bool])
def test_every_dtype_of_integers_is_read(dtype):
    spec = {"shape": [2], "sizes": [2, 2], "start": 0}
    values = np.array([[0, 1], [1, 1]]).astype(dtype)
    np.testing.assert_array_equal(DISCRETE.encode(values, spec).ids, values.astype(int))
    with pytest.raises(ValueError, match=r"must hold 2 integers; got float64"):
        DISCRETE.encode(values.astype(float), spec)


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.randoms(use_true_random=False))
def test_symbols_name_every_integer_of_a_group_apart(length, n, group, random):
    values = np.array(
        [[[random.randrange(16) for _ in range(group)] for _ in range(n)] for _ in range(length)]
    )
    spec = {"shape": [n, group], "group": group, "size": 16}
    index = SYMBOLS.encode(values, spec).rows["index"]
    np.testing.assert_array_equal(index % 16, values)
    np.testing.assert_array_equal(index // 16, np.broadcast_to(np.arange(group), index.shape))
    values[-1, -1, -1] = 16
    with pytest.raises(ValueError, match=r"must be in \[0, 15\]"):
        SYMBOLS.encode(values, spec)


# ---- images ----------------------------------------------------------------------------------


@given(
    st.integers(1, 40), st.integers(1, 40), st.sampled_from([(), (1,), (3,)]), st.integers(0, 99)
)
def test_patches_hold_every_pixel_in_raster_order(height, width, channels, seed):
    shape = (height, width, *channels)
    image = np.random.default_rng(seed).integers(0, 256, (2, *shape), np.uint8)
    segment = IMAGE.encode(image, {"shape": list(shape)})
    rows, columns = -(-height // 16), -(-width // 16)
    assert segment.ids.shape == (2, rows * columns)
    patches, grid = segment.rows["patch"], segment.rows["grid"]
    canvas = np.zeros((2, rows * 16, columns * 16, 3), np.uint8)
    for i in range(rows * columns):
        row, column, *size = grid[0, i]
        assert (row, column) == divmod(i, columns)
        assert size == [rows, columns]
        canvas[:, row * 16 : row * 16 + 16, column * 16 : column * 16 + 16] = patches[:, i]
    expected = image.reshape(2, height, width, -1)
    np.testing.assert_array_equal(
        canvas[:, :height, :width], np.broadcast_to(expected, (2, height, width, 3))
    )
    assert not canvas[:, height:].any()
    assert not canvas[:, :, width:].any()


@pytest.mark.parametrize("wrong", [np.zeros((1, 16, 16, 3), np.float32), np.zeros((1, 8, 8, 3))])
def test_images_are_bytes_of_the_declared_shape(wrong):
    with pytest.raises(ValueError, match=r"'toy: camera' must be uint8 of shape \[16, 16, 3\]"):
        IMAGE.encode(wrong, {"shape": [16, 16, 3]}, "toy: camera")


# ---- spaces ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("space", "role", "observations", "expected"),
    [
        (spaces.Box(-1, 1, (3,)), "action", "vector", "continuous"),
        (spaces.Box(-1, 1, (3,)), "observation", "scalar", "continuous"),
        (spaces.Box(-1, 1, (3,)), "observation", "vector", "vector"),
        (spaces.Box(0, 255, (80, 80, 3), np.uint8), "observation", "vector", "image"),
        (spaces.Box(0, 255, (80, 80), np.uint8), "observation", "scalar", "image"),
        (spaces.Box(0, 255, (8, 8, 3), np.uint8), "observation", "scalar", "continuous"),
        (spaces.Box(0, 255, (4, 84, 84), np.uint8), "observation", "scalar", "image"),
        (spaces.Box(0, 255, (4, 20, 20, 3), np.uint8), "observation", "scalar", "image"),
        (spaces.Box(0, 255, (16, 20, 20), np.uint8), "observation", "scalar", "image"),
        (spaces.Box(0, 1, (10, 20, 20), np.uint8), "observation", "scalar", "continuous"),
        (spaces.Box(0, 1, (17, 20, 20), np.uint8), "observation", "scalar", "continuous"),
        (spaces.Box(0, 1, (20, 20), np.uint8), "observation", "scalar", "image"),
        (spaces.Box(0, 1, (20, 20, 3), np.uint8), "observation", "scalar", "image"),
        (spaces.Box(0, 255, (20, 20, 4), np.uint8), "observation", "scalar", "continuous"),
        (spaces.Discrete(5, start=2), "action", "scalar", "discrete"),
        (spaces.MultiBinary((2, 3)), "observation", "vector", "discrete"),
        (spaces.MultiDiscrete([[9, 6, 4]] * 7), "observation", "vector", "symbols"),
        (spaces.MultiDiscrete([[9, 6, 4]] * 7), "observation", "scalar", "discrete"),
        (spaces.MultiDiscrete([[99, 6, 4]] * 7), "observation", "vector", "discrete"),
        (spaces.MultiDiscrete([[9, 6, 4]] * 7), "action", "vector", "discrete"),
        (spaces.MultiDiscrete([[9, 6]] * 7), "observation", "vector", "discrete"),
        (spaces.MultiDiscrete([[9, 6, 4]], start=[[0, 0, 1]]), "observation", "vector", "discrete"),
        (spaces.MultiDiscrete([3, 2000, 2], start=[-1, 5, 0]), "action", "scalar", "discrete"),
        (spaces.Text(8), "action", "vector", "text"),
    ],
)
def test_spaces_choose_their_modality(space, role, observations, expected):
    name, spec = codec(space, role, CodecOptions(observations=observations), "toy: key")
    assert name == expected
    if name == "text":
        return
    modality = {m.name: m for m in (CONTINUOUS, DISCRETE, VECTOR, SYMBOLS, IMAGE)}[name]
    space.seed(0)
    values = np.stack([space.sample() for _ in range(5)])
    segment = modality.encode(values, spec)
    assert segment.ids.shape == (5, modality.count(spec))
    if role == "action" and name == "discrete":
        for i in range(5):
            back = modality.decode(segment.ids[i], spec)
            assert space.contains(back)
            np.testing.assert_array_equal(back, values[i])


@pytest.mark.parametrize("shape", [(17, 20, 20), (20, 84, 84), (17, 20, 20, 3), (84, 84, 16)])
@pytest.mark.parametrize("cell", [16, 32])
def test_a_stack_of_too_many_images_is_refused(shape, cell):
    box = spaces.Box(0, 255, shape, np.uint8)
    with pytest.raises(ValueError, match=rf"'toy: eye': a stack holds at most 16.*got {shape[0]}"):
        codec(box, "observation", CodecOptions(frame_cell=cell), "toy: eye")


def test_a_space_that_nothing_reads_is_refused():
    with pytest.raises(TypeError, match=r"'toy: key'.*Sequence"):
        codec(spaces.Sequence(spaces.Discrete(2)), "observation", CodecOptions(), "toy: key")
    with pytest.raises(ValueError, match="scalar or vector; got 'vectors'"):
        CodecOptions(observations="vectors")
    with pytest.raises(ValueError, match="one of 16, 32, 64; got 24"):
        CodecOptions(frame_cell=24)
    with pytest.raises(ValueError, match="quantile or mu_law; got 'none'"):
        CodecOptions(scales="none")


@given(hnp.arrays(np.float32, (3, 2), elements=st.floats(-1, 1, width=32)))
def test_encoding_changes_nothing_it_is_given(values):
    assume(values.size)
    spec = action_spec(-1, 1, np.float32, (2,))
    before = values.copy()
    CONTINUOUS.encode(values, spec)
    VECTOR.encode(values, {"shape": [2], "group": 5, "codec": "mu_law"})
    np.testing.assert_array_equal(values, before)


def test_a_multi_discrete_space_keeps_its_lowest_values_in_its_file():
    for space in (
        spaces.MultiDiscrete([3, 2000, 2], start=[-1, 5, 0]),
        spaces.MultiDiscrete([[3, 4]]),
    ):
        assert space_from_json(json.loads(json.dumps(space_to_json(space)))) == space
