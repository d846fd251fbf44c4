"""Data sets that Hugging Face's own library wrote; the hub itself is played by local files."""

from __future__ import annotations

import base64
import io
import json
import os
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from gato.envs.readers.formats import open_source, recognise
from gato.envs.readers.reader import ReadOptions

SIZE = (48, 32)


@pytest.fixture(autouse=True)
def _quiet(tmp_path_factory, monkeypatch):
    datasets.disable_progress_bars()
    cache = tmp_path_factory.getbasetemp() / "hub-cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)


def captioned(shown: list) -> datasets.Dataset:
    rows = [
        {"image": Image.fromarray(it.pixels), "text": it.text, "id": i}
        for i, it in enumerate(shown)
    ]
    return datasets.Dataset.from_list(rows)


def saved(data: datasets.Dataset, folder: Path, form: str) -> Path:
    """Write a data set in one of the forms that the library has."""
    root = folder / form
    match form:
        case "disk":
            data.save_to_disk(root)
        case "splits":
            parts = {"train": data, "test": data.select(range(3))}
            datasets.DatasetDict(parts).save_to_disk(root)
        case "parquet":
            (root / "data").mkdir(parents=True)
            for i in range(2):
                shard = data.shard(2, i, contiguous=True)
                shard.to_parquet(root / "data" / f"train-0000{i}-of-00002.parquet")
            data.select(range(3)).to_parquet(root / "data" / "test-00000-of-00001.parquet")
        case "arrow":
            data.save_to_disk(folder / "whole")
            root.mkdir()
            (folder / "whole" / "data-00000-of-00001.arrow").rename(root / "data.arrow")
    return root


FORMS = ("disk", "splits", "parquet", "arrow")


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_captions(form, tmp_path, shown, read):
    root = saved(captioned(shown), tmp_path, form)
    assert recognise(str(root)) == "hub"
    source = open_source(root)
    assert source.items == 60
    assert source.fields == {"image": "image", "text": "text", "id": "left out"}
    good, bad = read(root, image_size=SIZE)
    assert not bad
    for record, it in zip(good, shown, strict=True):
        assert (record["kind"], record["text"]) == ("caption", it.text)
        np.testing.assert_array_equal(record["image"], it.pixels)
    assert len(list(source.read())) == len(list(source.read())) == 60
    if form in ("splits", "parquet"):
        assert len(read(root, split="test")[0]) == 3
    with pytest.raises(ValueError, match="see --split"):
        read(root, split="validation")


@pytest.mark.parametrize("form", ["disk", "parquet"])
def test_a_model_learns_from_it(form, tmp_path, shown, stored, trains):
    store = stored(saved(captioned(shown), tmp_path, form), image_size=(32, 32))
    assert len(store) == 60
    first, last = trains(store.path)
    assert last < first / 2


def test_a_single_file_is_read(tmp_path, shown, read):
    path = tmp_path / "a.parquet"
    captioned(shown).to_parquet(path)
    assert recognise(str(path)) == "hub"
    assert len(read(path)[0]) == 60


def test_texts_alone_are_documents(tmp_path, read):
    data = datasets.Dataset.from_dict({"title": ["a", "b"], "text": ["one", "x" * 100_000]})
    data.save_to_disk(tmp_path / "a")
    good, bad = read(tmp_path / "a")
    assert not bad
    assert [len(r["text"]) for r in good] == [3, 65_536, 100_000 - 65_536]
    good, _ = read(tmp_path / "a", columns={"text": "title"})
    assert good == [{"kind": "document", "text": t} for t in "ab"]
    data.to_parquet(tmp_path / "b.parquet")
    assert recognise(str(tmp_path / "b.parquet")) == "text"  # without the library
    assert [len(r["text"]) for r in read(tmp_path / "b.parquet")[0]] == [3, 65_536, 34_464]


