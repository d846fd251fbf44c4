"""Observations in, actions out, with a memory per session, as the policy itself would act."""

from __future__ import annotations

import base64
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from gymnasium import spaces
from serve_world import ARM, ROOM, make_agent, picture, uri
from serving import ask, serving

from gato.rollouts.agent import Agent
from gato.rollouts.data_uri import Budget
from gato.rollouts.serve_values import from_json, to_json

ACTIONS, SESSIONS = "/v1/actions", "/v1/actions/sessions"


@pytest.fixture(scope="module")
def agent(text_model: bytes) -> Agent:
    return make_agent(text_model)


@pytest.fixture(scope="module")
def address(agent: Agent) -> Iterator[str]:
    with serving(agent) as address:
        yield address


@pytest.fixture(autouse=True)
def closed(address: str) -> Iterator[None]:
    """Leave no session open."""
    yield
    for session in ask(address, SESSIONS, method="GET")[2]["data"]:
        assert ask(address, f"{SESSIONS}/{session['id']}", method="DELETE")[0] == 200


def arm(seed: int) -> list[float]:
    return np.random.default_rng(seed).normal(size=3).astype(np.float32).tolist()


def room(seed: int) -> dict[str, Any]:
    camera = picture(seed, 32, 16)
    ways = [
        camera.tolist(),
        uri(camera),
        {
            "dtype": "uint8",
            "shape": [32, 16, 3],
            "data": base64.b64encode(camera.tobytes()).decode(),
        },
    ]
    grid = [seed % 3, seed % 4]
    return {"camera": ways[seed % 3], "grid": grid, "mission": "go to the ball", "turned": seed % 4}


@pytest.mark.parametrize("seed", [0, 5])
def test_a_session_acts_as_the_policy(address, agent, seed):
    policy = agent.policy(ARM.id, seeds=[seed])
    session = None
    for step in range(8):
        asked = {"session": session} if session else {"task": ARM.id, "seed": seed}
        status, _, told = ask(address, ACTIONS, {**asked, "observation": arm(step)})
        assert status == 200, told
        session = told["session"]
        assert told["step"] == step + 1
        expected = policy.select_action(np.array(arm(step), np.float32))
        assert told["action"] == expected.tolist()


def test_pictures_come_in_three_ways(address, agent):
    policy = agent.policy(ROOM.id, seeds=[2])
    session = ask(address, SESSIONS, {"task": ROOM.id, "seed": 2})[2]["id"]
    for seed in range(6):
        observation = room(seed)
        told = ask(address, ACTIONS, {"session": session, "observation": observation})[2]
        seen = {
            "camera": picture(seed, 32, 16),
            "grid": np.array(observation["grid"]),
            "mission": observation["mission"],
            "turned": np.int64(seed % 4),
        }
        assert told["action"] == int(policy.select_action(seen))


def test_sessions_at_once_do_not_mix(address, agent):
    def play(seed: int) -> list[Any]:
        session = ask(address, SESSIONS, {"task": ARM.id, "seed": seed})[2]["id"]
        return [
            ask(address, ACTIONS, {"session": session, "observation": arm(seed * 100 + step)})[2][
                "action"
            ]
            for step in range(6)
        ]

    with ThreadPoolExecutor(8) as pool:
        played = list(pool.map(play, range(8)))
    for seed, actions in enumerate(played):
        policy = agent.policy(ARM.id, seeds=[seed])
        observations = [np.array(arm(seed * 100 + step), np.float32) for step in range(6)]
        assert actions == [policy.select_action(o).tolist() for o in observations]


def test_reset_forgets(address, agent):
    session = ask(address, SESSIONS, {"task": ARM.id, "seed": 1})[2]["id"]
    first = ask(address, ACTIONS, {"session": session, "observation": arm(0)})[2]["action"]
    ask(address, ACTIONS, {"session": session, "observation": arm(1)})
    status, _, told = ask(address, f"{SESSIONS}/{session}/reset", {"seed": 1})
    assert (status, told["steps"]) == (200, 0)
    again = ask(address, ACTIONS, {"session": session, "observation": arm(0)})[2]
    assert (again["action"], again["step"]) == (first, 1)


def test_sessions_are_listed_and_closed(address):
    opened = ask(address, SESSIONS, {"task": ARM.id})[2]
    (listed,) = ask(address, SESSIONS, method="GET")[2]["data"]
    assert listed["id"] == opened["id"]
    assert 0 < listed["expires_in"] <= 600
    assert ask(address, f"{SESSIONS}/{opened['id']}", method="DELETE")[2]["deleted"]
    for method, path, body in (
        ("DELETE", f"{SESSIONS}/{opened['id']}", None),
        ("POST", f"{SESSIONS}/{opened['id']}/reset", {}),
        ("POST", ACTIONS, {"session": opened["id"], "observation": arm(0)}),
    ):
        status, _, told = ask(address, path, body, method)
        assert (status, told["error"]["code"]) == (404, "session_not_found")


def test_the_tasks_are_those_of_the_checkpoint(address):
    tasks = {t["id"]: t for t in ask(address, f"{ACTIONS}/tasks", method="GET")[2]["data"]}
    assert set(tasks) == {ARM.id, ROOM.id}
    assert tasks[ARM.id]["action_space"] == {
        "type": "Box",
        "shape": [2],
        "dtype": "float32",
        "low": -2.0,
        "high": 1.0,
    }


