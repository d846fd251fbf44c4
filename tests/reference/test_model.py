"""The model's fast paths equal slow ones; its sizes are the paper's."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gato.layers import rms_norm, rotate, rotation_at
from gato.model import GatoModel, parameter_table, soft_cross_entropy
from gato.model_config import SIZES, ModelConfig

LENGTHS = [[20, 28], [48], [7, 9, 11]]


@pytest.mark.parametrize(
    "changes", [{}, {"tied": False, "ffn": "swiglu", "qkv_bias": True}, {"loss_chunk": 7}]
)
def test_loss_equals_cross_entropy_of_all_logits_at_the_targets(make_batch, make_model, changes):
    model, batch = make_model(**changes), make_batch(LENGTHS)
    logits = model.logits(model(batch))  # (N, V)
    assert logits.shape == (batch.inputs.numel(), model.vocabulary_size)
    everywhere = F.cross_entropy(logits[:-1], batch.inputs[1:].clamp(min=0), reduction="none")
    loss = model.loss(batch)
    assert loss.shape == batch.target_ids.shape
    torch.testing.assert_close(loss, everywhere[batch.target_at - 1])
    loss.mean().backward()
    gradient = model.blocks[0].attention.qkv.weight.grad.clone()
    model.zero_grad()
    everywhere[batch.target_at - 1].mean().backward()
    torch.testing.assert_close(gradient, model.blocks[0].attention.qkv.weight.grad)


@pytest.mark.parametrize("window", [None, 6])
def test_packed_documents_equal_one_by_one(make_batch, make_model, window):
    model, batch = make_model(window=window), make_batch(LENGTHS)
    hidden = model(batch)
    bounds = batch.cu_seqlens.tolist()
    for start, stop in pairwise(bounds):
        if start == stop:
            continue
        alone = make_batch([[stop - start]], stop - start)
        alone.inputs, alone.local = batch.inputs[start:stop], batch.local[start:stop]
        torch.testing.assert_close(hidden[start:stop], model(alone), atol=1e-5, rtol=1e-5)


def slow_soft_loss(logits, ids, start, stop, spread):
    """Return the loss against dense target distributions, one target at a time."""
    losses = []
    for row, target in zip(logits.double(), ids.tolist(), strict=True):
        weight = torch.zeros(len(row), dtype=torch.float64)
        if start <= target < stop:
            for bin_id in range(start, stop):
                if abs(bin_id - target) <= -(-3 * spread // 1):
                    weight[bin_id] = torch.exp(
                        torch.tensor(-0.5 * ((bin_id - target) / spread) ** 2, dtype=torch.float64)
                    )
        else:
            weight[target] = 1
        losses.append(-(weight / weight.sum() * row.log_softmax(0)).sum())
    return torch.stack(losses)


@pytest.mark.parametrize("spread", [0.3, 1.0, 2.5])
@pytest.mark.parametrize(("start", "stop"), [(20, 60), (0, 5), (90, 96)])
def test_soft_bins_equal_dense_targets(spread, start, stop):
    generator = torch.Generator().manual_seed(0)
    ids = torch.arange(96)
    logits = torch.randn(96, 96, generator=generator).requires_grad_()
    loss = soft_cross_entropy(logits, ids, (start, stop), spread)
    expected = slow_soft_loss(logits, ids, start, stop, spread)
    torch.testing.assert_close(loss.double(), expected, atol=1e-5, rtol=1e-5)
    hard = (ids < start) | (ids >= stop)
    torch.testing.assert_close(loss[hard], F.cross_entropy(logits, ids, reduction="none")[hard])
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    assert gradient.isfinite().all()
    torch.testing.assert_close(gradient.sum(dim=1), torch.zeros(96), atol=1e-5, rtol=0)


def test_soft_bins_come_from_the_configuration_or_the_call(make_batch, make_model):
    batch, plain, soft = make_batch(LENGTHS), make_model(), make_model(soft_bins=1.5)
    expected = plain.loss(batch, ordinal=(30, 70), soft_bins=1.5)
    torch.testing.assert_close(soft.loss(batch, ordinal=(30, 70)), expected)
    torch.testing.assert_close(soft.loss(batch, soft_bins=0.0), plain.loss(batch))
    with pytest.raises(ValueError, match="needs the ordinal ids"):
        soft.loss(batch)


class Counting(nn.Module):
    """A net that adds a vector per row and counts its calls."""

    def __init__(self, width: int) -> None:
        """Make the net."""
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))
        self.calls = 0

    def forward(self, payload: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return the value of each row, repeated."""
        self.calls += 1
        return payload["value"][:, None] * self.scale


def test_nets_are_called_once_and_added_at_their_tokens(make_batch, make_model):
    model, batch = (
        make_model(nets={"first": Counting(32), "second": Counting(32)}),
        make_batch(LENGTHS),
    )
    plain = model.embed(batch.inputs, batch.local)
    batch.payload = {
        "first": {"at": torch.tensor([3, 50, 50]), "value": torch.tensor([1.0, 2.0, 4.0])},
        "second": {"at": torch.tensor([3]), "value": torch.tensor([0.5])},
    }
    x = model.embed(batch.inputs, batch.local, batch.payload)
    scale = model.nets["first"].scale, model.nets["second"].scale
    torch.testing.assert_close(x[3], plain[3] + scale[0] + 0.5 * scale[1])
    torch.testing.assert_close(x[50], plain[50] + 6 * scale[0])
    untouched = torch.ones(len(x), dtype=torch.bool)
    untouched[[3, 50]] = False
    assert torch.equal(x[untouched], plain[untouched])
    assert model.nets["first"].calls == model.nets["second"].calls == 1
    model.loss(batch).mean().backward()
    assert model.nets["first"].scale.grad.abs().sum() > 0
    batch.payload = {"third": batch.payload["first"]}
    with pytest.raises(ValueError, match=r"'third'.*first, second"):
        model(batch)


