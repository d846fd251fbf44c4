"""Rows decoded together: none notices the others, and every fast path does what its slow twin does.

Legend: B rows, U rows that draw, L rows of a task.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import rollout_world as world
import torch
from gymnasium import spaces

from gato.rollouts import batching
from gato.rollouts.batching import BUCKETS, CHUNK, Memory
from gato.rollouts.grammar import ActionGrammar, ActionPlan, OneAction, RowsOfActions
from gato.rollouts.policy import Policy
from gato.rollouts.sampling import choose
from gato.tokenizers.task_codec import History

TASKS = list(world.SPECS)
HISTORIES = {
    "made/arm": History(window=1),
    "made/grid": History(hide_actions=True),
    "made/game": History(window=3),
    "made/talk": History(),
}


def make(window: int | None = None, **sizes: Any) -> tuple[Any, Any]:
    """Return a model and a serializer whose tasks all remember differently."""
    serializer = world.make_serializer(History())
    for task, history in HISTORIES.items():
        serializer.add_task(world.SPECS[task], history=history)
    return world.make_model(serializer, window=window, **sizes), serializer


def same(a: Any, b: Any) -> bool:
    """Return whether two actions, nested or not, are equal."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(np.array_equal(a, b))


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_a_row_acts_alone_as_among_31_others(temperature: float) -> None:
    model, serializer = make(window=96)  # several wraps of the ring
    rng = np.random.default_rng(0)
    steps, tasks = 12, [TASKS[i] for i in rng.permutation(32) % len(TASKS)]
    seen = [[world.observe(t, rng) for t in tasks] for _ in range(steps)]
    resets, active = rng.random((steps, 32)) < 0.1, rng.random((steps, 32)) < 0.85
    together = Policy(model, serializer, tasks, temperature=temperature)
    chosen = {t: tasks.index(t) for t in TASKS}  # one row of each task is also played alone
    alone = {
        i: Policy(model, serializer, [t], temperature=temperature, seeds=[i])
        for t, i in chosen.items()
    }
    acted = 0
    for step in range(steps):
        together.reset(resets[step])
        actions = together.select_action(seen[step], active[step])
        for i, policy in alone.items():
            if resets[step, i]:
                policy.reset()
            if active[step, i]:
                acted += 1
                assert same(actions[i], policy.select_action([seen[step][i]])[0])
    assert acted > 30
    assert (together.memory.lengths > 96).any(), "a ring should have wrapped"


@pytest.mark.parametrize("window", [40, None])
@pytest.mark.parametrize("hide", [False, True])
def test_static_shapes_do_what_free_ones_do(window: int | None, hide: bool) -> None:
    """What a GPU replays, run as it is: chunks in buckets, padded rows, a cache of fixed size."""
    serializer = world.make_serializer(History(hide_actions=hide))
    model = world.make_model(serializer, window=window)
    rng = np.random.default_rng(1)
    free, static = (Policy(model, serializer, TASKS, temperature=0.7) for _ in range(2))
    static.memory = Memory(model, len(TASKS), static=True)
    storage = static.memory.cache.store.data_ptr()
    for step in range(12):
        seen = [world.observe(t, rng) for t in TASKS]
        resets, active = rng.random(4) < 0.15, rng.random(4) < 0.9
        for policy in (free, static):
            policy.reset(resets)
        actions = [p.select_action(seen, active) for p in (free, static)]
        assert all(map(same, *actions)), step
    assert (free.memory.lengths == static.memory.lengths).all()
    assert {shape[1] for shape in static.memory.graphs.recorded} <= set(BUCKETS)
    assert len(static.memory.graphs.recorded) > 1
    assert static.memory.cache.store.data_ptr() == storage


def test_static_chunks_longer_than_the_longest_bucket_are_read_in_parts() -> None:
    model, serializer = make()
    task = TASKS[0]
    prompts = {task: world.make_episode(task, 14)}
    policies = [Policy(model, serializer, [task] * 2, prompts=prompts) for _ in range(2)]
    policies[1].memory = Memory(model, 2, static=True)
    assert len(policies[0].rows[0].head) > CHUNK
    rng = np.random.default_rng(2)
    for _ in range(3):
        seen = [world.observe(task, rng) for _ in range(2)]
        assert all(map(same, *(p.select_action(seen) for p in policies)))


