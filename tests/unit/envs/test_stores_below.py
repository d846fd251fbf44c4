"""Stores in folders: all are found, the damaged ones too; what is hidden or foreign is not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import ModuleType

import pytest

from gato import cli
from gato.envs.files import stores_below
from gato.envs.readers.importing import is_store
from gato.envs.store import EpisodeWriter, RecordWriter, open_store


@pytest.fixture
def both(tmp_path: Path, toy: ModuleType) -> Path:
    """Return a folder with a store of episodes and one of records, neither at its top."""
    root = tmp_path / "data"
    for name in ("one", "two"):
        with EpisodeWriter(root / "toy" / name, toy.SPEC) as writer:
            writer.append(toy.episode(0))
    with RecordWriter(root / "words", "words") as words:
        words.append({"kind": "document", "text": "a ball"})
    return root


def test_whole_stores_are_found_and_hidden_ones_are_not(both):
    shutil.copytree(both / "words", both / ".words.tmp")
    (both / "toy" / "one" / ".shard-00001-000001.77.tmp").mkdir()
    (both / "foreign").mkdir()
    (both / "foreign" / "records.jsonl").write_text("{}")
    (both / "foreign" / "shard-000001.tar").write_text("")
    wanted = [both / "toy" / "one", both / "toy" / "two", both / "words"]
    assert stores_below(both) == wanted
    assert stores_below(both / "words") == [both / "words"]
    assert not is_store(both / "foreign")
    assert stores_below(both / "nothing") == []


@pytest.mark.parametrize("name", ["toy/one", "words"])
def test_a_store_without_its_manifest_is_damaged(both, name, capsys):
    (both / name / "manifest.json").unlink()
    assert both / name in stores_below(both)
    assert stores_below(both / name) == [both / name]
    assert is_store(both / name)
    told = f"expected manifest.json in {both / name}; it is missing, and a store's files lie there"
    with pytest.raises(ValueError, match="it is missing, and a store's files lie there"):
        open_store(both / name)
    for command in (["data", "info"], ["data", "validate"]):
        assert cli.main([*command, str(both), "--json"]) == cli.BAD_INPUT
        out, said = capsys.readouterr()
        assert told in said
        assert len([row for row in json.loads(out) if row.get("valid", True)]) == 2  # the others
    for path in (both / name, both / name.split("/")[0]):
        command = ["train", "quickstart", "--data", f"a={path}", "--out", str(both.parent / "run")]
        assert cli.main(command) == cli.BAD_INPUT
        assert told in capsys.readouterr().err


def test_a_mirror_that_lost_its_other_side_is_no_store(both):
    (both / "toy" / "one" / "manifest.json").unlink()
    (both / "toy" / "one" / ".remote.json").write_text("{}")
    assert stores_below(both) == [both / "toy" / "two", both / "words"]
