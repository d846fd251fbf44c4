"""Runs that begin with other weights: what stays as it was, what learns, and how fast."""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_hf
import torch
from torch.nn.utils import parametrize

from gato import cli, load
from gato.checkpoint import build_model, load_checkpoint, load_tensors
from gato.config import TrainConfig
from gato.corpora import CorpusConfig
from gato.envs.records import RecordWriter
from gato.fitting import make_serializer
from gato.lora import LoraConfig, add_lora
from gato.model import parameter_table
from gato.optim import OptimConfig, Optimizers
from gato.parts import freeze, is_added, part_of
from gato.rollouts.generate import log_likelihoods
from gato.train import Trainer, train
from gato.warm_start import open_start

CPU = torch.device("cpu")
Maker = Callable[..., Trainer]


@pytest.fixture
def make(tiny: TrainConfig, tiny_text_model: bytes, tmp_path: Path) -> Maker:
    """Return what makes a trainer of the tiny configuration with changes."""

    def made(name: str = "run", **changes: Any) -> Trainer:
        config = replace(tiny, **changes)
        return Trainer(config, tmp_path / name, CPU, make_serializer(config, tiny_text_model))

    return made


def steps(trainer: Trainer, count: int) -> None:
    """Train for so many steps."""
    parts = trainer.config.parts
    for _ in range(count):
        trainer.train_step(*(trainer.mixture.part(trainer.step, p) for p in range(parts)))


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters()}


# ---- freezing --------------------------------------------------------------------------------


@pytest.mark.parametrize("muon", [True, False])
def test_what_is_frozen_stays_bit_for_bit_and_has_no_state(make, muon):
    trainer = make(
        freeze=("trunk", "nets.*"), optim=OptimConfig(lr=1e-2, warmup=0, muon=muon), ema=0.9
    )
    before = weights(trainer)
    steps(trainer, 3)
    for name, value in weights(trainer).items():
        frozen = part_of(name) in ("trunk", "embedders")
        assert torch.equal(before[name], value) is frozen, name
    held = {name.rsplit("/", 1)[0] for name in trainer.optimizers.tensors(trainer.names)}
    assert held == {n for n in before if part_of(n) not in ("trunk", "embedders")}
    assert set(trainer.average.values) == held  # nothing twice in memory
    saved = load_tensors(trainer.save() / "ema.safetensors")
    assert set(saved) == set(load_tensors(trainer.saved / "model.safetensors"))
    assert all(torch.equal(before[n], saved[n]) for n in before if n not in held)
    assert all(torch.equal(trainer.average.values[n], saved[n]) for n in held)


def test_a_frozen_run_goes_on_bit_for_bit(tiny, tmp_path, tiny_text_model):
    config = replace(tiny, steps=6, save_every=3, freeze=("blocks.0.*", "table"))
    whole = load_checkpoint(train(config, tmp_path / "whole", text_model=tiny_text_model))
    half = Trainer(config, tmp_path / "half", CPU, make_serializer(config, tiny_text_model))
    steps(half, 3)
    half.save()
    again = load_checkpoint(train(config, tmp_path / "half"))
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), name


def test_what_cannot_be_frozen_is_told(make, tiny, tmp_path):
    with pytest.raises(ValueError, match=r"parts \(table, local, .*'trunc' matches none"):
        make(freeze=("trunc",))
    with pytest.raises(ValueError, match="leaves nothing to train"):
        make(freeze=("*",))
    make(freeze=("trunk",)).save()
    with pytest.raises(ValueError, match=r"freeze was \('trunk',\), is \(\)"):
        train(tiny, tmp_path / "run")


# ---- rates -----------------------------------------------------------------------------------


def test_ranges_and_parts_learn_at_rates_of_their_own(make):
    flat = {"lr": 1e-2, "warmup": 0, "cooldown": 0.0, "clip": 1e9}
    rates = {"text": 0.1, "control": 0.0, "trunk": 0.5, "embedders": 2.0}
    for muon in (True, False):
        plain = make(optim=OptimConfig(**flat, muon=muon, weight_decay=0.0))
        rated = make(optim=OptimConfig(**flat, muon=muon, weight_decay=0.0, rates=rates))
        before = weights(plain)
        steps(plain, 1)
        steps(rated, 1)
        whole, own = weights(plain), weights(rated)
        layout = plain.serializer.layout
        for name, start in before.items():
            full, moved = whole[name] - start, own[name] - start
            factor = rates.get(part_of(name), 1.0)
            if name != "table.weight":
                torch.testing.assert_close(moved, factor * full, atol=1e-7, rtol=1e-3)
                continue
            for span, scale in (("text", 0.1), ("continuous", 1.0), ("control", 0.0)):
                rows = slice(*layout.span(span))
                assert full[rows].abs().max() > 1e-3, span
                torch.testing.assert_close(moved[rows], scale * full[rows], atol=1e-7, rtol=1e-3)
            rows = slice(*layout.span("control"))
            assert torch.equal(own[name][rows], start[rows])


