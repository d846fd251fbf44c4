"""A tiny random agent that is talked to over HTTP, and pictures to show it."""

from __future__ import annotations

import base64
import io
from types import SimpleNamespace

import numpy as np
import torch
from gymnasium import spaces
from PIL import Image

from gato.checkpoint import build_model
from gato.config import TrainConfig
from gato.corpora import CorpusConfig
from gato.envs.episode import ANY_TEXT, TaskSpec
from gato.model_config import ModelConfig
from gato.rollouts.agent import Agent
from gato.tokenizers.serializer import History, Serializer
from gato.tokenizers.spaces import CodecOptions
from gato.tokenizers.text import MODEL_FILE

TINY = ModelConfig(
    layers=2, width=32, heads=2, head_dim=16, ffn_width=64, context=128, qk_norm=True
)
ARM = TaskSpec(
    "made/arm-v0",
    spaces.Box(-np.inf, np.inf, (3,), np.float32),
    spaces.Box(-2, 1, (2,), np.float32),
    20,
    10.0,
    instruction="open the door",
)
ROOM = TaskSpec(
    "made/room-v0",
    spaces.Dict(
        {
            "camera": spaces.Box(0, 255, (32, 16, 3), np.uint8),
            "grid": spaces.MultiDiscrete([3, 4]),
            "mission": ANY_TEXT(40),
            "turned": spaces.Discrete(4),
        }
    ),
    spaces.Discrete(5),
    20,
    10.0,
)


def make_agent(text_model: bytes, contrast: float = 0.0) -> Agent:
    """Return an agent of random weights that knows two tasks, with the head or without."""
    serializer = Serializer(CodecOptions(observations="vector"), {"text": {MODEL_FILE: text_model}})
    for spec in (ARM, ROOM):
        serializer.add_task(spec, history=History(window=3, temperature=1.0))
    torch.manual_seed(0)
    matched = CorpusConfig("pictures", "nowhere", contrast=contrast)
    model = build_model(TrainConfig(TINY, corpora=(matched,)), serializer).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    known = {"path": "nowhere", "model": model, "serializer": serializer}
    return Agent(SimpleNamespace(**known, data={}, averaged=False))


def picture(seed: int, height: int = 32, width: int = 32) -> np.ndarray:
    """Return random pixels."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def uri(image: np.ndarray, form: str = "png") -> str:
    """Return a picture as a data URI."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, form)
    return f"data:image/{form};base64,{base64.b64encode(file.getvalue()).decode()}"
