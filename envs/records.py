"""Record stores: examples of language and vision on disk.

A store is a folder with

```
manifest.json                name, number of records, checksums
records.jsonl                one record per line; an image is {"shape": [H, W, C], "row": k}
images-<H>x<W>x<C>.npy       the distinct images of one size, uint8, memory-mapped
```

A record is one of

```
{"kind": "document", "text": str}
{"kind": "caption", "image": uint8 (H, W, 3), "text": str}
{"kind": "conversation", "messages": [{"role": "system" | "user" | "assistant", "content":
    [{"type": "image", "image": uint8 (H, W, 3)} | {"type": "text", "text": str}, ...]}, ...]}
```

and may carry a JSON-able "meta" dict. H and W are multiples of 16. The store appears under its
name only when it is complete.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np

from gato.envs.files import (
    atomic_file,
    check_sha256,
    load_array,
    read_manifest,
    write_atomically,
)

FORMAT = "gato-records-1"
ROLES = ("system", "user", "assistant")
PATCH = 16


class RecordWriter:
    """Writes a store from its first record to its last; closing it makes it readable.

    Used as a context manager it discards everything where the block raises.
    """

    def __init__(self, path: str | Path, name: str) -> None:
        self.path, self.name = Path(path), name
        self.path.mkdir(parents=True, exist_ok=True)
        (self.path / "manifest.json").unlink(missing_ok=True)  # an older store of the same name
        self._stack = ExitStack()
        self._records = self._stack.enter_context(atomic_file(self.path / "records.jsonl"))
        self._images: dict[tuple[int, ...], BinaryIO] = {}
        self._rows: dict[tuple[int, ...], dict[bytes, int]] = {}
        self._count = 0

    def __len__(self) -> int:
        return self._count

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
        line = json.dumps(_map_images(record, self._enter), ensure_ascii=False)
        self._records.write(line.encode() + b"\n")
        self._count += 1

    def close(self) -> None:
        """Complete the store; without this it does not exist."""
        for shape, file in self._images.items():
            file.seek(0)
            _write_header(file, len(self._rows[shape]), shape)
        self._stack.close()
        names = ["records.jsonl", *(_image_file(shape) for shape in self._images)]
        manifest = {
            "format": FORMAT,
            "name": self.name,
            "records": self._count,
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
        if digest not in rows:
            self._images[shape].write(content)
            rows[digest] = len(rows)
        return {"shape": list(shape), "row": rows[digest]}


class RecordStore:
    """Reads a store; ``store[i]`` is a record, its images read-only views of the file."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.manifest = read_manifest(self.path, FORMAT)
        self.name: str = self.manifest["name"]
        file = self.path / "records.jsonl"
        if not file.is_file():
            raise ValueError(
                f"expected records in {file}; it is missing. The store is damaged: make it again."
            )
        self._lines = np.fromfile(file, np.uint8)
        self._ends = np.flatnonzero(self._lines == ord("\n"))
        if len(self._ends) != self.manifest["records"]:
            raise ValueError(
                f"expected {self.manifest['records']} records at {self.path}; "
                f"got {len(self._ends)}. The store is damaged: make it again."
            )
        self._images: dict[str, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self._ends)

    def __repr__(self) -> str:
        return f"RecordStore({self.name!r}, {len(self)} records)"

    def __reduce__(self) -> tuple[type[RecordStore], tuple[Path]]:
        return RecordStore, (self.path,)

    def __getitem__(self, i: int) -> dict[str, Any]:
        if not -len(self) <= i < len(self):
            raise IndexError(f"expected a record in [0, {len(self)}); got {i}.")
        i = int(i) % len(self)
        start = int(self._ends[i - 1]) + 1 if i else 0
        record = json.loads(self._lines[start : int(self._ends[i])].tobytes())
        return _map_images(record, self._image)

    def validate(self) -> None:
        """Read everything once; raise ValueError at what is not as it was written."""
        for name, expected in self.manifest["sha256"].items():
            check_sha256(self.path / name, expected)
        for record in self:
            check_record(record)

    def _image(self, where: Mapping[str, Any]) -> np.ndarray:
        name = _image_file(where["shape"])
        if name not in self._images:
            self._images[name] = load_array(self.path / name, mmap=True)
        return self._images[name][where["row"]]


def check_record(record: Mapping[str, Any]) -> None:
    """Raise ValueError where `record` is none of the forms above."""
    kind = record.get("kind")
    fields = {"document": {"text"}, "caption": {"image", "text"}, "conversation": {"messages"}}
    if kind not in fields:
        raise ValueError(f"expected a record of kind {', '.join(fields)}; got {kind!r}.")
    if record.keys() - {"meta"} != fields[kind] | {"kind"}:
        raise ValueError(f"expected {sorted(fields[kind])} in a {kind}; got {sorted(record)}.")
    if "text" in record and not isinstance(record["text"], str):
        raise ValueError(f"expected a str as text of a {kind}; got {type(record['text'])}.")
    if "image" in record:
        _check_image(record["image"])
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


def _map_images(record: Mapping[str, Any], change: Callable[[Any], Any]) -> dict[str, Any]:
    """Return `record` with every image changed."""
    if "image" in record:
        return {**record, "image": change(record["image"])}
    if "messages" not in record:
        return dict(record)
    messages = [
        {**m, "content": [_map_images(part, change) for part in m["content"]]}
        for m in record["messages"]
    ]
    return {**record, "messages": messages}


def _image_file(shape: Any) -> str:
    return f"images-{'x'.join(str(n) for n in shape)}.npy"


def _write_header(file: BinaryIO, rows: int, shape: tuple[int, ...]) -> None:
    # numpy pads headers so that the first dimension may grow in place.
    header = {"descr": "|u1", "fortran_order": False, "shape": (rows, *shape)}
    np.lib.format.write_array_header_1_0(file, header)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
