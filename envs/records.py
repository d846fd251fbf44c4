"""Record stores: examples of language and vision on disk.

A store is a folder with

```
manifest.json                name, number of records, checksums
records.jsonl                one record per line; an image is {"shape": [H, W, C], "row": k}
records.ends.npy             where each line ends, so that one is read without the others
records.groups.npy           which records belong together, by number; missing where none do
images-<H>x<W>x<C>.npy       the distinct images of one size, uint8
```

A record is one of

```
{"kind": "document", "text": str}
{"kind": "caption", "image": uint8 (H, W, 3), "text": str}
{"kind": "pairs", "pairs": [{"image": uint8 (H, W, 3), "text": str}, ...]}
{"kind": "conversation", "messages": [{"role": "system" | "user" | "assistant", "content":
    [{"type": "image", "image": uint8 (H, W, 3)} | {"type": "text", "text": str}, ...]}, ...]}
```

and may carry a JSON-able "meta" dict. H and W are multiples of 16. Records whose first image is the
same belong together, and so do those of one ``meta["group"]``: what is held out for validation is
held out whole. The store appears under its
name only when it is complete.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import math
from array import array
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np

from gato.envs.columns import array_in, check_array, damaged, read_bytes, read_rows
from gato.envs.files import (
    array_bytes,
    atomic_file,
    check_sha256,
    read_manifest,
    write_atomically,
)

FORMAT = "gato-records-1"
ROLES = ("system", "user", "assistant")
PATCH = 16
LINES, ENDS, GROUPS = "records.jsonl", "records.ends.npy", "records.groups.npy"


class RecordWriter:
    """Writes a store from its first record to its last; closing it makes it readable.

    Used as a context manager it discards everything where the block raises. It remembers every
    distinct image by its digest, in about 140 bytes of memory: 1.4 GB of ten million images.
    """

    def __init__(self, path: str | Path, name: str) -> None:
        self.path, self.name = Path(path), name
        self.path.mkdir(parents=True, exist_ok=True)
        (self.path / "manifest.json").unlink(missing_ok=True)  # an older store of the same name
        self._stack = ExitStack()
        self._records = self._stack.enter_context(atomic_file(self.path / LINES))
        self._ends = array("q")  # of lines
        self._images: dict[tuple[int, ...], BinaryIO] = {}
        self._rows: dict[tuple[int, ...], dict[bytes, int]] = {}
        self._groups, self._numbers = array("q"), dict[bytes, int]()  # of records, by what is one
        self._next, self._first = 0, b""  # number of a group; digest of the record's first image

    def __len__(self) -> int:
        return len(self._ends)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is None:
            self.close()
        else:
            self._stack.__exit__(kind, *rest)

    def append(self, record: Mapping[str, Any]) -> None:
        """Add a record.

        Raises:
            ValueError: for a record of another form; nothing is added then.
        """
        check_record(record)
        told = (record.get("meta") or {}).get("group")
        self._first = b""
        line = json.dumps(_map_images(record, self._enter), ensure_ascii=False)
        self._records.write(line.encode() + b"\n")
        self._ends.append(self._records.tell() - 1)
        same = self._first if told is None else json.dumps(told, sort_keys=True).encode()
        # in order of appearance, so that groups keep their numbers where more records follow
        number = self._numbers.setdefault(same, self._next) if same else self._next
        self._groups.append(number)
        self._next += number == self._next

    def close(self) -> None:
        """Complete the store; without this it does not exist."""
        for shape, file in self._images.items():
            file.seek(0)
            _write_header(file, len(self._rows[shape]), shape)
        self._stack.close()
        write_atomically(self.path / ENDS, array_bytes(np.array(self._ends, np.int64)))
        names = [LINES, ENDS, *(_image_file(shape) for shape in self._images)]
        (self.path / GROUPS).unlink(missing_ok=True)
        if self._next < len(self):
            write_atomically(self.path / GROUPS, array_bytes(np.array(self._groups, np.int64)))
            names.append(GROUPS)
        manifest = {
            "format": FORMAT,
            "name": self.name,
            "records": len(self),
            "sha256": {n: _sha256(self.path / n) for n in names},
        }
        write_atomically(self.path / "manifest.json", json.dumps(manifest, indent=1).encode())

    def _enter(self, image: np.ndarray) -> dict[str, Any]:
        """Return where `image` is kept; equal images are kept once."""
        shape = image.shape
        if shape not in self._images:
            file = self._stack.enter_context(atomic_file(self.path / _image_file(shape)))
            _write_header(file, 0, shape)
            self._images[shape], self._rows[shape] = file, {}
        rows, content = self._rows[shape], np.ascontiguousarray(image).tobytes()
        digest = hashlib.sha256(content).digest()
        self._first = self._first or digest
        if digest not in rows:
            self._images[shape].write(content)
            rows[digest] = len(rows)
        return {"shape": list(shape), "row": rows[digest]}


class RecordStore:
    """Reads a store; ``store[i]`` is a record, read without the others, its images read-only."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.manifest = read_manifest(self.path, FORMAT)
        self.name: str = self.manifest["name"]
        self._ends: np.ndarray | None = None
        file = self.path / LINES
        if not file.is_file():
            raise ValueError(
                f"expected records in {file}; it is missing. The store is damaged: make it again."
            )
        if ENDS in self.manifest["sha256"]:
            check_array(self.path / ENDS, np.int64, (len(self),))
        else:  # a store of before these were written
            self._ends = _line_ends(file)
        end = self._line_span(len(self) - 1)[1] + 1 if len(self) else 0
        if file.stat().st_size != end or not (self._ends is None or len(self._ends) == len(self)):
            raise ValueError(
                f"expected {len(self)} records in {file} (sha256 {self._sum(LINES)}); "
                f"got {len(_line_ends(file))}. The store is damaged: make it again."
            )
        if GROUPS in self.manifest["sha256"]:
            check_array(self.path / GROUPS, np.int64, (len(self),))
        self._images: dict[str, tuple[int, ...]] = {}

    def __len__(self) -> int:
        return int(self.manifest["records"])

    def __repr__(self) -> str:
        return f"RecordStore({self.name!r}, {len(self)} records)"

    def __reduce__(self) -> tuple[type[RecordStore], tuple[Path]]:
        return RecordStore, (self.path,)

    def __getitem__(self, i: int) -> dict[str, Any]:
        if not -len(self) <= i < len(self):
            raise IndexError(f"expected a record in [0, {len(self)}); got {i}.")
        line = read_bytes(self.path / LINES, *self._line_span(int(i) % len(self)))
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(
                f"expected JSON in {self.path / LINES} (sha256 {self._sum(LINES)}), line {i + 1}; "
                f"{error}. The store is damaged: make it again."
            ) from error
        return _map_images(record, self._image)

    def words(self) -> Iterator[dict[str, Any]]:
        """Yield all records without their images, which are None: no image is read."""
        for _, record in self._lines():
            yield _map_images(record, lambda _: None)

    def _lines(self) -> Iterator[tuple[bytes, dict[str, Any]]]:
        """Yield all lines, and the records in them with the places of their images."""
        with (self.path / LINES).open("rb") as file:
            for number, line in enumerate(file):
                try:
                    record = json.loads(line)
                except ValueError:
                    record = self[number]  # says which line it is
                yield line, record

    def groups(self) -> np.ndarray:
        """Return int64 (records,): equal where records belong together, numbered as they appear.

        In stores of before these were written every record is on its own.
        """
        if GROUPS not in self.manifest["sha256"]:
            return np.arange(len(self))
        found = read_rows(self.path / GROUPS, np.int64, (len(self),))
        if len(found) and (found.min() < 0 or (found > np.arange(len(found))).any()):
            damaged(self.path / GROUPS, "its numbers are not those of groups")
        return found

    def validate(self) -> None:
        """Read everything once; raise ValueError at what is not as it was written."""
        self.check(checksums=True)
        self.groups()
        for record in self:
            check_record(record)

    def check(self, *, checksums: bool = False) -> None:
        """Raise ValueError where a file is damaged, as its size and header tell or all its bytes.

        Args:
            checksums: read every byte.
        """
        for name, written in self.manifest["sha256"].items():
            file = self.path / name
            if name.startswith("images-"):
                check_array(file, *array_in(file))
            if checksums:
                check_sha256(file, written)

    def sums_of_first(self, count: int) -> dict[str, str]:
        """Return the checksums that the manifest of a store of the first records alone has.

        These records are read, and their images.

        Args:
            count: how many; at least 1.
        """
        lines, ends, rows = hashlib.sha256(), array("q"), dict[str, int]()
        for line, record in itertools.islice(self._lines(), count):
            lines.update(line)
            ends.append((ends[-1] + 1 if ends else 0) + len(line) - 1)
            where: Any  # an image is kept
            for where in images_of(record):
                name = _image_file(where["shape"])
                rows[name] = max(rows.get(name, 0), where["row"] + 1)
        arrays = {ENDS: np.array(ends, np.int64)}
        groups = self.groups()[:count]
        if groups.max() + 1 < count:
            arrays[GROUPS] = groups
        sums = {n: hashlib.sha256(array_bytes(a)).hexdigest() for n, a in arrays.items()}
        images = {name: _sum_of_rows(self.path / name, n) for name, n in rows.items()}
        return {LINES: lines.hexdigest(), **sums, **images}

    def _sum(self, name: str) -> str:
        return str(self.manifest["sha256"].get(name, "unknown"))[:12]

    def _line_span(self, i: int) -> tuple[int, int]:
        first = max(i - 1, 0)
        if self._ends is not None:
            ends = self._ends[first : i + 1].tolist()
        else:
            ends = read_rows(self.path / ENDS, np.int64, (len(self),), first, i + 1).tolist()
        return (ends[0] + 1 if i else 0), ends[-1]

    def _image(self, where: Mapping[str, Any]) -> np.ndarray:
        name, row = _image_file(where["shape"]), where["row"]
        file = self.path / name
        if name not in self._images:
            self._images[name] = array_in(file)[1]
        image: np.ndarray = read_rows(file, np.uint8, self._images[name], row, row + 1)[0]
        return image


