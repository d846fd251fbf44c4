"""What makes training fast changes nothing that it learns: the fast paths, forced on a CPU."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

from gato import cli
from gato.checkpoint import load_tensors
from gato.config import TrainConfig
from gato.corpora import open_corpus
from gato.distributed import World
from gato.execution import Execution
from gato.feed import Fed, Feed
from gato.finite import Gate
from gato.fitting import make_serializer
from gato.mixture import Mixture
from gato.optim import Average, OptimConfig, Optimizers
from gato.profiling import Profiler
from gato.static_shapes import Capacities, _rounded
from gato.tokenizers.stream import TokenBatch
from gato.train import NonFiniteLossError, Trainer, train

# torch's tracer asks whether what it is given has a gradient, and torch warns of it
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")

CPU = torch.device("cpu")
LAGGED = Execution(lagged=True, static=True, ahead=True)


@pytest.fixture
def mixture(tiny: TrainConfig, tiny_text_model: bytes) -> Mixture:
    serializer = make_serializer(tiny, tiny_text_model)
    return Mixture.of(tiny, [open_corpus(c, serializer) for c in tiny.corpora], serializer)


def trainer(config: TrainConfig, folder: Path, text_model: bytes, execution: Execution) -> Trainer:
    """Return a trainer whose blocks are no identities any more."""
    made = Trainer(config, folder, CPU, make_serializer(config, text_model), execution=execution)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in made.model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.05, generator=generator)
    return made


def shapes(batch: object) -> str:
    """Return the shape of everything in a batch that a graph would be compiled for."""
    told = {k: v.shape for k, v in vars(batch).items() if isinstance(v, torch.Tensor)}
    rows = {m: {k: getattr(v, "shape", v) for k, v in r.items()} for m, r in batch.payload.items()}
    return str((told, rows, batch.joint))


# ---- static shapes -------------------------------------------------------------------------------


def test_batches_of_a_mixture_get_one_shape(mixture):
    drawn = [mixture.batch(k) for k in range(30)]
    assert len({shapes(b.to("cpu")) for b in drawn}) > 20, "this tests nothing"
    said: list[str] = []
    capacities = Capacities(len(mixture.names), said.append)
    capacities.measure(drawn[:8])
    assert len({shapes(capacities.pad(b)) for b in drawn}) == 1
    assert not said


@pytest.mark.parametrize("spread", [0.0, 6.0])
def test_a_padded_batch_has_the_losses_and_gradients_of_the_plain_one(
    tiny, tiny_text_model, tmp_path, spread
):
    config = replace(tiny, model=replace(tiny.model, soft_bins=spread))
    made = trainer(config, tmp_path, tiny_text_model, Execution())
    made.model.eval()  # places inside a patch are drawn in training only
    capacities = Capacities(len(made.mixture.names))
    capacities.measure(made.mixture.batch(k) for k in range(3))
    for k in range(3, 6):
        batch = made.mixture.batch(k)
        padded = capacities.pad(batch)
        real = padded.target_corpus < len(made.mixture.names)
        assert len(padded.target_at) > len(batch.target_at)
        found = []
        for one in (batch.to("cpu"), padded):
            made.model.zero_grad()
            nll = made.model.loss(one, ordinal=made.ordinal)
            (nll * one.target_weight).sum().backward()
            grads = {n: p.grad for n, p in made.model.named_parameters() if p.grad is not None}
            found.append((nll.detach(), grads))
        (plain, gradients), (with_padding, others) = found
        assert torch.equal(padded.target_corpus[real], torch.from_numpy(batch.target_corpus))
        torch.testing.assert_close(with_padding[real], plain, rtol=1e-6, atol=1e-6)
        assert gradients.keys() <= others.keys()
        for name, gradient in others.items():
            other = gradients.get(name, torch.zeros_like(gradient))
            torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-5, msg=name)


def test_capacities_grow_where_a_batch_needs_more_and_say_so(mixture):
    said: list[str] = []
    capacities = Capacities(len(mixture.names), said.append)
    small = mixture.part(0, 0)
    capacities.measure([small])
    capacities.sizes["targets", None] = 64
    before = dict(capacities.sizes)
    batch = next(b for k in range(9) if len((b := mixture.part(k, 0)).target_at) > 64)
    padded = capacities.pad(batch)
    assert len(padded.target_at) == capacities.sizes["targets", None] > before["targets", None]
    assert len(said) == 1
    assert "larger than those before; from now on there is room for targets" in said[0]
    capacities.pad(batch)
    assert len(said) == 1


def test_a_run_on_static_shapes_is_the_run_on_its_own(tiny, tiny_text_model, tmp_path):
    config = replace(tiny, steps=6, save_every=6)
    runs = {"plain": Execution(), "static": LAGGED}
    for name, execution in runs.items():
        train(config, tmp_path / name, text_model=tiny_text_model, execution=execution)
    lines = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in runs
    ]
    for plain, static in zip(*lines, strict=True):
        assert static["losses"] == pytest.approx(plain["losses"], rel=0.02)  # places are drawn anew
        assert 0 < plain["mfu"] < 1


@pytest.mark.parametrize(
    ("n", "key", "expected"),
    [
        (1, ("rows", "image", (5, 5)), 200),  # eight images
        (200, ("rows", "image", (5, 5)), 400),
        (1500, ("rows", "image", (5, 5)), 1800),
        (10, ("rows", "image", (1, 2)), 16),
        (10, ("rows", "vector", ()), 128),
        (120, ("targets", None), 256),
        (3, ("documents",), 128),
    ],
)
def test_room_is_no_more_than_a_block_beyond_what_is_spared(n, key, expected):
    assert _rounded(n, key) == expected


# ---- compiled ------------------------------------------------------------------------------------


def test_twenty_varied_batches_compile_once(tiny, tiny_text_model, tmp_path):
    graphs = []
    for layers in (2, 4):
        torch._dynamo.reset()
        counters.clear()
        config = replace(tiny, model=replace(tiny.model, layers=layers))
        execution = Execution(compile="yes", backend="eager")
        made = trainer(config, tmp_path, tiny_text_model, execution)
        made.train_step(made.mixture.batch(0))
        graphs.append(counters["stats"]["unique_graphs"])
        for k in range(1, 21 if layers == 2 else 3):
            made.train_step(made.mixture.batch(k))
        assert counters["stats"]["unique_graphs"] == graphs[-1] > 0
        assert not counters["graph_break"]
    assert graphs[0] == graphs[1], "blocks share a graph"
    torch._dynamo.reset()


def test_compiled_learns_as_eager_does(tiny, tiny_text_model, tmp_path):
    torch._dynamo.reset()
    found = []
    for name, compiled in (("yes", "yes"), ("no", "no")):
        execution = Execution(compile=compiled, backend="aot_eager", static=True)
        made = trainer(tiny, tmp_path / name, tiny_text_model, execution)
        for k in range(3):
            made.train_step(made.mixture.batch(k))
        found.append(made.sums)
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()


def test_a_gpu_compiles_and_a_cpu_does_not_unless_asked():
    gpu = Execution().on(torch.device("cuda"))
    assert (gpu.compile, gpu.static, gpu.lagged, gpu.ahead) == ("yes", True, True, True)
    cpu = Execution().on(CPU)
    assert (cpu.compile, cpu.static, cpu.lagged, cpu.ahead) == ("no", False, False, False)
    assert Execution(compile="yes").on(CPU).static
    assert "not compiled (the default on a cpu)" in Execution().describe(CPU)
    assert "compiled by inductor (as asked)" in Execution(compile="yes").describe(CPU)
    with pytest.raises(ValueError, match="compile must be one of auto, yes, no; got 'on'"):
        Execution(compile="on")
    with pytest.raises(ValueError, match="profile must be at least 0"):
        Execution(profile=-1)


# ---- a loss that is no number, read a step late --------------------------------------------------


@pytest.mark.parametrize("spoilt_step", [0, 2])
def test_a_late_look_leaves_everything_as_it_was_before_the_step(
    tiny, tiny_text_model, tmp_path, spoilt_step
):
    config = replace(tiny, ema=0.9)
    made = trainer(config, tmp_path / "run", tiny_text_model, LAGGED)
    assert made.average is not None
    for k in range(spoilt_step):
        made.train_step(made.mixture.batch(k))
    made.settle()

    def everything() -> dict[str, torch.Tensor]:
        state = made.optimizers.tensors(made.names)
        average = {f"average/{k}": v for k, v in made.average.values.items()}
        return {
            k: v.clone() for k, v in {**made.model.state_dict(), **state, **average}.items()
        } | {"sums": made.sums.clone()}

    before = everything()
    batch = made.mixture.batch(spoilt_step)
    batch.payload["vector"]["values"][0, 0] = np.nan
    made.train_step(batch)  # nobody has looked yet
    assert made.step == spoilt_step + 1
    after = everything()
    for key, value in before.items():
        assert torch.equal(after[key], value), key
    for key in after.keys() - before.keys():  # the optimizer's state, which begins with a step
        assert not after[key].any(), key
    fault = rf"the loss of step {spoilt_step} is nan; look at arm .*lower optim\.lr"
    with pytest.raises(NonFiniteLossError, match=fault):
        made.train_step(made.mixture.batch(spoilt_step + 1))
    assert made.step == spoilt_step
    for key, value in before.items():
        assert torch.equal(everything()[key], value), key
    with np.load(made.folder / f"bad-batch-{spoilt_step:08d}" / "part-0.npz") as kept:
        assert np.isnan(kept["payload.vector.values"][0, 0])
        assert len(kept["nll"]) == len(batch.target_at) == len(kept["target_at"])
    about = json.loads((made.folder / f"bad-batch-{spoilt_step:08d}" / "about.json").read_text())
    assert about["at_fault"] == ["arm"]


@pytest.mark.parametrize("last", [False, True])
def test_a_late_look_comes_before_anything_is_kept(
    tiny, tiny_text_model, tmp_path, monkeypatch, last
):
    config = replace(tiny, steps=8 if last else 12, save_every=8, log_every=8)
    real = Trainer.train_step

    def spoilt(trainer: Trainer, *parts: Fed) -> None:
        if trainer.step == 7:  # the step before a checkpoint is due
            parts[0].given.payload["vector"]["values"][:] = torch.nan
        real(trainer, *parts)

    monkeypatch.setattr(Trainer, "train_step", spoilt)
    with pytest.raises(NonFiniteLossError, match=r"the loss of step 7 is nan.*no checkpoint"):
        train(config, tmp_path, text_model=tiny_text_model, execution=LAGGED)
    assert not list(tmp_path.glob("step-*"))
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_late_and_early_looks_take_the_same_steps(tiny, tiny_text_model, tmp_path):
    ends = []
    for name, execution in (("early", Execution()), ("late", Execution(lagged=True, ahead=True))):
        config = replace(tiny, ema=0.9, steps=8, save_every=8)
        saved = train(config, tmp_path / name, text_model=tiny_text_model, execution=execution)
        ends.append({**load_tensors(saved / "model.safetensors")})
    for key, value in ends[0].items():
        torch.testing.assert_close(ends[1][key], value, rtol=1e-5, atol=1e-6, msg=key)


def test_a_refusal_knows_the_padding_though_capacities_grew_since(tiny, tiny_text_model, tmp_path):
    arm = replace(tiny.corpora[0], joint=3)
    config = replace(tiny, corpora=(arm, *tiny.corpora[1:]), parts=2)
    made = trainer(config, tmp_path / "run", tiny_text_model, LAGGED)
    parts = [made.mixture.part(0, p) for p in range(2)]
    assert all(n for part in parts for _, n in part.joint), "this tests nothing"
    parts[1].payload["vector"]["values"][0, 0] = np.nan
    made.train_step(*parts)
    assert made.capacities is not None
    for key in made.capacities.sizes:
        if key[0] == "targets":
            made.capacities.sizes[key] += 512
    with pytest.raises(NonFiniteLossError, match="the loss of step 0 is nan; look at arm"):
        made.train_step(*(made.mixture.part(1, p) for p in range(2)))
    for p, part in enumerate(parts):
        with np.load(made.folder / "bad-batch-00000000" / f"part-{p}.npz") as kept:
            assert len(kept["nll"]) == len(part.target_at)
            assert np.isfinite(kept["nll"]).all() == (p == 0)


def test_a_run_on_static_shapes_goes_on_as_if_it_had_not_ended(tiny, tiny_text_model, tmp_path):
    execution = Execution(static=True)
    made = trainer(tiny, tmp_path, tiny_text_model, execution)
    capacities = made.measured()
    assert capacities is not None
    (images,) = (key for key in capacities.sizes if key[:2] == ("rows", "image"))
    capacities.sizes[images] *= 2  # as if a batch had needed it
    for k in range(2):
        made.train_step(made.mixture.batch(k))
    made.save()
    again = Trainer.resumed(tiny, tmp_path, CPU, execution=execution)
    for one in (made, again):
        for k in range(2, 4):
            one.train_step(one.mixture.batch(k))
    assert again.capacities is not capacities
    assert again.capacities.sizes == capacities.sizes
    for name, value in made.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value), name
    for key, row in capacities._examples.items():
        for name, value in row.items():
            other = again.capacities._examples[key][name]
            assert other.dtype == value.dtype
            np.testing.assert_array_equal(other, value)


def test_the_gate_stays_closed():
    gate = Gate(CPU)
    values = [1.0, float("inf"), 2.0, float("nan")]
    closed = []
    for k, value in enumerate(values):
        loss = torch.tensor(value, dtype=torch.float64)
        closed.append(float(gate.ask(k, loss, torch.tensor(1.0), [], [])))
    assert closed == [0, 1, 1, 1]
    first = gate.refused()
    assert first is not None
    assert first.step == 1
    again = gate.refused(unread=2)
    assert again is None


@pytest.mark.parametrize("muon", [True, False])
def test_a_closed_optimizer_changes_nothing_and_an_open_one_steps(muon):
    torch.manual_seed(0)
    made = []
    for _ in range(2):
        torch.manual_seed(0)
        model = torch.nn.Module()
        model.blocks = torch.nn.ModuleList([torch.nn.Linear(8, 24), torch.nn.Linear(24, 8)])
        made.append((model, Optimizers(model, OptimConfig(muon=muon)), Average(model, 0.9)))
    for step in range(6):
        bad = step in (0, 3)
        for (model, optimizers, average), gated in zip(made, (True, False), strict=True):
            if bad and not gated:
                continue
            for i, p in enumerate(model.parameters()):
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(9 * step + i))
            if bad:
                model.blocks[0].weight.grad[0, 0] = torch.nan
            closed = torch.tensor(float(bad)) if gated else None
            optimizers.step(1e-2, closed=closed)
            average.update(step, closed)
    (first, _, a), (second, _, b) = made
    for p, q in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
    for name in a.values:
        torch.testing.assert_close(a.values[name], b.values[name], rtol=1e-5, atol=1e-6)


# ---- the feed and the profile --------------------------------------------------------------------


def test_what_is_fetched_ahead_comes_in_order(mixture):
    drawn = [mixture.part(k, 0) for k in range(5)]
    feed, taken = Feed(iter(drawn), 1, CPU, ahead=True), []
    for _ in drawn:
        taken += feed.take()
        feed.fetch()
        feed.fetch()  # twice is once
    with pytest.raises(StopIteration):
        feed.take()
    assert [fed.drawn for fed in taken] == drawn
    for fed in taken:
        assert torch.equal(fed.given.inputs, torch.from_numpy(fed.drawn.inputs))


def test_a_batch_that_cannot_be_brought_keeps_no_checkpoint_from_being_written(
    tiny, tiny_text_model, tmp_path, monkeypatch
):
    config = replace(tiny, steps=12, save_every=8, log_every=8)
    real = Mixture.part

    def damaged(mixture: Mixture, index: int, part: int) -> TokenBatch:
        if index == 8:  # the batch after that of the checkpoint
            raise ValueError("shard 3 is damaged")
        return real(mixture, index, part)

    monkeypatch.setattr(Mixture, "part", damaged)
    monkeypatch.setattr("gato.step.MEASURED", 4)
    with pytest.raises(ValueError, match="shard 3 is damaged"):
        train(config, tmp_path, text_model=tiny_text_model, execution=LAGGED)
    assert (tmp_path / "latest").read_text() == "step-00000008"
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1


def test_only_one_process_profiles_and_says_how_many_steps(
    tiny, tiny_text_model, tmp_path, capsys, monkeypatch
):
    profiler = Profiler(tmp_path, 5, 0, 3)
    for k in range(2):  # the run is told to stop
        profiler.before(k)
        profiler.after(k + 1)
    profiler.end()
    assert "profiled 2 steps" in capsys.readouterr().err
    asked = []
    monkeypatch.setattr(
        "gato.train.Profiler", lambda *about: asked.append(about[1]) or Profiler(tmp_path, 0, 0, 1)
    )
    for rank in range(2):
        made = trainer(
            replace(tiny, steps=1, save_every=1),
            tmp_path / str(rank),
            tiny_text_model,
            Execution(profile=2),
        )
        made.world = World(rank)
        made.run()
    assert asked == [2, 0]


def test_where_there_is_nothing_to_profile_that_is_said(tiny, tiny_text_model, tmp_path, capsys):
    config = replace(tiny, steps=2)
    train(config, tmp_path, text_model=tiny_text_model)
    capsys.readouterr()
    train(config, tmp_path, text_model=tiny_text_model, execution=Execution(profile=2))
    assert (
        "nothing to profile in this run: it has taken all of its steps" in capsys.readouterr().err
    )
    assert not (tmp_path / "profile.json").exists()
    profiler = Profiler(tmp_path, 5, 10, 100)
    for step in range(10, 14):  # a signal ends it
        profiler.before(step)
        profiler.after(step + 1)
    profiler.end()
    told = capsys.readouterr().err
    assert "it ended before step 21, the first to be profiled" in told
    Profiler(tmp_path, 0, 2, 2).end()
    assert capsys.readouterr().err == ""


def test_a_profile_is_a_table_and_a_trace(tiny, tiny_text_model, tmp_path, capsys):
    config = replace(tiny, steps=4, save_every=4)
    train(config, tmp_path, text_model=tiny_text_model, execution=Execution(profile=2))
    trace = json.loads((tmp_path / "profile.json").read_text())
    assert sum(e["name"] == "Optimizer.step#Muon.step" for e in trace["traceEvents"]) == 2
    told = capsys.readouterr().err
    assert "aten::mm" in told
    assert "profiled 2 steps" in told


def test_the_command_takes_what_concerns_speed(stores, tmp_path, tiny_text_model, capsys):
    text_model = tmp_path / "text.model"
    text_model.write_bytes(tiny_text_model)
    words = ["train", "quickstart", "--data", f"talks={stores / 'talks'}", "--out"]
    small = ["--rows", "2", "--model.layers", "1", "--steps", "3", "--text-pieces", "300"]
    more = ["--compile", "no", "--profile", "1", "--text-model", str(text_model)]
    assert cli.main([*words, str(tmp_path / "run"), *small, *more]) == cli.DONE
    told = capsys.readouterr().err
    assert "model: not compiled (as asked)" in told
    assert "profiled 1 steps" in told
    assert re.search(r"tokens/s  \d+% MFU", told)
    assert (tmp_path / "run" / "profile.json").is_file()
