"""A suite without a simulator, and a tiny model that plays it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from language_records import LONGEST

from gato.checkpoint import build_model
from gato.config import TrainConfig
from gato.envs import registry
from gato.envs.episode import TaskSpec
from gato.model_config import ModelConfig
from gato.rollouts import questions
from gato.rollouts.agent import Agent
from gato.rollouts.generate import generate
from gato.tokenizers.serializer import History, Serializer
from gato.tokenizers.spaces import CodecOptions
from gato.tokenizers.text import MODEL_FILE

TINY = ModelConfig(layers=1, width=16, heads=2, head_dim=8, ffn_width=32, context=64, qk_norm=True)
SPECS = {
    s.id: s
    for s in (
        TaskSpec(
            "made/count-v0",
            spaces.Box(-np.inf, np.inf, (2,), np.float32),
            spaces.Discrete(3),
            9,
            1.0,
            measure="return",
            random_score=0.0,
            expert_score=10.0,
            human_score=5.0,
            expert="scripted",
        ),
        TaskSpec(
            "made/reach-v0",
            spaces.Discrete(5),
            spaces.Box(-1, 1, (2,), np.float32),
            6,
            1.0,
            measure="success",
            random_score=0.0,
            expert_score=1.0,
            expert="scripted",
        ),
        TaskSpec(
            "made/worse-v0",
            spaces.Discrete(5),
            spaces.Discrete(2),
            3,
            1.0,
            random_score=2.0,
            expert_score=2.0,
        ),
    )
}


class Made(gym.Env):
    """Lasts 3 to 8 steps by its seed; rewards its number of steps and succeeds at odd seeds."""

    def __init__(self, spec: TaskSpec) -> None:
        self.task = spec
        self.observation_space, self.action_space = spec.observation_space, spec.action_space

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict]:
        super().reset(seed=seed)
        self.seed_, self.left = seed, 3 + seed % 6
        return self._observe(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        assert self.action_space.contains(action), action
        self.left -= 1
        info = {"success": self.seed_ % 2 == 1} if self.task.measure == "success" else {}
        return self._observe(), 1.0, self.left == 0, False, info

    def _observe(self) -> Any:
        if isinstance(self.observation_space, spaces.Discrete):
            return np.int64(self.left % 5)
        return np.array([self.left, self.seed_ % 7], np.float32)


@pytest.fixture
def suite(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """Return the module of the made-up suite while it is registered."""
    module = ModuleType("gato.envs.made")
    module.SUITE, module.EXTRA, module.PACKAGES = "made", "made", ("numpy",)
    module.specs, module.make, module.expert = lambda: SPECS, Made, lambda spec, kind: None
    monkeypatch.setitem(sys.modules, "gato.envs.made", module)
    monkeypatch.setattr(registry, "SUITES", ("made",))
    yield module
    registry._suite.cache_clear()
    registry._specs.cache_clear()


@pytest.fixture
def agent(text_model: bytes) -> Agent:
    """Return an agent of random weights that knows the made-up tasks."""
    options = CodecOptions(observations="vector")
    serializer = Serializer(options, {"text": {MODEL_FILE: text_model}})
    for spec in SPECS.values():
        serializer.add_task(spec, history=History(window=2, hide_actions=spec.measure == "success"))
    torch.manual_seed(0)
    model = build_model(TrainConfig(TINY), serializer).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return Agent(
        SimpleNamespace(path="nowhere", model=model, serializer=serializer, data={}, averaged=False)
    )


@pytest.fixture
def reader(agent: Agent, monkeypatch: pytest.MonkeyPatch) -> Agent:
    """Return the tiny agent, which never ends a text by itself: its texts are cut short."""

    def cut(*args, max_tokens: int, **options) -> list[str]:
        assert max_tokens >= 64
        return generate(*args, max_tokens=LONGEST, **options)

    monkeypatch.setattr(questions, "generate", cut)
    return agent
