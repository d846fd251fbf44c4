"""The look-ahead planner on MuJoCo: it foresees exactly what happens, and that is worth something.

The slow twins are the simulators: their own step, and their own reward at the state it leads to.
"""

import numpy as np
import pytest

from gato.envs import registry
from gato.envs.experts.dm_control_rewards import PLANS, REWARDS
from gato.envs.experts.mujoco_planner import MujocoPlanner, Plan
from gato.envs.experts.mujoco_rollouts import Rollouts, Simulator, physics_state
from gato.envs.graphics import load_mujoco

pytestmark = pytest.mark.sim
mujoco = load_mujoco()

STEPS = 25
QUICK = Plan(REWARDS["cartpole-swingup"], samples=6, horizon=20, replan=4)


def start(name, seed=0, plan=QUICK):
    task_id = f"dm_control/{name}"
    env = registry.make(task_id)
    observation, _ = env.reset(seed=seed)
    planner = MujocoPlanner(registry.spec(task_id), plan)
    planner.reset(env, seed)
    return env, planner, observation


def state_of(env):
    return physics_state(env.unwrapped.model, env.unwrapped.data)


def play(name, seed=0, steps=STEPS, plan=QUICK):
    env, planner, observation = start(name, seed, plan)
    actions = []
    for _ in range(steps):
        actions.append(planner.act(env, observation))
        observation, *_ = env.step(actions[-1])
    env.close()
    return np.array(actions)


@pytest.mark.parametrize("name", sorted(REWARDS))
def test_futures_and_rewards_are_those_of_the_environment(name):
    env = registry.make(f"dm_control/{name}", seed=3)
    world, space = env.unwrapped, env.action_space
    for _ in range(3):  # so that the solver's first guess is not that of a fresh start
        env.step(space.sample())
    actions = np.stack([[space.sample() for _ in range(STEPS)] for _ in range(3)])
    futures = Simulator(world.model, world.frame_skip).rollouts(
        state_of(env), world.data.qacc_warmstart, actions
    )
    values = REWARDS[name](futures)
    assert values.shape == (3, STEPS)
    for step, action in enumerate(actions[1]):
        reward = env.step(action)[1]
        np.testing.assert_array_equal(futures.states[1, step], state_of(env))
        assert values[1, step] == pytest.approx(reward, abs=1e-9)
    env.close()


@pytest.mark.parametrize("name", ["ball_in_cup-catch", "finger-turn_easy", "reacher-easy"])
def test_rewards_of_tasks_that_pay_seldom_are_right_where_they_pay(name):
    # random actions seldom see both values, so many starts are looked at
    seen, env = set(), registry.make(f"dm_control/{name}")
    world, rng = env.unwrapped, np.random.default_rng(0)
    for seed in range(40):
        env.reset(seed=seed)
        if name == "ball_in_cup-catch":  # the ball near the middle of the cup
            world.data.qpos[3] = 0.35 + rng.uniform(-0.04, 0.04)
            world.data.qpos[2] = rng.uniform(-0.04, 0.04)
            mujoco.mj_forward(world.model, world.data)
        action = env.action_space.sample()
        now = Simulator(world.model, world.frame_skip).rollouts(
            state_of(env), world.data.qacc_warmstart, action[None, None]
        )
        reward = env.step(action)[1]
        assert REWARDS[name](now)[0, 0] == pytest.approx(reward, abs=1e-9)
        seen.add(reward > 0.5)
    env.close()
    assert seen == {False, True}


def test_frames_of_bodies_are_those_of_mujoco():
    model = mujoco.MjModel.from_xml_string("""
      <mujoco><worldbody><body name="root" pos="1 2 3"><freejoint/><geom size=".1"/>
        <body name="arm" pos=".1 .2 .3" euler="10 20 30"><joint axis="1 2 3" pos=".1 0 .2"/>
          <joint type="slide" axis="0 1 1" ref=".3"/><geom name="g" pos=".3 0 .1" size=".1"/>
          <body name="hand" pos=".5 0 0"><joint type="ball" pos="0 .1 0"/>
            <geom size=".1" pos=".2 .2 0"/><site name="s" pos="0 0 .4"/></body></body></body>
      </worldbody></mujoco>""")
    data, rng = mujoco.MjData(model), np.random.default_rng(0)
    states = np.zeros((4, 5, 1 + model.nq + model.nv))
    states[..., 1 : 1 + model.nq] = rng.normal(size=(4, 5, model.nq))
    run = Rollouts(model, np.zeros((4, 5, 0)), states, np.zeros((4, 5, 0)))
    data.qpos[:] = run.qpos[2, 3]
    mujoco.mj_kinematics(model, data)
    expected = {
        ("hand", "body"): data.body("hand").xpos,
        ("hand", "inertia"): data.body("hand").xipos,
        ("g", "geom"): data.geom("g").xpos,
        ("s", "site"): data.site("s").xpos,
    }
    for part, position in expected.items():
        np.testing.assert_allclose(run.position(*part)[:, 2, 3], position, atol=1e-12)
    assert run.upright("hand")[2, 3] == pytest.approx(data.body("hand").xmat[8], abs=1e-12)


