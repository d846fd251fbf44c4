"""Episodes are played once each, alike whatever the batch, the workers and the timing."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from gymnasium import spaces

from gato import cli
from gato.envs import registry
from gato.envs.episode import EVALUATION_SEED_START
from gato.rollouts import hosts, runner
from gato.rollouts.agent import Agent
from gato.rollouts.hosts import AT_ONCE, DRAWING_AT_ONCE, most_at_once
from gato.rollouts.players import HostPolicy
from gato.rollouts.runner import HALVED, Job, _deal, run
from gato.rollouts.speed import Speed, describe
from gato.tokenizers.serializer import History

from .conftest import SPECS

TASKS = ("made/count-v0", "made/reach-v0")
JOBS = [Job(task, seed) for task in TASKS for seed in range(11)]


def play(agent: Agent, jobs=JOBS, temperature=None, **settings) -> list:
    return run(
        lambda tasks, seeds: agent.policy(tasks, temperature, seeds),
        jobs,
        **{"workers": 0, **settings},
    )


@pytest.mark.parametrize("max_batch", [1, 3, 8, 40])
def test_every_episode_is_played_to_its_end(suite, agent: Agent, max_batch: int) -> None:
    seen = []
    played = play(agent, max_batch=max_batch, on_played=seen.append)
    assert [p.job for p in played] == JOBS
    assert len(seen) == len(JOBS)
    for p in played:
        length = 3 + p.job.seed % 6
        length = min(length, 6) if p.job.task == "made/reach-v0" else length
        assert p.length == length
        assert p.score == length
        assert p.error is None
    reached = [p.success for p in played if p.job.task == "made/reach-v0"]
    assert reached == [seed % 2 == 1 for seed in range(11)]
    assert all(p.success is None for p in played if p.job.task == "made/count-v0")


@contextmanager
def recorded(suite: ModuleType) -> Iterator[dict[tuple, list]]:
    """Give every action that the worlds are given, by task and seed."""
    taken: dict[tuple, list] = {}
    plain = suite.make

    def make(spec):
        env = plain(spec)
        step = env.step

        def record(action):
            taken.setdefault((spec.id, env.seed_), []).append(np.asarray(action).tolist())
            return step(action)

        env.step = record
        return env

    suite.make = make
    yield taken
    suite.make = plain


def test_actions_do_not_depend_on_the_batch(suite: ModuleType, agent: Agent) -> None:
    def actions_of(max_batch: int) -> dict[tuple, list]:
        with recorded(suite) as taken:
            play(agent, max_batch=max_batch, temperature=1.0)
        return taken

    assert actions_of(1) == actions_of(5) == actions_of(64)


def test_tasks_of_one_seed_draw_differently(suite: ModuleType) -> None:
    seen: dict[str, int] = {}

    def make_policy(tasks: list[str], seeds: list[int]) -> HostPolicy:
        seen.update(zip(tasks, seeds, strict=True))
        return HostPolicy("random")

    for _ in range(2):
        before = dict(seen)
        run(make_policy, [Job(task, 3) for task in TASKS], workers=0)
    assert len(set(seen.values())) == len(TASKS)
    assert before == seen


def test_an_environment_that_throws_fails_its_episode(suite: ModuleType, agent: Agent) -> None:
    plain = suite.make

    def make(spec):
        env = plain(spec)
        step, reset = env.step, env.reset

        def step_or_throw(action):
            if env.seed_ == 4 and env.left == 3:
                raise RuntimeError("the arm fell off")
            if env.seed_ == 5 and spec.id == "made/count-v0":
                return np.full(2, np.nan, np.float32), 1.0, False, False, {}
            return step(action)

        def reset_or_throw(*, seed=None, options=None):
            if seed == 7:
                raise RuntimeError("no such world")
            return reset(seed=seed)

        env.step, env.reset = step_or_throw, reset_or_throw
        return env

    suite.make = make
    played = {(p.job.task, p.job.seed): p for p in play(agent, max_batch=4)}
    assert len(played) == len(JOBS)
    for task in TASKS:
        assert "the arm fell off" in played[task, 4].error
        assert played[task, 4].length == 4  # the step that threw is none
        assert "no such world" in played[task, 7].error
        assert played[task, 7].success is False
        assert played[task, 6].error is None
    assert "got nan in observation at [0] (NaN" in played["made/count-v0", 5].error


def test_a_missing_simulator_is_named(suite: ModuleType, agent: Agent) -> None:
    def make(spec):
        raise ImportError("no module named made")

    suite.make = make
    with pytest.raises(ValueError, match=r"pip install \"gato\[made\]\""):
        play(agent)


def test_environments_are_used_again(suite: ModuleType) -> None:
    started = []
    plain = suite.make
    suite.make = lambda spec: started.append(spec.id) or plain(spec)
    host = hosts.Host()
    host.run([("reset", slot, TASKS[0], 1) for slot in range(3)])
    host.run([("reset", 0, TASKS[1], 1), ("reset", 0, TASKS[0], 2), ("reset", 1, TASKS[0], 5)])
    assert started == [TASKS[0]] * 3 + [TASKS[1]]


def test_few_unused_environments_are_kept(suite: ModuleType) -> None:
    some = {f"made/count-v{i}": replace(SPECS[TASKS[0]], id=f"made/count-v{i}") for i in range(12)}
    suite.specs = lambda: some
    started, closed = [], []
    plain = suite.make

    def make(spec):
        started.append(spec.id)
        env = plain(spec)
        env.close = lambda: closed.append(spec.id)
        return env

    suite.make = make
    host = hosts.Host()
    host.run([("reset", 0, task, 1) for task in some])
    assert closed == list(some)[: 12 - 1 - hosts.SPARE], "the oldest"
    host.run([("reset", 0, f"made/count-v{11 - hosts.SPARE}", 1)])
    assert started == list(some), "the rest wait to be used again"
    host.close()
    assert sorted(closed) == sorted(some)


def test_settings_are_checked(suite, agent: Agent) -> None:
    with pytest.raises(ValueError, match="0 or more workers"):
        play(agent, workers=-1)
    with pytest.raises(ValueError, match="max_batch of 1 or more"):
        play(agent, max_batch=0)


def test_workers_play_what_one_process_plays(agent: Agent) -> None:
    """Worker processes import the registry anew, so this takes worlds that every install has."""
    tasks = [registry.spec(f"gym/{name}") for name in ("CartPole-v1", "FrozenLake-v1")]
    for task in tasks:
        agent.serializer.add_task(task, history=History(window=1, hide_actions=True))
    jobs = [Job(task.id, seed) for task in tasks for seed in range(HALVED)]
    alone = play(agent, jobs)
    shared = [
        play(agent, jobs, workers=workers, max_batch=most) for workers, most in ((2, 5), (3, 64))
    ]
    for one in shared:
        assert [(p.job, p.score, p.length) for p in alone] == [
            (p.job, p.score, p.length) for p in one
        ]
    gone = replace(task, id="gym/NoSuch-v0")
    agent.serializer.add_task(gone)
    with pytest.raises(ValueError, match="NoSuch-v0"):
        play(agent, [Job(gone.id, 0)], workers=2)


class Walks:
    """An expert of the made-up worlds: does what the seed and the count of its decisions say."""

    def __init__(self, space) -> None:
        self.space = space

    def reset(self, env, seed: int) -> None:
        assert env.get_wrapper_attr("left") == 3 + seed % 6, "reset before the episode's first step"
        self.draws = np.random.default_rng(seed)

    def act(self, env, observation):
        if isinstance(self.space, spaces.Discrete):
            return np.int64(self.draws.integers(self.space.n))
        return self.draws.uniform(-1, 1, self.space.shape).astype(np.float32)


@pytest.mark.parametrize("who", ["expert", "random"])
def test_an_expert_and_chance_act_where_the_environment_is(suite: ModuleType, who: str) -> None:
    suite.expert = lambda spec, kind: Walks(spec.action_space)

    def actions_of(max_batch: int) -> dict[tuple, list]:
        with recorded(suite) as taken:
            played = run(lambda tasks, seeds: HostPolicy(who), JOBS, workers=0, max_batch=max_batch)
        assert [(p.job, p.error) for p in played] == [(job, None) for job in JOBS]
        return taken

    alone = actions_of(1)
    assert alone == actions_of(5) == actions_of(64)
    assert len({str(actions) for actions in alone.values()}) > len(JOBS) // 2, "seeds differ"


def test_chance_acts_in_worker_processes_as_in_this_one() -> None:
    jobs = [Job("gym/CartPole-v1", seed, logged=True) for seed in range(6)]
    alone, shared = (
        run(lambda tasks, seeds: HostPolicy("random"), jobs, workers=workers) for workers in (0, 2)
    )
    assert [(p.score, p.actions) for p in alone] == [(p.score, p.actions) for p in shared]
    assert all(set(p.actions) <= {0, 1} for p in alone), "what was done, not who was asked"


def test_actions_are_kept_where_the_job_asks(suite: ModuleType, agent: Agent) -> None:
    jobs = [replace(job, logged=job.seed == 3) for job in JOBS]
    for p in play(agent, jobs, max_batch=4):
        assert len(p.actions) == (p.length if p.job.logged else 0)


# ---- worlds that end or hang their process ---------------------------------------------------

DEADLY = "gym/deadly:Deadly-v0"
Outcome = dict[int, tuple[float, int, str | None]]


@pytest.fixture
def deadly(agent: Agent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    """Return what plays two groups of episodes, those of the given seeds failing as told."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    monkeypatch.setenv("DEADLY", str(tmp_path))
    history = History(window=3, hide_actions=False)
    agent.serializer.add_task(registry.spec(DEADLY), history=history)

    def outcome(faults: dict[int, str], **settings: Any) -> Outcome:
        for seed, fault in faults.items():
            (tmp_path / str(seed)).write_text(fault)
        jobs = [Job(DEADLY, seed) for seed in range(HALVED)]
        played = play(agent, jobs, temperature=1.0, **{"max_batch": 6, **settings})
        assert [p.job for p in played] == jobs
        for seed in faults:
            (tmp_path / str(seed)).unlink(missing_ok=True)
        return {p.job.seed: (p.score, p.length, p.error) for p in played}

    return outcome


