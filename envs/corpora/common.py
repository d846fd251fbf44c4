"""What every corpus shares: splits, one random stream per record, and the shapes of records.

A corpus is a module with ``COUNTS`` (records per split where none are asked for) and
``records(split, seed, count)``, which yields plain dicts. Record *k* is a function of
(corpus, split, seed, k) alone, so a longer run starts with the records of a shorter one.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np

Split = Literal["train", "heldout"]
SPLITS: tuple[Split, ...] = ("train", "heldout")

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def check_split(split: str) -> None:
    """Raise `ValueError` unless `split` is one of `SPLITS`."""
    if split not in SPLITS:
        raise ValueError(f"expected split 'train' or 'heldout'; got {split!r}.")


def stream(corpus: str, split: str, seed: int, k: int) -> random.Random:
    """Return the random stream of record `k`, the same in every process."""
    return random.Random(f"{corpus}/{split}/{seed}/{k}")


def bucket(key: object, buckets: int) -> int:
    """Return a number in ``range(buckets)`` that depends on ``repr(key)`` alone."""
    return zlib.crc32(repr(key).encode()) % buckets


def user(text: str, image: np.ndarray | None = None) -> dict[str, Any]:
    """Return a user message, its image (if any) before its text."""
    content: list[dict[str, Any]] = [] if image is None else [{"type": "image", "image": image}]
    return {"role": "user", "content": [*content, {"type": "text", "text": text}]}


def assistant(text: str) -> dict[str, Any]:
    """Return an assistant message."""
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def system(text: str) -> dict[str, Any]:
    """Return a system message."""
    return {"role": "system", "content": [{"type": "text", "text": text}]}


def conversation(messages: Iterable[dict[str, Any]], **meta: Any) -> dict[str, Any]:
    """Return a conversation record; `meta` says what the record is made of, for evaluation."""
    return {"kind": "conversation", "messages": list(messages), "meta": meta}


def caption(image: np.ndarray, text: str, **meta: Any) -> dict[str, Any]:
    """Return a caption record."""
    return {"kind": "caption", "image": image, "text": text, "meta": meta}


def pairs(examples: Iterable[tuple[np.ndarray, str]], **meta: Any) -> dict[str, Any]:
    """Return a record of pictures, each with its text, that are to be read together."""
    made = [{"image": image, "text": text} for image, text in examples]
    return {"kind": "pairs", "pairs": made, "meta": meta}


def missing(corpus: str, package: str, extra: str) -> ValueError:
    """Return the error for a corpus whose `package` is not installed."""
    return ValueError(
        f"the corpus {corpus!r} needs {package}, which does not import. "
        f'Install it: pip install "gato[{extra}]"'
    )


def join(parts: Sequence[str]) -> str:
    """Return an English list.

    >>> join(["a key", "a ball", "a box"])
    'a key, a ball and a box'
    """
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)
