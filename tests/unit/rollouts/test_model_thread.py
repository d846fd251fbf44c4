"""One thread and many who ask it: each gets its own, in turn, and nobody's mistake is another's."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future
from typing import Any

import numpy as np
import pytest
import rollout_world as world
from model_asked import SOON, TASKS, Gate, Sink, alone, make_agent, prefix_of, same

from gato.rollouts.agent import Agent
from gato.rollouts.engine import Delta, Sampling
from gato.rollouts.model_thread import Busy, ModelThread, NoSession
from gato.rollouts.policy import Policy
from gato.rollouts.sessions import Sessions


@pytest.fixture(scope="module")
def agent() -> Agent:
    return make_agent()


@pytest.fixture
def thread(agent: Agent) -> Iterator[ModelThread]:
    with ModelThread(agent, rows=4, waiting=6, sessions=5) as made:
        yield made


def test_many_threads_get_each_their_own(agent: Agent) -> None:
    said: dict[int, str] = {}
    with ModelThread(agent, rows=4, waiting=64) as thread:

        def ask(number: int) -> None:
            rng = np.random.default_rng(number)
            for k in range(3):
                words = " ".join(rng.choice(world.WORDS, int(rng.integers(1, 30))))
                sink, sampling = Sink(), Sampling(10 + number, 1.0, seed=k)
                thread.write(prefix_of(agent, words), sampling, sink)
                said[number, k] = sink.text, words

        threads = [threading.Thread(target=ask, args=(n,)) for n in range(8)]
        for one in threads:
            one.start()
        for one in threads:
            one.join(SOON)
    assert len(said) == 24
    for (number, k), (text, words) in said.items():
        settings = {"max_tokens": 10 + number, "temperature": 1.0, "seed": k}
        assert text == alone(agent, words, **settings)


def test_who_comes_too_late_is_told_how_many_wait(agent: Agent, thread: ModelThread) -> None:
    with Gate(thread):
        sinks = [Sink() for _ in range(4 + 6)]  # so many rows are free, and so many may wait
        tickets = [thread.write(prefix_of(agent, "go"), Sampling(5), s) for s in sinks]
        assert thread.waiting == 10
        with pytest.raises(Busy, match="10 texts wait already"):
            thread.write(prefix_of(agent, "go"), Sampling(5), Sink())
        thread.cancel(tickets[2])
        assert thread.waiting == 9
        again = Sink()
        thread.write(prefix_of(agent, "open"), Sampling(5), again)
        calls = [thread.call(int) for _ in range(6)]
        with pytest.raises(Busy, match="6 calls wait already"):
            thread.call(int)
    assert again.text == alone(agent, "open", max_tokens=5)
    assert [f.result(SOON) for f in calls] == [0] * 6
    assert {s.text for i, s in enumerate(sinks) if i != 2} == {alone(agent, "go", max_tokens=5)}
    assert not sinks[2].deltas


def test_rows_that_are_taken_have_no_room_for_who_waits(agent: Agent) -> None:
    with ModelThread(agent, rows=2, waiting=3) as thread:
        for _ in range(2):
            begun = threading.Event()
            thread.write(prefix_of(agent, "go"), Sampling(10**9), lambda _, e=begun: e.set())
            assert begun.wait(SOON)
        with Gate(thread):
            for _ in range(3):
                thread.write(prefix_of(agent, "go"), Sampling(5), Sink())
            with pytest.raises(Busy, match="3 texts wait already"):
                thread.write(prefix_of(agent, "go"), Sampling(5), Sink())


def test_a_cancelled_text_frees_its_row_at_the_next_step(agent: Agent) -> None:
    with ModelThread(agent, rows=1) as thread:
        begun, seen = threading.Event(), []

        def endless(delta: Delta) -> None:
            seen.append(delta)
            begun.set()

        ticket = thread.write(prefix_of(agent, "go"), Sampling(10**9, 1.0), endless)
        assert begun.wait(SOON)
        next_one = Sink()
        thread.write(prefix_of(agent, "open"), Sampling(3), next_one)
        with Gate(thread):
            thread.cancel(ticket)
            count = len(seen)
        assert next_one.text == alone(agent, "open", max_tokens=3)
        assert len(seen) == count
        thread.cancel(ticket)
        assert (thread.running, thread.waiting) == (0, 0)


def test_what_one_text_gets_wrong_stays_with_it(agent: Agent, thread: ModelThread) -> None:
    image = agent.serializer.caption(np.zeros((16, 16, 3), np.uint8), None)
    rows = image.payload["image"]
    name = next(k for k, v in rows.items() if v.ndim > 1)
    image.payload = {"image": {**rows, name: rows[name][:, :1]}}

    def deaf(delta: Delta) -> None:
        raise OSError("nobody is there")

    with Gate(thread):
        good, bad = [Sink(), Sink()], Sink()
        thread.write(prefix_of(agent, "go"), Sampling(9), good[0])
        thread.write(image, Sampling(9), bad)
        thread.write(prefix_of(agent, "go"), Sampling(10**9), deaf)
        thread.write(prefix_of(agent, "go"), Sampling(9), good[1])
    assert bad.last.finish == "error"
    assert isinstance(bad.last.error, Exception)
    assert {s.text for s in good} == {alone(agent, "go", max_tokens=9)}
    with pytest.raises(ValueError, match="at least one token"):
        thread.write(image.slice(0, 0), Sampling(), bad)
    assert thread.call(lambda: thread.running).result(SOON) == 0, "who is not heard is cancelled"


def test_a_model_that_breaks_fails_what_runs_and_goes_on(
    agent: Agent, thread: ModelThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Gate(thread):
        sinks = [Sink() for _ in range(5)]  # one more than there are rows
        for sink in sinks:
            thread.write(prefix_of(agent, "go"), Sampling(9), sink)
        broken = iter([True])
        head = thread._engine._choose

        def choose(*args: Any) -> Any:
            if next(broken, False):
                raise MemoryError("no more of it")
            return head(*args)

        monkeypatch.setattr(thread._engine, "_choose", choose)
    assert [s.last.finish for s in sinks[:4]] == ["error"] * 4
    assert all(isinstance(s.last.error, MemoryError) for s in sinks[:4])
    assert sinks[4].text == alone(agent, "go", max_tokens=9)


def test_calls_run_in_the_thread_and_fail_alone(thread: ModelThread) -> None:
    def wrong() -> None:
        raise KeyError("no such thing")

    with Gate(thread):
        name = thread.call(lambda: threading.current_thread().name)
        failed = thread.call(wrong)
        gone = thread.call(int)
        assert gone.cancel()
        total = thread.call(lambda a, b: a + b, 2, 3)
    assert name.result(SOON) == "gato-model"
    with pytest.raises(KeyError, match="no such thing"):
        failed.result(SOON)
    assert total.result(SOON) == 5
    with pytest.raises(CancelledError):
        gone.result(SOON)


def test_texts_calls_and_sessions_take_turns(agent: Agent, thread: ModelThread) -> None:
    order: list[str] = []
    rng = np.random.default_rng(0)
    id = thread.open_session("made/arm")
    with Gate(thread):
        sampling = Sampling(12, top_logprobs=0)
        sink = Sink()
        thread.write(prefix_of(agent, "go"), sampling, lambda d: (order.append("text"), sink(d))[1])
        for _ in range(5):
            thread.call(order.append, "call")
        future = thread.act(id, world.observe("made/arm", rng))
        future.add_done_callback(lambda _: order.append("act"))
    assert sink.ended.wait(SOON)
    assert order[:2] == ["call", "act"]
    calls = [i for i, what in enumerate(order) if what == "call"]
    assert len(calls) == 5
    between = [order[a + 1 : b] for a, b in itertools.pairwise(calls)]
    assert sum("text" in some for some in between) >= 3, "bytes of a character are not shown"


def play(
    act: Any, tasks: list[str], steps: int, seed: int = 5
) -> tuple[list[list[Any]], list[list[Any]]]:
    """Return the observations and actions of all rows; `act` takes one observation of each."""
    rng = np.random.default_rng(seed)
    observed = [[world.observe(task, rng) for task in tasks] for _ in range(steps)]
    return observed, [act(seen) for seen in observed]


def test_sessions_act_as_policies_of_their_own(agent: Agent, thread: ModelThread) -> None:
    tasks = [*TASKS, TASKS[0]]
    warm = [None, 0.7, None, 1.0, 0.0]
    ids = [
        thread.open_session(task, seed=i, temperature=t)
        for i, (task, t) in enumerate(zip(tasks, warm, strict=True))
    ]
    policies = [
        Policy(agent.model, agent.serializer, task, seeds=[i], temperature=t)
        for i, (task, t) in enumerate(zip(tasks, warm, strict=True))
    ]

    def ask(seen: list[Any]) -> list[Any]:
        with Gate(thread):
            futures = [thread.act(id, one) for id, one in zip(ids, seen, strict=True)]
        return [f.result(SOON) for f in futures]

    for _ in range(2):
        _, together = play(ask, tasks, 5)
        _, apart = play(
            lambda seen: [p.select_action(one) for p, one in zip(policies, seen, strict=True)],
            tasks,
            5,
        )
        assert same(together, apart)
        for i, (id, policy) in enumerate(zip(ids, policies, strict=True)):
            thread.reset_session(id, seed=None if i % 2 else 40 + i)
            policy.reset(seeds=None if i % 2 else [40 + i])


def test_sessions_that_wait_are_decided_in_one_batch(
    thread: ModelThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    select = Policy.select_action

    def counted(self: Policy, observations: Any, active: Any = None) -> Any:
        sizes.append(int(np.sum(active)))
        return select(self, observations, active)

    monkeypatch.setattr(Policy, "select_action", counted)
    rng = np.random.default_rng(1)
    ids = {task: thread.open_session(task) for task in TASKS}
    with Gate(thread):
        futures = [thread.act(id, world.observe(task, rng)) for task, id in ids.items()]
    for future in futures:
        future.result(SOON)
    with Gate(thread):
        gone = thread.act(ids["made/arm"], world.observe("made/arm", rng))
        assert gone.cancel()
        future = thread.act(ids["made/talk"], world.observe("made/talk", rng))
    future.result(SOON)
    thread.act(ids["made/arm"], world.observe("made/arm", rng)).result(SOON)
    assert sizes == [4, 1, 1]


def test_an_observation_outside_its_space_is_not_seen(agent: Agent, thread: ModelThread) -> None:
    rng = np.random.default_rng(2)
    good = [world.observe("made/arm", rng) for _ in range(3)]
    policy = Policy(agent.model, agent.serializer, "made/arm", seeds=[3])
    wanted = [policy.select_action(one) for one in good]
    arm, grid = thread.open_session("made/arm", seed=3), thread.open_session("made/grid")
    got = [thread.act(arm, good[0]).result(SOON)]
    for wrong in (np.full(7, np.nan), np.zeros(3), {"no": 1}, None, "seven"):
        with Gate(thread):
            bad = thread.act(grid, wrong)
            fine = thread.act(arm, good[1]) if len(got) == 1 else None
        with pytest.raises(ValueError, match="made/grid"):
            bad.result(SOON)
        if fine is not None:
            got.append(fine.result(SOON))
    got.append(thread.act(arm, good[2]).result(SOON))
    assert same(got, wanted)
    thread.act(grid, world.observe("made/grid", rng)).result(SOON)


def test_a_session_waits_for_one_action_at_a_time(thread: ModelThread) -> None:
    rng = np.random.default_rng(3)
    id = thread.open_session("made/arm")
    with Gate(thread):
        future = thread.act(id, world.observe("made/arm", rng))
        with pytest.raises(ValueError, match="waits for an action already"):
            thread.act(id, world.observe("made/arm", rng))
        with pytest.raises(ValueError, match="waits for an action already"):
            thread.reset_session(id)
    future.result(SOON)
    with Gate(thread):
        lost = thread.act(id, world.observe("made/arm", rng))
        thread.close_session(id)
    with pytest.raises(NoSession, match="was closed"):
        lost.result(SOON)
    for ask in (thread.close_session, thread.reset_session, lambda id: thread.act(id, None)):
        with pytest.raises(NoSession, match="was closed"):
            ask(id)
        with pytest.raises(NoSession, match="not known here"):
            ask("session-of-nobody")


def test_no_more_sessions_than_there_may_be(thread: ModelThread) -> None:
    ids = [thread.open_session("made/arm") for _ in range(5)]
    assert len(set(ids)) == 5
    with pytest.raises(Busy, match="5 sessions are open"):
        thread.open_session("made/arm")
    thread.close_session(ids[1])
    thread.open_session("made/grid")
    assert thread.sessions == 5
    with pytest.raises(ValueError, match="made/harm"):
        thread.open_session("made/harm")
    for settings in ({"temperature": -1.0}, {"seed": -1}):
        with pytest.raises(ValueError, match=r"temperature|non-negative"):
            thread.open_session("made/arm", **settings)


def test_an_idle_session_ends_and_is_told_so(agent: Agent) -> None:
    now = [0.0]
    sessions = Sessions(agent.model, agent.serializer, 2, 10.0, clock=lambda: now[0])
    rng = np.random.default_rng(4)

    def act(id: str) -> Future[Any]:
        future = sessions.ask(id, world.observe("made/arm", rng))
        asked, sessions.asked = sessions.asked, []
        sessions.decide(asked)
        return future

    first, second = sessions.open("made/arm"), sessions.open("made/arm")
    now[0] = 9.0
    act(first).result(0)
    with pytest.raises(Busy, match="idle for 10 seconds"):
        sessions.open("made/arm")
    now[0] = 11.0
    assert len(sessions) == 1
    sessions.open("made/arm")
    with pytest.raises(NoSession, match="ended after 10 seconds without use"):
        act(second)
    act(first).result(0)
    waits = sessions.ask(first, world.observe("made/arm", rng))
    now[0] = 1000.0
    assert len(sessions) == 1, "who waits for the model is not idle"
    sessions.decide(sessions.asked)
    assert waits.result(0) is not None


def test_sessions_whose_memory_broke_are_lost_and_no_others(
    agent: Agent, thread: ModelThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(6)
    ids = [thread.open_session("made/arm", seed=i) for i in range(3)]
    seen = [world.observe("made/arm", rng) for _ in range(2)]
    policy = Policy(agent.model, agent.serializer, "made/arm", seeds=[2])
    wanted = [policy.select_action(one) for one in seen]
    got = [thread.act(ids[2], seen[0]).result(SOON)]
    with monkeypatch.context() as patch:
        patch.setattr(Policy, "select_action", lambda *args: 1 / 0)
        with Gate(thread):
            futures = [thread.act(id, seen[0]) for id in ids[:2]]
        for future in futures:
            with pytest.raises(ZeroDivisionError):
                future.result(SOON)
    with pytest.raises(NoSession, match="was lost: ZeroDivisionError"):
        thread.act(ids[0], seen[0])
    got.append(thread.act(ids[2], seen[1]).result(SOON))
    assert same(got, wanted)
    assert thread.sessions == 1


def test_the_end_is_told_to_all_that_wait(agent: Agent) -> None:
    thread = ModelThread(agent, rows=1, waiting=3)
    id = thread.open_session("made/arm")
    gate = Gate(thread)
    sinks = [Sink() for _ in range(3)]
    for sink in sinks:
        thread.write(prefix_of(agent, "go"), Sampling(10**9), sink)
    call = thread.call(int)
    action = thread.act(id, world.observe("made/arm", np.random.default_rng(0)))
    ends = threading.Thread(target=thread.close)
    ends.start()
    with gate:
        while not thread._closed:
            pass
    ends.join(SOON)
    assert [s.last.finish for s in sinks] == ["error"] * 3
    for future in (call, action):
        with pytest.raises(RuntimeError, match="was closed"):
            future.result(SOON)
    for ask in (
        lambda: thread.call(int),
        lambda: thread.open_session("made/arm"),
        lambda: thread.write(prefix_of(agent, "go"), Sampling(), Sink()),
    ):
        with pytest.raises(RuntimeError, match="was closed"):
            ask()
    thread.close()
    other = ModelThread(agent)
    with pytest.raises(RuntimeError, match="cannot wait for its own end"):
        other.call(other.close).result(SOON)
    other.close()