def test_rates_of_rows_are_those_of_a_table_cut_in_pieces():
    """The slow twin: each range as a parameter of its own under AdamW."""

    class Tables(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.nn.Embedding(10, 3)

    torch.manual_seed(0)
    model, config = Tables(), OptimConfig(lr=0.1, clip=1e9, rates={"b": 0.25, "table": 0.5})
    cuts = {"a": slice(0, 4), "b": slice(4, 7), "rest": slice(7, 10)}
    pieces = {
        n: torch.nn.Parameter(model.table.weight[c].detach().clone()) for n, c in cuts.items()
    }
    factors = {"a": 0.5, "b": 0.25, "rest": 0.5}
    twin = torch.optim.AdamW(
        [{"params": [p], "lr": 0.1 * factors[n]} for n, p in pieces.items()],
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        weight_decay=0.0,
    )
    ours = Optimizers(model, config, {"a": (0, 4), "b": (4, 7)})
    for _ in range(5):
        gradient = torch.randn(10, 3)
        model.table.weight.grad = gradient.clone()
        for name, piece in pieces.items():
            piece.grad = gradient[cuts[name]].clone()
        ours.step(0.1)
        twin.step()
    whole = torch.cat([pieces[n] for n in cuts])
    torch.testing.assert_close(model.table.weight, whole, atol=1e-6, rtol=1e-5)


def test_rows_that_stay_have_no_part_in_the_norm(make):
    trainer = make(optim=OptimConfig(rates={"text": 0.0}))
    table, rows = trainer.model.table.weight, slice(*trainer.serializer.layout.span("text"))
    table.grad = torch.ones_like(table)
    table.grad[rows] = 1e6
    expected = (table.numel() - table[rows].numel()) ** 0.5
    assert trainer.optimizers.norm().item() == pytest.approx(expected)
    before = table.detach().clone()
    trainer.optimizers.step(0.1)
    assert torch.equal(table[rows], before[rows])
    assert not torch.equal(table, before)
    # a momentum that an older run kept of them is let go of
    state = trainer.optimizers.tensors(trainer.names)
    state["table.weight/exp_avg"][rows] = 1.0
    trainer.optimizers.load_tensors(state, trainer.names)
    table.grad = torch.ones_like(table)
    trainer.optimizers.step(0.1)
    assert torch.equal(table[rows], before[rows])


def test_rates_that_do_nothing_are_told_of(make, capsys):
    rates = {"contrast": 2.0, "head": 2.0, "trunk": 2.0, "text": 0.5, "lora": 3.0}
    make(optim=OptimConfig(rates=rates), freeze=("trunk",))
    assert "rates of contrast, head, trunk, lora do nothing" in capsys.readouterr().err
    make("b", optim=OptimConfig(rates=rates), freeze=("table",))
    assert "rates of contrast, head, text, lora do nothing" in capsys.readouterr().err
    make("c", optim=OptimConfig(rates={"trunk": 2.0, "text": 0.5}))
    assert "do nothing" not in capsys.readouterr().err


def test_rates_of_what_there_is_not_are_told(make):
    with pytest.raises(ValueError, match=r"parts or ranges of ids \(.*continuous.*\); got 'texts'"):
        make(optim=OptimConfig(rates={"texts": 0.1}))
    with pytest.raises(ValueError, match="must be at least 0; got -1"):
        OptimConfig(rates={"text": -1.0})


def test_the_command_line_takes_rates_patterns_and_ranks(stores, tmp_path, monkeypatch):
    from gato import run_commands

    runs: list[TrainConfig] = []
    monkeypatch.setattr(run_commands, "_train", lambda config, *_: runs.append(config))
    line = ["train", "quickstart", "--data", f"arm={stores / 'arm'}", "--out", str(tmp_path / "r")]
    line += ["--freeze", "trunk", "nets.*", "--lora.rank", "4", "--lora.layers", "qkv", "out"]
    assert cli.main([*line, "--optim.rates", "text", "0.1", "trunk", "0.5"]) == 0
    (config,) = runs
    assert config.freeze == ("trunk", "nets.*")
    assert config.lora == LoraConfig(rank=4, layers=("qkv", "out"))
    assert config.optim.rates == {"text": 0.1, "trunk": 0.5}
    assert cli.main([*line[:6], "--lora.rank", "2", "--lora.layers", "gate"]) == 2


# ---- LoRA ------------------------------------------------------------------------------------


@pytest.mark.parametrize("muon", [True, False])
def test_lora_trains_thin_matrices_beside_a_trunk_that_stays(make, muon):
    lora = LoraConfig(rank=4, alpha=8.0, layers=("qkv", "down"))
    trainer = make(lora=lora, optim=OptimConfig(lr=1e-2, warmup=0, muon=muon))
    before = weights(trainer)
    steps(trainer, 3)
    after = weights(trainer)
    assert all(torch.equal(before[n], v) for n, v in after.items() if part_of(n) == "trunk")
    for name in ("table.weight", "blocks.1.ffn.down.parametrizations.weight.0.up"):
        assert not torch.equal(before[name], after[name])
    assert sum(map(is_added, after)) == 2 * 2 * 2
    layer = trainer.model.blocks[1].ffn.down
    added = layer.parametrizations.weight[0]
    expected = layer.parametrizations.weight.original + 8.0 / 4 * added.up @ added.down
    torch.testing.assert_close(layer.weight, expected)
    assert not torch.equal(
        layer.weight, before["blocks.1.ffn.down.parametrizations.weight.original"]
    )
    held = {name.rsplit("/", 1)[0] for name in trainer.optimizers.tensors(trainer.names)}
    assert not any(part_of(n) == "trunk" for n in held)
    assert parameter_table(trainer.model)["lora"] == sum(
        v.numel() for n, v in after.items() if is_added(n)
    )


def test_lora_begins_as_the_model_without_and_is_merged_on_load(make, tiny, tiny_text_model):
    plain, trainer = make("plain"), make(lora=LoraConfig(rank=3))
    merged = dict(plain.model.named_parameters())
    for name, value in trainer.model.named_parameters():
        if not is_added(name) and part_of(name) == "trunk":
            own = name.replace(".parametrizations.", ".").removesuffix(".original")
            assert torch.equal(merged[own], value)
    steps(trainer, 2)
    folder = trainer.save()
    loaded = load_checkpoint(folder)
    assert not any(parametrize.is_parametrized(m) for m in loaded.model.modules())
    assert set(loaded.model.state_dict()) == set(plain.model.state_dict())
    batch = trainer.mixture.part(0, 0).to(CPU)
    with torch.no_grad():
        trainer.model.eval()
        torch.testing.assert_close(loaded.model(batch), trainer.model(batch))
    unmerged = load_checkpoint(folder, merged=False)
    assert set(unmerged.model.state_dict()) == set(trainer.model.state_dict())


def test_a_lora_run_goes_on_bit_for_bit_with_an_average(tiny, tmp_path, tiny_text_model):
    config = replace(tiny, steps=6, save_every=3, lora=LoraConfig(rank=2), ema=0.9)
    whole = train(config, tmp_path / "whole", text_model=tiny_text_model)
    half = Trainer(config, tmp_path / "half", CPU, make_serializer(config, tiny_text_model))
    steps(half, 3)
    half.save()
    again = train(config, tmp_path / "half")
    for name in ("model.safetensors", "ema.safetensors", "training/optimizer.safetensors"):
        a, b = load_tensors(whole / name), load_tensors(again / name)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[k], b[k]) for k in a), name


