"""A checkpoint is whole or refused, and a failed save leaves the one before as it was."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gato import checkpoint, run_folder
from gato.checkpoint import load_checkpoint, load_tensors, save_checkpoint
from gato.fitting import make_serializer
from gato.run_folder import resolve
from gato.train import Trainer, train


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("made")


@pytest.fixture
def run(made: Path, tiny, tmp_path: Path) -> Path:
    """Return a copy of a short run's folder."""
    if not (made / "run").exists():
        train(replace(tiny, steps=2, save_every=1), made / "run", device="cpu")
    return Path(shutil.copytree(made / "run", tmp_path / "run"))


@pytest.fixture
def newest(run: Path) -> Path:
    return resolve(run)


def test_a_checkpoint_is_self_sufficient(run, tiny, tmp_path):
    moved = tmp_path / "elsewhere"
    shutil.copytree(resolve(run), moved)
    shutil.rmtree(moved / "training")
    shutil.rmtree(run)
    loaded = load_checkpoint(moved)
    assert loaded.step == 2
    assert loaded.config.model == tiny.model
    assert not loaded.model.training
    assert set(loaded.serializer.tasks) == {"toy/arm-v0", "toy/grid-v0"}
    text = loaded.serializer.document("any \u2581 text")
    assert loaded.serializer.modalities["text"].decode(text.ids[1:-1], {}) == "any \u2581 text"


def test_a_checkpoint_remembers_which_seeds_it_was_trained_on(run, newest):
    data = load_checkpoint(run).data
    episodes = {"episodes", "seeds", "evaluation_seeds", "stores"}
    assert all(c.keys() in (episodes, {"records", "stores", "sizes"}) for c in data.values())
    (toy, *_) = (corpus for corpus in data.values() if "seeds" in corpus)
    assert toy["seeds"][0] <= toy["seeds"][1]
    described = json.loads((newest / "config.json").read_text())
    for damaged in (
        {"toy": {"seeds": [1]}},
        {"toy": {"seeds": ["1", "2"]}},
        {"toy": 3},
        [3],
        {"toy": {"evaluation_seeds": [1]}},
        {"toy": {"stores": {"a": "1"}, "sizes": {"b": 3}}},
        {"toy": {"stores": {"a": "1"}, "sizes": {"a": "3"}}},
        {"toy": {"records": None}},
    ):
        (newest / "config.json").write_text(json.dumps({**described, "data": damaged}))
        with pytest.raises(ValueError, match="cannot be read"):
            load_checkpoint(run)
    del described["data"]  # as older ones were written
    (newest / "config.json").write_text(json.dumps(described))
    assert load_checkpoint(run).data == {}


def test_a_run_its_checkpoints_and_latest_name_the_same(run, newest):
    assert newest.name == "step-00000002"
    assert resolve(newest) == newest
    assert sorted(p.name for p in run.glob("step-*")) == ["step-00000001", "step-00000002"]
    a, b = load_checkpoint(run), load_checkpoint(newest)
    weights = b.model.state_dict()
    assert all(torch.equal(t, weights[n]) for n, t in a.model.state_dict().items())


@pytest.mark.parametrize(
    "name", ["config.json", "vocabulary.json", "model.safetensors", "text.model"]
)
def test_a_missing_file_is_named(newest, name):
    (newest / name).unlink()
    with pytest.raises(ValueError, match=rf"not a complete checkpoint: {name} missing"):
        load_checkpoint(newest)


@pytest.mark.parametrize("name", ["config.json", "vocabulary.json", "model.safetensors"])
@pytest.mark.parametrize("kept", [0, 7, 0.5, -1])
def test_a_truncated_file_is_named(newest, name, kept):
    content = (newest / name).read_bytes()
    size = int(len(content) * kept) if kept == 0.5 else kept
    (newest / name).write_bytes(content[:size])
    with pytest.raises(ValueError, match=r"damaged"):
        load_checkpoint(newest)


def test_a_truncated_text_model_is_refused(newest):
    content = (newest / "text.model").read_bytes()
    (newest / "text.model").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"SentencePiece model.*damaged"):
        load_checkpoint(newest)


def test_a_foreign_folder_is_refused(newest, tmp_path):
    with pytest.raises(ValueError, match="there is no such folder"):
        load_checkpoint(tmp_path / "nothing")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"not a complete checkpoint: config\.json, vocab"):
        load_checkpoint(tmp_path / "other")
    described = json.loads((newest / "config.json").read_text())
    for foreign in ({"architectures": ["LlamaForCausalLM"]}, {**described, "format": 99}, [1]):
        (newest / "config.json").write_text(json.dumps(foreign))
        with pytest.raises(ValueError, match="not written by this version of gato"):
            load_checkpoint(newest)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("train.embedders", None),
        ("train.embedders", [1]),
        ("train.optim.rates", None),
        ("train.corpora.0", []),
        ("train.model.init_std", -1.0),
        ("serializer.options.symbol_size", -1),
        ("serializer.options.symbol_size", float("inf")),
    ],
)
def test_a_value_that_none_can_be_is_a_damaged_checkpoint(run, newest, place, value):
    described = json.loads((newest / "config.json").read_text())
    at = described
    *way, last = (int(key) if key.isdigit() else key for key in place.split("."))
    for key in way:
        at = at[key]
    at[last] = value
    (newest / "config.json").write_text(json.dumps(described))
    with pytest.raises(ValueError, match=rf"{newest}: this .*step-00000001 beside it is whole"):
        load_checkpoint(run)


