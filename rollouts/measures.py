"""Language tasks and how each is measured.

A task's id is KIND/WHAT: ``caption/scenes``, ``vqa/my_records``, ``text/documents``. KIND is one of
`MEASURES`. WHAT is a corpus of `gato.envs.corpora`, whose held-out split is made anew at a seed, or
the place of data: a folder of records, or any format that `gato train --data` reads (see
`language_tasks`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from gato.rollouts.agent import Agent
from gato.rollouts.few_shot import is_pairs, shots
from gato.rollouts.language import answers, captions, documents, replies
from gato.rollouts.metrics import Options, Record
from gato.rollouts.zero_shot import classes, retrieve


class Measure(Protocol):
    """How well an agent does on records of one kind."""

    def __call__(self, agent: Agent, records: Sequence[Record], options: Options) -> dict[str, Any]:
        """Return figures and examples: what `metrics.measured` makes of them."""


class Kind(NamedTuple):
    """A kind of language task."""

    about: str
    corpora: tuple[str, ...]
    """Those of `gato.envs.corpora` that have such records: what ``KIND/*`` names."""
    fits: Callable[[Record], bool]
    """Whether a record is of this kind; a corpus or folder may hold others too."""
    chooses: bool = False
    """Whether `Options.choices` are chosen among."""


def is_caption(record: Record) -> bool:
    """Return whether a record is a picture with a text."""
    return bool(record["kind"] == "caption")


def is_talk(record: Record) -> bool:
    """Return whether a record is a conversation."""
    return bool(record["kind"] == "conversation")


def is_about_a_picture(record: Record) -> bool:
    """Return whether a record is a conversation in which a picture is shown."""
    return is_talk(record) and any(
        part["type"] == "image"
        for message in record["messages"]
        if not isinstance(message["content"], str)
        for part in message["content"]
    )


def is_document(record: Record) -> bool:
    """Return whether a record is plain text."""
    return bool(record["kind"] == "document")


KINDS: Mapping[str, Kind] = {
    "caption": Kind("a text for a picture", ("digits", "frames", "scenes"), is_caption),
    "vqa": Kind(
        "answers to questions about a picture",
        ("dialogues", "frames", "scenes"),
        is_about_a_picture,
        chooses=True,
    ),
    "chat": Kind("the assistant's answers in a conversation", ("dialogues",), is_talk, True),
    "text": Kind("the likelihood of plain text", ("documents",), is_document),
    "classify": Kind("the label of a picture, of several", ("digits", "shapes"), is_caption, True),
    "retrieve": Kind(
        "a picture's caption among others, and the other way", ("scenes", "shapes"), is_caption
    ),
    "few_shot": Kind("a new word for a picture, from examples", ("bindings",), is_pairs),
}

MEASURES: Mapping[str, Measure] = {
    "caption": captions,
    "vqa": answers,
    "chat": replies,
    "text": documents,
    "classify": classes,
    "retrieve": retrieve,
    "few_shot": shots,
}
"""Per kind, ``measure(agent, records, options)``, which returns what `metrics.measured` makes of
figures and examples. A new kind is such a function, in a module that imports
`gato.rollouts.metrics` and never this one; its entry here; and one in `KINDS`."""
