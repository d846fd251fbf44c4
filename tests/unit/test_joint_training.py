"""Joint actions in training: what corpora draw, what is measured, and going on bit for bit."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch

from gato import bad_batch, cli
from gato.checkpoint import load_checkpoint
from gato.corpora import CorpusConfig, open_corpus
from gato.fitting import make_serializer
from gato.kept import bytes_of
from gato.show import show
from gato.tokenizers.describe import describe
from gato.train import Trainer

CPU = torch.device("cpu")


def with_joint(config, **chunks: int):
    """Return a configuration whose corpora of these names are joint, by so many actions."""
    corpora = tuple(
        replace(c, joint=chunks[c.name]) if c.name in chunks else c for c in config.corpora
    )
    return replace(config, corpora=corpora)


@pytest.fixture
def joint(tiny):
    """Return the tiny run with chunks of three in sight and single actions never shown."""
    config = with_joint(tiny, arm=3, grid=1)
    grid = replace(config.corpora[1], hide_actions=1.0)
    return replace(config, corpora=(config.corpora[0], grid, *config.corpora[2:]))


@pytest.mark.parametrize("hide", [0.0, 0.5, 1.0])
def test_windows_look_ahead_however_they_are_read(joint, tiny_text_model, hide) -> None:
    arm = replace(joint.corpora[0], window=2, hide_actions=hide)
    serializer = make_serializer(replace(joint, corpora=(arm,)), tiny_text_model)
    by_window, kept = (open_corpus(arm, serializer) for _ in range(2))
    by_window.kept.largest = 0
    longest = 0
    for seed in range(40):
        a, b = (c.sample(np.random.default_rng(seed), 96) for c in (by_window, kept))
        for name in ("ids", "local", "target"):
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
        np.testing.assert_array_equal(a.hidden, b.hidden)
        for column, other in zip(vars(a.joint).values(), vars(b.joint).values(), strict=True):
            np.testing.assert_array_equal(column, other)
        tokens = 1 if hide == 1.0 else 4  # of a step: five numbers, <sep> and two ids
        step = np.diff(np.unique(a.joint.at))
        assert (step[-1:] == tokens).all()
        longest = max(longest, int(a.joint.slot[a.joint.at == a.joint.at[-1]].max()))
        if 0.0 < hide < 1.0:
            shown = serializer.actions_in(a)
            assert not (a.hidden & ~shown).any()
        assert bytes_of(a) > bytes_of(replace(a, joint=None))
    assert longest == 6  # also at a window's last step


def test_joint_runs_go_on_bit_for_bit(joint, tmp_path) -> None:
    serializer = make_serializer(joint)
    whole = Trainer(joint, tmp_path / "whole", CPU, serializer)
    assert whole.model.joint.slots == 6
    losses = []
    for k in range(8):
        whole.sums.zero_()
        whole.train_step(whole.mixture.batch(k))
        losses.append((whole.sums[0] / whole.sums[1]).tolist())
    first = Trainer(joint, tmp_path / "parts", CPU, make_serializer(joint))
    for k in range(4):
        first.train_step(first.mixture.batch(k))
    first.save()
    second = Trainer.resumed(joint, tmp_path / "parts", CPU)
    for k in range(4, 8):
        second.train_step(second.mixture.batch(k))
    mine, theirs = whole.model.state_dict(), second.model.state_dict()
    assert all(torch.equal(mine[n], theirs[n]) for n in mine)
    assert torch.count_nonzero(mine["joint.ffn.down.weight"]) > 0
    assert losses[-1][0] < losses[0][0]
    loaded = load_checkpoint(tmp_path / "parts")
    assert loaded.serializer.task("toy/arm-v0").history.joint == 3
    assert loaded.serializer.task("toy/grid-v0").history.bare
    batch = whole.mixture.batch(9)
    again = pickle.loads(pickle.dumps(batch))  # as workers send it
    assert again.joint == batch.joint
    np.testing.assert_array_equal(again.state_at, batch.state_at)


def test_validation_counts_joint_targets(joint, tmp_path) -> None:
    corpora = tuple(replace(c, validation=0.2) for c in joint.corpora[:2])
    config = replace(joint, corpora=corpora, validate_every=5)
    trainer = Trainer(config, tmp_path, CPU, make_serializer(config))
    line = trainer.validator.run(trainer.model, CPU)
    for name, modality in (("arm", "continuous"), ("grid", "discrete")):
        mixture = trainer.validator.mixtures[name]
        batches = [mixture.batch(k) for k in range(trainer.validator.batches)]
        row = line["validation"][name]
        assert set(row["by_modality"]) == {modality}
        assert row["targets"] == sum(int((b.target_slot > 0).sum()) for b in batches) > 0
        # of 1024 ids of its own kind, and no others
        assert abs(row["loss"] - np.log(1024)) < 1.0


def test_a_bad_batch_shows_what_stood_beside_it(joint, tmp_path) -> None:
    serializer = make_serializer(joint)
    trainer = Trainer(joint, tmp_path, CPU, serializer)
    batch = trainer.mixture.batch(0)
    nll = np.zeros(len(batch.target_at), np.float32)
    victim = int(np.flatnonzero(batch.target_slot)[-1])
    nll[victim] = np.nan
    part = bad_batch.Part(0, batch, nll)
    bad_batch.refuse(tmp_path, 0, float("nan"), 1.0, [part], trainer.mixture.names, trainer.world)
    found = bad_batch.read(tmp_path / "bad-batch-00000000", 0, serializer)
    document = batch.document[batch.target_at[victim]]
    beside = (batch.document[batch.target_at] == document) & (batch.target_slot > 0)
    start = int(np.flatnonzero(batch.document == document)[0])
    assert not found.target.any()
    np.testing.assert_array_equal(found.joint.at + start, batch.target_at[beside])
    np.testing.assert_array_equal(found.joint.ids, batch.target_ids[beside])
    assert any(row["slot"] for row in describe(serializer, found))


def test_a_joint_stream_is_shown(stores) -> None:
    rows = show(str(stores / "arm"), steps=2, codec="vector", joint=2)
    plain = show(str(stores / "arm"), steps=3, codec="vector")
    asked = [r for r in rows if r["target"]]
    assert [r["slot"] for r in asked] == [1, 2, 3, 4] * 2
    values = [r["value"] for r in plain if r["target"]]
    assert [r["value"] for r in asked] == values[:4] + values[2:6]
    assert {r["modality"] for r in rows if not r["target"]} == {"control", "text", "vector"}
    assert sum(r["value"] == "<sep>" for r in rows) == 0
    with pytest.raises(ValueError, match="joint must be at least 0"):
        show(str(stores / "arm"), joint=-1)


def test_a_joint_stream_whose_actions_are_shown(stores, capsys) -> None:
    store = str(stores / "arm")
    rows = show(store, steps=2, codec="vector", joint=1, shown=True)
    plain = show(store, steps=2, codec="vector")
    stream, beside = ([r for r in rows if bool(r["slot"]) == asked] for asked in (False, True))
    told = ("position", "modality", "id", "value", "local")
    assert [[r[k] for k in told] for r in stream] == [[r[k] for k in told] for r in plain]
    assert not any(r["target"] for r in stream)
    assert [r["value"] for r in beside] == [r["value"] for r in plain if r["target"]]
    assert {r["position"] for r in beside} == {
        r["position"] for r in plain if r["value"] == "<sep>"
    }
    with pytest.raises(ValueError, match="expected joint too"):
        show(store, shown=True)
    asked = ["show", store, "--codec", "vector", "--joint", "1", "--shown", "--json"]
    assert cli.main(asked) == cli.DONE
    assert json.loads(capsys.readouterr().out) == rows


def test_settings_of_joint_corpora_are_checked(tiny, stores, tiny_text_model) -> None:
    with pytest.raises(ValueError, match="joint must not be negative"):
        CorpusConfig("arm", "x", joint=-1)
    with pytest.raises(ValueError, match="0 where returns are predicted"):
        CorpusConfig("arm", "x", joint=1, returns=True)
    words = open_corpus(
        CorpusConfig("words", str(stores / "words"), joint=2), make_serializer(tiny)
    )
    assert any("joint = 2 has no effect" in note for note in words.notes())
    twice = tuple(CorpusConfig(f"arm{j}", str(stores / "arm"), joint=j) for j in (1, 2))
    with pytest.raises(ValueError, match=r"'arm1' and 'arm2'.*joint = 1 and 2"):
        make_serializer(replace(tiny, corpora=twice), tiny_text_model)
