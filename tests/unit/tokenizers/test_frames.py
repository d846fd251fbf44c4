"""Frames of tasks in large cells: what a token shows, who gets them, and what reads them."""

from __future__ import annotations

import json
import math
import re

import numpy as np
import pytest
import torch
from gymnasium import spaces
from hypothesis import given
from hypothesis import strategies as st

from gato.envs.episode import TaskSpec
from gato.tokenizers.cells import stacked
from gato.tokenizers.frames import Frame
from gato.tokenizers.image import Image
from gato.tokenizers.serializer import Serializer
from gato.tokenizers.spaces import CodecOptions, codec
from gato.tokenizers.stream import pack, to_device

SHAPES = [
    *((64, 64, 3), (210, 160, 3), (80, 80, 3), (96, 96), (96, 96, 1)),
    *((4, 84, 84), (2, 70, 40, 3)),
]


def task(**observed: tuple[int, ...]) -> TaskSpec:
    """Return a task that shows images of these shapes."""
    boxes = {name: spaces.Box(0, 255, shape, np.uint8) for name, shape in observed.items()}
    return TaskSpec(
        id="toy/seeing-v0",
        observation_space=spaces.Dict(boxes),
        action_space=spaces.Discrete(3),
        max_steps=9,
        control_hz=10.0,
    )


def seen(spec: TaskSpec, n: int = 2) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        name: rng.integers(0, 256, (n, *box.shape), np.uint8)
        for name, box in spec.observation_space.spaces.items()
    }


def payload_of(segment) -> dict:
    flat = {k: np.array(v.reshape(-1, *v.shape[2:])) for k, v in segment.rows.items()}
    return to_device(flat, torch.from_numpy)


@pytest.mark.parametrize("cell", [32, 64])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_frame_of_any_shape_is_written_and_embedded(shape, cell):
    box = spaces.Box(0, 255, shape, np.uint8)
    name, spec = codec(box, "observation", CodecOptions(frame_cell=cell), "toy: eye")
    assert (name, spec) == ("frame", {"shape": list(shape), "cell": cell})
    count, (height, width, *_) = stacked(shape)
    n = count * math.ceil(height / cell) * math.ceil(width / cell)
    values = np.random.default_rng(0).integers(0, 256, (3, *shape), np.uint8)
    segment = Frame().encode(values, spec)
    assert segment.ids.shape == (3, n) == (3, Frame().count(spec))
    assert segment.rows["pixels"].shape == (3, n, cell, cell, 3)
    net = Frame().net(8, {"cell": cell}).eval()
    whole = net(payload_of(segment))
    assert whole.shape == (3 * n, 8)
    alone = net(payload_of(Frame().encode(values[1:2], spec)))
    torch.testing.assert_close(whole[n : 2 * n], alone, rtol=1e-4, atol=1e-5)


@given(st.integers(1, 80), st.integers(1, 80), st.sampled_from([(), (1,), (3,)]), st.integers(0, 9))
def test_large_cells_are_made_of_small_ones(height, width, channels, seed):
    shape = [height, width, *channels]
    image = np.random.default_rng(seed).integers(0, 256, (1, *shape), np.uint8)
    large = Frame().encode(image, {"shape": shape, "cell": 32})
    small = Image().encode(image, {"shape": shape})
    patches = {tuple(g[:2]): p for g, p in zip(*_first(small, "grid", "patch"), strict=True)}
    for grid, pixels in zip(*_first(large, "grid", "pixels"), strict=True):
        for y in range(2):
            for x in range(2):
                at = (2 * grid[0] + y, 2 * grid[1] + x)
                got = pixels[16 * y : 16 * y + 16, 16 * x : 16 * x + 16]
                np.testing.assert_array_equal(got, patches.get(at, np.zeros_like(got)))
    np.testing.assert_array_equal(large.rows["host_size"], large.rows["grid"][..., 2:])


def _first(segment, *names: str) -> list[np.ndarray]:
    return [segment.rows[name][0] for name in names]


def test_only_what_a_task_observes_comes_in_large_cells(text_model):
    fast = Serializer(CodecOptions(frame_cell=32), {"text": {"text.model": text_model}})
    spec = task(a=(64, 64, 3), b=(96, 96, 3), stack=(2, 32, 32))
    fast.add_task(spec)
    written = fast.observations(spec.id, seen(spec))
    names = [fast.names[m] for m in written.modality]
    assert names == ([*["frame"] * (4 + 9 + 2), "control"]) * 2
    picture = np.zeros((64, 64, 3), np.uint8)
    talk = [{"role": "user", "content": [{"type": "image", "image": picture}]}]
    for words in (fast.caption(picture, "black"), fast.conversation(talk)):
        assert list(words.payload) == ["image"]
        assert len(words.payload["image"]["at"]) == 16
    nets = {n: m.net(8, fast.net_options().get(n, {})) for n, m in fast.modalities.items()}
    assert nets["frame"] is not None


