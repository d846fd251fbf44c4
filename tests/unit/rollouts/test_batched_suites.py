"""Tasks of four suites in one batch act as each does alone, without a cache."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from gato import bench_suites
from gato.bench_suites import SUITES, Plain, compared, episodes, make
from gato.model_config import ModelConfig
from gato.rollouts.policy import Policy

SMALL = ModelConfig(
    layers=2, width=32, heads=2, head_dim=16, ffn_width=64, context=512, qk_norm=True
)
TASKS = [t for t in SUITES for _ in range(4)]


def test_greedy_actions_are_those_of_the_plain_loop() -> None:
    model, serializer = make(SMALL)
    policy = Policy(model, serializer, TASKS, temperature=0.0)
    rows = {i: Plain(model, serializer, TASKS[i]) for i in (0, 5, 10, 15)}  # one of each suite
    assert len({TASKS[i] for i in rows}) == len(SUITES)
    for seen in episodes(TASKS, 10):
        actions = policy.select_action(seen)
        for i, row in rows.items():
            row.see(seen[i])
            np.testing.assert_array_equal(row.decide(), actions[i])
            assert len(row) <= model.config.memory, "nothing has left the memory"
    assert all(len(row) + 1 >= policy.memory.lengths[i] for i, row in rows.items())


def test_once_the_window_slides_they_are_those_of_a_full_forward_under_it() -> None:
    model, serializer = make(replace(SMALL, window=48, context=48))
    policy = Policy(model, serializer, TASKS, temperature=0.0)
    rows = {i: Plain(model, serializer, TASKS[i], cut=False) for i in (0, 5, 10, 15)}
    differs = 0
    short = {i: Plain(model, serializer, TASKS[i]) for i in rows}
    for step, seen in enumerate(episodes(TASKS, 20)):
        actions = policy.select_action(seen)
        for i, row in rows.items():
            row.see(seen[i])
            short[i].see(seen[i])
            if step % 3 == 2:
                np.testing.assert_array_equal(row.decide(), actions[i])
                kept = len(short[i].past)
                differs += not np.array_equal(short[i].decide(), actions[i])
                del short[i].past[kept:]
            else:
                row.follow(actions[i])
            short[i].follow(actions[i])
    assert all(len(row) > policy.memory.cache.slots for row in rows.values()), "rings wrapped"
    assert differs, "a cut-off context is another function than a ring of keys"


def test_the_bench_compares_what_it_measures(monkeypatch: pytest.MonkeyPatch) -> None:
    model, serializer = make(SMALL)
    ours, theirs = compared(model, serializer, 2, 6, 3)
    assert ours > theirs > 0
    monkeypatch.setattr(Plain, "decide", lambda self: np.float32(9.0))
    with pytest.raises(RuntimeError, match=r"suite/atari, step 2: 9\.0 alone, .* among 8"):
        compared(model, serializer, 2, 6, 3)


def test_a_long_episode_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bench_suites.MODELS, "quickstart", replace(SMALL, window=48))
    monkeypatch.setattr(bench_suites, "BLOCK", 3)
    paces, memory = bench_suites.suites_long_bench(1, late=8, early=4)
    assert paces["unit"] == "steps/s"
    assert paces["ratio"] > 0.3
    assert memory["unit"] == "MB"
    assert memory["ratio"] < 1.05
