"""The peer's shape does what it says; ours is measured beside it, every way of writing a step."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from gato import bench, bench_peer
from gato.bench_peer import CASES, PUBLISHED, TASKS, WANTED, WAYS, Case, steps_in
from gato.bench_peer_loop import LARGE, SIDE, SMALL, STACK, Peer, PeerAgent, Trunk
from gato.checkpoint import build_model
from gato.tokenizers.stream import pack
from gato.tokenizers.task_codec import History

TINY = Trunk(32, 2, 16)


def peer(frames: bool, lean: bool = False) -> Peer:
    torch.manual_seed(0)
    return Peer(TINY, frames=frames, lean=lean).eval()


def observed(frames: bool, steps: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    if frames:
        return [rng.integers(0, 256, (SIDE, SIDE, STACK), np.uint8) for _ in range(steps)]
    return [rng.normal(size=39).astype(np.float32) for _ in range(steps)]


@pytest.mark.parametrize("lean", [False, True])
def test_what_is_remembered_is_what_a_full_forward_sees(lean: bool) -> None:
    model, seen = peer(False, lean), observed(False, 6)
    agent = PeerAgent(model, 100)
    actions = torch.tensor([agent.act(o) for o in seen])  # (L, 4)
    numbers = torch.from_numpy(np.stack([np.append(o, np.float32(0)) for o in seen]))
    x = torch.stack((model.embed_observed(numbers[None]), model.embed_acted(actions[None])), 2)
    states, _ = model.run(x.flatten(1, 2))
    torch.testing.assert_close(model.act_out(states[0, ::2])[:, :4], actions, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("frames", [False, True])
@pytest.mark.parametrize("lean", [False, True])
def test_the_memory_is_cut_off_at_the_window(frames: bool, lean: bool) -> None:
    agent = PeerAgent(peer(frames, lean), 4)
    for observation in observed(frames, 5):
        action = agent.act(observation)
    assert agent.past is not None
    assert [k.shape[2] for k, _ in agent.past] == [4, 4]
    assert 0 <= action < 18 if frames else len(action) == 4


@pytest.mark.parametrize("frames", [False, True])
@pytest.mark.parametrize("lean", [False, True])
def test_the_peer_learns(frames: bool, lean: bool) -> None:
    model = peer(frames, lean).train()
    seen = torch.randn(2, 5, STACK, SIDE, SIDE) if frames else torch.randn(2, 5, 40)
    acted = torch.randint(18, (2, 5)) if frames else torch.rand(2, 5, 4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(12):
        loss = model.loss(seen, acted)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert all(p.grad is None for p in model.parameters())


def test_a_state_does_not_see_what_comes_after_it() -> None:
    model = peer(False)
    x = torch.randn(1, 8, TINY.width)
    later = x.clone()
    later[:, 5:] += 1
    assert torch.equal(model.run(x)[0][:, :5], model.run(later)[0][:, :5])


@pytest.mark.parametrize("trunk", [SMALL, LARGE])
def test_layers_have_equal_parameters(trunk: Trunk) -> None:
    theirs = sum(p.numel() for n, p in Peer(trunk, frames=False).blocks[0].named_parameters())
    way = WAYS["arm"]["joint"]
    size = replace(bench_peer._model_config(trunk, way, 16), layers=1)
    serializer = bench_peer._serializer(way, TASKS["arm"])
    model = build_model(bench_peer._config(size, way), serializer)
    ours = sum(p.numel() for p in model.blocks[0].parameters())
    assert ours == pytest.approx(theirs, rel=0.01)
    assert (size.heads, size.head_dim) == (trunk.heads, trunk.head_dim)


@pytest.mark.parametrize(
    ("task", "name"), [(task, name) for task, ways in WAYS.items() for name in ways]
)
def test_a_way_takes_the_tokens_it_says(task: str, name: str) -> None:
    way, spec = WAYS[task][name], TASKS[task]
    written = bench_peer._serializer(way, spec).episode(bench_peer.made_up(spec, 3))
    assert np.diff(written.starts).tolist() == [way.tokens] * 3


def test_quickstart_is_the_recipe() -> None:
    for task in ("arm", "frames"):
        way = WAYS[task]["quickstart"]
        assert way.history == History(window=1, hide_actions=True, joint=1)
        assert (way.codec.vector_group, way.codec.frame_cell) == (39, 32)


@pytest.mark.parametrize("name", list(WAYS["arm"]))
def test_steps_of_a_batch_are_counted(name: str) -> None:
    way, spec = WAYS["arm"][name], TASKS["arm"]
    serializer = bench_peer._serializer(way, spec)
    written = serializer.episode(bench_peer.made_up(spec, 7))
    batch = pack([[written.window(0, 7)]], 512, serializer.control)
    assert steps_in(batch.target_slot, ids=4) == 7


def test_every_way_is_measured_in_both_precisions(monkeypatch: pytest.MonkeyPatch) -> None:
    for table in (PUBLISHED, WANTED):
        for key in ("arm", "frames", "train"):
            monkeypatch.setitem(table, (key, TINY), 2.0)
    monkeypatch.setattr(bench_peer, "REMEMBERED", {"arm": 3, "frames": 2})
    monkeypatch.setattr(bench_peer, "SEQUENCE", 8)
    tiny = Case(TINY, rows=2, decisions=1, peer_steps=1, sequences=1, tokens=64)
    monkeypatch.setitem(CASES, "small", tiny)
    short = {
        task: {n: replace(w, memory=w.memory and 128) for n, w in ways.items()}
        for task, ways in WAYS.items()
    }
    monkeypatch.setattr(bench_peer, "WAYS", short)
    results = bench.run(["peer"], repeats=1)["results"]
    names = [f"{task}, {way}" for task in ("arm", "frames") for way in WAYS[task]]
    names += [f"training, {way}" for way in WAYS["arm"]]
    told = [f"peer: {n}, {d}, 32 x 2" for n in names for d in ("float32", "bfloat16")]
    assert [r["case"] for r in results if "asked" in r] == told
    for found in results:
        assert found["value"] > 0
        assert found["ratio"] == pytest.approx(found["value"] / found["baseline"])
        if "asked" in found:
            assert found["reached"] == (found["ratio"] >= 2)
            assert found["of_published"] == found["value"] / 2
