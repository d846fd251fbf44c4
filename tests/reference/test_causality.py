"""No token sees the future, another document, or further back than the window."""

import pytest
import torch

LENGTHS = [[20, 28], [48], [7, 9, 11]]


def changed(batch, where):
    """Return `batch` with other ids at the tokens `where` (N,) bool."""
    inputs = batch.inputs.where(~where, (batch.inputs + 17) % 96)
    assert (inputs != batch.inputs).sum() == where.sum()
    return type(batch)(**{**vars(batch), "inputs": inputs})


@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("window", [None, 8])
def test_changing_the_future_leaves_the_past_bit_identical(make_batch, make_model, window, amp):
    model, batch = make_model(window=window), make_batch(LENGTHS)
    for cut in (1, 5, 19):
        future = batch.position >= cut
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=amp):
            before, after = model(batch), model(changed(batch, future))
        assert torch.equal(before[~future], after[~future])
        assert not torch.equal(before[future], after[future])


@pytest.mark.parametrize("window", [None, 8])
def test_changing_one_document_leaves_the_others_bit_identical(make_batch, make_model, window):
    model, batch = make_model(window=window), make_batch(LENGTHS)
    for document in batch.document.unique():
        own = batch.document == document
        with torch.no_grad():
            before, after = model(batch), model(changed(batch, own))
        assert torch.equal(before[~own], after[~own])
        assert (before[own] != after[own]).any(dim=1).all()


def test_a_window_reaches_layers_times_window_tokens_back(make_batch, make_model):
    window, layers = 5, 2
    model, batch = make_model(window=window, layers=layers), make_batch([[48]])
    reach = layers * (window - 1)
    with torch.no_grad():
        before, after = model(batch), model(changed(batch, batch.position == 10))
    moved = (before != after).any(dim=1).nonzero().flatten().tolist()
    assert moved == list(range(10, 10 + reach + 1))


def test_gradients_flow_only_from_the_future_to_the_past(make_batch, make_model):
    model, batch = make_model(), make_batch(LENGTHS)
    x = model.embed(batch.inputs, batch.local).detach().requires_grad_()
    model.trunk(x, batch)[12].sum().backward()
    touched = x.grad.abs().sum(dim=1) > 0
    assert touched.nonzero().flatten().tolist() == list(range(13))