def test_every_step_of_an_undisturbed_episode_was_foreseen():
    env, planner, observation = start("walker-walk", plan=Plan(REWARDS["walker-walk"], 3, 6, 3))
    for _ in range(9):
        observation, *_ = env.step(planner.act(env, observation))
        np.testing.assert_array_equal(planner.predicted, state_of(env))
    env.close()


def test_a_disturbed_plan_is_mended_at_once_and_an_undisturbed_one_is_kept(monkeypatch):
    searched = []
    search = MujocoPlanner._search

    def watched(self, state, warmstart, rounds):
        searched.append((step, rounds))
        search(self, state, warmstart, rounds)

    monkeypatch.setattr(MujocoPlanner, "_search", watched)
    plan = Plan(REWARDS["cartpole-swingup"], samples=6, horizon=20, replan=5, rounds=2)
    env, planner, observation = start("cartpole-swingup", plan=plan)
    for step in range(12):
        action = planner.act(env, observation)
        observation, *_ = env.step(action if step != 6 else -np.sign(action) * np.float32(0.5))
    env.close()
    assert searched == [(0, 2), (5, 2), (7, 1), (10, 2)]


def test_actions_follow_from_the_seed():
    first = play("cartpole-swingup", seed=7)
    np.testing.assert_array_equal(first, play("cartpole-swingup", seed=7))
    assert first.dtype == np.float32
    env, planner, observation = start("cartpole-swingup", seed=7)
    planner.reset(env, 8)
    assert (planner.act(env, observation) != first[0]).any()
    env.close()


def test_a_plan_is_at_least_as_long_as_what_is_executed_of_it():
    with pytest.raises(ValueError, match="between 1 and all 5 steps of a plan; got replan = 6"):
        Plan(REWARDS["cartpole-swingup"], samples=6, horizon=5, replan=6)


def test_a_future_that_is_not_a_number_is_never_chosen():
    def value(run):
        return np.where(run.control[..., 0] > 0, np.nan, -run.control[..., 0])

    actions = play("cartpole-swingup", steps=8, plan=Plan(value, samples=30, horizon=4, knots=2))
    assert (actions <= 0).all()
    assert actions.min() < 0


def test_threads_change_nothing():
    env, planner, observation = start("cartpole-swingup")
    threaded = MujocoPlanner(registry.spec("dm_control/cartpole-swingup"), QUICK, threads=2)
    threaded.reset(env, 0)
    np.testing.assert_array_equal(threaded.act(env, observation), planner.act(env, observation))
    env.close()


@pytest.mark.parametrize(
    ("name", "steps", "least"), [("reacher-easy", 150, 90), ("pendulum-swingup", 150, 70)]
)
def test_planning_beats_chance_by_far(name, steps, least):
    env, planner, observation = start(name, seed=1, plan=PLANS[name])
    rewards = []
    for _ in range(steps):
        observation, reward, *_ = env.step(planner.act(env, observation))
        rewards.append(reward)
    env.action_space.seed(0)
    env.reset(seed=1)
    chance = sum(env.step(env.action_space.sample())[1] for _ in range(steps))
    env.close()
    assert sum(rewards) >= least > 2 * chance


def test_every_planned_task_has_a_planner_that_says_what_it_spends():
    planned = [t for t in registry.task_ids("dm_control/*") if registry.spec(t).expert == "planner"]
    assert planned == sorted(f"dm_control/{name}" for name in PLANS)
    assert registry.make_expert("dm_control/pendulum-swingup").settings == (
        "planner: 64 samples x 60 steps, replans every 5"
    )
    with pytest.raises(ValueError, match="expected an expert of 'dm_control/lqr-lqr_2_1'"):
        registry.make_expert("dm_control/lqr-lqr_2_1", "planner")
