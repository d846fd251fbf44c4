"""The benches of kernels and of live decisions, at toy sizes, and what their floors are made of."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from gato import bench, bench_attention, bench_latency, bench_machine, flops, kernels
from gato.attention import packed_mask
from gato.bench_attention import Packed, Ring
from gato.bench_common import in_turns, result
from gato.presets import preset
from gato.tokenizers.task_codec import History

SHAPE = Packed("toy", rows=2, length=64, heads=4, kv_heads=2, head_dim=16)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flops, "PATIENCE", 0.02)
    monkeypatch.setattr(bench_attention, "LEAST", 1e-4)
    monkeypatch.setattr(bench_attention, "CPU_PACKED", (SHAPE,))
    monkeypatch.setattr(bench_attention, "CPU_RINGS", (Ring("toy ring", 2, 32, 4, 2, 16),))
    monkeypatch.setattr(bench_attention, "device", lambda: CPU)
    monkeypatch.setattr(bench_latency, "device", lambda: CPU)


# ---- attention -------------------------------------------------------------------------------


def test_every_kernel_is_measured_beside_a_mask_and_its_floor(capsys):
    results = bench.run(["attention"], repeats=2)["results"]
    assert [r["case"].removeprefix("attention: ") for r in results] == [
        *(
            f"toy, {dtype}, {what}: {name}"
            for dtype in ("float32", "bfloat16")
            for what in ("forward", "forward and backward")
            for name in ("sdpa", "products", "documents")
        ),
        "toy ring, float32: cached",
    ]
    for r in results:
        assert r["value"] > 0
        assert len(r["repeats"]) == len(r["ratios"]) == 2
        assert r["of_floor"] == pytest.approx(r["value"] / r["floor"])
    assert results[1]["baseline"] == results[0]["value"]
    told = capsys.readouterr().err
    if not torch.cuda.is_available():
        assert "no fa3, fa4, varlen, cudnn, flash_attn: flash kernels need CUDA" in told


def test_the_operations_are_of_the_pairs_that_see_each_other():
    lengths = bench_attention.documents(SHAPE.rows, SHAPE.length)
    assert [sum(row) for row in lengths] == [SHAPE.length] * SHAPE.rows
    assert len({n for row in lengths for n in row}) > 2
    batch = bench_attention._batch(lengths, SHAPE.length).to("cpu")
    mask = packed_mask(batch.document.view(2, -1))
    operations, moved = bench_attention.costs(SHAPE, lengths, torch.bfloat16, False)
    assert operations == 2 * 2 * int(mask.sum()) * SHAPE.heads * SHAPE.head_dim
    assert moved == 2 * SHAPE.rows * SHAPE.length * (4 + 2 + 2 + 4) * SHAPE.head_dim
    with_backward = bench_attention.costs(SHAPE, lengths, torch.bfloat16, True)
    assert with_backward == (3 * operations, 3 * moved)


def test_dense_rows_are_attended_as_one_document_each(monkeypatch):
    q, k, v = bench_attention._noise(SHAPE, SHAPE.rows * SHAPE.length, torch.float32, CPU)
    seen = []
    real = bench_attention.F.scaled_dot_product_attention

    def noted(*tensors, **options):
        seen.append(real(*tensors, **options))
        return seen[-1]

    monkeypatch.setattr(bench_attention.F, "scaled_dot_product_attention", noted)
    bench_attention._dense(SHAPE, q, k, v, True)
    bench_attention._one_by_one([[SHAPE.length]] * SHAPE.rows, SHAPE, q, k, v, False)
    dense, *alone = seen
    torch.testing.assert_close(dense, torch.cat(alone))


def test_the_ring_has_gone_round_and_every_query_sees_its_window():
    ring = Ring("", rows=2, slots=16, heads=1, kv_heads=1, head_dim=8, queries=3)
    mask = bench_attention._ring_mask(ring, torch.float32, CPU)
    assert mask.shape == (2, 1, 3, 16)
    assert ((mask == 0).sum(-1) == 13).all()
    assert not torch.equal(mask[0, 0, 0], mask[0, 0, 1])


def test_a_wrong_kernel_is_no_result(monkeypatch):
    right = bench_attention.attend_packed

    def wrong(q, k, v, meta):
        out = right(q, k, v, meta)
        return out if meta.kernel == "sdpa" else out.roll(1, 0)

    monkeypatch.setattr(bench_attention, "attend_packed", wrong)
    with pytest.raises(RuntimeError, match="attention by products is wrong"):
        bench.run(["attention"], repeats=1)


def test_the_kernel_of_the_command_stays_as_it_was():
    kernels.use("sdpa")
    try:
        bench.run(["attention"], repeats=1)
        assert kernels.chosen(kernels.Case("cpu", torch.bfloat16))[0] == "sdpa"
    finally:
        kernels.use("auto")


# ---- one live decision -----------------------------------------------------------------------


def test_a_live_decision_is_measured_beside_its_weights(monkeypatch):
    case = replace(bench_latency.CASES[0], warmup=1, decisions=3)
    monkeypatch.setattr(bench_latency, "CASES", (case,))
    results = bench.run(["latency"], repeats=2)["results"]
    assert len(results) == 8
    for dtype, rows in (("float32", results[:4]), ("bfloat16", results[4:])):
        half, tail, pace, busy = rows
        assert half["case"] == f"latency: quickstart, {dtype}, p50"
        assert [r["unit"] for r in rows] == ["ms", "ms", "Hz", "ms"]
        assert tail["value"] >= half["value"] > 0
        told = "1 token through 1.05M weights, 4 states through 0.0983M weights"
        assert half["floor_from"] == told
        assert busy["ratio"] > 1  # a decision is more than its products
        assert pace["repeats"] == pytest.approx([1e3 / ms for ms in half["repeats"]])
        assert pace["baseline"] == 20.0


@pytest.mark.parametrize("name", ["quickstart", "gato_79m"])
def test_the_models_are_the_presets(name, monkeypatch):
    case = next(c for c in bench_latency.CASES if c.preset == name)
    with torch.device("meta"):
        monkeypatch.setattr(torch.nn.Module, "to", lambda self, *to: self)
        serializer, model = bench_latency._made(case, CPU)
    assert model.config == preset(name).model
    (task,) = serializer.tasks.values()
    joint = History(window=1, hide_actions=True, joint=1)
    assert task.history == (joint if name == "quickstart" else History())


# ---- floors ----------------------------------------------------------------------------------


def test_a_floor_is_operations_over_peak_or_bytes_over_bandwidth(monkeypatch):
    monkeypatch.setattr(bench_machine, "peak", lambda device, dtype: 100.0)
    monkeypatch.setattr(bench_machine, "bandwidth", lambda device, size: 10.0)
    assert bench_machine.floor_seconds(CPU, torch.float32, 500.0, 10.0) == 5.0
    assert bench_machine.floor_seconds(CPU, torch.float32, 500.0, 100.0) == 10.0


def test_no_product_is_faster_than_the_peak():
    flops.measured.cache_clear()
    found = bench_machine.peaks(CPU)
    assert found.keys() == {
        *("cpu float32 GFLOP/s", "cpu bfloat16 GFLOP/s", "cpu memory GB/s"),
    }
    assert all(1 < x < 1e6 for x in found.values())
    a = torch.randn(512, 512)
    threads = torch.get_num_threads()
    (times,) = in_turns(5, lambda: a @ a)
    assert 2 * 512**3 / min(times) / 1e9 < 3 * found["cpu float32 GFLOP/s"]
    assert torch.get_num_threads() == threads


def test_the_machine_is_told_alike_however_busy():
    machine = bench_machine.machine()
    assert machine["cores"] >= 1
    assert machine["memory_gb"] > 0
    busy, idle = machine | {"load": 99.0}, machine | {"load": 0.0}
    assert bench_machine.in_words(busy) == bench_machine.in_words(idle)
    assert bench_machine.in_words(machine | {"gpu": "H200"}) != bench_machine.in_words(machine)
    assert "load 99" in (bench_machine.warning(busy) or "")
    assert bench_machine.warning(idle) is None
    versions = bench_machine.versions()
    assert versions.keys() >= {"python", "torch", "numpy", "commit", "OMP_WAIT_POLICY"}


def test_the_commit_is_named_where_there_is_one(tmp_path):
    assert bench_machine.commit(tmp_path) is None


# ---- results ---------------------------------------------------------------------------------


def test_ratios_are_taken_pair_by_pair():
    one = result("a: b", [10.0, 40.0, 22.0], "x/s", [5.0, 20.0, 10.0], "c", floor=44.0)
    assert one["value"] == 22.0
    assert one["ratios"] == [2.0, 2.0, 2.2]
    assert one["ratio"] == 2.0
    assert one["spread"] == [10.0, 40.0]
    assert one["of_floor"] == 0.5
    bare = result("a: b", 4.0, "ms", 2.0, "c", floor=1.0, better="less")
    assert (bare["ratio"], bare["ratios"], bare["of_floor"]) == (2.0, None, 0.25)


def test_works_are_measured_in_turns():
    order: list[str] = []
    times = in_turns(2, lambda: order.append("a"), lambda: order.append("b"), calls=2)
    assert "".join(order) == "aabb" * 3
    assert [len(t) for t in times] == [2, 2]
