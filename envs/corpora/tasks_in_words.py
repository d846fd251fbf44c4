"""What a dialogue says about tasks and worlds: data, and the questions asked about them."""

from __future__ import annotations

from typing import NamedTuple

from gato.envs import registry

TASKS = (
    "atari/Boxing-v5",
    "babyai/GoToLocal-v0",
    "babyai/GoToRedBallGrey-v0",
    "metaworld/button-press-topdown-v3",
    "metaworld/door-open-v3",
    "metaworld/drawer-open-v3",
    "metaworld/push-v3",
    "metaworld/reach-v3",
)
"""The tasks that dialogues are about, unless the caller names others."""


class World(NamedTuple):
    """A suite of tasks: what it is, what the agent sees in it, and what it does there."""

    name: str
    what: str
    sees: str
    does: str


WORLDS = {
    "atari": World(
        "atari",
        "atari is a games console of 1977.",
        "i see the pixels of the screen.",
        "i look at the screen and press the buttons.",
    ),
    "babyai": World(
        "babyai",
        "babyai is a grid world with instructions in english.",
        "i see the cells before me and the instruction.",
        "i read the instruction, turn and walk.",
    ),
    "metaworld": World(
        "meta-world",
        "meta-world is a robot arm at a table.",
        "i see numbers for the hand, the objects and the goal.",
        "i read the numbers and move the arm.",
    ),
}

GOALS = {
    "atari/Boxing-v5": "hit the black boxer more often than he hits me",
    "atari/Breakout-v5": "break all the bricks with the ball",
    "atari/Freeway-v5": "bring the chicken across the road",
    "atari/Pong-v5": "play the ball past the other paddle",
    "babyai/GoToLocal-v0": "go to the object that the instruction names",
    "babyai/GoToRedBallGrey-v0": "go to the red ball among grey objects",
    "babyai/GoToRedBallNoDists-v0": "go to the red ball in an empty room",
}
"""What a task is about where its spec has no instruction."""

NAMES = {
    "babyai/GoToLocal-v0": "go to local",
    "babyai/GoToRedBallGrey-v0": "go to red ball",
    "babyai/GoToRedBallNoDists-v0": "red ball alone",
    "metaworld/button-press-topdown-v3": "button press",
}
"""What a task is called in speech where its id does not say it."""

NEVER_LEARNED = (
    "play chess",
    "drive a car",
    "cook soup",
    "play the piano",
    "fly a plane",
    "paint a house",
    "speak french",
    "tell the weather",
)


class Task(NamedTuple):
    """A task in words."""

    id: str
    name: str
    goal: str
    world: World


def tasks_in_words(task_ids: tuple[str, ...]) -> list[Task]:
    """Return the tasks in words; their goals are the registry's instructions where it has any."""
    return [_task(task_id) for task_id in task_ids]


def _task(task_id: str) -> Task:
    suite, name = task_id.split("/")
    if suite not in WORLDS:
        raise ValueError(
            f"expected a task of one of the suites {', '.join(WORLDS)}; got {task_id!r}. "
            f"Describe its suite in WORLDS to talk about it."
        )
    goal = GOALS.get(task_id) or registry.spec(task_id).instruction
    if not goal:
        raise ValueError(
            f"expected a task with an instruction; {task_id!r} has none. Write its goal in GOALS."
        )
    spoken = NAMES.get(task_id, name.rsplit("-v", 1)[0].replace("-", " ").lower())
    return Task(task_id, spoken, goal, WORLDS[suite])