def test_a_cache_of_fixed_size_holds_what_was_read_and_no_padding() -> None:
    model, serializer = make()
    policy = Policy(model, serializer, TASKS)
    policy.memory = Memory(model, len(TASKS), static=True)
    rng = np.random.default_rng(3)
    for _ in range(3):
        policy.select_action([world.observe(t, rng) for t in TASKS])
    cache = policy.memory.cache
    assert cache.lengths.tolist() == policy.memory.lengths.tolist()
    held = (cache.key_position >= 0).sum(1)
    assert held.tolist() == cache.lengths.tolist()


def test_a_head_that_is_kept_is_as_good_as_one_read_again(monkeypatch: Any) -> None:
    model, serializer = make()
    tokens = []
    results = []
    for whole in (True, False):
        with monkeypatch.context() as patch:
            if not whole:
                patch.setattr(Memory, "whole", lambda self: np.zeros(len(self.lengths), bool))
            rng = np.random.default_rng(4)
            policy = Policy(model, serializer, [TASKS[0]] * 3, temperature=0.5)
            read: list[int] = []
            chunk_of = policy.memory.chunk

            def counted(lengths, control, chunk_of=chunk_of, read=read):
                read.append(int(lengths.sum()))
                return chunk_of(lengths, control)

            policy.memory.chunk = counted  # type: ignore[method-assign]
            actions = []
            for step in range(6):
                policy.reset([step == 4, False, step == 2])
                actions += policy.select_action([world.observe(TASKS[0], rng) for _ in range(3)])
            results.append(actions)
            tokens.append(sum(read))
    assert all(map(same, *results))
    head = len(policy.rows[0].head)
    assert tokens[1] - tokens[0] == 5 * 3 * head, "the head is read once by each row"


@pytest.mark.parametrize("returns", [None, (-2.0, 6.0)])
@pytest.mark.parametrize("task", TASKS)
def test_rows_are_written_as_one_by_one(task: str, returns: tuple[float, float] | None) -> None:
    serializer = world.make_serializer(History(returns=returns))
    codec = serializer.task(task)
    rng = np.random.default_rng(5)
    rows, written = 3, 0
    writers = ActionPlan(serializer, codec).begin(rows)
    fixed = task in ("made/arm", "made/grid")  # a number of 3000 values and a text are not
    assert [type(w) for _, w in writers] == ([RowsOfActions] if fixed else [OneAction] * rows)
    for count, writer in writers:
        grammars = [ActionGrammar(serializer, codec) for _ in range(count)]
        while writer.allowed is not None:
            assert all(g.allowed == writer.allowed for g in grammars)
            assert all(g.awaits_return == writer.awaits_return for g in grammars)
            pool = np.concatenate([np.arange(*span) for span in writer.allowed])
            ids = rng.choice(pool, count)
            writer.push(ids)
            for grammar, token in zip(grammars, ids.tolist(), strict=True):
                grammar.push(token)
            block = writer.last()
            for i, grammar in enumerate(grammars):
                mine, other = block.slice(i, i + 1), grammar.last()
                for name in ("ids", "modality", "local", "target"):
                    np.testing.assert_array_equal(getattr(mine, name), getattr(other, name))
                assert mine.payload.keys() == other.payload.keys()
                for kind, fields in other.payload.items():
                    for name, values in fields.items():
                        np.testing.assert_array_equal(mine.payload[kind][name], values)
            written += count
        assert all(g.allowed is None for g in grammars)
        space = world.SPECS[task].action_space
        for value, grammar in zip(writer.values(), grammars, strict=True):
            assert same(value, grammar.value())
            assert space.contains(value)
    assert written >= rows


def slow_choice(logits, temperature, generator, top_p):
    """Return one place of one row: the likeliest, or drawn by one number."""
    if not temperature:
        return int(np.argmax(logits))
    scaled = logits.astype(np.float64) / temperature
    weight = np.exp(scaled - scaled.max())
    weight /= weight.sum()
    if top_p < 1.0:
        order = np.argsort(-weight, kind="stable")
        before = np.cumsum(weight[order]) - weight[order]
        weight[order[before >= top_p]] = 0.0
    total = np.cumsum(weight)
    drawn = np.searchsorted(total, generator.random() * total[-1], side="right")
    return int(min(drawn, len(total) - 1))


