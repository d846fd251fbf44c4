"""Pictures matched with words: which pairs a batch has, the loss, and runs that learn by it."""

from __future__ import annotations

import json
import math
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import training_processes as processes
from torch import Tensor

from gato.checkpoint import load_checkpoint, load_tensors
from gato.contrast import SHARPEST, ContrastHead, pair_losses
from gato.corpora import CorpusConfig, open_corpus
from gato.envs.store import RecordWriter
from gato.fitting import make_serializer
from gato.matching import Matcher
from gato.mixture import Mixture
from gato.monitor import numbers
from gato.run_folder import resolve
from gato.train import Trainer, train

CPU = torch.device("cpu")
COLOURS = {"red": 0, "green": 1, "blue": 2}


@pytest.fixture
def matched(tiny):
    """Return the tiny run, its captions matched."""
    corpora = (replace(c, contrast=0.5 * (c.name == "pictures")) for c in tiny.corpora)
    return replace(tiny, corpora=tuple(corpora), steps=12, save_every=6)


def mixture(config, text_model, **changes):
    serializer = make_serializer(config, text_model)
    corpora = [open_corpus(c, serializer) for c in config.corpora]
    made = Mixture.of(config, corpora, serializer)
    if not changes:
        return made
    size = {"rows": config.rows, "row_length": config.model.context, "seed": config.seed}
    return Mixture(corpora, serializer, **{**size, **changes})


# ---- the loss ----------------------------------------------------------------------------------


def slow_losses(near: Tensor, which: Tensor) -> list[float]:
    """The loss of each pair as UniCL writes it, one logarithm after another."""
    found = []
    for i, text in enumerate(which.tolist()):
        to_said = -torch.log(near[i, text].exp() / near[i].exp().sum())
        to_shown = -torch.log(near[i, text].exp() / near[:, text].exp().sum())
        alike = (which == text).sum()
        found.append(float((to_said + to_shown - torch.log(alike)) / 2))
    return found


def test_the_loss_is_that_of_the_formula():
    generator = torch.Generator().manual_seed(0)
    which = torch.tensor([0, 1, 1, 2, 0, 1])
    near = torch.randn(6, 3, generator=generator, dtype=torch.float64)
    assert pair_losses(near, which).tolist() == pytest.approx(slow_losses(near, which))


def test_pictures_of_equal_words_are_not_pushed_apart():
    which = torch.tensor([0, 0, 1])
    near = 50.0 * F.one_hot(which, 2).double()
    assert pair_losses(near, which).abs().max() < 1e-12  # all is as it should be
    # were equal words told apart, the first two pictures would share what one of them gets
    apart = 50.0 * (which[:, None] == which[None, :]).double()
    assert pair_losses(apart, torch.arange(3))[0] > 0.6


def test_a_single_text_teaches_nothing_and_breaks_nothing():
    near = torch.zeros(3, 1, requires_grad=True)
    loss = pair_losses(near, torch.zeros(3, dtype=torch.int64))
    loss.sum().backward()
    assert loss.abs().max() < 1e-6
    assert near.grad.abs().max() < 1e-6


def test_embeddings_are_unit_vectors_and_the_factor_is_bounded():
    torch.manual_seed(0)
    head = ContrastHead(16)
    for embed in (head.embed_shown, head.embed_said):
        assert torch.allclose(embed(torch.randn(5, 16)).norm(dim=1), torch.ones(5))
    with torch.no_grad():
        head.log_scale.fill_(9.0)
    assert head.scale.item() == pytest.approx(SHARPEST)


def test_a_factor_beyond_its_bound_comes_down(matched, tiny_text_model, tmp_path):
    config = replace(matched, optim=replace(matched.optim, warmup=0))
    trainer = Trainer(config, tmp_path, CPU, make_serializer(config, tiny_text_model))
    factor = trainer.model.contrast.log_scale
    with torch.no_grad():
        factor.fill_(math.log(SHARPEST) + 0.5)  # far too sharp for what has learnt nothing
    seen = []
    for k in range(4):
        trainer.train_step(trainer.mixture.part(k, 0))
        seen.append(factor.item())
    assert seen[0] == pytest.approx(math.log(SHARPEST))
    assert seen[0] > seen[1] > seen[2] > seen[3]


def test_the_head_computes_in_float32_under_autocast():
    torch.manual_seed(0)
    head, states = ContrastHead(16), torch.randn(4, 16)
    which = torch.arange(4)
    with torch.autocast("cpu", torch.bfloat16):
        low, _ = head(states, states, which)
    high, _ = head(states, states, which)
    assert torch.equal(low, high)


