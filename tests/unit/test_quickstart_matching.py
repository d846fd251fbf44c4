"""What the quickstart measures of its contrastive head, and how it is shown."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from rich.console import Console

from gato import quickstart
from gato.checkpoint import Checkpoint, build_model
from gato.config import TrainConfig
from gato.corpora import CorpusConfig
from gato.envs.corpora import registry
from gato.envs.records import RecordStore
from gato.model_config import ModelConfig
from gato.report import picture, table
from gato.rollouts import zero_shot
from gato.rollouts.agent import Agent
from gato.tokenizers.serializer import Serializer
from gato.tokenizers.text import MODEL_FILE

SIZE = ModelConfig(layers=1, width=16, heads=2, head_dim=8, ffn_width=32, context=96)


@pytest.fixture
def agent(text_model: bytes) -> Agent:
    config = TrainConfig(SIZE, corpora=(CorpusConfig("pictures", "nowhere", contrast=1.0),))
    serializer = Serializer(state={"text": {MODEL_FILE: text_model}})
    torch.manual_seed(0)
    model = build_model(config, serializer).eval()
    return Agent(Checkpoint(Path("nowhere"), config, serializer, model, 1))


def test_labels_and_captions_are_measured_and_shown(agent, tmp_path):
    for name, count in (("digits", 20), ("shapes", 64)):
        registry.build(name, tmp_path / name, "heldout", count=count)
    found = quickstart.matching(agent, tmp_path / "digits", tmp_path / "shapes")
    chances = {
        "digits classified": 0.1,
        "unseen shapes classified": 1 / 30,
        "caption of a shape found": None,
        "shape found by caption": None,
    }
    assert list(found) == list(chances)
    for name, chance in chances.items():
        row = found[name]
        assert 0.0 <= row["score"] <= 1.0
        assert chance is None or row["chance"] == pytest.approx(chance)
    store = RecordStore(tmp_path / "digits")
    digits = [store[i] for i in range(len(store))]
    labels = sorted({r["text"] for r in digits})
    assert len(labels) == 10
    for how in zero_shot.HOW:
        wanted = zero_shot.accuracy(agent, digits, labels, how)
        assert found["digits classified"][how] == pytest.approx(wanted)
    assert found["digits classified"]["score"] == found["digits classified"]["contrast"]
    result = {"tasks": {}, "language": {}, "matching": found}
    text = io.StringIO()
    Console(file=text, width=120).print(table(result))
    (line,) = [x for x in text.getvalue().splitlines() if "unseen shapes classified, of 30" in x]
    assert "0.03" in line
    assert f"{found['unseen shapes classified']['score']:.2f}" in line
    picture(result, [{"step": 1, "losses": {"digits": 1.0}}], tmp_path / "drawn.png")
    assert (tmp_path / "drawn.png").stat().st_size > 1000


def test_the_recipe_matches_what_it_measures(tmp_path):
    recipe = quickstart.recipe(tmp_path, 100)
    asked = {c.name for c in recipe.corpora if c.contrast > 0}
    assert asked == {"digits", quickstart.MATCHED}
    assert sum(c.weight for c in recipe.corpora) == pytest.approx(1.0, abs=0.02)