@pytest.mark.parametrize("top_p", [1.0, 0.6])
def test_ids_are_chosen_as_row_by_row(top_p: float) -> None:
    model, _ = make()
    rng = np.random.default_rng(6)
    for _ in range(10):
        spans = [(((0, 40),), ((7, 9), (30, 60)))[i] for i in rng.integers(0, 2, 9)]
        warmth = rng.choice([0.0, 0.5, 2.0], 9).tolist()
        states = torch.from_numpy(rng.normal(size=(9, 32)).astype(np.float32))
        seeds = rng.integers(1000, size=9)
        with torch.inference_mode():
            fast = choose(
                model, states, spans, warmth, [np.random.default_rng(s) for s in seeds], top_p
            )
            full = model.logits(states).numpy()
        for i, span in enumerate(spans):
            ids = np.concatenate([np.arange(*s) for s in span])
            place = slow_choice(full[i, ids], warmth[i], np.random.default_rng(seeds[i]), top_p)
            assert fast[i] == ids[place]


def test_bfloat16_is_near_and_remembers_in_float32_on_a_cpu() -> None:
    model, serializer = make()
    full, half = (Policy(model, serializer, TASKS, precision=p) for p in ("float32", "bfloat16"))
    assert half.memory.decoder.dtype == torch.bfloat16
    assert half.memory.cache.store.dtype == torch.float32
    rng = np.random.default_rng(7)
    seen = [world.observe(t, rng) for t in TASKS]
    states = []
    for policy in (full, half):
        chunk, at = policy._chunk(policy._observed(seen, list(range(4))), list(range(4)))
        states.append(policy.memory.read(chunk)[np.arange(4), at])
    error = (states[0] - states[1]).norm() / states[0].norm()
    assert 0 < error < 0.05
    half.select_action(seen)
    with pytest.raises(ValueError, match="precision must be float32 or bfloat16; got 'fp8'"):
        Policy(model, serializer, TASKS, precision="fp8")


def test_a_long_episode_costs_the_same_at_every_step() -> None:
    serializer = world.make_serializer(History())
    model = world.make_model(serializer, window=96)
    task = TASKS[0]
    young, old = (Policy(model, serializer, [task] * 2) for _ in range(2))
    rng = np.random.default_rng(8)

    def play(policy: Policy) -> float:
        seen = [world.observe(task, rng) for _ in range(2)]
        begun = time.thread_time()
        policy.select_action(seen)
        return time.thread_time() - begun

    for _ in range(300):
        play(old)
    for _ in range(30):
        play(young)
    stored = old.memory.cache.store.data_ptr()
    times = [(play(young), play(old)) for _ in range(80)]  # in turns: one machine, one load
    ratio = statistics.median(a / b for a, b in times)
    assert ratio > 0.8, "the later steps should not be slower"
    assert old.memory.cache.store.data_ptr() == stored
    assert old.memory.cache.slots == young.memory.cache.slots
    assert all(not row.due and len(row.pending) <= 1 for row in old.rows)


def test_only_slots_in_use_are_looked_at() -> None:
    model, serializer = make()
    policy = Policy(model, serializer, [TASKS[0]] * 2)
    rng = np.random.default_rng(9)
    policy.select_action([world.observe(TASKS[0], rng) for _ in range(2)])
    step = policy.memory.cache.place(np.array([1, 1]))
    most = int(policy.memory.lengths.max()) + 1
    used = step.looks[0].used
    assert used == -(-most // batching.STEP) * batching.STEP < policy.memory.cache.slots


@pytest.mark.parametrize("history", [History(), History(hide_actions=True), History(joint=2)])
def test_an_action_of_no_dimensions_is_an_empty_array(history: History) -> None:
    serializer = world.make_serializer(History())
    nothing = replace(
        world.SPECS["made/arm"],
        id="made/nothing",
        action_space=spaces.Box(-1, 1, (0,), np.float32),
    )
    serializer.add_task(nothing, history=history)
    policy = Policy(world.make_model(serializer), serializer, ["made/nothing", "made/grid"])
    rng = np.random.default_rng(10)
    for _ in range(3):
        seen = [world.observe("made/arm", rng), world.observe("made/grid", rng)]
        action, other = policy.select_action(seen)
        assert nothing.action_space.contains(action)
        assert world.SPECS["made/grid"].action_space.contains(other)