def test_a_file_of_nothing_but_brackets_is_damaged(run, newest):
    (newest / "vocabulary.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"vocabulary\.json is damaged.*beside it is whole"):
        load_checkpoint(run)


def test_weights_or_a_ledger_of_another_model_are_refused(newest):
    described = json.loads((newest / "config.json").read_text())
    wider = json.loads(json.dumps(described))
    wider["train"]["model"]["ffn_width"] = 128
    (newest / "config.json").write_text(json.dumps(wider))
    with pytest.raises(ValueError, match=r"does not fit its config\.json at 'blocks"):
        load_checkpoint(newest)
    (newest / "config.json").write_text(json.dumps(described))
    layout = json.loads((newest / "vocabulary.json").read_text())
    layout["ranges"][0][1] += 1
    (newest / "vocabulary.json").write_text(json.dumps(layout))
    with pytest.raises(ValueError, match=r"vocabulary\.json does not belong"):
        load_checkpoint(newest)


@pytest.mark.parametrize("writes", range(7))
def test_a_full_disk_leaves_the_checkpoint_before(run, monkeypatch, writes):
    loaded = load_checkpoint(run)
    before = loaded.model.state_dict()
    real, left = checkpoint.write_synced, [writes]

    def write(path: Path, content: bytes) -> None:
        left[0] -= 1
        if left[0] < 0:
            path.write_bytes(content[: len(content) // 2])
            raise OSError(28, "No space left on device")
        real(path, content)

    for module in (checkpoint, run_folder):
        monkeypatch.setattr(module, "write_synced", write)
    tensors = {"a/momentum": torch.ones(3)}
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(run, 3, loaded.config, loaded.serializer, loaded.model, tensors, {})
    monkeypatch.undo()
    assert resolve(run).name == "step-00000002"
    again = load_checkpoint(run)
    assert all(torch.equal(t, before[n]) for n, t in again.model.state_dict().items())
    assert not list(run.glob(".step-*"))
    save_checkpoint(run, 3, loaded.config, loaded.serializer, loaded.model, tensors, {})
    assert resolve(run).name == "step-00000003"
    assert len(list(run.glob("step-*"))) == 2
    assert (
        load_tensors(resolve(run) / "training" / "optimizer.safetensors")["a/momentum"].sum() == 3
    )


def test_nothing_in_a_checkpoint_is_pickled(newest):
    suffixes = {p.suffix for p in newest.rglob("*") if p.is_file()}
    assert suffixes <= {".json", ".safetensors", ".model"}


def test_a_trainer_saves_where_it_stands(tiny, tmp_path):
    trainer = Trainer(tiny, tmp_path, torch.device("cpu"), make_serializer(tiny))
    trainer.train_step(trainer.mixture.batch(0))
    saved = trainer.save()
    resumed = Trainer.resumed(tiny, tmp_path, torch.device("cpu"))
    assert saved.name == "step-00000001"
    assert resumed.step == 1
    assert torch.equal(resumed.sums, trainer.sums)


@pytest.mark.parametrize("counters", ["", "{}", "[]", '{"sums": null}', '{"sums": [[1.0]]}', None])
def test_counters_that_are_damaged_are_named(run, tiny, counters):
    for number in (2, 1):
        file = run / f"step-0000000{number}" / "training" / "counters.json"
        file.unlink()
        if counters is not None:
            file.write_text(counters)
        with pytest.raises(ValueError, match=rf"{file} is damaged") as caught:
            Trainer.resumed(replace(tiny, steps=2, save_every=1), run, torch.device("cpu"))
        assert ("step-00000001 beside it is whole" in str(caught.value)) == (number == 2)
        (run / "latest").write_text("step-00000001")


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "model.safetensors",
        "text.model",
        "training/optimizer.safetensors",
        "training/counters.json",
    ],
)
def test_an_older_checkpoint_that_is_whole_is_named_and_can_be_gone_on_from(run, tiny, name):
    older, newest = (run / name for name in ("step-00000001", "step-00000002"))
    (newest / name).write_bytes((newest / name).read_bytes()[:-9])
    longer = replace(tiny, steps=2, save_every=1)
    with pytest.raises(ValueError, match="step-00000001 beside it is whole") as caught:
        train(longer, run, device="cpu")
    told = str(caught.value)
    assert str(newest) in told
    assert f"write step-00000001 into {run / 'latest'} to go on from there" in told
    assert told.count("is whole") == 1
    (run / "latest").write_text("step-00000001")
    assert train(longer, run, device="cpu") == newest
    assert load_checkpoint(run).step == 2
    # nothing is promised where the older one is damaged too
    for folder in (older, newest):
        (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="damaged or truncated") as caught:
        load_checkpoint(run)
    assert "whole" not in str(caught.value)


def test_a_latest_that_names_nothing_is_told(run):
    for text, told in (("", "is empty: it should name a"), ("step-9", "names 'step-9', which is")):
        (run / "latest").write_text(text)
        with pytest.raises(ValueError, match=f"latest {told}.*step-00000002 beside it is whole"):
            load_checkpoint(run)
