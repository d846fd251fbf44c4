"""Tar archives that webdataset's own writers made; and damaged and hostile ones."""

from __future__ import annotations

import doctest
import gc
import gzip
import io
import json
import subprocess
import sys
import tarfile
import tracemalloc
import warnings
from pathlib import Path

import numpy as np
import pytest
import webdataset

from gato.envs.readers import webdataset as reader
from gato.envs.readers.formats import open_source, recognise
from gato.envs.readers.importing import cached
from gato.envs.readers.reader import ReadOptions
from gato.envs.readers.webdataset import expand
from gato.envs.store import open_store


@pytest.fixture
def folder(tmp_path: Path, shown) -> Path:
    """Return a folder with three shards that hold 60 examples."""
    root = tmp_path / "shards"
    root.mkdir()
    pattern = str(root / "train-%03d.tar")
    with webdataset.ShardWriter(pattern, maxcount=20, verbose=0) as writer:
        for i, it in enumerate(shown):
            key = f"part.{i // 30}/{i:05d}"
            writer.write({"__key__": key, "png": it.pixels, "txt": it.text, "cls": i % 3})
    return root


def test_every_example_is_a_caption(folder, shown, read):
    assert len(list(folder.iterdir())) == 3
    for location in (folder, f"{folder}/train-{{000..002}}.tar", f"{folder}/train-00{{0,1,2}}.tar"):
        assert recognise(str(location)) == "webdataset"
        good, bad = read(location, image_size=(48, 32))
        assert not bad
        for record, it in zip(good, shown, strict=True):
            assert record["kind"] == "caption"
            assert record["text"] == it.text
            np.testing.assert_array_equal(record["image"], it.pixels)
    assert len(read(folder / "train-001.tar")[0]) == 20
    source = open_source(folder)
    assert source.fields == {"cls": "left out", "png": "image", "txt": "text"}
    assert source.notes[0].startswith("shards: 3, ")


def test_it_reads_what_the_library_reads(folder, read):
    urls = [str(p) for p in sorted(folder.iterdir())]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # it leaves its archives open
        theirs = list(webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8"))
        gc.collect()
    good, _ = read(folder, image_size=(48, 32))
    for ours, their in zip(good, theirs, strict=True):
        assert ours["text"] == their["txt"]
        np.testing.assert_array_equal(ours["image"], their["png"])


def test_a_model_learns_from_it(folder, stored, trains):
    store = stored(folder, image_size=(32, 32))
    assert len(store) == 60
    first, last = trains(store.path)
    assert last < first / 2


def write(path: Path, examples: list[dict]) -> Path:
    with webdataset.TarWriter(str(path)) as writer:
        for i, example in enumerate(examples):
            writer.write({"__key__": f"{i:03d}", **example})
    return path


def test_words_may_stand_in_json(tmp_path, shown, read):
    raw = shown[0].encoded("JPEG")
    rows = [
        {"jpg": raw, "json": {"caption": "in json", "width": 48}},
        {"jpg": raw, "json": {"caption": "in json"}, "txt": "in a file"},
        {"jpg": raw, "json": {"text": "as text", "caption": None}},
        {"txt": "no picture"},
        {"left.jpg": raw, "txt": "another ending"},
    ]
    path = write(tmp_path / "a.tar", rows)
    good, bad = read(path)
    assert [r["text"] for r in good][:4] == ["in json", "in a file", "as text", "no picture"]
    assert [r["kind"] for r in good] == ["caption"] * 3 + ["document"] * 2
    assert not bad
    named = {"columns": {"image": "left.jpg"}}
    good, bad = read(path, **named)
    assert [r["kind"] for r in good] == ["document"] * 4 + ["caption"]
    assert not bad
    good, bad = read(path, columns={"text": "width"})
    assert not good
    assert "got int" in bad[0].reason
    assert len(bad) == 5


def test_what_cannot_be_mapped_is_named(tmp_path, shown):
    path = write(tmp_path / "a.tar", [{"jpg": shown[0].encoded("JPEG"), "cls": 3}])
    with pytest.raises(ValueError, match=r"expected words .* got cls, jpg.*--columns text="):
        open_source(path)
    with pytest.raises(ValueError, match=r"expected 'title' in the examples .* got cls, jpg"):
        open_source(path, options=ReadOptions(columns={"text": "title"}))
    with pytest.raises(ValueError, match="expected columns of image, text"):
        open_source(path, options=ReadOptions(columns={"label": "cls"}))
    with pytest.raises(ValueError, match="no splits"):
        open_source(path, options=ReadOptions(split="val"))


def test_missing_shards_are_named(folder):
    with pytest.raises(ValueError, match=r"train-003\.tar and 1 more are missing"):
        open_source(f"{folder}/train-{{000..004}}.tar")
    with pytest.raises(ValueError, match="none is there"):
        open_source(folder / "gone", "webdataset")


def test_bad_examples_are_told_and_the_rest_is_read(tmp_path, shown, read, bomb, monkeypatch):
    monkeypatch.setattr(reader, "MAX_MEMBER", 1_000_000)
    raw = shown[0].encoded("PNG")
    rows = [
        {"png": raw, "txt": "good"},
        {"png": bomb, "txt": "bomb"},
        {"png": raw[:50], "txt": "short"},
        {"png": raw},
        {"png": raw, "txt": b"caf\xe9"},
        {"png": raw, "txt": b""},
        {"png": raw, "json": b"{broken"},
        {"png": raw, "json": b"[1, 2]"},
        {"png": raw, "json": {"caption": ["a", "b"]}},
        {"png": raw + bytes(1_000_000), "txt": "large"},
        {"png": b"", "txt": "empty"},
        {"png": raw, "txt": "last"},
    ]
    path = write(tmp_path / "a.tar", rows)
    good, bad = read(path)
    assert [r["text"] for r in good] == ["good", "last"]
    said = ["900000000", "damaged", "without words", "UTF-8", "got none", "broken JSON"]
    said += ["got list", "got list", "more than 0 MiB", "is empty"]
    for item, wanted in zip(bad, said, strict=True):
        assert wanted in item.reason
    assert bad[0].where == f"{path}: 001"


def test_nothing_of_an_archive_leads_out_of_it(tmp_path, shown, read):
    (tmp_path / "secret.txt").write_text("secret")
    path, raw = tmp_path / "a.tar", shown[0].encoded()
    with tarfile.open(path, "w") as archive:

        def add(name: str, content: bytes) -> None:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))

        def link(name: str, target: str, kind: bytes) -> None:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            archive.addfile(info)

        folder = tarfile.TarInfo("sub")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        add("../../up.png", raw)
        add("../../up.txt", b"up")
        add("/etc/passwd.txt", b"not the real one")
        add("a.png", raw)
        link("a.txt", str(tmp_path / "secret.txt"), tarfile.SYMTYPE)
        link("b.txt", "../../up.txt", tarfile.LNKTYPE)
        link("c.txt", "", tarfile.FIFOTYPE)
        add(".hidden.txt", b"hidden")
        add("d.txt", b"once")
        add("d.txt", b"twice")
        add("README", b"no ending")
    before = {p for p in tmp_path.rglob("*")}
    good, bad = read(path)
    assert {p for p in tmp_path.rglob("*")} == before
    assert [r["text"] for r in good] == ["up", "not the real one"]
    assert [b.where.rsplit(" ", 1)[1] for b in bad] == ["a", "b", "c", "d", "README"]
    for item, wanted in zip(bad, ["a link"] * 3 + ["two files", "without words"], strict=True):
        assert wanted in item.reason


