"""Made-up tasks of very different spaces, their episodes, and a tiny model that plays them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import numpy as np
import torch
from gymnasium import spaces

from gato.checkpoint import build_model
from gato.config import TrainConfig
from gato.envs.episode import ANY_TEXT, Episode, TaskSpec, flatten_space
from gato.model import GatoModel
from gato.model_config import ModelConfig
from gato.rollouts.policy import Policy
from gato.tokenizers.serializer import History, Serializer
from gato.tokenizers.spaces import CodecOptions
from gato.tokenizers.text import MODEL_FILE, train_text_model

WORDS = "go to the red ball open the blue door push a green key pick up the grey box".split()
MODEL = ModelConfig(
    layers=2, width=32, heads=2, head_dim=16, ffn_width=64, context=192, qk_norm=True
)


def _spec(name: str, observation: spaces.Space, action: spaces.Space, text: str = "") -> TaskSpec:
    return TaskSpec(f"made/{name}", observation, action, 50, 10.0, instruction=text)


SPECS = {
    s.id: s
    for s in (
        _spec(
            "arm",
            spaces.Box(-np.inf, np.inf, (7,), np.float32),
            spaces.Box(-2, 1, (3,), np.float32),
            "open the blue door",
        ),
        _spec(
            "grid",
            spaces.Dict(
                {
                    "grid": spaces.MultiDiscrete(np.full((3, 3, 3), 6)),
                    "mission": ANY_TEXT(),
                    "turned": spaces.Discrete(4),
                }
            ),
            spaces.Discrete(7, start=2),
        ),
        _spec(
            "game",
            spaces.Box(0, 255, (32, 48, 3), np.uint8),
            spaces.Tuple([spaces.Discrete(3000), spaces.Box(-1, 1, (2,), np.float32)]),
        ),
        _spec(
            "talk",
            spaces.MultiBinary(4),
            spaces.Dict({"say": ANY_TEXT(12), "then": spaces.MultiDiscrete([3, 2])}),
        ),
    )
}


@cache
def text_model() -> bytes:
    """Return a small text model."""
    rng = np.random.default_rng(0)
    lines = [" ".join(rng.choice(WORDS, 6)) for _ in range(300)]
    return train_text_model(lines, 300)


def make_serializer(history: History, observations: str = "vector") -> Serializer:
    """Return a serializer that knows the tasks, all with one history."""
    state = {"text": {MODEL_FILE: text_model()}}
    options = CodecOptions(observations=observations, vector_group=4, text_tokens=8)
    serializer = Serializer(options, state)
    for spec in SPECS.values():
        serializer.add_task(spec, history=history)
    return serializer


def make_model(
    serializer: Serializer, seed: int = 0, embedder: str = "patch", **sizes: object
) -> GatoModel:
    """Return a tiny model in which no weight is zero."""
    from dataclasses import replace

    torch.manual_seed(seed)
    config = TrainConfig(replace(MODEL, **sizes), embedders={"image": {"embedder": embedder}})
    model = build_model(config, serializer)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def observe(task: str, rng: np.random.Generator) -> object:
    """Return an observation of a task."""
    match task:
        case "made/arm":
            return rng.normal(size=7).astype(np.float32)
        case "made/grid":
            mission = " ".join(rng.choice(WORDS, int(rng.integers(2, 6))))
            grid = rng.integers(0, 6, (3, 3, 3))
            return {"grid": grid, "mission": mission, "turned": rng.integers(4)}
        case "made/game":
            return rng.integers(0, 256, (32, 48, 3), np.uint8)
    return rng.integers(0, 2, 4, np.int8)


def act(task: str, rng: np.random.Generator) -> dict[str, object]:
    """Return the leaves of an action of a task."""
    match task:
        case "made/arm":
            return {"action": rng.uniform(-2, 1, 3).astype(np.float32)}
        case "made/grid":
            return {"action": rng.integers(2, 9)}
        case "made/game":
            return {"000": rng.integers(3000), "001": rng.uniform(-1, 1, 2).astype(np.float32)}
    text = " ".join(rng.choice(["go", "up", "a"], int(rng.integers(0, 3))))
    return {"say": text, "then": rng.integers(0, [3, 2])}


def make_episode(task: str, steps: int, seed: int = 0) -> Episode:
    """Return an episode of random observations and actions."""
    from gato.envs.episode import flatten_value

    rng = np.random.default_rng(seed)
    spec = SPECS[task]
    seen = [
        flatten_value(spec.observation_space, observe(task, rng), "observation")
        for _ in range(steps + 1)
    ]
    done = [act(task, rng) for _ in range(steps)]

    def columns(space: spaces.Space, rows: list, name: str) -> dict:
        return {
            path: [r[path] for r in rows]
            if isinstance(leaf, spaces.Text)
            else np.array([r[path] for r in rows])
            for path, leaf in flatten_space(space, name).items()
        }

    flags = np.zeros(steps, bool)
    return Episode(
        task=task,
        observations=columns(spec.observation_space, seen, "observation"),
        actions=columns(spec.action_space, done, "action"),
        rewards=rng.uniform(-1, 2, steps).astype(np.float32),
        terminated=flags,
        truncated=flags,
        instruction=spec.instruction,
    )


def assert_same(a: object, b: object) -> None:
    """Compare two actions, nested or not."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, tuple):
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        np.testing.assert_array_equal(a, b)


class Neighbours:
    """Rows that play together, and each of them alone: shown the same, reset at the same time."""

    def __init__(
        self,
        serializer: Serializer,
        tasks: list[str],
        steps: int,
        temperature: float,
        resets: float,
    ) -> None:
        model, rng = make_model(serializer), np.random.default_rng(0)
        self.seen = [[observe(t, rng) for t in tasks] for _ in range(steps)]
        self.active = rng.random((steps, len(tasks))) < 0.8
        self.resets = rng.random((steps, len(tasks))) < resets
        self.kept = list(range(len(tasks)))
        self.together = Policy(model, serializer, tasks, temperature=temperature)
        self.alone = [
            Policy(model, serializer, [t], temperature=temperature, seeds=[i])
            for i, t in enumerate(tasks)
        ]

    def keep(self, rows: list[int]) -> None:
        """Go on with these rows only."""
        self.kept = rows
        self.together.keep(rows)

    def actions(self, step: int) -> Iterator[tuple[int, object, object]]:
        """Yield each row that is left, its action among the others and alone; None where idle."""
        kept = self.kept
        self.together.reset(self.resets[step][kept])
        seen = [self.seen[step][i] for i in kept]
        among = self.together.select_action(seen, self.active[step][kept])
        for action, i in zip(among, kept, strict=True):
            if self.resets[step, i]:
                self.alone[i].reset()
            acts = self.active[step, i]
            yield i, action, self.alone[i].select_action([seen[kept.index(i)]])[0] if acts else None
