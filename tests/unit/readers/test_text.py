"""Plain text, JSON lines, JSON lists and Parquet give the documents that were written."""

from __future__ import annotations

import codecs
import gzip
import json
import os
import shutil
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from gato.envs.readers import json_stream
from gato.envs.readers.formats import open_source, recognise
from gato.envs.readers.json_stream import json_items, json_values
from gato.envs.readers.text import LONGEST, SEPARATOR, documents

TEXTS = [f"the {c} box lies to the left of door {i}" for i in range(20) for c in ("red", "blue")]
TEXTS += ["caf\u00e9 \u6f22\u5b57 \U0001f916"] * 10


def write(folder: Path, kind: str) -> Path:
    """Write TEXTS in one of the forms."""
    path = folder / f"data.{kind}"
    rows = [{"id": i, "text": t} for i, t in enumerate(TEXTS)]
    match kind:
        case "txt":
            path.write_text(f"\n{SEPARATOR}\n".join(TEXTS), encoding="utf-8")
        case "jsonl":
            path.write_text("".join(json.dumps(r) + "\n\n" for r in rows))
        case "jsonl.gz":
            lines = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows)
            path.write_bytes(gzip.compress(lines.encode()))
        case "json":
            path.write_text(json.dumps(rows, indent=2))
        case "parquet":
            parquet.write_table(pa.Table.from_pylist(rows), path, row_group_size=7)
    return path


KINDS = ["txt", "jsonl", "jsonl.gz", "json", "parquet"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_form_gives_the_same_documents(kind, tmp_path, read):
    path = write(tmp_path, kind)
    assert recognise(str(path)) == recognise(str(tmp_path)) == "text"
    for location in (path, tmp_path):
        good, bad = read(location)
        assert [r["text"] for r in good] == TEXTS
        assert not bad
    assert open_source(path).items == len(TEXTS)


@pytest.mark.parametrize("kind", ["txt", "parquet"])
def test_a_model_learns_from_it(kind, tmp_path, stored, trains):
    store = stored(write(tmp_path, kind))
    assert [store[i]["text"] for i in range(len(store))] == TEXTS
    first, last = trains(store.path)
    assert last < first / 2


def test_every_file_of_a_folder_is_a_document(tmp_path, read):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "two.md").write_bytes(codecs.BOM_UTF8 + b"# two\r\nlines\r\n")
    (tmp_path / "a.TXT").write_text("one\n")
    (tmp_path / ".hidden.txt").write_text("not to be read")
    (tmp_path / "c.pdf").write_text("not text")
    good, bad = read(tmp_path)
    assert [r["text"] for r in good] == ["one", "# two\r\nlines"]
    assert not bad


def test_plain_files_beside_tables_are_left_out_and_told_of(tmp_path, read):
    write(tmp_path, "jsonl")
    (tmp_path / "README.md").write_text("what this is")
    assert "plain files beside tables, left out: 1" in open_source(tmp_path).notes
    good, _ = read(tmp_path)
    assert len(good) == len(TEXTS)


def test_a_file_of_any_name_is_text_if_one_says_so(tmp_path, read):
    (tmp_path / "notes.log").write_text("a line")
    with pytest.raises(ValueError, match="name it: --format"):
        read(tmp_path / "notes.log")
    assert read(tmp_path / "notes.log", "text")[0] == [{"kind": "document", "text": "a line"}]


def test_columns_say_which_field_is_the_text(tmp_path, read):
    path = tmp_path / "a.jsonl"
    path.write_text('{"body": "words", "url": "x"}\n')
    with pytest.raises(ValueError, match=r"field 'text' in .*got body, url.*--columns text=NAME"):
        open_source(path)
    source = open_source(path, options=_columns(text="body"))
    assert source.fields == {"body": "document", "url": "left out"}
    assert [r["text"] for r in source.read()] == ["words"]
    with pytest.raises(ValueError, match="expected columns of text for text; got 'txet'"):
        open_source(path, options=_columns(txet="body"))
    table = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"body": ["words"]}), table)
    with pytest.raises(ValueError, match="field 'text'"):
        open_source(table)


def _columns(**columns: str):
    from gato.envs.readers.reader import ReadOptions

    return ReadOptions(columns=columns)


