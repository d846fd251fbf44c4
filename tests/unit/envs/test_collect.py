"""Demonstrations depend on the seed alone: not on workers, interruptions or what came before."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from gato.envs import collect as collecting
from gato.envs.collect import collect
from gato.envs.episode import EVALUATION_SEED_START
from gato.envs.score import score
from gato.envs.store import EpisodeStore

TASK = "toy/walk-v0"


def tree(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def test_only_successes_are_kept(tmp_path: Path, toy: ModuleType) -> None:
    seen = []
    folders = collect(
        [TASK], 30, tmp_path, noise=0.2, workers=1, progress=lambda *args: seen.append(args)
    )
    store = EpisodeStore(folders[TASK])
    store.validate()
    assert len(store) == 30
    assert (store.successes == 1).all()
    assert store.seeds[-1] > 29  # some were dropped
    assert (np.diff(store.seeds) > 0).all()
    assert store.seeds.max() < EVALUATION_SEED_START
    assert seen[-1] == (TASK, 30, 30)
    assert store.manifest["versions"]["no-such-package"] == "not installed"


def test_noise_is_executed_and_the_target_is_clean(tmp_path: Path, toy: ModuleType) -> None:
    store = EpisodeStore(collect([TASK], 20, tmp_path, noise=0.3, workers=1)[TASK])
    same, low, high = 0, 0.0, 0.0
    for i in range(20):
        e = store.episode(i)
        clean = np.clip(-e.observations["a/place"][:-1], -1, 1)
        np.testing.assert_array_equal(e.targets["go"], clean)
        moved = e.observations["a/place"][:-1] + e.actions["go"]
        np.testing.assert_allclose(e.observations["a/place"][1:], moved, atol=1e-5)
        assert (e.targets["say"] == 2).all()
        same += (e.actions["say"] == 2).sum()
        low, high = min(low, e.actions["go"].min()), max(high, e.actions["go"].max())
    assert (low, high) == (-1.0, 1.0)  # clipped to the Box
    assert 0.6 < same / store.lengths.sum() < 0.95  # 0.3 are random, a third of these agree


def test_without_noise_there_are_no_targets(tmp_path: Path, toy: ModuleType) -> None:
    store = EpisodeStore(collect([TASK], 3, tmp_path, workers=1)[TASK])
    assert store.episode(0).targets is None


def test_interrupted_collection_goes_on(
    tmp_path: Path, toy: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    collect([TASK], 25, tmp_path / "whole", noise=0.1, workers=1)
    attempt, calls = collecting._attempt, 0

    def interrupted(*args: object) -> object:
        nonlocal calls
        calls += 1
        if calls % 7 == 0:
            raise KeyboardInterrupt
        return attempt(*args)

    monkeypatch.setattr(collecting, "_attempt", interrupted)
    for _ in range(20):
        try:
            collect([TASK], 25, tmp_path / "cut", noise=0.1, workers=1)
            break
        except KeyboardInterrupt:
            pass
    assert calls > 14
    assert tree(tmp_path / "cut") == tree(tmp_path / "whole")


def test_more_episodes_extend_a_store(tmp_path: Path, toy: ModuleType) -> None:
    collect([TASK], 25, tmp_path / "whole", workers=1)
    for episodes in (10, 25, 5):
        collect([TASK], episodes, tmp_path / "grown", workers=1)
    assert tree(tmp_path / "grown") == tree(tmp_path / "whole")
    with pytest.raises(ValueError, match=r"seed=0; got 1"):
        collect([TASK], 25, tmp_path / "grown", seed=1, workers=1)


def test_seeds_give_different_episodes(tmp_path: Path, toy: ModuleType) -> None:
    stores = [
        EpisodeStore(collect([TASK], 3, tmp_path / str(s), seed=s, workers=1)[TASK])
        for s in (0, 1023)
    ]
    assert stores[1].seeds.min() >= 1023 * collecting.ATTEMPTS > stores[0].seeds.max()
    assert stores[1].seeds.max() < EVALUATION_SEED_START


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"task_ids": ["toy/wlak-v0"]}, "closest: toy/walk-v0"),
        ({"task_ids": "toy/walk-v0"}, "list of different task ids"),
        ({"task_ids": ["gym/CartPole-v1"]}, "has none"),
        ({"episodes": 0}, r"episodes in \[1"),
        ({"seed": 1024}, r"seed in \[0, 1023\]"),
        ({"noise": float("nan")}, "noise in"),
        ({"workers": 0}, "workers in"),
    ],
)
def test_bad_settings_are_refused(
    tmp_path: Path, toy: ModuleType, changes: dict, match: str
) -> None:
    settings = {"task_ids": [TASK], "episodes": 1, "out": tmp_path, "workers": 1} | changes
    with pytest.raises(ValueError, match=match):
        collect(**settings)
    assert list(tmp_path.iterdir()) == []


def test_a_broken_expert_stops_the_run(
    tmp_path: Path, toy: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    stay = {"go": np.zeros(2, np.float32), "say": np.int64(1)}
    monkeypatch.setattr(toy.Walker, "act", lambda *_: stay)
    with pytest.raises(RuntimeError, match=f"none of {collecting.GIVE_UP} attempts"):
        collect([TASK], 3, tmp_path, workers=1)


def test_scores_of_expert_and_random(toy: ModuleType) -> None:
    expert, chance = (score(TASK, 20, policy=p) for p in ("expert", "random"))
    assert expert["success_rate"] > 0.8
    assert chance["success_rate"] < 0.3
    assert score(TASK, 20, policy="random") == chance
    assert expert["first_seed"] == EVALUATION_SEED_START
    with pytest.raises(ValueError, match="got 'human'"):
        score(TASK, 1, policy="human")


@pytest.mark.sim
def test_workers_make_no_difference(tmp_path: Path) -> None:
    """Two processes, killed or not, write the bytes that one writes."""
    pytest.importorskip("metaworld")
    pytest.importorskip("minigrid")
    tasks = ["babyai/GoToObj-v0", "metaworld/reach-v3"]
    collect(tasks, 6, tmp_path / "one", noise=0.1, workers=1)
    collect(tasks, 3, tmp_path / "two", noise=0.1, workers=2)
    collect(tasks, 6, tmp_path / "two", noise=0.1, workers=2)
    assert tree(tmp_path / "one") == tree(tmp_path / "two")
