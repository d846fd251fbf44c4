"""The bench of texts written at the same time."""

from __future__ import annotations

import pytest

from gato import bench, bench_serve


def test_texts_at_the_same_time_are_measured_beside_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_serve, "ROWS", 4)
    monkeypatch.setattr(bench_serve, "LENGTHS", (9, 12))
    monkeypatch.setattr(bench_serve, "READING", 2)
    monkeypatch.setattr(bench_serve, "WRITING", 4)
    made = bench_serve.made
    monkeypatch.setattr(bench_serve, "made", lambda: (made()[0], made()[1][:8]))
    monkeypatch.setattr(bench.bench_machine, "peaks", lambda device: {})
    many, queued, step = bench.run(["serve"], repeats=1)["results"]
    assert many["case"] == "serve: 4 texts"
    assert queued["case"] == "serve: 8 over 4 rows"
    for result in (many, queued):
        assert result["unit"] == "ids/s"
        assert result["against"] == bench_serve.ONE
        assert result["value"] > 0
    assert 0 < many["of_floor"] < 1
    assert step["ratio"] > 1, "a step is more than its model"
    assert step["value"] > step["baseline"] > 0