def test_options_without_effect_are_refused(tmp_path, read):
    path = write(tmp_path, "txt")
    for wrong in ({"split": "test"}, {"task": "a/b"}, {"instruction": "read"}):
        with pytest.raises(ValueError, match=r"no splits|episodes"):
            read(path, **wrong)


# ---- long texts ----------------------------------------------------------------------------------


def test_long_texts_are_cut_between_words_and_nothing_is_lost(tmp_path, read):
    text = "\n\n".join(" ".join(f"word{i * j}" for j in range(60)) for i in range(700))
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": text}))
    for name in ("a.txt", "b.jsonl"):
        good, bad = read(tmp_path / name)
        assert not bad
        assert len(good) > 2
        assert max(len(r["text"]) for r in good) <= LONGEST
        assert " ".join(r["text"] for r in good).split() == text.split()
        source = open_source(tmp_path / name)
        list(source.read())
        assert source.counts["cuts of long texts"] == len(good) - 1
    unspaced = "\u6f22" * (LONGEST * 5 // 2)
    assert "".join(r["text"] for r in documents(unspaced)) == unspaced


@pytest.mark.parametrize("spaced", [True, False])
def test_separators_are_found_wherever_they_stand(spaced, tmp_path, read):
    fill = "ab \u6f22" if spaced else "ab\u6f22"
    for shift in range(14):
        first = (fill * LONGEST)[: LONGEST - shift]
        (tmp_path / "a.txt").write_text(f"{first}{SEPARATOR}{'y' * 3 * LONGEST}{SEPARATOR}end")
        good, bad = read(tmp_path)
        assert not bad
        assert good[0]["text"] == first.strip()
        assert good[-1]["text"] == "end"
        assert "".join(r["text"] for r in good[1:-1]) == "y" * 3 * LONGEST


# ---- what nobody has checked ---------------------------------------------------------------------


def test_bad_lines_are_told_with_their_number(tmp_path, read):
    lines = [
        b'{"text": "good"}',
        b'{"text": "broken',
        b"",
        b'{"text": "\xff"}',
        b'{"text": 7}',
        b'{"other": "x"}',
        b"[1, 2]",
        b"[" * 100_000,
        b'{"text": "\\ud800"}',
        b'{"text": "nothing\\u0000"}',
        b'{"text": "  "}',
        b'{"text": "last"}',
    ]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    good, bad = read(tmp_path)
    assert [r["text"] for r in good] == ["good", "last"]
    told = {b.where.rsplit(":", 1)[1]: b.reason for b in bad}
    assert list(told) == ["2", "4", "5", "6", "7", "8", "9", "10", "11"]
    for line, said in (
        ("2", "broken JSON"),
        ("4", "UTF-8"),
        ("5", "got int"),
        ("6", "field 'text'; got other"),
        ("7", "expected an object; got list"),
        ("8", "nested too deep"),
        ("9", "Unicode"),
        ("10", "binary"),
        ("11", "got none"),
    ):
        assert said in told[line]


def test_bad_plain_files_are_told(tmp_path, read):
    (tmp_path / "a.txt").write_bytes(b"")
    (tmp_path / "b.txt").write_bytes(codecs.BOM_UTF8)
    (tmp_path / "c.txt").write_bytes("text".encode("utf-16"))
    (tmp_path / "d.txt").write_bytes(b"good" + SEPARATOR.encode() + b"caf\xe9")
    (tmp_path / "e.txt").write_bytes(b"\0\1\2")
    (tmp_path / "f.txt.gz").write_bytes(gzip.compress(b"words " * 1000)[:-9])
    (tmp_path / "g.txt").write_bytes(b"end")
    good, bad = read(tmp_path)
    assert [r["text"] for r in good] == ["good", "end"]
    told = {Path(b.where).name: b.reason for b in bad}
    assert list(told) == ["a.txt", "b.txt", "c.txt", "d.txt", "e.txt", "f.txt.gz"]
    said = ["empty", "empty", "UTF-16", "UTF-8", "binary", "end-of-stream"]
    assert all(s in reason for s, reason in zip(said, told.values(), strict=True))


def test_links_out_of_the_folder_are_not_followed(tmp_path, read):
    (tmp_path / "secret.txt").write_text("secret")
    inside = tmp_path / "data"
    inside.mkdir()
    (inside / "a.txt").symlink_to(tmp_path / "secret.txt")
    (inside / "b.txt").symlink_to("gone.txt")
    (inside / "c.txt").write_text("fine")
    (inside / "d.txt").symlink_to("c.txt")
    (inside / "loop").symlink_to(".")
    os.mkfifo(inside / "e.txt")
    os.mkfifo(tmp_path / "f.jsonl")
    good, bad = read(inside)
    assert [r["text"] for r in good] == ["fine", "fine"]
    assert [Path(b.where).name for b in bad] == ["a.txt", "b.txt", "e.txt"]
    assert "leads out" in bad[0].reason
    with pytest.raises(ValueError, match="got none"):
        open_source(tmp_path / "f.jsonl", "text")  # and does not wait for somebody to write
    assert read(inside / "a.txt")[0][0]["text"] == "secret"  # named by the user


def test_long_lines_are_passed_over(tmp_path, read, monkeypatch):
    monkeypatch.setattr(json_stream, "MAX_VALUE", 1000)
    rows = ["good", "x" * 5000, "y" * 990, "last"]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": r}) for r in rows))
    good, bad = read(tmp_path)
    assert [r["text"] for r in good] == ["good", "last"]
    assert [b.where.rsplit(":", 1)[1] for b in bad] == ["2", "3"]


def test_damaged_parquet_is_told(tmp_path, read):
    path = write(tmp_path, "parquet")
    raw = bytearray(path.read_bytes())
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "short.parquet").write_bytes(raw[: len(raw) // 2])
    with pytest.raises(ValueError, match="expected a table in"):
        read(tmp_path / "other")
    raw[len(raw) // 3 : len(raw) // 3 + 40] = b"\xff" * 40
    (tmp_path / "z.parquet").write_bytes(raw)
    good, bad = read(tmp_path / "z.parquet")
    assert len(bad) == 1
    assert "nothing from here on can be read" in bad[0].reason
    assert len(good) < len(TEXTS)
    _, bad = read(tmp_path)  # the good one, the damaged one, and the half
    assert len(bad) == 2


def test_parquet_with_wrong_utf_8_and_empty_rows(tmp_path, read):
    offsets = pa.array([0, 4, 6, 10], pa.int32()).buffers()[1]
    column = pa.StringArray.from_buffers(3, offsets, pa.py_buffer(b"good\xff\xfelast"))
    parquet.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    parquet.write_table(pa.table({"text": ["x", None]}), tmp_path / "b.parquet")
    parquet.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "c.parquet")
    good, bad = read(tmp_path)
    assert [r["text"] for r in good] == ["good", "last", "x"]
    assert [b.where.rsplit("/", 1)[1] for b in bad] == ["a.parquet, row 1", "b.parquet, row 1"]
    assert "UTF-8" in bad[0].reason


def test_a_folder_without_text_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"expected files .txt, .*; got none"):
        open_source(tmp_path, "text")
    with pytest.raises(ValueError, match="there is no such file or folder"):
        open_source(tmp_path / "gone")


# ---- JSON in pieces, against json.loads ----------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


def flat(value: object) -> list[tuple[str, object]]:
    """Return what `json_values` is to give of a value."""
    if isinstance(value, list):
        return [("", v) for v in value]
    if isinstance(value, dict):
        items = ((k, v if isinstance(v, list) else [v]) for k, v in value.items())
        return [(k, v) for k, several in items for v in several]
    return [("", value)]


@given(value=JSON, chunk=st.sampled_from([1, 2, 7, 100]), indent=st.sampled_from([None, 1]))
def test_a_json_file_is_read_piece_by_piece_as_in_one(tmp_path_factory, value, chunk, indent):
    path = tmp_path_factory.mktemp("json") / "a.json"
    path.write_text(json.dumps(value, indent=indent, ensure_ascii=False), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_stream._Text.more, "__defaults__", (chunk,))
        patch.setattr(json_stream, "_CHUNK", chunk)
        assert list(json_values(path)) == flat(value)


@pytest.mark.parametrize(
    "raw",
    [
        *("", "[", "[1", "[1,", "[1,]", "[1 2]", "{", '{"a"', '{"a":', '{"a": 1', '{"a" 1}'),
        *("{1: 2}", '{"a": [1, 2}', "[1] 2", "nul", '["\\x"]', "[1.]", "[1e+]"),
        *("[" * 50_000, '[{"a": ' + "[" * 50_000),
    ],
)
def test_broken_json_is_an_error_at_its_place(raw, tmp_path):
    path = tmp_path / "a.json"
    path.write_text(raw)
    with pytest.raises(ValueError, match="broken JSON"):
        list(json_values(path))


def test_what_stands_before_broken_json_is_read(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b'[{"text": "a"}, {"text": "b"}, {"text": "\xff"}]')
    items = list(json_items(path))
    assert items[-1][1].reason.startswith("nothing from here on can be read")
    path.write_bytes(b'[{"text": "a"}, {"text": "b"}, {"text": }]')
    items = list(json_items(path))
    assert [v for _, v in items[:2]] == [{"text": "a"}, {"text": "b"}]
    assert items[2][0].endswith("item 2")


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_a_byte_order_mark_is_no_part_of_json(name, tmp_path, read):
    rows = '[{"text": "caf\u00e9"}]' if name == "a.json" else '{"text": "caf\u00e9"}\r\n'
    (tmp_path / name).write_bytes(codecs.BOM_UTF8 + rows.encode())
    assert read(tmp_path)[0] == [{"kind": "document", "text": "caf\u00e9"}]
    (tmp_path / name).write_bytes(rows.encode("utf-16"))
    good, bad = read(tmp_path)
    assert not good
    assert "expected UTF-8" in bad[0].reason


@pytest.mark.parametrize("form", ["txt", "jsonl"])
def test_the_pieces_of_a_long_text_belong_together(tmp_path, stored, form):
    long = ["a word " * (LONGEST * n // 7) for n in (5, 3)]
    texts = ["first", long[0], "second", long[1], "third"]
    (tmp_path / "data" / "deep").mkdir(parents=True)
    for name in ("a", "deep/a"):
        file = tmp_path / "data" / f"{name}.{form}"
        if form == "txt":
            file.write_text(SEPARATOR.join(f"{t} of {name}" for t in texts))
        else:
            file.write_text("".join(json.dumps({"text": f"{t} of {name}"}) + "\n" for t in texts))
    store = stored(tmp_path / "data")
    groups: dict[int, str] = {}
    for number, record in zip(store.groups().tolist(), store, strict=True):
        groups[number] = groups.get(number, "") + record["text"]
    wanted = [f"{t} of {name}" for name in ("a", "deep/a") for t in texts]
    assert [g.replace(" ", "") for g in groups.values()] == [w.replace(" ", "") for w in wanted]
    assert len(store) > 20


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.txt"])
def test_links_of_the_hub_s_cache_are_followed_and_no_others(tmp_path, read, name):
    cache = tmp_path / "datasets--owner--name"
    snapshot, blobs = cache / "snapshots" / "0123abc", cache / "blobs"
    for folder in (snapshot / "data", blobs, tmp_path / "blobs"):
        folder.mkdir(parents=True)
    if name.endswith("parquet"):
        parquet.write_table(pa.table({"text": ["words"]}), blobs / "5eed")
    else:
        text = "words" if name == "a.txt" else json.dumps({"text": "words"})
        (blobs / "5eed").write_text(text)
    shutil.copy(blobs / "5eed", tmp_path / "blobs" / "5eed")
    (snapshot / "data" / name).symlink_to("../../../blobs/5eed")
    for root in (snapshot, snapshot / "data"):
        assert read(root, "text")[0] == [{"kind": "document", "text": "words"}]
    out = snapshot / "data" / f"b{name[1:]}"
    out.symlink_to(tmp_path / "blobs" / "5eed")
    good, bad = read(snapshot, "text")
    assert len(good) == 1
    assert [b.reason for b in bad] == [
        "the file leads out of the data's folder. If it is a link, copy the data with what it "
        "leads to: cp -rL"
    ]
    moved = cache.rename(tmp_path / "elsewhere")  # what only looks like a snapshot is none
    assert not read(moved / "snapshots" / "0123abc", "text")[0]
