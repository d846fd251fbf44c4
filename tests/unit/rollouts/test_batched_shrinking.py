"""A batch whose rows fall idle shrinks by halves: each shrinking costs a GPU its recordings."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from gato.rollouts.agent import Agent
from gato.rollouts.batching import BUCKETS, Memory
from gato.rollouts.graphs import Graphs
from gato.rollouts.hosts import Death
from gato.rollouts.policy import Policy
from gato.rollouts.runner import Job, Played, _deal, run

TASKS = ("made/count-v0", "made/reach-v0")
JOBS = [Job(task, seed, logged=True) for task in TASKS for seed in range(8)]


class Noting(Policy):
    """Has static shapes, and notes how many rows it goes on with."""

    kept: list[int]

    def keep(self, rows: Sequence[int]) -> None:
        self.kept.append(len(rows))
        super().keep(rows)


def play(agent: Agent, max_batch: int) -> tuple[list[Played], list[int]]:
    """Play all; return what became of each, and to how many rows the batch shrank."""
    kept: list[int] = []

    def make_policy(tasks: list[str], seeds: list[int]) -> Policy:
        made = Noting(agent.model, agent.serializer, tasks, temperature=1.0, seeds=seeds)
        made.kept, made.memory = kept, Memory(agent.model, len(tasks), static=True)
        return made

    return run(make_policy, JOBS, workers=0, max_batch=max_batch), kept


def test_shapes_are_recorded_anew_only_for_half_the_rows(
    suite: ModuleType, agent: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded: list[tuple[int, ...]] = []
    record = Graphs._record

    def counted(self: Graphs, x: Any, valid: Any) -> Any:
        recorded.append(tuple(x.shape))
        return record(self, x, valid)

    monkeypatch.setattr(Graphs, "_record", counted)
    played, kept = play(agent, 16)
    sizes = [16, *kept]  # episodes last 3 to 8 steps: rows fall idle at six different times
    assert len(kept) > 1
    assert all(0 < 2 * after <= before for before, after in zip(sizes, kept, strict=False))
    assert {shape[0] for shape in recorded} <= set(sizes)
    assert len(recorded) == len(set(recorded)) <= len(sizes) * len(BUCKETS)
    alone, never = play(agent, 1)
    assert not never
    assert [p.length for p in played] == [p.length for p in alone]
    assert [[a.tolist() for a in p.actions] for p in played] == [
        [a.tolist() for a in p.actions] for p in alone
    ]


def test_an_idle_row_is_not_played_again_where_a_worker_dies(suite: ModuleType) -> None:
    [group] = _deal(JOBS[:2], {task: SimpleNamespace(max_steps=9) for task in TASKS}, 0, 2)
    first, second = group.rows
    first.observation, second.idle = 1, True
    sent: list[Any] = []
    hosts = SimpleNamespace(send=lambda host, number, commands: sent.extend(commands))
    group.awaited = 1
    death = Death(0, "it died", first.slot, frozenset([group.number]))
    assert not group.lose(hosts, death)  # type: ignore[arg-type]
    assert [command[:2] for command in sent] == [("reset", first.slot)]
