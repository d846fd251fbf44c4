"""Whatever the weights say, an action is an element of its space."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st

from gato.checkpoint import build_model
from gato.config import TrainConfig
from gato.envs.episode import ANY_TEXT, TaskSpec
from gato.model_config import ModelConfig
from gato.rollouts.grammar import inside
from gato.rollouts.policy import Policy
from gato.tokenizers.serializer import History, Serializer

BOUND = st.floats(-(2.0**99), 2.0**99, width=32)


@st.composite
def boxes(draw) -> spaces.Box:
    shape = draw(st.sampled_from([(), (1,), (3,), (2, 2)]))
    size = int(np.prod(shape))
    kind = draw(st.sampled_from([np.float32, np.float64, np.int32, np.uint8]))
    if np.issubdtype(kind, np.integer):
        edges = [draw(st.tuples(st.integers(0, 255), st.integers(0, 255))) for _ in range(size)]
    else:
        edges = [draw(st.tuples(BOUND, BOUND)) for _ in range(size)]
    low = np.array([min(e) for e in edges], kind).reshape(shape)
    high = np.array([max(e) for e in edges], kind).reshape(shape)
    return spaces.Box(low, high, shape, kind)


LEAVES = st.one_of(
    boxes(),
    st.builds(
        lambda n, start: spaces.Discrete(n, start=start),
        st.integers(1, 5000),
        st.integers(-9, 9),
    ),
    st.builds(
        lambda sizes, start: spaces.MultiDiscrete(sizes, start=[start] * len(sizes)),
        st.lists(st.integers(1, 2000), min_size=1, max_size=3),
        st.integers(-9, 9),
    ),
    st.integers(1, 3).map(spaces.MultiBinary),
    st.integers(1, 9).map(ANY_TEXT),
    st.builds(lambda n, k: spaces.Text(n + k, min_length=n), st.integers(0, 3), st.integers(0, 6)),
)
ACTIONS = st.one_of(
    LEAVES,
    st.dictionaries(st.sampled_from("abc"), LEAVES, min_size=1).map(spaces.Dict),
    st.lists(LEAVES, min_size=1, max_size=3).map(spaces.Tuple),
)


@settings(max_examples=60)
@given(
    chosen=st.lists(ACTIONS, min_size=1, max_size=3),
    hide=st.booleans(),
    temperature=st.sampled_from([0.0, 1.0, 100.0]),
    seed=st.integers(0, 9),
)
def test_actions_lie_in_their_space(serializer, chosen, hide, temperature, seed) -> None:
    own = Serializer(serializer.options, serializer.state())
    for i, action in enumerate(chosen):
        task = TaskSpec(f"made/{i}", spaces.Discrete(3), action, 9, 1.0)
        own.add_task(task, history=History(window=2, hide_actions=hide))
    torch.manual_seed(seed)
    sizes = ModelConfig(layers=1, width=16, heads=2, head_dim=8, ffn_width=32, context=96)
    model = build_model(TrainConfig(sizes), own).eval()
    with torch.no_grad():
        model.table.weight.mul_(50.0)
    policy = Policy(model, own, [f"made/{i}" for i in range(len(chosen))], temperature=temperature)
    for _ in range(3):
        actions = policy.select_action([np.int64(seed % 3)] * len(chosen))
        for space, action in zip(chosen, actions, strict=True):
            assert space.contains(action), (space, action)


@pytest.mark.parametrize(
    ("space", "value", "wanted"),
    [
        (spaces.Box(-1, 1, (2,), np.float32), np.array([-3.0, 0.5]), [-1.0, 0.5]),
        (spaces.Text(3, charset="ab"), "xaybzaab", "aba"),
        (spaces.Text(6, min_length=4, charset="ab"), "b", "baaa"),
        (ANY_TEXT(3), "\u00e9l\u00e8ve", "\u00e9l\u00e8"),
        (spaces.MultiBinary(2), np.array([1, 0]), [1, 0]),
    ],
)
def test_a_decoded_value_is_fitted_to_its_space(space, value, wanted) -> None:
    fitted = inside(space, value)
    assert space.contains(fitted)
    np.testing.assert_array_equal(fitted, wanted)


def test_what_a_policy_is_not_given_right_is_refused(agent) -> None:
    with pytest.raises(ValueError, match="made/reach-v0"):
        agent.policy("made/rech-v0")
    with pytest.raises(ValueError, match="temperature"):
        agent.policy("made/reach-v0", temperature=-1.0)
    with pytest.raises(ValueError, match="at least one task"):
        agent.policy([])
    policy = agent.policy(["made/reach-v0", "made/count-v0"])
    with pytest.raises(ValueError, match="2 observations"):
        policy.select_action([np.int64(1)])
    with pytest.raises(ValueError, match=r"made/count-v0: observation.*finite"):
        policy.select_action([np.int64(1), np.array([np.nan, 0], np.float32)])
    with pytest.raises(ValueError, match="one entry per row"):
        policy.reset([True])


def test_one_task_makes_one_action(agent) -> None:
    policy = agent.policy("made/count-v0")
    assert policy.select_action(np.zeros(2, np.float32)) in range(3)