def test_several_captions_of_one_picture(tmp_path, shown, read):
    rows = [
        {"image": Image.fromarray(it.pixels), "caption": [it.text, f"again {it.text}"]}
        for it in shown[:5]
    ]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "a")
    good, bad = read(tmp_path / "a")
    assert not bad
    assert [r["text"] for r in good[:2]] == [shown[0].text, f"again {shown[0].text}"]
    assert len(good) == 10
    assert open_source(tmp_path / "a").items is None


def test_labels_are_told_by_their_names(tmp_path, shown, read):
    features = datasets.Features(
        {"img": datasets.Image(), "label": datasets.ClassLabel(names=["red", "green", "blue"])}
    )
    rows = {"img": [it.encoded() for it in shown], "label": [i % 3 for i in range(60)]}
    rows["img"] = [{"bytes": raw, "path": None} for raw in rows["img"]]
    rows["label"][5] = -1  # as the hub writes what is not known
    datasets.Dataset.from_dict(rows, features).save_to_disk(tmp_path / "a")
    good, bad = read(tmp_path / "a", image_size=SIZE)
    assert [r["text"] for r in good] == [it.colour for i, it in enumerate(shown) if i != 5]
    assert [b.where.rsplit(", ", 1)[1] for b in bad] == ["row 5"]
    assert "expected a class of 3" in bad[0].reason


def test_questions_about_pictures(tmp_path, shown, stored, trains):
    rows = [
        {
            "image": Image.fromarray(it.pixels),
            "question": "which colour?",
            "answers": [it.colour, it.colour, "maybe"],
        }
        for it in shown
    ]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "a")
    store = stored(tmp_path / "a", image_size=(32, 32))
    for i, it in enumerate(shown):
        user, assistant = store[i]["messages"]
        assert [p["type"] for p in user["content"]] == ["image", "text"]
        assert assistant["content"][0]["text"] == it.colour
    first, last = trains(store.path)
    assert last < first / 2


def talk(content: Any, answer: str) -> list[dict[str, Any]]:
    said = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
    return [{"role": "user", "content": content}, said]


def test_conversations_take_pictures_from_their_column(tmp_path, shown, stored, trains):
    place, ask = {"type": "image", "text": None}, {"type": "text", "text": "and this?"}
    rows = [
        {
            "messages": talk([place, ask, place], it.text),
            "images": [Image.fromarray(it.pixels), Image.fromarray(it.pixels[::-1])],
        }
        for it in shown
    ]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "a")
    source = open_source(tmp_path / "a")
    assert source.fields == {"messages": "messages", "images": "images"}
    store = stored(tmp_path / "a", image_size=(48, 32))
    for i, it in enumerate(shown):
        first, text, second = store[i]["messages"][0]["content"]
        np.testing.assert_array_equal(first["image"], it.pixels)
        np.testing.assert_array_equal(second["image"], it.pixels[::-1])
        assert text == {"type": "text", "text": "and this?"}
    first, last = trains(store.path)
    assert last < first / 2


def test_conversations_without_pictures_or_with_others(tmp_path, shown, read):
    messages = [[{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]]
    datasets.Dataset.from_dict({"messages": messages}).to_parquet(tmp_path / "a.parquet")
    assert recognise(str(tmp_path / "a.parquet")) == "hub"
    assert len(read(tmp_path / "a.parquet")[0]) == 1
    place, one = {"type": "image"}, Image.fromarray(shown[0].pixels)
    rows = [
        {"messages": talk([place, place], "x"), "images": [one]},
        {"messages": talk([place], "x"), "images": [one, one]},
        {"messages": talk([place], "fine"), "images": [one]},
    ]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "b")
    good, bad = read(tmp_path / "b")
    assert len(good) == 1
    assert "more places for pictures in 'messages' than pictures" in bad[0].reason
    assert "fewer places for pictures in 'messages' than pictures in 'images'" in bad[1].reason
    uri = "data:image/png;base64," + base64.b64encode(shown[0].encoded()).decode()
    parts = [{"type": "image_url", "image_url": {"url": u}} for u in (uri, "../x.png")]
    rows = [{"messages": talk([part], "x")} for part in parts]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "c")
    good, bad = read(tmp_path / "c")
    assert len(good) == 1
    assert "leads out" in bad[0].reason


