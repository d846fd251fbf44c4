"""What `gato bench` measures on a GPU is what the GPU does, and never above its measured peak."""

from __future__ import annotations

import pytest
import torch

from gato import bench, bench_attention, bench_machine
from gato.bench_attention import Packed, Ring
from gato.bench_common import seconds

SIDE = {"cuda": 4096, "cpu": 256}


@pytest.fixture
def on(device: str, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Return the device; benches run on it."""
    found = torch.device(device)
    for module in (bench_machine, bench_attention):
        monkeypatch.setattr(module, "device", lambda: found)
    return found


def test_what_was_given_is_waited_for(on):
    a = torch.randn(SIDE[on.type], SIDE[on.type], device=on)

    def work() -> None:
        for _ in range(8):
            torch.mm(a, a)

    work()
    least = 8 * 2 * SIDE[on.type] ** 3 / bench_machine.peak(on, torch.float32)
    assert seconds(work, on) > 0.7 * least


def test_peaks_are_told_for_every_dtype(on):
    found = bench_machine.peaks(on)
    kind = on.type
    assert found.keys() == {
        *(f"{kind} float32 GFLOP/s", f"{kind} bfloat16 GFLOP/s", f"{kind} memory GB/s"),
    }
    assert all(x > 1 for x in found.values())
    if kind == "cuda":
        assert found["cuda bfloat16 GFLOP/s"] > 1.5 * found["cuda float32 GFLOP/s"]
        assert found["cuda memory GB/s"] > 100


def test_every_kernel_at_hand_is_measured_below_its_floor(on, at_hand, monkeypatch):
    gpu = on.type == "cuda"
    rows, length = (8, 1024) if gpu else (2, 64)
    shape = Packed("toy", rows, length, heads=4, kv_heads=2, head_dim=64)
    for name in ("GPU_PACKED", "CPU_PACKED"):
        monkeypatch.setattr(bench_attention, name, (shape,))
    for name in ("GPU_RINGS", "CPU_RINGS"):
        monkeypatch.setattr(bench_attention, name, (Ring("toy ring", 32 * rows, length, 4, 2, 64),))
    if not gpu:
        monkeypatch.setattr(bench_attention, "LEAST", 1e-3)
    results = bench.run(["attention"], repeats=2)["results"]
    packed = [r["case"].rpartition(": ")[2] for r in results if "bfloat16, forward:" in r["case"]]
    assert set(packed) - {"sdpa by cuDNN"} == set(at_hand(torch.bfloat16, 64))
    assert results[-1]["case"].endswith("cached")
    for r in results:
        assert 0 < r["of_floor"] < 1.2
        assert r["unit"] in ("GB/s", "TFLOP/s" if gpu else "GFLOP/s")
