"""COCO's captions, as its download lays them out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gato.envs.readers.formats import open_source, recognise
from gato.envs.readers.importing import import_source
from gato.envs.readers.reader import ReadOptions
from gato.envs.store import open_store


def captions(shown: list, ids: range) -> dict[str, Any]:
    """Return a file of captions in COCO's documented form, five for each picture."""
    images = [
        {
            "license": 1,
            "file_name": f"{i:012d}.jpg",
            "coco_url": f"http://images.cocodataset.org/train2017/{i:012d}.jpg",
            "height": 32,
            "width": 48,
            "date_captured": "2013-11-14 11:18:45",
            "id": i,
        }
        for i in ids
    ]
    told = [
        {"image_id": i, "id": 1000 + 5 * i + k, "caption": f"{shown[i].text}, {word}.\n"}
        for k, word in enumerate(("seen", "found", "lost", "left", "put"))
        for i in ids
    ]
    about = {"year": 2017, "contributor": "COCO Consortium"}
    licences = [{"id": 1, "name": "Attribution"}]
    return {"info": about, "licenses": licences, "images": images, "annotations": told}


@pytest.fixture
def coco(tmp_path: Path, shown) -> Path:
    """Return a folder with 12 pictures for training and 2 for validation."""
    root = tmp_path / "coco"
    (root / "annotations").mkdir(parents=True)
    for split, ids in (("train2017", range(12)), ("val2017", range(20, 22))):
        (root / split).mkdir()
        for i in ids:
            (root / split / f"{i:012d}.jpg").write_bytes(shown[i].encoded("JPEG"))
        path = root / "annotations" / f"captions_{split}.json"
        path.write_text(json.dumps(captions(shown, ids)))
        other = {"images": [], "annotations": [{"image_id": 1, "bbox": [0, 0, 1, 1]}]}
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(other))
    return root


