"""What LeRobot has no column for, kept beside it in ``meta/gato`` so that it can be read back.

```
meta/gato/store.json                task, settings and versions; which feature is which leaf; the
                                    codec of the pictures and how much it changes them
meta/gato/episodes-00000.parquet    a row per episode: seed, success, instruction, info, and the
                                    observation after the last action, pictures as PNG
```

LeRobot reads over both.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image

from gato.envs.episode import Episode, TaskSpec, flatten_space
from gato.envs.readers.lerobot_columns import Column
from gato.envs.readers.pictures import open_image
from gato.envs.readers.reader import fit_image
from gato.envs.readers.untrusted import check_spaces
from gato.envs.remote import Folder

FORMAT = "gato-lerobot-1"
STORE = "meta/gato/store.json"
EPISODES = "meta/gato/episodes-{:05d}.parquet"
PER_FILE = 256
"""Episodes of which the last observations lie in one file."""
_ROW = ("episode_index", "seed", "success", "instruction", "info")
FLAGS = {name: f"next.{name}" for name in ("reward", "terminated", "truncated")}


@dataclass
class Kept:
    """What an export has kept of its store."""

    folder: Folder
    spec: TaskSpec
    columns: list[Column]
    made: dict[str, Any]
    """Settings and versions of the store."""
    whole: bool
    why: str = ""
    fields: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._rows = lru_cache(maxsize=1)(self._read)

    def episode(
        self,
        spec: TaskSpec,
        row: Mapping[str, Any],
        columns: Mapping[str, Mapping[str, Any]],
        leaves: Iterable[Column],
        flags: Mapping[str, np.ndarray],
    ) -> Episode:
        """Return an episode as it was exported.

        Args:
            spec: the task, perhaps of another name.
            row: the episode in LeRobot's table.
            columns: by role and path, an entry per frame.
            leaves: the columns, pictures perhaps to be resized.
            flags: an entry per frame each.
        """
        number = int(row["episode_index"])
        file, at = divmod(number, PER_FILE)
        rows = self._rows(file)
        kept = rows[at] if at < len(rows) else {}
        lacking = sorted(
            {*_ROW, *(c.feature for c in leaves if c.role == "observations")} - set(kept)
        )
        if lacking or kept["episode_index"] != number:
            what = f"no {lacking[0]!r}" if lacking else f"episode {kept['episode_index']}"
            raise ValueError(
                f"expected episode {number} in row {at} of {EPISODES.format(file)}; got {what}. "
                f"Remove meta/gato to read the dataset without it, or export it again."
            )
        observations = {
            c.path: _with_last(columns["observations"][c.path], last_value(c, kept))
            for c in leaves
            if c.role == "observations"
        }
        success = int(kept["success"])
        return Episode(
            task=spec.id,
            observations=observations,
            actions=columns["actions"],
            rewards=flags["reward"].astype(np.float32),
            terminated=flags["terminated"].astype(bool),
            truncated=flags["truncated"].astype(bool),
            targets=columns["targets"] or None,
            instruction=kept["instruction"],
            seed=int(kept["seed"]),
            success=None if success < 0 else bool(success),
            info=json.loads(kept["info"]),
        )

    def _read(self, file: int) -> list[dict[str, Any]]:
        import pyarrow.parquet as parquet

        rows: list[dict[str, Any]] = parquet.read_table(
            self.folder.file(EPISODES.format(file))
        ).to_pylist()
        return rows


def open_kept(folder: Folder, rows: list[dict[str, Any]]) -> Kept | None:
    """Return what an export has kept; None for a dataset that is not ours.

    Args:
        folder: of the dataset.
        rows: all its episodes, as LeRobot's table has them.

    Raises:
        ValueError: where the file is damaged.
    """
    if not folder.exists(STORE):
        return None
    try:
        data = json.loads(folder.file(STORE).read_bytes())
        if data["format"] != FORMAT:
            raise ValueError(f"got format {data['format']!r}, and expected {FORMAT!r}")
        check_spaces(data["spec"], STORE)
        spec = TaskSpec.from_json(data["spec"])
        leaves = {
            "observations": flatten_space(spec.observation_space, "observation"),
            "actions": flatten_space(spec.action_space, "action"),
        }
        leaves["targets"] = leaves["actions"]
        columns = [Column(**c, space=leaves[c["role"]][c["path"]]) for c in data["columns"]]
        whole = data["episodes"] == digest(rows)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"expected what `gato data export` writes in {STORE}; {error}. Remove meta/gato to "
            f"read the dataset without it, or export it again."
        ) from error
    made = {"settings": data["settings"], "versions": data["versions"]}
    why = "episodes were changed after the export: read as LeRobot's, without meta/gato"
    fields = {c.feature: f"{c.role[:-1]} {c.path!r}, as exported" for c in columns}
    return Kept(folder, spec, columns, made, whole, "" if whole else why, fields)


def digest(rows: Iterable[Mapping[str, Any]]) -> str:
    """Return a checksum of which episodes there are, and how long each is."""
    told = [[int(row["episode_index"]), int(row["length"])] for row in rows]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def row_of(number: int, episode: Episode, columns: Iterable[Column]) -> dict[str, Any]:
    """Return what is kept of an episode; inverse of `Kept.episode`."""
    row: dict[str, Any] = {
        "episode_index": number,
        "seed": episode.seed,
        "success": -1 if episode.success is None else int(episode.success),
        "instruction": episode.instruction,
        "info": json.dumps(dict(episode.info)),
    }
    for column in columns:
        if column.role == "observations":
            last = episode.observations[column.path][len(episode)]
            row[column.feature] = _plain(column, last)
    return row


def last_value(column: Column, row: Mapping[str, Any]) -> Any:
    """Return one leaf of the last observation from its row."""
    value = row[column.feature]
    if column.kind == "text":
        return value
    if column.kind in ("image", "video"):
        picture = open_image(value)
        return picture if column.size is None else fit_image(picture, column.size)
    dtype = np.dtype(column.space.dtype)
    return np.array(value, dtype).reshape(column.space.shape)


def _plain(column: Column, value: Any) -> Any:
    if column.kind == "text":
        return value
    if column.kind in ("image", "video"):
        return png(value)
    return np.asarray(value).reshape(-1).tolist()


def png(picture: np.ndarray) -> bytes:
    """Return a uint8 (H, W, 3) picture as a PNG file."""
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(picture)).save(file, "PNG", compress_level=3)
    return file.getvalue()


def _with_last(values: Any, last: Any) -> Any:
    if isinstance(values, list):
        return [*values, last]
    return np.concatenate([values, np.asarray(last)[None]])
