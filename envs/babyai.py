"""BabyAI: levels of a grid world with instructions in a small English.

The observation is what the agent sees, symbolically: a 7x7 grid of (object, colour, state), the
compass direction it faces, and the mission as text. Success is any positive reward.

Convention: the grid is Minigrid's own array, first index from left to right, second from far to
near; the agent is at (3, 6) and looks towards (3, 0).
"""

from __future__ import annotations

import contextlib
import io
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from gato.envs.cameras import View
from gato.envs.episode import ANY_TEXT, TaskSpec, require_kind
from gato.envs.pixels import shrink

SUITE = "babyai"
EXTRA = "babyai"
PACKAGES = ("minigrid", "gymnasium")

LEVELS = {
    16: "GoToObjS4-v0",
    25: "GoToLocalS5N2-v0",
    36: "GoToLocalS6N2-v0 GoToLocalS6N3-v0 GoToLocalS6N4-v0 GoToObjS6-v1",
    49: "GoToLocalS7N4-v0 GoToLocalS7N5-v0 PickupDist-v0",
    50: "OpenRedDoor-v0 PutNextLocalS5N3-v0",
    64: (
        "GoToLocal-v0 GoToLocalS8N2-v0 GoToLocalS8N3-v0 GoToLocalS8N4-v0 GoToLocalS8N5-v0 "
        "GoToLocalS8N6-v0 GoToLocalS8N7-v0 GoToObj-v0 GoToObjMazeS4R2-v0 GoToRedBall-v0 "
        "GoToRedBallGrey-v0 GoToRedBallNoDists-v0 GoToRedBlueBall-v0 OneRoomS8-v0 PickupLoc-v0"
    ),
    72: "PutNextLocalS6N4-v0 UnlockPickup-v0 UnlockPickupDist-v0",
    128: "PutNextLocal-v0 PutNextS4N1-v0",
    144: "GoToObjMazeS4-v0 OneRoomS12-v0",
    200: "PutNextS5N1-v0 PutNextS5N2-v0 PutNextS5N2Carrying-v0",
    225: "GoToObjMazeS5-v0",
    256: "OneRoomS16-v0",
    270: "KeyCorridorS3R1-v0 KeyCorridorS3R2-v0 KeyCorridorS3R3-v0",
    288: "PickupAbove-v0 PutNextS6N3-v0 PutNextS6N3Carrying-v0",
    300: "SynthS5R2-v0",
    324: "GoToObjMazeS6-v0",
    392: "PutNextS7N4-v0 PutNextS7N4Carrying-v0",
    400: "GoToSeqS5R2-v0 MoveTwoAcrossS5N2-v0 OneRoomS20-v0",
    441: "ActionObjDoor-v0 GoToDoor-v0 GoToObjMazeS7-v0",
    480: "KeyCorridorS4R3-v0",
    500: "FindObjS5-v0",
    576: (
        "BlockedUnlockPickup-v0 GoTo-v0 GoToImpUnlock-v0 GoToObjDoor-v0 GoToObjMaze-v0 "
        "GoToObjMazeOpen-v0 GoToOpen-v0 KeyInBox-v0 Open-v0 OpenDoor-v0 OpenDoorColor-v0 "
        "OpenDoorLoc-v0 Pickup-v0 UnblockPickup-v0 Unlock-v0 UnlockLocal-v0 UnlockLocalDist-v0"
    ),
    720: "FindObjS6-v0 OpenDoorsOrderN2-v0 OpenDoorsOrderN4-v0 OpenRedBlueDoors-v0 OpenTwoDoors-v0",
    750: "KeyCorridorS5R3-v0",
    800: "MiniBossLevel-v0",
    980: "FindObjS7-v0",
    1024: "MoveTwoAcrossS8N9-v0",
    1080: "KeyCorridor-v0 KeyCorridorS6R3-v0 UnlockToUnlock-v0",
    1152: "Synth-v0 SynthLoc-v0",
    2304: "GoToSeq-v0",
    4608: "BossLevel-v0 BossLevelNoUnlock-v0 SynthSeq-v0",
}
"""Level names by the longest time limit that any of their missions has."""

BEYOND_THE_BOT = {
    "KeyInBox-v0",
    "PutNextS5N2Carrying-v0",
    "PutNextS6N3Carrying-v0",
    "PutNextS7N4Carrying-v0",
}
"""Levels that the bot never solves: it knows neither opening a box nor starting with an object."""

