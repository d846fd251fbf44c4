"""What a policy decides is what the model was trained to predict, however it is batched.

The oracle is the training path: an episode's window is serialized, its actions hidden where the
history hides them, packed, and run through `model.forward`; the policy is made to take the logged
actions, and every distribution it draws from is compared.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import rollout_world as world
import torch

from gato.envs.episode import Episode, unflatten_value
from gato.rollouts import writing as writing_module
from gato.rollouts.policy import Policy
from gato.rollouts.sampling import span_logits
from gato.tokenizers.serializer import History
from gato.tokenizers.stream import TokenSequence, concatenate, pack

TASKS = list(world.SPECS)
assert_same = world.assert_same
HISTORIES = [
    *(History(window=w, hide_actions=h) for w in (1, 3, 0) for h in (False, True)),
    *(History(w, h, returns=(-2.0, 6.0), kappa=2.0) for w in (1, 0) for h in (False, True)),
]


def window_of(episode: Episode, start: int, stop: int) -> Episode:
    """Return steps [start, stop) as an episode."""
    return replace(
        episode,
        observations={k: v[start : stop + 1] for k, v in episode.observations.items()},
        actions={k: v[start:stop] for k, v in episode.actions.items()},
        rewards=episode.rewards[start:stop],
    )


def as_trained(
    serializer, whole: Episode, start: int, stop: int, prompt: Episode | None
) -> TokenSequence:
    """Return the sequence a corpus would make of steps [start, stop) of an episode."""
    history = serializer.task(whole.task).history
    returns = np.array([whole.rewards[i:].sum() for i in range(start, stop)])
    written = serializer.episode(window_of(whole, start, stop), returns)
    parts = [written.head]
    if prompt is not None:
        shown = serializer.episode(prompt)
        parts.append(shown.window(0, len(shown)))
    parts.append(written.window(0, len(written)))
    sequence = concatenate(parts)
    return sequence.hide(serializer.actions_in(sequence)) if history.hide_actions else sequence


@torch.no_grad()
def trained_logits(model, serializer, sequence: TokenSequence, skip: int) -> list[np.ndarray]:
    """Return the logits (V,) before each predicted token, the first `skip` left out."""
    batch = pack([[sequence]], -(-len(sequence) // 8) * 8, serializer.control).to("cpu")
    states = model(batch)[batch.target_at - 1]
    return list(model.logits(states).numpy())[skip:]


class Forced:
    """Stands in for `choose`: takes the logged ids and keeps the logits that were offered."""

    def __init__(self, scripts: list[list[int]]) -> None:
        self.scripts, self.seen = scripts, [[] for _ in scripts]
        self.order: list[int] = []

    def __call__(self, model, states, spans, temperatures, generators, top_p=1.0):
        ids = []
        for state, allowed, generator in zip(states, spans, generators, strict=True):
            row = generator.row
            token = self.scripts[row].pop(0)
            assert any(start <= token < stop for start, stop in allowed)
            self.seen[row].append((allowed, span_logits(model, state[None], allowed)[0].numpy()))
            ids.append(token)
        return np.array(ids)


class Numbered:
    """A generator that knows which row it belongs to."""

    def __init__(self, row: int) -> None:
        self.row = row


def force(monkeypatch, policy: Policy, scripts: list[list[int]]) -> Forced:
    """Make the policy take the scripts' ids, row by row."""
    forced = Forced(scripts)
    monkeypatch.setattr(writing_module, "choose", forced)

    def returns(model, states, spans, kappas, generators):
        return forced(model, states, [spans] * len(kappas), kappas, generators)

    monkeypatch.setattr(writing_module, "choose_returns", returns)
    for i, row in enumerate(policy.rows):
        row.generator = Numbered(i)
    return forced


def observation_at(episode: Episode, step: int):
    """Return what the environment showed before decision `step`."""
    flat = {k: v[step] for k, v in episode.observations.items()}
    return unflatten_value(world.SPECS[episode.task].observation_space, flat, "observation")


def target_ids(serializer, episode: Episode) -> list[int]:
    """Return the ids of all actions of an episode."""
    steps = serializer.episode(episode).steps
    return steps.ids[steps.target > 0].tolist()


