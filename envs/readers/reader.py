"""What every reader of a foreign format gives: a `Source` that says what it found and yields it.

A reader is one module of this folder with

    FORMAT      its name on the command line
    EXTRA       the extra of this package that brings what it needs, or ""
    recognises(location: str) -> bool          whether a path looks like its format; reads little
    open_source(location, options) -> Source   raises ValueError, naming the field it cannot map
    IGNORES     names of the options that mean nothing to it, which are refused
    BESIDE      True where a single file may name pictures, or answers, that lie beside it
    ADDRESSES   True where locations may be addresses; others find a copy of theirs on this machine

Items are episodes (`gato.envs.episode`) or records (`gato.envs.records`). An item that cannot be
read is yielded as a `BadItem`; whoever asked decides whether that is an error or counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from gato.envs.episode import Episode, TaskSpec

PATCH = 16
LONGEST = 128
"""Pixels of the longer side of a picture at most, where no size is asked for."""
MAX_PIXELS = 178_956_970 // 2
"""Pictures of more pixels are refused before they are decoded; Pillow warns from there on."""
MAX_NUMBERS = 1 << 24
"""Of one step, as spaces describe it: a space of more would itself take gigabytes."""


@dataclass(frozen=True)
class ReadOptions:
    """What a user may ask of a reader."""

    task: str = ""
    """Id of the task of all episodes, in place of the one that the data names."""
    instruction: str = ""
    """Of all episodes, in place of what the data says."""
    split: str = "train"
    """Of data that come in splits."""
    limit: int = 0
    """Items to read; 0 reads all."""
    image_size: tuple[int, int] | None = None
    """(width, height) that pictures are brought to; by default as `fit_image` says."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """Our field -> the data's, where the names differ: ``{"text": "body"}``."""
    clip_actions: bool = False
    """Bring actions outside their space to its bounds, and count them, instead of refusing them."""


@dataclass(frozen=True)
class BadItem:
    """An item that could not be read."""

    where: str
    """File, and line, row or episode in it."""
    reason: str


@dataclass
class Source:
    """What a reader found, and how to read it."""

    format: str
    location: str
    kind: Literal["episodes", "records"]
    read: Callable[[], Iterator[Episode | Mapping[str, Any] | BadItem]]
    """Each call reads anew, in the order of the data."""
    tasks: dict[str, TaskSpec] = field(default_factory=dict)
    """Of the episodes, by id."""
    items: int | None = None
    """Episodes or records; None where counting would mean reading all."""
    steps: int | None = None
    hours: float | None = None
    """At the rate of control or of frames that the data names."""
    fields: dict[str, str] = field(default_factory=dict)
    """The data's fields, and what each becomes (or why it is left out)."""
    notes: list[str] = field(default_factory=list)
    """What a user should know: resized pictures, clipped actions, fields left out."""
    counts: Counter[str] = field(default_factory=Counter)
    """What reading has changed so far, and how often: ``{"actions clipped": 17}``."""
    made: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By task, the settings and versions that its store is to name, where the data know them."""
    parts: list[Source] = field(default_factory=list)
    """The sources that this one joins, where it joins several."""
    options: ReadOptions = field(default_factory=ReadOptions)
    """What was asked for; `formats.open_source` fills it in."""


def joined(location: str, sources: Sequence[Source], broken: Sequence[BadItem]) -> Source:
    """Return several sources of episodes as one, in their order; what is broken comes first.

    Raises:
        ValueError: where two hold different tasks of one id.
    """
    tasks: dict[str, TaskSpec] = {}
    where: dict[str, str] = {}
    for source in sources:
        for task, spec in source.tasks.items():
            if tasks.setdefault(task, spec).to_json() != spec.to_json():
                raise ValueError(
                    f"{where[task]} and {source.location} hold different tasks, both called "
                    f"{task!r}. Import them one by one, with --task."
                )
            where.setdefault(task, source.location)
    counts: Counter[str] = Counter()

    def read() -> Iterator[Any]:
        yield from broken
        for source in sources:
            yield from source.read()
            counts.update(source.counts)
            source.counts.clear()

    def total(name: str) -> Any:
        parts = [getattr(source, name) for source in sources]
        return None if None in parts else sum(parts)

    return Source(
        sources[0].format,
        location,
        "episodes",
        read,
        tasks=tasks,
        items=total("items"),
        steps=total("steps"),
        hours=total("hours"),
        fields={f"{s.location}: {k}": v for s in sources for k, v in s.fields.items()},
        notes=list(dict.fromkeys(note for source in sources for note in source.notes)),
        counts=counts,
        made={task: made for source in sources for task, made in source.made.items()},
        parts=list(sources),
    )


def fit_image(
    image: np.ndarray, size: tuple[int, int] | None = None, longest: int = LONGEST
) -> Any:
    """Return a picture, uint8 (H, W), (H, W, 1|3|4), as records hold them: RGB in whole patches.

    Args:
        image: what was decoded.
        size: (width, height), multiples of 16; by default the nearest multiples of 16 of the
            picture scaled down to `longest`, never up.
        longest: pixels of the longer side at most, where no size is given.

    Raises:
        ValueError: for an array that is no picture, or a size that is no whole number of patches.
    """
    from PIL import Image

    raw = np.asarray(image)
    if raw.dtype != np.uint8 or raw.ndim not in (2, 3) or (raw.ndim == 3 and raw.shape[2] == 2):
        raise ValueError(
            f"expected a picture, uint8 (H, W) or (H, W, 1|3|4); got {raw.dtype} {raw.shape}."
        )
    picture = Image.fromarray(raw[..., 0] if raw.ndim == 3 and raw.shape[2] == 1 else raw)
    if size is None:
        shrink = min(1.0, longest / max(picture.size))
        width, height = (max(1, round(n * shrink / PATCH)) * PATCH for n in picture.size)
    else:
        width, height = size
    if min(width, height) < 1 or width % PATCH or height % PATCH:
        raise ValueError(f"expected a size in multiples of {PATCH}; got {width}x{height}.")
    rgb = picture.convert("RGB")
    if rgb.size != (width, height):
        rgb = rgb.resize((width, height), Image.Resampling.LANCZOS)
    return np.array(rgb)
