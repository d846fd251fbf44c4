"""What `gato quickstart` leaves to be tried: held-out pictures, and commands that take them.

digit.png, three.png           handwritten, a five and a three
scene.png                      a small room
shape-red-circle.png, ...      of one colour each, to be searched
tiny-a.png, -b.png, -new.png   digits of one token each, as the preset `few_shot` learns them
"""

from __future__ import annotations

import io
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gato.envs.files import write_atomically

if TYPE_CHECKING:
    import numpy as np

PICTURES = "pictures"
"""The folder of them, beside the run."""
SHAPES = ("red circle", "red square", "blue circle", "green star", "yellow triangle", "white ring")


def write_pictures(held_out: Path, folder: Path) -> None:
    """Write as PNG files the pictures that are not there yet.

    Args:
        held_out: the folder of the held-out stores of digits, scenes and shapes.
        folder: where the pictures go.
    """
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    for name, picture in _pictures(held_out):
        if not (folder / name).exists():
            content = io.BytesIO()
            Image.fromarray(picture).save(content, "PNG")
            write_atomically(folder / name, content.getvalue())


def _pictures(held_out: Path) -> Iterator[tuple[str, np.ndarray]]:
    from gato.envs.corpora import registry

    digits = _captioned(held_out / "digits")
    yield "digit.png", digits["a handwritten five"]
    yield "three.png", digits["a handwritten three"]
    yield "scene.png", next(iter(_captioned(held_out / "scenes").values()))
    shapes = _captioned(held_out / "shapes")
    for name in SHAPES:
        yield f"shape-{name.replace(' ', '-')}.png", shapes[f"a {name}"]
    (record,) = registry.records("bindings", "heldout", count=1)
    first, second, *_, last = record["pairs"]  # the first two show two digits, the last is asked
    for name, pair in (("a", first), ("b", second), ("new", last)):
        yield f"tiny-{name}.png", pair["image"]


def _captioned(path: Path) -> dict[str, np.ndarray]:
    """Return the first picture of every caption in a store."""
    from gato.envs.records import RecordStore

    store = RecordStore(path)
    found: dict[str, Any] = {}
    for record in (store[i] for i in range(len(store))):
        if record["kind"] == "caption":
            found.setdefault(record["text"], record["image"])
    return found


def commands(checkpoint: Path, pictures: Path, task: str) -> list[str]:
    """Return what to try with a checkpoint that was trained on a task, as it is typed."""
    model, folder = shlex.quote(str(checkpoint)), shlex.quote(str(pictures))
    digit = shlex.quote(str(pictures / "digit.png"))
    return [
        f"gato chat {model}",
        f"gato caption {model} {digit}",
        f'gato classify {model} {digit} --labels "a handwritten three,a handwritten five"',
        f'gato search {model} {folder} "a red circle"',
        f"gato eval {model} --tasks 'metaworld/*' --episodes 10",
        f"gato show {task} --steps 2",
    ]