def test_episodes_of_a_dead_worker_are_played_again(
    deadly: Callable[..., Outcome], capsys: pytest.CaptureFixture[str]
) -> None:
    undisturbed = deadly({})
    assert len({score for score, _, _ in undisturbed.values()}) > 6
    assert deadly({3: "once exit", 8: "once kill"}, workers=2) == undisturbed
    told = capsys.readouterr().err
    assert "worker process ended, exit code 7; playing its episodes again" in told
    assert "exit code -9;" in told


def test_an_episode_that_ends_its_process_twice_has_failed(
    deadly: Callable[..., Outcome],
) -> None:
    """Those that shared the process with it are played as if it had never been there."""
    undisturbed = deadly({})
    played = deadly({0: "kill", 5: "exit", 7: "throw"}, workers=2)
    assert played.pop(0) == (0.0, 0, "worker process ended, exit code -9, twice")
    assert played.pop(5) == (0.0, 0, "worker process ended, exit code 7, twice")
    assert "the arm fell off" in played.pop(7)[2]
    assert played == {seed: undisturbed[seed] for seed in played}


@pytest.mark.parametrize("workers", [1, 2])
def test_a_simulator_that_hangs_is_ended(deadly: Callable[..., Outcome], workers: int) -> None:
    """Also where there is one worker, which is a process of its own."""
    undisturbed = deadly({})
    faults = {4: "once hang", 9: "once kill"}
    assert deadly(faults, workers=workers, timeout=1.5) == undisturbed