@pytest.mark.parametrize("task", ["gym/CartPole-v1", "metaworld/reach-v3", "../x", 7, ["a"]])
def test_no_environment_is_made_by_a_request(address, task):
    for path, body in ((SESSIONS, {"task": task}), (ACTIONS, {"task": task, "observation": []})):
        status, _, told = ask(address, path, body)
        assert (status, told["error"]["code"]) == (404, "task_not_found")


def without(key: str) -> dict[str, Any]:
    return {k: v for k, v in room(1).items() if k != key}


@pytest.mark.parametrize(
    ("task", "observation", "named"),
    [
        (ARM.id, [1, 2], "shape"),
        (ARM.id, [[1], [2, 3], 4], "observation"),
        (ARM.id, ["1", "2", "3"], "observation"),
        (ARM.id, [True, False, True], "observation"),
        (ARM.id, [1, 2, 10**39], "observation"),
        (ARM.id, {"dtype": "object", "shape": [3], "data": ""}, "dtype"),
        (ARM.id, {"dtype": "float32", "shape": [3], "data": "AAAA"}, "12 bytes"),
        (ARM.id, {"dtype": "float32", "shape": [4], "data": "AAAA"}, "shape"),
        (
            ARM.id,
            {
                "dtype": "float32",
                "shape": [3],
                "data": base64.b64encode(np.full(3, np.nan, "<f4").tobytes()).decode(),
            },
            "observation",
        ),
        (ARM.id, "data:image/png;base64,AAAA", "string"),
        (ROOM.id, without("turned"), "turned"),
        (ROOM.id, {**room(1), "more": 1}, "more"),
        (ROOM.id, {**room(1), "turned": 4}, "observation.turned"),
        (ROOM.id, {**room(1), "turned": 1.0}, "observation.turned"),
        (ROOM.id, {**room(1), "grid": [3, 0]}, "grid"),
        (ROOM.id, {**room(1), "grid": [0.5, 0]}, "observation.grid"),
        (ROOM.id, {**room(1), "grid": [-1, 0]}, "grid"),
        (ROOM.id, {**room(1), "mission": 3}, "observation.mission"),
        (ROOM.id, {**room(1), "mission": "x" * 41}, "mission"),
        (ROOM.id, {**room(1), "camera": uri(picture(0, 16, 16))}, "observation.camera"),
        (ROOM.id, {**room(1), "camera": "file:///etc/passwd"}, "observation.camera"),
        (ROOM.id, {**room(1), "camera": [[[300] * 3] * 16] * 32}, "observation.camera"),
        (ROOM.id, [], "camera"),
    ],
)
def test_wrong_observations_are_named_and_change_nothing(address, agent, task, observation, named):
    status, _, told = ask(address, ACTIONS, {"task": task, "seed": 3, "observation": observation})
    assert status == 400
    assert named in told["error"]["message"]
    assert not ask(address, SESSIONS, method="GET")[2]["data"]
    session = ask(address, SESSIONS, {"task": task, "seed": 3})[2]["id"]
    assert ask(address, ACTIONS, {"session": session, "observation": observation})[0] == 400
    good = arm(0) if task == ARM.id else room(1)
    after = ask(address, ACTIONS, {"session": session, "observation": good})[2]
    fresh = ask(address, ACTIONS, {"task": task, "seed": 3, "observation": good})[2]
    assert (after["action"], after["step"]) == (fresh["action"], 1)


def test_sessions_have_a_limit_and_idle_ones_end(agent):
    with serving(agent, sessions=2, idle_seconds=0.5) as address:
        opened = [ask(address, SESSIONS, {"task": ARM.id})[0] for _ in range(2)]
        assert opened == [201, 201]
        status, headers, _ = ask(address, SESSIONS, {"task": ARM.id})
        assert (status, headers["retry-after"]) == (429, "1")
        time.sleep(0.6)
        assert not ask(address, SESSIONS, method="GET")[2]["data"]
        assert ask(address, SESSIONS, {"task": ARM.id})[0] == 201


def test_other_spaces_come_and_go():
    space = spaces.Tuple(
        [
            spaces.MultiBinary(3),
            spaces.Box(0, 255, (2, 3), np.uint8),
            spaces.Discrete(3, start=-1),
            spaces.Box(-1, 1, (), np.float64),
        ]
    )
    grey = np.array([[1, 2, 3], [4, 5, 6]], np.uint8)
    budget = Budget(9, 1 << 20, 1 << 20)
    for told in (grey.tolist(), uri(grey)):
        made = from_json(space, [[0, 1, True], told, -1, 0.5], budget)
        assert space.contains(made)
        assert to_json(made) == [[0, 1, 1], grey.tolist(), -1, 0.5]
    with pytest.raises(ValueError, match=r"observation\[2\] from -1 to 1"):
        from_json(space, [[0, 1, 1], grey.tolist(), 2, 0.5], budget)
    with pytest.raises(ValueError, match="grey"):
        from_json(space, [[0, 1, 1], uri(picture(0, 2, 3)), 0, 0.5], budget)
