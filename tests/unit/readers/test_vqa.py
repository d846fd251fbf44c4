"""Questions about pictures: VQA v2's files as its download has them, and plain lists."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gato.envs.readers.formats import open_source, recognise
from gato.envs.readers.reader import ReadOptions

QUESTIONS = "v2_OpenEnded_mscoco_{}_questions.json"
ANSWERS = "v2_mscoco_{}_annotations.json"
ASKED = ("What colour is the box?", "Is there a box?", "How many boxes?")


def answer_of(shown: Any, k: int) -> str:
    return (shown.colour, "yes", "1")[k]


def version_2(root: Path, shown: list, subset: str, ids: range) -> None:
    """Write questions, annotations and pictures in VQA v2's documented form."""
    head = {
        "info": {"description": "This is v2.0 of the VQA dataset."},
        "task_type": "Open-Ended",
        "data_type": "mscoco",
        "license": {"name": "CC BY 4.0"},
        "data_subtype": subset,
    }
    questions, annotations = [], []
    for i in ids:
        for k, text in enumerate(ASKED):
            number = 1000 * i + k
            questions.append({"image_id": i, "question": text, "question_id": number})
            people = [
                {"answer": a, "answer_confidence": "yes", "answer_id": n + 1}
                for n, a in enumerate([answer_of(shown[i], k)] * 9 + ["maybe"])
            ]
            annotations.append(
                {
                    "question_type": "what",
                    "multiple_choice_answer": answer_of(shown[i], k),
                    "answers": people,
                    "image_id": i,
                    "answer_type": "other",
                    "question_id": number,
                }
            )
    (root / QUESTIONS.format(subset)).write_text(json.dumps({**head, "questions": questions}))
    reversed_ = {**head, "annotations": annotations[::-1]}
    (root / ANSWERS.format(subset)).write_text(json.dumps(reversed_))
    (root / subset).mkdir()
    for i in ids:
        (root / subset / f"COCO_{subset}_{i:012d}.jpg").write_bytes(shown[i].encoded("JPEG"))


@pytest.fixture
def vqa(tmp_path: Path, shown) -> Path:
    """Return a folder with 60 questions for training and 6 for validation."""
    root = tmp_path / "vqa"
    root.mkdir()
    version_2(root, shown, "train2014", range(20))
    version_2(root, shown, "val2014", range(30, 32))
    return root