# ---- what cannot be read -------------------------------------------------------------------------


def test_columns_that_fit_nothing_are_named(tmp_path, shown):
    datasets.Dataset.from_dict({"a": [1], "b": ["x"], "c": ["y"]}).save_to_disk(tmp_path / "a")
    said = r"column of text.*got a \(int64\), b \(string\), c \(string\).*--columns text=NAME"
    with pytest.raises(ValueError, match=said):
        open_source(tmp_path / "a")
    with pytest.raises(ValueError, match=r"column 'd' for text at .*; got a \(int64\)"):
        open_source(tmp_path / "a", options=ReadOptions(columns={"text": "d"}))
    with pytest.raises(ValueError, match="expected columns of messages, images"):
        open_source(tmp_path / "a", options=ReadOptions(columns={"body": "b"}))
    options = ReadOptions(columns={"text": "b"}, image_size=SIZE)
    source = open_source(tmp_path / "a", options=options)
    assert source.notes[-1] == "no column of pictures: --image-size changes nothing"
    assert source.fields == {"a": "left out", "b": "text", "c": "left out"}
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no Parquet or Arrow files"):
        open_source(tmp_path / "empty", "hub")


def test_bad_rows_are_told_and_pictures_stay_inside(tmp_path, shown, read, bomb):
    inside = tmp_path / "data"
    inside.mkdir()
    (tmp_path / "secret.png").write_bytes(shown[0].encoded())
    (inside / "fine.png").write_bytes(shown[1].encoded())
    raw = shown[0].encoded()
    cells = [
        {"bytes": raw, "path": "/etc/passwd"},  # a name only: its bytes are here
        {"bytes": None, "path": "fine.png"},
        {"bytes": None, "path": "../secret.png"},
        {"bytes": None, "path": str(tmp_path / "secret.png")},
        {"bytes": None, "path": "http://localhost/a.png"},
        {"bytes": None, "path": "hf://datasets/a/b/c.png"},
        {"bytes": bomb, "path": None},
        {"bytes": raw[:60], "path": None},
        {"bytes": b"", "path": None},
        None,
        {"bytes": raw, "path": None},
        {"bytes": raw, "path": None},
    ]
    texts = [f"row {i}" for i in range(10)] + [None, " "]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({"image": pa.array(cells, kind), "text": pa.array(texts, pa.string())})
    parquet.write_table(table, inside / "a.parquet")
    assert recognise(str(inside)) == "hub"
    good, bad = read(inside)
    assert [r["text"] for r in good] == ["row 0", "row 1"]
    said = ["leads out", "leads out", "names no file", "names no file", "900000000", "damaged"]
    said += ["is empty", "no picture", "got NoneType", "got none"]
    for item, wanted in zip(bad, said, strict=True):
        assert wanted in item.reason
    assert bad[0].where.endswith("row 2")


def test_bytes_in_a_column_are_pictures(tmp_path, shown, read):
    table = pa.table({"jpg": [shown[0].encoded("JPEG")], "caption": ["a box"], "n": [1]})
    parquet.write_table(table, tmp_path / "a.parquet")
    good, bad = read(tmp_path)
    assert not bad
    assert good[0]["text"] == "a box"