def test_one_worker_is_survived_by_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The simulator is killed once, and at another seed hangs each time."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    monkeypatch.setenv("DEADLY", str(tmp_path))
    first = EVALUATION_SEED_START
    (tmp_path / str(first + 1)).write_text("once kill")
    (tmp_path / str(first + 3)).write_text("hang")
    arguments = ["eval", "random", "--tasks", DEADLY, "--episodes", "5", "--json"]
    assert cli.main([*arguments, "--workers", "1", "--timeout", "1.5"]) == cli.FAILURE
    said = capsys.readouterr()
    task = json.loads(said.out)["tasks"][DEADLY]
    assert [f["seed"] for f in task["failures"]] == [first + 3]
    assert task["failures"][0]["traceback"].endswith("nothing came of it in 1.5 s, twice")
    assert [length > 0 for length in task["lengths"]] == [True, True, True, False, True]
    assert "worker process ended, exit code -9; playing its episodes again" in said.err


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("nan", "got nan in observation/time (NaN"),
        ("reward", "got inf in reward (NaN"),
        (
            "outside",
            "that of a step is not: 'time' is float32(), array(13., dtype=float32), not of",
        ),
        ("throw", "RuntimeError: the arm fell off"),
        ("leave", "SystemExit: 3"),
        ("reset", "RuntimeError: no such world"),
    ],
)
def test_what_a_simulator_breaks_is_named_and_it_is_closed(
    deadly: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch, fault: str, told: str
) -> None:
    import deadly as module

    closed = []
    monkeypatch.setattr(
        module.Deadly, "close", lambda env: closed.append(getattr(env, "seed_", None))
    )
    undisturbed = deadly({})
    closed.clear()
    played = deadly({6: fault})
    assert next(seed for seed in closed if seed is not None) == 6
    assert told in played.pop(6)[2]
    assert played == {seed: undisturbed[seed] for seed in played}


