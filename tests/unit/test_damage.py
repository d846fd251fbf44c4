"""Damaged shards are named before a run begins, or left out and told; nothing in between."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gato import cli, damage, preparation
from gato.checkpoint import load_checkpoint
from gato.config import TrainConfig
from gato.damage import look, without_damage
from gato.envs.store import EpisodeStore
from gato.train import train


@pytest.fixture
def config(tiny: TrainConfig, stores: Path, tmp_path: Path) -> TrainConfig:
    """Return a run on copies of the arm and the pictures, its arm in at least four shards."""
    for name in ("arm", "pictures"):
        shutil.copytree(stores / name, tmp_path / name)
    corpora = tuple(
        replace(c, path=str(tmp_path / c.name))
        for c in tiny.corpora
        if c.name in ("arm", "pictures")
    )
    assert len(EpisodeStore(tmp_path / "arm")._shards) >= 4
    return replace(tiny, corpora=corpora, steps=6, save_every=3)


def shard(config: TrainConfig, number: int = 1) -> Path:
    return sorted(Path(config.corpora[0].path).glob("shard-*"))[number]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-4])


def flip(path: Path, at: int = -1) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_whole_data_are_left_as_they_are(config):
    assert without_damage(config, verify=True, skip=True) == config
    assert [look(c, verify=True) for c in config.corpora] == [[], []]


@pytest.mark.parametrize(
    ("name", "damage", "told"),
    [
        ("observations.observation.npy", cut, r"it has \d+ bytes in place of \d+"),
        ("actions.action.npy", Path.unlink, "it is missing"),
        ("rewards.npy", lambda p: flip(p, 2), "it does not begin as one"),
        ("lengths.npy", lambda p: flip(p, 128), "steps in all"),
        ("texts.json", Path.unlink, "it is missing"),
    ],
)
def test_a_shard_that_is_seen_to_be_damaged_is_named(
    config: TrainConfig, name: str, damage: Callable[[Path], None], told: str
) -> None:
    file = shard(config) / name
    damage(file)
    with pytest.raises(ValueError, match=told) as caught:
        train(config, Path(config.corpora[0].path).parent / "run")
    assert str(file) in str(caught.value)
    assert "--skip-bad-shards" in str(caught.value)
    (found,) = look(config.corpora[0])
    assert (found.corpus, found.shard) == ("arm", file.parent.name)
    assert found.items == int(file.parent.name[-6:])


def test_every_byte_is_compared_where_that_is_asked_for(config):
    flip(shard(config) / "actions.action.npy")
    assert without_damage(config) == config
    with pytest.raises(ValueError, match=r"expected sha256 \w{12} for .*actions\.action\.npy"):
        without_damage(config, verify=True)
    changed = without_damage(config, verify=True, skip=True)
    assert changed.corpora[0].skip == (shard(config).name,)


def test_damaged_records_are_a_damaged_store(config):
    cut(next(Path(config.corpora[1].path).glob("images-*")))
    told = r"'pictures': all of it, 30 items, is .*images-16x32x3.npy"
    with pytest.raises(ValueError, match=told):
        without_damage(config)
    alone = without_damage(config, skip=True)
    assert alone.corpora[1].skip == (".",)
    left = r"corpus 'pictures': all of it .* is damaged: .* or leave 'pictures' out of --data"
    with pytest.raises(ValueError, match=left):
        train(alone, Path(config.corpora[0].path).parent / "run")


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"format": "gato-episodes-1", "spec": {}}', '{"format": "other"}']
)
def test_a_damaged_manifest_names_its_corpus(config, tmp_path, capsys, text):
    arm = Path(config.corpora[0].path)
    (arm / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match=rf"corpus 'arm': expected .*{arm}"):
        without_damage(config)
    folder = tmp_path / "all"
    folder.mkdir()
    arm.rename(folder / "arm")
    shutil.copytree(config.corpora[1].path, folder / "pictures")
    assert cli.main(["data", "info", str(folder)]) == cli.BAD_INPUT
    said = capsys.readouterr()
    assert str(folder / "arm") in said.err
    assert "pictures" in said.out


@pytest.mark.parametrize("text", ['{"format": "gato-records-1"}', '{"format": "other"}'])
def test_a_damaged_manifest_of_records_names_its_corpus(config, capsys, text):
    pictures = Path(config.corpora[1].path)
    (pictures / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match=rf"corpus 'pictures': expected .*{pictures}"):
        without_damage(config)
    assert cli.main(["data", "validate", str(pictures)]) == cli.BAD_INPUT
    assert str(pictures) in capsys.readouterr().err


def test_what_is_left_out_is_counted_kept_and_not_changed_by_a_resume(config, tmp_path, capsys):
    file = shard(config) / "observations.observation.npy"
    whole, lost = file.read_bytes(), int(file.parent.name[-6:])
    cut(file)
    half = train(config, tmp_path / "run", skip_bad_shards=True)
    told = capsys.readouterr().err
    assert f"corpus 'arm': shard {file.parent.name} of {lost} items is left out." in told
    assert f"corpus 'arm': 1 damaged shard left out, {lost} items" in told
    saved = load_checkpoint(half)
    assert saved.config.corpora[0].skip == (file.parent.name,)
    assert saved.data["arm"]["skipped"] == [file.parent.name]
    assert saved.data["arm"]["episodes"] == 20 - lost

    # the shard comes back: a run that goes on does without it all the same
    longer = load_checkpoint(tmp_path / "run").config
    file.write_bytes(whole)
    assert without_damage(config, tmp_path / "run").corpora == longer.corpora
    assert train(config, tmp_path / "run") == half

    # another one goes: that is for the user to decide
    cut(shard(config, 2) / "rewards.npy")
    with pytest.raises(ValueError, match=r"settled when it begins.*--no-resume"):
        train(config, tmp_path / "run", skip_bad_shards=True)


def test_the_command_leaves_out_and_tells(config, tmp_path, capsys):
    file = shard(config) / "actions.action.npy"
    cut(file)
    data = [f"{c.name}={c.path}" for c in config.corpora]
    command = ["train", "quickstart", "--data", *data, "--steps", "1", "--out", str(tmp_path / "r")]
    command += ["--rows", "1", "--text-pieces", "300", "--validation", "0", "--json"]
    assert cli.main(command) == cli.BAD_INPUT
    assert f"in {file}" in capsys.readouterr().err
    assert not (tmp_path / "r" / "latest").exists()
    assert cli.main([*command, "--skip-bad-shards"]) == cli.DONE
    out, told = capsys.readouterr()
    assert told.count("is left out") == 1
    data = load_checkpoint(json.loads(out)["checkpoint"]).data
    assert data["arm"]["skipped"] == [file.parent.name]


@pytest.mark.parametrize("rank", ["0", "1"])
def test_the_first_of_several_processes_reads_every_byte_and_tells(
    rank, config, tmp_path, capsys, monkeypatch
):
    cut(shard(config) / "rewards.npy")
    looked: list[bool] = []
    found = damage.look
    monkeypatch.setattr(
        damage, "look", lambda c, *, verify: looked.append(verify) or found(c, verify=verify)
    )
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(preparation, "opened", lambda config: 1 / 0)  # before anything is trained
    data = [f"{c.name}={c.path}" for c in config.corpora]
    command = ["train", "quickstart", "--data", *data, "--out", str(tmp_path / "r")]
    cli.main([*command, "--skip-bad-shards"])
    assert not any(looked)
    told = capsys.readouterr().err
    assert "division" in told
    assert ("left out" in told) == (rank == "0")
    cli.main([*command, "--skip-bad-shards", "--verify"])
    assert looked[-1]  # what is left out must be the same in all
    assert cli.main([*command, "--verify"]) == cli.BAD_INPUT
    assert looked[-1] == (rank == "0")


def test_a_number_that_is_none_is_named_when_it_is_met(config, tmp_path):
    for folder in Path(config.corpora[0].path).glob("shard-*"):
        file = folder / "observations.observation.npy"
        column = np.load(file)
        column[:, 3] = np.nan
        np.save(file, column)
    fitted = replace(config, codec=replace(config.codec, scales="mu_law"))
    with pytest.raises(ValueError, match=r"corpus 'arm', episode \d+ of .*toy/arm-v0: observation"):
        train(fitted, tmp_path / "run")