def test_every_caption_is_a_record(coco, shown, read):
    file = coco / "annotations" / "captions_train2017.json"
    assert recognise(str(coco)) == recognise(str(file)) == "coco"
    for location in (coco, file):
        source = open_source(location)
        assert source.items == 60
        assert source.fields["annotations.caption"] == "text"
        assert source.fields["images.coco_url"] == "left out"
        good, bad = read(location, image_size=(48, 32))
        assert not bad
        words = ("seen", "found", "lost", "left", "put")
        wanted = [f"{shown[i].text}, {word}." for i in range(12) for word in words]
        assert [r["text"] for r in good] == wanted
        for i, record in enumerate(good):
            assert record["kind"] == "caption"
            off = np.abs(record["image"].astype(int) - shown[i // 5].pixels)
            assert off.mean() < 25  # JPEG, of noise


def test_splits_are_chosen_by_name(coco, read):
    good, _ = read(coco, split="val")
    assert len(good) == 10
    assert len(read(coco, split="val2017")[0]) == 10
    with pytest.raises(ValueError, match=r"split 'test'.*captions_train2017\.json"):
        read(coco, split="test")


@pytest.mark.parametrize("place", ["images/train2017", "train", "images", "."])
def test_pictures_are_found_where_people_unpack_them(place, coco, read):
    (coco / place).parent.mkdir(exist_ok=True)
    if place == ".":
        for path in (coco / "train2017").iterdir():
            path.rename(coco / path.name)
    else:
        (coco / "train2017").rename(coco / place)
    good, bad = read(coco)
    assert (len(good), len(bad)) == (60, 0)


def test_the_folder_of_pictures_may_be_a_link(coco, tmp_path, read):
    (coco / "train2017").rename(tmp_path / "elsewhere")
    (coco / "train2017").symlink_to(tmp_path / "elsewhere")
    good, bad = read(coco)
    assert (len(good), len(bad)) == (60, 0)


def test_a_model_learns_from_it(coco, stored, trains):
    store = stored(coco, image_size=(32, 32))
    assert len(store) == 60
    assert len(np.load(store.path / "images-32x32x3.npy")) == 12  # each picture once
    first, last = trains(store.path)
    assert last < first / 2


def test_what_is_wrong_is_told_and_the_rest_is_read(coco, tmp_path, read, shown, bomb):
    path = coco / "annotations" / "captions_train2017.json"
    (tmp_path / "secret.jpg").write_bytes(shown[0].encoded("JPEG"))
    folder = coco / "train2017"
    (folder / f"{1:012d}.jpg").unlink()
    raw = (folder / f"{2:012d}.jpg").read_bytes()
    (folder / f"{2:012d}.jpg").write_bytes(raw[: len(raw) // 2])
    (folder / f"{3:012d}.jpg").write_bytes(bomb)
    data = json.loads(path.read_text())
    data["images"][4]["file_name"] = "../../secret.jpg"
    data["images"][5]["file_name"] = "/etc/passwd"
    data["images"][6]["file_name"] = ["x"]
    data["images"][7] = "x"
    data["images"].append({"id": 0, "file_name": "again.jpg"})
    data["images"].append({"id": 99, "file_name": f"{11:012d}.jpg"})
    told = {a["id"]: a for a in data["annotations"]}
    told[1000 + 5 * 8]["caption"] = 7
    told[1001 + 5 * 8]["caption"] = "\ud800"
    told[1002 + 5 * 8]["image_id"] = [8]
    told[1003 + 5 * 8]["image_id"] = 12345
    del told[1004 + 5 * 8]["caption"]
    data["annotations"] += [None, {"image_id": {}, "caption": "x"}]
    path.write_text(json.dumps(data))
    good, bad = read(coco)
    assert {r["text"].split(",")[0] for r in good} == {shown[i].text for i in (0, 9, 10, 11)}
    assert len(good) == 20
    reasons = [b.reason for b in bad]
    for said, times in (
        ("names no file", 5),
        ("damaged picture", 5),
        ("900000000", 5),
        ("leads out", 10),
        ("got list", 5),
        ("expected an object with 'file_name'", 1),
        ("another 'id'", 1),
        ("not listed", 2),  # all of picture 7, and one caption of 12345
        ("got int", 1),
        ("Unicode", 1),
        ("expected a number as 'image_id'", 2),
        ("expected an object with 'caption'", 2),
    ):
        assert sum(said in r for r in reasons) == times, said
    assert len(bad) == 40
    source = open_source(coco)
    assert "pictures without a caption, left out: 1" in source.notes
    with pytest.raises(ValueError, match=r"Leave such items out: --skip-bad"):
        import_source(source, tmp_path / "out")
    summary = import_source(source, tmp_path / "out", skip_bad=True)
    assert summary.kept == len(open_store(tmp_path / "out")) == 20
    assert sum(summary.skipped.values()) == 40


def test_what_is_no_file_of_captions_is_refused(tmp_path, coco):
    path = tmp_path / "captions_x.json"
    for content, said in (
        ("", "broken JSON"),
        ("[1, 2]", "expected images and annotations"),
        ('{"images": 7, "annotations": "x"}', "one of"),
        ('{"images": [], "annotations": []}', "expected images and annotations"),
        ('{"images": [{"id": 1, "file_name": "a.jpg"}]', "broken JSON"),
        ('{"images": [{"id": 1, "file_name": "a.jpg"}]}', "expected images and annotations"),
    ):
        path.write_text(content)
        with pytest.raises(ValueError, match=said):
            open_source(path, "coco")
    with pytest.raises(ValueError, match="found none"):
        open_source(coco / "train2017", "coco")
    file = coco / "annotations" / "captions_val2017.json"
    for picture in (coco / "val2017").iterdir():
        picture.unlink()
    with pytest.raises(ValueError, match="expected the pictures of"):
        open_source(file)
    with pytest.raises(ValueError, match="columns of none"):
        open_source(coco, options=ReadOptions(columns={"text": "caption"}))


def test_instances_are_no_captions(coco, read):
    path = coco / "annotations" / "instances_train2017.json"
    assert recognise(str(path)) == "text"  # as any JSON may hold text; this does not
    good, bad = read(path)
    assert not good
    assert bad[0].reason == "expected a list of objects; got an object"
