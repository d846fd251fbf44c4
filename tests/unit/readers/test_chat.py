"""Conversations in OpenAI's form, with pictures beside them or inside."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gato.envs.readers.formats import open_source, recognise
from gato.envs.readers.reader import ReadOptions

SIZE = (48, 32)


def uri(raw: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(raw).decode()}"


def talk(url: Any, question: str = "what is it?", answer: str = "a box") -> dict[str, Any]:
    """Return one line of the format, as OpenAI documents it."""
    picture = {"type": "image_url", "image_url": {"url": url, "detail": "low"}}
    return {
        "messages": [
            {"role": "system", "content": "Say what you see."},
            {"role": "user", "content": [{"type": "text", "text": question}, picture]},
            {"role": "assistant", "content": answer},
        ]
    }


@pytest.fixture
def folder(tmp_path: Path, shown) -> Path:
    """Return a folder with 60 conversations, half of the pictures in files."""
    root = tmp_path / "talks"
    (root / "pictures").mkdir(parents=True)
    lines = []
    for i, it in enumerate(shown):
        name = f"pictures/{i}.png"
        if i % 2:
            (root / name).write_bytes(it.encoded())
        url = name if i % 2 else uri(it.encoded())
        lines.append(json.dumps(talk(url, f"what is picture {i}?", it.text)))
    (root / "train.jsonl").write_text("\n".join(lines) + "\n")
    return root


def test_conversations_are_kept_as_they_are(folder, shown, read):
    assert recognise(str(folder)) == recognise(str(folder / "train.jsonl")) == "chat"
    source = open_source(folder)
    assert (source.items, source.kind) == (60, "records")
    assert source.fields == {"messages": "conversation"}
    good, bad = read(folder, image_size=SIZE)
    assert not bad
    for i, (record, it) in enumerate(zip(good, shown, strict=True)):
        system, user, assistant = record["messages"]
        assert system == {
            "role": "system",
            "content": [{"type": "text", "text": "Say what you see."}],
        }
        assert user["role"] == "user"
        assert user["content"][0] == {"type": "text", "text": f"what is picture {i}?"}
        np.testing.assert_array_equal(user["content"][1]["image"], it.pixels)
        assert assistant["content"] == [{"type": "text", "text": it.text}]


def test_a_json_list_is_the_same(folder, read):
    lines = (folder / "train.jsonl").read_text().splitlines()
    (folder / "train.jsonl").unlink()
    (folder / "train.json").write_text(json.dumps([json.loads(line) for line in lines]))
    assert recognise(str(folder)) == "chat"
    good, bad = read(folder)
    assert (len(good), len(bad)) == (60, 0)


def test_a_model_learns_from_it(folder, stored, trains):
    store = stored(folder, image_size=(32, 32))
    assert len(store) == 60
    first, last = trains(store.path)
    assert last < first / 2


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ("hello", "list of messages"),
        ([], "list of messages"),
        (["hello"], "expected an object; got str"),
        ([{"content": "x"}], "field 'role'"),
        ([{"role": "assistant"}], "field 'content'"),
        ([{"role": "tool", "content": "x"}], "got 'tool'"),
        ([{"role": ["user"], "content": "x"}], "expected a role"),
        ([{"role": "assistant", "content": None, "tool_calls": [{}]}], "'tool_calls'"),
        ([{"role": "assistant", "content": None}], "text or parts as 'content'"),
        ([{"role": "assistant", "content": 7}], "text or parts as 'content'"),
        ([{"role": "assistant", "content": ""}], "got none"),
        ([{"role": "assistant", "content": "x", "weight": 0}], "'weight' 0"),
        ([{"role": "user", "content": "x"}], "nothing to learn"),
        ([{"role": "user", "content": [{"type": "input_audio"}]}], "got 'input_audio'"),
        ([{"role": "user", "content": [{"type": "text"}]}], "expected text as 'text'"),
        ([{"role": "user", "content": ["text"]}], "expected an object; got str"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "picture's address"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": [1]}]}], "got list"),
    ],
)
def test_what_a_conversation_cannot_hold_is_told(messages, said, tmp_path, read):
    lines = [{"messages": messages}, talk_without()]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    good, bad = read(tmp_path, "chat")
    assert len(good) == 1
    assert said in bad[0].reason
    assert bad[0].where.endswith("a.jsonl:1")


def talk_without() -> dict[str, Any]:
    return {"messages": [{"role": "assistant", "content": "hello"}]}


def test_bad_pictures_are_told_and_nothing_outside_is_read(tmp_path, read, shown, bomb):
    inside = tmp_path / "data"
    inside.mkdir()
    (tmp_path / "secret.png").write_bytes(shown[0].encoded())
    (inside / "link.png").symlink_to(tmp_path / "secret.png")
    (inside / "bomb.png").write_bytes(bomb)
    (inside / "short.png").write_bytes(shown[0].encoded()[:60])
    (inside / "words.png").write_text("no picture")
    cases = {
        "../secret.png": "leads out",
        str(tmp_path / "secret.png"): "leads out",
        "../../../../../etc/passwd": "leads out",
        "link.png": "leads out",
        "gone.png": "names no file",
        ".": "names no file",
        "a" * 5000: "can be no file's: File name too long",
        "x\0y": "can be no file's: embedded null",
        "bomb.png": "900000000",
        "short.png": "damaged",
        "words.png": "no picture",
        "http://localhost/a.png": "not fetched",
        "HTTPS://localhost/a.png": "not fetched",
        "file:///etc/passwd": "not fetched",
        "s3://bucket/a.png": "not fetched",
        uri(bomb): "900000000",
        "data:image/png,xyz": "base64",
        "data:image/png;base64,@@@": "base64",
        "data:image/png;base64,": "is empty",
        "data:": "base64",
    }
    lines = [json.dumps(talk(url)) for url in cases] + [json.dumps(talk_without())]
    (inside / "a.jsonl").write_text("\n".join(lines))
    good, bad = read(inside)
    assert len(good) == 1
    assert len(bad) == len(cases)
    for item, (url, said) in zip(bad, cases.items(), strict=True):
        assert said in item.reason, url[:100]


def test_fields_may_have_other_names(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"dialogue": talk_without()["messages"], "id": 1}))
    with pytest.raises(ValueError, match=r"field 'messages' .* dialogue, id.*--columns messages="):
        open_source(tmp_path, "chat")
    source = open_source(tmp_path, "chat", ReadOptions(columns={"messages": "dialogue"}))
    assert source.fields == {"dialogue": "conversation", "id": "left out"}
    assert [r["kind"] for r in source.read()] == ["conversation"]
    with pytest.raises(ValueError, match="got none"):
        open_source(tmp_path / "a", "chat")
