"""Language tasks: their ids and records, what is measured, and how `gato eval` tells it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import gato
from gato import cli
from gato.arguments import LANGUAGE_KINDS
from gato.envs.corpora import registry as corpora
from gato.envs.episode import EVALUATION_SEED_START
from gato.envs.records import RecordWriter
from gato.rollouts import questions
from gato.rollouts.agent import Agent
from gato.rollouts.choices import judge
from gato.rollouts.compare import compare, read_result
from gato.rollouts.evaluate import evaluate
from gato.rollouts.generate import generate, score
from gato.rollouts.language_tasks import identity, matching, measure, records_of
from gato.rollouts.measures import KINDS, MEASURES
from gato.rollouts.metrics import Figure, Options, divided, summed_up
from gato.rollouts.report import comparison_report, report

from .test_report import Page, require_alone

SEED = EVALUATION_SEED_START


def picture(i: int) -> np.ndarray:
    return np.random.default_rng(i).integers(0, 255, (16, 16, 3), np.uint8)


def caption(i: int, text: str) -> dict:
    return {"kind": "caption", "image": picture(i), "text": text}


def talk(*turns: str, image: np.ndarray | None = None, **meta) -> dict:
    """Return a conversation of questions and answers in turn."""
    messages = []
    for number, text in enumerate(turns):
        role = "assistant" if number % 2 else "user"
        content = [{"type": "text", "text": text}]
        if image is not None and not number:
            content.insert(0, {"type": "image", "image": image})
        messages.append({"role": role, "content": content})
    return {"kind": "conversation", "messages": messages, **({"meta": meta} if meta else {})}


def store(folder: str, records: list[dict], name: str = "made") -> Path:
    with RecordWriter(folder, name) as writer:
        for record in records:
            writer.append(record)
    return folder


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


LONGEST = 6


@pytest.fixture
def reader(agent: Agent, monkeypatch: pytest.MonkeyPatch) -> Agent:
    """Return the tiny agent, which never ends a text by itself: its texts are cut short."""

    def cut(*args, max_tokens: int, **options) -> list[str]:
        assert max_tokens >= 64
        return generate(*args, max_tokens=LONGEST, **options)

    monkeypatch.setattr(questions, "generate", cut)
    return agent


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


def test_texts_give_nats_bits_and_perplexity(reader: Agent) -> None:
    records = [{"kind": "document", "text": f"go to the red ball {i} " * (i + 1)} for i in range(6)]
    found = MEASURES["text"](reader, records, Options())["metrics"]
    nats, tokens = np.array(found["loss"]["per_record"]).sum(0)
    assert found["loss"]["value"] == pytest.approx(nats / tokens)
    assert found["perplexity"]["value"] == pytest.approx(np.exp(nats / tokens))
    size = sum(len(r["text"]) for r in records)
    assert found["bits_per_byte"]["value"] == pytest.approx(nats / np.log(2) / size)


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


# ---- in the evaluation -----------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, reader: Agent, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the name of a folder of records of every kind, some of them markup."""
    monkeypatch.chdir(tmp_path)
    said = reader.captions([picture(0)], LONGEST)[0]
    texts = [said, *("<script>alert('&')</script>" for _ in range(5))]
    records = [
        *(caption(i, text) for i, text in enumerate(texts)),
        *(talk("what <b>is</b> it?", f'"{i}"', image=picture(i)) for i in range(6)),
        *({"kind": "document", "text": f"go to the box {i}"} for i in range(6)),
    ]
    return str(store(Path("records"), records))


def test_language_stands_beside_control(suite, reader: Agent, folder: str) -> None:
    control = ["made/count-v0", "made/reach-v0"]
    language = [f"{kind}/{folder}" for kind in ("caption", "vqa", "text")]
    told: list[tuple[str, int, int]] = []
    gallery: dict = {}
    alone = evaluate(reader, control, 5, workers=0)
    result = evaluate(
        reader,
        [language[0], *control, *language[1:]],
        5,
        workers=0,
        progress=lambda *args: told.append(args),
        gallery=gallery,
    )
    assert json.loads(json.dumps(result)) == result
    for task in control:
        assert result["tasks"][task] == alone["tasks"][task], "keys and values as without"
    assert {k: v for k, v in result["summary"].items() if k != "language"} == alone["summary"]
    assert "language" not in alone["summary"]
    assert "language" not in alone["settings"]
    assert list(divided(result["tasks"])[1]) == language
    assert result["summary"]["language"]["records"] == 18
    row = result["tasks"][language[0]]
    assert row["kind"] == "caption"
    assert row["count"] == len(row["records"]) == 6
    assert row["metrics"]["exact"]["value"] == pytest.approx(1 / 6)
    assert result["summary"]["language"]["metrics"][language[0]]["exact"] == pytest.approx(1 / 6)
    assert (language[0], 6, 6) in told
    assert [len(v) for v in gallery.values()] == [6, 6, 3]
    assert "sacrebleu" in result["versions"]
    with pytest.raises(ValueError, match="only plays: it cannot read caption/scenes"):
        evaluate("random", ["caption/scenes"], 1)


