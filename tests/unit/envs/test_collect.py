"""Demonstrations depend on the seed alone: not on workers, interruptions or what came before."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from gymnasium import spaces

from gato import cli
from gato.envs import collect as collecting
from gato.envs import play as playing
from gato.envs import registry
from gato.envs.collect import collect
from gato.envs.episode import EVALUATION_SEED_START
from gato.envs.score import score
from gato.envs.store import EpisodeStore, EpisodeWriter
from gato.envs.workers import WorkerDiedError

TASK = "toy/walk-v0"


def tree(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def test_only_successes_are_kept(tmp_path: Path, toy: ModuleType) -> None:
    seen = []
    folders = collect(
        [TASK], 30, tmp_path, noise=0.2, workers=0, progress=lambda *args: seen.append(args)
    )
    store = EpisodeStore(folders[TASK])
    store.validate()
    assert len(store) == 30
    assert (store.successes == 1).all()
    assert store.seeds[-1] > 29  # some were dropped
    assert (np.diff(store.seeds) > 0).all()
    assert store.seeds.max() < EVALUATION_SEED_START
    assert seen[-1] == (TASK, 30, 30, store.seeds[-1] + 1)
    assert store.manifest["versions"]["no-such-package"] == "not installed"


def test_what_became_of_each_task_is_told(tmp_path: Path, toy: ModuleType) -> None:
    def told(episodes: int) -> collecting.Collected:
        found: list[collecting.Collected] = []
        collect([TASK], episodes, tmp_path, noise=0.2, workers=0, on_done=found.append)
        (one,) = found
        return one

    first, more, same = told(8), told(20), told(20)
    store = EpisodeStore(tmp_path / TASK)
    assert (first.task, first.store) == (TASK, store.path)
    assert [(one.kept, one.new) for one in (first, more, same)] == [(8, 8), (20, 12), (20, 0)]
    assert [one.tried for one in (first, more, same)] == [
        store.seeds[7] + 1,
        store.seeds[-1] + 1,
        store.seeds[-1] + 1,
    ]
    assert more.tried > 20, "some failed"
    assert (more.mean_return, more.success_rate) == (store.returns.mean(), 1.0)
    assert same.seconds == 0.0


def test_the_command_tells_what_it_has_collected(
    tmp_path: Path, toy: ModuleType, capsys: pytest.CaptureFixture
) -> None:
    arguments = ["collect", TASK, "--episodes", "3", "--out", str(tmp_path), "--workers", "0"]
    assert cli.main([*arguments, "--json"]) == cli.DONE
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["task"], row["kept"], row["store"]) == (TASK, 3, str(tmp_path / TASK))
    assert {"new", "tried", "mean_return", "success_rate", "seconds"} < row.keys()
    assert cli.main(arguments) == cli.DONE
    heading, cells = (line.split() for line in capsys.readouterr().out.splitlines())
    assert heading == list(row)
    assert cells[:4] == [TASK, str(tmp_path / TASK), "3", "0"]


def test_a_folder_that_cannot_be_written_is_named_before_anything_is_played(
    tmp_path: Path, toy: ModuleType, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "file").touch()
    for out in ("/proc/self/nowhere", str(tmp_path / "file")):
        arguments = ["collect", TASK, "--episodes", "3", "--out", out, "--workers", "0"]
        assert cli.main(arguments) == cli.BAD_INPUT
        told = capsys.readouterr().err
        assert f"expected a folder for a store that can be written; got {out}" in told
        assert "Choose another folder" in told
        assert told.count("\n") == 1


def test_noise_is_executed_and_the_target_is_clean(tmp_path: Path, toy: ModuleType) -> None:
    store = EpisodeStore(collect([TASK], 20, tmp_path, noise=0.3, workers=0)[TASK])
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
    store = EpisodeStore(collect([TASK], 3, tmp_path, workers=0)[TASK])
    assert store.episode(0).targets is None


def test_interrupted_collection_goes_on(
    tmp_path: Path, toy: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    collect([TASK], 25, tmp_path / "whole", noise=0.1, workers=0)
    attempt, calls = playing.attempt, 0

    def interrupted(*args: object) -> object:
        nonlocal calls
        calls += 1
        if calls % 7 == 0:
            raise KeyboardInterrupt
        return attempt(*args)

    monkeypatch.setattr(playing, "attempt", interrupted)
    for _ in range(20):
        try:
            collect([TASK], 25, tmp_path / "cut", noise=0.1, workers=0)
            break
        except KeyboardInterrupt:
            pass
    assert calls > 14
    assert tree(tmp_path / "cut") == tree(tmp_path / "whole")


def test_more_episodes_extend_a_store(tmp_path: Path, toy: ModuleType) -> None:
    collect([TASK], 25, tmp_path / "whole", workers=0)
    for episodes in (10, 25, 5):
        collect([TASK], episodes, tmp_path / "grown", workers=0)
    assert tree(tmp_path / "grown") == tree(tmp_path / "whole")
    with pytest.raises(ValueError, match=r"seed=0; got 1"):
        collect([TASK], 25, tmp_path / "grown", seed=1, workers=0)


def test_seeds_give_different_episodes(tmp_path: Path, toy: ModuleType) -> None:
    stores = [
        EpisodeStore(collect([TASK], 3, tmp_path / str(s), seed=s, workers=0)[TASK])
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
        ({"workers": -1}, "workers in"),
    ],
)
def test_bad_settings_are_refused(
    tmp_path: Path, toy: ModuleType, changes: dict, match: str
) -> None:
    settings = {"task_ids": [TASK], "episodes": 1, "out": tmp_path, "workers": 0} | changes
    with pytest.raises(ValueError, match=match):
        collect(**settings)
    assert list(tmp_path.iterdir()) == []


def test_a_broken_expert_stops_the_run(
    tmp_path: Path, toy: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    stay = {"go": np.zeros(2, np.float32), "say": np.int64(1)}
    monkeypatch.setattr(toy.Walker, "act", lambda *_: stay)
    with pytest.raises(RuntimeError, match=f"none of {collecting.GIVE_UP} attempts"):
        collect([TASK], 3, tmp_path, workers=0)


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
    """Two processes, stopped or not, write the bytes that one writes."""
    pytest.importorskip("metaworld")
    pytest.importorskip("minigrid")
    tasks = ["babyai/GoToObj-v0", "metaworld/reach-v3"]
    collect(tasks, 6, tmp_path / "one", noise=0.1, workers=0)
    collect(tasks, 3, tmp_path / "two", noise=0.1, workers=2)
    collect(tasks, 6, tmp_path / "two", noise=0.1, workers=2)
    assert tree(tmp_path / "one") == tree(tmp_path / "two")


def test_a_store_goes_on_only_with_its_expert(
    tmp_path: Path, toy: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = EpisodeStore(collect([TASK], 2, tmp_path, workers=0)[TASK])
    assert store.settings["expert"] == "scripted"
    monkeypatch.setattr(toy.Walker, "settings", "walker: 2 legs", raising=False)
    with pytest.raises(ValueError, match="expert='scripted'; got 'walker: 2 legs'"):
        collect([TASK], 3, tmp_path, workers=0)


def test_the_expert_that_was_asked_for_plays(
    tmp_path: Path, toy: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, asked = sys.modules["gato.envs.toy"], []

    def expert(spec: object, kind: str) -> object:
        asked.append(kind)
        return toy.Walker()

    monkeypatch.setattr(module, "expert", expert)
    store = EpisodeStore(collect([TASK], 1, tmp_path, expert="planner", workers=0)[TASK])
    assert set(asked) == {"planner"}
    assert store.settings["expert"] == "planner"


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("reset", "raised RuntimeError: no such world"),
        ("step", "raised ZeroDivisionError"),
        ("expert", "raised KeyError: 'lost'"),
        ("nan", r"expected 'a/place' finite .* got nan"),
        ("dtype", r"that of step \d+ is not: 'a/place' is float64\(2,\), array\("),
        ("reward", "finite rewards"),
    ],
)
def test_what_fails_is_named_and_the_rest_kept(
    tmp_path: Path, toy: ModuleType, monkeypatch: pytest.MonkeyPatch, fault: str, told: str
) -> None:
    collect([TASK], 25, tmp_path / "whole", workers=0)
    bad = int(EpisodeStore(tmp_path / "whole" / TASK).seeds[11])
    with monkeypatch.context() as patch:
        closed = _break(toy, patch, bad, fault)
        with pytest.raises(RuntimeError, match=f"'toy/walk-v0' at seed {bad}: .*{told}") as caught:
            collect([TASK], 25, tmp_path / "cut", workers=0)
        assert "Traceback" in caught.value.__notes__[0]
        assert closed
    assert len(EpisodeStore(tmp_path / "cut" / TASK)) == 11
    collect([TASK], 25, tmp_path / "cut", workers=0)
    assert tree(tmp_path / "cut") == tree(tmp_path / "whole")


def _break(toy: ModuleType, patch: pytest.MonkeyPatch, bad: int, fault: str) -> list:
    """Let the world or its expert fail at one seed; return the environments that were closed."""
    reset, step, closed = toy.Walk.reset, toy.Walk.step, []

    def broken_reset(env, *, seed=None, options=None):
        env.bad = seed == bad
        if env.bad and fault == "reset":
            raise RuntimeError("no such world")
        return reset(env, seed=seed)

    def broken_step(env, action):
        observation, reward, *rest = step(env, action)
        if env.bad and fault == "step":
            raise ZeroDivisionError
        if env.bad and fault == "nan":
            observation["a/place"][0], rest[0] = np.nan, True
        if env.bad and fault == "dtype":
            observation["a/place"] = observation["a/place"].astype(float)
        return observation, np.inf if env.bad and fault == "reward" else reward, *rest

    def broken_expert(expert, env, seed):
        if seed == bad and fault == "expert":
            raise KeyError("lost")

    patch.setattr(toy.Walk, "reset", broken_reset)
    patch.setattr(toy.Walk, "step", broken_step)
    patch.setattr(toy.Walk, "close", lambda env: closed.append(env))
    patch.setattr(toy.Walker, "reset", broken_expert)
    return closed


def test_noise_of_whole_numbers() -> None:
    space = spaces.Dict(
        {"a": spaces.MultiDiscrete([3, 5], start=[1, 0]), "b": spaces.MultiBinary(4)}
    )
    rng, clean = np.random.default_rng(0), {"a": np.array([3, 4]), "b": np.ones(4, np.int8)}
    noisy = [playing.disturb(space, clean, 0.3, rng) for _ in range(2000)]
    assert all(space.contains(action) for action in noisy)
    same = np.mean([action["a"] == clean["a"] for action in noisy], 0)
    np.testing.assert_allclose(same, [0.7 + 0.3 / 3, 0.7 + 0.3 / 5], atol=0.04)
    assert abs(np.mean([action["b"] for action in noisy]) - 0.85) < 0.02


def test_noise_is_refused_where_it_means_nothing(
    tmp_path: Path, toy: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = replace(toy.SPEC, action_space=spaces.Text(5))
    monkeypatch.setattr(sys.modules["gato.envs.toy"], "specs", lambda: {TASK: said})
    with pytest.raises(ValueError, match=r"noise is 0\.1; got Text"):
        collect([TASK], 1, tmp_path, noise=0.1)


def test_attempts_are_dealt_so_that_no_worker_waits(tmp_path: Path, toy: ModuleType) -> None:
    """Each worker has a task of its own, then helps; what would leave it idle is spare."""
    plans = [
        collecting._Plan(toy.SPEC, EpisodeWriter(tmp_path / str(k), toy.SPEC), 40, 0, None)
        for k in range(2)
    ]
    shares: dict[int, collecting._Share] = {}
    last: dict[int, collecting._Plan] = {}
    dealt: dict[int, list[int]] = {id(plan): [] for plan in plans}

    def deal(worker: int) -> collecting._Share | None:
        shares.pop(worker, None)
        share = collecting._deal(plans, shares, last, worker)
        if share is not None:
            shares[worker], last[worker] = share, share.plan
            dealt[id(share.plan)] += range(share.first, share.stop)
        return share

    first = [deal(0), deal(1)]
    assert [share.plan for share in first] == plans
    assert deal(0).plan is plans[0]
    while plans[0].open:
        assert deal(0).plan is plans[0]
    helping = deal(0)
    assert helping.plan is plans[1]
    assert helping.stop - helping.first < first[1].stop - first[1].first  # ever smaller shares
    while plans[1].open:
        deal(1)
    assert all(seeds == list(range(40)) for seeds in dealt.values())
    spare = [deal(k % 2) for k in range(4 * collecting.SPARE)]
    assert all(share.stop - share.first == 1 for share in spare)
    assert deal(0) is None
    assert all(len(seeds) == len(set(seeds)) for seeds in dealt.values())


def test_the_least_score_stands_in_the_store(
    tmp_path: Path,
    toy: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    """Returns of the toy are 1 or 0; a table that changes may not change a store halfway."""
    suite = sys.modules["gato.envs.toy"]
    spec = replace(toy.SPEC, measure="return")

    def filled(out: str, episodes: int, **scores: float) -> EpisodeStore:
        monkeypatch.setattr(registry, "_scored", lambda spec: replace(spec, **scores))
        monkeypatch.setattr(suite, "specs", lambda: {TASK: spec})
        registry._specs.cache_clear()
        return EpisodeStore(collect([TASK], episodes, tmp_path / out, workers=0)[TASK])

    store = filled("a", 20, random_score=0.0, expert_score=1.0)
    assert store.settings["least_score"] == 0.8
    assert store.returns.min() == 1.0
    assert capsys.readouterr().err == ""
    with pytest.raises(ValueError, match=r"least_score=0\.8; got 0\.4"):
        filled("a", 21, random_score=0.0, expert_score=0.5)
    for out, scores in {"b": {}, "c": {"random_score": 0.5, "expert_score": 0.1}}.items():
        store = filled(out, 20, **scores)
        assert store.settings["least_score"] is None
        assert store.returns.min() == 0.0
        told = capsys.readouterr().err
        assert f"gato experts score '{TASK}' --policy both --write\n" in told
        assert told.count("every episode is kept") == 1


def test_only_a_seed_that_died_twice_fails() -> None:
    share = collecting._Share(SimpleNamespace(spec=SimpleNamespace(id=TASK)), 5, 100)
    death, lost = WorkerDiedError("worker process ended", 0), []
    assert collecting._died(share, death, lost) == []  # at any of 5 to 99
    share.first = 60  # 5 to 59 were played one by one
    assert collecting._died(share, death, lost) == []
    share.first = 61
    assert collecting._died(share, death, lost) == []
    (failed,) = collecting._died(share, death, lost)
    assert failed.seed == 61
    assert "twice" in failed.reason
    alone = collecting._Share(share.plan, 7, 8)
    assert collecting._died(alone, death, lost) == []
    assert collecting._died(alone, death, lost)[0].seed == 7
    assert lost == [share] * 3 + [alone]


# ---- processes that are killed ---------------------------------------------------------------

DRIVER = Path(__file__).with_name("collect_toy.py")


def drive(*arguments: object, **settings: object) -> subprocess.Popen[str]:
    """Start `gato` with the toy suite, in a process group of its own."""
    command = [sys.executable, str(DRIVER), *map(str, arguments)]
    environment = {**os.environ, "TOY": json.dumps(settings)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment, start_new_session=True, **pipes)


def gato_collect(out: Path, episodes: int, workers: int) -> list[object]:
    arguments = ["collect", TASK, "toy/crawl-v0", "--episodes", episodes, "--out", out]
    return [*arguments, "--noise", 0.1, "--workers", workers]


def test_killed_at_any_instant_the_store_is_as_if_never(tmp_path: Path) -> None:
    whole = drive(*gato_collect(tmp_path / "whole", 40, 0))
    errors = whole.communicate()[1]
    assert whole.returncode == 0, errors
    kills = drive("kill", 20, *gato_collect(tmp_path / "cut", 40, 0), slow=0.002)
    said, errors = kills.communicate()
    assert kills.returncode == 0, errors
    assert json.loads(said)["killed"] == 20
    assert tree(tmp_path / "cut") == tree(tmp_path / "whole")


def written(manifest: Path) -> int:
    """Return the episodes of a store that others write; they may replace its shards any moment."""
    return sum(shard["episodes"] for shard in json.loads(manifest.read_text())["shards"])


def test_killed_with_its_workers_it_goes_on(tmp_path: Path) -> None:
    whole = drive(*gato_collect(tmp_path / "whole", 60, 0))
    cut, manifest = tmp_path / "cut", tmp_path / "cut" / TASK / "manifest.json"
    for after in (5, 20):
        command = drive(*gato_collect(cut, 60, 2), slow=0.004)
        while not manifest.exists() or written(manifest) < after:
            assert command.poll() is None, command.communicate()[1]
            time.sleep(0.02)
        os.killpg(command.pid, signal.SIGKILL)
        assert command.wait() == -signal.SIGKILL
        command.communicate()
    last = drive(*gato_collect(cut, 60, 2))
    for command in (last, whole):
        assert command.wait() == 0, command.communicate()[1]
        command.communicate()
    assert tree(cut) == tree(tmp_path / "whole")


def test_a_worker_that_dies_or_hangs_is_replaced_once(tmp_path: Path) -> None:
    commands = [
        drive(*gato_collect(tmp_path / "whole", 20, 0)),
        drive(*gato_collect(tmp_path / "once", 20, 2), dies_at=9, once=str(tmp_path / "died")),
        drive(*gato_collect(tmp_path / "always", 20, 2), dies_at=9),
        drive(
            *gato_collect(tmp_path / "hangs", 20, 2),
            *("--timeout", 2),
            dies_at=9,
            once=str(tmp_path / "hung"),
            hangs=60,
        ),
    ]
    said = [command.communicate()[1] for command in commands]
    assert [command.returncode for command in commands] == [0, 0, 1, 0]
    assert "nothing came of it in 2 s; playing these once more" in said[3]
    assert tree(tmp_path / "hangs") == tree(tmp_path / "whole")
    assert (tmp_path / "died").exists()
    assert "worker process ended, exit code 7; playing these once more" in said[1]
    assert tree(tmp_path / "once") == tree(tmp_path / "whole")
    last = said[2].splitlines()[-1]
    assert re.match(r"gato: 'toy/(walk|crawl)-v0' at seed 9: the worker process ended, exit", last)
    # nothing before the seed is lost, in the task that cannot go on
    kept = [EpisodeStore(tmp_path / "always" / t).seeds for t in (TASK, "toy/crawl-v0")]
    wanted = [EpisodeStore(tmp_path / "whole" / t).seeds for t in (TASK, "toy/crawl-v0")]
    failed = kept["crawl" in last]
    np.testing.assert_array_equal(failed, wanted["crawl" in last][: len(failed)])
    assert len(failed) == (wanted["crawl" in last] < 9).sum()