# ---- who shares a batch, and where the time goes ---------------------------------------------


class Counting(HostPolicy):
    """Leaves every action to chance; notes its tasks, and how many rows want one each time."""

    def __init__(self, tasks: list[str], seconds: float = 0.0) -> None:
        super().__init__("random")
        self.tasks, self.seconds = tasks, seconds
        self.sizes: list[int] = []
        self.spans: list[tuple[float, float]] = []

    def select_action(self, observations, active):
        began = time.perf_counter()
        time.sleep(self.seconds)
        self.sizes.append(int(active.sum()))
        self.spans.append((began, time.perf_counter()))
        return super().select_action(observations, active)


def counted(jobs: list[Job], seconds: float = 0.0, **settings: Any) -> list[Counting]:
    """Play and return the policies of the groups."""
    policies: list[Counting] = []

    def make_policy(tasks: list[str], seeds: list[int]) -> Counting:
        policies.append(Counting(tasks, seconds))
        return policies[-1]

    assert [p.error for p in run(make_policy, jobs, **settings)] == [None] * len(jobs)
    return policies


def two_suites(suite: ModuleType, longest: dict[str, int]) -> None:
    """Let the made-up suite have copies of its tasks that may last so long."""
    specs = {
        task: replace(SPECS[TASKS[i % 2]], id=task, max_steps=steps)
        for i, (task, steps) in enumerate(longest.items())
    }
    suite.specs = lambda: specs


