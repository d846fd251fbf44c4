"""Fixtures that several folders of tests share: a tiny text model and a serializer on it."""

from __future__ import annotations

import os

# Read once, when torch starts its threads: those that wait must not keep a core busy.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import settings

from gato.tokenizers.serializer import Serializer
from gato.tokenizers.text import MODEL_FILE, train_text_model

settings.register_profile("gato", deadline=None, database=None, derandomize=True)
settings.load_profile("gato")

_WORDS = ("red", "green", "blue", "ball", "box", "door", "go", "to", "the", "a", "is", "open")


def sentences() -> list[str]:
    """Return made-up sentences, enough for a text model of a few hundred pieces."""
    n = len(_WORDS)
    return [" ".join(_WORDS[(i * j + j) % n] for j in range(1, 8)) + f" {i}." for i in range(200)]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let a change that is meant to change golden figures write them anew."""
    parser.addoption("--write-golden", action="store_true", help="write tests/golden anew")
    parser.addoption("--kills", type=int, default=10, help="of test_train_killed.py")
    parser.addoption("--kills-seed", type=int, default=0, help="chooses where and how")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect what needs a GPU where there is none, but for those who only want a list."""
    if torch.cuda.is_available() or config.option.collectonly:
        return
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    config.hook.pytest_deselected(items=gpu)
    items[:] = [item for item in items if item not in gpu]


@pytest.fixture(scope="session")
def text_model() -> bytes:
    """Return a SentencePiece model of about 300 pieces."""
    return train_text_model(sentences(), 300)


@pytest.fixture(scope="session")
def serializer(text_model: bytes) -> Serializer:
    """Return a serializer with default options; add no tasks to it."""
    return Serializer(state={"text": {MODEL_FILE: text_model}})
