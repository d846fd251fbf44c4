"""Bodies and pictures that cost more than they look: judged before they are read."""

from __future__ import annotations

import base64
import io
import json
import time

import numpy as np
import pytest
from PIL import Image
from serve_world import picture, uri

from gato.rollouts import watch
from gato.rollouts.data_uri import MOST_SCANS, Budget
from gato.rollouts.serve_json import MAX_VALUES, strict_json
from gato.rollouts.serve_limits import Refused


def object_of(keys: list[str]) -> bytes:
    """Return an object with so many members."""
    return ("{" + ",".join(f"{json.dumps(key)}:0" for key in keys) + "}").encode()


@pytest.mark.parametrize("again", [0, 7999])
def test_a_key_twice_is_found_in_one_pass(again):
    keys = [f"k{i}" for i in range(8000)]
    began = time.perf_counter()
    with pytest.raises(Refused, match=f"got 'k{again}' twice"):
        strict_json(object_of([*keys, keys[again]]))
    assert time.perf_counter() - began < 0.2  # a second and more, where each key looks at all
    assert len(strict_json(object_of(keys))) == 8000


@pytest.mark.parametrize("one", [b"{}", b"[]", b"0"])
def test_as_many_values_as_would_fill_the_memory_are_not_made(one):
    raw = b"[" + b",".join([one] * (5 << 20)) + b"]"
    began = time.perf_counter()
    with pytest.raises(Refused, match=f"at most {MAX_VALUES} values"):
        strict_json(raw)
    assert time.perf_counter() - began < 0.5
    assert len(strict_json(b"[" + b",".join([one] * 1000) + b"]")) == 1000


def progressive(scans: int) -> bytes:
    """Return a progressive JPEG whose last scan is there so many times more."""
    file = io.BytesIO()
    Image.fromarray(picture(0, 64, 64)).save(file, "jpeg", progressive=True)
    raw = file.getvalue()
    return raw[:-2] + raw[raw.rindex(b"\xff\xda") : -2] * scans + raw[-2:]


def jpeg(raw: bytes) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(raw).decode()


def test_a_jpeg_of_many_scans_is_refused_and_one_of_some_costs_more():
    plain = jpeg(progressive(0))
    seen = Budget(1, 1 << 20, 64 * 64).picture(plain)
    assert seen.shape == (64, 64, 3)
    more = jpeg(progressive(20))
    assert Budget(1, 1 << 20, 2 * 64 * 64).picture(more).shape == (64, 64, 3)
    with pytest.raises(ValueError, match="more pixels"):
        Budget(1, 1 << 20, 2 * 64 * 64 - 1).picture(more)
    with pytest.raises(ValueError, match=f"at most {MOST_SCANS} scans; got"):
        Budget(1, 1 << 20, 1 << 30).picture(jpeg(progressive(100)))
    grey = Image.fromarray(np.zeros((64, 64), np.uint8))
    file = io.BytesIO()
    grey.save(file, "jpeg")
    assert Budget(1, 1 << 20, 64 * 64).picture(jpeg(file.getvalue())).shape == (64, 64, 3)
    assert Budget(1, 1 << 20, 64 * 64).picture(uri(picture(1, 64, 64))).shape == (64, 64, 3)


def test_numbers_that_json_has_not_are_null_in_events():
    told = watch.event("step", {"reward": float("nan"), "tokens": [{"x": float("inf")}, 0.5]})
    assert told == b'event: step\ndata: {"reward": null, "tokens": [{"x": null}, 0.5]}\n\n'
