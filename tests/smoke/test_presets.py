"""Every preset builds, and takes no memory to do so."""

from __future__ import annotations

import pytest
import torch

from gato.checkpoint import build_model
from gato.config import TrainConfig, from_json, to_json
from gato.presets import PRESETS, preset
from gato.tokenizers.serializer import Serializer
from gato.tokenizers.vocabulary import VocabularyLayout


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_builds_on_the_meta_device(name):
    config = preset(name)
    bare = Serializer(config.codec)
    sizes = {n: m.vocabulary for n, m in bare.modalities.items() if m.vocabulary}
    layout = VocabularyLayout.build({**sizes, "text": config.text_pieces})
    with torch.device("meta"):
        model = build_model(config, Serializer(config.codec, layout=layout))
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert len(model.blocks) == config.model.layers
    assert model.vocabulary_size >= config.text_pieces + 2 * 1024


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_survives_its_file(name):
    config = preset(name)
    assert from_json(TrainConfig, to_json(config)) == config


def test_the_papers_sizes_hold_its_hyperparameters():
    config = preset("gato_1b")
    assert (config.model.layers, config.model.width, config.model.heads) == (24, 2048, 16)
    assert (config.rows, config.model.context, config.steps) == (512, 1024, 1_000_000)
    assert config.optim.rate(14_999, config.steps) == pytest.approx(1e-4)
    assert config.optim.rate(999_999, config.steps) == pytest.approx(1e-5, rel=0.01)
    assert config.text_pieces == 32_000
