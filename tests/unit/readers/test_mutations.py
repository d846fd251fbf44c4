"""However a file of records is damaged: good records, BadItems or a ValueError, nothing else."""

from __future__ import annotations

import base64
import io
import json
import random
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from gato.envs.readers.formats import open_source
from gato.envs.readers.reader import BadItem
from gato.envs.records import check_record

ODD: list[Any] = [None, True, -1, 1e308, 10**30, "", "x", "../../etc/passwd", "\ud800"]
ODD += [[], {}, [1], {"a": 1}, [[["x"]]]]
TIMES = 300


@pytest.fixture
def files(tmp_path: Path, shown) -> dict[str, Path]:
    """Return a file of each format."""
    raw = shown[0].encoded()
    (tmp_path / "x.png").write_bytes(raw)
    uri = "data:image/png;base64," + base64.b64encode(raw).decode()
    picture = {"type": "image_url", "image_url": {"url": uri}}
    talk = [
        {"role": "user", "content": [picture, {"type": "text", "text": "what?"}]},
        {"role": "assistant", "content": "a box"},
    ]
    question = {"image": "x.png", "question": "what?", "answer": ["a box", "a box", "red"]}
    images = [{"id": 1, "file_name": "x.png"}]
    captions = {"images": images, "annotations": [{"image_id": 1, "caption": "a box"}]}
    table = pa.table({"image": [{"bytes": raw, "path": None}] * 3, "text": ["a", "b", "c"]})
    found = {name: tmp_path / f"captions_{name}" for name in ("text", "chat", "vqa", "coco")}
    found = {name: path.with_suffix(".json") for name, path in found.items()}
    found["text"].write_text(json.dumps([{"text": "one"}, {"text": "two"}]))
    found["chat"].write_text(json.dumps([{"messages": talk}]))
    found["vqa"].write_text(json.dumps([question]))
    found["coco"].write_text(json.dumps(captions))
    found["hub"] = tmp_path / "a.arrow"
    with pa.ipc.new_stream(found["hub"], table.schema) as writer:
        writer.write_table(table)
    found["hub "] = tmp_path / "a.parquet"
    parquet.write_table(table, found["hub "])
    found["webdataset"] = tmp_path / "a.tar"
    with tarfile.open(found["webdataset"], "w") as archive:
        for name, content in (("1.png", raw), ("1.txt", b"a"), ("2.json", b'{"text": "b"}')):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return found


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """Yield the way to every value inside a JSON value."""
    yield path
    keys = value if isinstance(value, dict) else range(len(value) if isinstance(value, list) else 0)
    for key in keys:
        yield from places(value[key], (*path, key))


def another_json(raw: bytes, rng: random.Random) -> bytes:
    """Return JSON with one value changed or left out."""
    value = json.loads(raw)
    *way, last = rng.choice([p for p in places(value) if p])
    inner = value
    for key in way:
        inner = inner[key]
    if rng.random() < 0.3:
        del inner[last]
    else:
        inner[last] = rng.choice(ODD)
    return json.dumps(value).encode()


def other_bytes(raw: bytes, rng: random.Random) -> bytes:
    """Return bytes with some changed, and perhaps the end cut off."""
    changed = bytearray(raw)
    for _ in range(rng.choice((0, 1, 3, 20))):
        changed[rng.randrange(len(changed))] = rng.randrange(256)
    return bytes(changed[: rng.randrange(len(changed)) if rng.random() < 0.3 else None])


CASES = [(name, another_json) for name in ("text", "chat", "vqa", "coco")]
CASES += [(name, other_bytes) for name in ("text", "chat", "vqa", "coco", "webdataset")]
CASES += [("hub", other_bytes), ("hub ", other_bytes)]


@pytest.mark.parametrize(("name", "change"), CASES)
def test_damage_is_told(name: str, change: Callable[..., bytes], files):
    path, rng, told = files[name], random.Random(0), 0
    raw = path.read_bytes()
    for _ in range(TIMES):
        path.write_bytes(change(raw, rng))
        try:
            items = list(open_source(path, name.strip()).read())
        except ValueError:
            told += 1
            continue
        for item in items:
            if isinstance(item, BadItem):
                assert item.where.startswith(str(path))
                assert item.reason
            else:
                check_record(item)
        told += any(isinstance(item, BadItem) for item in items)
    assert told > TIMES // 10
