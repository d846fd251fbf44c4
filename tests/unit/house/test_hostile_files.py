"""Checkpoints and pictures that are damaged or odd are refused, or fitted, in plain words."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gato import cli
from gato.checkpoint import resolve
from gato.corpora import CorpusConfig, open_corpus
from gato.envs.records import RecordWriter
from gato.terminal import MAX_PATCHES, read_image
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
    from gato.checkpoint import FORMAT, load_checkpoint

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


def test_a_corpus_of_episodes_and_records_is_refused(stores: Path) -> None:
    with pytest.raises(ValueError, match="stores of one kind"):
        open_corpus(CorpusConfig("mixed", str(stores)), Serializer())
