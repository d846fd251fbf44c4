"""Plays episodes: many simulators step in worker processes while the model decodes one batch.

Episodes of all tasks are dealt to two groups. A group's rows are decoded in one batch once all its
environments have answered; meanwhile those of the other step.

    model     | A | B | A | B | ...
    workers     B | A | B | A | ...

The longest tasks begin. A row whose episode ends takes the next one, of its own task while there is
one, else of that with the most left to do; once half of the rows are idle the batch shrinks.

Where a worker process dies, what it was playing is played again from its seed; the episode that
was being stepped then has one more chance.

What a row does depends on its task, its seed and the weights. Who shares its batch is fixed by the
jobs and `max_batch`, never by timing.
"""

from __future__ import annotations

import itertools
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from gato.envs import registry
from gato.envs.episode import TaskSpec
from gato.rollouts.hosts import Command, Death, Hosts, Reply, most_at_once
from gato.rollouts.shared import room
from gato.rollouts.speed import Speed
from gato.telling import tell


class RowPolicy(Protocol):
    """What decides for the rows of a group: a model's policy, or what stands in its place."""

    def reset(
        self,
        mask: np.ndarray,
        *,
        seeds: Mapping[int, int],
        tasks: Mapping[int, str],
    ) -> None:
        """Forget the episodes of the rows where `mask` (B,) is true; these play `tasks` next."""

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows only, in this order."""

    def select_action(self, observations: Sequence[Any], active: np.ndarray) -> Sequence[Any]:
        """Return an action per row; of rows that are not active, anything."""


HALVED = 16
"""Episodes from which on there are two groups: of a few rows, two batches cost nearly twice one."""

MakePolicy = Callable[[list[str], list[int]], RowPolicy]
"""Called with the tasks and seeds of a group's rows."""


@dataclass(frozen=True)
class Job:
    """One episode to be played."""

    task: str
    seed: int
    """Given to the environment's reset."""
    logged: bool = False
    """Whether its actions are kept."""


@dataclass
class Played:
    """What became of a job."""

    job: Job
    score: float = 0.0
    """The sum of rewards."""
    length: int = 0
    success: bool | None = None
    error: str | None = None
    """The traceback where the environment raised, or what ended its process twice."""
    actions: list[Any] = field(default_factory=list)
    """What was done, where the job is `logged`."""


class _Row:
    """A place in a group's batch and the episode it is playing."""

    def __init__(self, slot: Any, host: int, played: Played) -> None:
        self.slot, self.host, self.played = slot, host, played
        self.observation: Any = None
        self.deaths = 0
        """How often stepping this episode has ended its process."""
        self.again = False
        """Whether the policy remembers an episode that is gone."""
        self.idle = False
        """Whether there is nothing left to play here."""

    def begin(self, job: Job) -> None:
        """Play another episode from now on."""
        self.played, self.deaths = Played(job), 0


