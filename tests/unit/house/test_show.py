"""`gato show`: the stream as a person reads it, held by a golden file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gato import cli
from gato.show import show

GOLDEN = Path(__file__).parents[2] / "golden" / "show_babyai_GoToRedBallGrey-v0.json"
KEYS = ["position", "modality", "id", "value", "target", "local"]


@pytest.mark.sim
def test_the_stream_of_a_level_is_as_recorded(capsys):
    assert cli.main(["show", "babyai/GoToRedBallGrey-v0", "--steps", "2", "--json"]) == 0
    printed = capsys.readouterr().out
    # to record anew: gato show babyai/GoToRedBallGrey-v0 --steps 2 --json > this file
    assert json.loads(printed) == json.loads(GOLDEN.read_text())


def test_the_golden_file_keeps_the_contract():
    tokens = json.loads(GOLDEN.read_text())
    assert all(list(token) == KEYS for token in tokens)
    assert [token["position"] for token in tokens] == list(range(len(tokens)))
    assert sum(token["target"] for token in tokens) == 2
    assert tokens[0]["value"] == "<bos>"
    said = "".join(token["value"] for token in tokens if token["modality"] == "text")
    assert said.startswith("go▁to▁")


@pytest.mark.parametrize("name", ["arm", "grid", "words", "pictures", "talks"])
@pytest.mark.parametrize("codec", ["scalar", "vector"])
def test_every_store_is_shown(stores, name, codec):
    tokens = show(str(stores / name), steps=1, codec=codec)
    assert all(list(token) == KEYS for token in tokens)
    assert any(token["target"] for token in tokens)
    json.dumps(tokens)


def test_values_are_what_went_in(stores):
    tokens = show(str(stores / "grid"), steps=1, codec="vector", index=3)
    from gato.envs.store import EpisodeStore

    episode = EpisodeStore(stores / "grid").episode(3)
    cells = [t["value"] for t in tokens if t["modality"] == "symbols"]
    assert cells == episode.observations["grid"][0].reshape(-1, 3).tolist()
    assert tokens[-1]["value"] == int(episode.actions["action"][0])
    patches = [t["value"] for t in tokens if t["modality"] == "image"]
    mean = int(episode.observations["camera"][0].mean())
    assert patches == [{"row": 0, "column": c, "rgb": [mean] * 3} for c in range(2)]


def test_frames_are_shown_in_larger_cells(stores, tmp_path):
    cells = show(str(stores / "grid"), steps=1, frame_cell=32)
    frames = [t["value"] for t in cells if t["modality"] == "frame"]
    assert [(f["row"], f["column"]) for f in frames] == [(0, 0)]  # half of it is black
    assert not any(t["modality"] == "image" for t in cells)
    with pytest.raises(ValueError, match="one of 16, 32, 64; got 24"):
        show(str(stores / "grid"), frame_cell=24)
    with pytest.raises(ValueError, match="a checkpoint, which has its own; got both"):
        show(str(stores / "grid"), frame_cell=32, checkpoint=tmp_path)


def test_an_index_beyond_the_store(stores, capsys):
    assert cli.main(["show", str(stores / "arm"), "--index", "20"]) == cli.BAD_INPUT
    assert "[0, 20)" in capsys.readouterr().err


def test_an_environment_without_an_expert_is_shown(capsys):
    assert cli.main(["show", "gym/CartPole-v1", "--steps", "3"]) == 0
    assert capsys.readouterr().out.count("yes") == 3
