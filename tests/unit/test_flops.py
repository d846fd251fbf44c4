"""Model FLOPs against what torch counts, part by part."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from gato import bench_machine
from gato.checkpoint import build_model
from gato.config import TrainConfig
from gato.corpora import open_corpus
from gato.fitting import make_serializer
from gato.flops import FlopCounter, by_name, measured, pairs, peak
from gato.mixture import Mixture
from gato.model import GatoModel
from gato.tokenizers.stream import TokenBatch

CPU = torch.device("cpu")


@pytest.fixture
def drawn(tiny: TrainConfig, tiny_text_model: bytes) -> tuple[GatoModel, TokenBatch]:
    """Return a model and a batch in which one document fills each row."""
    config = replace(tiny, rows=2, corpora=tiny.corpora[:2])
    serializer = make_serializer(config, tiny_text_model)
    corpora = [open_corpus(c, serializer) for c in config.corpora]
    batch = Mixture.of(config, corpora, serializer).batch(0)
    return build_model(config, serializer), batch


def test_the_formula_is_what_torch_counts(drawn):
    model, batch = drawn
    model.eval()  # no padding is computed
    # in bf16 a CPU computes attention by plain products, which torch counts
    with (
        torch.autocast("cpu", torch.bfloat16),
        FlopCounterMode(display=False) as counting,
    ):
        model.loss(batch.to("cpu")).sum().backward()
    found = {
        module: {str(operator): n for operator, n in counts.items()}
        for module, counts in counting.get_flop_counts().items()
    }
    counter = FlopCounter(model)
    blocks = [v for k, v in found.items() if re.fullmatch(r"GatoModel\.blocks\.\d+", k)]
    assert len(blocks) == model.config.layers
    dense = counter.per_token * len(batch.inputs)
    assert dense == sum(block["aten.mm"] for block in blocks)
    every_pair = batch.rows * batch.row_length**2  # what the mask hides is computed too
    assert counter.per_pair * every_pair == sum(block["aten.bmm"] for block in blocks)
    hidden = torch.randn(len(batch.target_at), model.config.width, requires_grad=True)
    with FlopCounterMode(display=False) as predicting:
        model.target_nll(hidden, torch.from_numpy(batch.target_ids)).sum().backward()
    logits = counter.per_target * len(batch.target_at)
    assert logits == predicting.get_total_flops()
    embedded = counter.of(batch) - counter.of(replace(batch, payload={}))
    theirs = counting.get_total_flops() - dense - counter.per_pair * every_pair - logits
    # the first layers of embedders pass no gradient on, which the formula counts all the same
    assert 0.66 * embedded <= theirs <= embedded
    assert embedded > 0
    attention = counter.per_pair * pairs(batch.cu_seqlens)
    assert counter.of(batch) == pytest.approx(dense + attention + logits + embedded)


def test_counting_changes_nothing(drawn):
    model, batch = drawn
    model.train()
    state = torch.get_rng_state()
    first = FlopCounter(model).of(batch)
    assert torch.equal(state, torch.get_rng_state())
    assert all(m.training for m in model.modules())
    assert FlopCounter(model).of(batch) == first


@pytest.mark.parametrize("window", [None, 1, 3, 100])
def test_pairs_are_counted_one_by_one(window):
    lengths = [1, 5, 2, 8]
    bounds = np.array([0, 1, 6, 8, 16, 16, 16], np.int32)  # with empty documents at the end
    expected = sum(min(i + 1, window or n) for n in lengths for i in range(n))
    assert pairs(bounds, window) == expected


def test_peaks_are_known_or_measured():
    assert (
        by_name("NVIDIA H200")
        == by_name("NVIDIA GH200 480GB")
        == by_name("NVIDIA H100 80GB HBM3")
        == 1979e12 / 2
    )
    assert by_name("NVIDIA H100 PCIe") == 1513e12 / 2
    assert by_name("NVIDIA H100 NVL") == by_name("NVIDIA H200 NVL") == 1671e12 / 2
    assert by_name("NVIDIA A100-SXM4-80GB") == 312e12
    assert by_name("NVIDIA GeForce RTX 4090") is None
    found = peak(CPU, torch.float32)
    assert found is not None
    assert 1e9 < found < 1e14
    assert peak(CPU, torch.float32) == found
    assert peak(torch.device("cuda"), torch.float32) is None


def test_the_share_of_the_peak_and_the_floors_have_one_peak():
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    for dtype in (torch.float32, torch.bfloat16):
        assert peak(CPU, dtype) == bench_machine.peak(CPU, dtype)
        assert measured(dtype, 4) == pytest.approx(4 * measured(dtype, 1), rel=0.5)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.get_num_threads() == threads
