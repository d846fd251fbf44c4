"""Checkpoints and pictures that are damaged or odd are refused, or fitted, in plain words."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import gymnasium
import numpy as np
import pytest
from PIL import Image

import gato
from gato import cli
from gato.corpora import CorpusConfig, open_corpus
from gato.envs import registry
from gato.envs.play import play
from gato.envs.records import RecordWriter
from gato.envs.score import RandomExpert
from gato.envs.store import EpisodeWriter
from gato.rollouts.messages import MAX_PATCHES
from gato.run_folder import resolve
from gato.terminal import read_image
from gato.tokenizers.serializer import Serializer
from gato.tokenizers.text import MODEL_FILE, Text


def test_a_pointer_to_a_missing_step_is_named(tmp_path: Path) -> None:
    (tmp_path / "latest").write_text("step-00000007")
    with pytest.raises(ValueError, match="names 'step-00000007', which is not in"):
        resolve(tmp_path)


def test_an_undecodable_pointer_is_named(tmp_path: Path) -> None:
    (tmp_path / "latest").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="latest names"):
        resolve(tmp_path)


def test_a_configuration_without_its_parts_names_the_missing_one(tmp_path: Path) -> None:
    from gato.checkpoint import load_checkpoint
    from gato.run_folder import FORMAT

    (tmp_path / "config.json").write_text(json.dumps({"format": FORMAT, "step": 1}))
    (tmp_path / "vocabulary.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    (tmp_path / "text.model").write_bytes(b"")
    with pytest.raises(ValueError, match=r"config\.json is damaged: 'serializer' is missing"):
        load_checkpoint(tmp_path)


def test_an_empty_text_model_is_refused() -> None:
    with pytest.raises(ValueError, match="the file is empty"):
        Text().load_state({MODEL_FILE: b""})


@pytest.mark.parametrize("size", [(6000, 1), (1, 6000), (4000, 3), (3000, 3000), (100, 20)])
def test_any_picture_fits_the_patches_there_are(tmp_path: Path, size: tuple[int, int]) -> None:
    path = tmp_path / "picture.png"
    Image.new("RGB", size, (200, 10, 10)).save(path)
    picture = read_image(path)
    assert picture.dtype == np.uint8
    assert np.prod([-(-n // 16) for n in picture.shape[:2]]) <= MAX_PATCHES


def test_a_store_of_records_without_its_records_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with RecordWriter(tmp_path, "words") as writer:
        writer.append({"kind": "document", "text": "hello"})
    (tmp_path / "records.jsonl").unlink()
    for command in (["data", "info"], ["data", "validate"], ["show"], ["replay"]):
        assert cli.main([*command, str(tmp_path)]) == cli.BAD_INPUT
        said = capsys.readouterr().err
        assert "records.jsonl; it is missing. The store is damaged" in said


@pytest.mark.parametrize("content", ["[]", "null", '{"format": 3}'])
def test_a_manifest_of_another_kind_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str
) -> None:
    (tmp_path / "manifest.json").write_text(content)
    assert cli.main(["data", "info", str(tmp_path)]) == cli.BAD_INPUT
    assert "expected a store of format 'gato-episodes-1'" in capsys.readouterr().err


EVIL = """
import gymnasium
from pathlib import Path
Path(__file__).with_name("ran").touch()
gymnasium.register("Evil-v0", "gymnasium.envs.classic_control.cartpole:CartPoleEnv")
"""


@pytest.mark.parametrize("what", ["store", "checkpoint", "pattern"])
def test_a_file_imports_no_module_that_was_not_named(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    what: str,
) -> None:
    module = f"evil_{what}"
    (tmp_path / f"{module}.py").write_text(EVIL)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(gato, "load", lambda path: SimpleNamespace(tasks=[task]), raising=False)
    task = f"gym/{module}:Evil-v0"
    command = ["eval", str(tmp_path), *(["--tasks", "gym/*"] if what == "pattern" else [])]
    if what == "store":
        spec = replace(registry.spec("gym/CartPole-v1"), id=task)
        with EpisodeWriter(tmp_path / "store", spec) as writer:
            writer.append(play(registry.make("gym/CartPole-v1"), RandomExpert(spec), spec, 0, 0.0))
        command = ["replay", str(tmp_path / "store")]
    assert cli.main(command) == cli.BAD_INPUT
    assert f"run with --import {module}." in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()
    if what == "store":
        assert cli.main([*command, "--import", module]) == cli.DONE
        assert (tmp_path / "ran").exists()
    gymnasium.registry.pop("Evil-v0", None)


def test_a_corpus_of_episodes_and_records_is_refused(stores: Path) -> None:
    with pytest.raises(ValueError, match="stores of one kind"):
        open_corpus(CorpusConfig("mixed", str(stores)), Serializer())
