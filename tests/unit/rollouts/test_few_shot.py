"""What is learnt from examples: the measure against asking one by one, and one who looks back."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from gato import cli, presets
from gato.checkpoint import build_model
from gato.config import TrainConfig
from gato.corpora import CorpusConfig, open_corpus
from gato.envs.corpora import registry
from gato.envs.records import RecordStore
from gato.model_config import ModelConfig
from gato.rollouts import few_shot
from gato.rollouts.agent import Agent
from gato.rollouts.choices import judge
from gato.rollouts.few_shot import SHOTS, shots
from gato.rollouts.measures import KINDS, MEASURES
from gato.rollouts.metrics import Options
from gato.text_model import _of_record as text_model_texts
from gato.tokenizers.serializer import Serializer
from gato.tokenizers.text import MODEL_FILE


@pytest.fixture(scope="module")
def records() -> list:
    return list(registry.records("bindings", "heldout", 0, 24))


@pytest.fixture(scope="module")
def agent(serializer: Serializer) -> Agent:
    sizes = {"layers": 1, "width": 16, "heads": 2, "head_dim": 8, "ffn_width": 32}
    torch.manual_seed(0)
    model = build_model(TrainConfig(ModelConfig(**sizes, context=96)), serializer)
    return Agent(SimpleNamespace(path="nowhere", model=model, serializer=serializer))


def test_each_number_of_examples_is_asked_as_one_by_one(agent: Agent, records: list) -> None:
    records = records[:8]
    told = shots(agent, records, Options(max_tokens=4))
    assert told["count"] == 8
    names = [f"{how}_{n}_shots" for n in SHOTS for how in ("chosen", "written")]
    assert list(told["metrics"]) == names
    for count in SHOTS:
        chosen, written = [], []
        for record in records:
            examples = [(p["image"], p["text"]) for p in record["pairs"][:count]]
            query = record["pairs"][-1]
            prefix = few_shot.few_shot(agent.serializer, examples, query["image"])
            words = sorted(record["meta"]["words"])
            (found,) = judge(agent.model, agent.serializer, [prefix], [words])
            chosen.append(words[int(found.mean.argmax())] == query["text"])
            longest = max(
                len(agent.serializer.text(w)) for r in records for w in r["meta"]["words"]
            )
            said = agent.caption(query["image"], max(4, longest + 1), examples)
            written.append(said == query["text"])
        metrics = told["metrics"]
        assert metrics[f"chosen_{count}_shots"]["value"] == pytest.approx(np.mean(chosen))
        assert metrics[f"written_{count}_shots"]["value"] == pytest.approx(np.mean(written))
    assert {s["kind"] for s in told["samples"]} == {f"{n} shots" for n in SHOTS}


def test_one_who_looks_back_is_right_and_one_who_does_not_is_not(
    agent: Agent, records: list, monkeypatch
) -> None:
    def looked_up(model, serializer, prefixes, choices):
        """Choose the text of the example that shows the very digit asked for, if there is one."""
        found = []
        for number, (prefix, words) in enumerate(zip(prefixes, choices, strict=True)):
            pairs = records[number]["pairs"]
            count = np.count_nonzero(prefix.ids == -1) - 1
            known = [p["text"] for p in pairs[:count] if p["text"] == pairs[-1]["text"]]
            scores = np.array([float(w in known) for w in words])
            found.append(SimpleNamespace(mean=scores))
        return found

    monkeypatch.setattr(few_shot, "judge", looked_up)
    told = shots(agent, records, Options(max_tokens=2))["metrics"]
    assert 0.2 < told["chosen_0_shots"]["value"] < 0.8
    assert all(told[f"chosen_{n}_shots"]["value"] == 1.0 for n in (2, 4, 8))


def test_what_cannot_be_asked_is_refused(agent: Agent, records: list) -> None:
    alike = {**records[0], "pairs": [{**p, "text": "a"} for p in records[0]["pairs"]]}
    with pytest.raises(ValueError, match=r"two texts or more to choose among; record 1 .*\['a'\]"):
        shots(agent, [records[0], alike], Options())
    long = {**records[0], "pairs": [{**p, "text": p["text"] * 9} for p in records[0]["pairs"]]}
    with pytest.raises(ValueError, match=r"remembers 96 tokens; \d examples and a question take"):
        shots(agent, [long], Options())


def test_what_is_trained_is_what_is_asked(tmp_path, text_model: bytes, capsys) -> None:
    path = registry.build("bindings", tmp_path / "bindings", "train", 2, 12)
    serializer = Serializer(state={"text": {MODEL_FILE: text_model}})
    corpus = open_corpus(CorpusConfig("bindings", str(path)), serializer)
    store = RecordStore(path)
    told = {
        serializer.captions([(p["image"], p["text"]) for p in record["pairs"]]).ids.tobytes()
        for record in store
    }
    rng = np.random.default_rng(0)
    for _ in range(20):
        sequence = corpus.sample(rng, 512)
        assert sequence.ids.tobytes() in told
        ends = np.flatnonzero(sequence.ids == serializer.control["<eos>"])
        assert 3 <= len(ends) <= 9
        assert sequence.target[ends].all()
        assert not sequence.target[sequence.ids == -1].any()
    assert set(text_model_texts(store[0])) == {p["text"] for p in store[0]["pairs"]}
    assert cli.main(["show", str(path), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert [t["modality"] for t in shown].count("image") == len(store[0]["pairs"])


def test_the_measure_is_one_of_gato_eval() -> None:
    assert MEASURES["few_shot"] is shots
    assert KINDS["few_shot"].corpora == ("bindings",)
    (record,) = registry.records("bindings", "heldout", 0, 1)
    assert KINDS["few_shot"].fits(record)
    assert not KINDS["caption"].fits(record)


def test_the_presets_rows_hold_a_record_of_one_token_a_picture() -> None:
    config = presets.preset("few_shot")
    (record,) = registry.records("bindings", "heldout", 0, 1)
    assert record["pairs"][0]["image"].shape == (16, 16, 3)
    assert config.model.context >= 1 + 4 * len(record["pairs"])
