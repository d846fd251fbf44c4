"""Held-out loss: the same batches always, counted as training counts, and nothing of it is felt."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from gato.checkpoint import load_checkpoint, load_tensors
from gato.config import TrainConfig
from gato.corpora import open_corpus
from gato.fitting import make_serializer
from gato.mixture import Mixture
from gato.train import Trainer, train
from gato.validation import Validator

CPU = torch.device("cpu")


@pytest.fixture
def held(tiny: TrainConfig) -> TrainConfig:
    """Return the tiny run with a fifth of every corpus held out, its bins spread in training."""
    return replace(
        tiny,
        model=replace(tiny.model, soft_bins=2.0),
        corpora=tuple(replace(c, validation=0.4) for c in tiny.corpora),
        validate_batches=2,
        validate_every=5,
        steps=10,
    )


@pytest.fixture
def trainer(held: TrainConfig, tmp_path: Path) -> Trainer:
    return Trainer(held, tmp_path / "run", CPU, make_serializer(held))


def lines(run: Path, kind: str) -> list[dict]:
    every = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "time"} for line in every if kind in line]


def assert_same_weights(first: Path, second: Path) -> None:
    for name in ("model.safetensors", "training/optimizer.safetensors"):
        a, b = (load_tensors(load_checkpoint(run).path / name) for run in (first, second))
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a)


def test_a_run_with_validation_ends_with_the_weights_of_one_without(held, tmp_path):
    train(held, tmp_path / "with", device="cpu")
    train(replace(held, validate_every=0), tmp_path / "without", device="cpu")
    assert [line["step"] for line in lines(tmp_path / "with", "validation")] == [5, 10]
    assert lines(tmp_path / "without", "validation") == []
    losses = [
        [(line["step"], line["losses"]) for line in lines(tmp_path / name, "losses")]
        for name in ("with", "without")
    ]
    assert losses[0] == losses[1]
    assert_same_weights(tmp_path / "with", tmp_path / "without")


def test_the_loss_on_what_was_never_trained_on_falls(held, tmp_path):
    """Where what is held out follows from what is seen; of 16 episodes an arm learns by heart."""
    train(replace(held, steps=60, validate_every=10), tmp_path, device="cpu")
    first, *_, last = (line["validation"] for line in lines(tmp_path, "validation"))
    for name in ("grid", "pictures", "talks"):
        assert last[name]["loss"] < 0.8 * first[name]["loss"], name
        assert last[name]["perplexity"] < first[name]["perplexity"], name


def test_validation_leaves_the_model_and_the_random_numbers_as_they_are(trainer):
    torch.manual_seed(5)
    expected = torch.rand(4)
    torch.manual_seed(5)
    figures = trainer.validator.run(trainer.model, CPU)
    assert torch.equal(torch.rand(4), expected)
    assert all(module.training for module in trainer.model.modules())
    assert all(p.grad is None for p in trainer.model.parameters())
    trainer.model.eval()
    assert trainer.validator.run(trainer.model, CPU) == figures
    assert not trainer.model.training


def test_the_same_batches_are_measured_every_time_and_for_every_seed(trainer, held, tmp_path):
    first = trainer.validator.run(trainer.model, CPU)
    for k in range(3):
        trainer.train_step(trainer.mixture.batch(k))
    assert trainer.validator.run(trainer.model, CPU) != first
    other = Trainer(replace(held, seed=9), tmp_path / "other", CPU, trainer.serializer)
    for name, mixture in trainer.validator.mixtures.items():
        for k in range(held.validate_batches):
            mine, theirs = mixture.batch(k), other.validator.mixtures[name].batch(k)
            assert np.array_equal(mine.inputs, theirs.inputs)
            assert np.array_equal(mine.target_ids, theirs.target_ids)


def test_shares_of_several_processes_add_up(trainer):
    whole = trainer.validator.sums(trainer.model, CPU)
    parts = [trainer.validator.sums(trainer.model, CPU, share=(i, 3)) for i in range(3)]
    assert float(parts[2].sum()) == 0.0  # there are two batches for three processes
    torch.testing.assert_close(sum(parts), whole)


def test_the_loss_is_what_training_counts_on_the_same_batches(trainer, held):
    """One batch at a time through the code of training, in a model without chance of its own."""
    corpora = [open_corpus(c, trainer.serializer) for c in held.corpora]
    validator = Validator(
        corpora, trainer.serializer, rows=held.rows, row_length=held.model.context, batches=2
    )
    found = validator.run(trainer.model, CPU)["validation"]
    trainer.model.eval()
    names = trainer.mixture.names
    for corpus in corpora:
        name = corpus.config.name
        alone = Mixture(
            [corpus.held_out()], trainer.serializer, rows=held.rows, row_length=held.model.context
        )
        trainer.sums.zero_()
        for k in range(2):
            batch = alone.batch(k)
            batch.target_corpus = np.full_like(batch.target_corpus, names.index(name))
            _, nll, corpus_of, _ = trainer._backward(0, batch)
            trainer.sums[0].index_add_(0, corpus_of, nll.double())
            trainer.sums[1].index_add_(0, corpus_of, torch.ones_like(nll).double())
        total, count = trainer.sums[:, names.index(name)].tolist()
        assert found[name]["targets"] == count
        assert found[name]["loss"] == pytest.approx(total / count, rel=1e-6)


def test_perplexity_and_modalities_agree_with_a_plain_loop(trainer):
    found = trainer.validator.run(trainer.model, CPU)["validation"]
    model = trainer.model.eval()
    for name, mixture in trainer.validator.mixtures.items():
        nll: dict[str, list[float]] = {}
        for k in range(trainer.validator.batches):
            batch = mixture.batch(k).to(CPU)
            with torch.no_grad():
                logits = model.logits(model(batch)).log_softmax(-1)
            for at, target, modality in zip(
                batch.target_at, batch.target_ids, batch.target_modality, strict=True
            ):
                kind = trainer.serializer.names[int(modality)]
                nll.setdefault(kind, []).append(-float(logits[int(at) - 1, int(target)]))
        assert found[name]["by_modality"].keys() == nll.keys()
        for kind, values in nll.items():
            cell = found[name]["by_modality"][kind]
            assert cell["targets"] == len(values)
            assert cell["perplexity"] == pytest.approx(math.exp(np.mean(values)), rel=1e-4)
        every = [v for values in nll.values() for v in values]
        assert found[name]["perplexity"] == pytest.approx(math.exp(np.mean(every)), rel=1e-4)


def test_the_mean_goes_by_the_weights(trainer, held):
    line = trainer.validator.run(trainer.model, CPU)
    weights = {c.name: c.weight for c in held.corpora}
    total = sum(weights[name] * row["loss"] for name, row in line["validation"].items())
    assert line["validation_loss"] == pytest.approx(total / sum(weights.values()))


def test_a_loss_that_is_no_number_is_null_and_has_no_mean(trainer):
    with torch.no_grad():
        trainer.model.table.weight.fill_(float("nan"))
    line = trainer.validator.run(trainer.model, CPU)
    assert "validation_loss" not in line
    assert {row["loss"] for row in line["validation"].values()} == {None}
    assert "NaN" not in json.dumps(line)


def test_what_is_held_out_is_never_trained_on(trainer):
    for corpus in trainer.mixture.corpora:
        other = corpus.held_out()
        trained, measured = (
            {
                (store.path, int(i))
                for store, items in zip(c.stores, c.items, strict=True)
                for i in items
            }
            for c in (corpus, other)
        )
        assert measured
        assert not trained & measured


def test_an_interrupted_run_measures_what_an_uninterrupted_one_does(held, tmp_path):
    train(held, tmp_path / "whole", device="cpu")
    first = Trainer(held, tmp_path / "parts", CPU, make_serializer(held))
    step = first.train_step

    def stopped(*parts) -> None:
        step(*parts)
        if first.step == 7:
            first.stop.reason = "SIGTERM"

    first.train_step = stopped
    first.run()
    train(held, tmp_path / "parts", device="cpu")
    both = [lines(tmp_path / name, "validation") for name in ("whole", "parts")]
    assert both[0] == both[1]
    assert len(both[0]) == 2


def test_validation_needs_something_held_out(tiny, tmp_path):
    with pytest.raises(ValueError, match="none of arm, grid, words, pictures, talks does"):
        train(replace(tiny, validate_every=5), tmp_path)