def _line_ends(file: Path) -> np.ndarray:
    """Return where the lines of a file end."""
    parts, at = [np.zeros(0, np.int64)], 0
    with file.open("rb") as lines:
        while chunk := lines.read(16 << 20):
            parts.append(np.flatnonzero(np.frombuffer(chunk, np.uint8) == ord("\n")) + at)
            at += len(chunk)
    return np.concatenate(parts)


def check_record(record: Mapping[str, Any]) -> None:
    """Raise ValueError where `record` is none of the forms above."""
    kind = record.get("kind")
    fields = {
        "document": {"text"},
        "caption": {"image", "text"},
        "pairs": {"pairs"},
        "conversation": {"messages"},
    }
    if kind not in fields:
        raise ValueError(f"expected a record of kind {', '.join(fields)}; got {kind!r}.")
    if record.keys() - {"meta"} != fields[kind] | {"kind"}:
        raise ValueError(f"expected {sorted(fields[kind])} in a {kind}; got {sorted(record)}.")
    if "text" in record and not isinstance(record["text"], str):
        raise ValueError(f"expected a str as text of a {kind}; got {type(record['text'])}.")
    if "image" in record:
        _check_image(record["image"])
    for pair in record.get("pairs", ()):
        if not isinstance(pair, Mapping) or pair.keys() != {"image", "text"}:
            raise ValueError(f"expected an image and its text in a pair; got {pair!r:.200}.")
        check_record({"kind": "caption", **pair})
    for message in record.get("messages", ()):
        if message.get("role") not in ROLES:
            raise ValueError(f"expected a role of {ROLES}; got {message.get('role')!r}.")
        for part in message["content"]:
            match part:
                case {"type": "text", "text": str()}:
                    pass
                case {"type": "image", "image": image}:
                    _check_image(image)
                case _:
                    raise ValueError(f"expected a part with text or an image; got {part!r:.200}.")


