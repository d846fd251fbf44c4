"""Language tasks beside control ones: in the result, the page, the comparison, the command."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from language_records import LONGEST, caption, picture, store, talk

import gato
from gato import cli
from gato.envs.episode import EVALUATION_SEED_START
from gato.rollouts.agent import Agent
from gato.rollouts.compare import compare, read_result
from gato.rollouts.evaluate import evaluate
from gato.rollouts.language_tasks import measure
from gato.rollouts.metrics import Figure, Options, divided, summed_up
from gato.rollouts.report import comparison_report, report

from .test_report import Page, require_alone

SEED = EVALUATION_SEED_START


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
    for result, right in ((first, 0.0), (other, 1.0)):
        exact = result["tasks"][task]["metrics"]["exact"]
        exact["per_record"], exact["value"] = [[right, 1.0]] * 6, right
    found = compare({"a": first, "b": other})
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    row = found["language"][task]
    assert row["paired"]
    assert row["differences"]["exact"]["b"]["difference"] == 1.0
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
        (["--tasks", tasks[2], "--choices", "a"], "2 to 1000 different choices"),
        (["--tasks", tasks[0], "--choices", "a,b"], "--choices with tasks of vqa, chat, classify"),
        (["--tasks", tasks[1], "--choices", "a,b"], "--choices with tasks of vqa, chat, classify"),
        (["--tasks", tasks[2], "--choices", "a,b"], "is not among"),
    ):
        assert cli.main([*line, *wrong]) == cli.BAD_INPUT
        assert said in capsys.readouterr().err
    assert cli.main(["eval", "random", "--tasks", "caption/digits"]) == cli.BAD_INPUT


def test_the_command_tells_of_how_many_records_each_figure_is(
    reader: Agent, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(gato, "load", lambda path: reader)
    few = {"choices": ["red", "blue"]}
    asked = [talk("which?", "red", image=picture(i), **(few if i < 2 else {})) for i in range(6)]
    assert cli.main(["eval", "x", "--tasks", f"vqa/{store(tmp_path / 'asked', asked)}"]) == cli.DONE
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    told = {line[1]: int(line[-1]) for line in lines}
    assert (told["exact"], told["accuracy"]) == (6, 2)


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
