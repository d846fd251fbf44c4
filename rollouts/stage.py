"""One environment in a worker process, drawn as it is played: for those who watch.

    to the stage      ("reset", task, seed)         ("step", action, drawn?)
    from the stage    Scene(reply, picture, ...)

The picture is what a person sees; where an environment draws nothing, it is the picture in what is
observed, if there is one.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from PIL import Image

from gato.rollouts.hosts import Host, Reply
from gato.rollouts.video import draw

QUALITY = 85
"""Of the JPEG: at most 20 kB of a drawn simulator, 10 kB of a game."""
Message = tuple[Any, ...]


@dataclass
class Scene:
    """What the environment said, and what it looks like now."""

    reply: Reply
    picture: bytes | None = None
    """JPEG; None where none was asked for, or there is none."""
    names: tuple[str, ...] = ()
    """After a reset: what its actions are called, where it says so."""
    fault: str = ""
    """After a reset: why it draws nothing."""


def stage(tick: Callable[[], None]) -> Callable[[Message], Scene]:
    """Return what answers the messages of one who watches; see `envs.workers.Make`."""
    return Stage(Host(tick)).answer


class Stage:
    """The only environment of a host."""

    def __init__(self, host: Host) -> None:
        self._host, self._task = host, ""
        self._drawable = True

    def answer(self, message: Message) -> Scene:
        """Reset or step the environment.

        Raises:
            ValueError: where it cannot be started at all.
        """
        if message[0] == "reset":
            _, self._task, seed = message
            reply = self._host.run([("reset", 0, self._task, seed)])[0]
            return self._begun(reply)
        _, action, drawn = message
        reply = self._host.run([("step", 0, action)])[0]
        wanted = (drawn or reply.ended) and reply.error is None
        return Scene(reply, self._picture(reply)[0] if wanted else None)

    def _begun(self, reply: Reply) -> Scene:
        if reply.error is not None:
            return Scene(reply)
        self._drawable = True
        picture, fault = self._picture(reply)
        return Scene(reply, picture, names(self._host.environment(0)), fault)

    def _picture(self, reply: Reply) -> tuple[bytes | None, str]:
        fault = ""
        if self._drawable:
            try:
                return jpeg(draw(self._host.environment(0), self._task)), ""
            except Exception as error:  # watching goes on without: its numbers are there
                self._drawable = False
                fault = f"{type(error).__name__}: {' '.join(str(error).split())}"
        seen = picture_in(reply.observation)
        return (None if seen is None else jpeg(seen)), fault


def picture_in(observation: Any) -> np.ndarray | None:
    """Return the first picture, uint8 (H, W, 3), in an observation, if any."""
    if isinstance(observation, np.ndarray):
        shown = observation.ndim == 3 and observation.shape[2] == 3
        return observation if shown and observation.dtype == np.uint8 else None
    parts: Iterable[Any] = ()
    if isinstance(observation, Mapping):
        parts = observation.values()
    elif isinstance(observation, tuple):
        parts = observation
    found = (picture_in(part) for part in parts)
    return next((picture for picture in found if picture is not None), None)


def jpeg(picture: np.ndarray) -> bytes:
    """Return uint8 (H, W, 3) as a JPEG file, with whole colours: games are made of thin lines."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=QUALITY, subsampling=0)
    return file.getvalue()


def names(env: gym.Env) -> tuple[str, ...]:
    """Return what the actions of an environment are called, where it says so of every one.

    Atari's say it as ``action_names``, Minigrid's as an enumeration ``actions``.
    """
    space = env.action_space
    if not isinstance(space, spaces.Discrete):
        return ()
    for attribute in ("action_names", "actions"):
        found = getattr(env.unwrapped, attribute, ())
        try:
            told = tuple(str(getattr(one, "name", one)).lower() for one in found)
        except TypeError:  # whatever else it calls so
            continue
        if len(told) == space.n:
            return told
    return ()