def compare(seen, wanted) -> None:
    """Compare offered logits over spans with full ones from training."""
    assert len(seen) == len(wanted)
    for (allowed, offered), full in zip(seen, wanted, strict=True):
        cut = np.concatenate([full[start:stop] for start, stop in allowed])
        np.testing.assert_allclose(offered, cut, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("prompted", [False, True])
@pytest.mark.parametrize("history", HISTORIES, ids=str)
def test_policy_sees_what_training_saw(monkeypatch, history: History, prompted: bool) -> None:
    serializer = world.make_serializer(history)
    model = world.make_model(serializer)
    steps = 5
    episodes = [world.make_episode(t, steps, seed=i) for i, t in enumerate(TASKS)]
    prompts = {t: world.make_episode(t, 1, seed=90 + i) for i, t in enumerate(TASKS)}
    policy = Policy(model, serializer, TASKS, prompts=prompts if prompted else None)
    forced = force(monkeypatch, policy, [target_ids(serializer, e) for e in episodes])
    for step in range(steps):
        policy.select_action([observation_at(e, step) for e in episodes])
    size = history.window or steps
    for row, episode in enumerate(episodes):
        prompt = prompts[episode.task] if prompted else None
        skip = len(target_ids(serializer, prompt)) if prompt is not None else 0
        wanted = []
        for start in range(0, steps, size):
            sequence = as_trained(serializer, episode, start, min(start + size, steps), prompt)
            assert len(sequence) <= model.config.memory
            wanted += trained_logits(model, serializer, sequence, skip)
        compare(forced.seen[row], wanted)


@pytest.mark.parametrize("hide", [False, True])
def test_a_full_ring_equals_training_under_a_sliding_window(monkeypatch, hide: bool) -> None:
    serializer = world.make_serializer(History(hide_actions=hide), "scalar")
    model = world.make_model(serializer, window=40)
    steps = 30  # several wraps of the ring
    episodes = [world.make_episode(t, steps, seed=i) for i, t in enumerate(TASKS[:2])]
    policy = Policy(model, serializer, TASKS[:2])
    forced = force(monkeypatch, policy, [target_ids(serializer, e) for e in episodes])
    begin = [11, 19]  # each row is reset once, on its own
    for step in range(steps):
        policy.reset([step == b for b in begin])
        policy.select_action([observation_at(e, step) for e in episodes])
    assert (policy.memory.lengths > 2 * policy.memory.cache.slots).any(), "the ring should wrap"
    for row, episode in enumerate(episodes):
        wanted = []
        for start, stop in ((0, begin[row]), (begin[row], steps)):
            sequence = as_trained(serializer, episode, start, stop, None)
            wanted += trained_logits(model, serializer, sequence, 0)
        compare(forced.seen[row], wanted)


def test_scripted_actions_come_back_as_logged(monkeypatch) -> None:
    serializer = world.make_serializer(History())
    model = world.make_model(serializer)
    episodes = [world.make_episode(t, 1, seed=i) for i, t in enumerate(TASKS)]
    policy = Policy(model, serializer, TASKS)
    force(monkeypatch, policy, [target_ids(serializer, e) for e in episodes])
    arm, grid, game, talk = policy.select_action([observation_at(e, 0) for e in episodes])
    np.testing.assert_allclose(arm, episodes[0].actions["action"][0], atol=3 / 1024)
    assert grid == episodes[1].actions["action"][0]
    assert game[0] == episodes[2].actions["000"][0]
    np.testing.assert_allclose(game[1], episodes[2].actions["001"][0], atol=2 / 1024)
    assert talk["say"] == episodes[3].actions["say"][0]
    assert talk["then"].tolist() == episodes[3].actions["then"][0].tolist()


@pytest.mark.parametrize("history", [*HISTORIES, None], ids=str)
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_row_does_not_notice_its_neighbours(history: History | None, temperature: float) -> None:
    serializer = world.make_serializer(history or History())
    if history is None:  # every task its own
        for spec, own in zip(world.SPECS.values(), HISTORIES[1:], strict=False):
            serializer.add_task(spec, history=own)
    neighbours = world.Neighbours(serializer, [*TASKS, *TASKS], 7, temperature, resets=0.2)
    for step in range(7):
        for _, among, alone in neighbours.actions(step):
            assert_same(among, alone)


def test_a_shrunk_batch_goes_on_as_before() -> None:
    serializer = world.make_serializer(History())
    model = world.make_model(serializer)
    rng = np.random.default_rng(1)
    whole, shrunk = (Policy(model, serializer, TASKS, temperature=0.5) for _ in range(2))
    kept = [3, 0, 2]
    for step in range(5):
        seen = [world.observe(t, rng) for t in TASKS]
        wanted = whole.select_action(seen)
        if step == 2:
            shrunk.keep(kept)
        alike = shrunk.select_action([seen[i] for i in kept] if step >= 2 else seen)
        for a, b in zip([wanted[i] for i in kept] if step >= 2 else wanted, alike, strict=True):
            assert_same(a, b)


def test_a_row_can_take_another_task() -> None:
    serializer = world.make_serializer(History(window=3))
    model = world.make_model(serializer)
    rng = np.random.default_rng(1)
    policy = Policy(model, serializer, TASKS[:2], temperature=0.5)
    policy.select_action([world.observe(t, rng) for t in TASKS[:2]])
    policy.reset([True, False], tasks={0: TASKS[2]}, seeds={0: 7})
    assert policy.tasks == [TASKS[2], TASKS[1]]
    seen = [world.observe(t, rng) for t in policy.tasks]
    fresh = Policy(model, serializer, [TASKS[2]], temperature=0.5, seeds=[7])
    assert_same(policy.select_action(seen)[0], fresh.select_action(seen[:1])[0])


def test_a_prompt_must_leave_room() -> None:
    serializer = world.make_serializer(History())
    model = world.make_model(serializer)
    long = world.make_episode(TASKS[0], 40)
    with pytest.raises(ValueError, match="give fewer steps"):
        Policy(model, serializer, TASKS[0], prompts={TASKS[0]: long})
