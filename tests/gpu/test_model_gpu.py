"""The model equals itself on a CPU, learns, and decodes as it computes in one go."""

from __future__ import annotations

import pytest
import torch


@torch.no_grad()
def test_the_model_equals_the_cpu(device, make_model, make_batch, error):
    model, batch = make_model(), make_batch()
    hidden = model(batch)
    assert error(hidden, make_model("cpu")(batch.to("cpu"))) < 1e-4
    with torch.autocast(device, torch.bfloat16):
        assert error(model(batch), hidden) < 3e-2


@pytest.mark.parametrize("window", [None, 33])
def test_losses_and_gradients_equal_the_cpus(device, make_model, make_batch, error, window):
    model, twin, batch = make_model(window=window), make_model("cpu", window=window), make_batch()
    expected = twin.loss(batch.to("cpu"))
    expected.mean().backward()
    for dtype, tolerance in ((torch.float32, 1e-3), (torch.bfloat16, 5e-2)):
        model.zero_grad()
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            losses = model.loss(batch)
        losses.mean().backward()
        assert error(losses, expected) < tolerance
        got, wanted = (
            torch.cat([p.grad.flatten().cpu() for p in m.parameters()]) for m in (model, twin)
        )
        assert error(got, wanted) < tolerance


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)])
@torch.no_grad()
def test_cached_decoding_equals_the_full_forward(
    device, make_model, make_batch, error, dtype, tolerance
):
    model, length = make_model(window=48), 160
    batch = make_batch(lengths=[[length]] * 3, row_length=length)
    x = model.embed(batch.inputs, batch.local).view(3, length, -1)
    expected = model(batch).view(3, length, -1)
    cache = model.new_cache(3, chunk=16, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    done = torch.zeros(3, dtype=torch.int64)
    with torch.autocast(device, torch.bfloat16, enabled=dtype == torch.bfloat16):
        while (done < length).any():
            valid = torch.randint(0, 17, (3,), generator=generator).minimum(length - done)
            at = (done[:, None] + torch.arange(16)).clamp(max=length - 1).to(device)
            rows = torch.arange(3, device=device)[:, None]
            hidden = model.decode(x[rows, at], cache, valid.to(device))
            for row, n in enumerate(valid.tolist()):
                if n:
                    start = int(done[row])
                    assert error(hidden[row, :n], expected[row, start : start + n]) < tolerance
            done += valid


def test_a_packed_batch_trains_and_the_loss_falls(device, make_model, make_batch):
    model, batch = make_model(), make_batch()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, fused=True)
    losses = []
    for _ in range(3):
        with torch.autocast(device, torch.bfloat16):
            loss = model.loss(batch).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0]


@pytest.mark.gpu
@torch.no_grad()
def test_decoding_runs_as_a_cuda_graph(make_model, error):
    model = make_model("cuda", window=64)
    x = torch.randn(4, 1, model.config.width, device="cuda")
    valid = torch.tensor([1, 1, 0, 1], device="cuda")
    eager, graphed = model.new_cache(4, chunk=1), model.new_cache(4, chunk=1)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        model.decode(x, graphed, valid)
    torch.cuda.current_stream().wait_stream(stream)
    graphed.reset()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        hidden = model.decode(x, graphed, valid)
    graphed.reset()
    for step in range(100):
        x.normal_(generator=torch.Generator("cuda").manual_seed(step))
        graph.replay()
        expected = model.decode(x, eager, valid)
        assert error(hidden[[0, 1, 3]], expected[[0, 1, 3]]) < 1e-4
    assert graphed.lengths.tolist() == [100, 100, 0, 100]
