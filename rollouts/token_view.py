"""The tokens of one decision, in words: what the model read, and what it wrote.

They are named as `gato show` names them, from the same writing of an episode, here of one step.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from gato.envs.episode import Episode
from gato.envs.play import by_column
from gato.tokenizers.describe import describe
from gato.tokenizers.serializer import Serializer

SHOWN = 512
"""Most tokens of one decision that are told."""


class TokenView:
    """Names the tokens of one task's decisions."""

    def __init__(self, serializer: Serializer, task_id: str) -> None:
        self._serializer, self._task = serializer, serializer.task(task_id)

    def head(self) -> list[dict[str, Any]]:
        """Return what stands before the first step."""
        return describe(self._serializer, self._serializer.head(self._task.task.id))

    def step(self, observation: Any, action: Any) -> list[dict[str, Any]]:
        """Return the tokens of one decision, ``target`` where the model wrote them.

        A return to come is left out: it was drawn by the policy, and cannot be told from outside.
        """
        task = self._task.task
        no = np.zeros(1, bool)
        episode = Episode(
            task=task.id,
            observations=by_column(task.observation_space, [observation], "observation"),
            actions=by_column(task.action_space, [action], "action"),
            rewards=np.zeros(1, np.float32),
            terminated=no,
            truncated=no,
        )
        tokens = describe(self._serializer, self._serializer.episode(episode).steps)
        drawn = set(self._serializer.return_ids)
        return [t for t in tokens if t["id"] not in drawn]
