"""Runs that begin with a checkpoint of gato: its weights, tasks and ids go on in other sizes."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from gato.checkpoint import build_model, load_checkpoint, load_tensors, save_checkpoint
from gato.fitting import make_serializer
from gato.lora import LoraConfig, merge_lora
from gato.tokenizers.serializer import Serializer
from gato.tokenizers.vocabulary import VocabularyLayout
from gato.train import Trainer, train
from gato.warm_start import open_start

CPU = torch.device("cpu")


def test_a_new_run_begins_with_a_checkpoints_weights_tasks_and_scales(tiny, tmp_path, capsys):
    first = load_checkpoint(train(replace(tiny, steps=2), tmp_path / "first"))
    start = open_start(tmp_path / "first")
    other = replace(tiny, corpora=(tiny.corpora[2], tiny.corpora[0]), seed=9, text_pieces=77)
    other = replace(
        other, model=replace(tiny.model, context=128, layers=1), lora=LoraConfig(rank=2)
    )
    config = start.settle(replace(other, steps=1))
    assert (config.model.layers, config.model.context, config.text_pieces) == (2, 128, 300)
    assert config.init_from == str(first.path.resolve())
    known = start.serializer(config.codec)
    made = make_serializer(config, known=known)
    assert made.layout.ranges == first.serializer.layout.ranges
    assert set(made.tasks) == set(first.serializer.tasks)
    for name, task in first.serializer.tasks.items():
        assert made.tasks[name].observation == task.observation  # with its scales
    trainer = Trainer(config, tmp_path / "x", CPU, made, begin=start.fill)
    merged = trainer.model.eval()
    merge_lora(merged)
    for name, value in first.model.state_dict().items():
        assert torch.equal(merged.state_dict()[name], value), name
    saved = train(config, tmp_path / "second", start=start)
    assert load_checkpoint(saved).step == 1
    assert "begun with the weights of" in capsys.readouterr().err


def test_more_and_fewer_joint_actions_begin_with_the_average_of_what_there_is(
    tiny, tiny_text_model, tmp_path
):
    arm, joint = tiny.corpora[0], ("joint.scale.weight", "joint.shift.weight")
    began = replace(tiny, corpora=(replace(arm, joint=1),), ema=0.9, steps=2)
    saved = train(began, tmp_path / "run", text_model=tiny_text_model)
    average, last = (load_tensors(saved / f"{n}.safetensors") for n in ("ema", "model"))
    assert not torch.equal(average["table.weight"], last["table.weight"])
    for more in (3, 0):
        start = open_start(saved)
        config = start.settle(replace(tiny, corpora=(replace(arm, joint=more),)))
        serializer = make_serializer(config, known=start.serializer(config.codec))
        model = build_model(config, serializer)
        notes = start.fill(model, serializer)
        own = model.state_dict()
        for name in joint if more else ():
            rows = len(average[name])
            assert len(own[name]) == 3 * rows
            assert torch.equal(own.pop(name)[:rows], average[name])
        assert all(torch.equal(value, average[name]) for name, value in own.items())
        lost = sorted(set(average) - set(own) - set(joint if more else ()))
        assert sorted(note.split(" of ")[0] for note in notes[1:]) == lost
        assert bool(lost) == (more == 0)
        assert all("has no place in this run" in note for note in notes[1:])


@pytest.mark.parametrize("tied", [True, False])
def test_a_ledger_that_lacks_a_range_gets_one_behind_its_own(tiny, tiny_text_model, tmp_path, tied):
    now = make_serializer(replace(tiny, corpora=tiny.corpora[2:3]), tiny_text_model)
    ranges = tuple(row for row in now.layout.ranges if row[0] != "discrete")
    lacking = Serializer(tiny.codec, now.state(), VocabularyLayout(ranges))
    config = replace(tiny, model=replace(tiny.model, tied=tied))
    before = build_model(config, lacking)
    start = open_start(save_checkpoint(tmp_path / "run", 1, config, lacking, before))
    serializer = start.serializer(start.settle(config).codec)
    assert serializer.layout.ranges == (*ranges, ("discrete", 1024))
    model = build_model(config, serializer)
    drawn = model.table.weight.detach().clone()
    assert len(start.fill(model, serializer)) == 1
    had, found = before.table.weight, model.table.weight
    assert torch.equal(found[: len(had) - 1], had[:-1])
    assert torch.equal(found[len(had) - 1 : -1], drawn[len(had) - 1 : -1])
    assert torch.equal(found[-1], had[-1]), "the row of no id stays the last"
    if not tied:
        assert torch.equal(model.head.weight[: len(before.head.weight)], before.head.weight)


def test_a_ledger_of_other_control_tokens_is_refused(tiny, tmp_path):
    saved = train(replace(tiny, steps=1), tmp_path / "run")
    for name, keys in (("config.json", ("serializer", "layout")), ("vocabulary.json", ())):
        found = json.loads((saved / name).read_text())
        place = found
        for key in keys:
            place = place[key]
        place["control_tokens"][5:7] = ["<person>", "<machine>"]
        (saved / name).write_text(json.dumps(found))
    start = open_start(saved)
    codec = start.settle(tiny).codec
    with pytest.raises(ValueError, match="control tokens"):
        start.serializer(codec)
