"""Runs that begin with other weights: what they remember of them, and how they go on."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny_hf
import training_processes as processes

from gato import cli
from gato.checkpoint import load_checkpoint, load_tensors
from gato.config import TrainConfig
from gato.contents import known_before
from gato.corpora import CorpusConfig
from gato.envs.records import RecordWriter
from gato.lora import LoraConfig
from gato.optim import OptimConfig
from gato.rollouts.evaluate import _refuse_training_seeds
from gato.rollouts.language_tasks import records_of
from gato.run_folder import point, resolve
from gato.selection import held_out
from gato.train import train
from gato.warm_start import open_start


def written(folder: Path, word: str) -> Path:
    """Write a store of texts."""
    with RecordWriter(folder, folder.name) as writer:
        for i in range(40):
            writer.append(
                {"kind": "document", "text": f"{word} ball {i} is near the door", "meta": {}}
            )
    return folder


@pytest.mark.parametrize("held", [0.0, 0.25])
def test_what_a_checkpoint_began_with_was_trained_on_is_remembered(
    tiny: TrainConfig, tmp_path: Path, held: float
) -> None:
    one, two = written(tmp_path / "one", "red"), written(tmp_path / "two", "blue")
    first = replace(tiny, steps=1, corpora=(CorpusConfig("text", str(one), validation=held),))
    began = train(first, tmp_path / "first")
    start = open_start(tmp_path / "first")
    second = replace(
        start.settle(first), steps=2, save_every=1, corpora=(CorpusConfig("text", str(two)),)
    )
    saved = train(second, tmp_path / "second", start=start)
    names = {"text", f"text of {began}"}
    assert set(load_checkpoint(saved).data) == names
    point(tmp_path / "second", "latest", tmp_path / "second" / "step-00000001")
    saved = train(second, tmp_path / "second")  # goes on, with no need of what it began with
    assert set(load_checkpoint(saved).data) == names
    start = open_start(tmp_path / "second")
    third = train(replace(start.settle(second), steps=1), tmp_path / "third", start=start)
    checkpoint = load_checkpoint(third)
    assert set(checkpoint.data) == {*names, f"text of {saved}"}
    others = written(tmp_path / "three", "green")
    assert len(records_of(f"text/{others}", 1 << 30, None, checkpoint).records) == 40
    with pytest.raises(ValueError, match=r"those at .*two were, all of them"):
        records_of(f"text/{two}", 1 << 30, None, checkpoint)
    if held:
        found = records_of(f"text/{one}", 1 << 30, None, checkpoint)
        assert len(found.records) == 10
    else:
        with pytest.raises(ValueError, match=r"those at .*one were, all of them, as .*text of"):
            records_of(f"text/{one}", 1 << 30, None, checkpoint)


def test_seeds_that_a_checkpoint_began_with_are_refused(tiny: TrainConfig, tmp_path: Path) -> None:
    train(replace(tiny, steps=1), tmp_path / "first")
    start = open_start(tmp_path / "first")
    seeds = {"evaluation_seeds": [1 << 30, (1 << 30) + 3]}
    start.saved.data["arm"] |= seeds
    saved = train(replace(start.settle(tiny), steps=1), tmp_path / "second", start=start)
    checkpoint = load_checkpoint(saved)
    del checkpoint.data["arm"]  # its own
    player = SimpleNamespace(checkpoint=checkpoint, name="x")
    with pytest.raises(ValueError, match=r"corpus 'arm of .*first.* holds episodes of seeds"):
        _refuse_training_seeds(player, range(1 << 30, (1 << 30) + 1))
    _refuse_training_seeds(player, range((1 << 30) + 4, (1 << 30) + 9))


def test_the_same_command_goes_on_whatever_became_of_what_it_began_with(
    tiny: TrainConfig, stores: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    begin, run = tmp_path / "begin", tmp_path / "run"
    data = ["--data", f"arm={stores / 'arm'}", "--workers", "0", "--validation", "0"]
    sizes = ["--rows", "2", "--model.context", "512", "--steps", "1", "--save-every", "1"]
    train(replace(tiny, steps=1), begin)
    line = ["train", "quickstart", *data, *sizes, "--out", str(run)]
    warm = [*line, "--init-from", str(begin)]
    assert cli.main(warm) == 0
    kept = load_checkpoint(run)
    assert kept.config.init_from.endswith("step-00000001")
    (begin / "step-00000001").rename(begin / "step-00000002")  # as if it had trained on
    (begin / "latest").write_text("step-00000002")
    assert cli.main(warm) == 0
    shutil.rmtree(begin)
    assert cli.main(warm) == 0
    assert cli.main(line) == 0
    assert load_checkpoint(run).config == kept.config
    capsys.readouterr()
    assert cli.main([*line, "--init-from", str(tmp_path / "other")]) == 2
    assert "leave --init-from out" in capsys.readouterr().err
    assert cli.main([*line, "--model.layers", "3"]) == 2
    assert f"model.layers is 2 in {run}" in capsys.readouterr().err
    assert cli.main([*warm, "--no-resume"]) == 2  # which needs the weights
    assert "expected --init-from as" in capsys.readouterr().err


def test_what_is_held_out_although_it_was_learnt_is_told(
    tiny: TrainConfig, stores: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpora = [replace(c, validation=0.2 * (c.name == "words")) for c in tiny.corpora]
    train(replace(tiny, steps=1, corpora=tuple(corpora)), tmp_path / "begin")
    line = ["train", "quickstart", "--init-from", str(tmp_path / "begin"), "--workers", "0"]
    line += ["--rows", "1", "--model.context", "512", "--steps", "1"]
    for name, held, told in (
        ("talks", 0.2, True),
        ("talks", 0.0, False),
        ("words", 0.1, True),  # most of it was no part of the 0.2
        ("words", 0.2, False),
        ("more", 0.2, False),
    ):
        place = written(tmp_path / "more", "blue") if name == "more" else stores / name
        run = [*line, "--data", f"mine={place}", "--out", str(tmp_path / f"{name}{held}")]
        capsys.readouterr()
        assert cli.main([*run, "--validation", str(held)]) == 0
        assert (f"learnt what is held out, as {name} of" in capsys.readouterr().err) == told


@pytest.mark.parametrize(("before", "now"), [(0.1, 0.02), (0.25, 0.02), (0.02, 0.1)])
def test_what_one_share_holds_out_another_learns(before: float, now: float) -> None:
    learnt, held = ~held_out(10_000, before, "x"), held_out(10_000, now, "x")
    assert (learnt & held).sum() > 0.7 * held.sum()
    said = {"a of run": {"validation": before, "stores": {"x": "1"}}}
    (note,) = known_before({"b": (now, {"stores": {"x": "1"}})}, said)
    assert f"as a of run (which held out {before:g})" in note
    same = {"b": (before, {"stores": {"x": "1"}}), "c": (before, {"stores": {"y": "1"}})}
    (note,) = known_before(same, said)
    assert f"'c' holds out {before:g}" in note
    assert "by another name" in note


def test_two_processes_that_begin_with_a_language_model_end_as_one(
    tiny: TrainConfig, tmp_path: Path
) -> None:
    tiny_hf.make("smollm2_base", tmp_path / "hf")
    start = open_start(tmp_path / "hf")
    config = replace(
        start.settle(tiny),
        steps=3,
        parts=2,
        ema=0.9,
        lora=LoraConfig(rank=2),
        freeze=("embedders",),
        optim=OptimConfig(rates={"text": 0.0, "control": 0.5, "lora": 2.0}),
    )
    alone, both = tmp_path / "alone", tmp_path / "both"
    train(config, alone, start=start)
    assert processes.train_ranks(2, config, both, start=open_start(tmp_path / "hf")) == [0, 0]
    for name in ("model.safetensors", "ema.safetensors", "training/optimizer.safetensors"):
        a, b = (load_tensors(resolve(run) / name) for run in (alone, both))
        assert a.keys() == b.keys()
        assert max(float((a[k] - b[k]).abs().max()) for k in a) < 1e-5, name
    learnt = load_checkpoint(alone, averaged=False, merged=False).model.state_dict()
    assert max(float(t.abs().max()) for n, t in learnt.items() if n.endswith(".up")) > 0.0
