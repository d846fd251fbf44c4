"""Data at addresses: the same as on this machine, through a cache that stays within its bound."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import json
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import fsspec
import numpy as np
import pytest

from gato import cli
from gato.data_commands import with_imports
from gato.envs import cache as cache_module
from gato.envs import mirror, remote, store_reader
from gato.envs.cache import Cache
from gato.envs.files import stores_below
from gato.envs.readers import formats, importing
from gato.envs.store import EpisodeStore, RecordStore, open_store
from gato.train import train

THEIRS = Path(__file__).parents[2] / "fixtures" / "lerobot_v3"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cache:
    """Let every test have a cache of its own."""
    monkeypatch.setenv("GATO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(mirror, "_TRUSTED", 0.0)  # what changes is seen at once
    return remote.file_cache()


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let files be evicted and looked at again without a moment's rest."""
    monkeypatch.setattr(cache_module, "GRACE", 0.0)
    monkeypatch.setattr(mirror, "_CHECKED", 0.0)


@pytest.fixture
def memory() -> Iterator[Callable[[Path, str], str]]:
    """Return a function that puts a folder into fsspec's memory, and gives its address."""
    fs = fsspec.filesystem("memory")

    def put(folder: Path, name: str) -> str:
        fs.put(str(folder), f"/{name}", recursive=True)
        return f"memory://{name}"

    yield put
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]


class Quiet(http.server.SimpleHTTPRequestHandler):
    asked: list[str]
    lists = True
    """Whether folders are listed."""

    def list_directory(self, path: Any) -> Any:
        return super().list_directory(path) if self.lists else self.send_error(404)

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.asked.append(self.path)
        super().do_GET()


@pytest.fixture
def web(tmp_path: Path) -> Iterator[Any]:
    """Serve a folder: `address`, what was `asked` for, and `stop`."""
    root, handler = tmp_path / "web", type("Handler", (Quiet,), {"asked": []})
    root.mkdir()
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), partial(handler, directory=str(root))
    )
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()

    class Web:
        address, folder = f"http://127.0.0.1:{server.server_port}", root
        asked = handler.asked

        def __init__(self) -> None:
            self.handler = handler

        def stop(self) -> None:
            server.shutdown()
            server.server_close()
            thread.join()

    web = Web()
    yield web
    if thread.is_alive():
        web.stop()


def write(content: bytes, told: bool = True) -> Any:
    """Return what downloads a content, and says how large it is before."""

    def download(file: BinaryIO, reserve: Callable[[int], None]) -> None:
        if told:
            reserve(len(content))
        file.write(content)

    return download


def sizes(folder: Path) -> dict[str, int]:
    """Return the visible files of a folder with their sizes."""
    found = {p.relative_to(folder).as_posix(): p.stat().st_size for p in folder.rglob("*")}
    return {k: v for k, v in found.items() if (folder / k).is_file() and "/." not in f"/{k}"}


# stores


def test_a_store_is_the_same_from_afar_and_comes_shard_by_shard(stores, memory):
    here, address = EpisodeStore(stores / "arm"), memory(stores / "arm", "far/arm")
    folder = mirror.local(address)
    there = open_store(folder)
    shards = [s["name"] for s in here.manifest["shards"]]
    assert len(shards) > 2
    big = {name for name in sizes(folder) if "observations" in name}
    assert not big  # nothing but the index was fetched
    assert np.array_equal(there.lengths, here.lengths)
    first = there.episode(0)
    big = {name.split("/")[0] for name in sizes(folder) if "observations" in name}
    assert big == {shards[0]}
    for i in range(len(here)):
        assert repr(there.episode(i)) == repr(here.episode(i))
        for path, values in here.episode(i).observations.items():
            assert np.array_equal(there.episode(i).observations[path], values)
    assert np.array_equal(first.rewards, here.episode(0).rewards)
    there.validate()


def test_folders_of_stores_and_records(stores, memory):
    address = memory(stores, "far/all")
    found = stores_below(mirror.local(address))
    assert [f.name for f in found] == ["arm", "grid", "pictures", "talks", "words"]
    for folder in found:
        there, here = open_store(folder), open_store(stores / folder.name)
        there.validate()
        assert len(there) == len(here)
        if isinstance(here, RecordStore):
            for i in range(len(here)):
                mine, theirs = there[i], here[i]
                assert mine.keys() == theirs.keys()
                assert np.array_equal(mine.get("image", 0), theirs.get("image", 0))
    fsspec.filesystem("memory").rm("/far/all/grid", recursive=True)
    again = stores_below(mirror.local(address))
    assert [f.name for f in again] == ["arm", "pictures", "talks", "words"]


