"""What is freed between things that stay goes back to the system."""

import ctypes

import numpy as np
import pytest

from gato import memory
from gato.memory import SELDOM, _trim, give_back, resident


def test_memory_freed_in_pieces_is_given_back():
    if not hasattr(ctypes.CDLL(None), "malloc_trim"):
        assert _trim() is None
        give_back()
        return
    pieces = [np.ones(2500) for _ in range(5000)]  # 20 kB each: too small for pages of their own
    full = resident()
    stays = pieces[::50]
    del pieces
    give_back()
    assert full - resident() > 70
    assert sum(piece.sum() for piece in stays) == pytest.approx(2500 * len(stays))


def test_it_is_given_back_seldom_however_often_that_is_asked_for(monkeypatch):
    now, calls = [1000.0], []
    monkeypatch.setattr(memory, "_trim", lambda: calls.append)
    monkeypatch.setattr(memory, "_given", {"at": -np.inf})
    monkeypatch.setattr(memory.time, "monotonic", lambda: now[0])
    for _ in range(100):  # a line of losses every second
        give_back(SELDOM)
        now[0] += 1.0
    assert calls == [0] * 10
    give_back()  # at once
    assert len(calls) == 11
