"""What records ask, and what an agent answers: all questions of many records at once.

A question is answered after the true turns before it. Most answers need no writing: one forward
over the whole record shows where each of its tokens is the likeliest, as writing greedily would
have chosen (where that is done in bfloat16, up to its rounding).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from gato.rollouts.agent import Agent
from gato.rollouts.conversation import TooLong
from gato.rollouts.generate import foreseen, generate
from gato.rollouts.metrics import Record, truths
from gato.tokenizers.stream import TokenSequence, concatenate

Question = dict[str, Any]
"""What was asked about a record (its number), the answers ``wanted``, what was ``said``, whether it
was ``right``; ``people``, what several people answered; ``choices``, and the ``image`` shown; and
``prefix``, what the model reads before it answers, None where that is more than it remembers;
``cannot``, why that could not be shortened, if not for its length."""


def ask(agent: Agent, records: Sequence[Record], max_tokens: int) -> list[Question]:
    """Return every question about the records with the agent's likeliest answer to it."""
    asked = [item for i, r in enumerate(records) for item in _questions(agent, r, i, max_tokens)]
    longest = max((len(agent.serializer.text(q["wanted"][0])) for q in asked), default=0)
    _foresee(agent, records, asked)
    unsure = [  # they may still spell the same text otherwise
        q for q in asked if not q["right"] and q["prefix"] is not None
    ]
    said = generate(
        agent.model,
        agent.serializer,
        [q["prefix"] for q in unsure],
        max_tokens=max(max_tokens, longest + 1),
    )
    for question, answer in zip(unsure, said, strict=True):
        question["said"], question["right"] = answer, answer in question["wanted"]
    return asked


def _foresee(agent: Agent, records: Sequence[Record], asked: Sequence[Question]) -> None:
    """Mark the answers that one forward over a whole record shows to be the likeliest."""
    written = {}
    for i in dict.fromkeys(q["record"] for q in asked):
        record = records[i]
        if record["kind"] == "caption":
            sequence = agent.serializer.caption(record["image"], record["text"])
        else:
            sequence = agent.serializer.conversation(record["messages"])
        if len(sequence) <= agent.model.config.memory:
            written[i] = sequence
    judged = foreseen(agent.model, agent.serializer, list(written.values()))
    right = dict(zip(written, map(iter, judged), strict=True))
    for question in asked:
        sure = question["record"] in right and next(right[question["record"]])
        question["right"], question["said"] = sure, question["wanted"][0] if sure else ""


def _questions(agent: Agent, record: Record, index: int, max_tokens: int) -> list[Question]:
    """Return what is asked about one record: the text to go on from and the answer wanted."""
    meta = record.get("meta") or {}
    if record["kind"] == "caption":
        wanted = truths(record)
        item = {"record": index, "kind": "caption", "asked": "", "wanted": wanted}
        shown = agent.serializer.caption(record["image"], None)
        fits = len(shown) <= agent.model.config.memory
        item |= {"people": wanted, "image": record["image"], "cut": False}
        return [{**item, "prefix": shown if fits else None, "cannot": ""}]
    if record["kind"] != "conversation":
        return []
    messages, found = record["messages"], []
    turns = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    kinds = list(meta.get("kinds", ()))
    people, choices = (_per_turn(meta.get(k), len(turns)) for k in ("answers", "choices"))
    for number, i in enumerate(turns):
        wanted = text_of(messages[i])
        prefix, cut, cannot = _prefix(agent, messages[:i], max_tokens)
        found.append(
            {
                "record": index,
                "kind": kinds[number] if len(kinds) == len(turns) else "answer",
                "asked": text_of(messages[i - 1]) if i else "",
                "wanted": [wanted],
                "people": people[number] or [wanted],
                "choices": choices[number],
                "image": _picture(messages[:i]),
                "prefix": prefix,
                "cut": cut,
                "cannot": cannot,
            }
        )
    return found


def _per_turn(told: Any, turns: int) -> list[list[str]]:
    """Return lists of texts per answer; a plain list of texts is every answer's."""
    if told and all(isinstance(text, str) for text in told):
        return [list(told)] * turns
    if not told:
        return [[]] * turns
    if len(told) != turns:
        raise ValueError(
            f"expected a list of texts for each of a conversation's {turns} answers; got "
            f"{len(told)} lists."
        )
    return [list(texts) for texts in told]


def _prefix(
    agent: Agent, messages: Sequence[dict[str, Any]], max_tokens: int
) -> tuple[TokenSequence | None, bool, str]:
    """Return what stands before an answer, whether its first turns were left out to fit, and why
    they could not be.
    """
    parts = [agent.serializer.conversation(messages)]
    whole = concatenate([*parts, agent.serializer.control_piece("<assistant>")])
    if len(whole) <= agent.model.config.memory:
        return whole, False, ""
    try:
        return agent.prepare(messages, max_tokens).prefix, True, ""
    except TooLong:  # not even the last turn fits
        return None, False, ""
    except ValueError as error:  # nothing that is made of turns
        return None, False, str(error)


def _picture(messages: Sequence[dict[str, Any]]) -> np.ndarray | None:
    """Return the picture that was shown last, if any."""
    shown = [
        part["image"]
        for message in messages
        if not isinstance(message["content"], str)
        for part in message["content"]
        if part["type"] == "image"
    ]
    return shown[-1] if shown else None


def text_of(message: dict[str, Any]) -> str:
    """Return the text of a message, without its pictures."""
    if isinstance(message["content"], str):
        return message["content"]
    return "".join(part["text"] for part in message["content"] if part["type"] == "text")
