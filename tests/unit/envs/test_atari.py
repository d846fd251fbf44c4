"""The Atari suite: what it says, what an episode follows from, and that its expert is worth it."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from gato.envs import atari, registry

BOXING = "atari/Boxing-v5"


def test_specs_are_plain_data():
    specs = {task_id: registry.spec(task_id) for task_id in registry.task_ids("atari/*")}
    assert len(specs) == 104
    assert sum(spec.human_score is not None for spec in specs.values()) == 57
    for task_id, spec in specs.items():
        assert task_id == spec.id
        assert spec.observation_space.shape == (atari.HEIGHT, atari.WIDTH, 3)
        assert spec.score_source or spec.human_score is None
    assert specs[BOXING].expert_score > specs[BOXING].human_score > specs[BOXING].random_score


def test_unknown_game_offers_the_closest():
    with pytest.raises(ValueError, match=r"atari/Boxing-v5"):
        registry.spec("atari/Boxin-v5")


@pytest.fixture(scope="module")
def boxing():
    pytest.importorskip("ale_py")
    return registry.make(BOXING)


def play(env, seed, steps, actions=None):
    """Return frames and rewards of `steps` random decisions."""
    rng = np.random.default_rng(seed if actions is None else actions)
    frame, _ = env.reset(seed=seed)
    frames, rewards = [frame], []
    for _ in range(steps):
        frame, reward, *_ = env.step(int(rng.integers(env.action_space.n)))
        frames.append(frame)
        rewards.append(reward)
    return np.array(frames), np.array(rewards)


def test_names_and_actions_are_those_of_ale():
    gym, ale_py = pytest.importorskip("gymnasium"), pytest.importorskip("ale_py")
    gym.register_envs(ale_py)
    theirs = {name.split("/")[1] for name in gym.registry if name.startswith("ALE/")}
    assert {name.split("/")[1] for name in atari.specs()} == theirs
    env = registry.make("atari/TicTacToe3D-v5")
    assert env.reset(seed=0)[0] in env.observation_space


def test_an_episode_follows_from_its_seed(boxing):
    first = play(boxing, 1, 120)
    other = play(boxing, 2, 120, actions=1)
    again = play(boxing, 1, 120)
    fresh = play(registry.make(BOXING), 1, 120)
    for one, two, three in zip(first, again, fresh, strict=True):
        assert np.array_equal(one, two)
        assert np.array_equal(one, three)
    assert not np.array_equal(first[0], other[0])  # same actions, other chance


def test_the_first_frame_follows_from_the_seed_also_without_idle_frames(boxing):
    seeds = (s for s in range(999) if np.random.default_rng(s).integers(31) == 0)
    for seed in (next(seeds), next(seeds)):
        fresh, _ = registry.make(BOXING).reset(seed=seed)
        play(boxing, 1, 60)
        again, _ = boxing.reset(seed=seed)
        assert np.array_equal(fresh, again)  # not the last frame of the episode before


def test_observations_fit_the_space_and_share_no_memory(boxing):
    frame, _ = boxing.reset(seed=0)
    kept = frame.copy()
    for action in range(boxing.action_space.n):
        new, reward, terminated, truncated, info = boxing.step(action)
        assert new in boxing.observation_space
        assert isinstance(reward, float)
        assert isinstance(terminated, bool)
        assert not truncated
        assert info["lives"] >= 0
    assert np.array_equal(frame, kept)
    assert boxing.render().shape == (210, 160, 3)


def test_a_process_ends_quietly_with_a_game_open():
    pytest.importorskip("ale_py")
    code = f"from gato.envs import registry; env = registry.make({BOXING!r}, seed=0); env.step(0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("action", [-1, 18, 1.5])
def test_foreign_action_is_refused(boxing, action):
    boxing.reset(seed=0)
    with pytest.raises(ValueError, match=r"expected an action in \[0, 18\), one of NOOP"):
        boxing.step(action)


def test_actions_stick_a_quarter_of_the_time(boxing):
    env = boxing.unwrapped
    env.reset(seed=0)
    right, left = env.action_names.index("RIGHT"), env.action_names.index("LEFT")
    kept = 0
    for i in range(400):
        before, wanted = env._last, left if i % 2 else right
        env.np_random, rng = np.random.default_rng(i), np.random.default_rng(i)
        stuck = rng.random(atari.FRAME_SKIP) < atari.STICKY
        env.step(wanted)
        assert env._last == (before if stuck.all() else env._actions[wanted])
        kept += int(stuck.sum())
    assert abs(kept / 1600 - atari.STICKY) < 0.04


def test_expert_outscores_a_person_and_its_state_is_in_the_frame(boxing):
    expert = registry.make_expert(BOXING)
    frame, _ = boxing.reset(seed=4)
    expert.reset(boxing, 4)
    score = 0.0
    for step in range(600):
        if step % 50 == 0:
            state = expert.state(boxing)
            assert all(0 < value < 1 for value in state.values())
            row = int(state["player_y"] * atari.HEIGHT)
            column = int(state["player_x"] * atari.WIDTH)
            near = frame[row - 2 : row + 3, column - 2 : column + 3]
            assert near.min(axis=-1).max() > 150  # the player is white
        frame, reward, terminated, *_ = boxing.step(expert.act(boxing, frame))
        score += reward
        if terminated:
            break
    assert score > 12.1  # a person's mean at the end of the whole game