MOST_STARTS = 2000
"""Places that are tried for the agent before another grid is drawn."""


def specs() -> dict[str, TaskSpec]:
    """Return the levels by id."""
    cell = [11, 6, 4]  # Minigrid's objects, colours and states
    observation = spaces.Dict(
        {
            "direction": spaces.Discrete(4),
            "grid": spaces.MultiDiscrete(np.full((7, 7, 3), cell), dtype=np.uint8),
            "mission": ANY_TEXT(),
        }
    )
    action = spaces.Discrete(7)
    return {
        f"{SUITE}/{name}": TaskSpec(
            id=f"{SUITE}/{name}",
            observation_space=observation,
            action_space=action,
            max_steps=max_steps,
            control_hz=1.0,  # a turn-based world: one decision per turn
            measure="success",
            expert="none" if name in BEYOND_THE_BOT else "planner",
        )
        for max_steps, names in LEVELS.items()
        for name in names.split()
    }


def make(spec: TaskSpec) -> gym.Env:
    """Return the level's environment."""
    import minigrid  # noqa: F401 - registers the levels

    name = f"BabyAI-{spec.id.split('/')[1]}"
    base = gym.make(name, disable_env_checker=True, render_mode="rgb_array").unwrapped
    return BabyAIEnv(base, spec)


def expert(spec: TaskSpec, kind: str) -> Any:
    """Return the BabyAI bot, which plans on the true grid but only over what it has seen."""
    require_kind(spec, kind, "planner")
    from gato.envs.experts.babyai import BotExpert

    return BotExpert()


class GridPictures:
    """Draws a level: ``camera=grid`` all of it, ``camera=agent`` the 49 cells that it sees."""

    def __init__(self, env: gym.Env, view: View) -> None:
        self._env, self._view = env.unwrapped, view
        unknown = set(view.cameras) - {"grid", "agent"}
        if unknown:
            raise ValueError(f"expected camera=grid or camera=agent; got {sorted(unknown)}.")

    def reset(self) -> None:
        """Nothing to load anew."""

    def draw(self, camera: str) -> np.ndarray:
        """Return the picture, its cells scaled to the size asked for."""
        env, view = self._env, self._view
        cells = min(env.grid.width, env.grid.height) if camera == "grid" else env.agent_view_size
        tile = -(-max(view.width, view.height) // cells)  # no smaller than what is asked for
        if camera == "grid":
            whole = env.get_full_render(highlight=True, tile_size=tile)
        else:
            whole = env.get_pov_render(tile_size=tile)
        return shrink(whole, view.height, view.width)

    def close(self) -> None:
        """Nothing to let go of."""


pictures = GridPictures


class BabyAIEnv(gym.Wrapper):
    """A level with a symbolic observation; remembers its last action for the bot."""

    def __init__(self, base: gym.Env, spec: TaskSpec) -> None:
        super().__init__(base)
        self.observation_space = spec.observation_space
        self.action_space = spec.action_space
        self.last_action: int | None = None
        self._place, base.place_obj = base.place_obj, self._place_within_limits

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Start an episode; mission and grid depend on `seed` alone."""
        self.last_action, self._starts = None, MOST_STARTS
        with contextlib.redirect_stdout(io.StringIO()):  # rejected missions are printed there
            observation, info = self.unwrapped.reset(seed=seed, options=options)
        return _observe(observation), {**info, "success": False}

    def _place_within_limits(self, thing: Any, *arguments: Any, **options: Any) -> tuple[int, int]:
        """Place a thing or, where it is None, the agent.

        Where all free cells of a full room face objects, Minigrid would try them for ever. The
        error is its own for a grid that cannot be finished: it draws another.
        """
        if thing is None:
            self._starts -= 1
            if self._starts < 0:
                self._starts = MOST_STARTS
                raise RecursionError("the agent finds no place")
        return self._place(thing, *arguments, **options)

    def step(self, action: int) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """Act; `info["success"]` is true where the mission has just been fulfilled."""
        self.last_action = int(action)
        observation, reward, terminated, truncated, info = self.unwrapped.step(self.last_action)
        info = {**info, "success": reward > 0}
        return _observe(observation), float(reward), terminated, truncated and not terminated, info


def _observe(observation: dict[str, Any]) -> dict[str, Any]:
    return {
        "direction": np.int64(observation["direction"]),
        "grid": observation["image"],
        "mission": observation["mission"],
    }