def test_training_on_an_address_is_training_on_the_store(stores, tiny, memory, tmp_path):
    address = memory(stores, "far/stores")
    few = replace(tiny, steps=4, save_every=4)
    far = [replace(c, path=f"{address}/{c.name}") for c in few.corpora]
    train(few, tmp_path / "near", device="cpu")
    train(replace(few, corpora=tuple(far)), tmp_path / "far", device="cpu")
    lines = [
        [json.loads(line)["losses"] for line in (run / "metrics.jsonl").read_text().splitlines()]
        for run in (tmp_path / "near", tmp_path / "far")
    ]
    assert lines[0] == lines[1]


@pytest.mark.parametrize(("trusted", "asked"), [(60.0, 1), (0.0, 2)])
def test_a_run_that_starts_asks_once_for_the_manifests(
    trusted, asked, stores, web, tmp_path, monkeypatch
):
    monkeypatch.setattr(mirror, "_TRUSTED", trusted)
    shutil.copytree(stores / "arm", web.folder / "arm")
    data = f"arm={web.address}/arm"
    small = ["--steps", "1", "--model.width", "32", "--model.layers", "1", "--model.heads", "2"]
    small += ["--out", str(tmp_path / "run"), "--json"]
    assert cli.main(["train", "quickstart", "--data", data, *small]) == 0
    assert web.asked.count("/arm/manifest.json") == asked


def test_what_was_looked_at_lately_is_looked_for_when_it_is_gone(stores, memory, monkeypatch):
    monkeypatch.setattr(mirror, "_TRUSTED", 60.0)
    address = memory(stores / "arm", "far/arm")
    folder = mirror.local(address)
    shutil.rmtree(folder)
    assert len(open_store(mirror.local(address))) == 20
    with pytest.raises(ValueError, match="found none"):
        mirror.local("memory://far/none")
    memory(stores / "grid", "far/none")
    assert len(open_store(mirror.local("memory://far/none"))) == 20