def test_tokens_without_id_share_a_row_that_is_never_predicted(make_model):
    model = make_model()
    local = torch.tensor([0, 0, 600, 511])
    x = model.embed(torch.tensor([-1, 5, 5, 5]), local)
    torch.testing.assert_close(x[0], model.table.weight[96] + model.local.weight[0])
    torch.testing.assert_close(x[1], model.table.weight[5] + model.local.weight[0])
    assert torch.equal(x[2], x[3])  # positions past the table share its last row
    assert model.logits(x).shape == (4, 96)


@pytest.mark.parametrize("name", SIZES)
def test_sizes_build_on_the_meta_device_and_are_the_papers(name):
    with torch.device("meta"):
        model = GatoModel(SIZES[name](), 33_280, masked_id=3)
    table = parameter_table(model)
    assert table["total"] == sum(p.numel() for p in model.parameters())
    published = {"gato_79m": 79e6, "gato_364m": 364e6, "gato_1b": 1.18e9}
    if name in published:  # Gato's relative positions, about a tenth of its trunk, are not here
        assert 0.88 < table["total"] / published[name] < 1.02
    else:
        assert 0.8e6 < table["trunk"] < 1.4e6
    shape = (model.config.layers, model.config.heads, model.config.width, model.config.ffn_width)
    expected = {
        "gato_79m": (8, 24, 768, 3072),
        "gato_364m": (12, 12, 1536, 6144),
        "gato_1b": (24, 16, 2048, 8192),
    }
    assert expected.get(name, shape) == shape


def test_parameter_table_names_the_parts(make_model):
    table = parameter_table(make_model(nets={"first": Counting(32)}, tied=False))
    assert list(table) == ["table", "local", "nets.first", "norms", "trunk", "head", "total"]
    assert table["nets.first"] == 32
    assert table["norms"] == 5 * 32 + 4 * 8


def test_a_new_model_starts_as_the_identity(make_batch):
    model, batch = GatoModel(SIZES["quickstart"](), 96, 1), make_batch(LENGTHS)
    x = model.embed(batch.inputs, batch.local)
    torch.testing.assert_close(model(batch), model.norm(x))
    uniform = torch.full((len(batch.target_ids),), 96.0).log()
    assert (model.loss(batch) - uniform).abs().mean() < 0.5


@pytest.mark.parametrize("weight_shape", [(16,), (5, 16)])
def test_norm_equals_torchs_with_gradients(weight_shape):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 5, 16, generator=generator)
    weight = torch.randn(weight_shape, generator=generator)
    inputs = [t.clone().requires_grad_() for t in (x, weight)]
    twins = [t.clone().requires_grad_() for t in (x, weight)]
    out = rms_norm(*inputs, 1e-6)
    expected = F.rms_norm(twins[0], (16,), None, 1e-6) * twins[1]
    torch.testing.assert_close(out, expected)
    (out**3).sum().backward()
    (expected**3).sum().backward()
    for a, b in zip(inputs, twins, strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-4, rtol=1e-4)


def test_rotation_by_complex_product_equals_its_parts(monkeypatch):
    x = torch.randn(6, 4, 8)
    turn = rotation_at(torch.tensor([0, 1, 2, 9, 100, 10**6]), 8, 1e4)
    by_product = rotate(x, turn)
    with monkeypatch.context() as compiling:
        compiling.setattr(torch.compiler, "is_compiling", lambda: True)
        torch.testing.assert_close(by_product, rotate(x, turn))
    torch.testing.assert_close(rotate(x, turn)[0], x[0])  # position 0 does not turn
    torch.testing.assert_close(rotate(x, turn).norm(dim=-1), x.norm(dim=-1))


def test_attention_feels_distances_but_not_absolute_positions(make_batch, make_model):
    model, batch = make_model(), make_batch(LENGTHS)
    hidden = model(batch)
    batch.position = batch.position + 1000
    torch.testing.assert_close(model(batch), hidden, atol=1e-4, rtol=1e-4)
    batch.position = batch.position * 3
    assert (model(batch) - hidden).abs().max() > 0.01


def test_autocast_is_close_to_full_precision(make_batch, make_model):
    model, batch = make_model(), make_batch(LENGTHS)
    with torch.no_grad():
        exact = model.loss(batch)
        with torch.autocast("cpu", torch.bfloat16):
            rough = model.loss(batch)
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, exact, atol=0.1, rtol=0.05)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kv_heads": 3}, "kv_heads must divide heads=4; got 3"),
        ({"head_dim": 7}, "head_dim must be even"),
        ({"ffn": "relu"}, "geglu, swiglu; got 'relu'"),
        ({"layers": 0}, "layers must be at least 1; got 0"),
        ({"window": 0}, "window must be at least 1"),
        ({"soft_bins": -1.0}, "soft_bins"),
    ],
)
def test_impossible_sizes_are_refused(changes, message):
    sizes = {"layers": 1, "width": 8, "heads": 4, "head_dim": 2, "ffn_width": 8, "context": 4}
    with pytest.raises(ValueError, match=message):
        ModelConfig(**{**sizes, **changes})
