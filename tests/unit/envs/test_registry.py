"""The registry lists tasks without a simulator and explains what it cannot do."""

from __future__ import annotations

import subprocess
import sys
from types import ModuleType

import gymnasium as gym
import numpy as np
import pytest

from gato.envs import registry
from gato.envs.episode import TaskSpec
from gato.envs.references import Reference

LISTED = [*registry.task_ids("metaworld/*"), *registry.task_ids("babyai/*")]


def test_ids_match_patterns() -> None:
    assert len(registry.task_ids("metaworld/*")) == 50
    assert "metaworld/reach-v3" in registry.task_ids("metaworld/reach*")
    assert "babyai/GoToRedBallGrey-v0" in registry.task_ids()
    assert registry.task_ids("nothing*") == []


@pytest.mark.parametrize("task_id", LISTED)
def test_specs_are_complete(task_id: str) -> None:
    spec = registry.spec(task_id)
    assert spec.id == task_id
    assert spec.max_steps > 0
    assert spec.measure == "success"
    assert TaskSpec.from_json(spec.to_json()).to_json() == spec.to_json()
    scores = (spec.random_score, spec.expert_score)
    assert (None in scores) == ("expert" not in spec.score_source)
    if None not in scores:
        assert 0 <= spec.random_score < spec.expert_score <= 1


def test_listing_imports_no_simulator() -> None:
    code = (
        "import sys, gato.envs.registry as r, gato.envs.collect\n"
        "import gymnasium; before = set(sys.modules)\n"  # its plugins may import simulators
        "[r.spec(t) for t in r.task_ids()]\n"
        "simulators = {'metaworld', 'mujoco', 'ale_py', 'dm_control', 'gymnasium_robotics'}\n"
        "assert not simulators & (set(sys.modules) - before)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_task_that_is_not_listed_has_its_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    row = Reference("gym/CartPole-v1", "random", "return", 22.0, 9.0, 20, 0, "", "", "made up")
    monkeypatch.setattr(registry, "references", lambda: {row.task: {"random": row}})
    assert registry.spec("gym/CartPole-v1").random_score == 22.0


def test_an_expert_is_refused_where_its_task_is() -> None:
    with pytest.raises(ValueError, match=r"Add camera=NAME"):
        registry.make_expert("metaworld/reach-v3?size=32x32")


def test_unknown_names_offer_the_closest() -> None:
    with pytest.raises(
        ValueError, match=r"got 'metaworld/reach-v2' \(closest: .*metaworld/reach-v3"
    ):
        registry.spec("metaworld/reach-v2")
    with pytest.raises(ValueError, match="suites: "):
        registry.make("zzz")
    with pytest.raises(ValueError, match=r"closest: .*gym/CartPole-v1"):
        registry.make("gym/CartPol-v1")


def test_a_missing_simulator_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "metaworld", None)
    monkeypatch.setitem(sys.modules, "metaworld.env_dict", None)
    monkeypatch.setitem(sys.modules, "metaworld.policies", None)
    for start in (registry.make, registry.make_expert):
        with pytest.raises(ValueError, match=r'pip install "gato\[metaworld\]"'):
            start("metaworld/reach-v3")


def test_tasks_without_an_expert_say_so() -> None:
    for task_id in ("gym/CartPole-v1", "babyai/KeyInBox-v0"):
        with pytest.raises(ValueError, match="has none"):
            registry.make_expert(task_id)


def test_any_gymnasium_environment_is_a_task() -> None:
    spec = registry.spec("gym/CartPole-v1")
    assert (spec.max_steps, spec.suite, spec.expert) == (500, "gym", "none")
    env = registry.make("gym/CartPole-v1", seed=3)
    assert env.render().shape == (400, 600, 3)
    assert env.observation_space == spec.observation_space
    first = env.unwrapped.state
    again = registry.make("gym/CartPole-v1", seed=3)
    np.testing.assert_array_equal(again.unwrapped.state, first)
    assert env.action_space.sample() == again.action_space.sample()


def test_an_environment_is_started_once_to_find_its_spec() -> None:
    class Simple(gym.Env):
        observation_space = gym.spaces.Discrete(2)
        action_space = gym.spaces.Discrete(2)
        started = 0
        metadata = {"render_modes": []}  # noqa: RUF012

        def __init__(self) -> None:
            Simple.started += 1

    try:
        for limit in (5, 6):  # registered anew, it is another task
            gym.register("Simple-v0", Simple, max_episode_steps=limit)
            assert [registry.spec("gym/Simple-v0").max_steps for _ in range(3)] == [limit] * 3
            del gym.registry["Simple-v0"]
        assert Simple.started == 2
    finally:
        gym.registry.pop("Simple-v0", None)


def test_unsupported_spaces_are_refused() -> None:
    class Odd(gym.Env):
        observation_space = gym.spaces.Sequence(gym.spaces.Discrete(2))
        action_space = gym.spaces.Discrete(2)

    gym.register("Odd-v0", Odd)
    try:
        with pytest.raises(TypeError, match="got Sequence"):
            registry.spec("gym/Odd-v0")
    finally:
        del gym.registry["Odd-v0"]


def test_make_limits_the_time(toy: ModuleType) -> None:
    env = registry.make("toy/walk-v0", seed=1)
    stay = {"go": np.zeros(2, np.float32), "say": 1}
    steps = [env.step(stay)[2:4] for _ in range(toy.SPEC.max_steps)]
    assert steps[-1] == (False, True)
    assert not any(any(s) for s in steps[:-1])
