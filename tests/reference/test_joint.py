"""Actions predicted beside the stream: what is asked of a state, and what a policy makes of it.

Each is compared with something slow and plain: targets written one by one in Python, the packed
forward of training, a row decoded alone.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import rollout_world as world
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gato.envs.episode import Episode, unflatten_value
from gato.model import soft_cross_entropy
from gato.rollouts import joint as joint_module
from gato.rollouts import writing as writing_module
from gato.rollouts.policy import Policy
from gato.rollouts.sampling import span_logits
from gato.tokenizers.serializer import History, Serializer
from gato.tokenizers.stream import JointTargets, TokenSequence, concatenate, pack
from gato.tokenizers.task_codec import TaskCodec

assert_same = world.assert_same
TASKS = [t for t in world.SPECS if t != "made/talk"]  # whose actions are words
IDS = {"made/arm": 3, "made/grid": 1, "made/game": 4}
"""How many ids an action takes."""


def serializer_of(*histories: History, observations: str = "vector") -> Serializer:
    """Return a serializer that knows the tasks, with these histories in turn."""
    serializer = world.make_serializer(History(), observations)
    for i, task in enumerate(TASKS):
        serializer.add_task(world.SPECS[task], history=histories[i % len(histories)])
    return serializer


def part_of(episode: Episode, start: int, stop: int) -> Episode:
    """Return steps [start, stop) as an episode."""
    return replace(
        episode,
        observations={k: v[start : stop + 1] for k, v in episode.observations.items()},
        actions={k: v[start:stop] for k, v in episode.actions.items()},
        rewards=episode.rewards[start:stop],
        terminated=episode.terminated[start:stop],
        truncated=episode.truncated[start:stop],
    )


def ids_of(task: str, episode: Episode) -> np.ndarray:
    """Return the ids (T, k) of all actions, as a stream that decodes them in turn has them."""
    plain = world.make_serializer(History())
    steps = plain.episode(episode).steps
    return steps.ids[steps.target > 0].reshape(-1, IDS[task])


def triples(joint: JointTargets | None) -> list[tuple[int, int, int]]:
    return [] if joint is None else list(zip(*(x.tolist() for x in columns(joint)), strict=True))


def columns(joint: JointTargets) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return joint.at, joint.slot, joint.ids


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("hide", [True, False])
@pytest.mark.parametrize("chunk", [1, 3])
def test_a_step_predicts_its_action_and_those_after_it(task, hide, chunk) -> None:
    serializer = serializer_of(History(hide_actions=hide, joint=chunk))
    episode = world.make_episode(task, 5)
    written, ids = serializer.episode(episode), ids_of(task, episode)
    plain = world.make_serializer(History()).episode(episode)
    k, wanted = IDS[task], []
    for step in range(5):
        at = written.starts[step + 1] - 1 - (0 if hide else k)
        for ahead in range(chunk):
            for dim in range(k if step + ahead < 5 else 0):
                wanted.append((at, ahead * k + dim + 1, ids[step + ahead, dim]))
    assert triples(written.steps.joint) == wanted
    assert not written.steps.target.any()
    assert len(plain.steps) - len(written.steps) == 5 * (k + 1) * hide
    owners = [serializer.layout.owner(int(i)) for i in written.steps.joint.ids]
    assert owners == [serializer.names[m] for m in written.steps.joint.modality]
    # the stream without its loss is the one that decodes actions in turn, or what is left of it
    kept = np.flatnonzero(plain.steps.local > 0) if hide else np.arange(len(plain.steps))
    np.testing.assert_array_equal(written.steps.ids, plain.steps.ids[kept])
    np.testing.assert_array_equal(
        serializer.actions_in(concatenate([written.head, written.steps]))[len(written.head) :],
        np.zeros(len(kept), bool) if hide else plain.actions,
    )


def test_a_window_looks_ahead_of_itself() -> None:
    serializer = serializer_of(History(hide_actions=True, joint=3))
    episode = world.make_episode("made/arm", 9)
    whole = serializer.episode(episode)
    for start, stop, read in ((0, 4, 6), (4, 9, 9), (8, 9, 9)):
        cut = serializer.episode(part_of(episode, start, read), steps=stop - start)
        assert triples(cut.steps.joint) == triples(whole.window(start, stop).joint)
        np.testing.assert_array_equal(cut.steps.ids, whole.window(start, stop).ids)


# ---- slots through slice, concatenate and pack ---------------------------------------------------


@st.composite
def sequences(draw) -> TokenSequence:
    """A sequence whose tokens predict some ids beside them."""
    n = draw(st.integers(1, 6))
    some = draw(st.lists(st.tuples(st.integers(0, n - 1), st.integers(1, 4)), unique=True))
    at, slot = (
        (np.array(c, np.int64) for c in zip(*sorted(some), strict=True)) if some else ((), ())
    )
    ids = np.array(draw(st.lists(st.integers(0, 90), min_size=len(at), max_size=len(at))), np.int32)
    joint = (
        JointTargets(
            at, slot.astype(np.int16), ids, (ids % 3).astype(np.uint8), ids.astype(np.float32) + 1
        )
        if len(at)
        else None
    )
    ordinary = (np.arange(n) > 0) & (draw(st.integers(0, 63)) >> np.arange(n) & 1 == 1)
    zeros = np.zeros(n, np.int16)
    return TokenSequence(
        np.arange(n, dtype=np.int32),
        zeros.astype(np.uint8),
        zeros,
        ordinary.astype(np.float32),
        joint=joint,
    )


@settings(max_examples=80)
@given(
    parts=st.lists(sequences(), min_size=1, max_size=5), cut=st.tuples(*[st.integers(0, 30)] * 2)
)
def test_slots_survive_slices_concatenation_and_packing(parts, cut) -> None:
    whole = concatenate(parts)
    wanted, start = [], 0
    for part in parts:
        wanted += [(at + start, slot, token) for at, slot, token in triples(part.joint)]
        start += len(part)
    assert triples(whole.joint) == wanted
    a, b = sorted(min(c, len(whole)) for c in cut)
    inside = [(at - a, slot, token) for at, slot, token in wanted if a <= at < b]
    assert triples(whole.slice(a, b).joint) == inside
    assert triples(whole.hide(np.ones(len(whole), bool)).joint) == wanted
    assert whole.targets() == np.count_nonzero(whole.target) + len(wanted)

    control = {"<pad>": 0, "<masked>": 1}
    rows = [parts[::2], parts[1::2]]
    corpora = [[0] * len(rows[0]), [1] * len(rows[1])]
    batch = pack(rows, 20, control, corpora)
    batch.validate()
    expected, start = [], 0
    for r, row in enumerate(rows):
        start = r * 20
        for part in row:
            if part.joint is not None:
                for at, slot, token, kind, weight in zip(*vars(part.joint).values(), strict=True):
                    expected.append((int(kind), start + at, slot, token, weight, r))
            start += len(part)
    expected.sort(key=lambda row: row[0])  # by modality, in their order otherwise
    beside = slice(len(batch.target_at) - len(expected), None)
    found = zip(
        *(getattr(batch, f"target_{n}")[beside] for n in ("modality", "at", "slot", "ids")),
        batch.target_weight[beside],
        batch.target_corpus[beside],
        strict=True,
    )
    assert list(found) == expected
    assert [n for kind, count in batch.joint for n in [kind] * count] == [e[0] for e in expected]
    np.testing.assert_array_equal(batch.state_at[beside], batch.target_at[beside])
    ordinary = slice(0, len(batch.target_at) - len(expected))
    np.testing.assert_array_equal(batch.state_at[ordinary], batch.target_at[ordinary] - 1)


def test_a_batch_that_miscounts_its_slots_is_refused() -> None:
    serializer = serializer_of(History(hide_actions=True, joint=1))
    batch = pack(
        [[serializer.episode(world.make_episode(TASKS[0], 2)).steps]], 16, serializer.control
    )
    batch.validate()
    with pytest.raises(ValueError, match="joint targets"):
        replace(batch, joint=()).validate()
    with pytest.raises(ValueError, match="joint targets"):
        replace(batch, target_slot=batch.target_slot * (np.arange(6) != 4)).validate()


# ---- the loss ------------------------------------------------------------------------------------


def batch_of(serializer: Serializer, episodes: list[Episode], alone: int | None = None):
    parts = [serializer.episode(e) for e in episodes]
    whole = [concatenate([w.head, w.steps]) for w in parts]
    rows = [[w] for w in whole] if alone is None else [[whole[alone]]]
    if alone is None:
        rows = [whole[:2], whole[2:]]
    return pack(rows, 192, serializer.control).to("cpu")


def states_of(batch) -> dict[tuple[int, int, int], int]:
    """Return where each target lies in a batch, by document, slot and place in the document."""
    keys = zip(
        batch.document[batch.target_at].tolist(),
        batch.target_slot.tolist(),
        batch.position[batch.target_at].tolist(),
        strict=True,
    )
    return {key: i for i, key in enumerate(keys)}


@pytest.mark.parametrize("soft", [0.0, 3.0])
def test_the_loss_of_a_slot_is_that_of_its_own_logits(soft: float) -> None:
    serializer = serializer_of(History(joint=2, hide_actions=True), History(), History(joint=3))
    model = world.make_model(serializer)
    ordinal = serializer.ordinal_span()
    batch = batch_of(serializer, [world.make_episode(t, 4, seed=3) for t in TASKS])
    assert {s for s in batch.target_slot.tolist()} == set(range(13))
    with torch.no_grad():
        found = model.loss(batch, ordinal, soft)
        hidden = model(batch)
        for i in range(len(found)):
            slot, token = batch.target_slot[i : i + 1], int(batch.target_ids[i])
            if slot == 0:
                start, stop, h = 0, model.vocabulary_size, hidden[batch.target_at[i] - 1]
            else:
                start, stop = serializer.layout.span(serializer.names[batch.target_modality[i]])
                h = model.joint(hidden[batch.target_at[i]][None], slot)[0]
            logits = model.logits(h)[start:stop]
            if ordinal[0] <= token < ordinal[1] and soft:
                bins = (ordinal[0] - start, ordinal[1] - start)
                at = torch.tensor([token - start])
                wanted = soft_cross_entropy(logits[None], at, bins, soft)[0]
            else:
                wanted = torch.nn.functional.cross_entropy(logits, torch.tensor(token - start))
            torch.testing.assert_close(found[i], wanted, atol=2e-5, rtol=1e-4)
        model.train()  # pads targets to whole blocks
        padded = model.batch_nll(hidden, batch, ordinal, soft)
        torch.testing.assert_close(padded, found, atol=2e-5, rtol=1e-4)


def test_no_target_sees_the_next_step_or_another_document() -> None:
    serializer = serializer_of(History(joint=2, hide_actions=True))
    model = world.make_model(serializer)
    episodes = [world.make_episode(t, 4, seed=1) for t in TASKS]
    together = batch_of(serializer, episodes)
    later = episodes[0].observations["observation"].copy()
    later[2:] += 1.0
    changed = [replace(episodes[0], observations={"observation": later}), *episodes[1:]]
    other = batch_of(serializer, changed)
    with torch.no_grad():
        nll, moved = model.loss(together), model.loss(other)
        step = together.position[together.target_at]
        first = together.document[together.target_at] == 0
        last = int(step[first].max())
        tokens = 2  # of an observation of 7 numbers in groups of 4
        before = first & (step <= last - 2 * tokens)
        assert (nll[before] == moved[before]).all()
        assert (nll[first & ~before] != moved[first & ~before]).all()
        assert (nll[~first] == moved[~first]).all()
        for i in range(3):
            alone = batch_of(serializer, episodes, i)
            mine = model.loss(alone)
            places, owner = states_of(together), states_of(alone)
            document = i if i < 2 else 3  # the first row ends with padding, a document
            for (_, slot, at), where in owner.items():
                wanted = nll[places[document, slot, at]]
                torch.testing.assert_close(mine[where], wanted, atol=1e-5, rtol=1e-4)


def test_models_without_joint_tasks_have_no_more_parameters() -> None:
    plain = world.make_model(world.make_serializer(History()))
    assert plain.joint is None
    assert not any(n.startswith("joint") for n in plain.state_dict())
    joint = world.make_model(serializer_of(History(joint=2)))
    assert joint.joint.slots == 8
    assert set(plain.state_dict()) < set(joint.state_dict())


def test_tasks_of_older_checkpoints_are_not_joint() -> None:
    task = world.make_serializer(History()).task("made/arm")
    described = task.to_json()
    del described["history"]["joint"]
    assert TaskCodec.from_json(described).history == History()
    joint = serializer_of(History(joint=3, hide_actions=True)).task("made/arm")
    assert TaskCodec.from_json(joint.to_json()).history.joint == 3


def test_what_cannot_be_joint_is_refused() -> None:
    serializer = world.make_serializer(History())
    with pytest.raises(ValueError, match=r"made/talk: 'say'.*joint = 2.*Set joint = 0"):
        serializer.add_task(world.SPECS["made/talk"], history=History(joint=2))
    assert serializer.task("made/talk").history.joint == 0
    with pytest.raises(ValueError, match="joint = 0 where returns"):
        serializer.add_task(world.SPECS["made/arm"], history=History(returns=(0.0, 1.0), joint=1))
    with pytest.raises(ValueError, match="joint must be at least 0"):
        History(joint=-1)


# ---- the policy ----------------------------------------------------------------------------------


class Scripted:
    """Stands in for `choose`: takes the logged ids, and keeps the logits that were offered."""

    def __init__(self, rows: int) -> None:
        self.scripts: list[list[int]] = [[] for _ in range(rows)]
        self.seen: list[list[np.ndarray]] = [[] for _ in range(rows)]

    def __call__(self, model, states, spans, temperatures, generators, top_p=1.0):
        for state, allowed, row in zip(states, spans, generators, strict=True):
            self.seen[row].append((allowed, span_logits(model, state[None], allowed)[0].numpy()))
        return np.array([self.scripts[row].pop(0) for row in generators])


@torch.no_grad()
def trained(model, serializer, episode: Episode, window: int, steps: int):
    """Return the states (D,) of training by (step, slot), windows one after another."""
    found = {}
    chunk = serializer.task(episode.task).history.joint
    for start in range(0, steps, window or steps):
        stop = min(start + (window or steps), steps)
        cut = part_of(episode, start, min(stop + chunk - 1, len(episode)))
        written = serializer.episode(cut, steps=stop - start)
        sequence = concatenate([written.head, written.steps])
        batch = pack([[sequence]], -(-len(sequence) // 8) * 8, serializer.control).to("cpu")
        states = model.joint(model(batch)[batch.state_at], batch.target_slot)
        place = batch.target_at.numpy() - len(written.head)
        of = np.searchsorted(written.starts, place, side="right") - 1 + start
        for step, slot, state in zip(of.tolist(), batch.target_slot.tolist(), states, strict=True):
            found[step, slot] = state
    return found


@torch.inference_mode()
def cut_logits(model, state, allowed) -> np.ndarray:
    return span_logits(model, state[None], allowed)[0].numpy()


@pytest.mark.parametrize("window", [1, 3, 0])
@pytest.mark.parametrize("hide", [True, False])
@pytest.mark.parametrize(("chunk", "execute"), [(1, None), (3, None), (3, 1), (3, 2)])
def test_policy_sees_what_training_saw(monkeypatch, window, hide, chunk, execute) -> None:
    serializer = serializer_of(History(window, hide, joint=chunk))
    model = world.make_model(serializer)
    steps, taken = 7, execute or chunk
    episodes = [world.make_episode(t, steps + chunk, seed=i) for i, t in enumerate(TASKS)]
    ids = [ids_of(t, e) for t, e in zip(TASKS, episodes, strict=True)]
    policy = Policy(model, serializer, TASKS, execute=execute)
    scripted = Scripted(len(TASKS))
    for module in (writing_module, joint_module):
        monkeypatch.setattr(module, "choose", scripted)
    reads: list[int] = []
    real = policy.memory.read
    monkeypatch.setattr(policy.memory, "read", lambda *a, **k: reads.append(1) or real(*a, **k))
    for row in range(len(TASKS)):
        policy.rows[row].generator = row
    for step in range(steps):
        if step % taken == 0:
            scripted.scripts = [i[step : step + taken].reshape(-1).tolist() for i in ids]
        shown = [
            unflatten_value(
                world.SPECS[e.task].observation_space,
                {k: v[step] for k, v in e.observations.items()},
                "observation",
            )
            for e in episodes
        ]
        for episode, action in zip(episodes, policy.select_action(shown), strict=True):
            expected = {k: v[step] for k, v in episode.actions.items()}
            got = action if isinstance(action, tuple) else (action,)
            for a, b in zip(got, expected.values(), strict=True):
                np.testing.assert_allclose(a, b, atol=3 / 1024)
    assert len(reads) == -(-steps // taken)
    for row, episode in enumerate(episodes):
        states = trained(model, serializer, episode, window, steps)
        k, wanted = IDS[episode.task], []
        for step in range(0, steps, taken):
            wanted += [states[step, slot + 1] for slot in range(taken * k)]
        assert len(scripted.seen[row]) == len(wanted)
        for (allowed, offered), state in zip(scripted.seen[row], wanted, strict=True):
            cut = cut_logits(model, state, allowed)
            np.testing.assert_allclose(offered, cut, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_joint_row_does_not_notice_its_neighbours(temperature: float) -> None:
    serializer = serializer_of(
        History(window=3, hide_actions=True, joint=2), History(), History(joint=3)
    )
    tasks = [*TASKS, *TASKS]
    neighbours = world.Neighbours(serializer, tasks, 9, temperature, resets=0.15)
    for step in range(9):
        if step == 6:  # a batch that shrinks goes on with what is due
            neighbours.keep([4, 0, 2, 3])
        for i, among, alone in neighbours.actions(step):
            assert_same(among, alone)
            assert among is None or world.SPECS[tasks[i]].action_space.contains(among)


def test_a_reset_row_forgets_what_was_due() -> None:
    serializer = serializer_of(History(hide_actions=True, joint=3))
    model = world.make_model(serializer)
    rng = np.random.default_rng(2)
    policy, fresh = (Policy(model, serializer, [TASKS[0]]) for _ in range(2))
    policy.select_action([world.observe(TASKS[0], rng)])
    policy.reset()
    for _ in range(4):
        seen = [world.observe(TASKS[0], rng)]
        assert_same(policy.select_action(seen)[0], fresh.select_action(seen)[0])


def test_execute_must_be_positive() -> None:
    serializer = serializer_of(History(joint=2))
    with pytest.raises(ValueError, match="execute must be at least 1"):
        Policy(world.make_model(serializer), serializer, TASKS, execute=0)


@pytest.mark.parametrize(("joint", "execute"), [(0, 7), (0, 1), (2, 7), (2, 3)])
def test_execute_is_refused_where_no_task_decides_so_many(joint: int, execute: int) -> None:
    serializer = serializer_of(History(joint=joint))
    model = world.make_model(serializer)
    message = rf"execute .* {execute}; got 'made/arm', trained with joint = {joint}"
    for tasks in ("made/arm", TASKS):
        with pytest.raises(ValueError, match=message):
            Policy(model, serializer, tasks, execute=execute)


def test_where_some_tasks_decide_as_many_the_others_take_all_of_theirs() -> None:
    serializer = serializer_of(History(), History(joint=2), History(joint=4))
    policy = Policy(world.make_model(serializer), serializer, TASKS, execute=3)
    assert [row.execute for row in policy.rows] == [1, 2, 3]


@pytest.mark.parametrize("window", [0, 1, 3])
def test_a_call_that_was_refused_has_left_nothing_behind(window: int) -> None:
    """One row's action is due while the other decides, and that one observes no number."""
    serializer = serializer_of(History(window, True, joint=3), History(window))
    model = world.make_model(serializer)
    tasks = ["made/arm", "made/grid", "made/arm"]
    rng = np.random.default_rng(3)
    tried, plain = (Policy(model, serializer, tasks, temperature=0.7) for _ in range(2))
    for step in range(9):
        seen = [world.observe(t, rng) for t in tasks]
        active = [step > 0, True, True]  # the first decides when the last has an action due
        bad = [np.full(7, np.nan, np.float32), *seen[1:]] if step % 3 == 1 else None
        if bad is not None:
            assert tried.rows[2].due
            with pytest.raises(ValueError, match="made/arm"):
                tried.select_action(bad, active)
        actions = [p.select_action(seen, active) for p in (tried, plain)]
        for a, b in zip(*actions, strict=True):
            assert_same(a, b)
        assert [len(r.pending) for r in tried.rows] == [len(r.pending) for r in plain.rows]
        assert (tried.memory.lengths == plain.memory.lengths).all()
