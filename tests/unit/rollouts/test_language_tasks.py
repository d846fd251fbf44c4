"""Language tasks: their ids and records, and what is measured."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from language_records import LONGEST, caption, picture, store, talk
from PIL import Image

from gato.arguments import LANGUAGE_KINDS
from gato.envs.corpora import registry as corpora
from gato.envs.episode import EVALUATION_SEED_START
from gato.rollouts import questions
from gato.rollouts.agent import Agent
from gato.rollouts.choices import judge
from gato.rollouts.generate import generate, score
from gato.rollouts.language_tasks import identity, matching, records_of
from gato.rollouts.measures import KINDS, MEASURES
from gato.rollouts.metrics import Options
from gato.tokenizers.stream import concatenate, pack

SEED = EVALUATION_SEED_START


# ---- ids and records -------------------------------------------------------------------------


def test_patterns_name_tasks(tmp_path: Path) -> None:
    found, others = matching(["caption/*", "babyai/*", "vqa/sc*", "caption/digits"])
    assert found == ["caption/digits", "caption/frames", "caption/scenes", "vqa/scenes"]
    assert others == ["babyai/*"]
    assert matching([f"text/{tmp_path}"]) == ([f"text/{tmp_path}"], [])
    assert set(KINDS) == set(MEASURES)
    assert all(set(kind.corpora) <= set(corpora.names()) for kind in KINDS.values())
    told = re.findall(r"^  (\w+) ", LANGUAGE_KINDS, re.MULTILINE)
    assert told == list(KINDS), "the help names them"


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("caption/scene", "closest: caption/scenes)"),
        ("caption/shaps", "closest: caption/"),
        ("captoin/scenes", "closest: caption/scenes"),
        ("caption/z*", "matches none of digits, frames, scenes"),
        ("vqa/no/such/folder", "no such file or folder"),
        ("caption/", "no such file or folder"),
    ],
)
def test_misspelt_ids_are_told(pattern: str, said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        matching([pattern])


@pytest.mark.parametrize("task", ["vqa/dialogues", "chat/dialogues", "text/documents"])
def test_records_of_a_corpus_are_made_anew_at_a_seed(task: str) -> None:
    first, again, other = (records_of(task, seed, 12).records for seed in (SEED, SEED, SEED + 1))
    names = [identity(r) for r in first]
    assert names == [identity(r) for r in again]
    assert len(set(names)) == 12
    assert names != [identity(r) for r in other]
    assert all(KINDS[task.split("/")[0]].fits(r) for r in first)
    heldout = {identity(r) for r in corpora.records(task.split("/")[1], "heldout", 0, 60)}
    if task != "text/documents":  # which is a list of texts
        assert not heldout & set(names), "what quickstart looks at is other"


def test_a_corpus_that_is_a_list_ends() -> None:
    found = records_of("text/documents", SEED, 10_000)
    assert 100 < len(found.records) < 10_000
    assert len({r["text"] for r in found.records}) == len(found.records)
    assert "not the 10000 asked for" in found.notes[0]
    with pytest.raises(ValueError, match=r"'documents' has none. Choose of digits, frames, scenes"):
        records_of("caption/documents", SEED, 3)


def test_captions_of_one_picture_are_one_record(tmp_path: Path) -> None:
    texts = [caption(i, f"{word} {i}") for i in range(30) for word in ("one", "two", "three")]
    records = [*texts, talk("hello", "hi"), {"kind": "document", "text": "words"}]
    folder = store(tmp_path / "s", records)
    found = records_of(f"caption/{folder}", SEED).records
    assert len(found) == 30
    for i, record in enumerate(found):
        assert record["text"] == f"one {i}"
        assert record["meta"]["references"] == [f"two {i}", f"three {i}"]
    some = records_of(f"caption/{folder}", SEED, 5).records
    assert len(some) == 5
    assert [r["text"] for r in some] != [r["text"] for r in found[:5]], "drawn from all"
    assert [identity(r) for r in some] == [
        identity(r) for r in records_of(f"caption/{folder}", SEED, 5).records
    ]
    for kind in ("classify", "retrieve"):
        same = records_of(f"{kind}/{folder}", SEED).records
        assert [identity(r) for r in same] == [identity(r) for r in found]
    assert len(records_of(f"chat/{folder}", SEED).records) == 1
    assert len(records_of(f"text/{folder}", SEED).records) == 1
    with pytest.raises(ValueError, match=r"records for vqa .* found none: .*caption"):
        records_of(f"vqa/{folder}", SEED)


def test_data_of_other_formats_are_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GATO_CACHE", str(tmp_path / "cache"))
    data = tmp_path / "coco"
    data.mkdir()
    for i in range(3):
        Image.fromarray(picture(i)).save(data / f"{i}.png")
    images = [{"id": i, "file_name": f"{i}.png"} for i in range(3)]
    told = [{"image_id": i, "caption": f"{k} of {i}"} for i in range(3) for k in range(5)]
    file = data / "captions_val2017.json"
    file.write_text(json.dumps({"images": images, "annotations": told}))
    ids, _ = matching([f"caption/{file}"])
    found = records_of(ids[0], SEED)
    assert [len(r["meta"]["references"]) for r in found.records] == [4, 4, 4]
    assert found.source["place"] == str(file)
    rows = [{"image": f"{i}.png", "question": "what?", "answer": ["a", "b", "a"]} for i in range(2)]
    (tmp_path / "coco" / "q.json").write_text(json.dumps(rows))
    asked = records_of(f"vqa/{data / 'q.json'}", SEED).records
    assert [r["meta"]["answers"] for r in asked] == [[["a", "b", "a"]]] * 2


def test_advice_names_options_that_there_are(tmp_path: Path) -> None:
    Image.fromarray(picture(0)).save(tmp_path / "one.png")
    with pytest.raises(
        ValueError, match=r"--format\. \(That is an option of the import: gato data"
    ):
        records_of(f"caption/{tmp_path}", SEED)


# ---- what is measured ------------------------------------------------------------------------


def test_captions_count_any_true_text(reader: Agent) -> None:
    pictures = [picture(i) for i in range(6)]
    said = reader.captions(pictures, LONGEST)
    records = [
        {"kind": "caption", "image": p, "text": s if i < 2 else "no such words", "meta": {}}
        for i, (p, s) in enumerate(zip(pictures, said, strict=True))
    ]
    records[3]["meta"]["references"] = ["neither", said[3]]
    found = MEASURES["caption"](reader, records, Options())
    assert found["count"] == 6
    assert found["metrics"]["exact"]["value"] == pytest.approx(3 / 6)
    assert found["metrics"]["exact"]["per_record"] == [
        [float(i in (0, 1, 3)), 1.0] for i in range(6)
    ]
    assert {"exact", "exact_normalised", "cider", "bleu", "chrf"} == found["metrics"].keys()
    assert [s["right"] for s in found["samples"]] == [False] * 3 + [True] * 3
    np.testing.assert_array_equal(found["samples"][0]["image"], pictures[2])
    assert found["references"] == pytest.approx(8 / 6)
    assert "best" not in found


def test_answers_are_compared_as_people_gave_them(reader: Agent) -> None:
    ask = [talk("what?", "x", image=picture(i)) for i in range(6)]
    said = reader.answers([r["messages"][:1] for r in ask], LONGEST)
    people = [
        [s] * n + ["other"] * (10 - n) for s, n in zip(said, (0, 1, 2, 3, 4, 10), strict=True)
    ]
    records = [
        talk(
            "what?", "other", image=picture(i), answers=[given], kinds=["odd" if i % 2 else "even"]
        )
        for i, given in enumerate(people)
    ]
    found = MEASURES["vqa"](reader, records, Options())
    accuracy = found["metrics"]["vqa_accuracy"]
    np.testing.assert_allclose(
        np.array(accuracy["per_record"])[:, 0], [0, 0.3, 0.6, 0.9, 1, 1], atol=1e-9
    )
    assert found["metrics"]["exact"]["value"] == 0.0
    assert found["kinds"] == {k: {"exact": 0.0, "count": 3} for k in ("even", "odd")}
    assert found["samples"][0]["asked"] == "what?"
    assert json.loads(json.dumps(found["metrics"])) == found["metrics"]


def test_a_conversation_counts_answer_by_answer(reader: Agent) -> None:
    first = reader.answers([talk("go")["messages"]], LONGEST)[0]
    records = [talk("go", first, "and?", "never"), talk("go", first), *[talk("go", "no")] * 3]
    found = MEASURES["chat"](reader, records, Options())
    assert found["asked"] == 6
    assert found["metrics"]["exact"]["value"] == pytest.approx(2 / 6)
    assert found["metrics"]["exact"]["per_record"][0] == [1.0, 2.0]
    assert found["metrics"]["whole_conversations"]["value"] == pytest.approx(1 / 5)
    assert {"bleu", "chrf"} <= found["metrics"].keys()


def test_what_the_model_cannot_remember_counts_as_wrong_and_is_told(reader: Agent) -> None:
    large = np.zeros((160, 160, 3), np.uint8)  # 100 tokens; it remembers 64
    records = [{"kind": "caption", "image": large, "text": ""}, caption(0, "a"), caption(1, "b")]
    found = MEASURES["caption"](reader, records, Options())
    assert found["metrics"]["exact"]["per_record"] == [[0.0, 1.0]] * 3
    assert "1 of 3 questions take more than the 64 tokens" in found["notes"][0]
    asked = talk("which?", "red", image=large, choices=CHOICES)
    found = MEASURES["vqa"](reader, [asked, talk("a", "red", choices=CHOICES)], Options())
    assert found["metrics"]["accuracy"]["per_record"][0] == [0.0, 1.0]
    assert len(found["notes"]) == 1
    letter = talk("which letter?", "a", image=large)  # alike to an empty answer, once normalised
    found = MEASURES["vqa"](reader, [letter], Options())["metrics"]
    assert [found[n]["value"] for n in ("exact", "exact_normalised", "vqa_accuracy")] == [0.0] * 3
    turns = [word for i in range(9) for word in (f"go to the red ball {i}", "yes")]
    long = MEASURES["chat"](reader, [talk(*turns)], Options())
    assert "asked without the first turns" in long["notes"][0]
    assert "wrongly" not in long["notes"][0]
    odd = talk(*turns)
    odd["messages"].insert(4, {"role": "system", "content": [{"type": "text", "text": "be kind"}]})
    told = MEASURES["chat"](reader, [odd], Options())["notes"]
    assert any("cannot be shortened (system messages stand before all others" in n for n in told)
    assert not any("remembers; they count" in n for n in told)
    first = reader.prepare(talk(*turns)["messages"][:-1], 64)
    assert first.dropped > 0
    said = generate(reader.model, reader.serializer, [first.prefix], max_tokens=LONGEST)
    last = questions.ask(reader, [talk(*turns)], 64)[-1]
    assert last["said"] == said[0], "asked as in a chat"


@torch.no_grad()
def slow_nats(agent: Agent, text: str) -> float:
    """Return the nats of a text and ``<eos>``: token by token, in windows after ``<bos>``."""
    model, serializer, nats = agent.model, agent.serializer, 0.0
    begin, end = (serializer.control_piece(name) for name in ("<bos>", "<eos>"))
    pieces = concatenate([serializer.text(text, 1.0), end])
    for start in range(0, len(pieces), 63):  # the tiny model remembers 64
        window = pieces.slice(start, min(start + 63, len(pieces)))
        batch = pack([[concatenate([begin, window])]], 64, serializer.control)
        odds = model.logits(model(batch.to("cpu"))).log_softmax(-1)
        nats -= sum(float(odds[i, token]) for i, token in enumerate(window.ids.tolist()))
    return nats


def test_texts_give_nats_bits_and_perplexity(reader: Agent) -> None:
    texts = ["", "g\u00f6 to the red ball", *(f"to the key {i} " * 12 * (i + 1) for i in range(4))]
    tokens = [len(reader.serializer.text(text)) + 1 for text in texts]
    assert tokens[1] < 63 < tokens[2]
    assert tokens[-1] > 2 * 63, "of three windows or more"
    nats, size = [slow_nats(reader, text) for text in texts], sum(len(t.encode()) for t in texts)
    found = MEASURES["text"](reader, [{"kind": "document", "text": t} for t in texts], Options())
    assert found["tokens"] == sum(tokens)
    loss, perplexity, bits = (found["metrics"][n] for n in ("loss", "perplexity", "bits_per_byte"))
    np.testing.assert_allclose(loss["per_record"], np.stack([nats, tokens], 1), rtol=1e-5)
    assert loss["value"] == pytest.approx(sum(nats) / sum(tokens))
    assert perplexity["value"] == pytest.approx(np.exp(sum(nats) / sum(tokens)))
    assert bits["value"] == pytest.approx(sum(nats) / np.log(2) / size)


CHOICES = ["red", "a very long blue thing that nobody has seen", "key"]


def test_choices_are_judged_together_as_one_by_one(reader: Agent) -> None:
    contexts = [reader.serializer.caption(picture(i), None) for i in range(3)]
    wanted = [CHOICES, CHOICES[:2], [*CHOICES, "four"]]
    found = judge(reader.model, reader.serializer, contexts, wanted)
    for context, texts, scores in zip(contexts, wanted, found, strict=True):
        alone = score(reader.model, reader.serializer, context, texts)
        np.testing.assert_allclose(scores.total, [s for s, _ in alone], rtol=1e-4)
        np.testing.assert_allclose(scores.mean, [s / n for s, n in alone], rtol=1e-4)
        assert scores.probabilities().sum() == pytest.approx(1.0)
    assert judge(reader.model, reader.serializer, [], []) == []


def test_the_agent_chooses(reader: Agent) -> None:
    asked = [talk("which?", image=picture(i))["messages"] for i in range(2)]
    each = reader.choose_each(asked, [CHOICES, CHOICES[::-1]])
    assert list(each[0]) == CHOICES
    assert list(each[1]) == CHOICES[::-1]
    for messages, texts, found in zip(asked, (CHOICES, CHOICES[::-1]), each, strict=True):
        alone = reader.choose(messages, texts)
        assert alone == pytest.approx(found, rel=1e-4)
        assert sum(alone.values()) == pytest.approx(1.0)
    by_caption = reader.classify(picture(0), CHOICES)
    context = reader.serializer.caption(picture(0), None)
    (scores,) = judge(reader.model, reader.serializer, [context], [CHOICES])
    np.testing.assert_allclose(list(by_caption.values()), scores.probabilities(), rtol=1e-4)


def test_no_turn_is_dropped_that_leaves_room_for_a_choice(reader: Agent) -> None:
    messages = talk("go to the red ball", "yes", "and then to the key?")["messages"]
    pad = next(n for n in range(99) if len(reader.prepare(more(messages, n), 1).prefix) > 56)
    messages = more(messages, pad)  # 64 tokens are remembered
    whole = reader.prepare(messages, 3)
    assert whole.dropped == 0 < reader.prepare(messages, 128).dropped
    (scores,) = judge(reader.model, reader.serializer, [whole.prefix], [["a", "b"]])
    found = reader.choose(messages, ["a", "b"])
    np.testing.assert_allclose(list(found.values()), scores.probabilities(), rtol=1e-4)


def more(messages: list, words: int) -> list:
    text = {"type": "text", "text": "and then to the key?" + " go" * words}
    return [*messages[:-1], {"role": "user", "content": [text]}]


@pytest.mark.parametrize("choices", [["a"], ["a", "a"], ["a", ""], "ab", []])
def test_what_are_no_choices_is_refused(reader: Agent, choices) -> None:
    with pytest.raises(ValueError, match="different choices"):
        reader.choose(talk("which?")["messages"], choices)


def test_a_choice_that_is_too_long_is_refused(reader: Agent) -> None:
    with pytest.raises(ValueError, match="remembers 64 tokens"):
        reader.choose(talk("which?")["messages"], ["a", "go to the red ball " * 30])


def test_questions_with_choices_have_an_accuracy(reader: Agent) -> None:
    asked = [talk("which?", "x", image=picture(i)) for i in range(6)]
    best = [max(p, key=p.get) for p in (reader.choose(r["messages"][:1], CHOICES) for r in asked)]
    wrong = next(c for c in CHOICES if c != best[5])
    truths = [*best[:5], wrong]
    told = [talk("which?", t, image=picture(i), choices=CHOICES) for i, t in enumerate(truths)]
    found = MEASURES["vqa"](reader, told, Options())["metrics"]
    assert found["accuracy"]["value"] == pytest.approx(5 / 6)
    plain = [talk("which?", t, image=picture(i)) for i, t in enumerate(truths)]
    asked_for = MEASURES["vqa"](reader, plain, Options(choices=tuple(CHOICES)))["metrics"]
    assert asked_for["accuracy"] == found["accuracy"]
    assert "accuracy" not in MEASURES["vqa"](reader, plain, Options())["metrics"]
    with pytest.raises(ValueError, match="is not among"):
        MEASURES["vqa"](reader, plain, Options(choices=("one", "two")))
    mixed = MEASURES["vqa"](reader, [plain[0], *told[1:], plain[0]], Options())
    assert mixed["metrics"]["accuracy"]["value"] == pytest.approx(4 / 5)
    assert mixed["metrics"]["accuracy"]["records"] == [1, 2, 3, 4, 5]
    assert mixed["metrics"]["vqa_accuracy"]["per_record"][0][1] == 1.0
    assert mixed["count"] == 7
    assert mixed["notes"] == ["2 of 7 questions have no choices: accuracy is of the others"]
    odd = talk("which?", "red", image=picture(0), choices=[CHOICES, CHOICES])
    with pytest.raises(ValueError, match="each of a conversation's 1 answers"):
        MEASURES["vqa"](reader, [odd], Options())


def test_labels_are_all_captions_or_those_asked_for(reader: Agent) -> None:
    records = [caption(i, CHOICES[i % 3]) for i in range(6)]
    found = MEASURES["classify"](reader, records, Options())
    assert found["labels"] == sorted(CHOICES)
    right = [
        max(p, key=p.get) == r["text"]
        for r, p in ((r, reader.classify(r["image"], sorted(CHOICES))) for r in records)
    ]
    assert found["metrics"]["accuracy"]["value"] == pytest.approx(np.mean(right))
    with pytest.raises(ValueError, match="every record's label"):
        MEASURES["classify"](reader, records, Options(choices=("red", "key")))
