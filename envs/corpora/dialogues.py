"""Short conversations about the tasks, the worlds and images, each answer given by a rule.

A conversation asks about one subject at a time and follows it up: "what is the goal of reach?",
"and where does it happen?". What is held out are pairs of wording and subject (or of an opening
and what follows it): each wording and each subject occurs in training, but never that pair, and
every held-out conversation has at least one of them. Images come from the same split of their own
corpus.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from random import Random
from typing import Any

import numpy as np

from gato.envs.corpora import digits, scenes
from gato.envs.corpora.common import (
    NUMBERS,
    Split,
    assistant,
    bucket,
    check_split,
    conversation,
    join,
    stream,
    system,
    user,
)
from gato.envs.corpora.tasks_in_words import NEVER_LEARNED, TASKS, WORLDS, Task, tasks_in_words

COUNTS = {"train": 12_000, "heldout": 400}
IMAGE_SHARE = 0.5
SYSTEM_SHARE = 0.15
SYSTEM = ("you are gato, a generalist agent.", "you are a helpful agent.")

OPENINGS = {
    "greeting": ("hello", "hi", "hello there", "hey", "good day"),
    "who": ("who are you?", "what are you?", "what is your name?", "tell me who you are"),
    "skills": ("what can you do?", "what have you learned?", "how can you help me?"),
    "tasks": ("which tasks do you know?", "what tasks have you learned?", "list your tasks"),
}
CLOSINGS = {
    "thanks": ("thank you", "thanks", "thanks a lot", "that is all, thank you"),
    "farewell": ("bye", "goodbye", "see you later", "good night"),
}
FIXED = {
    "greeting": "hello! how can i help you?",
    "who": "i am gato, an agent that plays, moves a robot arm and talks.",
    "thanks": "you are welcome.",
    "farewell": "goodbye!",
}
ABOUT_TASK = {
    "goal": (
        "what is the goal of {}?",
        "what must you do in {}?",
        "what is {} about?",
        "tell me the goal of {}",
        "explain {} to me",
    ),
    "how": (
        "how do you do {}?",
        "how do you play {}?",
        "how does {} work?",
        "how would you go about {}?",
        "tell me how you do {}",
    ),
    "where": (
        "in which world is {}?",
        "where does {} happen?",
        "which world does {} belong to?",
        "what world is {} in?",
    ),
    "sight": (
        "what do you see in {}?",
        "what do you look at in {}?",
        "what is your view in {}?",
        "tell me what you see in {}",
    ),
}
FOLLOW_UPS = {
    "goal": ("what is its goal?", "what must you do there?", "and the goal?"),
    "how": ("how do you do it?", "and how do you do that?", "how does it work?"),
    "where": ("where does it happen?", "and in which world is it?", "which world is that?"),
    "sight": ("what do you see there?", "and what do you look at?", "what do you see in it?"),
}
ABILITY = (
    "can you {}?",
    "are you able to {}?",
    "could you {}?",
    "have you learned to {}?",
    "do you know how to {}?",
)
ABOUT_WORLD = (
    "what is {}?",
    "tell me about {}",
    "what do you know about {}?",
    "what kind of world is {}?",
)
LOOK = (
    "what do you see?",
    "what is in the picture?",
    "describe this image",
    "what is this?",
    "tell me what you see",
)
ABOUT_DIGIT = {
    "number": ("which number is it?", "and what number is that?", "what digit is it?"),
    "parity": ("is it odd or even?", "and is it even or odd?", "odd or even?"),
    "next": ("what number comes next?", "and what comes after it?", "which number follows it?"),
    "figure": ("write it as a figure", "and as a figure?", "how do you write it in figures?"),
}
ABOUT_THING = {
    "colour": ("and what colour is it?", "what is its colour?", "which colour does it have?"),
    "type": ("what kind of object is it?", "and what object is it?", "is it a ball, key or box?"),
    "place": ("and where is it?", "in which part is it?", "where does it lie?"),
}


@dataclass
class _Talk:
    """A conversation under way: its turns, and whether one of them is a held-out pair."""

    rng: Random
    tasks: list[Task]
    messages: list[dict[str, Any]] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)
    heldout: bool = False

    def say(
        self,
        kind: str,
        wordings: tuple[str, ...],
        answer: str,
        slot: str = "",
        pair: object = None,
        image: np.ndarray | None = None,
    ) -> int:
        """Add a question in a random wording, and its answer; return which wording it was.

        Of each (kind, pair) one wording in the list is held out, chosen by a hash.
        """
        chosen = self.rng.randrange(len(wordings))
        if pair is not None and chosen == bucket((kind, pair), len(wordings)):
            self.heldout = True
        self.messages += [user(wordings[chosen].format(slot), image), assistant(answer)]
        self.kinds.append(kind)
        return chosen


def records(
    split: Split, seed: int, count: int | None = None, tasks: tuple[str, ...] = TASKS
) -> Iterator[dict[str, Any]]:
    """Yield conversations; ``meta["kinds"]`` names the kind of each answer.

    Args:
        split: ``train`` or ``heldout``.
        seed: of the random choices.
        count: how many; `COUNTS` where none are asked for.
        tasks: ids of the tasks that the agent has learned.
    """
    check_split(split)
    known = tasks_in_words(tuple(tasks))
    for k in range(COUNTS[split] if count is None else count):
        rng = stream("dialogues", split, seed, k)
        while True:
            talk = _Talk(rng, known)
            _hold(talk, split)
            if talk.heldout == (split == "heldout"):
                break
        head = [system(rng.choice(SYSTEM))] if rng.random() < SYSTEM_SHARE else []
        yield conversation(head + talk.messages, kinds=talk.kinds)


def _hold(talk: _Talk, split: Split) -> None:
    rng = talk.rng
    if rng.random() < 0.2:
        kind = rng.choice(list(OPENINGS))
        talk.say(kind, OPENINGS[kind], _opening_answer(kind, talk.tasks))
    if rng.random() < IMAGE_SHARE:
        rng.choice((_about_digit, _about_scene))(talk, split)
    else:
        rng.choices((_about_task, _ability, _about_world), (6, 3, 1))[0](talk)
    if rng.random() < 0.15:
        kind = rng.choice(list(CLOSINGS))
        talk.say(kind, CLOSINGS[kind], FIXED[kind])


def _opening_answer(kind: str, tasks: list[Task]) -> str:
    if kind == "tasks":
        return join([task.name for task in tasks])
    if kind == "skills":
        worlds = dict.fromkeys(task.world.name for task in tasks)
        return f"i can act in {join(list(worlds))}, describe images and talk."
    return FIXED[kind]


def _about_task(talk: _Talk) -> None:
    """Ask about a task, then go on about it or about another."""
    task = talk.rng.choice(talk.tasks)
    kinds = talk.rng.sample(list(ABOUT_TASK), talk.rng.randint(1, 3))
    for turn, kind in enumerate(kinds):
        if turn == 0 or talk.rng.random() < 0.2:
            task = talk.rng.choice(talk.tasks) if turn else task
            talk.say(kind, ABOUT_TASK[kind], _about(task, kind), task.name, task.id)
        else:
            pair = ("follow", task.id)
            talk.say(kind, FOLLOW_UPS[kind], _about(task, kind), pair=pair)


def _about(task: Task, kind: str) -> str:
    if kind == "goal":
        return f"the goal is to {task.goal}."
    if kind == "where":
        return f"it is in {task.world.name}."
    return task.world.does if kind == "how" else task.world.sees


def _ability(talk: _Talk) -> None:
    """Ask whether the agent has learned something; it says yes to its tasks only."""
    for _ in range(talk.rng.randint(1, 2)):
        if talk.rng.random() < 0.5:
            task = talk.rng.choice(talk.tasks)
            skill = re.sub(r"\bme\b", "you", task.goal)
            talk.say("ability", ABILITY, f"yes, that is {task.name}.", skill, task.id)
        else:
            skill = talk.rng.choice(NEVER_LEARNED)
            talk.say("ability", ABILITY, "no, i have not learned that.", skill, skill)


def _about_world(talk: _Talk) -> None:
    suites = sorted({task.id.split("/")[0] for task in talk.tasks})
    for suite in talk.rng.sample(suites, min(len(suites), talk.rng.randint(1, 2))):
        world = WORLDS[suite]
        talk.say("world", ABOUT_WORLD, world.what, world.name, suite)


def _about_digit(talk: _Talk, split: Split) -> None:
    image, digit = digits.sample(split, talk.rng)
    answers = {
        "number": NUMBERS[digit],
        "parity": ("even", "odd")[digit % 2],
        "next": NUMBERS[digit + 1],
        "figure": str(digit),
    }
    first = talk.say("look", LOOK, digits.name(digit), image=image)
    for kind in talk.rng.sample(list(answers), talk.rng.randint(1, 2)):
        talk.say(kind, ABOUT_DIGIT[kind], answers[kind], pair=first)


def _about_scene(talk: _Talk, split: Split) -> None:
    """Show a room, then ask about its only object, or about what is in it."""
    rng = talk.rng
    scene = scenes.sample(split, rng, most=2)
    first = talk.say("look", LOOK, scenes.describe(scene), image=scenes.render(scene))
    if len(scene.things) > 1:
        asked = scenes.questions(scene)
        for question in rng.sample(asked, min(len(asked), rng.randint(1, 2))):
            wordings = scenes.QUESTIONS[question.kind]
            talk.say(question.kind, wordings, question.answer, question.slot, pair=first)
        return
    (thing,) = scene.things
    answers = {
        "colour": thing.colour,
        "type": f"a {thing.type}",
        "place": scenes.place(thing.x, thing.y),
    }
    for kind in rng.sample(list(answers), rng.randint(1, 2)):
        talk.say(kind, ABOUT_THING[kind], answers[kind], pair=first)
