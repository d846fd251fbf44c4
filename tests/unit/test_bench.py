"""The benches run anywhere and say what was measured against what."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from typing import Any

import pytest
import torch

from gato import (
    bench,
    bench_collect,
    bench_common,
    bench_data,
    bench_machine,
    bench_rollout,
    bench_train,
    model_config,
)
from gato.config import TrainConfig
from gato.model_config import ModelConfig
from gato.presets import parameters
from gato.train import Trainer

TINY = ModelConfig(layers=1, width=32, heads=2, head_dim=16, ffn_width=64, context=256)
SIZES = bench_train.sizes()
CPU = torch.device("cpu")


@pytest.fixture
def tiny_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_rollout, "quickstart", lambda: TINY)
    monkeypatch.setattr(bench_train, "sizes", lambda: {"1M": TINY})
    monkeypatch.setattr(bench_train, "RUN_STEPS", 5)


def test_all_benches_print_what_the_contract_names(tiny_model):
    found = json.loads(json.dumps(bench.run(["serializer", "train", "rollout"], repeats=1)))
    assert found["name"] == "serializer train rollout"
    assert found["failed"] == {}
    assert [r["bench"] for r in found["results"]] == sorted(
        (r["bench"] for r in found["results"]), key=found["name"].index
    )
    assert found["versions"].keys() >= {"python", "torch", "numpy"}
    assert "cores" in found["hardware"]
    for result in found["results"]:
        assert result.keys() >= {"case", "value", "unit", "baseline", "ratio", "against"}
        assert result["value"] > 0
        assert min(result["ratios"] or [0]) <= result["ratio"] <= max(result["ratios"] or [99])
        assert result["spread"][0] <= result["value"] <= result["spread"][1]


def test_the_quick_benches_run_where_none_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []
    monkeypatch.setattr(
        bench.Bench, "run", staticmethod(lambda name, repeats: ran.append(name) or [])
    )
    monkeypatch.setattr(bench.bench_machine, "peaks", lambda device: {})
    bench.run()
    assert {"serializer", "train", "rollout", "latency", "attention"} <= set(ran)
    assert not {"data", "collect", "peer", "peer_large"} & set(ran)
    assert max(bench.BENCHES[name].seconds for name in ran) <= 120


def test_a_machine_that_becomes_busy_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    idle = bench_machine.machine() | {"load": 0.0, "allowed_cores": 2, "cores": 2}
    loads = iter([1.5, 0.1])
    monkeypatch.setattr(bench.bench_machine, "machine", lambda: dict(idle))
    monkeypatch.setattr(bench.bench_machine, "peaks", lambda device: {})
    monkeypatch.setattr(bench.bench_machine, "load_of_others", lambda since: next(loads))
    monkeypatch.setattr(bench.Bench, "run", staticmethod(lambda name, repeats: []))
    told: list[str] = []
    record = bench.run(["serializer", "data"], told=told.append)
    assert record["machine"]["load"] == 1.5
    assert "load 1.5 on 2 cores" in record["warning"]
    assert sum("busy" in line for line in told) == 1


def test_what_others_compute_is_told_from_what_is_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_machine, "worked", lambda: (20.0, 100.0, 40.0))
    assert bench_machine.load_of_others((10.0, 75.0, 30.0)) == 1.5
    assert bench_machine.load_of_others((10.0, 95.0, 30.0)) == 0.0  # clocks that tick unalike
    assert bench_machine.load_of_others((19.9, 99.0, 40.0)) is None
    assert bench_machine.load_of_others(None) is None


def test_what_is_computed_here_is_ours():
    before = bench_machine.worked()
    if before is None:
        assert sys.platform != "linux"
        return
    begun = time.process_time()
    while time.process_time() - begun < 0.2:
        pass
    after = bench_machine.worked()
    assert after is not None
    assert after[2] - before[2] >= 0.15
    assert after[1] - before[1] >= 0.15


def test_training_is_measured_with_its_share_of_the_peak(tiny_model):
    beside_bare, as_a_command = bench_train.train_bench(repeats=1)
    assert beside_bare["case"] == "train: a trunk of 1M, bfloat16"
    assert 0 < beside_bare["of_floor"] < 1
    assert 0 < beside_bare["data_wait"] < 1
    assert "a trunk of 1M as gato train has it" in as_a_command["case"]
    assert min(r["memory_mb"] for r in (beside_bare, as_a_command)) > 100
    assert {name: round(_parameters(m), -5) for name, m in SIZES.items()} == {
        "1M": 1_000_000,
        "3M": 3_100_000,
        "10M": 10_600_000,
    }


def test_a_run_begins_where_a_line_is_due(monkeypatch, tmp_path):
    config = replace(bench_train.mixture_of(tmp_path), model=TINY, rows=1)
    trainer = Trainer(config, tmp_path / "run", CPU, bench_train.make_serializer(config))
    monkeypatch.setattr(bench_train, "RUN_STEPS", 4)
    monkeypatch.setattr(bench_train, "LOG_EVERY", 4)
    trainer.step = 3
    bench_train._as_a_command(trainer, 1)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [8]
    assert [p.name for p in (tmp_path / "run").glob("step-*")] == ["step-00000008"]


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_made_ahead_are_those_made_as_they_go(workers: int, tmp_path):
    config = replace(bench_train.mixture_of(tmp_path), model=TINY, rows=1)
    serializer = bench_train.make_serializer(config)
    plain, ahead = (Trainer(config, tmp_path / "run", CPU, serializer) for _ in range(2))
    waits: list[float] = []
    bench_train._train(plain, range(4))
    with bench_train.Driven(ahead, 0, workers) as driven:
        driven.take(1)
        driven.take(3, waits)
    assert (ahead.step, len(waits)) == (4, 3)
    assert min(waits) >= 0
    assert torch.equal(plain.sums, ahead.sums)


def test_a_paper_size_is_measured_with_its_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    real = bench_train.Trainer

    def noted(config: TrainConfig, *rest: Any) -> Trainer:
        made = real(replace(config, model=replace(TINY, context=1024)), *rest)
        seen.append((config.model, made.model.vocabulary_size))
        return made

    monkeypatch.setattr(bench_train, "Trainer", noted)
    (found,) = bench_train.train_gato_79m_bench(repeats=1)
    assert seen == [(model_config.gato_79m(), 34_176)]
    assert found["case"] == "train: gato_79m, 2 rows of 1024 tokens, bfloat16"


def _parameters(model: ModelConfig) -> int:
    return parameters(TrainConfig(model=model, text_pieces=320))["trunk"]


def test_the_serializer_is_above_what_is_asked():
    results = bench.run(["serializer"], repeats=3)["results"]
    assert [r["baseline"] for r in results] == [1e6, 4e5]
    assert all(r["ratio"] > 1 for r in results)


def test_reading_is_measured_beside_what_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_data, "STEPS", 200_000)
    monkeypatch.setattr(bench_data, "SECONDS", 0.05)
    results = bench.run(["data"], repeats=1)["results"]
    assert [r["unit"] for r in results] == [
        *("GB/s", "tokens/s/core", "tokens/s/core", "s", "samples/s/core", "s", "samples/s/core"),
        "MB",
    ]
    assert all(r["value"] > 0 for r in results)
    tokens, memory = results[1:3], results[-1]
    assert [r["baseline"] for r in tokens] == [1e6, 4e5]
    assert all(r["ratio"] > 1 for r in tokens)
    assert 0.95 < memory["ratio"] < 1.05


@pytest.mark.sim
def test_collecting_is_measured_beside_one_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("minigrid")
    monkeypatch.setattr(bench_collect, "COLLECTED", {"babyai/GoToObj-v0": 4})
    (result,) = bench.run(["collect"], repeats=1)["results"]
    assert (result["unit"], result["value"] > 0) == ("episodes/s", True)
    assert result["ratio"] == pytest.approx(result["value"] / result["baseline"])


def test_made_up_episodes_fit_their_spaces():
    for task in (bench_common.ARM, bench_common.GAME):
        episode = bench_common.made_up(task, 5)
        space = task.action_space
        assert all(space.contains(a) for a in episode.actions["action"])
        observed = episode.observations["observation"]
        assert len(observed) == 6
        assert all(task.observation_space.contains(o) for o in observed)
        assert replace(episode, seed=1) != episode


def test_an_unknown_bench_is_answered_with_the_closest():
    with pytest.raises(ValueError, match="such as serializer; got 'serialiser'"):
        bench.run(["serialiser"])