class _Group:
    """Rows decoded together."""

    def __init__(
        self, number: int, jobs: Sequence[Job], rows: range, hosts: int, steps: Mapping[str, int]
    ) -> None:
        """Make rows and begin with the jobs' tasks in turn, another group with those after.

        Args:
            number: of the group.
            jobs: what it plays.
            rows: its rows, at most, among those of all groups.
            hosts: how many there are.
            steps: that an episode of each task may take.
        """
        self.number, self._steps = number, steps
        self.queues: dict[str, deque[Job]] = {}
        for job in jobs:
            self.queues.setdefault(job.task, deque()).append(job)
        names = list(self.queues)
        self.rows: list[_Row] = []
        for i, place in enumerate(rows[: len(jobs)]):
            first = self._next(names[place % len(names)])
            assert first is not None
            # Convention: rows go to hosts in turn, an uneven rest to another host per group.
            self.rows.append(_Row((number, i), (number + i) % hosts, Played(first)))
        self.awaited = 0
        self.policy: RowPolicy | None = None

    def _next(self, task: str) -> Job | None:
        """Return the next episode of a task; where it has none left, of whose are most to do."""
        queue = self.queues[task]
        if not queue:
            most = max(self.queues, key=lambda name: len(self.queues[name]) * self._steps[name])
            queue = self.queues[most]
        return queue.popleft() if queue else None

    def start(self, make_policy: MakePolicy, hosts: Hosts, seed_of: Callable[[Job], int]) -> None:
        """Make the policy and reset every environment."""
        jobs = [row.played.job for row in self.rows]
        self.policy = make_policy([j.task for j in jobs], [seed_of(j) for j in jobs])
        self._send(hosts, [(row, _reset(row)) for row in self.rows])

    def _send(self, hosts: Hosts, commands: list[tuple[_Row, Command]]) -> None:
        by_host: dict[int, list[Command]] = {}
        for row, command in commands:
            by_host.setdefault(row.host, []).append(command)
        self.awaited = len(by_host)
        for host, some in by_host.items():
            hosts.send(host, self.number, some)

    def take(self, replies: Sequence[Reply]) -> bool:
        """Take one host's answers; return whether all have answered."""
        by_slot = {row.slot: row for row in self.rows}
        for reply in replies:
            row, played = by_slot[reply.slot], by_slot[reply.slot].played
            stepped = row.observation is not None
            row.observation = None if reply.ended else reply.observation
            played.length += stepped and reply.error is None
            played.score += reply.reward
            played.error = reply.error
            if reply.acted is not None and played.actions:
                played.actions[-1] = deepcopy(reply.acted)
            if stepped or reply.ended:
                played.success = reply.success
        self.awaited -= 1
        return self.awaited == 0

    def lose(self, hosts: Hosts, death: Death) -> bool:
        """Begin again what a dead worker was playing; return whether all others have answered."""
        owed = self.number in death.unanswered
        commands: list[Command] = []
        for row in self.rows:
            asked = owed or row.observation is not None
            if row.idle or row.host != death.host or not asked:
                continue  # what has ended is told, and the next is reset as ever
            row.deaths += row.slot == death.culprit
            row.observation, row.again, row.played = None, True, Played(row.played.job)
            if row.deaths > 1:
                row.played.error, row.played.success = f"{death.reason}, twice", False
            else:
                commands.append(_reset(row))
        self.awaited += bool(commands) - owed
        if commands:
            hosts.send(death.host, self.number, commands)
        return owed and self.awaited == 0

    def advance(self, hosts: Hosts, seed_of: Callable[[Job], int], speed: Speed) -> list[Played]:
        """Act for every row, start the next episodes; return those that ended."""
        assert self.policy is not None
        ended = [i for i, r in enumerate(self.rows) if r.observation is None and not r.idle]
        finished = [self.rows[i].played for i in ended]
        commands: list[tuple[_Row, Command]] = []
        for i in ended:
            row = self.rows[i]
            job = self._next(row.played.job.task)
            if job is None:
                row.idle = True
            else:
                row.begin(job)
                commands.append((row, _reset(row)))
        idle = {i for i, row in enumerate(self.rows) if row.idle}
        again = {i for i, row in enumerate(self.rows) if row.again}
        active = np.array([row.observation is not None for row in self.rows])
        with speed.counting("model"):
            self._reset_policy(sorted({*ended, *again} - idle), seed_of)
            actions = self.policy.select_action([row.observation for row in self.rows], active)
        speed.steps += int(active.sum())
        speed.batches += bool(active.any())
        for i in np.flatnonzero(active).tolist():
            commands.append((self.rows[i], ("step", self.rows[i].slot, actions[i])))
            if self.rows[i].played.job.logged:
                self.rows[i].played.actions.append(deepcopy(actions[i]))
        if 2 * len(idle) >= len(self.rows):  # each shrinking costs a GPU its recorded graphs
            kept = [i for i in range(len(self.rows)) if i not in idle]
            self.rows = [self.rows[i] for i in kept]
            if kept:
                with speed.counting("model"):
                    self.policy.keep(kept)
        self._send(hosts, commands)
        return finished

    def _reset_policy(self, rows: list[int], seed_of: Callable[[Job], int]) -> None:
        if rows:
            assert self.policy is not None
            mask = np.zeros(len(self.rows), bool)
            mask[rows] = True
            for i in rows:
                self.rows[i].again = False
            jobs = {i: self.rows[i].played.job for i in rows}
            self.policy.reset(
                mask,
                seeds={i: seed_of(j) for i, j in jobs.items()},
                tasks={i: j.task for i, j in jobs.items()},
            )


def _reset(row: _Row) -> Command:
    return ("reset", row.slot, row.played.job.task, row.played.job.seed)


