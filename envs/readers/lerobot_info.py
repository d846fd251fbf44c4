"""What a LeRobot dataset says of itself: ``meta/info.json``, and which episodes there are."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from gato.envs.readers.lerobot_files import read_table
from gato.envs.remote import Folder

VERSION = "v3.0"
_EPISODE = ("episode_index", "length", "tasks", "data/chunk_index", "data/file_index")
_VIDEO = ("chunk_index", "file_index", "from_timestamp", "to_timestamp")


def read_info(folder: Folder, location: str) -> dict[str, Any]:
    """Return ``meta/info.json`` of a dataset of the version that is read here."""
    try:
        info = json.loads(folder.file("meta/info.json").read_bytes())
    except ValueError as error:
        raise ValueError(f"expected JSON in meta/info.json of {location}; {error}") from error
    if not isinstance(info, dict):
        raise ValueError(f"expected an object in meta/info.json of {location}; got {info!r:.100}.")
    version = str(info.get("codebase_version"))
    if version.split(".")[0] != VERSION.split(".")[0]:
        hint = "" if version.startswith("v2.1") else " (from v2.0, first to v2.1 with its v21 one)"
        raise ValueError(
            f"expected a LeRobot dataset of version {VERSION} at {location}; got {version}. "
            f"Convert it with LeRobot's own converter{hint}: "
            f"python -m lerobot.datasets.v30.convert_dataset_v21_to_v30 --repo-id=NAME"
        )
    needed = {"fps": (int, float), "features": dict, "total_episodes": int, "data_path": str}
    for key, kind in needed.items():
        if not isinstance(info.get(key), kind):
            raise ValueError(f"expected {key!r} in meta/info.json of {location}; got none.")
    for name, feature in info["features"].items():
        if not isinstance(feature, dict):
            raise ValueError(
                f"expected a description of feature {name!r} in meta/info.json; got "
                f"{feature!r:.100}."
            )
    if not isinstance(info.get("splits") or {}, dict):
        raise ValueError(f"expected splits by name in meta/info.json; got {info['splits']!r:.100}.")
    if not 0 < float(info["fps"]) < 1e6:
        raise ValueError(f"expected a positive fps in meta/info.json; got {info['fps']}.")
    return info


def episode_rows(folder: Folder, info: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return all episodes as ``meta/episodes`` has them, in their order."""
    total = int(info["total_episodes"])
    videos = [k for k, f in info["features"].items() if f.get("dtype") == "video"]
    wanted = [*_EPISODE, *(f"videos/{key}/{name}" for key in videos for name in _VIDEO)]
    rows: list[dict[str, Any]] = []
    for name in _episode_files(folder, info):
        rows += read_table(folder.file(name), wanted, name).to_pylist()
        if len(rows) >= total:
            break
    if len(rows) != total:
        raise ValueError(
            f"expected {total} episodes in meta/episodes, as meta/info.json says; got "
            f"{len(rows)}. The dataset is incomplete: fetch it again."
        )
    for row in rows:
        empty = [key for key, value in row.items() if value is None]
        if empty:
            raise ValueError(f"expected a value in every row of {empty[0]!r} in meta/episodes.")
    return sorted(rows, key=lambda row: int(row["episode_index"]))


def _episode_files(folder: Folder, info: Mapping[str, Any]) -> Iterator[str]:
    found = folder.glob("meta/episodes/*/*.parquet")
    yield from found
    if not found:  # an address that lists nothing: the names are known
        for number in range(1_000_000):
            chunk, file = divmod(number, int(info.get("chunks_size") or 1000))
            yield f"meta/episodes/chunk-{chunk:03d}/file-{file:03d}.parquet"


def of_split(
    rows: list[dict[str, Any]], info: Mapping[str, Any], name: str, location: str
) -> list[dict[str, Any]]:
    """Return the episodes of the split that is asked for."""
    splits = info.get("splits") or {}
    if not splits and name == "train":
        return rows
    if name not in splits:
        known = ", ".join(splits) or "none"
        raise ValueError(f"expected a split of {location} ({known}); got {name!r}.")
    try:
        first, last = (int(n) for n in str(splits[name]).split(":"))
    except ValueError:
        raise ValueError(
            f"expected a range of episodes as split {name!r} in meta/info.json, like '0:50'; "
            f"got {splits[name]!r}."
        ) from None
    return [row for row in rows if first <= int(row["episode_index"]) < last]
