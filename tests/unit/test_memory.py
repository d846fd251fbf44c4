"""What is freed between things that stay goes back to the system."""

import ctypes

import numpy as np
import pytest

from gato.memory import _trim, give_back, resident


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
