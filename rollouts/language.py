"""How well a checkpoint reads and writes: captions and answers compared word for word.

A caption counts where the whole text is the record's. A conversation's answers count one by one,
each given the true turns before it. Documents give the loss per token and per byte.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gato.envs.records import RecordStore
from gato.rollouts.agent import Agent
from gato.rollouts.generate import foreseen, generate, log_likelihoods
from gato.tokenizers.stream import TokenSequence, concatenate

SAMPLES = 12


def evaluate_language(
    agent: Agent,
    records: str | Path | RecordStore | Sequence[dict[str, Any]],
    limit: int | None = None,
    max_tokens: int = 48,
) -> dict[str, Any]:
    """Return how the agent does on captions, conversations and documents, as JSON-able data.

    Args:
        agent: a loaded checkpoint.
        records: a store, its folder, or records.
        limit: use only the first so many records.
        max_tokens: the most tokens of an answer.

    Returns:
        ``exact``, the share of captions and answers that are word for word right (None without
        any), the same per kind of question, per conversation as a whole, and for documents
        ``loss`` (nats per token), ``perplexity`` and ``bits_per_byte``.
    """
    store = RecordStore(records) if isinstance(records, str | Path) else records
    count = len(store) if limit is None else min(limit, len(store))
    chosen = [store[i] for i in range(count)]
    asked = [item for i, r in enumerate(chosen) for item in _questions(agent, r, i)]
    longest = max((len(agent.serializer.text(q["wanted"])) for q in asked), default=0)
    _foresee(agent, chosen, asked)
    unsure = [q for q in asked if not q["right"]]  # they may still spell the same text otherwise
    said = generate(
        agent.model,
        agent.serializer,
        [q["prefix"] for q in unsure],
        max_tokens=max(max_tokens, longest + 1),
    )
    for question, answer in zip(unsure, said, strict=True):
        question["said"], question["right"] = answer, answer == question["wanted"]
    for question in asked:
        del question["prefix"]
    return {
        "records": count,
        **_answers(asked),
        **_documents(agent, [r["text"] for r in chosen if r["kind"] == "document"]),
    }


def _foresee(
    agent: Agent, records: Sequence[dict[str, Any]], asked: Sequence[dict[str, Any]]
) -> None:
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
        question["right"], question["said"] = sure, question["wanted"]


def _questions(agent: Agent, record: dict[str, Any], index: int) -> list[dict[str, Any]]:
    """Return what is asked about one record: the text to go on from and the answer wanted."""
    if record["kind"] == "caption":
        prefix = agent.serializer.caption(record["image"], None)
        item = {"record": index, "kind": "caption", "asked": "", "wanted": record["text"]}
        return [{**item, "prefix": prefix}]
    if record["kind"] != "conversation":
        return []
    messages, found = record["messages"], []
    kinds = list(record.get("meta", {}).get("kinds", ()))
    turns = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    for number, i in enumerate(turns):
        found.append(
            {
                "record": index,
                "kind": kinds[number] if len(kinds) == len(turns) else "answer",
                "asked": _text(messages[i - 1]) if i else "",
                "wanted": _text(messages[i]),
                "prefix": _prefix(agent, messages[:i]),
            }
        )
    return found


def _prefix(agent: Agent, messages: Sequence[dict[str, Any]]) -> TokenSequence:
    parts = [agent.serializer.conversation(messages)]
    return concatenate([*parts, agent.serializer.control_piece("<assistant>")])


def _text(message: dict[str, Any]) -> str:
    if isinstance(message["content"], str):
        return message["content"]
    return "".join(part["text"] for part in message["content"] if part["type"] == "text")


def _answers(asked: Sequence[dict[str, Any]]) -> dict[str, Any]:
    def share(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        exact = float(np.mean([q["right"] for q in rows])) if rows else None
        return {"exact": exact, "count": len(rows)}

    captions = [q for q in asked if q["kind"] == "caption"]
    answers = [q for q in asked if q["kind"] != "caption"]
    whole: dict[int, bool] = {}
    for q in answers:
        whole[q["record"]] = whole.get(q["record"], True) and q["right"]
    shown = [q for q in asked if not q["right"]][: SAMPLES // 2]
    shown += [q for q in asked if q["right"]][: SAMPLES - len(shown)]
    return {
        **share(asked),
        "captions": share(captions),
        "answers": share(answers),
        "conversations": {
            "exact": float(np.mean(list(whole.values()))) if whole else None,
            "count": len(whole),
        },
        "kinds": {
            kind: share([q for q in answers if q["kind"] == kind])
            for kind in sorted({q["kind"] for q in answers})
        },
        "samples": [dict(q) for q in shown],
    }


def _documents(agent: Agent, texts: Sequence[str]) -> dict[str, Any]:
    result: dict[str, Any] = {"documents": len(texts)}
    if not texts:
        return result
    pieces = [p for text in texts for p in _windows(agent, text)]
    scored = log_likelihoods(agent.model, agent.serializer, pieces)
    nats, tokens = -sum(s for s, _ in scored), sum(n for _, n in scored)
    size = sum(len(text.encode()) for text in texts)
    loss = nats / tokens
    return {
        **result,
        "loss": loss,
        "perplexity": float(np.exp(loss)),
        "bits_per_byte": nats / np.log(2) / size,
    }


def _windows(agent: Agent, text: str) -> list[TokenSequence]:
    """Return a document in windows that fit the model's memory, each after ``<bos>``."""
    whole, most = agent.serializer.document(text), agent.model.config.memory
    if len(whole) <= most:
        return [whole]
    starts = range(1, len(whole), most - 1)
    first = whole.slice(0, 1)
    return [concatenate([first, whole.slice(s, min(s + most - 1, len(whole)))]) for s in starts]
