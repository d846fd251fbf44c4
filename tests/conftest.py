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
    parser.addoption("--hostile", type=int, default=300, help="requests of test_serve_hostile.py")
    parser.addoption("--load", type=int, default=96, help="good requests of the same")
    parser.addoption("--browser", help="Chromium, or Chrome, for tests/browser")
    parser.addoption("--browser-checkpoint", help="what is talked to there; else a tiny random one")
    parser.addoption("--browser-shots", help="folder for screenshots")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect what needs a GPU or a browser and has none, but for those who only want a list."""
    if config.option.collectonly:
        return
    at_hand = {"gpu": torch.cuda.is_available(), "browser": bool(config.option.browser)}
    lacking = [name for name, there in at_hand.items() if not there]
    left_out = [item for item in items if any(map(item.get_closest_marker, lacking))]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


@pytest.fixture(scope="session")
def text_model() -> bytes:
    """Return a SentencePiece model of about 300 pieces."""
    return train_text_model(sentences(), 300)


@pytest.fixture(scope="session")
def serializer(text_model: bytes) -> Serializer:
    """Return a serializer with default options; add no tasks to it."""
    return Serializer(state={"text": {MODEL_FILE: text_model}})
