"""Return-conditioning: what is written, what is drawn, and that it beats cloning on mixed data."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from gymnasium import spaces

from gato.checkpoint import load_checkpoint
from gato.config import TrainConfig
from gato.corpora import CorpusConfig, open_corpus
from gato.envs.episode import Episode, TaskSpec
from gato.envs.store import EpisodeStore, EpisodeWriter
from gato.fitting import make_serializer
from gato.model_config import ModelConfig
from gato.optim import OptimConfig
from gato.rollouts.evaluate import evaluate
from gato.rollouts.policy import Policy
from gato.rollouts.sampling import choose_returns
from gato.show import show
from gato.tokenizers.serializer import Serializer
from gato.tokenizers.task_codec import History, TaskCodec, return_levels, to_come
from gato.tokenizers.vocabulary import RETURN_LEVELS, VocabularyLayout
from gato.train import train

LAMP = TaskSpec(
    id="toy/lamp-v0",
    observation_space=spaces.Box(-1, 1, (2,), np.float32),
    action_space=spaces.MultiDiscrete([4, 4]),
    max_steps=6,
    control_hz=10.0,
    instruction="switch the lamp",
)
"""Two numbers say which two of four switches are right; a reward for every step with both."""


def right(observation: np.ndarray) -> np.ndarray:
    """Return the action (2,) that the observation asks for."""
    return np.clip((observation + 1) * 2, 0, 3).astype(np.int64)


def lamp_episode(seed: int, good: bool) -> Episode:
    rng = np.random.default_rng(seed)
    observed = rng.uniform(-1, 1, (7, 2)).astype(np.float32)
    asked = np.array([right(o) for o in observed[:-1]])
    actions = asked if good else (asked + 1) % 4
    rewards = (actions == asked).all(1).astype(np.float32)
    no = np.zeros(6, bool)
    columns = {"observation": observed}, {"action": actions}
    return Episode(LAMP.id, *columns, rewards, no, no, None, LAMP.instruction, seed)


@pytest.fixture(scope="module")
def lamp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a store in which three of four episodes do what is wrong, always the same way."""
    path = tmp_path_factory.mktemp("lamp") / "lamp"
    with EpisodeWriter(path, LAMP) as writer:
        for seed in range(240):
            writer.append(lamp_episode(seed, good=seed % 4 == 0))
    return path


def run(lamp: Path, **options: object) -> TrainConfig:
    return TrainConfig(
        model=ModelConfig(layers=2, width=32, heads=2, head_dim=16, ffn_width=64, context=64),
        optim=OptimConfig(lr=1e-2, warmup=10),
        corpora=(CorpusConfig("lamp", str(lamp), window=1, prompt=0.0, **options),),
        text_pieces=290,
        rows=8,
        steps=150,
        log_every=50,
        save_every=150,
    )


def score(policy: Policy, steps: int = 40) -> float:
    """Return the share of steps in which the policy does what is asked."""
    rng, won = np.random.default_rng(5), 0
    for _ in range(steps):
        observation = rng.uniform(-0.95, 0.95, 2).astype(np.float32)
        won += bool((policy.select_action(observation) == right(observation)).all())
    return won / steps


@pytest.mark.parametrize("hide", [0.0, 1.0])
def test_conditioning_beats_cloning_where_most_of_the_data_is_bad(lamp, text_model, tmp_path, hide):
    scores = {}
    for name, options in (("cloned", {}), ("conditioned", {"returns": True})):
        config = run(lamp, hide_actions=hide, **options)
        loaded = load_checkpoint(train(config, tmp_path / name, text_model=text_model))
        policy = Policy(loaded.model, loaded.serializer, LAMP.id)
        scores[name] = score(policy)
        if options:
            assert loaded.serializer.task(LAMP.id).history.returns == (0.0, 6.0)
            low = Policy(loaded.model, loaded.serializer, LAMP.id, kappa=0.0, seeds=[1])
            scores["untilted"] = score(low)
    assert scores["cloned"] < 0.3, scores
    assert scores["conditioned"] > 0.7, scores
    assert scores["untilted"] < scores["conditioned"] - 0.3, scores


def conditioned(text_model: bytes, **options: object) -> Serializer:
    serializer = Serializer(state={"text": {"text.model": text_model}})
    history = History(**{"returns": (0.0, 6.0), "kappa": 3.0, **options})
    serializer.add_task(LAMP, history=history)
    return serializer


def test_the_return_to_come_stands_between_sep_and_action(text_model):
    serializer = conditioned(text_model)
    episode = lamp_episode(0, good=True)
    written = serializer.episode(episode)
    plain = conditioned(text_model, returns=None).episode(episode)
    ids = np.array(serializer.return_ids)
    for step in range(6):
        tokens = written.window(step, step + 1)
        sep, asked = tokens.ids[-4:-2]
        assert sep == serializer.control["<sep>"]
        # the slow twin: what is still to come of the rewards, as a share of what there is
        level = min(int(episode.rewards[step:].sum() / 6 * RETURN_LEVELS), RETURN_LEVELS - 1)
        assert asked == ids[level]
        assert tokens.target[-3:].tolist() == [1, 1, 1]
        np.testing.assert_array_equal(serializer.actions_in(tokens)[-3:], [False, True, True])
        without = plain.window(step, step + 1)
        np.testing.assert_array_equal(np.delete(tokens.ids, -3), without.ids)
    np.testing.assert_array_equal(written.actions, serializer.actions_in(written.steps))


