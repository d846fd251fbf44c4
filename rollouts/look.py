"""One look at a task as it is played: a few steps in a process of its own, then what is seen.

What is observed is preferred to what a person would be shown: it is what the model was trained on.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from gato.envs import cameras, registry
from gato.envs.workers import Pool, WorkerDiedError, last_words
from gato.rollouts.messages import fitting
from gato.rollouts.players import Acts
from gato.rollouts.stage import Scene, picture_in, stage

SMALLEST = 16
"""Pixels of a side, below which an array in an observation is no picture."""
TIMEOUT = 120.0
"""Seconds that one step may take before the worker process is ended."""


@dataclass(frozen=True)
class Sight:
    """What is seen after some steps."""

    picture: np.ndarray
    """uint8 (H, W, 3), as the model reads it."""
    words: str
    """What is to be done, where the task says so."""
    steps: int
    """How many were taken; fewer than asked for where the episode ended."""


def look(
    task_id: str,
    steps: int = 0,
    seed: int = 0,
    by: str | Callable[[Any], Any] = "random",
) -> Sight:
    """Return what a task looks like after some steps of an episode.

    Args:
        task_id: of the registry; no other environment is started.
        steps: to be taken; the episode may end before.
        seed: of the episode.
        by: who acts: ``random``, ``expert``, or what returns an action for an observation.

    Raises:
        ValueError: for a task that is unknown, whose simulator is not installed, or that draws
            nothing.
        RuntimeError: where the simulator failed.
    """
    base, _ = cameras.split(task_id)
    if base.startswith("gym/") and ":" in base:
        raise ValueError(
            f"expected a task of the registry; {task_id!r} names a module. Import it when you "
            f"start (--import MODULE) and leave its name out."
        )
    spec = registry.spec(task_id)  # whose id names the module that was imported for it
    words = spec.instruction
    acts = Acts("auto" if by == "expert" else "random")
    pool = Pool(1, stage, timeout=TIMEOUT)
    try:
        scene = _asked(pool, ("reset", spec.id, seed))
        words = _words(scene.reply.observation) or words
        observed, taken = scene.reply.observation, 0
        while taken < steps and not scene.reply.ended:
            action = by(observed) if callable(by) else acts
            scene = _asked(pool, ("step", action, taken + 1 == steps))
            taken += 1
            if not scene.reply.ended:
                observed = scene.reply.observation
    finally:
        pool.close()
    picture = _picture(scene, observed)
    if picture is None:
        why = scene.fault or "it draws nothing, and its observation holds no picture"
        raise ValueError(f"expected a task that can be seen; of {task_id!r} nothing can be ({why})")
    return Sight(fitting(picture), words, taken)


def _asked(pool: Pool, message: tuple[Any, ...]) -> Scene:
    pool.send(0, message)
    ((_, scene),) = pool.receive()
    if isinstance(scene, WorkerDiedError):
        raise RuntimeError(f"the simulator's process ended: {scene}")
    assert isinstance(scene, Scene)
    if scene.reply.error is not None:
        raise RuntimeError(f"the simulator failed: {last_words(scene.reply.error)}")
    return scene


def _picture(scene: Scene, observed: Any) -> np.ndarray | None:
    seen = picture_in(observed)
    if seen is not None and min(seen.shape[:2]) >= SMALLEST:
        return seen
    if scene.picture is None:
        return None
    from PIL import Image

    with Image.open(io.BytesIO(scene.picture)) as picture:
        return np.asarray(picture.convert("RGB"), np.uint8)


def _words(observed: Any) -> str:
    """Return the texts of an observation."""
    if isinstance(observed, str):
        return observed
    if isinstance(observed, dict):
        return ". ".join(filter(None, map(_words, observed.values())))
    return ""