def test_the_command_line_takes_addresses_of_stores(stores, memory, capsys):
    address = memory(stores, "far/stores")
    assert cli.main(["data", "info", f"{address}/arm", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)[0]
    assert (told["store"], told["items"]) == (f"{address}/arm", 20)
    assert told["megabytes"] is None  # not all of it is here
    shards = {n.split("/")[-2] for n in sizes(mirror.local(f"{address}/arm")) if "actions" in n}
    assert len(shards) == 1
    assert cli.main(["data", "info", str(stores / "arm"), "--json"]) == 0
    here = json.loads(capsys.readouterr().out)[0]
    assert told["tokens"] == pytest.approx(here["tokens"], rel=0.1)
    assert cli.main(["data", "validate", address, "--json"]) == 0
    assert [row["valid"] for row in json.loads(capsys.readouterr().out)] == [True] * 5
    (path,) = with_imports([f"{address}/grid"])
    assert len(open_store(path)) == 20
    assert cli.main(["data", "info", f"{address}/arm", "--cache-gb", "-1"]) == 2
    assert "expected a positive size" in capsys.readouterr().err


def test_the_cache_stays_within_its_bound(stores, memory, cache, at_once):
    address = memory(stores / "grid", "far/grid")
    here = EpisodeStore(stores / "grid")
    folder = mirror.local(address)
    index = cache.used()
    largest = max(
        sum((stores / "grid" / s["name"] / n).stat().st_size for n in s["sha256"])
        for s in here.manifest["shards"]
    )
    everything = sum(sizes(stores / "grid").values())
    bound = index + int(1.5 * largest)
    assert bound < 0.8 * everything
    cache.set_limit(bound / 1e9)
    there, rng = open_store(folder), np.random.default_rng(0)
    for i in rng.integers(len(here), size=25):
        got, wanted = there.episode(int(i)), here.episode(int(i))
        assert np.array_equal(got.observations["camera"], wanted.observations["camera"])
        assert got.observations["note"] == wanted.observations["note"]
        assert cache.used() <= bound


def test_what_another_process_removes_before_it_is_read_is_fetched_again(
    stores, memory, monkeypatch
):
    monkeypatch.setattr(mirror, "_CHECKED", 1e9)  # as where a process is stopped after `need`
    address, here = memory(stores / "grid", "far/grid"), EpisodeStore(stores / "grid")
    there = open_store(mirror.local(address))
    there.episode(0)

    def remove() -> None:
        for path in (there.path / there.manifest["shards"][0]["name"]).iterdir():
            path.unlink()
        store_reader._json.cache_clear()

    for read in (
        lambda store: repr(store.episode(0)),
        lambda store: store.column(0, "observations", "note"),
        lambda store: store.window(0, 0, 1).instruction,
        lambda store: store._texts(0, np.zeros(1, np.int32)),
        lambda store: store._info(0, 0),
        lambda store: store._per_episode("returns").tolist(),
    ):
        remove()
        assert read(there) == read(here)
    remove()
    there.validate()
    remove()
    fsspec.filesystem("memory").rm("/far/grid", recursive=True)
    with pytest.raises(ValueError, match="there is none"):
        there.episode(0)


def test_a_damaged_shard_is_named_and_not_kept(stores, memory):
    address = memory(stores / "arm", "far/arm")
    fs = fsspec.filesystem("memory")
    there = open_store(mirror.local(address))
    file = next(f for f in fs.find("/far/arm") if f.endswith("actions.action.npy"))
    fs.pipe_file(file, fs.cat_file(file)[:-1] + b"x")
    with pytest.raises(ValueError, match=r"memory://far/arm/shard.*actions.action.npy: .*sha256"):
        there.episode(0)
    assert not [n for n in sizes(there.path) if n.endswith("actions.action.npy")]
    fs.rm_file(file)
    with pytest.raises(ValueError, match=r"actions\.action\.npy; there is none"):
        there.episode(0)


def test_a_store_that_was_made_anew_is_read_anew(stores, memory):
    address = memory(stores / "arm", "far/arm")
    whole = EpisodeStore(stores / "arm")
    fs = fsspec.filesystem("memory")
    manifest = json.loads(fs.cat_file("/far/arm/manifest.json"))
    few = {**manifest, "shards": manifest["shards"][:1]}
    fs.pipe_file("/far/arm/manifest.json", json.dumps(few).encode())
    first = open_store(mirror.local(address))
    assert len(first) == manifest["shards"][0]["episodes"]
    first.episode(0)
    # a shard of the same name with another content, as a store that was removed and made again
    shard, name = manifest["shards"][0], "rewards.npy"
    path = f"/far/arm/{shard['name']}/{name}"
    changed = fs.cat_file(path)[:-4] + np.float32(7).tobytes()
    fs.pipe_file(path, changed)
    shard["sha256"][name] = hashlib.sha256(changed).hexdigest()
    fs.pipe_file("/far/arm/manifest.json", json.dumps(manifest).encode())
    then = open_store(mirror.local(address))
    assert len(then) == len(whole)
    last = shard["episodes"] - 1
    assert float(then.episode(last).rewards[-1]) == 7
    assert np.array_equal(then.episode(last + 1).rewards, whole.episode(last + 1).rewards)


# files of other formats


def test_a_dataset_is_the_same_from_afar_and_only_what_is_needed_comes(memory, tmp_path):
    address = memory(THEIRS, "far/robot")
    near, far = formats.open_source(THEIRS), formats.open_source(address)
    assert (far.format, far.items, far.location) == ("lerobot", near.items, address)
    assert list(far.tasks) == ["lerobot/robot"]
    for a, b in zip(near.read(), far.read(), strict=True):
        for path, values in a.observations.items():
            assert np.array_equal(values, b.observations[path])
    names = sizes(tmp_path / "cache" / "remote")
    assert any(name.endswith(".mp4") for name in names)
    assert not any(name.endswith("front.npz") for name in names)


def test_lines_of_text_come_through_the_command_line(web, tmp_path, capsys):
    lines = [json.dumps({"text": f"the {i}. line"}) for i in range(60)]
    (web.folder / "lines.jsonl").write_text("\n".join(lines))
    address = f"{web.address}/lines.jsonl"
    assert cli.main(["data", "info", address, "--json", "--cache-gb", "0.5"]) == 0
    told = json.loads(capsys.readouterr().out)[0]
    assert (told["items"], told["location"]) == (60, address)
    out = tmp_path / "store"
    assert cli.main(["data", "import", address, "--out", str(out)]) == 0
    assert RecordStore(out)[59]["text"] == "the 59. line"
    assert json.loads((out / "import.json").read_text())["location"] == address
    assert remote.file_cache().limit == 500_000_000
    downloads = [path for path in web.asked if path == "/lines.jsonl"]
    assert len(downloads) == 1


@pytest.mark.parametrize("lists", [True, False])
def test_a_dataset_on_the_web(web, lists, capsys, tmp_path):
    web.handler.lists = lists
    shutil.copytree(THEIRS, web.folder / "robot")
    source = formats.open_source(f"{web.address}/robot")
    assert [len(e) for e in source.read()] == [10, 12, 14, 16, 8, 10]
    out = str(tmp_path / "out")
    assert cli.main(["data", "import", f"{web.address}/robot", "--out", out, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kept"] == 6
    downloads = [path for path in web.asked if path.endswith(".mp4")]
    assert len(downloads) == len(set(downloads)) == 2


def test_what_changed_is_fetched_again_and_nothing_else(memory, tmp_path):
    (tmp_path / "data").mkdir()
    for name in ("a.txt", "b.txt"):
        (tmp_path / "data" / name).write_text("as it was")
    address = memory(tmp_path / "data", "far/data")
    folder = remote.fetch(address)
    assert (folder / "a.txt").read_text() == "as it was"
    before = {n: (folder / n).stat().st_mtime_ns for n in ("a.txt", "b.txt")}
    old = remote.fingerprint(address)
    fsspec.filesystem("memory").pipe_file("/far/data/a.txt", b"as it is now")
    assert remote.fetch(address) == folder
    assert (folder / "a.txt").read_text() == "as it is now"
    assert (folder / "b.txt").stat().st_mtime_ns == before["b.txt"]
    assert remote.fingerprint(address) != old


def test_an_import_from_afar_is_made_once(memory, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.jsonl").write_text('{"text": "one of two"}\n{"text": "another"}\n')
    address = memory(tmp_path / "data", "far/lines")
    first = importing.cached(address)
    assert len(RecordStore(first)) == 2
    stamp = (first / "manifest.json").stat().st_mtime_ns
    assert importing.cached(address) == first
    assert (first / "manifest.json").stat().st_mtime_ns == stamp
    fsspec.filesystem("memory").pipe_file("/far/lines/a.jsonl", b'{"text": "now only one"}\n')
    assert len(RecordStore(importing.cached(address))) == 1


def test_what_is_not_there_or_out_of_reach_is_told(web, memory, capsys):
    with pytest.raises(ValueError, match="files at memory://far/none; there are none"):
        remote.fetch("memory://far/none")
    with pytest.raises(ValueError, match=f"expected a file at {web.address}/none.jsonl"):
        remote.fetch(f"{web.address}/none.jsonl")
    with pytest.raises(ValueError, match="a store or a folder of stores at memory://far/none"):
        mirror.local("memory://far/none")
    web.stop()
    assert cli.main(["data", "import", f"{web.address}/x.jsonl", "--out", "unused"]) == 1
    said = capsys.readouterr().err
    assert f"cannot reach {web.address}" in said
    assert "Check the address and the network" in said
    assert "Traceback" not in said


def test_without_a_network_what_was_fetched_is_used(stores, web):
    shutil.copytree(stores / "arm", web.folder / "arm")
    address = f"{web.address}/arm"
    store = open_store(mirror.local(address))
    store.episode(0)
    (web.folder / "a.txt").write_text("words")
    remote.fetch(f"{web.address}/a.txt")
    web.stop()
    with pytest.warns(UserWarning, match=r"cannot reach .*Going on with what was fetched before"):
        again = open_store(mirror.local(address))
    assert np.array_equal(again.episode(0).rewards, store.episode(0).rewards)
    with pytest.raises(ConnectionError, match="cannot reach"):
        again.episode(len(again) - 1)
    with pytest.warns(UserWarning, match="fetched before"):
        assert remote.fetch(f"{web.address}/a.txt").read_text() == "words"


class Refusing(fsspec.AbstractFileSystem):
    """A file system that answers everything with one error."""

    protocol = "refusing"
    cachable = False
    error: Exception = PermissionError("403, sign in")

    def info(self, path: str, **_: Any) -> Any:
        raise self.error

    ls = cat_file = _open = info


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (PermissionError("403, sign in"), "no access to refusing://far.*Sign in as"),
        (ImportError("no module named that"), "refusing:// needs a package of its own"),
    ],
)
def test_what_we_may_not_see_is_not_called_missing(error, told, monkeypatch, capsys):
    fsspec.register_implementation("refusing", Refusing, clobber=True)
    monkeypatch.setattr(Refusing, "error", error)
    folder = remote.RemoteFolder("refusing://far/data")
    for ask in (
        lambda: folder.read("manifest.json"),
        lambda: folder.exists("a"),
        lambda: mirror.local("refusing://far/data"),
    ):
        with pytest.raises(ValueError, match=told):
            ask()
    for command in ("info", "validate"):
        assert cli.main(["data", command, "refusing://far/data"]) == 2
        assert re.search(told, capsys.readouterr().err)
    monkeypatch.setattr(Refusing, "error", PermissionError("may not list"))
    with pytest.raises(ValueError, match="no access to refusing://far/data: may not list"):
        folder.glob("*.tar")
    monkeypatch.setattr(Refusing, "error", FileNotFoundError("nothing"))
    assert folder.read("manifest.json") is None
    assert not folder.exists("a")
    assert folder.glob("*.tar") == []


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(ValueError, match=r's3:// needs a package of its own: .*install "s3fs"'):
        remote.fetch("s3://bucket/data")
    with pytest.raises(ValueError, match="nowhere"):
        remote.fetch("nowhere://bucket/data")
    remote._fsspec.cache_clear()
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(ValueError, match=r'pip install "gato\[remote\]"'):
        remote.fetch("memory://far/data")
    remote._fsspec.cache_clear()


def test_names_that_lead_out_of_the_folder_and_passwords_in_addresses():
    for name in ("../x", "/etc/passwd", "a/../../x"):
        with pytest.raises(ValueError, match="below the data's folder"):
            remote.open_folder("memory://far").file(name)
    assert remote.shown("https://me:secret@host/a?token=secret") == "https://host/a"


# the cache


def test_the_least_recently_used_goes_first(tmp_path, monkeypatch, at_once):
    monkeypatch.setattr(cache_module, "SPARE", 0.0)
    cache = Cache(tmp_path / "c")
    cache.set_limit(30e-9)
    for name in ("a", "b", "c"):
        cache.get("p", name, "1", write(name.encode() * 10))
        time.sleep(0.002)
    assert cache.has("p", "a")  # used once more: b is the oldest now
    cache.get("p", "d", "1", write(b"d" * 10))
    assert [n for n in "abcd" if (tmp_path / "c/p" / n).exists()] == ["a", "c", "d"]
    cache.set_limit(10e-9)
    assert [n for n in "abcd" if (tmp_path / "c/p" / n).exists()] == ["d"]


def test_a_size_that_nobody_told_counts_too(tmp_path, at_once):
    cache = Cache(tmp_path / "c")
    cache.set_limit(25e-9)
    cache.get("p", "a", "1", write(b"a" * 20, told=False))
    cache.get("p", "b", "1", write(b"b" * 20, told=False))
    assert cache.used() == 20
    with pytest.raises(ValueError, match=r"may hold 2.5e-08 GB.*--cache-gb"):
        cache.get("p", "c", "1", write(b"c" * 30, told=False))
    assert not list((tmp_path / "c/p").glob("*c*"))


def test_a_content_of_unknown_size_never_takes_more_than_the_bound(tmp_path, at_once):
    cache, most = Cache(tmp_path / "c"), 0
    cache.set_limit(1e-3)
    cache.get("p", "old", "1", write(b"o" * 500_000))
    cache.get("p", "small", "1", write(b"s" * 300_000))

    def download(file: BinaryIO, reserve: Callable[[int], None]) -> None:
        nonlocal most
        for _ in range(200):
            file.write(b"x" * 50_000)
            file.flush()
            found = (f.stat().st_size for f in (tmp_path / "c/p").iterdir() if f.is_file())
            most = max(most, sum(found))

    with pytest.raises(ValueError, match=r"may hold 0.001 GB, and at least 0.001.* --cache-gb"):
        cache.get("p", "endless", "1", download)
    assert 900_000 < most <= 1_000_000
    assert not list((tmp_path / "c/p").glob("*endless*"))


def test_what_is_told_to_be_too_large_removes_nothing(tmp_path, at_once):
    cache = Cache(tmp_path / "c")
    cache.set_limit(30e-9)
    cache.get("p", "a", "1", write(b"a" * 20))
    with pytest.raises(ValueError, match="--cache-gb"):
        cache.get("p", "b", "1", write(b"b" * 31))
    assert sizes(tmp_path / "c/p") == {"a": 20}


def test_a_web_server_that_tells_no_size(web, cache, at_once):
    held: list[int] = []

    def chunked(self: Quiet) -> None:
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        with contextlib.suppress(OSError):  # the other end has heard enough
            for _ in range(40 if self.path == "/long.bin" else 1):
                self.wfile.write(b"80000\r\n" + b"x" * 0x80000 + b"\r\n")
                held.append(cache.used())
            self.wfile.write(b"0\r\n\r\n")

    web.handler.protocol_version, web.handler.do_GET = "HTTP/1.1", chunked
    web.handler.do_HEAD = lambda self: self.send_error(405)
    cache.set_limit(0.01)
    fitting = remote.RemoteFolder(f"{web.address}/short.bin").file("")
    assert fitting.stat().st_size == 0x80000
    with pytest.raises(ValueError, match=r"long.bin: the cache at .* may hold 0.01 GB.*--cache-gb"):
        remote.RemoteFolder(f"{web.address}/long.bin").file("")
    assert 0 < max(held) <= 10_000_000
    assert not list(cache.root.rglob("*long.bin*"))


def test_a_full_cache_is_walked_once_for_many_files(tmp_path, monkeypatch, at_once):
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    cache, walks = Cache(tmp_path / "c"), []
    files = Cache._files
    monkeypatch.setattr(Cache, "_files", lambda self: walks.append(1) or files(self))
    cache.set_limit(1e-6)
    for i in range(300):
        cache.get("p", f"{i}", "1", write(b"x" * 10))
    assert len(walks) <= 2 + 200 / 10  # a tenth of the 100 files that it holds goes at once
    left = [f"{i}" for i in range(300) if (tmp_path / "c/p" / f"{i}").exists()]
    assert 90 <= len(left) <= 100
    assert left[-1] == "299"
    stamps = {f.name for f in (tmp_path / "c/p/.stamps").iterdir()}
    assert stamps == set(left)


def test_what_was_used_lately_does_not_go_for_spare_room(tmp_path, monkeypatch):
    cache = Cache(tmp_path / "c")
    cache.set_limit(100e-9)
    monkeypatch.setattr(cache_module, "GRACE", 0.05)
    monkeypatch.setattr(cache_module, "SETTLED", 1000.0)
    for i in range(10):
        cache.get("p", f"{i}", "1", write(b"x" * 10))
    time.sleep(0.1)
    cache.get("p", "more", "1", write(b"x" * 10))
    assert cache.used() == 100  # one went, and not two


def test_what_is_held_or_just_used_stays(tmp_path, monkeypatch, at_once):
    cache = Cache(tmp_path / "c")
    cache.set_limit(30e-9)
    cache.hold("mine")
    cache.get("mine", "a", "1", write(b"a" * 20))
    cache.get("other", "b", "1", write(b"b" * 10))
    cache.get("other", "c", "1", write(b"c" * 10))
    assert cache.has("mine", "a")
    assert not cache.has("other", "b")
    with pytest.raises(ValueError, match="--cache-gb"):
        cache.get("other", "d", "1", write(b"d" * 20))
    monkeypatch.setattr(cache_module, "GRACE", 0.4)
    cache.get("other", "c", "1", write(b"c" * 10))
    began = time.monotonic()
    cache.get("other", "e", "1", write(b"e" * 10))  # waits until c may go
    assert time.monotonic() - began > 0.2
    assert not cache.has("other", "c")


def test_a_checksum_is_tried_twice(tmp_path):
    cache, contents = Cache(tmp_path / "c"), [b"bad", b"good"]
    good = "770e607624d689265ca6c44884d0807d9b054d23c473c106c72be9de08b7376c"

    def download(file: BinaryIO, reserve: Callable[[int], None]) -> None:
        file.write(contents.pop(0))

    assert cache.get("p", "a", "1", download, sha256=good).read_bytes() == b"good"
    with pytest.raises(ValueError, match=r"expected sha256 770e607624d6 for b; got .*, twice"):
        cache.get("p", "b", "1", write(b"bad"), sha256=good)
    assert not cache.has("p", "b")


def test_a_download_that_fails_leaves_nothing(tmp_path):
    cache = Cache(tmp_path / "c")

    def download(file: BinaryIO, reserve: Callable[[int], None]) -> None:
        file.write(b"some")
        raise ConnectionError("gone")

    with pytest.raises(ConnectionError):
        cache.get("p", "a", "1", download)
    assert cache.used() == 0
    cache.get("p", "a", "1", write(b"all"))
    with pytest.raises(ConnectionError):
        cache.get("p", "a", "2", download)
    assert (tmp_path / "c/p/a").read_bytes() == b"all"  # what was there is still there
    assert not cache.has("p", "a", "2")


SAMPLING = """
import sys, time
import numpy as np
from gato.envs import cache, mirror
from gato.envs.store import EpisodeStore, open_store

cache.GRACE, mirror._CHECKED = 0.4, 0.1
here = EpisodeStore(sys.argv[1])
there = open_store(mirror.local("file://" + sys.argv[1]))
rng, end = np.random.default_rng(int(sys.argv[2])), time.monotonic() + 2
while time.monotonic() < end:
    i = int(rng.integers(len(here)))
    got, wanted = there.episode(i).observations, here.episode(i).observations
    assert all(np.array_equal(got[path], values) for path, values in wanted.items())
"""


def test_two_processes_share_a_cache_that_is_too_small_for_both(stores, cache):
    source = stores / "grid"
    bound = int(0.7 * sum(sizes(source).values()))
    cache.set_limit(bound / 1e9)
    command = [sys.executable, "-c", SAMPLING, str(source)]
    both = [subprocess.Popen([*command, str(seed)]) for seed in range(2)]
    most = 0
    while any(process.poll() is None for process in both):
        most = max(most, cache.used())
        time.sleep(0.05)
    assert [process.returncode for process in both] == [0, 0]
    assert bound / 2 < most <= bound


SLOWLY = """
import sys, time
from pathlib import Path
from gato.envs.cache import Cache

def download(file, reserve):
    reserve(1000 * int(sys.argv[3]))
    with open(sys.argv[2], "a") as log:
        log.write("x")
    for _ in range(int(sys.argv[3])):
        file.write(b"a" * 1000)
        file.flush()
        time.sleep(0.01)

print("ready", flush=True)
Cache(Path(sys.argv[1])).get("p", "a", "1", download)
"""


def fetching(tmp_path: Path, blocks: int) -> subprocess.Popen:
    command = [sys.executable, "-c", SLOWLY, str(tmp_path / "c"), str(tmp_path / "log")]
    return subprocess.Popen([*command, str(blocks)], stdout=subprocess.PIPE)


def test_two_processes_fetch_a_file_once(tmp_path):
    both = [fetching(tmp_path, 30) for _ in range(2)]
    assert [p.wait(30) for p in both] == [0, 0]
    for process in both:
        process.stdout.close()
    assert (tmp_path / "log").read_text() == "x"
    assert (tmp_path / "c/p/a").read_bytes() == b"a" * 30_000


def test_a_killed_download_leaves_no_file_and_is_done_anew(tmp_path):
    process = fetching(tmp_path, 5000)
    part = None
    while part is None:
        time.sleep(0.01)
        part = next(iter((tmp_path / "c").glob("p/.a.*.tmp")), None)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    cache = Cache(tmp_path / "c")
    assert part.exists()
    assert not cache.has("p", "a")
    assert cache.used() == 0  # what the dead were fetching is removed where room is counted
    assert not part.exists()
    cache.get("p", "a", "1", write(b"all"))
    assert sizes(tmp_path / "c/p") == {"a": 3}
