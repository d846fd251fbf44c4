"""Fixtures for tests of worlds: the toy suite, registered."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from gato.envs import play, registry

_SPEC = importlib.util.spec_from_file_location("toy", Path(__file__).with_name("toy.py"))
_TOY = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(_TOY)


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Return the module of the toy suite while it is registered."""
    monkeypatch.setitem(sys.modules, "gato.envs.toy", _TOY.suite())
    monkeypatch.setattr(registry, "SUITES", ("toy", "metaworld", "babyai", "gym"))
    play.close_worlds()
    yield _TOY
    play.close_worlds()
    registry._suite.cache_clear()
    registry._specs.cache_clear()