def test_all_tasks_are_under_way_together(suite: ModuleType) -> None:
    """Fifty tasks of ten episodes: whatever their spaces, in two batches that stay full."""
    two_suites(suite, {f"made/task-v{i}": 9 for i in range(50)})
    jobs = [Job(f"made/task-v{i}", seed) for i in range(50) for seed in range(10)]
    groups = [g.rows for g in _deal(jobs, registry_specs(jobs), 2, AT_ONCE)]
    assert [len(rows) for rows in groups] == [AT_ONCE // 2] * 2
    begun = [row.played.job for rows in groups for row in rows]
    assert len({job.task for job in begun}) == 50
    assert len(set(begun)) == AT_ONCE
    assert [Counter(row.host for row in rows) for rows in groups] == [Counter({0: 16, 1: 16})] * 2
    [policy] = counted(jobs, workers=0)
    assert policy.sizes[0] == AT_ONCE
    resets = len(jobs) - AT_ONCE  # a row sits out one decision for each
    full = sum(size for size in policy.sizes if size < AT_ONCE // 2)
    assert full + resets < 0.35 * sum(policy.sizes)
    assert sum(policy.sizes) == sum(min(3 + job.seed % 6, 9) for job in jobs)


def test_fewer_are_under_way_where_cameras_draw() -> None:
    """An environment that draws holds ten times the memory of one that does not."""
    assert most_at_once(["metaworld/push-v3", "babyai/GoTo-v0"]) == AT_ONCE
    drawn = ["metaworld/push-v3", "metaworld/reach-v3?camera=corner2"]
    assert most_at_once(drawn) == DRAWING_AT_ONCE < AT_ONCE


def registry_specs(jobs: list[Job]) -> dict[str, Any]:
    return {job.task: registry.spec(job.task) for job in jobs}


def test_the_longest_tasks_begin_and_the_most_to_do_goes_on(suite: ModuleType) -> None:
    longest = {"made/short-v0": 3, "made/long-v0": 9, "made/middle-v0": 6, "made/none-v0": 1}
    two_suites(suite, longest)
    jobs = [Job(task, seed) for task in longest for seed in range(4)]
    [group] = _deal(jobs, registry_specs(jobs), 0, 2)
    assert [row.played.job.task for row in group.rows] == ["made/long-v0", "made/middle-v0"]
    group.queues["made/none-v0"].clear()
    taken = [group._next("made/none-v0") for _ in range(4)]
    assert [job.task.split("/")[1] for job in taken if job] == [
        "long-v0",  # 3 times 9 steps were left
        "long-v0",  # 2 times 9, as many as of the next
        "middle-v0",  # 3 times 6
        "middle-v0",  # 2 times 6, as many as of the short ones
    ]


def test_few_episodes_share_one_batch(suite: ModuleType) -> None:
    two_suites(suite, {TASKS[0]: 9})
    for count, groups in ((1, 1), (HALVED - 1, 1), (HALVED, 2)):
        jobs = [Job(TASKS[0], seed) for seed in range(count)]
        dealt = _deal(jobs, registry_specs(jobs), 2, AT_ONCE)
        assert len(dealt) == groups
        assert sum(len(g.rows) for g in dealt) == count
        assert len(_deal(jobs, registry_specs(jobs), 0, AT_ONCE)) == 1, "nothing would overlap"
        assert len(_deal(jobs, registry_specs(jobs), 2, 1)) == 1
    jobs = [Job(TASKS[0], seed) for seed in range(AT_ONCE)]
    for most in (2, 3, 5, 8, 17, AT_ONCE):
        sizes = [len(g.rows) for g in _deal(jobs, registry_specs(jobs), 2, most)]
        assert sizes == [most - most // 2, most // 2], "no more than asked for"


def share_of_deciding(policies: list[Counting]) -> float:
    """Return the share of the time from the first decision to the last that is spent deciding."""
    spans = sorted(span for policy in policies for span in policy.spans if span)
    return sum(end - began for began, end in spans) / (spans[-1][1] - spans[0][0])


def test_one_group_steps_while_the_other_is_decided(monkeypatch: pytest.MonkeyPatch) -> None:
    """A decision takes as long as the steps of a group; in one group they take turns."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    task = "gym/framed:Slow-v0"
    jobs = [Job(task, seed) for seed in range(HALVED)]
    together = counted(jobs, 0.1, workers=2)
    assert len(together) == 2
    monkeypatch.setattr(runner, "HALVED", 1000)
    in_turn = counted(jobs, 0.1, workers=2)
    assert len(in_turn) == 1
    assert share_of_deciding(together) > 0.75 > 0.6 > share_of_deciding(in_turn)


@pytest.mark.parametrize("workers", [0, 2])
def test_it_is_told_where_the_time_goes(agent: Agent, workers: int) -> None:
    task = registry.spec("gym/CartPole-v1")
    agent.serializer.add_task(task, history=History(window=1, hide_actions=True))
    speed = Speed()
    seen: list[int] = []
    played = play(
        agent,
        [Job(task.id, seed) for seed in range(5)],
        workers=workers,
        speed=speed,
        on_played=lambda played: seen.append(speed.figures()["steps"]),
    )
    found = speed.figures()
    assert found.keys() == {
        "steps",
        "seconds",
        "steps_per_second",
        "model_seconds",
        "simulator_seconds",
        "waiting_seconds",
        "workers",
        "mean_batch",
    }
    assert found["steps"] == sum(p.length for p in played) == seen[-1]
    assert sorted(seen) == seen
    assert found["steps_per_second"] == pytest.approx(found["steps"] / found["seconds"], rel=0.1)
    assert found["workers"] == workers
    assert 1 < found["mean_batch"] <= 5
    assert 0 < found["model_seconds"] + found["waiting_seconds"] <= found["seconds"] + 0.01
    assert 0 < found["simulator_seconds"] < found["seconds"] * max(workers, 1)
    assert found["simulator_seconds"] <= found["waiting_seconds"] or workers
    assert speed.figures()["seconds"] == found["seconds"], "it has stopped"
    assert f"{found['mean_batch']:.1f} rows a batch" in describe(found) == str(speed)


def test_what_is_played_in_the_end_is_added_up(suite: ModuleType) -> None:
    speed = Speed()
    for _ in range(2):
        run(lambda tasks, seeds: HostPolicy("random"), JOBS, workers=0, max_batch=4, speed=speed)
    assert speed.steps == 2 * sum(min(3 + j.seed % 6, SPECS[j.task].max_steps) for j in JOBS)
    assert describe(Speed().figures()).startswith("0 steps/s"), "nothing is divided by nothing"