@pytest.mark.parametrize("form", ["disk", "parquet", "arrow"])
def test_damaged_files_are_told(form, tmp_path, shown, read):
    root = saved(captioned(shown), tmp_path, form)
    path = sorted(p for p in root.rglob("*") if p.suffix in (".arrow", ".parquet"))[-1]
    raw = path.read_bytes()
    path.write_bytes(raw[: len(raw) // 2])
    good, bad = read(root)
    assert len(good) == (30 if form == "parquet" else 0)  # of two files the first is whole
    assert [b.reason.split(":")[0] for b in bad] == ["nothing from here on can be read"]
    if form == "disk":
        for state in ("{}", "[", "[]", '{"_data_files": [{"filename": "../../secret.arrow"}]}'):
            (root / "state.json").write_text(state)
            with pytest.raises(ValueError, match="expected a data set at"):
                read(root)


def test_damaged_offsets_are_not_followed(tmp_path, read):
    # the library itself reads on and crashes
    texts = pa.array(["one", "two", "three"])
    good = pa.StringArray.from_buffers(
        3, pa.array([0, 3, 1 << 30, 11], pa.int32()).buffers()[1], texts.buffers()[2]
    )
    path = tmp_path / "a.arrow"
    with pa.ipc.new_stream(path, pa.schema({"text": pa.string()})) as writer:
        writer.write_batch(pa.record_batch({"text": texts}))
        writer.write_batch(pa.record_batch({"text": good}))
    found, bad = read(path)
    assert [r["text"] for r in found] == ["one", "two", "three"]
    assert "nothing from here on can be read" in bad[0].reason


def test_a_data_set_cannot_name_files_of_its_own(tmp_path, shown, read):
    root = saved(captioned(shown), tmp_path, "parquet")
    head = {"configs": [{"config_name": "default", "data_files": "../secret/*.parquet"}]}
    (root / "README.md").write_text(f"---\n{json.dumps(head)}\n---\n")
    (root / "parquet.py").write_text("raise SystemExit('run')")
    assert len(read(root)[0]) == 60


# ---- the hub -------------------------------------------------------------------------------------


class Hub:
    """Stands where ``datasets.load_dataset`` does, and streams from a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.asked, self.load = folder, [], datasets.load_dataset

    def __call__(self, name: str, configuration: str | None, *, split: str, streaming: bool):
        assert streaming
        self.asked.append((name, configuration, split))
        if name != "owner/name":
            raise ConnectionError(f"Couldn't reach {name!r} on the Hub")
        files = {split: str(self.folder / "data" / f"{split}-*.parquet")}
        return self.load("parquet", data_files=files, split=split, streaming=True)


def test_a_name_on_the_hub_is_streamed(tmp_path, shown, read, monkeypatch):
    hub = Hub(saved(captioned(shown), tmp_path, "parquet"))
    monkeypatch.setattr(datasets, "load_dataset", hub)
    assert recognise("hf:owner/name") == "hub"
    source = open_source("hf:owner/name")
    assert source.notes[0] == "split train, streamed"
    assert source.notes[-1] == "runs import it once, and do not ask whether it has changed since"
    good, bad = read("hf:owner/name", image_size=SIZE)
    assert not bad
    for record, it in zip(good, shown, strict=True):
        np.testing.assert_array_equal(record["image"], it.pixels)
    assert len(read("hf:owner/name/small", split="test", limit=2)[0]) == 2
    asked = [("owner/name", None, "train")] * 2 + [("owner/name", "small", "test")]
    assert hub.asked == asked
    with pytest.raises(ValueError, match="expected squad on the Hugging Face hub; Couldn't reach"):
        open_source("hf:squad")
    assert hub.asked[-1][0] == "squad"


def test_features_are_guessed_where_the_source_names_none(tmp_path, read, monkeypatch):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"line {i}"}) + "\n" for i in range(5)))

    def load(*names: Any, **options: Any) -> Any:
        rows = [{"text": f"line {i}"} for i in range(5)]
        return datasets.IterableDataset.from_generator(lambda: iter(rows))

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert open_source("hf:owner/name").fields == {"text": "text"}
    assert [r["text"] for r in read("hf:owner/name")[0]] == [f"line {i}" for i in range(5)]


def test_pictures_of_a_streamed_data_set_that_are_files(tmp_path, shown, read, monkeypatch):
    import fsspec

    raw = shown[0].encoded()
    rows = [
        {"image": {"bytes": None, "path": p}, "text": "a box"}
        for p in ("hf://datasets/owner/name/a.png", "/etc/passwd", "http://localhost/a.png")
    ]
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})

    def load(*names: Any, **options: Any) -> Any:
        data = datasets.IterableDataset.from_generator(lambda: iter(rows), features=features)
        return data

    asked = []

    def opened(path: str, mode: str) -> Any:
        asked.append((path, mode))
        return io.BytesIO(raw)

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(fsspec, "open", opened)
    good, bad = read("hf:owner/name", image_size=SIZE)
    assert len(good) == 1
    np.testing.assert_array_equal(good[0]["image"], shown[0].pixels)
    assert asked == [("hf://datasets/owner/name/a.png", "rb")]
    assert all(b.reason.startswith("expected a picture of owner/name itself") for b in bad)
    assert len(bad) == 2


@pytest.mark.parametrize(
    "path",
    [
        "{picture}::hf://",
        "file://{picture}::hf://datasets/owner/name/a.png",
        "http://127.0.0.1:1/a.png?hf://datasets/owner/name/a.png",
        "reference://a.png::http://127.0.0.1:1/hf://datasets/owner/name/a.json",
        "zip://a.png::http://127.0.0.1:1/a.zip?hf://",
        "zip://a.png::zip://b.zip::hf://datasets/owner/name/a.zip",
        "hf://datasets/owner/name2/a.png",
        "hf://datasets/owner/name/../../else/where/a.png",
        "hf://datasets/owner/name@main",
        "hf://owner/name/a.png",
        "simplecache::hf://datasets/owner/name/a.png",
    ],
)
def test_a_streamed_data_set_names_no_file_but_its_own(
    path, tmp_path, shown, read, monkeypatch, refuses_to_open
):
    picture = tmp_path / "mine.png"
    picture.write_bytes(shown[0].encoded())
    path = path.format(picture=picture)
    rows = [{"image": {"bytes": None, "path": path}, "text": "a box"}]
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    data = datasets.IterableDataset.from_generator(lambda: iter(rows), features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda *names, **options: data)
    refuses_to_open.append(str(picture))
    good, bad = read("hf:owner/name")
    assert not good
    assert bad[0].reason.startswith("expected a picture of owner/name itself as a file; got")
    assert path[:40] in bad[0].reason


@pytest.fixture
def refuses_to_open(monkeypatch) -> list[str]:
    """Return a list of files; whoever opens one, or asks for an address, fails."""
    import socket

    import fsspec

    never: list[str] = []
    real = io.open

    def refuse(*told: Any, **more: Any) -> Any:
        pytest.fail(f"opened {told}")

    def opened(file: Any, *rest: Any, **more: Any) -> Any:
        return refuse(file) if str(file) in never else real(file, *rest, **more)

    monkeypatch.setattr(fsspec, "open", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr("builtins.open", opened)
    return never


@pytest.mark.parametrize("path", ["a.png", "zip://in/a.png::a.zip"])
def test_what_cannot_be_fetched_is_told(path, read, monkeypatch):
    import fsspec

    head, _, name = path.rpartition("::")
    path = f"{head}::" * bool(head) + f"hf://datasets/Owner/name@abc123/{name}"
    rows = [{"image": {"bytes": None, "path": path}, "text": "a box"}]
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    data = datasets.IterableDataset.from_generator(lambda: iter(rows), features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda *names, **options: data)

    def gone(path: str, mode: str) -> Any:
        raise FileNotFoundError(path)

    monkeypatch.setattr(fsspec, "open", gone)
    _, bad = read("hf:owner/name")
    assert [b.reason for b in bad] == [f"a picture that cannot be fetched: {path}"]


def test_a_missing_library_is_named(tmp_path, shown, monkeypatch):
    import sys

    root = saved(captioned(shown[:3]), tmp_path, "disk")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r'pip install "gato\[readers\]"'):
        open_source(root)
    assert os.listdir(root)
