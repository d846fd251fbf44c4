"""Real simulators: spaces, determinism, experts."""

from __future__ import annotations

import importlib.metadata
from typing import Any

import numpy as np
import pytest

from gato.envs import registry
from gato.envs.episode import EVALUATION_SEED_START, flatten_value
from gato.envs.play import play
from gato.envs.score import score

pytestmark = pytest.mark.sim

METAWORLD = [
    "metaworld/reach-v3",
    "metaworld/button-press-topdown-v3",
    "metaworld/drawer-open-v3",
    "metaworld/door-open-v3",
    "metaworld/push-v3",
    "metaworld/lever-pull-v3",
    "metaworld/pick-place-wall-v3",
]
BABYAI = [
    "babyai/GoToRedBallGrey-v0",
    "babyai/GoToLocal-v0",
    "babyai/GoToRedBallNoDists-v0",
    "babyai/PutNextLocal-v0",
]


@pytest.fixture(autouse=True)
def _simulator(request: pytest.FixtureRequest) -> None:
    task_id = request.node.callspec.params.get("task_id", "metaworld/") + "/"
    pytest.importorskip("metaworld" if task_id.startswith("metaworld") else "minigrid")


def roll(env: Any, seed: int, steps: int) -> list[np.ndarray]:
    """Return all numbers of a few random steps after a reset."""
    observation, info = env.reset(seed=seed)
    assert info["success"] is False
    actions = np.random.default_rng(seed)
    out = []
    for _ in range(steps):
        assert env.observation_space.contains(observation)
        flat = flatten_value(env.observation_space, observation, "observation")
        out += [np.array(leaf) for leaf in flat.values()]
        low, high = (-1, 1) if env.action_space.shape else (0, 6)
        action = actions.uniform(low, high, env.action_space.shape).astype(env.action_space.dtype)
        observation, reward, terminated, truncated, info = env.step(action)
        assert isinstance(info["success"], bool)
        assert isinstance(reward, float)
        out.append(np.array([reward, terminated, truncated]))
        if terminated or truncated:
            break
    return out


@pytest.mark.parametrize("task_id", METAWORLD + BABYAI)
def test_a_seed_fixes_the_episode(task_id: str) -> None:
    """The same in a new environment, and in one that has played other episodes before."""
    fresh, used = registry.make(task_id), registry.make(task_id)
    roll(used, 1, 30)
    used.reset()
    for seed in (5, EVALUATION_SEED_START):
        for a, b in zip(roll(fresh, seed, 6), roll(used, seed, 6), strict=True):
            np.testing.assert_array_equal(a, b)
    first, second = roll(fresh, 5, 1), roll(fresh, 6, 1)
    assert any((a != b).any() for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("task_id", METAWORLD[:5] + BABYAI)
def test_the_expert_succeeds(task_id: str) -> None:
    spec = registry.spec(task_id)
    env, expert = registry.make(task_id), registry.make_expert(task_id)
    successes = 0
    for seed in range(4):
        episode = play(env, expert, spec, seed, noise=0.1)
        assert len(episode) <= spec.max_steps
        assert episode.terminated[-1] == episode.success
        successes += episode.success
    assert successes >= 3


@pytest.mark.parametrize("task_id", METAWORLD[:5])
def test_the_goal_is_seen(task_id: str) -> None:
    env = registry.make(task_id)
    observation, _ = env.reset(seed=3)
    np.testing.assert_allclose(observation[-3:], env.unwrapped._target_pos, atol=1e-6)
    np.testing.assert_array_equal(observation[:18], observation[18:36])
    later = env.step(env.action_space.sample())[0]
    np.testing.assert_allclose(later[-3:], observation[-3:], atol=1e-6)


@pytest.mark.parametrize("task_id", ["babyai/GoToLocal-v0"])
def test_missions_are_text_and_nothing_is_printed(
    task_id: str, capsys: pytest.CaptureFixture[str]
) -> None:
    env = registry.make(task_id)
    missions = {env.reset(seed=s)[0]["mission"] for s in range(40)}
    assert len(missions) > 10
    assert all(m.startswith("go to ") for m in missions)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("task_id", ["babyai/SynthS5R2-v0"])
def test_a_grid_without_room_for_the_agent_is_drawn_anew(task_id: str) -> None:
    env = registry.make(task_id)
    observation, _ = env.reset(seed=(1 << 30) + 7)  # left alone, this never returns
    assert observation["mission"]


@pytest.mark.parametrize("task_id", ["babyai/GoToImpUnlock-v0", "babyai/PickupDist-v0"])
def test_noise_never_stops_the_bot(task_id: str) -> None:
    spec = registry.spec(task_id)
    env, expert = registry.make(task_id), registry.make_expert(task_id)
    for seed in range(4):
        play(env, expert, spec, seed, noise=0.5)


@pytest.mark.parametrize("task_id", ["metaworld/reach-v3", "babyai/GoToLocal-v0"])
def test_recorded_scores_hold(task_id: str) -> None:
    spec = registry.spec(task_id)
    got = score(task_id, 10)["success_rate"]
    assert abs(got - spec.expert_score) <= 0.2
    package = registry.packages(spec.suite)[0]
    assert f"{package} {importlib.metadata.version(package)}" in spec.score_source
