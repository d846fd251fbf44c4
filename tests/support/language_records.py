"""Records of language tasks, made up."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from gato.envs.records import RecordWriter

LONGEST = 6
"""Ids of a text of the tiny model, which never ends one by itself."""


def picture(i: int) -> np.ndarray:
    return np.random.default_rng(i).integers(0, 255, (16, 16, 3), np.uint8)


def caption(i: int, text: str) -> dict:
    return {"kind": "caption", "image": picture(i), "text": text}


def talk(*turns: str, image: np.ndarray | None = None, **meta) -> dict:
    """Return a conversation of questions and answers in turn."""
    messages = []
    for number, text in enumerate(turns):
        role = "assistant" if number % 2 else "user"
        content = [{"type": "text", "text": text}]
        if image is not None and not number:
            content.insert(0, {"type": "image", "image": image})
        messages.append({"role": role, "content": content})
    return {"kind": "conversation", "messages": messages, **({"meta": meta} if meta else {})}


def store(folder: str, records: list[dict], name: str = "made") -> Path:
    with RecordWriter(folder, name) as writer:
        for record in records:
            writer.append(record)
    return folder
