"""Episode stores: episodes of one task on disk, by column; a window of one is a few short reads.

A store is a folder that numpy alone can read:

```
manifest.json                  spec, settings, versions, and the shards with their checksums
shard-00000-000041/            shard 0, which holds 41 episodes
  lengths.npy returns.npy seeds.npy successes.npy instructions.npy     an entry per episode
  rewards.npy terminated.npy truncated.npy                             an entry per step
  actions.<path>.npy targets.<path>.npy                                an entry per step
  observations.<path>.npy                                              one more per episode
  texts.json                   distinct strings; columns of text are int32 indices into them
  info.json                    a dict per episode, where any has one
```

A shard counts once the manifest, replaced atomically, names it: a writer killed at any instant
leaves a store of complete shards. Shards follow from the sequence of episodes alone, because a
writer that opens a store continues its last, short shard.

Convention: successes are 1, 0, and -1 where the task defines no success; rewards are float32; the
"/" of a path is "%2F" in a file name.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from gato.envs.files import manifest_read, store_format
from gato.envs.records import FORMAT as RECORDS
from gato.envs.records import RecordStore, RecordWriter
from gato.envs.store_check import DamagedShard, damaged_shards
from gato.envs.store_reader import EpisodeStore
from gato.envs.store_writer import EpisodeWriter

__all__ = [
    "DamagedShard",
    "EpisodeStore",
    "EpisodeWriter",
    "RecordStore",
    "RecordWriter",
    "damaged_shards",
    "open_store",
]


def open_store(path: str | Path, skip: Collection[str] = ()) -> EpisodeStore | RecordStore:
    """Return the store at `path`, of episodes or of records, as its manifest says.

    Args:
        path: its folder.
        skip: names of shards of episodes to leave out.

    Raises:
        ValueError: where there is none, or it is damaged.
    """
    records = store_format(Path(path)) == RECORDS
    with manifest_read(Path(path)):
        return RecordStore(path) if records else EpisodeStore(path, skip)
