"""Which shards of a store are damaged, found without opening the store."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gato.envs.columns import check_array, read_rows
from gato.envs.episode import TaskSpec
from gato.envs.files import manifest_read, read_manifest, store_format
from gato.envs.mirror import remote_store
from gato.envs.records import FORMAT as RECORDS
from gato.envs.records import RecordStore
from gato.envs.store_reader import (
    FORMAT,
    INFO,
    STARTS,
    TEXTS,
    Leaves,
    check_sums,
    checksum_told,
    columns,
    file_name,
    leaves_of,
)


@dataclass(frozen=True)
class DamagedShard:
    """A shard that cannot be read, or is not as it was written."""

    name: str
    """Of its folder; "" of a record store, which is one shard."""
    items: int
    """Episodes or records in it."""
    reason: str
    """With the file, and its checksum as written."""


def damaged_shards(path: Path, *, checksums: bool = False) -> list[DamagedShard]:
    """Return the damaged shards of the store at `path`.

    A store that lies elsewhere has none: its shards are checked when they are fetched.

    Args:
        path: the store's folder.
        checksums: read every byte; by default only headers, sizes and indices are looked at.

    Raises:
        ValueError: where its manifest is damaged, so that nothing is known of its shards.
    """
    if remote_store(path) is not None:
        return []
    if store_format(path) == RECORDS:
        with manifest_read(path):
            records = int(read_manifest(path, RECORDS)["records"])
        try:
            RecordStore(path).check(checksums=checksums)
        except ValueError as error:
            return [DamagedShard("", records, str(error))]
        return []
    manifest = read_manifest(path, FORMAT)
    found = []
    with manifest_read(path):
        leaves = leaves_of(TaskSpec.from_json(manifest["spec"]))
        for shard in manifest["shards"]:
            try:
                _check(path / shard["name"], shard, leaves, checksums)
            except ValueError as error:
                found.append(DamagedShard(shard["name"], shard["episodes"], str(error)))
    return found


def _check(folder: Path, shard: Mapping[str, Any], leaves: Leaves, checksums: bool) -> None:
    for kind, path, dtype, shape in columns(leaves, shard):
        name = file_name(kind, path)
        with checksum_told(shard, name):
            check_array(folder / name, dtype, shape)
    for name in (TEXTS, STARTS, INFO):
        if name in shard["sha256"] and not (folder / name).is_file():
            raise ValueError(
                f"expected {folder / name}; it is missing. The store is damaged: make it again."
            )
    lengths = read_rows(folder / "lengths.npy", np.int64, (shard["episodes"],))
    if lengths.sum() != shard["steps"]:
        raise ValueError(
            f"expected {shard['steps']} steps in all in {folder / 'lengths.npy'}; "
            f"got {lengths.sum()}. The store is damaged: make it again."
        )
    if checksums:
        check_sums(folder, shard["sha256"])
