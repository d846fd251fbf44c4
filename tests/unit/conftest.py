"""Stores of a few made-up corpora, and a configuration that trains on all of them in seconds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from gymnasium import spaces

from gato.config import TrainConfig
from gato.corpora import CorpusConfig
from gato.envs.episode import ANY_TEXT, Episode, TaskSpec
from gato.envs.store import EpisodeWriter, RecordWriter
from gato.fitting import make_serializer
from gato.model_config import ModelConfig
from gato.optim import OptimConfig
from gato.tokenizers.spaces import CodecOptions
from gato.tokenizers.text import MODEL_FILE

ARM = TaskSpec(
    id="toy/arm-v0",
    observation_space=spaces.Box(-np.inf, np.inf, (5,), np.float32),
    action_space=spaces.Box(-1, 1, (2,), np.float32),
    max_steps=30,
    control_hz=10.0,
    instruction="go to the ball",
)
GRID = TaskSpec(
    id="toy/grid-v0",
    observation_space=spaces.Dict(
        {
            "camera": spaces.Box(0, 255, (16, 32, 3), np.uint8),
            "grid": spaces.MultiDiscrete(np.full((2, 2, 3), 6)),
            "note": ANY_TEXT(),
        }
    ),
    action_space=spaces.Discrete(4),
    max_steps=30,
    control_hz=10.0,
)
COLOURS = ("red", "green", "blue")


def arm_episode(seed: int) -> Episode:
    """Return an episode whose actions follow from what is observed."""
    rng = np.random.default_rng(seed)
    steps = int(rng.integers(3, 20))
    observation = rng.normal(size=(steps + 1, 5)).astype(np.float32)
    observation[:, 4] = seed * 100 + np.arange(steps + 1)  # says which step of which episode it is
    action = np.tanh(observation[:-1, :2] - observation[:-1, 2:4])
    return _episode(ARM, {"observation": observation}, {"action": action}, seed)


def grid_episode(seed: int) -> Episode:
    """Return an episode whose action is told by the camera's colour."""
    rng = np.random.default_rng(seed)
    steps = int(rng.integers(2, 9))
    wanted = rng.integers(4, size=steps + 1)
    camera = np.broadcast_to(
        (wanted * 60).astype(np.uint8)[:, None, None, None], (steps + 1, 16, 32, 3)
    )
    note = f"the {COLOURS[seed % 3]} door"
    observed = {
        "camera": camera.copy(),
        "grid": rng.integers(6, size=(steps + 1, 2, 2, 3)),
        "note": [note] * (steps + 1),
    }
    return _episode(GRID, observed, {"action": wanted[:-1]}, seed)


def _episode(task: TaskSpec, observed: dict, acted: dict, seed: int) -> Episode:
    steps = len(acted["action"])
    no = np.zeros(steps, bool)
    return Episode(
        task.id, observed, acted, np.zeros(steps, np.float32), no, no, None, task.instruction, seed
    )


@pytest.fixture(scope="session")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the stores arm, grid, words, pictures and talks."""
    root = tmp_path_factory.mktemp("stores")
    for name, spec, make in (("arm", ARM, arm_episode), ("grid", GRID, grid_episode)):
        with EpisodeWriter(root / name, spec, shard_steps=50) as writer:
            for seed in range(20):
                writer.append(make(seed))
    rng = np.random.default_rng(0)
    with RecordWriter(root / "words", "words") as words:
        for i in range(40):
            line = " ".join(rng.choice([*COLOURS, "ball", "box", "the"], 6))
            words.append({"kind": "document", "text": f"{line} {i}. " * (30 if i == 0 else 1)})
    with RecordWriter(root / "pictures", "pictures") as pictures:
        for i in range(30):
            image = np.full((16, 32, 3), 20, np.uint8)
            image[..., i % 3] = 200
            pictures.append({"kind": "caption", "image": image, "text": f"a {COLOURS[i % 3]} box"})
    with RecordWriter(root / "talks", "talks") as talks:
        for i in range(30):
            ask = {"type": "text", "text": f"what is after {COLOURS[i % 3]}?"}
            answer = {"type": "text", "text": COLOURS[(i + 1) % 3]}
            talks.append(
                {
                    "kind": "conversation",
                    "messages": [
                        {"role": "user", "content": [ask]},
                        {"role": "assistant", "content": [answer]},
                    ],
                }
            )
    return root


@pytest.fixture
def tiny(stores: Path) -> TrainConfig:
    """Return a configuration that mixes all stores in a model of a few thousand weights."""
    return TrainConfig(
        model=ModelConfig(layers=2, width=32, heads=2, head_dim=16, ffn_width=64, context=96),
        codec=CodecOptions(observations="vector", vector_group=5),
        optim=OptimConfig(lr=1e-2, warmup=5),
        corpora=(
            CorpusConfig("arm", str(stores / "arm"), 3.0, window=4, hide_actions=0.5),
            CorpusConfig("grid", str(stores / "grid"), 2.0, window=2),
            CorpusConfig("words", str(stores / "words"), 1.0),
            CorpusConfig("pictures", str(stores / "pictures"), 1.0),
            CorpusConfig("talks", str(stores / "talks"), 1.0),
        ),
        embedders={"image": {"embedder": "conv"}},
        text_pieces=300,
        rows=4,
        steps=20,
        seed=3,
        log_every=1,
        save_every=5,
    )


@pytest.fixture
def tiny_text_model(tiny: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Return the text model of runs of the tiny configuration, trained once."""
    path = tmp_path_factory.getbasetemp() / "tiny-text.model"
    if not path.exists():
        path.write_bytes(make_serializer(tiny).state()["text"][MODEL_FILE])
    return path.read_bytes()