def test_a_checkpoint_keeps_the_cell_of_every_task(text_model):
    state = {"text": {"text.model": text_model}}
    fast = Serializer(CodecOptions(frame_cell=64), state)
    fast.add_task(task(eye=(64, 64, 3)))
    described = json.loads(json.dumps(fast.to_json()))
    again = Serializer.from_json(described, state)
    assert again.task("toy/seeing-v0") == fast.task("toy/seeing-v0")
    assert again.net_options()["frame"] == {"cell": 64}
    del described["options"]["frame_cell"]  # as checkpoints of before have it
    described["tasks"][0]["observation"] = [["eye", "image", {"shape": [64, 64, 3]}]]
    old = Serializer.from_json(described, state)
    assert old.options.frame_cell == 16
    assert len(old.observations("toy/seeing-v0", seen(task(eye=(64, 64, 3)), 1))) == 16 + 1
    assert old.modalities["frame"].net(8, old.net_options()["frame"]) is None


def test_a_checkpoint_keeps_a_stack_that_it_wrote_as_numbers(text_model):
    """As tasks were described before stacks were images."""
    state = {"text": {"text.model": text_model}}
    serializer = Serializer(CodecOptions(observations="vector"), state)
    spec = task(stack=(4, 84, 84))
    serializer.add_task(spec)
    described = json.loads(json.dumps(serializer.to_json()))
    numbers = {"shape": [4, 84, 84], "group": 64, "codec": "mu_law", "fitted": False}
    described["tasks"][0]["observation"] = [["stack", "vector", numbers]]
    old = Serializer.from_json(described, state)
    assert old.task(spec.id).observation == (("stack", "vector", numbers),)
    written = old.observations(spec.id, seen(spec, 1))
    assert list(written.payload) == ["vector"]
    assert len(written) == 4 * 84 * 84 // 64 + 1
    assert json.loads(json.dumps(old.to_json())) == described


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((64, 64, 4), np.uint8),
        np.zeros((3, 64, 64), np.uint8),
        np.zeros((2, 64, 64, 3), np.uint8),
        np.zeros(64, np.uint8),
        np.zeros((64, 64, 3), np.float32),
        np.zeros((0, 64, 3), np.uint8),
    ],
    ids=lambda x: f"{x.dtype}{x.shape}",
)
def test_a_picture_of_another_shape_is_refused(text_model, image):
    plain = Serializer(state={"text": {"text.model": text_model}})
    talk = [{"role": "user", "content": [{"type": "image", "image": image}]}]
    told = re.escape(f"got {image.dtype} of shape {image.shape}. Convert to RGB")
    for write in (
        lambda: plain.image(image),
        lambda: plain.caption(image, "black"),
        lambda: plain.conversation(talk),
    ):
        with pytest.raises(ValueError, match=told):
            write()


def test_shapes_are_known_without_asking_the_device(text_model):
    fast = Serializer(CodecOptions(frame_cell=32), {"text": {"text.model": text_model}})
    spec = task(a=(64, 64, 3), b=(40, 70, 3))
    fast.add_task(spec)
    written = fast.observations(spec.id, seen(spec))
    batch = pack([[written]], len(written), fast.control).to("meta")
    rows = batch.payload["frame"]
    assert isinstance(rows["host_size"], np.ndarray)
    net = fast.modalities["frame"].net(8, {"cell": 32}).to("meta")
    embedded = net(rows)  # a kernel's answer that the host asked for would raise here
    assert embedded.shape == (2 * (4 + 6), 8)
    assert embedded.device.type == "meta"


def test_show_says_which_cell_a_token_stands_for():
    spec = {"shape": [64, 32, 3], "cell": 32}
    image = np.zeros((1, 64, 32, 3), np.uint8)
    image[0, 32:] = (10, 20, 30)
    segment = Frame().encode(image, spec)
    row = {k: v[0, 1] for k, v in segment.rows.items()}
    assert Frame().describe(-1, row, {}) == {"row": 1, "column": 0, "rgb": [10, 20, 30]}
