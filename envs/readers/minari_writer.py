"""A store as a Minari data set (HDF5, pictures without loss).

``minari.MinariDataset(FOLDER / "data")`` reads it, and ``minari.load_dataset(ID)`` where the folder
lies under Minari's own root in ``ID = gato/<suite>/<task>/episodes-v0``.

What Minari has no place for is kept for the way back: the task's spec, settings and versions under
``gato`` in metadata.json; per episode ``infos["gato"]``, a JSON text with instruction, success and
info; and ``infos["targets"]``, the expert's clean actions by path.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from gato.envs.episode import Episode, unflatten_value
from gato.envs.readers.minari import EXTRA, FORMAT, KEPT
from gato.envs.store import EpisodeStore

__all__ = ["EXTRA", "FORMAT", "data_set_id", "export"]


def export(store: EpisodeStore, out: Path, progress: Any = None) -> None:
    """Write the episodes of a store into the new folder `out`.

    Raises:
        ValueError: for a text that HDF5 cannot hold, naming the episode.
    """
    import minari
    from minari.dataset.minari_storage import MinariStorage

    spec, folder = store.spec, out.resolve() / "data"  # Minari joins a relative path to itself
    folder.mkdir(parents=True)
    storage = MinariStorage.new(
        folder,
        observation_space=spec.observation_space,
        action_space=spec.action_space,
        data_format="hdf5",
        jpeg_encoding=False,
    )
    scores = {"ref_min_score": spec.random_score, "ref_max_score": spec.expert_score}
    if spec.measure != "return":  # Minari's are returns
        scores = {}
    storage.update_metadata(
        {
            "dataset_id": data_set_id(spec.id),
            "minari_version": minari.__version__,
            "algorithm_name": str(store.settings.get("expert", "unknown")),
            "description": spec.instruction or spec.id,
            **{name: score for name, score in scores.items() if score is not None},
            KEPT: {
                "spec": spec.to_json(),
                "settings": store.settings,
                "versions": store.manifest["versions"],
            },
        }
    )
    storage.update_episodes(_buffers(store, progress))


def data_set_id(task: str) -> str:
    """Return the id of a task's data set, of the characters that Minari allows.

    >>> data_set_id("metaworld/push-v3?camera=corner2")
    'gato/metaworld/push-v3_camera_corner2/episodes-v0'
    """
    return f"gato/{re.sub(r'[^-/A-Za-z0-9_]', '_', task)}/episodes-v0"


def _buffers(store: EpisodeStore, progress: Any) -> Iterator[Any]:
    for i in range(len(store)):
        episode = store.episode(i)
        try:
            _check_texts(episode)
            yield _buffer(store, episode)
        except ValueError as error:
            raise ValueError(f"episode {i} of {store.path}: {error}") from error
        if progress:
            progress(i + 1, len(store))


def _buffer(store: EpisodeStore, episode: Episode) -> Any:
    from minari.data_collector.episode_buffer import EpisodeBuffer

    kept = {
        "instruction": episode.instruction,
        "success": episode.success,
        "info": dict(episode.info),
    }
    infos: dict[str, Any] = {KEPT: [json.dumps(kept)]}
    if episode.targets is not None:
        infos["targets"] = {quote(p, safe=""): _column(c) for p, c in episode.targets.items()}
    observations = {path: _column(c) for path, c in episode.observations.items()}
    actions = {path: _column(c) for path, c in episode.actions.items()}
    return EpisodeBuffer(
        seed=episode.seed,
        observations=unflatten_value(store.spec.observation_space, observations, "observation"),
        actions=unflatten_value(store.spec.action_space, actions, "action"),
        rewards=np.asarray(episode.rewards),
        terminations=np.asarray(episode.terminated),
        truncations=np.asarray(episode.truncated),
        infos=infos,
    )


def _column(column: Any) -> Any:
    """Return a column as HDF5 takes it: an array of numbers, or a list of str."""
    values = np.asarray(column)
    return [str(text) for text in column] if values.dtype.kind == "U" else values


def _check_texts(episode: Episode) -> None:
    for path, column in (*episode.observations.items(), *episode.actions.items()):
        if np.asarray(column).dtype.kind == "U" and any("\0" in text for text in column):
            raise ValueError(f"expected text without NUL in {path!r}: HDF5 cannot hold one")