def run(
    make_policy: MakePolicy,
    jobs: Sequence[Job],
    *,
    workers: int = 2,
    max_batch: int | None = None,
    seed: int = 0,
    timeout: float | None = 600.0,
    on_played: Callable[[Played], None] | None = None,
    speed: Speed | None = None,
) -> list[Played]:
    """Play every job and return what became of each, in the order of the jobs.

    Args:
        make_policy: returns the policy of a group of rows.
        jobs: episodes to play; their order decides who shares a batch, after their length.
        workers: processes that step simulators; 0 steps them in this one.
        max_batch: most episodes that are under way at once; by default see `hosts.most_at_once`.
        seed: of the policies' own draws, together with each job's task and seed.
        timeout: seconds that one step or reset may take before its worker process is ended, which
            is a death like any other. In this process (`workers` 0) nothing ends it.
        on_played: called as episodes end.
        speed: is told where the time goes.

    Raises:
        ValueError: where an environment cannot be started at all (a missing simulator).
        RuntimeError: where worker processes end before they can be asked anything.
    """
    max_batch = most_at_once(job.task for job in jobs) if max_batch is None else max_batch
    if workers < 0 or max_batch < 1:
        raise ValueError(
            f"expected 0 or more workers and a max_batch of 1 or more; got {workers} and "
            f"{max_batch}."
        )

    def seed_of(job: Job) -> int:
        key = [seed, job.seed, zlib.crc32(job.task.encode())]
        return int(np.random.SeedSequence(key).generate_state(1)[0])

    speed = Speed() if speed is None else speed
    with speed.running(workers):
        specs = {task: registry.spec(task) for task in dict.fromkeys(job.task for job in jobs)}
        groups = _deal(jobs, specs, workers, max_batch)
        hosts = Hosts(workers, timeout, _rooms(groups, specs) if workers else None)
        try:
            for group in groups:
                group.start(make_policy, hosts, seed_of)
            playing = {group.number: group for group in groups}
            results = _play(playing, hosts, seed_of, speed, on_played or (lambda played: None))
        finally:
            hosts.close()
    return [results[job] for job in jobs]


def _play(
    groups: dict[int, _Group],
    hosts: Hosts,
    seed_of: Callable[[Job], int],
    speed: Speed,
    on_played: Callable[[Played], None],
) -> dict[Job, Played]:
    """Play until no group has rows left."""
    results: dict[Job, Played] = {}
    while groups:
        with speed.counting("waiting"):
            received = hosts.receive()
        ready: list[_Group] = []
        for told in received:
            if isinstance(told, Death):
                tell(f"{told.reason}; playing its episodes again")
                ready += [g for g in groups.values() if g.lose(hosts, told)]
                continue
            speed.simulator_seconds += told.seconds
            if groups[told.group].take(told.replies):
                ready.append(groups[told.group])
        for group in ready:
            if group.awaited:
                continue  # a death has taken back what had been answered
            for played in group.advance(hosts, seed_of, speed):
                results[played.job] = played
                on_played(played)
            if not group.rows:
                del groups[group.number]
    return results


def _deal(
    jobs: Sequence[Job], specs: Mapping[str, TaskSpec], workers: int, max_batch: int
) -> list[_Group]:
    """Return two groups, so that one steps while the other is decoded; of few jobs, one."""
    steps = {task: spec.max_steps for task, spec in specs.items()}
    longest_first = sorted(jobs, key=lambda job: -steps[job.task])
    count = 2 if workers and len(jobs) >= HALVED and max_batch > 1 else 1
    # every task's episodes are dealt out in turn
    dealt = [longest_first[number::count] for number in range(count)]
    width, more = divmod(max_batch, count)
    bounds = [n * width + min(n, more) for n in range(count + 1)]
    rows = [range(*pair) for pair in itertools.pairwise(bounds)]
    hosts = max(workers, 1)
    return [_Group(n, part, rows[n], hosts, steps) for n, part in enumerate(dealt) if part]


def _rooms(groups: Iterable[_Group], specs: Mapping[str, TaskSpec]) -> dict[Any, int]:
    """Return how many bytes an observation of each slot takes at most."""
    rooms: dict[Any, int] = {}
    for group in groups:
        size = room(specs[task].observation_space for task in group.queues)
        rooms |= {row.slot: size for row in group.rows}
    return rooms
