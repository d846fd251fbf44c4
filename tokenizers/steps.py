"""Steps of an episode written by column: which of them have equally many tokens, and their rows."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from gato.envs.episode import Episode
from gato.tokenizers.modality import Segment
from gato.tokenizers.task_codec import TaskCodec


def runs(task: TaskCodec, episode: Episode, length: int) -> list[tuple[int, int]]:
    """Return [start, stop) of maximal runs of steps in which every text leaf is constant.

    They are found among the first `length` steps.
    """
    changes = {0, length}
    for leaves, columns in (
        (task.observation, episode.observations),
        (task.action, episode.targets or episode.actions),
    ):
        for path, modality, _ in leaves:
            if modality == "text":
                texts = columns[path]
                changes |= {i for i in range(1, length) if texts[i] != texts[i - 1]}
    cuts = sorted(changes)
    return list(itertools.pairwise(cuts))


def payload_of(
    blocks: Sequence[tuple[str, Segment]], length: int, n: int
) -> dict[str, dict[str, np.ndarray]]:
    """Return the rows of all blocks by modality, in stream order."""
    found: dict[str, list[tuple[int, Segment]]] = {}
    column = 0
    for modality, block in blocks:
        if block.rows:
            found.setdefault(modality, []).append((column, block))
        column += block.ids.shape[1]
    rows_of = {}
    for modality, parts in found.items():
        columns = np.concatenate([np.arange(c, c + b.ids.shape[1]) for c, b in parts])
        at = (np.arange(length)[:, None] * n + columns).reshape(-1)
        rows = {
            k: np.concatenate([b.rows[k] for _, b in parts], 1) if len(parts) > 1 else v
            for k, v in parts[0][1].rows.items()
        }
        rows_of[modality] = {k: v.reshape(len(at), *v.shape[2:]) for k, v in rows.items()}
        rows_of[modality]["at"] = at
    return rows_of