def test_damaged_archives_are_told_and_the_next_is_read(folder, read):
    first, second = sorted(folder.iterdir())[:2]
    raw = first.read_bytes()
    first.write_bytes(raw[: len(raw) // 2 + 700])
    second.write_bytes(b"")
    good, bad = read(folder)
    assert 20 < len(good) < 40
    assert [Path(b.where.split(",")[0]).name for b in bad] == [first.name, second.name]
    assert all("nothing from here on can be read" in b.reason for b in bad)
    first.write_bytes(b"no archive" * 100)
    with pytest.raises(ValueError, match="nothing from here on can be read"):
        open_source(first)


def test_a_damaged_header_is_no_end(folder, read):
    first = min(folder.iterdir())
    raw = bytearray(first.read_bytes())
    with tarfile.open(first) as archive:
        at = next(m.offset for m in archive.getmembers() if m.name.endswith("00010.cls"))
    first.write_bytes(raw[:at])  # between two files
    good, bad = read(first)
    assert len(good) == 9  # whether 00009 is whole cannot be known
    assert bad[0].where == f"{first}, from part.0/00009 on"
    assert "empty header" in bad[0].reason
    raw[at + 100] ^= 255
    first.write_bytes(raw)
    good, bad = read(folder)
    assert len(good) == 9 + 40
    assert [b.reason for b in bad] == [
        "nothing from here on can be read: bad checksum where a file or the archive's end is due"
    ]


def test_shards_elsewhere_are_fetched_as_they_are_read(folder, shown, read, tmp_path, monkeypatch):
    import fsspec

    monkeypatch.setenv("GATO_CACHE", str(tmp_path / "cache"))
    memory = fsspec.filesystem("memory")
    for path in folder.iterdir():
        memory.pipe(f"/shards/{path.name}", path.read_bytes())
    try:
        for location in (
            "memory://shards",
            "memory://shards/train-{000..002}.tar",
        ):
            assert recognise(location) == "webdataset"
            good, bad = read(location)
            assert not bad
            assert [r["text"] for r in good] == [it.text for it in shown]
        assert len(read("memory://shards/train-001.tar")[0]) == 20
        good, bad = read("memory://shards/train-{001..003}.tar")
        assert len(good) == 40
        assert "train-003.tar" in bad[0].where
    finally:
        memory.rm("/shards", recursive=True)


def test_a_pattern_is_imported_once_until_its_shards_change(folder, tmp_path, monkeypatch, shown):
    monkeypatch.setenv("GATO_CACHE", str(tmp_path / "cache"))
    pattern = f"{folder}/train-{{000..002}}.tar"
    first = cached(pattern)
    assert cached(pattern) == first
    assert len(open_store(first)) == 60
    write(folder / "train-002.tar", [{"png": shown[0].pixels, "txt": "another"}])
    assert len(open_store(cached(pattern))) == 41


def test_compressed_archives_are_read(tmp_path, read):
    path = tmp_path / "a.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        info = tarfile.TarInfo("a.txt")
        info.size = 5
        archive.addfile(info, io.BytesIO(b"words"))
    assert recognise(str(path)) == recognise(str(tmp_path)) == "webdataset"
    assert read(path)[0] == [{"kind": "document", "text": "words"}]


def attribute(kind: bytes, size: int) -> bytes:
    """Return a header of that many bytes about the member that follows."""
    info = tarfile.TarInfo("about")
    info.type, info.size = kind, size
    return info.tobuf(tarfile.GNU_FORMAT) + bytes(size + -size % 512)


@pytest.mark.parametrize(
    "headers",
    [
        [(tarfile.GNUTYPE_LONGNAME, 64 << 20)],
        [(tarfile.XHDTYPE, 64 << 20)],
        [(tarfile.XGLTYPE, 64 << 20)],
        [(tarfile.GNUTYPE_LONGLINK, 1 << 19)] * 64,
        [(tarfile.GNUTYPE_LONGNAME, 0)] * 3000,
    ],
)
def test_headers_that_are_packed_small_take_no_memory(tmp_path, read, headers):
    path = tmp_path / "a.tar.gz"
    write(tmp_path / "good.tar", [{"txt": f"words {i}"} for i in range(25)])
    good = (tmp_path / "good.tar").read_bytes()
    with tarfile.open(tmp_path / "good.tar") as archive:
        end = max(m.offset_data + 512 for m in archive.getmembers())
    with gzip.open(path, "wb", 1) as file:
        file.write(good[:end])
        for kind, size in headers:
            file.write(attribute(kind, size))
        file.write(good)
    tracemalloc.start()
    found, bad = read(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(found) == 24
    assert [b.reason for b in bad] == [
        "nothing from here on can be read: a header of more than 1 MiB"
    ]
    assert peak < 16 << 20


def test_a_large_example_is_told(tmp_path, read, monkeypatch):
    monkeypatch.setattr(reader, "MAX_EXAMPLE", 100_000)
    rows = [
        {"txt": "good", "json": {"a": "b" * 40_000}},
        {"txt": "large", "json": {"a": "b" * 40_000}, "caption": "c" * 70_000, "text": "d"},
        {"txt": "many", **{f"{i}.bin": b"" for i in range(2500)}},
        {"txt": "last"},
    ]
    good, bad = read(write(tmp_path / "a.tar", rows))
    assert [r["text"] for r in good] == ["good", "last"]
    assert [b.reason for b in bad] == ["an example of more than 0 MiB or 1000 files"] * 2


@pytest.mark.parametrize("form", ["old", "new"])
def test_files_with_holes_are_refused(tmp_path, read, form):
    info = tarfile.TarInfo("a.txt")
    info.size = 512
    if form == "old":
        info.type = tarfile.GNUTYPE_SPARSE
        head = info.tobuf(tarfile.GNU_FORMAT)
    else:
        info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}
        head = info.tobuf(tarfile.PAX_FORMAT)
    write(tmp_path / "a.tar", [{"txt": f"words {i}"} for i in range(25)])
    good = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "b.tar").write_bytes(head + bytes(512) + good)
    found, bad = read(tmp_path)
    assert len(found) == 25
    assert [b.reason[:50] for b in bad] == ["nothing from here on can be read: a file with hole"]


def test_a_long_archive_is_not_held_in_memory(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as archive, open("/dev/zero", "rb") as zeros:
        for i in range(3):
            info = tarfile.TarInfo(f"{i}.mp4")
            info.size = 64 << 20
            archive.addfile(info, zeros)
            info = tarfile.TarInfo(f"{i}.txt")
            info.size = 5
            archive.addfile(info, io.BytesIO(b"words"))
    code = """if True:
        import resource, sys
        from gato.envs.readers.formats import open_source
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        assert len(list(open_source(sys.argv[1], "webdataset").read())) == 3
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    """
    command = [sys.executable, "-c", code, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 20_000  # kilobytes, of an archive of 192 MB


def test_patterns_stand_for_what_the_library_says():
    from braceexpand import braceexpand

    patterns = ["a-{000..012}.tar", "{a,b}/c-{8..11}.tar", "{3..1}.tar", "x.tar", "{007..9}.tar"]
    for pattern in patterns:
        assert expand(pattern) == list(braceexpand(pattern)), pattern
    for pattern in ("{0..99999999999}.tar", "{0..999}{0..999}.tar"):
        with pytest.raises(ValueError, match="at most 100000"):
            expand(pattern)
    assert doctest.testmod(reader).failed == 0


def test_json_written_by_the_library_is_read(tmp_path, read):
    path = write(tmp_path / "a.tar", [{"json": {"text": f"text {i}"}} for i in range(5)])
    assert json.loads(json.dumps(read(path)[0])) == [
        {"kind": "document", "text": f"text {i}"} for i in range(5)
    ]