def _check_image(image: Any) -> None:
    good = isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3
    if not good or image.shape[2] != 3 or any(n == 0 or n % PATCH for n in image.shape[:2]):
        got = f"{image.dtype} {image.shape}" if isinstance(image, np.ndarray) else type(image)
        raise ValueError(
            f"expected an image uint8 (H, W, 3), H and W multiples of {PATCH}; got {got}."
        )


def images_of(record: Mapping[str, Any]) -> Iterator[np.ndarray]:
    """Yield the images of a record, in their order."""
    if "image" in record:
        yield record["image"]
    for pair in record.get("pairs", ()):
        yield from images_of(pair)
    for message in record.get("messages", ()):
        for part in message["content"]:
            if not isinstance(part, str):  # words alone, as people write messages
                yield from images_of(part)


def _map_images(record: Mapping[str, Any], change: Callable[[Any], Any]) -> dict[str, Any]:
    """Return `record` with every image changed."""
    if "image" in record:
        return {**record, "image": change(record["image"])}
    if "pairs" in record:
        return {**record, "pairs": [_map_images(pair, change) for pair in record["pairs"]]}
    if "messages" not in record:
        return dict(record)
    messages = [
        {**m, "content": [_map_images(part, change) for part in m["content"]]}
        for m in record["messages"]
    ]
    return {**record, "messages": messages}


def _image_file(shape: Any) -> str:
    return f"images-{'x'.join(str(n) for n in shape)}.npy"


def _sum_of_rows(path: Path, rows: int) -> str:
    """Return the checksum of a file of images that ends after so many."""
    shape, header = array_in(path)[1], io.BytesIO()
    _write_header(header, rows, shape[1:])
    digest, step = hashlib.sha256(header.getvalue()), (16 << 20) // math.prod(shape[1:]) + 1
    for start in range(0, rows, step):
        digest.update(read_rows(path, np.uint8, shape, start, min(start + step, rows)))
    return digest.hexdigest()


def _write_header(file: BinaryIO, rows: int, shape: tuple[int, ...]) -> None:
    # numpy pads headers so that the first dimension may grow in place.
    header = {"descr": "|u1", "fortran_order": False, "shape": (rows, *shape)}
    np.lib.format.write_array_header_1_0(file, header)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
