"""Records come back as they went in; an image is kept once."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest

from gato.envs.store import RecordStore, RecordWriter


def image(seed: int, height: int = 16, width: int = 32) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


RECORDS = [
    {"kind": "document", "text": "naïve 文\nsecond line\u2028third"},
    {"kind": "caption", "image": image(0), "text": "a picture", "meta": {"seed": 0}},
    {"kind": "caption", "image": image(1, 48, 16), "text": ""},
    {
        "kind": "conversation",
        "messages": [
            {"role": "system", "content": [{"type": "text", "text": "be brief"}]},
            {
                "role": "user",
                "content": [
                    {"type": "image", "image": image(0)},
                    {"type": "image", "image": image(2)},
                    {"type": "text", "text": "which?"},
                ],
            },
            {"role": "assistant", "content": [{"type": "text", "text": "both"}]},
        ],
    },
]


def write(path: Path) -> RecordStore:
    with RecordWriter(path, "sample") as writer:
        for record in RECORDS:
            writer.append(record)
    return RecordStore(path)


def test_records_come_back(tmp_path: Path) -> None:
    store = pickle.loads(pickle.dumps(write(tmp_path)))
    assert len(store) == 4
    assert store.name == "sample"
    for got, expected in zip(store, RECORDS, strict=True):
        np.testing.assert_equal(got, expected)
    np.testing.assert_equal(store[-1], RECORDS[-1])
    assert np.load(tmp_path / "images-16x32x3.npy").shape == (2, 16, 32, 3)  # one seen twice
    store.validate()


def test_writing_again_gives_the_same_bytes(tmp_path: Path) -> None:
    def tree() -> dict[str, bytes]:
        return {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    write(tmp_path)
    first = tree()
    write(tmp_path)
    assert tree() == first


def test_an_unfinished_store_does_not_exist(tmp_path: Path) -> None:
    def interrupted() -> None:
        with RecordWriter(tmp_path, "sample") as writer:
            writer.append(RECORDS[1])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="it has no manifest"):
        RecordStore(tmp_path)


@pytest.mark.parametrize(
    ("record", "match"),
    [
        ({"kind": "poem", "text": ""}, "kind document, caption, pairs, conversation; got 'poem'"),
        ({"kind": "document"}, r"expected \['text'\]"),
        ({"kind": "document", "text": 3}, "expected a str"),
        ({"kind": "document", "text": "", "extra": 1}, "extra"),
        ({"kind": "caption", "text": "", "image": image(0, 16, 20)}, "multiples of 16"),
        ({"kind": "caption", "text": "", "image": image(0).astype(float)}, "got float64"),
        ({"kind": "caption", "text": "", "image": [[0]]}, "got <class 'list'>"),
        ({"kind": "pairs", "pairs": [{"image": image(0)}]}, "an image and its text in a pair"),
        ({"kind": "pairs", "pairs": [{"image": image(0), "text": 1}]}, "expected a str"),
        ({"kind": "pairs", "pairs": [{"image": image(0, 8, 16), "text": ""}]}, "multiples of 16"),
        ({"kind": "conversation", "messages": [{"role": "bot", "content": []}]}, "got 'bot'"),
        (
            {"kind": "conversation", "messages": [{"role": "user", "content": [{"type": "a"}]}]},
            "text or an image",
        ),
    ],
)
def test_bad_records_are_refused(tmp_path: Path, record: dict, match: str) -> None:
    with RecordWriter(tmp_path, "sample") as writer:
        with pytest.raises(ValueError, match=match):
            writer.append(record)
        assert len(writer) == 0


def test_records_of_one_picture_or_text_are_a_group(tmp_path: Path) -> None:
    store = write(tmp_path)
    assert store.groups().tolist() == [0, 1, 2, 1]
    assert "records.groups.npy" in store.manifest["sha256"]
    plain = [{**RECORDS[0], "meta": {"group": g}} for g in ("a", "b", 1, "a", None, None)]
    with RecordWriter(tmp_path, "sample") as writer:
        for record in plain:
            writer.append(record)
    assert RecordStore(tmp_path).groups().tolist() == [0, 1, 2, 0, 3, 4]
    with RecordWriter(tmp_path, "sample") as writer:  # where none belong together, none is kept
        for record in RECORDS[:3]:
            writer.append(record)
    store = RecordStore(tmp_path)
    assert store.groups().tolist() == [0, 1, 2]
    assert not (tmp_path / "records.groups.npy").exists()
    store.validate()


@pytest.mark.parametrize("numbers", [[0, 1, 2, 9], [0, -1, 2, 1], [0, 1, 2]])
def test_damaged_groups_are_named(tmp_path: Path, numbers: list[int]) -> None:
    write(tmp_path)
    np.save(tmp_path / "records.groups.npy", np.array(numbers))
    with pytest.raises(ValueError, match=r"expected an array in .*records.groups.npy"):
        RecordStore(tmp_path).groups()
    with pytest.raises(ValueError, match=r"records.groups.npy"):
        RecordStore(tmp_path).validate()


def test_damage_is_named(tmp_path: Path) -> None:
    store = write(tmp_path)
    file = tmp_path / "images-16x32x3.npy"
    file.write_bytes(file.read_bytes()[:-1] + b"\0")
    with pytest.raises(ValueError, match=r"images-16x32x3.npy"):
        store.validate()
    lines = (tmp_path / "records.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "records.jsonl").write_bytes(b"".join(lines[:-1]))
    with pytest.raises(ValueError, match=r"expected 4 records .* got 3"):
        RecordStore(tmp_path)


def test_the_checksums_of_the_first_records_are_those_of_a_store_of_their_own(
    tmp_path: Path,
) -> None:
    store = write(tmp_path / "all")
    for count in range(1, 5):
        with RecordWriter(tmp_path / "some", "sample") as writer:
            for record in RECORDS[:count]:
                writer.append(record)
        manifest = RecordStore(tmp_path / "some").manifest
        assert store.sums_of_first(count) == manifest["sha256"]