# ---- which pairs a batch has -------------------------------------------------------------------


def slow_pairs(made: Mixture, index: int, part: int) -> list[tuple[str, tuple[int, ...]]]:
    """The (corpus, text ids) of every caption of a part, in order, read from its sequences."""
    separator = made.serializer.control["<sep>"]
    found = []
    for row in made.rows_of(index, part):
        for which, sequence in row:
            ids = sequence.ids.tolist()
            if made.names[which] == "pictures":
                found.append(("pictures", tuple(ids[ids.index(separator) + 1 :])))
    return found


def test_a_part_has_every_caption_and_each_text_once(matched, tiny_text_model):
    made = mixture(matched, tiny_text_model)
    control = made.serializer.control
    for k in range(6):
        batch = made.part(k, 0)
        batch.validate()
        wanted, m = slow_pairs(made, k, 0), batch.matches
        assert len(m) == len(wanted) > 0
        assert {made.names[c] for c in m.corpus} == {"pictures"}
        assert (m.weight == 0.5).all()
        assert (batch.inputs[m.shown_at] == control["<sep>"]).all()
        assert (batch.inputs[m.said_at] == control["<eos>"]).all()
        texts = []
        for at in m.said_at:
            document = np.flatnonzero(batch.document == batch.document[at])
            assert batch.inputs[document[0]] == control["<bos>"]
            assert document[-1] == at >= 4 * 96  # behind all rows of the mixture
            texts.append(tuple(batch.inputs[document[1:]].tolist()))
        assert len(set(texts)) == len(texts)
        assert [texts[t] for t in m.said] == [text for _, text in wanted]


def test_nothing_else_of_a_batch_changes(matched, tiny, tiny_text_model):
    made, bare = mixture(matched, tiny_text_model), mixture(tiny, tiny_text_model)
    assert bare.matcher is None
    assert bare.part(0, 0).matches is None
    for k in range(3):
        a, b = made.part(k, 0), bare.part(k, 0)
        n = len(b.inputs)
        assert (a.rows, len(a.inputs)) == (b.rows + made.matcher.rows, n + 96 * made.matcher.rows)
        for name in ("inputs", "local", "position"):
            assert np.array_equal(getattr(a, name)[:n], getattr(b, name)), name
        for name in ("target_at", "target_ids", "target_weight", "target_corpus"):
            assert np.array_equal(getattr(a, name), getattr(b, name)), name


def test_pairs_are_those_of_a_part(matched, tiny_text_model):
    made = mixture(matched, tiny_text_model, parts=2)
    for part in (0, 1):
        batch = made.part(3, part)
        batch.validate()
        pairs = slow_pairs(made, 3, part)
        assert len(pairs) == (0 if batch.matches is None else len(batch.matches))
        assert batch.rows == 2 + made.matcher.rows
    whole = made.batch(3)
    whole.validate()
    both = slow_pairs(made, 3, 0) + slow_pairs(made, 3, 1)
    assert len(whole.matches) == len(both)


def test_what_is_no_whole_caption_is_no_pair(matched, tiny_text_model):
    serializer = make_serializer(matched, tiny_text_model)
    matcher = Matcher((1.0,), serializer.control, 96)
    image = np.zeros((16, 32, 3), np.uint8)
    caption = serializer.caption(image, "a red box")
    at, said = matcher.halves(caption)
    assert at == 3
    assert said.ids.tolist() == serializer.document("a red box").ids.tolist()
    assert not said.target.any()
    question = {"role": "user", "content": [{"type": "image", "image": image}]}
    for other in (
        serializer.document("a red box"),
        caption.slice(0, len(caption) - 1),  # its end is cut off
        serializer.pairs([caption, caption]),
        serializer.conversation([question, {"role": "assistant", "content": "a red box"}]),
    ):
        assert matcher.halves(other) is None


def test_words_that_do_not_fit_are_left_out_with_their_pictures(matched, tiny_text_model):
    serializer = make_serializer(matched, tiny_text_model)
    images = np.arange(4, dtype=np.uint8)[:, None, None, None] * np.ones((1, 16, 32, 3), np.uint8)
    texts = ("red", "blue", "red", "green")
    row = [(0, serializer.caption(i, text)) for i, text in zip(images, texts, strict=True)]
    lengths = [len(serializer.document(text)) for text in ("red", "blue", "green")]
    matcher = Matcher((1.0,), serializer.control, lengths[0] + lengths[2], rows=1)
    words, matches = matcher.match([row])
    kept = ["red", "green"] if lengths[1] > lengths[2] else ["red", "blue"]
    assert [w.ids.tolist() for w in words[0]] == [serializer.document(t).ids.tolist() for t in kept]
    assert matches.said.tolist() == [0, 0, 1] if "green" in kept else [0, 1, 0]
    assert matcher.match([[(0, serializer.document("red"))]]) == ([[]], None)


