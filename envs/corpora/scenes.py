"""Small MiniGrid rooms with captions and questions, answered from the room's true state.

A room is drawn by MiniGrid's own renderer. Its scenes are split by a hash of what lies where, so
that no arrangement of objects seen in training is ever held out, whatever the agent does in it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from random import Random
from typing import Any, NamedTuple

import numpy as np

from gato.envs.corpora.common import (
    NUMBERS,
    Split,
    assistant,
    bucket,
    caption,
    check_split,
    conversation,
    join,
    missing,
    stream,
    user,
)

COUNTS = {"train": 12_000, "heldout": 400}
ROOM = 3
"""Cells along a side of the room. Larger ones cost more patches and were learned more slowly."""
TILE = 16
"""Pixels along a side of a cell: at 8 the boxes of MiniGrid are too faint to name."""
TYPES = ("ball", "key", "box")
COLOURS = ("red", "green", "blue", "purple", "yellow", "grey")
ROWS = ("top", "", "bottom")
COLUMNS = ("left", "", "right")
DIRECTIONS = ("right", "down", "left", "up")
"""In MiniGrid's order."""
KINDS = ("colour", "object", "place", "count", "agent place", "agent direction")
"""The kinds of question; ``meta["kinds"]`` of a record names one for each answer."""

NUMBERS_OF_THINGS = {1: 4, 2: 4, 3: 1}
"""How often a room has so many objects, relative to one another."""
CAPTION_SHARE = 0.2
MOST_TURNS = 5
SHARE_OF_EASY = 0.4
"""How often a question that needs no object to be found (`EASY`) is among those asked."""
EASY = ("count", "agent direction")
QUESTIONS = {
    "colour": ("what colour is the {}?", "what is the colour of the {}?"),
    "object": ("what is the {} object?", "which object is {}?"),
    "place": ("where is the {}?", "in which part is the {}?"),
    "count": ("how many objects are there?", "how many objects do you see?"),
    "agent place": ("where is the agent?", "in which part is the agent?"),
    "agent direction": ("which way does the agent look?", "where is the agent facing?"),
}


class Thing(NamedTuple):
    """An object and its cell, `x` to the right and `y` down."""

    y: int
    x: int
    colour: str
    type: str

    @property
    def name(self) -> str:
        return f"{self.colour} {self.type}"


@dataclass(frozen=True)
class Scene:
    """A room: its objects in reading order, and the agent's cell (x, y) and direction."""

    things: tuple[Thing, ...]
    agent: tuple[int, int]
    direction: int

    @property
    def split(self) -> Split:
        return "heldout" if bucket([tuple(t) for t in self.things], 10) == 0 else "train"


class Question(NamedTuple):
    """What can be asked: the kind (one of `KINDS`), the words in its slot, and the answer."""

    kind: str
    slot: str
    answer: str

    def text(self, rng: Random) -> str:
        """Return the question in a random wording."""
        return rng.choice(QUESTIONS[self.kind]).format(self.slot)


def records(split: Split, seed: int, count: int | None = None) -> Iterator[dict[str, Any]]:
    """Yield captions and conversations of one to five questions about one image."""
    check_split(split)
    for k in range(COUNTS[split] if count is None else count):
        rng = stream("scenes", split, seed, k)
        scene = sample(split, rng)
        if rng.random() < CAPTION_SHARE:
            yield caption(render(scene), describe(scene), things=[list(t) for t in scene.things])
        else:
            yield _questions_record(scene, rng)


def sample(split: Split, rng: Random, most: int = 3) -> Scene:
    """Return a scene of the split with one to `most` objects."""
    while True:
        numbers = range(1, most + 1)
        (number,) = rng.choices(numbers, [NUMBERS_OF_THINGS[n] for n in numbers])
        cells = rng.sample(range(ROOM * ROOM), number + 1)
        things = [
            Thing(*divmod(cell, ROOM), rng.choice(COLOURS), rng.choice(TYPES))
            for cell in cells[:number]
        ]
        y, x = divmod(cells[number], ROOM)
        scene = Scene(tuple(sorted(things)), (x, y), rng.randrange(4))
        if scene.split == split:
            return scene


def describe(scene: Scene) -> str:
    """Return the caption: the objects in reading order.

    >>> describe(Scene((Thing(0, 1, "red", "ball"), Thing(2, 0, "blue", "key")), (3, 3), 0))
    'a red ball and a blue key'
    """
    return join([f"a {thing.name}" for thing in scene.things])


def place(x: int, y: int) -> str:
    """Return the name of a cell, from the centre of the room outwards.

    >>> place(0, 0), place(1, 2), place(1, 1)
    ('top left', 'bottom', 'middle')
    """
    return f"{ROWS[y]} {COLUMNS[x]}".strip() or "middle"


def questions(scene: Scene) -> list[Question]:
    """Return every question that the scene answers without doubt."""
    found = [
        Question("count", "", NUMBERS[len(scene.things)]),
        Question("agent place", "", place(*scene.agent)),
        Question("agent direction", "", DIRECTIONS[scene.direction]),
    ]
    names = [thing.name for thing in scene.things]
    types = [thing.type for thing in scene.things]
    colours = [thing.colour for thing in scene.things]
    for thing in scene.things:
        if types.count(thing.type) == 1:
            found.append(Question("colour", thing.type, thing.colour))
        if colours.count(thing.colour) == 1:
            found.append(Question("object", thing.colour, f"a {thing.type}"))
        if names.count(thing.name) == 1:
            asked = thing.type if types.count(thing.type) == 1 else thing.name
            found.append(Question("place", asked, place(thing.x, thing.y)))
    return found


def render(scene: Scene) -> np.ndarray:
    """Return the room as uint8 (48, 48, 3), as MiniGrid draws it."""
    grid_type, object_types = _minigrid()
    grid = grid_type(ROOM, ROOM)
    for thing in scene.things:
        grid.set(thing.x, thing.y, object_types[thing.type](thing.colour))
    return grid.render(TILE, scene.agent, scene.direction)


def _questions_record(scene: Scene, rng: Random) -> dict[str, Any]:
    asked = [q for q in questions(scene) if q.kind not in EASY or rng.random() < SHARE_OF_EASY]
    rng.shuffle(asked)
    asked = asked[: rng.randint(1, MOST_TURNS)]
    image: np.ndarray | None = render(scene)
    messages = []
    for question in asked:
        messages += [user(question.text(rng), image), assistant(question.answer)]
        image = None
    kinds = [question.kind for question in asked]
    return conversation(messages, kinds=kinds, things=[list(t) for t in scene.things])


@cache
def _minigrid() -> tuple[Any, dict[str, Any]]:
    try:
        from minigrid.core.grid import Grid
        from minigrid.core.world_object import Ball, Box, Key
    except ImportError as error:
        raise missing("scenes", "minigrid", "babyai") from error
    return Grid, {"ball": Ball, "key": Key, "box": Box}
