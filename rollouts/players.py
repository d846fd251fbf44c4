"""Policies that are no model: the task's expert and chance, by the same path as a checkpoint.

They act where the environment is (`hosts.Acts`), since an expert looks inside the simulator. What
they score says whether the normalisation is right: 1 and 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gato.rollouts.hosts import Acts

PLAYERS = {"expert": "auto", "random": "random"}
"""Names that stand in place of a checkpoint, each with what its actions ask for."""


class HostPolicy:
    """A policy of B rows whose every action is left to the host."""

    def __init__(self, name: str) -> None:
        self._acts = Acts(PLAYERS[name])

    def reset(
        self,
        mask: Sequence[bool] | np.ndarray | None = None,
        *,
        seeds: Sequence[int] | Mapping[int, int] | None = None,
        tasks: Sequence[str] | Mapping[int, str] | None = None,
    ) -> None:
        """Forget nothing: an actor begins anew with its environment."""

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows only."""

    def select_action(self, observations: Sequence[Any], active: np.ndarray) -> list[Acts]:
        """Return the same for every row."""
        return [self._acts] * len(observations)