def test_of_a_picture_with_several_texts_one_is_matched(matched, tiny_text_model):
    serializer = make_serializer(matched, tiny_text_model)
    box, ball = np.zeros((16, 32, 3), np.uint8), np.ones((16, 32, 3), np.uint8)
    told = ((box, "red"), (ball, "blue"), (box, "green"), (box, "red"), (ball.copy(), "red"))
    row = [(0, serializer.caption(image, text)) for image, text in told]
    words, matches = Matcher((1.0,), serializer.control, 96, rows=1).match([row])
    kept = [serializer.document(text).ids.tolist() for text in ("red", "blue")]
    assert [w.ids.tolist() for w in words[0]] == kept, "green is true of the box as well"
    ends = np.cumsum([len(sequence) for _, sequence in row])
    starts = ends - [len(sequence) for _, sequence in row]
    assert matches.shown_at.tolist() == [starts[i] + 3 for i in (0, 1, 3)]
    assert matches.said.tolist() == [0, 1, 0]


def test_a_corpus_without_captions_is_refused(matched, tiny_text_model):
    corpora = tuple(replace(c, contrast=1.0 * (c.name == "talks")) for c in matched.corpora)
    with pytest.raises(ValueError, match=r"'talks': contrast=1.0 matches pictures and their capt"):
        mixture(replace(matched, corpora=corpora), tiny_text_model)


def test_settings_are_checked():
    for wrong in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="contrast must be a number of at least 0"):
            CorpusConfig("a", "b", contrast=wrong)
    with pytest.raises(ValueError, match="pairs must be 1 beside contrast"):
        CorpusConfig("a", "b", contrast=1.0, pairs=5)


def test_episodes_say_that_it_has_no_effect(matched, tiny_text_model):
    arm = replace(matched.corpora[0], contrast=1.0)
    serializer = make_serializer(matched, tiny_text_model)
    notes = open_corpus(arm, serializer).notes()
    assert any("contrast = 1.0 has no effect" in note for note in notes)


# ---- training ----------------------------------------------------------------------------------


def trainer_of(config, text_model, folder):
    return Trainer(config, folder, CPU, make_serializer(config, text_model))


def test_the_rest_begins_as_without_the_head(matched, tiny, tiny_text_model, tmp_path):
    a, b = (trainer_of(c, tiny_text_model, tmp_path) for c in (matched, tiny))
    assert b.model.contrast is None
    without = b.model.state_dict()
    assert {n for n in a.model.state_dict() if n not in without} == {
        "contrast.log_scale",
        "contrast.shown.weight",
        "contrast.said.weight",
    }
    for name, tensor in without.items():
        assert torch.equal(a.model.state_dict()[name], tensor), name
    # and so do the tokens' losses of the first step
    for trainer in (a, b):
        trainer.train_step(trainer.mixture.part(0, 0))
    assert torch.allclose(a.sums[:2], b.sums, rtol=1e-5)


def test_gradients_of_a_step_are_those_of_both_losses(matched, tiny_text_model, tmp_path):
    trainer = trainer_of(matched, tiny_text_model, tmp_path)
    batch = trainer.mixture.part(0, 0)
    loss, *_ = trainer._backward(0, batch)
    got = {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}
    trainer.model.zero_grad()
    torch.manual_seed(matched.seed * 1_000_003)
    tensors = batch.to(CPU)
    hidden = trainer.model(tensors)
    nll = trainer.model.batch_nll(hidden, tensors)
    m, head = tensors.matches, trainer.model.contrast
    shown = F.normalize(hidden[m.shown_at] @ head.shown.weight.T, dim=1)
    said = F.normalize(hidden[m.said_at] @ head.said.weight.T, dim=1)
    near = head.log_scale.exp() * shown @ said.T
    tokens = matched.rows * matched.model.context
    apart = pair_losses(near, m.said)
    whole = (nll * tensors.target_weight).sum() / tokens + 0.5 * apart.mean()
    whole.backward()
    assert loss.item() == pytest.approx(whole.item(), rel=1e-6)
    wanted = {n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None}
    assert got.keys() == wanted.keys()
    assert "contrast.log_scale" in got
    for name, gradient in wanted.items():
        assert torch.allclose(got[name], gradient, atol=1e-6), name


