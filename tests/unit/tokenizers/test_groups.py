"""Groups of any size: numbers of an observation in one token, whatever a task's numbers are."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from gymnasium import spaces

from gato.envs.episode import TaskSpec
from gato.tokenizers.scalars import ValueFeatures
from gato.tokenizers.serializer import Serializer
from gato.tokenizers.spaces import CodecOptions
from gato.tokenizers.stream import pack
from gato.tokenizers.vector import MAX_GROUPS, Vector, VectorNet

SIZES = (1, 4, 13, 39, 100)


def task(size: int) -> TaskSpec:
    return TaskSpec(
        id=f"toy/of{size}-v0",
        observation_space=spaces.Box(-np.inf, np.inf, (size,), np.float64),
        action_space=spaces.Discrete(3),
        max_steps=9,
        control_hz=10.0,
    )


def slow(net: VectorNet, numbers: np.ndarray, group: int) -> torch.Tensor:
    """Return the embeddings (n, D) of one observation, number by number."""
    size = ValueFeatures.size
    found = []
    for k in range(math.ceil(len(numbers) / group)):
        token = net.values.bias + net.group.weight[k % MAX_GROUPS]
        for i in range(group):
            at = k * group + i
            x = torch.tensor(float(numbers[at]) if at < len(numbers) else 0.0)
            token = token + net.values.weight[:, i * size : (i + 1) * size] @ net.features(x)
        found.append(token)
    return torch.stack(found)


@pytest.mark.parametrize("group", [1, 2, 13, 39, 64])
def test_tasks_of_any_size_share_a_batch_whatever_the_group(group, text_model):
    options = CodecOptions(observations="vector", vector_group=group, scales="mu_law")
    fast = Serializer(options, {"text": {"text.model": text_model}})
    rng = np.random.default_rng(0)
    net = fast.modalities["vector"].net(8, fast.net_options()["vector"]).eval()
    pieces, expected = [], []
    for size in SIZES:
        spec = task(size)
        fast.add_task(spec)
        observed = rng.normal(size=(2, size))
        written = fast.observations(spec.id, {"observation": observed})
        pieces.append(written)
        values = written.payload["vector"]["values"].reshape(2, -1)
        n = math.ceil(size / group)
        assert values.shape == (2, n * group)
        assert not values[:, size:].any()
        assert [fast.names[m] for m in written.modality] == [*["vector"] * n, "control"] * 2
        expected += [slow(net, row[:size], group) for row in values]
    batch = pack([pieces], sum(map(len, pieces)), fast.control).to("cpu")
    embedded = net(batch.payload["vector"])
    torch.testing.assert_close(embedded, torch.cat(expected), rtol=1e-4, atol=1e-5)


def test_what_fills_a_group_up_moves_no_token():
    torch.manual_seed(0)
    small, large = VectorNet(8, 4), VectorNet(8, 39)
    with torch.no_grad():
        large.values.weight[:, : 4 * ValueFeatures.size] = small.values.weight
        large.group.weight.copy_(small.group.weight)
    rng = np.random.default_rng(0)
    observed = rng.normal(size=(5, 4))

    def embedded(net: VectorNet, group: int) -> torch.Tensor:
        spec = {"shape": [4], "group": group, "codec": "mu_law"}
        rows = Vector().encode(observed, spec).rows
        flat = {k: torch.from_numpy(np.array(v[:, 0])) for k, v in rows.items()}
        return net.eval()(flat)

    a, b = embedded(small, 4), embedded(large, 39)
    torch.testing.assert_close(a - a[0], b - b[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("group", [0, -3])
def test_a_group_of_nothing_is_refused(group):
    with pytest.raises(ValueError, match=f"vector_group must be at least 1; got {group}"):
        CodecOptions(vector_group=group)