def test_a_window_tells_what_comes_after_it(lamp, text_model):
    config = run(lamp, returns=True)
    serializer = make_serializer(config, text_model)
    corpus = open_corpus(replace(config.corpora[0], window=2, prompt=0.5), serializer)
    store, rng = EpisodeStore(lamp), np.random.default_rng(0)
    levels = {
        i: return_levels(to_come(store.episode(i).rewards), History(returns=(0.0, 6.0)))
        for i in range(len(store))
    }
    first = {
        tuple(np.round(store.episode(i).observations["observation"][s], 3)): levels[i][s]
        for i in range(len(store))
        for s in range(6)
    }
    ids = serializer.return_ids
    for _ in range(50):
        sequence = corpus.sample(rng, 64)
        seen = sequence.payload["continuous"]
        observed = seen["value"][sequence.local[seen["at"]] > 0].reshape(-1, 2)
        returns = sequence.ids[np.isin(sequence.ids, ids)]
        assert len(returns) == len(observed)
        scale = serializer.task(LAMP.id).observation[0][2]
        low, high = np.array(scale["low"]), np.array(scale["high"])
        for value, asked in zip(observed, returns, strict=True):
            there = low + (value.astype(float) + 1) / 2 * (high - low)
            nearest = min(first, key=lambda k: np.abs(np.array(k) - there).sum())
            assert asked == ids[first[nearest]]


def test_levels_are_cut_off_at_the_data_s(text_model):
    history = History(returns=(-1.0, 1.0))
    got = return_levels(np.array([-5.0, -1.0, 0.0, 0.999, 1.0, 7.0]), history)
    np.testing.assert_array_equal(got, [0, 0, 16, 31, 31, 31])
    assert return_levels(np.array([2.0]), History(returns=(2.0, 2.0))) == 0


class Table(torch.nn.Module):
    """A model whose logits are its states."""

    def __init__(self, ids: int) -> None:
        super().__init__()
        self.table, self.head = torch.nn.Embedding(ids, ids), None
        self.table.weight.data = torch.eye(ids)


@torch.inference_mode()
def test_returns_are_drawn_from_what_is_expected_tilted_upwards():
    levels = 8
    probability = np.array([0.3, 0.3, 0.2, 0.1, 0.06, 0.03, 0.009, 0.001])
    states = torch.from_numpy(np.log(probability)[None]).float()
    generator = np.random.default_rng(0)
    draws = {
        kappa: np.concatenate(
            [
                choose_returns(Table(levels), states, ((0, levels),), [kappa], [generator])
                for _ in range(2000)
            ]
        )
        for kappa in (0.0, 3.0, 1000.0)
    }
    expected = np.where(np.cumsum(probability) - probability < 0.95, probability, 0.0)
    for kappa, drawn in draws.items():
        wanted = expected * np.exp(kappa * np.linspace(0, 1, levels) - kappa * 4 / 7)
        wanted /= wanted.sum()
        got = np.bincount(drawn, minlength=levels) / len(drawn)
        np.testing.assert_allclose(got, wanted, atol=0.03)
    # 0.95 of what is expected: the best level that counts is the fifth, however high the tilt
    assert set(draws[1000.0]) == {4}


def test_a_checkpoint_keeps_the_returns_and_old_ones_have_none(text_model):
    codec = conditioned(text_model).task(LAMP.id)
    assert TaskCodec.from_json(codec.to_json()) == codec
    old = codec.to_json()
    old["history"] = {"window": 1, "hide_actions": False, "temperature": 0.0}
    assert TaskCodec.from_json(old).history == History(window=1)


def test_a_ledger_without_returns_still_reads(text_model):
    serializer = Serializer(state={"text": {"text.model": text_model}})
    names = serializer.layout.control_tokens[:8]
    old = VocabularyLayout(serializer.layout.ranges, names)
    again = Serializer(state={"text": {"text.model": text_model}}, layout=old)
    again.add_task(LAMP)
    serializer.add_task(LAMP)
    episode = lamp_episode(0, good=True)
    np.testing.assert_array_equal(
        again.episode(episode).steps.ids, serializer.episode(episode).steps.ids
    )
    assert again.return_ids == ()


def test_corpora_agree_on_returns(lamp, text_model):
    config = run(lamp, returns=True)
    other = replace(config.corpora[0], name="other", returns=False)
    with pytest.raises(ValueError, match=r"'lamp' and 'other' hold .* set returns in both or in"):
        make_serializer(replace(config, corpora=(config.corpora[0], other)), text_model)
    with pytest.raises(ValueError, match="kappa must be a number of at least 0; got -1"):
        Policy(None, conditioned(text_model), LAMP.id, kappa=-1)


def test_returns_and_pairs_are_shown(lamp, stores):
    tokens = show(str(lamp), steps=2, returns=True, index=0)
    values = [t["value"] for t in tokens]
    at = [i for i, v in enumerate(values) if str(v).startswith("<return ")]
    assert [values[i] for i in at] == ["<return 31>", "<return 26>"]  # 6 and 5 of 6 to come
    assert all(values[i - 1] == "<sep>" and tokens[i]["target"] for i in at)
    plain = [t["value"] for t in show(str(lamp), steps=2)]
    assert plain == [v for i, v in enumerate(values) if i not in at]
    shown = [t["value"] for t in show(str(stores / "pictures"), pairs=3)]
    assert [shown.count(v) for v in ("<bos>", "<sep>", "<eos>")] == [1, 3, 3]
    expected = "expected returns, joint or a checkpoint, which says so itself"
    with pytest.raises(ValueError, match=expected):
        show(str(lamp), returns=True, checkpoint=lamp)


def test_kappa_without_returns_is_refused():
    with pytest.raises(ValueError, match=r"kappa tilts returns to come, and none of the tasks"):
        evaluate("random", ["babyai/GoToObj-v0"], 1, workers=0, kappa=1.0)
