"""Steps of an episode written by column: runs of equally many tokens, their rows, all as one."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gato.envs.episode import Episode
from gato.tokenizers.modality import Segment
from gato.tokenizers.stream import TokenSequence
from gato.tokenizers.task_codec import TaskCodec


@dataclass
class SerializedEpisode:
    """An episode's steps as one sequence, with the position where each step starts."""

    head: TokenSequence
    """``<bos>`` and the instruction: what stands before the first step of any window."""
    steps: TokenSequence
    starts: np.ndarray
    """int64 (steps + 1,)"""
    actions: np.ndarray
    """bool (T,), true at action tokens; the return to come is none."""

    def __len__(self) -> int:
        return len(self.starts) - 1

    def window(self, start: int, stop: int) -> TokenSequence:
        """Return steps [start, stop), without the head."""
        return self.steps.slice(int(self.starts[start]), int(self.starts[stop]))


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
