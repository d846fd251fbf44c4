"""Fetch's experts bring things to their goals, and leave the simulator alone while they try."""

from __future__ import annotations

import numpy as np
import pytest

from gato.envs import registry
from gato.envs.experts.fetch import SlideExpert
from gato.envs.score import score

NAMES = ("PickAndPlace", "Push", "Reach")


@pytest.mark.parametrize("name", NAMES)
def test_rules_succeed(name: str) -> None:
    task_id = f"fetch/Fetch{name}-v4"
    assert registry.spec(task_id).expert == "scripted"
    assert score(task_id, 8, first_seed=500)["success_rate"] == 1.0


def test_strokes_that_were_tried_succeed_more_often_than_the_rule() -> None:
    task_id = "fetch/FetchSlide-v4"
    rule, tried = (
        score(task_id, 2, kind=kind, first_seed=8)["success_rate"] for kind in ("scripted", "auto")
    )
    assert (rule, tried) == (0.0, 1.0)  # few tries suffice at these seeds


def test_trying_leaves_the_simulator_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    task_id = "fetch/FetchSlide-v4"
    monkeypatch.setattr(SlideExpert, "TRIES", 2)
    env, untouched = registry.make(task_id), registry.make(task_id)
    expert = registry.make_expert(task_id)
    observation, _ = env.reset(seed=6)
    same, _ = untouched.reset(seed=6)
    expert.reset(env, 6)
    for _ in range(12):
        action = expert.act(env, observation)
        assert env.action_space.contains(action)
        observation, *_ = env.step(action)
        same, *_ = untouched.step(action)
        for key, value in observation.items():
            np.testing.assert_array_equal(value, same[key])


def test_an_expert_that_a_task_does_not_have_is_refused() -> None:
    with pytest.raises(ValueError, match="scripted; got 'planner'"):
        registry.make_expert("fetch/FetchPush-v4", "planner")


def test_cameras_do_not_hide_an_experts_settings() -> None:
    cameras = ("", "?camera=external_camera_0&size=32x32")
    plain, seen = (registry.make_expert(f"fetch/FetchSlide-v4{options}") for options in cameras)
    assert plain.settings == seen.settings
