"""The model with every modality's real net: no document sees another, no token sees the future."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from gymnasium import spaces

from gato.checkpoint import build_model
from gato.config import TrainConfig
from gato.envs.episode import ANY_TEXT, Episode, TaskSpec
from gato.model import GatoModel
from gato.model_config import ModelConfig
from gato.tokenizers.modality import modality_classes
from gato.tokenizers.serializer import Serializer
from gato.tokenizers.spaces import CodecOptions
from gato.tokenizers.stream import TokenBatch, TokenSequence, concatenate, pack

TASKS = [
    TaskSpec(
        id="toy/arm-v0",
        observation_space=spaces.Dict(
            {
                "hand": spaces.Box(-np.inf, np.inf, (7,), np.float32),
                "camera": spaces.Box(0, 255, (32, 16, 3), np.uint8),
            }
        ),
        action_space=spaces.Box(-1, 1, (3,), np.float32),
        max_steps=9,
        control_hz=10.0,
        instruction="go to the red ball",
    ),
    TaskSpec(
        id="toy/grid-v0",
        observation_space=spaces.Dict(
            {"grid": spaces.MultiDiscrete(np.full((2, 2, 3), 6)), "mission": ANY_TEXT()}
        ),
        action_space=spaces.Dict(
            {"move": spaces.Discrete(5), "turn": spaces.Box(0, 2, (2,), np.float32)}
        ),
        max_steps=9,
        control_hz=10.0,
    ),
]


def episode(task: TaskSpec, seed: int) -> Episode:
    rng = np.random.default_rng(seed)
    steps = 3
    no = np.zeros(steps, bool)
    if task is TASKS[0]:
        observed = {
            "hand": rng.normal(size=(steps + 1, 7)).astype(np.float32),
            "camera": rng.integers(0, 256, (steps + 1, 32, 16, 3), np.uint8),
        }
        acted = {"action": rng.uniform(-1, 1, (steps, 3)).astype(np.float32)}
    else:
        observed = {
            "grid": rng.integers(6, size=(steps + 1, 2, 2, 3)),
            "mission": ["go to the box"] * (steps + 1),
        }
        turn = rng.uniform(0, 2, (steps, 2)).astype(np.float32)
        acted = {"move": rng.integers(5, size=steps), "turn": turn}
    return Episode(task.id, observed, acted, np.zeros(steps), no, no, None, task.instruction, seed)


CODECS = {
    "vector": CodecOptions(observations="vector", vector_group=3),
    "scalar": CodecOptions(observations="scalar"),
    "frame": CodecOptions(observations="vector", vector_group=39, frame_cell=32),
}


@pytest.fixture(params=CODECS)
def mixed(request: pytest.FixtureRequest, text_model: bytes) -> Serializer:
    serializer = Serializer(CODECS[request.param], {"text": {"text.model": text_model}})
    for task in TASKS:
        serializer.add_task(task)
    return serializer


def documents(serializer: Serializer) -> list[TokenSequence]:
    """Return documents of every kind, some of their actions hidden."""
    rng = np.random.default_rng(5)
    image = rng.integers(0, 256, (32, 32, 3), np.uint8)
    talk = [
        {
            "role": "user",
            "content": [{"type": "image", "image": image[:16]}, {"type": "text", "text": "what?"}],
        },
        {"role": "assistant", "content": "a red ball"},
    ]
    found = [serializer.document("the door is open"), serializer.conversation(talk)]
    found.append(serializer.caption(image, "a green box"))
    for i, task in enumerate((*TASKS, *TASKS)):
        written = serializer.episode(episode(task, i))
        steps = written.steps.hide(written.actions) if i == 2 else written.steps
        found.append(concatenate([written.head, steps]))
    return found


def model_of(serializer: Serializer, embedder: str, window: int | None = None) -> GatoModel:
    sizes = ModelConfig(
        layers=2,
        width=32,
        heads=4,
        head_dim=8,
        ffn_width=64,
        context=256,
        kv_heads=2,
        qk_norm=True,
        window=window,
    )
    torch.manual_seed(0)
    config = TrainConfig(model=sizes, embedders={"image": {"embedder": embedder}})
    model = build_model(config, serializer).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)  # no projection stays at zero
    return model


def test_every_modality_takes_part(text_model):
    owners = set()
    for options in CODECS.values():
        serializer = Serializer(options, {"text": {"text.model": text_model}})
        for task in TASKS:
            serializer.add_task(task)
        for document in documents(serializer):
            owners |= {serializer.names[m] for m in document.modality}
    assert owners == {*modality_classes(), "control"}


@pytest.mark.parametrize("embedder", ["patch", "conv"])
@pytest.mark.parametrize("window", [None, 20])
@torch.no_grad()
def test_packed_documents_equal_single_ones(mixed, embedder, window):
    model, found = model_of(mixed, embedder, window), documents(mixed)
    length = 256
    batch = pack([found[::2], found[1::2]], length, mixed.control)
    batch.validate()
    hidden = model(batch.to("cpu"))
    losses = model.loss(batch.to("cpu"))
    at = 0
    for row, members in enumerate((found[::2], found[1::2])):
        start = row * length
        for document in members:
            alone = pack([[document]], len(document), mixed.control).to("cpu")
            expected = model(alone)
            torch.testing.assert_close(
                hidden[start : start + len(document)], expected, atol=1e-5, rtol=1e-4
            )
            single = model.loss(alone)
            torch.testing.assert_close(losses[at : at + len(single)], single, atol=1e-5, rtol=1e-4)
            start, at = start + len(document), at + len(single)
    assert at == len(losses)


def change_from(batch: TokenBatch, cut: int, vocabulary: int, seed: int) -> None:
    """Replace every id and payload row at or after `cut` by others."""
    rng = np.random.default_rng(seed)
    later = np.arange(len(batch.inputs)) >= cut
    drawn = rng.integers(vocabulary, size=len(later))
    batch.inputs = np.where(later & (batch.inputs >= 0), drawn, batch.inputs)
    for rows in batch.payload.values():
        changed = rows["at"] >= cut
        for key, values in rows.items():
            if values.dtype == np.uint8:
                rows[key] = values.copy()
                rows[key][changed] = rng.integers(0, 256, values[changed].shape, np.uint8)
            elif np.issubdtype(values.dtype, np.floating):
                rows[key] = values.copy()
                rows[key][changed] = rng.uniform(-3, 3, values[changed].shape)
            elif key != "at":  # an index: another of those that occur
                if key not in ("grid", "host_size"):
                    rows[key] = values.copy()
                    rows[key][changed] = rng.permutation(values[changed])


@pytest.mark.parametrize(("embedder", "window"), [("patch", None), ("conv", None), ("patch", 9)])
@torch.no_grad()
def test_changing_the_future_leaves_past_logits_bit_identical(mixed, embedder, window):
    model, found = model_of(mixed, embedder, window), documents(mixed)
    rows = [found[:3], found[3:5], found[5:]]
    length = max(sum(map(len, row)) for row in rows)

    def fresh() -> TokenBatch:
        return pack(rows, length, mixed.control)

    before = model.logits(model(fresh().to("cpu")))
    images = fresh().payload["image"]["at"]
    inside = set(images[1:][np.diff(images) == 1].tolist())  # a stem sees the whole image
    cuts = [c for c in range(1, 3 * length, 7) if c not in inside]
    for cut in cuts:
        batch = fresh()
        change_from(batch, cut, mixed.layout.size, cut)
        after = model.logits(model(batch.to("cpu")))
        assert torch.equal(after[:cut], before[:cut]), cut
        assert not torch.equal(after[cut:], before[cut:])


@torch.no_grad()
def test_changing_a_document_leaves_the_others_bit_identical(mixed):
    model, found = model_of(mixed, "conv"), documents(mixed)
    first = pack([found], sum(map(len, found)), mixed.control)
    before = model(first.to("cpu"))
    bounds = np.unique(first.cu_seqlens)
    for start, stop in pairwise(bounds.tolist()):
        batch = pack([found], sum(map(len, found)), mixed.control)
        for rows in batch.payload.values():
            rows["at"] = rows["at"].copy()
        batch.inputs[start:stop] = np.where(batch.inputs[start:stop] >= 0, 1, -1)
        after = model(batch.to("cpu"))
        assert torch.equal(after[:start], before[:start])
        assert torch.equal(after[stop:], before[stop:])
        assert not torch.equal(after[start:stop], before[start:stop])


@torch.no_grad()
def test_hidden_actions_reach_no_later_logit(mixed):
    model = model_of(mixed, "patch")
    outputs = []
    for actions in (0.5, -0.5):
        made = episode(TASKS[0], 0)
        acted = {"action": np.full((3, 3), actions, np.float32)}
        written = mixed.episode(Episode(**{**vars(made), "actions": acted}))
        hidden = written.steps.hide(written.actions)
        batch = pack([[written.head, hidden]], 200, mixed.control)
        outputs.append(model.logits(model(batch.to("cpu"))))
    assert torch.equal(*outputs)


def test_every_net_learns_from_a_mixed_batch(mixed):
    model = model_of(mixed, "conv").train()
    batch = pack([documents(mixed)], sum(map(len, documents(mixed))), mixed.control)
    model.loss(batch.to("cpu")).mean().backward()
    for name in batch.payload:
        for key, parameter in model.nets[name].named_parameters():
            assert parameter.grad is not None, (name, key)
            assert parameter.grad.abs().sum() > 0, (name, key)
