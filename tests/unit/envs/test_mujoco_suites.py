"""The suites on MuJoCo: their data are what the simulators say, and a seed fixes an episode."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from gato.envs import dm_control, fetch, mujoco, registry
from gato.envs.episode import flatten_value

pytestmark = pytest.mark.sim

MUJOCO = registry.task_ids("mujoco/*")
FETCH = registry.task_ids("fetch/*")
DM_CONTROL = registry.task_ids("dm_control/*")


def test_all_tasks_are_there() -> None:
    assert (len(MUJOCO), len(FETCH), len(DM_CONTROL)) == (11, 4, 51)
    assert {spec.split("-")[0] for spec in dm_control.BODIES} == {
        task.split("-")[0] for task in dm_control.INSTRUCTIONS
    }
    for suite in (mujoco, fetch, dm_control):
        specs = suite.specs().values()
        assert all(spec.instruction and spec.instruction.isascii() for spec in specs)
        assert len({spec.instruction for spec in specs}) == len(specs)


@pytest.mark.parametrize("task_id", MUJOCO + FETCH)
def test_specs_are_those_of_gymnasium(task_id: str) -> None:
    spec, env = registry.spec(task_id), registry.make(task_id)
    base = env.unwrapped
    theirs = gym.spec(spec.id.split("/")[1])
    assert spec.max_steps == theirs.max_episode_steps
    assert spec.control_hz == pytest.approx(1 / base.dt)
    assert _shapes(spec.observation_space) == _shapes(base.observation_space)
    np.testing.assert_array_equal(spec.action_space.low, base.action_space.low)
    np.testing.assert_array_equal(spec.action_space.high, base.action_space.high)
    assert base.model.nq == base.data.qpos.size


@pytest.mark.parametrize("task_id", [t for t in DM_CONTROL if "dog-" not in t or "fetch" in t])
def test_specs_are_those_of_the_control_suite(task_id: str) -> None:
    spec, env = registry.spec(task_id), registry.make(task_id)
    base = env.unwrapped
    assert spec.control_hz == pytest.approx(1 / base.dm.control_timestep())
    shapes = {k: v.shape or (1,) for k, v in base.dm.observation_spec().items()}
    assert _shapes(spec.observation_space) == shapes
    action = base.dm.action_spec()
    if "lqr" not in task_id:
        np.testing.assert_allclose(spec.action_space.low, action.minimum)
        np.testing.assert_allclose(spec.action_space.high, action.maximum)
    assert spec.action_space.shape == action.shape
    assert base.model.nq == base.data.qpos.size == base.dm.physics.model.nq


def test_every_task_of_the_control_suite_is_listed() -> None:
    from dm_control import suite

    theirs = {f"dm_control/{domain}-{task}" for domain, task in suite.ALL_TASKS}
    assert theirs == set(DM_CONTROL)


CHOSEN = [
    "mujoco/Humanoid-v5",
    "mujoco/Hopper-v5",
    "fetch/FetchPickAndPlace-v4",
    "fetch/FetchSlide-v4",
    "dm_control/manipulator-insert_peg",
    "dm_control/quadruped-fetch",
    "dm_control/point_mass-hard",
    "dm_control/lqr-lqr_6_2",
]
"""Tasks that draw or keep the most between episodes; the sweep takes them all."""


@pytest.mark.parametrize("task_id", CHOSEN)
def test_a_seed_fixes_the_episode(task_id: str) -> None:
    """The same in a new environment, and in one that has played other episodes before."""
    fresh, used = registry.make(task_id), registry.make(task_id)
    _roll(used, 1, 15)
    used.reset()
    for seed in (5, 1 << 30):
        np.testing.assert_array_equal(_roll(fresh, seed, 8), _roll(used, seed, 8))
    assert (_roll(fresh, 5, 0) != _roll(fresh, 6, 0)).any()


@pytest.mark.parametrize("task_id", FETCH)
def test_fetch_succeeds_where_the_goal_is_held(task_id: str) -> None:
    env = registry.make(task_id)
    observation, info = env.reset(seed=3)
    assert info["success"] is False
    base = env.unwrapped
    base.goal = observation["achieved_goal"].astype(np.float64)
    _, reward, terminated, truncated, info = env.step(np.zeros(4, np.float32))
    assert (reward, terminated, truncated) == (0.0, False, False)
    assert info["success"] is True
    for _ in range(49):
        assert not truncated
        *_, terminated, truncated, info = env.step(np.array([1, 1, 1, 0], np.float32))
    assert truncated
    assert not terminated


def test_the_goal_of_fetch_is_drawn_where_it_is() -> None:
    import mujoco

    env = registry.make("fetch/FetchPush-v4")
    for seed in (1, 2):
        observation, _ = env.reset(seed=seed)
        base = env.unwrapped
        mujoco.mj_forward(base.model, base.data)
        drawn = base.data.site("target0").xpos
        np.testing.assert_allclose(drawn, observation["desired_goal"], atol=1e-6)


def test_falling_ends_a_walk_and_time_ends_a_swing() -> None:
    walk = registry.make("mujoco/Hopper-v5", seed=0)
    ends = [walk.step(np.ones(3, np.float32))[2:4] for _ in range(60)]
    assert (True, False) in ends
    swing = registry.make("dm_control/pendulum-swingup", seed=0)
    ends = [swing.step(np.zeros(1, np.float32))[2:4] for _ in range(1000)]
    assert ends[-1] == (False, True)
    assert not any(any(end) for end in ends[:-1])


def test_coming_to_rest_ends_the_linear_system() -> None:
    env = registry.make("dm_control/lqr-lqr_2_1", seed=0)
    with env.unwrapped.dm.physics.reset_context():
        env.unwrapped.data.qpos[:] = 0
    assert env.step(np.zeros(1, np.float32))[2:4] == (True, False)


def _shapes(space: gym.Space) -> Any:
    if isinstance(space, gym.spaces.Dict):
        return {key: part.shape for key, part in sorted(space.spaces.items())}
    return space.shape


def _roll(env: gym.Env, seed: int, steps: int) -> np.ndarray:
    """Return every number of a few random steps after a reset."""
    observation, _ = env.reset(seed=seed)
    space, rng = env.action_space, np.random.default_rng(seed)
    seen = []
    for _ in range(steps + 1):
        assert env.observation_space.contains(observation)
        leaves = flatten_value(env.observation_space, observation, "observation").values()
        seen += [np.ravel(leaf) for leaf in leaves]
        action = rng.uniform(space.low, space.high).astype(np.float32)
        observation, reward, terminated, truncated, _ = env.step(action)
        assert (type(reward), type(terminated), type(truncated)) == (float, bool, bool)
        seen.append(np.array([reward, terminated]))
    everything = np.concatenate(seen)
    assert np.isfinite(everything).all()
    return everything