def test_records_that_are_wrong_show_before_anything_is_played(
    suite, reader: Agent, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(suite, "make", lambda spec: pytest.fail("played"))
    with pytest.raises(ValueError, match="records for few_shot"):
        evaluate(reader, ["made/count-v0", f"few_shot/{folder}"], 1, workers=0)


def test_only_language_needs_no_simulator(reader: Agent, folder: str) -> None:
    with pytest.raises(ValueError, match=r"precision is that of policies.*got float32"):
        evaluate(reader, [f"caption/{folder}"], 20, precision="float32")
    result = evaluate(reader, [f"caption/{folder}"], 20, records=4)
    told = {"judged": "float32", "written": "float32"}
    assert result["settings"]["language"]["precision"] == told
    assert result["summary"]["tasks"] == 0
    assert result["tasks"][f"caption/{folder}"]["count"] == 4
    page = report(result)
    require_alone(page)
    assert "Language" in Page(page).text


def test_the_page_shows_pictures_and_escapes_words(suite, reader: Agent, folder: str) -> None:
    gallery: dict = {}
    tasks = ["made/count-v0", f"caption/{folder}", f"vqa/{folder}"]
    result = evaluate(reader, tasks, 5, workers=0, gallery=gallery)
    written = report(result, gallery=gallery)
    require_alone(written)
    page = Page(written)
    assert page.bars == ["made/count-v0"]
    images = list(page.all("img"))
    assert len(images) == 12
    assert all(re.match(r"data:image/png;base64,", i["src"] or "") for i in images)
    assert "<script>alert('&')</script>" in page.text, "shown as words"
    assert "what <b>is</b> it?" in page.text
    assert "VQA accuracy" in page.text
    assert "as VQA counts" in page.text
    share = result["tasks"][tasks[1]]["metrics"]["exact"]["value"]
    assert f"{100 * share:.1f}%" in page.text


def test_results_are_compared_on_the_same_records(
    tmp_path: Path, reader: Agent, folder: str
) -> None:
    task = f"caption/{folder}"
    first = evaluate(reader, [task], 1)
    other = json.loads(json.dumps(first))
    exact = other["tasks"][task]["metrics"]["exact"]
    exact["per_record"], exact["value"] = [[1.0, 1.0]] * 6, 1.0
    found = compare({"a": first, "b": other})
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    row = found["language"][task]
    assert row["paired"]
    assert row["differences"]["exact"]["b"]["difference"] == pytest.approx(5 / 6)
    assert row["differences"]["exact"]["b"]["significant"]
    assert row["differences"]["cider"]["b"]["ci95"] == [0.0, 0.0]
    assert not found["warnings"]
    other["tasks"][task]["records"] = other["tasks"][task]["records"][::-1]
    unpaired = compare({"a": first, "b": other})
    assert not unpaired["language"][task]["paired"]
    assert any("other records" in w for w in unpaired["warnings"])
    for result in (found, unpaired):
        page = comparison_report(result)
        require_alone(page)
    assert "Not the same records" in Page(page).text
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    for file, result in zip(files, (first, other), strict=True):
        file.write_text(json.dumps(result))
    assert cli.main(["compare", *map(str, files)]) == cli.DONE


def test_each_result_is_compared_as_its_own_records_allow(reader: Agent, folder: str) -> None:
    task = f"vqa/{folder}"
    first = evaluate(reader, [task], 1)
    same, other, grouped = (json.loads(json.dumps(first)) for _ in range(3))
    other["tasks"][task]["records"].reverse()
    grouped["tasks"][task]["groups"] = [0, 0, 1, 2, 3, 4]
    del grouped["tasks"][task]["metrics"]["vqa_accuracy"]
    found = compare({"a": first, "b": same, "c": other})
    row = found["language"][task]["differences"]["vqa_accuracy"]
    both = compare({"a": first, "b": same})["language"][task]
    assert both["paired"]
    assert row["b"] == both["differences"]["vqa_accuracy"]["b"], "whatever c was asked"
    assert not found["language"][task]["paired"]
    assert "Not the same records as a: c." in Page(comparison_report(found)).text
    found = compare({"a": first, "b": grouped})
    assert not found["language"][task]["paired"], "drawn in other groups"
    assert any("only some results have vqa_accuracy" in w for w in found["warnings"])


def metric(rows: list, of: str = "share", **more) -> dict:
    return {"value": 1.0, "ci95": None, "of": of, "per_record": rows, **more}


@pytest.mark.parametrize(
    "damage",
    [
        {"metrics": None},
        {"metrics": {"exact": {"value": 1.0}}},
        {"metrics": {"exact": {"value": 1.0, "ci95": None, "of": "x", "per_record": [[1, 1]]}}},
        {
            "metrics": {
                "exact": {"value": 1.0, "ci95": None, "of": "share", "per_record": [[1], []]}
            }
        },
        {"records": 3},
        {"records": ["a"] * 3, "groups": [0, 1]},
        {"metrics": {"exact": metric([[1, 1, 1]])}, "records": ["a"]},
        {"metrics": {"exact": metric([[1, 1], [0, 1]])}, "records": ["a"]},
        {"metrics": {"exact": metric([[1, 1]], records=[3])}, "records": ["a"]},
        {"metrics": {"exact": metric([[1, 1]], records=[0, 0])}, "records": ["a"]},
        {"metrics": {"bleu": metric([[1, 1]], "bleu")}, "records": ["a"]},
    ],
)
def test_a_damaged_result_is_refused(tmp_path: Path, damage: dict) -> None:
    row = {"kind": "caption", "records": [], "metrics": {}} | damage
    whole = {"checkpoint": "a", "settings": {}, "versions": {}, "summary": {}}
    file = tmp_path / "a.json"
    file.write_text(json.dumps({**whole, "tasks": {"caption/a": row}}))
    with pytest.raises(ValueError, match="missing or damaged"):
        read_result(file)


def test_the_command_measures_language(
    suite, reader: Agent, folder: str, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(gato, "load", lambda path: reader)
    out, page = tmp_path / "r.json", tmp_path / "r.html"
    line = ["eval", "somewhere", "--workers", "0", "--json", str(out), "--report", str(page)]
    tasks = ["made/count-v0", f"caption/{folder}", f"vqa/{folder}"]
    given = ["--tasks", *tasks, "--episodes", "5"]
    assert cli.main([*line, *given]) == cli.DONE
    shown = capsys.readouterr().out
    assert "cider" in shown
    assert "expert_normalised" in shown
    result = json.loads(out.read_text())
    assert set(result["tasks"]) == set(tasks)
    assert [result["tasks"][t]["count"] for t in tasks[1:]] == [5, 5]
    assert len(result["tasks"][tasks[0]]["returns"]) == 5
    require_alone(page.read_text())
    assert cli.main([*line, "--tasks", tasks[1]]) == cli.DONE
    assert json.loads(out.read_text())["tasks"][tasks[1]]["count"] == 6, "all of a folder"
    capsys.readouterr()
    for wrong, said in (
        (["--tasks", "caption/scene"], "closest: caption/scenes"),
        (["--tasks", tasks[1], "--choices", "a"], "2 to 1000 different choices"),
        (["--tasks", tasks[0], "--choices", "a,b"], "--choices with language tasks"),
        (["--tasks", tasks[2], "--choices", "a,b"], "is not among"),
    ):
        assert cli.main([*line, *wrong]) == cli.BAD_INPUT
        assert said in capsys.readouterr().err
    assert cli.main(["eval", "random", "--tasks", "caption/digits"]) == cli.BAD_INPUT


def test_records_of_one_group_are_drawn_together(reader: Agent, tmp_path: Path) -> None:
    said = reader.captions([picture(i) for i in range(40)], LONGEST)
    records = [
        caption(i, said[i] if i % 16 < 8 else "other") | {"meta": {"group": ["game", i // 8]}}
        for i in range(40)
    ]
    task = f"caption/{store(tmp_path / 'games', records)}"
    row = measure(reader, [task], SEED)[task]
    assert row["groups"] == [i // 8 for i in range(40)]
    alone = [{k: v for k, v in r.items() if k != "meta"} for r in records]
    other = f"caption/{store(tmp_path / 'alone', alone)}"
    plain = measure(reader, [other], SEED)[other]
    assert plain["groups"] == []
    ends, narrow = (r["metrics"]["exact"]["ci95"] for r in (row, plain))
    assert np.ptp(ends) > 1.5 * np.ptp(narrow)


def test_questions_about_one_picture_are_drawn_together(reader: Agent, tmp_path: Path) -> None:
    asked = [(i // 5, f"which {i % 5}?") for i in range(40)]
    about = [talk(words, "x", image=picture(i)) for i, words in asked]
    said = reader.answers([r["messages"][:1] for r in about], LONGEST)
    records = [
        talk(words, text if i % 2 else "other", image=picture(i))
        for (i, words), text in zip(asked, said, strict=True)
    ]
    task = f"vqa/{store(tmp_path / 'asked', records)}"
    row = measure(reader, [task], SEED)[task]
    assert row["groups"] == [i for i, _ in asked]
    one = Figure(np.array([[5.0 * (i % 2), 5.0] for i in range(8)]))  # a row for each picture
    assert row["metrics"]["exact"]["ci95"] == summed_up(one)["ci95"]


def test_measuring_takes_pictures_out_of_the_result(reader: Agent, folder: str) -> None:
    rows = measure(reader, [f"caption/{folder}"], SEED, options=Options(seed=3))
    assert json.loads(json.dumps(rows)) == rows