def test_a_run_learns_to_match_and_says_so(matched, tiny_text_model, tmp_path):
    seen = []
    config = replace(matched, steps=80, save_every=80, log_every=10)
    train(config, tmp_path, device="cpu", text_model=tiny_text_model, on_progress=seen.append)
    lines = [json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    first, last = lines[0]["contrast"]["pictures"], lines[-1]["contrast"]["pictures"]
    assert last["accuracy"] > 0.95 > first["accuracy"]
    assert last["loss"] < 0.2 < first["loss"]
    assert seen[-1].contrast == lines[-1]["contrast"]
    assert "pictures matched 1.00" in seen[-1].figures()
    assert ("contrast/pictures/accuracy", last["accuracy"]) in list(numbers(lines[-1]))


def test_an_interrupted_run_ends_as_another(matched, tiny_text_model, tmp_path):
    options = {"device": "cpu", "text_model": tiny_text_model}
    config = replace(matched, ema=0.9)
    train(config, tmp_path / "whole", **options)

    class Stopped(Exception):
        pass

    def stop(progress):
        if progress.step == 8:
            raise Stopped

    with pytest.raises(Stopped):
        train(config, tmp_path / "cut", on_progress=stop, **options)
    train(config, tmp_path / "cut", **options)
    for name in ("model.safetensors", "ema.safetensors", "training/optimizer.safetensors"):
        a, b = (load_tensors(resolve(tmp_path / run) / name) for run in ("whole", "cut"))
        assert a.keys() == b.keys()
        assert all(torch.equal(a[k], b[k]) for k in a), name
    logs = [(tmp_path / run / "metrics.jsonl").read_text() for run in ("whole", "cut")]
    told = [[json.loads(x).get("contrast") for x in log.splitlines()] for log in logs]
    assert told[0] == told[1]
    assert load_checkpoint(tmp_path / "whole").model.contrast is not None


def test_batches_do_not_depend_on_what_was_drawn_before_nor_on_the_process(
    matched, tiny_text_model
):
    first, second = (mixture(matched, tiny_text_model) for _ in range(2))
    wanted = [first.part(k, 0).matches for k in range(5)]
    sent = pickle.loads(pickle.dumps(second))  # as a worker gets it
    for k in (3, 0, 4):
        got = pickle.loads(pickle.dumps(sent.part(k, 0))).matches
        for name, column in vars(wanted[k]).items():
            assert np.array_equal(getattr(got, name), column), name


@pytest.mark.slow
def test_two_processes_equal_one(matched, tmp_path):
    parted = replace(matched, steps=6, parts=2)
    train(parted, tmp_path / "one", device="cpu")
    assert processes.train_ranks(2, replace(parted, parts=1), tmp_path / "two") == [0, 0]
    ends = [load_tensors(resolve(tmp_path / run) / "model.safetensors") for run in ("one", "two")]
    assert all(torch.equal(ends[0][k], ends[1][k]) for k in ends[0])


def test_padded_batches_are_matched_alike(matched, tiny_text_model, tmp_path):
    trainer = trainer_of(matched, tiny_text_model, tmp_path)
    batch = trainer.mixture.part(1, 0)
    capacities = trainer.room()
    capacities.measure([batch])
    padded = capacities.pad(batch)
    found = []
    for given in (batch, padded):
        trainer.model.zero_grad()
        *_, told = trainer._backward(0, given)
        found.append(told)
    assert torch.allclose(*found, atol=1e-5)


def test_captions_that_all_differ_find_room(tiny, tiny_text_model, tmp_path):
    rng = np.random.default_rng(0)
    with RecordWriter(tmp_path / "many", "many") as writer:
        for i in range(300):
            image = rng.integers(0, 256, (16, 16, 3), np.uint8)
            writer.append({"kind": "caption", "image": image, "text": f"picture {i}"})
    corpus = CorpusConfig("many", str(tmp_path / "many"), contrast=1.0)
    made = mixture(replace(tiny, corpora=(corpus,)), tiny_text_model)
    assert made.matcher.rows > 1
    for k in range(20):
        batch = made.part(k, 0)
        captions = sum(len(row) for row in made.rows_of(k, 0))
        assert len(batch.matches) >= 0.9 * captions
