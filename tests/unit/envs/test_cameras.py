"""Pictures as observations: options in task ids, what is drawn, and machines that cannot draw."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gato.envs import cameras, graphics, registry
from gato.envs.cameras import View
from gato.envs.play import play
from gato.world_commands import matching

PUSH = "metaworld/push-v3?camera=corner2&size=32x24"


def test_options_are_read_from_the_id() -> None:
    assert cameras.split(PUSH) == ("metaworld/push-v3", "camera=corner2&size=32x24")
    assert cameras.view("camera=corner2&size=80x64", PUSH) == View(("corner2",), 80, 64)
    assert cameras.view("state=no&camera=a,b", PUSH) == View(("a", "b"), state=False)
    spec = registry.spec(PUSH)
    assert spec.id == PUSH
    assert {k: s.shape for k, s in spec.observation_space.items()} == {
        "image": (24, 32, 3),
        "state": (39,),
    }
    plain = registry.spec("metaworld/push-v3")
    assert (spec.measure, spec.expert_score, spec.expert) == (
        "success",
        plain.expert_score,
        "scripted",
    )
    assert PUSH not in registry.task_ids()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("camera=corner2&sise=80x64", r"got 'sise' \(closest: size\)"),
        ("camera=corner2&zoom=2", r"got 'zoom' \(known: camera, size, state\)"),
        ("size=80x64", r"Add camera=NAME"),
        ("camera=corner2&size=80", r"size=WIDTHxHEIGHT, each from 16 to 1024.*got '80'"),
        ("camera=corner2&size=80x4", r"each from 16 to 1024"),
        ("camera=corner2&state=maybe", r"state=yes or state=no.*got 'maybe'"),
        ("camera=a,a", r"different cameras"),
        ("camera=", r"one value for 'camera'"),
        ("camera=a&camera=b", r"one value for 'camera'"),
    ],
)
def test_options_that_cannot_be_are_refused(options: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        registry.spec(f"metaworld/push-v3?{options}")


def test_suites_without_cameras_say_so() -> None:
    for task_id in ("atari/Pong-v5?size=80x64", "gym/CartPole-v1?camera=free"):
        with pytest.raises(ValueError, match=r"no cameras. Those of babyai, .*mujoco have"):
            registry.spec(task_id)


def test_patterns_leave_options_alone() -> None:
    ids = matching(["metaworld/p*?camera=corner2&size=32x24"])
    assert PUSH in ids
    assert all(i.endswith("-v3?camera=corner2&size=32x24") for i in ids)
    assert matching([PUSH]) == [PUSH]
    assert matching(["babyai/GoToObj-v?"]) == ["babyai/GoToObj-v0"]
    known = [PUSH, "metaworld/push-v3", "babyai/GoTo-v0"]
    assert matching(["metaworld/*"], known) == known[:2]
    assert matching(["*?camera=corner2&size=32x24"], known) == [PUSH]
    with pytest.raises(ValueError, match="matches none"):
        matching(["metaworld/*?camera=corner3"], known)
    with pytest.raises(ValueError, match="closest: "):
        matching(["metaworld/pash-v3?camera=corner2"])


def test_folders_have_plain_names() -> None:
    assert registry.folder_of(PUSH) == "metaworld/push-v3,camera-corner2,size-32x24"
    assert registry.folder_of("gym/my.worlds:Walk-v0") == "gym/my.worlds.Walk-v0"
    assert registry.folder_of("babyai/GoTo-v0") == "babyai/GoTo-v0"


@pytest.mark.sim
@pytest.mark.parametrize(
    "task_id",
    [
        PUSH,
        "mujoco/Pusher-v5?camera=free&size=40x24",
        "fetch/FetchReach-v4?camera=external_camera_0,free&size=32x16",
        "dm_control/quadruped-escape?camera=0&size=32x32&state=no",
        "babyai/GoToLocal-v0?camera=grid,agent&size=40x48&state=no",
    ],
)
def test_pictures_follow_the_episode_and_never_change_it(task_id: str) -> None:
    base_id, _ = cameras.split(task_id)
    plain, seen, again = registry.make(base_id), registry.make(task_id), registry.make(task_id)
    again.reset(seed=9)
    space = seen.observation_space
    rng = np.random.default_rng(0)
    for env in (plain, seen, again):
        first, _ = env.reset(seed=3)
    kept = []
    for _ in range(4):
        if plain.action_space.shape:
            action = rng.uniform(plain.action_space.low, plain.action_space.high).astype("f")
        else:
            action = int(rng.integers(3))
        observations = [env.step(action)[0] for env in (plain, seen, again)]
        assert space.contains(observations[1])
        _assert_same(observations[0], seen.get_wrapper_attr("base_observation"))
        _assert_same(observations[1], observations[2])
        kept.append({k: np.array(v) for k, v in observations[1].items()})
        last = observations[1]
    for key in space:
        if key.startswith("image"):
            assert last[key].std() > 3  # something is seen
            assert (last[key] != first[key]).any()  # and it moves
            assert last[key].flags.c_contiguous
    assert kept[-1].keys() == space.keys()
    _assert_same(kept[-1], last)
    for env in (plain, seen, again):
        env.close()


def _assert_same(a: object, b: object) -> None:
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])
    else:
        np.testing.assert_array_equal(a, b)


@pytest.mark.sim
def test_unknown_cameras_are_named_with_those_there_are() -> None:
    with pytest.raises(ValueError, match=r"track, free.*below 1; got camera='side'"):
        registry.make("mujoco/Ant-v5?camera=side")
    with pytest.raises(ValueError, match=r"below 2; got camera='2'"):
        registry.make("dm_control/cartpole-swingup?camera=2")
    with pytest.raises(ValueError, match=r"camera=grid or camera=agent; got \['top'\]"):
        registry.make("babyai/GoTo-v0?camera=top")


@pytest.mark.sim
def test_experts_play_tasks_with_pictures() -> None:
    for task_id in (
        "metaworld/reach-v3?camera=corner2&size=16x16&state=no",
        "babyai/GoToLocal-v0?camera=agent&size=16x16&state=no",
    ):
        spec, expert = registry.spec(task_id), registry.make_expert(task_id)
        episode = play(registry.make(task_id), expert, spec, 0, noise=0.0)
        assert episode.success
        assert episode.observations["image"].shape == (len(episode) + 1, 16, 16, 3)


@pytest.mark.sim
def test_cameras_that_hang_upside_down_are_turned() -> None:
    """The floor of Meta-World's room is grey and light; the table's legs stand below its top."""
    env = registry.make("metaworld/push-v3?camera=corner4&size=64x64", seed=0)
    arm = np.array([0.6, 0.1, 0.1])  # Sawyer is red, and its hand hangs from above
    picture = env.reset(seed=0)[0]["image"] / 255.0
    red = np.abs(picture - arm).sum(-1) < 0.5
    assert red[:40].sum() > red[40:].sum()


@pytest.mark.sim
@pytest.mark.parametrize(
    "task_id",
    ["metaworld/push-v3", "mujoco/Ant-v5", "fetch/FetchPush-v4", "dm_control/quadruped-escape"],
)
def test_render_shows_what_is_there(task_id: str) -> None:
    """Not what was there before, which is what is drawn where the ground is not loaded anew."""
    env, fresh = registry.make(task_id, seed=0), registry.make(task_id, seed=1)
    first = env.render().copy()
    assert first.shape == (240, 320, 3)
    env.reset(seed=1)
    assert (env.render() != first).any()
    np.testing.assert_array_equal(env.render(), fresh.render())
    env.close()
    fresh.close()


def _python(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {
        k: v for k, v in os.environ.items() if k not in ("DISPLAY", "MUJOCO_GL", "WAYLAND_DISPLAY")
    }
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=kept | environment,
        capture_output=True,
        text=True,
    )


@pytest.mark.sim
def test_nothing_is_said_without_a_screen() -> None:
    """Imports, pictures, and what is still open at the end."""
    code = (
        "from gato.envs import registry as r\n"
        "a = r.make('metaworld/reach-v3?camera=corner2&size=16x16', seed=0)\n"
        "b = r.make('dm_control/cartpole-swingup?camera=0&size=16x16', seed=0)\n"
        "c = r.make('fetch/FetchReach-v4', seed=0)\n"
        "r.make('mujoco/Ant-v5', seed=0).close()\n"
    )
    ran = _python(code)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")


DRAW = (
    "import sys\n"
    "from gato.envs import graphics, registry\n"
    "try:\n"
    "    registry.make('mujoco/InvertedPendulum-v5{}', seed=0)\n"
    "except ValueError as error:\n"
    "    print(error)\n"
)


@pytest.mark.sim
def test_a_machine_that_cannot_draw_says_what_was_tried(tmp_path: Path) -> None:
    """Without any backend, tasks without pictures go on; pictures name what to install."""
    broken = tmp_path / "OpenGL"  # in place of the real one, on which all backends stand
    broken.mkdir()
    (broken / "__init__.py").write_text("raise ImportError('no libEGL here')")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    assert _python(DRAW.format(""), PYTHONPATH=path).stdout == ""
    told = _python(DRAW.format("?camera=free"), PYTHONPATH=path).stdout
    assert "MUJOCO_GL=disable: nothing is drawn" in told
    for backend in graphics.BACKENDS:
        assert f"{backend}: ImportError: no libEGL here" in told
    assert "apt install libegl1" in told
    assert "apt install libosmesa6" in told


def test_a_backend_that_hangs_does_not_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphics, "_TRY", "import time; time.sleep(30)")
    monkeypatch.setattr(graphics, "TRY_SECONDS", 0.2)
    assert graphics.fault.__wrapped__("egl") == "it did not draw within 0.2 s"


@pytest.mark.sim
@pytest.mark.parametrize("value", ["nonsense", "glfw", "disable"])
def test_a_wrong_setting_names_one_that_works(value: str) -> None:
    """It says so where something is drawn, in one sentence, and without last words of objects."""
    ran = _python(DRAW.format("?camera=free"), MUJOCO_GL=value)
    told = ran.stdout
    assert told.startswith("expected a backend of MuJoCo that can draw; got ")
    assert f"MUJOCO_GL={value}: " in told
    assert ("which works here" in told) == any(graphics.fault(b) is None for b in graphics.BACKENDS)
    assert ran.stderr == ""


@pytest.mark.sim
@pytest.mark.parametrize("value", ["nonsense", "glfw", "disable"])
def test_what_draws_nothing_needs_no_backend(value: str) -> None:
    code = (
        "import sys\n"
        "from gato.envs import registry\n"
        "for task in sys.argv[1:]:\n"
        "    env = registry.make(task, seed=0)\n"
        "    env.step(env.action_space.sample())\n"
        "    env.close()\n"
    )
    tasks = ["mujoco/Ant-v5", "metaworld/reach-v3", "fetch/FetchReach-v4"]
    tasks += ["dm_control/cartpole-swingup"] if value != "glfw" else []  # it opens GLFW itself
    ran = _python(code, *tasks, MUJOCO_GL=value)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")


@pytest.mark.sim
def test_a_missing_simulator_is_no_matter_of_graphics() -> None:
    for options in ("", "?camera=free"):
        code = "import sys; sys.modules['mujoco'] = None\n" + DRAW.format(options)
        told = _python(code).stdout
        assert "needs the simulator of suite 'mujoco', which does not import" in told
        assert 'pip install "gato[mujoco]"' in told
        assert "MUJOCO_GL" not in told