def test_every_question_is_a_conversation(vqa, shown, read):
    file = vqa / QUESTIONS.format("train2014")
    assert recognise(str(vqa)) == recognise(str(file)) == "vqa"
    for location in (vqa, file):
        assert open_source(location).items == 60
        good, bad = read(location, image_size=(48, 32))
        assert not bad
        assert len(good) == 60
        for n, record in enumerate(good):
            user, assistant = record["messages"]
            it, k = shown[n // 3], n % 3
            picture, question = user["content"]
            assert question["text"] == ASKED[k]
            assert np.abs(picture["image"].astype(int) - it.pixels).mean() < 25
            assert assistant["content"] == [{"type": "text", "text": answer_of(it, k)}]
            assert record["meta"]["answers"] == [[answer_of(it, k)] * 9 + ["maybe"]]
    assert len(read(vqa, split="val")[0]) == 6
    with pytest.raises(ValueError, match="split 'test'"):
        read(vqa, split="test")


def test_a_model_learns_from_it(vqa, stored, trains):
    store = stored(vqa, image_size=(32, 32))
    assert len(store) == 60
    first, last = trains(store.path)
    assert last < first / 2


def test_what_is_wrong_in_version_2_is_told(vqa, read, bomb):
    path, pictures = vqa / QUESTIONS.format("train2014"), vqa / "train2014"
    (pictures / f"COCO_train2014_{1:012d}.jpg").unlink()
    (pictures / f"COCO_train2014_{2:012d}.jpg").write_bytes(bomb)
    data = json.loads(path.read_text())
    data["questions"][9]["image_id"] = "../../etc/passwd"
    data["questions"][10]["question_id"] = 77777777
    data["questions"][11]["question"] = ["what?"]
    data["questions"][12] = 5
    del data["questions"][13]["question"]
    data["questions"][14]["question_id"] = [1]
    path.write_text(json.dumps(data))
    answers = vqa / ANSWERS.format("train2014")
    told = json.loads(answers.read_text())
    assert told["annotations"][-16]["question_id"] == 5000
    told["annotations"][-16]["multiple_choice_answer"] = None
    told["annotations"][-17]["answers"][3] = "\ud800"
    answers.write_text(json.dumps(told))
    good, bad = read(vqa)
    assert len(good) == 60 - 3 - 3 - 6 - 2
    said = ["names no file"] * 3 + ["900000000"] * 3
    said += ["expected numbers", "without an annotation", "got list", "an object; got int"]
    said += ["field 'question'", "expected numbers", "got NoneType", "an 'answer' each"]
    assert len(bad) == len(said)
    for item, wanted in zip(bad, said, strict=True):
        assert wanted in item.reason
    assert bad[6].where.endswith("question 9")


def test_what_is_no_version_2_is_refused(vqa, tmp_path):
    questions, answers = vqa / QUESTIONS.format("train2014"), vqa / ANSWERS.format("train2014")
    whole = questions.read_text()
    for content, said in (
        ("", "broken JSON"),
        (whole[: len(whole) // 2], "broken JSON"),
        ('{"questions": []}', "expected questions with image_id"),
        ('{"questions": [1]}', "expected questions with image_id"),
        (whole.replace('"question"', '"query"'), "expected questions with image_id"),
    ):
        questions.write_text(content)
        with pytest.raises(ValueError, match=said):
            open_source(vqa)
    questions.write_text(whole)
    answers.write_text('{"annotations": [{}]}')
    with pytest.raises(ValueError, match="annotations with question_id"):
        open_source(vqa)
    answers.unlink()
    with pytest.raises(ValueError, match="split 'train2014'"):
        open_source(vqa)


def test_a_hostile_subset_finds_nothing(vqa):
    for name in (QUESTIONS, ANSWERS):
        path = vqa / name.format("train2014")
        path.write_text(path.read_text().replace('"train2014"', '"../{0.__class__}/{1}"'))
    assert open_source(vqa).items == 60  # the file's own name tells the subset


# ---- plain lists ---------------------------------------------------------------------------------


@pytest.fixture
def plain(tmp_path: Path, shown) -> Path:
    """Return a file of 60 questions; half the pictures are in files."""
    root = tmp_path / "plain"
    (root / "images").mkdir(parents=True)
    rows = []
    for i, it in enumerate(shown):
        if i % 2:
            (root / "images" / f"{i}.png").write_bytes(it.encoded())
            image = f"images/{i}.png"
        else:
            image = "data:image/png;base64," + base64.b64encode(it.encoded()).decode()
        answers = [it.colour, "maybe", it.colour] if i % 3 else it.colour
        rows.append({"image": image, "question": ASKED[0], "answer": answers, "id": i})
    (root / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return root


@pytest.mark.parametrize("kind", ["jsonl", "json"])
def test_plain_lists_are_the_same(kind, plain, shown, read):
    if kind == "json":
        lines = (plain / "a.jsonl").read_text().splitlines()
        (plain / "a.jsonl").unlink()
        (plain / "a.json").write_text(json.dumps([json.loads(line) for line in lines]))
    assert recognise(str(plain)) == "vqa"
    source = open_source(plain)
    assert source.items == 60
    wanted = {"image": "image", "question": "question", "answer": "answer", "id": "left out"}
    assert source.fields == wanted
    good, bad = read(plain, image_size=(48, 32))
    assert not bad
    for record, it in zip(good, shown, strict=True):
        user, assistant = record["messages"]
        np.testing.assert_array_equal(user["content"][0]["image"], it.pixels)
        assert assistant["content"][0]["text"] == it.colour
    assert good[1]["meta"]["answers"] == [[shown[1].colour, "maybe", shown[1].colour]]
    assert "meta" not in good[0], "one answer is told once"


def test_a_model_learns_from_a_plain_list(plain, stored, trains):
    first, last = trains(stored(plain, image_size=(32, 32)).path)
    assert last < first / 2


def test_bad_rows_are_told(plain, read):
    rows = [
        {"image": "../vqa.jpg", "question": "q", "answer": "a"},
        {"image": "http://localhost/a.jpg", "question": "q", "answer": "a"},
        {"image": "images/1.png", "question": "q"},
        {"image": "images/1.png", "question": "q", "answer": []},
        {"image": "images/1.png", "question": "q", "answer": {"a": 1}},
        {"image": "images/1.png", "question": "q", "answer": ["a", 1]},
        {"image": 1, "question": "q", "answer": "a"},
        ["image", "question", "answer"],
    ]
    path = plain / "a.jsonl"
    path.write_text(path.read_text() + "\n" + "\n".join(map(json.dumps, rows)))
    good, bad = read(plain)
    assert len(good) == 60
    said = ["leads out", "not fetched", "field 'answer'", "got list", "got dict", "got list"]
    said += ["got int", "got list"]
    for item, wanted in zip(bad, said, strict=True):
        assert wanted in item.reason


def test_columns_name_what_is_called_otherwise(tmp_path, shown):
    (tmp_path / "x.png").write_bytes(shown[0].encoded())
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"img": "x.png", "q": "what?", "a": "box"}))
    with pytest.raises(ValueError, match=r"field 'image' in .* img, q, a.*--columns image="):
        open_source(path, "vqa")
    columns = {"image": "img", "question": "q", "answer": "a"}
    (record,) = open_source(path, "vqa", ReadOptions(columns=columns)).read()
    assert record["messages"][1]["content"][0]["text"] == "box"
    with pytest.raises(ValueError, match="no splits"):
        open_source(path, "vqa", ReadOptions(columns=columns, split="val"))


@pytest.mark.parametrize("image", [None, "nine", [9], 1.5])
def test_a_first_question_without_a_picture_is_one_bad_item(vqa, read, image):
    file = vqa / QUESTIONS.format("train2014")
    told = json.loads(file.read_text())
    told["questions"][0]["image_id"] = image
    file.write_text(json.dumps(told))
    good, bad = read(vqa)
    assert len(good) == 59
    assert [b.reason for b in bad] == ["expected numbers as 'image_id' and 'question_id'"]
    assert str(file) in bad[0].where
    assert "COCO_train2014_0000000000" in open_source(vqa).fields["questions.image_id"]
