"""One model, one stream of tokens: games, robots, grid worlds, images and conversation."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from gato.rollouts.agent import Agent

__all__ = ["load"]


def load(path: str | Path, device: str | None = None) -> Agent:
    """Return the agent of a checkpoint: it plays, talks, captions and classifies.

    Args:
        path: the folder of a checkpoint or of a run.
        device: by default the GPU where there is one.
    """
    from gato.rollouts.agent import Agent  # torch takes seconds to import; `import gato` does not

    return Agent.load(path, device)