def test_lora_can_be_compiled_and_added_on_another_device(make, tiny):
    config, serializer = replace(tiny, lora=LoraConfig(rank=2)), make().serializer
    with torch.device("meta"):
        model = build_model(config, serializer)
    assert parameter_table(model)["lora"] > 0
    trainer = make(lora=LoraConfig(rank=2))
    for block in trainer.model.blocks:
        block.compile(backend="eager", fullgraph=True)
    batch = trainer.mixture.part(0, 0).to(CPU)
    trainer.model.eval()
    with torch.no_grad():
        compiled = trainer.model(batch)
        with torch.compiler.set_stance("force_eager"):
            torch.testing.assert_close(compiled, trainer.model(batch))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"rank": -1}, "rank must be at least 0"),
        ({"alpha": 0.0}, "alpha must be a number above 0"),
        ({"layers": ("gate",)}, "some of qkv, out, up, down; got gate"),
    ],
)
def test_settings_of_lora_are_checked(options, told):
    with pytest.raises(ValueError, match=told):
        LoraConfig(**options)


# ---- from a language model -------------------------------------------------------------------


def pretrained(name: str, folder: Path) -> Any:
    """Return a tiny language model that has learnt a little of its sentences."""
    model = tiny_hf.make(name, folder)
    text = open_start(folder).text
    ends = model.config.bos_token_id, model.config.eos_token_id
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    rng, rows = random.Random(0), [*tiny_hf.sentences(1000)]
    for _ in range(60):
        some = [[ends[0], *text.text_ids(t).tolist(), ends[1]] for t in rng.sample(rows, 12)]
        most = max(map(len, some))
        ids = torch.tensor([s + [0] * (most - len(s)) for s in some])
        wanted = torch.tensor([s + [-100] * (most - len(s)) for s in some])
        model(input_ids=ids, labels=wanted).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with tiny_hf.quiet():
        model.eval().save_pretrained(str(folder))
    return model


