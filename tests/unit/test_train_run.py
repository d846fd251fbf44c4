"""What a run keeps and tells: parts, averaged and best weights, other runs, watchers."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from run_files import checkpoints, lines, same, state, weights

from gato.checkpoint import load_checkpoint, load_tensors
from gato.config import require_same
from gato.contents import digests, require_same_data
from gato.envs.files import lock_folder
from gato.envs.store import EpisodeStore, EpisodeWriter, RecordWriter
from gato.fitting import make_serializer
from gato.optim import Average
from gato.run_folder import pointed_at, resolve
from gato.run_log import Log
from gato.train import Trainer, train

CPU = torch.device("cpu")


@pytest.fixture
def text_model(tiny_text_model) -> bytes:
    return tiny_text_model


# ---- parts -------------------------------------------------------------------------------------


def test_gradients_of_parts_add_up_to_those_of_the_batch(tiny, tmp_path, text_model):
    config = replace(tiny, parts=2)
    parted, whole = (
        Trainer(config, tmp_path, CPU, make_serializer(config, text_model)) for _ in range(2)
    )
    for each in (parted, whole):
        each.model.eval()  # where patches lie is drawn anew for every part
    for k in range(3):
        for part in range(2):
            parted._backward(part, parted.mixture.part(k, part))
        whole._backward(0, whole.mixture.batch(k))
    for name, p in parted.model.named_parameters():
        other = whole.model.get_parameter(name).grad
        torch.testing.assert_close(p.grad, other, rtol=1e-4, atol=1e-6)


def test_parts_must_divide_rows(tiny):
    with pytest.raises(ValueError, match="rows must be a multiple of parts; got 4 rows in 3"):
        replace(tiny, parts=3)


# ---- averaged weights --------------------------------------------------------------------------


def test_the_average_is_that_of_plain_arithmetic():
    model = torch.nn.Linear(2, 1)
    average = Average(model, 0.5)
    expected = model.weight.detach().double().clone()
    for step in range(8):
        with torch.no_grad():
            model.weight += step
        average.update(step)
        kept = min(0.5, (1 + step) / (10 + step))
        expected = kept * expected + (1 - kept) * model.weight.detach().double()
    torch.testing.assert_close(average.values["weight"].double(), expected, rtol=1e-6, atol=1e-6)
    trained = model.weight.detach().clone()
    with average.in_place():
        assert torch.equal(model.weight, average.values["weight"])
    assert torch.equal(model.weight, trained)


def test_a_checkpoint_gives_the_averaged_weights_unless_told(tiny, tmp_path, text_model):
    config = replace(tiny, steps=4, ema=0.9)
    train(config, tmp_path / "run", device="cpu", text_model=text_model)
    train(replace(tiny, steps=4), tmp_path / "plain", device="cpu", text_model=text_model)
    assert same(weights(tmp_path / "run"), weights(tmp_path / "plain"))  # nothing but an average
    averaged = load_checkpoint(tmp_path / "run")
    trained = load_checkpoint(tmp_path / "run", averaged=False)
    assert (averaged.averaged, trained.averaged) == (True, False)
    kept = load_tensors(resolve(tmp_path / "run") / "ema.safetensors")
    assert same(dict(averaged.model.state_dict()), kept)
    assert same(dict(trained.model.state_dict()), weights(tmp_path / "run"))
    assert not same(kept, weights(tmp_path / "run"))
    assert not load_checkpoint(tmp_path / "plain").averaged


def test_a_checkpoint_without_its_average_is_refused(tiny, tmp_path, text_model):
    train(replace(tiny, steps=1, ema=0.9), tmp_path, device="cpu", text_model=text_model)
    (resolve(tmp_path) / "ema.safetensors").unlink()
    with pytest.raises(ValueError, match=r"ema\.safetensors is damaged"):
        load_checkpoint(tmp_path)


def test_checkpoints_from_before_there_were_these_options_go_on(tiny, tmp_path, text_model):
    train(tiny, tmp_path / "whole", device="cpu", text_model=text_model)
    half, old = Trainer(tiny, tmp_path / "old", CPU, make_serializer(tiny, text_model)), None
    for k in range(5):
        half.train_step(half.mixture.batch(k))
    half.save()
    old = resolve(tmp_path / "old") / "config.json"
    described = json.loads(old.read_text())
    for name in ("parts", "ema", "keep_last", "keep_best", "validate_every", "eval_tasks"):
        del described["train"][name]
    old.write_text(json.dumps(described))
    train(tiny, tmp_path / "old", device="cpu", text_model=text_model)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "old"))


# ---- which checkpoints are kept ----------------------------------------------------------------


def evaluated(tiny: Any, **changes: Any) -> Any:
    return replace(
        tiny, steps=12, save_every=100, eval_tasks=("toy/arm-v0",), eval_every=2, **changes
    )


def score(path: Path) -> dict[str, float]:
    """Return a score that is best at step 4."""
    return {"toy/arm-v0": -abs(int(path.name.removeprefix("step-")) - 4)}


def test_the_best_and_the_last_are_kept(tiny, tmp_path, text_model):
    config = evaluated(tiny, keep_best=True, keep_last=1)
    train(config, tmp_path, device="cpu", text_model=text_model, evaluate=score)
    assert list(lines(tmp_path, "evaluation")) == [2, 4, 6, 8, 10, 12]
    assert checkpoints(tmp_path) == [4, 12]
    assert load_checkpoint(tmp_path / "best").step == 4
    assert load_checkpoint(tmp_path / "latest").step == load_checkpoint(tmp_path).step == 12


def test_the_best_has_played_every_task(tiny, tmp_path, text_model):
    config = replace(
        evaluated(tiny, keep_best=True, keep_last=1), eval_tasks=("toy/arm-v0", "toy/grid-v0")
    )

    def partly(path: Path) -> dict[str, float]:
        failed = path.name.endswith("4")  # the best, if the other task had not failed
        return score(path) if failed else {**score(path), "toy/grid-v0": 0.0}

    train(config, tmp_path, device="cpu", text_model=text_model, evaluate=partly)
    assert list(lines(tmp_path, "evaluation")) == [2, 4, 6, 8, 10, 12]
    assert load_checkpoint(tmp_path / "best").step == 2  # the first of equals
    log = Log(tmp_path / "metrics.jsonl", 12, ["toy/arm-v0"])
    log.close()
    assert log.best("evaluation") == 4


def test_a_kill_before_the_best_is_named_does_not_lose_it(tiny, tmp_path, text_model):
    config = evaluated(tiny, keep_best=True, keep_last=1)
    options = {"device": "cpu", "text_model": text_model, "evaluate": score}

    class Killed(BaseException):
        pass

    def kill(path: Path) -> dict[str, float]:
        if path.name.endswith("6"):
            raise Killed
        return score(path)

    with pytest.raises(Killed):
        train(config, tmp_path, **{**options, "evaluate": kill})
    assert checkpoints(tmp_path) == [4, 6]
    (tmp_path / "best").write_text("step-00000002")  # as if it had not come to that
    train(config, tmp_path, **options)
    assert pointed_at(tmp_path, "best") == "step-00000004"
    assert checkpoints(tmp_path) == [4, 12]


@pytest.mark.parametrize("keep_last", [1, 3])
def test_the_newest_are_kept(tiny, tmp_path, text_model, keep_last):
    config = replace(tiny, steps=10, save_every=2, keep_last=keep_last)
    train(config, tmp_path, device="cpu", text_model=text_model)
    assert checkpoints(tmp_path) == [10, 8, 6][:keep_last][::-1]
    assert not (tmp_path / "best").exists()


def test_the_best_by_validation_is_saved_when_it_is_found(tiny, tmp_path, text_model):
    corpora = tuple(replace(c, validation=0.4) for c in tiny.corpora)
    config = replace(
        tiny, corpora=corpora, steps=12, save_every=100, validate_every=3, keep_best=True
    )
    train(config, tmp_path, device="cpu", text_model=text_model)
    found = lines(tmp_path, "validation_loss")
    assert list(found) == [3, 6, 9, 12]
    best = min(found, key=found.__getitem__)
    assert pointed_at(tmp_path, "best") == f"step-{best:08d}"
    assert {best, 12} <= set(checkpoints(tmp_path))


def test_the_best_needs_a_measure(tiny, tmp_path):
    with pytest.raises(ValueError, match="keep_best needs something to be best at"):
        train(replace(tiny, keep_best=True), tmp_path, device="cpu")


def test_an_evaluation_that_was_cut_off_is_done_again(tiny, tmp_path, text_model):
    config, cuts = evaluated(tiny, keep_best=True), []

    def cut(path: Path) -> dict[str, float]:
        if path.name.endswith("4") and not cuts:
            cuts.append(path)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        return score(path)

    options = {"device": "cpu", "text_model": text_model, "evaluate": cut}
    saved = train(config, tmp_path / "cut", **options)
    assert saved.name == "step-00000004"
    assert state(tmp_path / "cut")["state"] == "stopped"
    assert list(lines(tmp_path / "cut", "evaluation")) == [2]
    train(config, tmp_path / "cut", **options)
    train(config, tmp_path / "whole", device="cpu", text_model=text_model, evaluate=score)
    assert lines(tmp_path / "cut", "evaluation") == lines(tmp_path / "whole", "evaluation")
    assert lines(tmp_path / "cut", "losses") == lines(tmp_path / "whole", "losses")
    assert same(weights(tmp_path / "cut"), weights(tmp_path / "whole"))
    assert pointed_at(tmp_path / "cut", "best") == "step-00000004"


def test_a_stop_that_was_asked_for_before_an_evaluation_interrupts_it(tiny, tmp_path, text_model):
    config, played = evaluated(tiny), []

    def play(path: Path) -> dict[str, float]:
        played.append(path.name)
        return score(path)

    trainer = Trainer(config, tmp_path, CPU, make_serializer(config, text_model))
    trainer.evaluate = play
    trainer.save()
    trainer.stop.reason = "SIGTERM"
    trainer._evaluate()  # the signal came after it was asked whether to
    assert played == []
    trainer.step = 4
    trainer.save()

    again = Trainer.resumed(config, tmp_path, CPU)
    again.stop.reason = "SIGTERM"
    again.run(evaluate=play)
    assert (again.step, played) == (4, [])
    train(config, tmp_path, device="cpu", text_model=text_model, evaluate=play)
    assert played == [f"step-{step:08d}" for step in range(4, 13, 2)]


def test_an_evaluation_needs_someone_who_plays(tiny, tmp_path):
    with pytest.raises(ValueError, match="eval_every needs an `evaluate`"):
        train(evaluated(tiny), tmp_path / "run")
    assert not (tmp_path / "run").exists()


# ---- other runs in the folder, and who is told -------------------------------------------------


def test_a_folder_has_one_run_at_a_time(tiny, tmp_path, text_model):
    held = lock_folder(tmp_path, wait=False)
    try:
        with pytest.raises(ValueError, match="is being written by another process"):
            train(tiny, tmp_path, device="cpu", text_model=text_model)
    finally:
        os.close(held)
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_starts_anew_sets_the_old_one_aside(tiny, tmp_path, text_model):
    options = {"device": "cpu", "text_model": text_model}
    train(replace(tiny, steps=3), tmp_path, **options)
    old = weights(tmp_path)
    train(replace(tiny, steps=2, seed=8), tmp_path, resume=False, **options)
    assert load_checkpoint(tmp_path).step == 2
    assert same(weights(tmp_path / "earlier-1"), old)
    assert list(lines(tmp_path, "losses")) == [1, 2]
    assert list(lines(tmp_path / "earlier-1", "losses")) == [1, 2, 3]
    train(replace(tiny, steps=1), tmp_path, resume=False, **options)
    assert load_checkpoint(tmp_path / "earlier-2").step == 2


@pytest.mark.parametrize("moved", [1, 2, 4])
def test_a_run_that_was_set_aside_in_part_pushes_nothing_out(
    tiny, tmp_path, text_model, monkeypatch, moved
):
    options = {"device": "cpu", "text_model": text_model}
    old = replace(tiny, steps=9, save_every=3)
    train(old, tmp_path, **options)
    real, done = os.replace, []

    def killed(source: Path, target: Path) -> None:
        if str(target.parent).endswith("earlier-1"):
            if len(done) == moved:
                raise KeyboardInterrupt
            done.append(source.name)
        real(source, target)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        train(tiny, tmp_path, resume=False, **options)
    monkeypatch.setattr(os, "replace", real)
    assert done[0] == "latest"
    train(replace(tiny, steps=4, save_every=2, seed=8), tmp_path, **options)
    assert checkpoints(tmp_path) == [2, 4]
    assert load_checkpoint(tmp_path).step == 4
    assert checkpoints(tmp_path / "earlier-1") == [6, 9]
    assert load_checkpoint(tmp_path / "earlier-1").step == 9
    assert not (tmp_path / "earlier-2").exists()


def test_another_configuration_is_named(tiny, tmp_path, text_model):
    train(replace(tiny, steps=1), tmp_path, device="cpu", text_model=text_model)
    with pytest.raises(ValueError, match="another configuration: steps was 1, is 2; seed was 3"):
        train(replace(tiny, steps=2, seed=4), tmp_path, device="cpu", text_model=text_model)
    assert state(tmp_path)["state"] == "finished"  # as it was


def test_what_differs_is_named_down_to_the_number(tiny):
    rows = tiny.corpora
    heavier = (replace(rows[0], weight=2.0), *rows[1:])
    for changed, told in (
        (replace(tiny, optim=replace(tiny.optim, lr=0.5)), f"optim.lr was {tiny.optim.lr}, is 0.5"),
        (
            replace(tiny, corpora=heavier),
            f"corpora.arm.weight was {rows[0].weight}, is 2.0",
        ),
        (replace(tiny, corpora=rows[:-1]), f"corpora.{rows[-1].name} was CorpusConfig(name="),
        (replace(tiny, corpora=rows[::-1]), f"corpora stood in the order {rows[0].name}, "),
        (replace(tiny, embedders={}), "embedders.image was {'embedder': 'conv'}, is not there"),
        (replace(tiny, embedders={"image": {}}), "embedders.image.embedder was 'conv', is not the"),
    ):
        with pytest.raises(ValueError, match=re.escape(f"another configuration: {told}")) as error:
            require_same(tiny, changed, "run")
        assert str(error.value).count(" was ") + str(error.value).count(" stood ") == 2
    require_same(tiny, replace(tiny, save_every=1), "run")


@pytest.mark.parametrize("seed", [-1, 1 << 44, 10**20])
def test_a_seed_that_is_none_is_refused_before_anything_is_done(tiny, seed):
    with pytest.raises(ValueError, match=f"seed must be from 0 to 8796093022208; got {seed}"):
        replace(tiny, seed=seed)


def test_the_largest_seed_trains(tiny, tmp_path, text_model):
    config = replace(tiny, seed=1 << 43, steps=1)
    assert train(config, tmp_path, device="cpu", text_model=text_model).name == "step-00000001"


def grown(config: Any, tmp_path: Path) -> Any:
    """Return the configuration on copies of its stores, which may be changed."""
    for c in config.corpora:
        shutil.copytree(c.path, tmp_path / "data" / c.name)
    corpora = tuple(replace(c, path=str(tmp_path / "data" / c.name)) for c in config.corpora)
    return replace(config, corpora=corpora)


def append_episode(path: Path) -> None:
    store = EpisodeStore(path)
    with EpisodeWriter(path, store.spec) as writer:
        writer.append(replace(store.episode(0), seed=99))


def test_a_run_does_not_go_on_with_other_data(tiny, tmp_path, text_model):
    config, run = grown(tiny, tmp_path), tmp_path / "run"
    options = {"device": "cpu", "text_model": text_model}
    half = Trainer(config, run, CPU, make_serializer(config, text_model))
    half.train_step(half.mixture.batch(0))
    half.save()
    shutil.move(tmp_path / "data" / "words", tmp_path / "words")
    with RecordWriter(tmp_path / "data" / "words", "words") as writer:
        writer.append({"kind": "document", "text": "another text"})
    told = "corpus 'words': expected the data .*'words' has changed .*40 records then, 1 now"
    with pytest.raises(ValueError, match=told):
        train(config, run, **options)
    shutil.rmtree(tmp_path / "data" / "words")
    shutil.move(tmp_path / "words", tmp_path / "data" / "words")
    append_episode(tmp_path / "data" / "arm")
    with pytest.raises(ValueError, match=r"'toy/arm-v0' has changed .*20 episodes then, 21 now"):
        train(config, run, **options)
    assert load_checkpoint(run).step == 1
    saved = resolve(run) / "config.json"
    described = json.loads(saved.read_text())
    for corpus in described["data"].values():
        del corpus["stores"]  # as older ones were written
        corpus.pop("sizes", None)
    saved.write_text(json.dumps(described))
    train(replace(config, save_every=3), run, **options)
    assert load_checkpoint(run).step == 20


def test_digests_know_no_place_and_tell_stores_of_one_name_apart(stores, tmp_path):
    one, other = (EpisodeStore(stores / name) for name in ("arm", "grid"))
    shutil.copytree(stores / "arm", tmp_path / "moved")
    twice = digests([one, EpisodeStore(tmp_path / "moved"), other])
    assert list(twice) == ["toy/arm-v0", "toy/arm-v0 (2)", "toy/grid-v0"]
    assert twice["toy/arm-v0"] == twice["toy/arm-v0 (2)"] != twice["toy/grid-v0"]
    began, now = ({"arm": {"episodes": 1, "stores": digests(s)}} for s in ([one], [one, other]))
    require_same_data(began, began, "run")
    with pytest.raises(ValueError, match="the store of 'toy/grid-v0' is new"):
        require_same_data(began, now, "run")
    with pytest.raises(ValueError, match="the store of 'toy/grid-v0' is gone"):
        require_same_data(now, began, "run")


def test_how_a_run_is_watched_may_change(tiny, tmp_path, text_model):
    train(tiny, tmp_path / "whole", device="cpu", text_model=text_model)
    first = Trainer(tiny, tmp_path / "run", CPU, make_serializer(tiny, text_model))
    first.train_step(first.mixture.batch(0))
    first.save()
    other = replace(tiny, save_every=7, keep_last=1, log_every=2)
    train(other, tmp_path / "run", device="cpu", text_model=text_model)
    assert same(weights(tmp_path / "run"), weights(tmp_path / "whole"))
    assert checkpoints(tmp_path / "run") == [20]


def test_what_a_kill_left_is_swept_away(tiny, tmp_path, text_model):
    for name in (".state.json.123.tmp", ".latest.new"):
        (tmp_path / name).write_text("half")
    (tmp_path / ".step-00000001.123").mkdir()
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "losses": {}}\n[1]\n{"step": 1, "lo')
    train(replace(tiny, steps=2), tmp_path, device="cpu", text_model=text_model)
    names = {p.name for p in tmp_path.iterdir()}
    assert names == {"latest", "metrics.jsonl", "state.json", "step-00000002"}
    assert list(lines(tmp_path, "losses")) == [0, 1, 2]


def test_watchers_are_told(tiny, tmp_path, text_model):
    class Watcher:
        def __init__(self) -> None:
            self.lines: list[int] = []
            self.events: list[tuple[str, Any]] = []
            self.closed = 0

        def metrics(self, line: dict[str, Any]) -> None:
            self.lines.append(line["step"])

        def event(self, kind: str, **facts: Any) -> None:
            self.events.append((kind, facts["step"]))

        def close(self) -> None:
            self.closed += 1

    watcher = Watcher()
    config = replace(tiny, steps=4, save_every=3, log_every=2)
    train(config, tmp_path, device="cpu", text_model=text_model, watchers=[watcher])
    assert watcher.lines == [2, 4]
    assert watcher.events == [("start", 0), ("checkpoint", 3), ("checkpoint", 4), ("end", 4)]
    assert watcher.closed == 1


def test_batches_made_ahead_are_the_same(tiny, tmp_path, text_model):
    options = {"device": "cpu", "text_model": text_model}
    train(replace(tiny, steps=4), tmp_path / "here", **options)
    train(replace(tiny, steps=4), tmp_path / "ahead", workers=1, **options)
    assert same(weights(tmp_path / "here"), weights(tmp_path / "ahead"))
