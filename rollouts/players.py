"""Policies that are no model: the task's expert and chance, by the same path as a checkpoint.

They act where the environment is, since an expert looks inside the simulator: their actions are
`Acts`, which a host replaces. What they score says whether the normalisation is right: 1 and 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from gato.envs import registry
from gato.envs.episode import TaskSpec
from gato.envs.score import RandomExpert

PLAYERS = ("expert", "random")
"""Names that stand in place of a checkpoint."""


@dataclass(frozen=True)
class Acts:
    """Stands for the action of one who acts where the environment is."""

    kind: str
    """``random``, or an expert as in `registry.make_expert`."""


def make_actor(task: str, kind: str) -> registry.Expert:
    """Return who decides the `Acts` of one episode; he is reset before its first step."""
    if kind != "random":
        return registry.make_expert(task, kind)
    spec = registry.spec(task)  # its space is shared, and so would be the draws
    return RandomExpert(replace(spec, action_space=deepcopy(spec.action_space)))


class HostPolicy:
    """A policy of B rows (`runner.RowPolicy`) whose every action is left to the host."""

    def __init__(self, name: str, kind: str = "auto") -> None:
        self._acts = Acts(kind if name == "expert" else name)

    def reset(self, *_: Any, **__: Any) -> None:
        """Forget nothing: an actor begins anew with its environment."""

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows only."""

    def select_action(self, observations: Sequence[Any], active: np.ndarray) -> list[Acts]:
        """Return the same for every row."""
        return [self._acts] * len(observations)


class HostPlayer:
    """Stands where an agent does.

    Args:
        name: one of `PLAYERS`.
        kind: which expert, as in `registry.make_expert`; not called ``random``, which is chance.
    """

    def __init__(self, name: str, kind: str = "auto") -> None:
        self.name, self.kind = name, kind

    def policy(self, tasks: Sequence[str], *_: Any) -> HostPolicy:
        """Return the policy of a group of rows."""
        return HostPolicy(self.name, self.kind)

    def expert(self, spec: TaskSpec) -> str:
        """Return which expert plays a task.

        Raises:
            ValueError: where it has none, or not this one.
        """
        kind = spec.expert if self.kind == "auto" else self.kind
        return str(getattr(registry.make_expert(spec.id, self.kind), "settings", kind))
