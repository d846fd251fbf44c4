"""The preset `few_shot`, cut short: a model learns to look words up among examples."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from gato import load
from gato.envs.corpora import registry
from gato.presets import preset
from gato.rollouts.few_shot import shots
from gato.rollouts.metrics import Options
from gato.train import train

STEPS = 500


@pytest.mark.slow
def test_words_that_examples_bind_are_looked_up(tmp_path: Path) -> None:
    config = preset("few_shot")
    data = registry.build("bindings", tmp_path / "bindings", "train", 0, 24_000)
    corpus = replace(config.corpora[0], path=str(data))
    train(replace(config, steps=STEPS, corpora=(corpus,)), tmp_path / "run", device="cpu")
    agent = load(tmp_path / "run", "cpu")

    records = list(registry.records("bindings", "heldout", 0, 200))
    metrics = shots(agent, records, Options())["metrics"]
    right = {count: metrics[f"chosen_{count}_shots"]["value"] for count in (0, 1, 2, 4, 8)}

    assert abs(right[0] - 0.5) <= 0.1, "nothing but examples should tell"
    assert min(right[4], right[8]) >= 0.9
    assert metrics["written_4_shots"]["value"] >= 0.9
