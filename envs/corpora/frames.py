"""Frames of an Atari game with captions and questions, answered from the emulator's memory.

A game is described by what its expert's ``state(env)`` says; Boxing is. Play is at random, each
action held for a while, so that frames cover the ring. Split by a hash of the boxers' positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from random import Random
from typing import Any

import numpy as np

from gato.envs import registry
from gato.envs.corpora.common import (
    Split,
    assistant,
    bucket,
    caption,
    check_split,
    conversation,
    stream,
    user,
)

COUNTS = {"train": 2_000, "heldout": 200}
TASK = "atari/Boxing-v5"
KINDS = ("boxer place", "boxer side", "boxer height")
CAPTION_SHARE = 0.25
HELD = (3, 8)
"""For how many decisions an action of the random player is held."""
DECISIONS = 600
"""Decisions after which a new game begins."""
MARGIN = 0.02
"""Nothing is asked whose answer would change within this part of the frame's side."""
BOXERS = {"white": "player", "black": "opponent"}
# The ring covers 0.26-0.76 of the frame's width and 0.29-0.71 of its height.
COLUMNS = {"left": (0.0, 0.42), "": (0.42, 0.58), "right": (0.58, 1.0)}
ROWS = {"top": (0.0, 0.42), "": (0.42, 0.58), "bottom": (0.58, 1.0)}
QUESTIONS = {
    "boxer place": ("where is the {} boxer?", "in which part is the {} boxer?"),
    "boxer side": (
        "is the {} boxer left or right of the other?",
        "on which side of the other is the {} boxer?",
    ),
    "boxer height": ("which boxer is higher?", "who is nearer to the top?"),
}


def records(split: Split, seed: int, count: int | None = None) -> Iterator[dict[str, Any]]:
    """Yield captions and conversations about single frames of the game."""
    check_split(split)
    made, game = 0, 0
    wanted = COUNTS[split] if count is None else count
    while made < wanted:
        rng = stream("frames", split, seed, game)
        for frame, state in play(rng):
            if made < wanted and split_of(state) == split:
                record = frame_record(frame, state, rng, group=[seed, game])
                if record is not None:
                    made += 1
                    yield record
        game += 1


def split_of(state: Mapping[str, float]) -> Split:
    """Return the split of every frame with these positions."""
    key = [round(1000 * state[name]) for name in sorted(state)]
    return "heldout" if bucket(key, 10) == 0 else "train"


def play(rng: Random) -> Iterator[tuple[np.ndarray, dict[str, float]]]:
    """Yield frames of one game of random play, and the state of each."""
    env = registry.make(TASK)
    expert = registry.make_expert(TASK)
    env.reset(seed=rng.randrange(1 << 30))
    expert.reset(env, 0)
    try:
        for _ in range(DECISIONS // HELD[1]):
            action = rng.randrange(int(env.action_space.n))
            for _ in range(rng.randint(*HELD)):
                frame, _, terminated, truncated, _ = env.step(action)
                if terminated or truncated:
                    return
            yield frame, expert.state(env)
    finally:
        env.close()


def frame_record(
    frame: np.ndarray, state: Mapping[str, float], rng: Random, **meta: Any
) -> dict[str, Any] | None:
    """Return a record about a frame, or None where nothing about it is beyond doubt.

    Args:
        frame: the picture.
        state: where the boxers are.
        rng: of what is asked, and how.
        meta: of the record; frames of one game are a ``group``: what makes one hard, as that the
            boxers have changed sides, makes the next hard too.
    """
    told = describe(state)
    if told and rng.random() < CAPTION_SHARE:
        return caption(frame, told, **meta)
    asked = questions(state)
    if not asked:
        return None
    rng.shuffle(asked)
    messages = []
    for kind, colour, answer in asked:
        text = rng.choice(QUESTIONS[kind]).format(colour)
        messages += [user(text, None if messages else frame), assistant(answer)]
    return conversation(messages, kinds=[kind for kind, _, _ in asked], **meta)


def describe(state: Mapping[str, float]) -> str:
    """Return a caption, or nothing where the boxers stand one above the other."""
    right = state["opponent_x"] - state["player_x"]
    side = "left" if right > 0 else "right"
    return f"the white boxer is {side} of the black boxer" if abs(right) > 2 * MARGIN else ""


def questions(state: Mapping[str, float]) -> list[tuple[str, str, str]]:
    """Return (kind, boxer, answer) of all that the state answers by a clear margin."""
    found = []
    for colour, name in BOXERS.items():
        column = _part(state[f"{name}_x"], COLUMNS)
        row = _part(state[f"{name}_y"], ROWS)
        if column is not None and row is not None:
            found.append(("boxer place", colour, f"{row} {column}".strip() or "middle"))
    right = state["opponent_x"] - state["player_x"]
    if abs(right) > 2 * MARGIN:
        found.append(("boxer side", "white", "left" if right > 0 else "right"))
        found.append(("boxer side", "black", "right" if right > 0 else "left"))
    down = state["opponent_y"] - state["player_y"]
    if abs(down) > 2 * MARGIN:
        found.append(("boxer height", "", "white" if down > 0 else "black"))
    return found


def _part(value: float, parts: Mapping[str, tuple[float, float]]) -> str | None:
    """Return the part that holds `value` with a margin on both sides, or None."""
    for name, (start, stop) in parts.items():
        low = start + MARGIN if start > 0 else -1.0
        high = stop - MARGIN if stop < 1 else 2.0
        if low <= value <= high:
            return name
    return None
