"""Captioned pictures as COCO has them: ``captions_train2017.json`` and a folder of pictures.

    {"images": [{"id": 9, "file_name": "000000000009.jpg"}, ...],
     "annotations": [{"image_id": 9, "caption": "a plate of food"}, ...]}

Every caption is a record of its own, in the order of the pictures; COCO has five for each.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from gato.envs.readers.json_stream import first_value, json_values
from gato.envs.readers.pictures import note, read_picture
from gato.envs.readers.reader import BadItem, ReadOptions, Source
from gato.envs.readers.untrusted import READ_ERRORS, below, check_options, checked_text, files

FORMAT = "coco"
EXTRA = ""
IGNORES = ("clip_actions",)
BESIDE = True
_KEYS = {"info", "licenses", "images", "annotations", "type"}


@dataclass
class Index:
    """What a file of captions says, without its pictures."""

    names: dict[Hashable, Any] = field(default_factory=dict)
    """File name by image id."""
    captions: dict[Hashable, list[Any]] = field(default_factory=dict)
    """By image id."""
    bad: list[BadItem] = field(default_factory=list)
    others: set[str] = field(default_factory=set)
    """Fields that are left out."""


def recognises(location: str) -> bool:
    """Return whether there is a file called captions_*.json, or one that begins as COCO's do."""
    if Path(location).is_dir():
        return bool(_caption_files(location, glance=True))
    found = files(location, (".json",))
    return bool(found) and _is_captions(found[0])


def open_source(location: str, options: ReadOptions) -> Source:
    """Return the captioned pictures of one file of captions."""
    check_options(options, FORMAT, (), splits=True)
    path = choose_split(location, _caption_files(location), options.split)
    index = _index(path)
    subset = path.name.removesuffix(".gz").removesuffix(".json").removeprefix("captions_")
    folder = picture_folder(location, path, subset, index.names.values())
    without = sum(i not in index.captions for i in index.names)
    captions = sum(len(c) for i, c in index.captions.items() if i in index.names)
    notes = [
        f"pictures in {folder}: {len(index.names)}; captions in {path}: {captions}",
        note(options),
    ]
    if without:
        notes.append(f"pictures without a caption, left out: {without}")
    fields = {"images.file_name": "image", "annotations.caption": "text"}
    return Source(
        FORMAT,
        location,
        "records",
        partial(_read, path, index, folder, options),
        items=captions,
        fields=fields | {name: "left out" for name in sorted(index.others)},
        notes=notes,
        counts=Counter(),
    )


def choose_split(location: str, paths: list[Path], split: str) -> Path:
    """Return the one of `paths` whose name tells of a split; the only one there is, for "train".

    Raises:
        ValueError: where there is none, or more than one.
    """
    if not paths:
        raise ValueError(f"expected a file of annotations in JSON at {location}; found none.")
    fit = [p for p in paths if split in p.name]
    if not fit and len(paths) == 1 and split == "train":
        fit = paths
    if len(fit) != 1:
        names = ", ".join(p.name for p in (fit or paths)[:10])
        raise ValueError(
            f"expected one file of split {split!r} at {location}; got {len(fit)} of {names}. "
            f"Choose with --split, or name the file."
        )
    return fit[0]


def picture_folder(location: str, annotations: Path, subset: str, names: Iterable[Any]) -> Path:
    """Return the folder that holds the pictures of a file of annotations.

    Args:
        location: what the user named.
        annotations: the file; pictures are looked for beside it and one folder up.
        subset: what such a folder may be called: ``train2017``; ``train`` is looked for too.
        names: files of pictures; the first few decide.

    Raises:
        ValueError: where no folder has any of them.
    """
    above = annotations.absolute().parent
    roots = [Path(location)] if Path(location).is_dir() else []
    roots += [above] if above in [r.absolute() for r in roots] else [above, above.parent]
    called = (subset, subset.rstrip("0123456789"), "")
    inside = [Path(a) / b for a in ("", "images") for b in called]
    folders = [root / path for root in roots for path in inside if (root / path).is_dir()]
    some = [n for n, _ in zip(names, range(20), strict=False) if isinstance(n, str)]
    for folder in folders:
        for name in some:
            try:
                below(folder, name)
            except ValueError:
                continue
            return folder
    looked = ", ".join(str(f) for f in dict.fromkeys(folders))
    raise ValueError(
        f"expected the pictures of {annotations}, such as {some[:1]}, in one of {looked}; found "
        f"none. Put the folder of pictures beside it."
    )


def _caption_files(location: str, *, glance: bool = False) -> list[Path]:
    path = Path(location)
    if not path.is_dir():
        return files(location, (".json",))
    return [p for p in files(path, (".json",), glance=glance) if p.name.startswith("captions_")]


def _is_captions(path: Path) -> bool:
    if path.name.startswith("captions_"):
        return True
    key, value = first_value(path)
    if key not in _KEYS:
        return False
    seen = 0
    try:
        for key, value in json_values(path):
            if key == "annotations":
                return isinstance(value, dict) and "caption" in value
            seen += 1
            if seen > 2_000_000:
                break
    except (ValueError, *READ_ERRORS):
        pass
    return False


def _index(path: Path) -> Index:
    index, numbers = Index(), Counter[str]()
    for key, value in json_values(path):
        number = numbers[key]
        numbers[key] += 1
        where = f"{path}, {key} {number}"
        if key not in ("images", "annotations"):
            index.others.add(key)
            continue
        name = "file_name" if key == "images" else "caption"
        identity = "id" if key == "images" else "image_id"
        if not isinstance(value, Mapping) or name not in value:
            index.bad.append(BadItem(where, f"expected an object with {name!r}"))
            continue
        image = value.get(identity)
        if not isinstance(image, int | str):
            index.bad.append(BadItem(where, f"expected a number as {identity!r}"))
        elif key == "annotations":
            index.captions.setdefault(image, []).append(value[name])
        elif image in index.names:
            index.bad.append(BadItem(where, "expected another 'id' for each image"))
        else:
            index.names[image] = value[name]
        index.others.update(f"{key}.{n}" for n in value.keys() - {name, identity})
    if not numbers["annotations"] or not numbers["images"]:
        raise ValueError(
            f"expected images and annotations with captions in {path}; got {', '.join(numbers)}."
        )
    return index


def _read(
    path: Path, index: Index, folder: Path, options: ReadOptions
) -> Iterator[dict[str, Any] | BadItem]:
    yield from index.bad
    for image in (i for i in index.captions if i not in index.names):
        yield BadItem(f"{path}, image {image}", "captions of an image that is not listed")
    for image, name in index.names.items():
        captions = index.captions.get(image, ())
        where = f"{path}, image {image} ({name!s:.100})"
        try:
            picture = read_picture(below(folder, name), options) if captions else None
        except ValueError as error:
            yield from [BadItem(where, str(error))] * len(captions)
            continue
        for caption in captions:
            try:
                text = checked_text(caption, "caption").strip()
            except ValueError as error:
                yield BadItem(where, str(error))
                continue
            yield {"kind": "caption", "image": picture, "text": text}
