"""The Atari experts that look ahead: they leave the episode alone, follow a seed, and are good."""

from __future__ import annotations

import numpy as np
import pytest

from gato.envs import registry
from gato.envs.experts.ale_planner import AlePlanner
from gato.envs.experts.atari_look_ahead import BreakoutExpert

pytest.importorskip("ale_py")

SEED = 3


def play(task_id, expert, steps, actions=None):
    """Return what an episode of `steps` decisions looks like, and its actions."""
    env = registry.make(task_id)
    observation, _ = env.reset(seed=SEED)
    if actions is None:
        expert.reset(env, SEED)
    seen, taken, rewards = [], [], []
    for t in range(steps):
        action = expert.act(env, observation) if actions is None else actions[t]
        observation, reward, terminated, _, info = env.step(action)
        game = env.unwrapped
        chance = str(game.np_random.bit_generator.state)
        seen.append((observation.tobytes(), game.render().tobytes(), game.ram().tobytes(), chance))
        seen.append((reward, terminated, info["lives"], game.ale.getEpisodeFrameNumber()))
        taken.append(action)
        rewards.append(reward)
    env.close()
    return seen, taken, sum(rewards)


@pytest.mark.parametrize(
    ("game", "kind", "steps"),
    [
        ("Pong", "scripted", 34),
        ("Breakout", "scripted", 40),
        ("Freeway", "scripted", 24),
        ("Pong", "planner", 12),
        ("Assault", "planner", 12),
        ("TicTacToe3D", "planner", 60),  # draws only parts of its picture
    ],
)
def test_looking_ahead_leaves_the_episode_alone_and_follows_the_seed(game, kind, steps):
    task_id = f"atari/{game}-v5"
    planned, actions, _ = play(task_id, registry.make_expert(task_id, kind), steps)
    again, same, _ = play(task_id, registry.make_expert(task_id, kind), steps)
    replayed, _, _ = play(task_id, None, steps, actions)
    assert actions == same
    assert planned == again
    assert planned == replayed
    assert len(set(actions)) > 1


def test_imagined_decisions_stick_by_the_generator_that_is_given():
    env = registry.make("atari/Boxing-v5", seed=SEED).unwrapped
    before, root = env.np_random.bit_generator.state, env.snapshot()
    stuck = np.random.default_rng(7).random(4) < 0.25
    env.imagine(5, np.random.default_rng(7))
    assert env._last == env._actions[5]
    assert not stuck.all()
    assert env.np_random.bit_generator.state == before
    moved = env.ram()
    env.restore(root)
    assert env._last == env._actions[0]
    assert not np.array_equal(env.ram(), moved)
    env.close()


@pytest.mark.parametrize(
    ("game", "steps", "least"), [("Breakout", 220, 5), ("Freeway", 100, 1), ("Pong", 220, 0)]
)
def test_scripted_expert_beats_random_early(game, steps, least):
    task_id = f"atari/{game}-v5"
    rng = np.random.default_rng(0)
    actions = rng.integers(registry.spec(task_id).action_space.n, size=steps).tolist()
    score = play(task_id, registry.make_expert(task_id), steps)[2]
    assert score >= least > play(task_id, None, steps, actions)[2]


@pytest.mark.parametrize(("score", "action"), [((8, 0x63), "LEFT"), ((8, 0x64), "RIGHT")])
def test_breakout_ends_once_nothing_is_left_to_win(score, action):
    before = np.zeros(128, np.uint8)
    before[[99, 101, 72]] = 80, 150, 120  # the ball comes down to the left of the paddle
    now = before.copy()
    now[[99, 101]] = 82, 154
    now[[76, 77]] = score
    assert BreakoutExpert().rule(before, now, 0, 0) == action


def test_planner_beats_random():
    task_id, steps = "atari/Assault-v5", 200
    spec = registry.spec(task_id)
    actions = np.random.default_rng(0).integers(spec.action_space.n, size=steps).tolist()
    score = play(task_id, AlePlanner(spec, frames=60), steps)[2]
    assert score > 1.5 * play(task_id, None, steps, actions)[2]


def test_kinds_are_refused_and_settings_named():
    with pytest.raises(ValueError, match=r"Tetris-v5' that is planner; got 'scripted'"):
        registry.make_expert("atari/Tetris-v5", "scripted")
    with pytest.raises(ValueError, match=r"scripted, planner or .*; got 'guess'"):
        registry.make_expert("atari/Pong-v5", "guess")
    assert registry.spec("atari/Tetris-v5").expert == "planner"
    settings = registry.make_expert("atari/Tetris-v5").settings
    assert settings == "planner: 200 simulator frames per decision"
    with pytest.raises(ValueError, match="at least 20 frames per decision"):
        AlePlanner(registry.spec("atari/Pong-v5"), frames=3)