@torch.no_grad()
def loss_there(model: Any, folder: Path, held: list[str]) -> float:
    """Return the mean loss of a model of `transformers`, in nats per id, ``<eos>`` included."""
    text, total, count = open_start(folder).text, 0.0, 0
    for string in held:
        ids = text.text_ids(string).tolist()
        ids = torch.tensor([[model.config.bos_token_id, *ids, model.config.eos_token_id]])
        n = ids.shape[1] - 1
        total, count = total + n * float(model(input_ids=ids, labels=ids).loss), count + n
    return total / count


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "smollm2_base", "qwen2", "qwen3"])
def test_text_is_kept_while_actions_are_learnt(tiny, stores, tmp_path, name, capsys):
    folder, held = tmp_path / "hf", [*tiny_hf.sentences(60, first=100_000)]
    before = loss_there(pretrained(name, folder), folder, held)
    assert before < 0.5 * math.log(300)  # far below chance
    with RecordWriter(tmp_path / "text", "text") as writer:
        for sentence in tiny_hf.sentences(1000):
            writer.append({"kind": "document", "text": sentence})
    start = open_start(folder)
    config = replace(
        start.settle(tiny),
        corpora=(CorpusConfig("text", str(tmp_path / "text")), tiny.corpora[0]),
        optim=OptimConfig(lr=2e-3, warmup=20),
        steps=100,
        log_every=10,
        save_every=100,
        rows=8,
    )
    checkpoint = load_checkpoint(train(config, tmp_path / "run", start=start))
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    losses = [found["losses"] for found in map(json.loads, lines) if "losses" in found]
    assert losses[-1]["arm"] < 0.8 * losses[0]["arm"]
    serializer = checkpoint.serializer
    found = log_likelihoods(checkpoint.model, serializer, [*map(serializer.document, held)])
    after = -sum(total for total, _ in found) / sum(n for _, n in found)
    assert after <= before + 0.05
    # it talks through the command line as through Python, and without the folder it began with
    shutil.rmtree(folder)
    capsys.readouterr()
    line = ["chat", str(tmp_path / "run"), "--prompt", "the red ball <|im_start|>", "--json"]
    assert cli.main([*line, "--max-tokens", "12"]) == 0
    said = json.loads(capsys.readouterr().out)["answer"]
    message = {"role": "user", "content": "the red ball <|im_start|>"}
    assert said == load(tmp_path / "run").chat([message], max_tokens=12)
    assert "<|" not in said


def test_a_warm_run_goes_on_bit_for_bit(tiny, tmp_path):
    tiny_hf.make("llama3", tmp_path / "hf")
    start = open_start(tmp_path / "hf")
    config = replace(
        start.settle(tiny), steps=4, save_every=2, optim=OptimConfig(rates={"text": 0.1})
    )
    whole = train(config, tmp_path / "whole", start=start)
    half = Trainer(
        config,
        tmp_path / "half",
        CPU,
        make_serializer(config, known=start.serializer(config.codec)),
        begin=start.fill,
    )
    steps(half, 2)
    half.save()
    again = train(config, tmp_path / "half", start=open_start(tmp_path / "hf"))
    for name in ("model.safetensors", "training/optimizer.safetensors"):
        a, b = load_tensors(whole / name), load_tensors(again / name)
        assert all(torch.equal(a[k], b[k]) for k in a), name
    assert not load_checkpoint(whole).model.local.weight[0].any()


def test_where_nothing_is_frozen_or_added_all_is_trained(make):
    model = make().model
    add_lora(model, LoraConfig())
    assert not any(map(is_added, dict(model.named_parameters())))
    freeze(model, ())
    assert all(p.requires_grad for p in model.parameters())
