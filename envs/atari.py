"""Atari 2600 games through the Arcade Learning Environment, seen as small colour frames.

The protocol is Machado et al. 2018 (sticky actions 0.25, each decision lasts 4 frames, the game's
minimal action set, 30 minutes at most) with Mnih et al. 2015's random number of idle frames at the
start. What the player sees is the maximum of the last two frames, averaged over areas.

Convention: an episode follows from its seed alone. Sticky actions are drawn here, frame by frame,
from the episode's own generator, and the emulator itself is deterministic; so an emulator state can
be copied and played on without touching the chance of the episode.
"""

from __future__ import annotations

import atexit
import weakref
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from gato.envs.episode import TaskSpec, require_kind
from gato.envs.pixels import shrink

SUITE = "atari"
EXTRA = "atari"
PACKAGES = ("ale-py", "gymnasium")

HEIGHT, WIDTH = 64, 64
"""Size of an observation, for every game."""
FRAME_SKIP = 4
STICKY = 0.25
"""Probability, per frame, that the emulator repeats its last action and not the new one."""
MAX_IDLE_FRAMES = 30
MAX_STEPS = 27_000
"""Decisions in 30 minutes at 60 frames a second."""
PROTOCOL = {
    "sticky_actions": STICKY,
    "frame_skip": FRAME_SKIP,
    "most_idle_frames": MAX_IDLE_FRAMES,
    "frame": [HEIGHT, WIDTH],
    "action_set": "minimal",
}

GAMES = {
    3: "backgammon freeway skiing",
    4: "atlantis atlantis2 blackjack breakout casino kaboom",
    5: "frogger pacman surround tetris video_checkers",
    6: (
        "air_raid basic_math bowling carnival demon_attack galaxian king_kong name_this_game pong "
        "pooyan qbert sir_lancelot space_invaders up_n_down"
    ),
    7: "assault",
    8: "gopher phoenix tutankham",
    9: ("asterix beam_rider crazy_climber enduro koolaid lost_luggage ms_pacman video_pinball"),
    10: "amidar mr_do othello tic_tac_toe_3d time_pilot video_chess wizard_of_wor",
    12: "turmoil",
    14: "asteroids keystone_kapers kung_fu_master",
    16: "journey_escape",
    18: (
        "adventure alien bank_heist battle_zone berzerk boxing centipede chopper_command crossbow "
        "darkchambers defender donkey_kong double_dunk earthworld elevator_action entombed et "
        "fishing_derby flag_capture frostbite gravitar hangman haunted_house hero human_cannonball "
        "ice_hockey jamesbond kangaroo klax krull laser_gates mario_bros miniature_golf "
        "montezuma_revenge pitfall pitfall2 private_eye riverraid road_runner robotank seaquest "
        "solaris space_war star_gunner superman tennis trondead venture video_cube word_zapper "
        "yars_revenge zaxxon"
    ),
}
"""ROMs that ale-py ships with a reward, by the size of their minimal action set."""


SCRIPTED = ("boxing", "breakout", "freeway", "pong")
"""Games with a scripted expert; the others have the look-ahead planner, which plays any game."""


def specs() -> dict[str, TaskSpec]:
    """Return the games by id, ``atari/<Game>-v5``."""
    return {
        task_id(game): _spec(game, actions)
        for actions, games in GAMES.items()
        for game in games.split()
    }


def task_id(game: str) -> str:
    """Return the task id of a ROM, with the name that Gymnasium gives the game.

    >>> task_id("space_invaders")
    'atari/SpaceInvaders-v5'
    """
    parts = ("3D" if part == "3d" else part.capitalize() for part in game.split("_"))
    return f"{SUITE}/{''.join(parts)}-v5"


def _spec(game: str, actions: int) -> TaskSpec:
    return TaskSpec(
        id=task_id(game),
        observation_space=spaces.Box(0, 255, (HEIGHT, WIDTH, 3), np.uint8),
        action_space=spaces.Discrete(actions),
        max_steps=MAX_STEPS,
        control_hz=60.0 / FRAME_SKIP,
        expert="scripted" if game in SCRIPTED else "planner",
    )


def make(spec: TaskSpec) -> gym.Env:
    """Return the game."""
    return AtariEnv(spec)


def expert(spec: TaskSpec, kind: str) -> Any:
    """Return the game's scripted expert, or the look-ahead planner, which plays any game."""
    game = _game(spec.id)
    require_kind(spec, kind, *(("scripted",) if game in SCRIPTED else ()), "planner")
    if kind == "planner":
        from gato.envs.experts.ale_planner import AlePlanner

        return AlePlanner(spec)
    from gato.envs.experts.atari import BoxingExpert
    from gato.envs.experts.atari_look_ahead import BreakoutExpert, FreewayExpert, PongExpert

    experts = {
        "boxing": BoxingExpert,
        "breakout": BreakoutExpert,
        "freeway": FreewayExpert,
        "pong": PongExpert,
    }
    return experts[game]()


class AtariEnv(gym.Env):
    """One game; `ram()` is the emulator's memory and `ale` the emulator, for experts."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 60 // FRAME_SKIP}  # noqa: RUF012
    render_mode = "rgb_array"

    def __init__(self, spec: TaskSpec) -> None:
        from ale_py import ALEInterface, LoggerMode, roms

        self.observation_space = spec.observation_space
        self.action_space = spec.action_space
        self._task, self._twin = spec, None
        ALEInterface.setLoggerMode(LoggerMode.Error)
        self.ale = ALEInterface()
        self.ale.setInt("random_seed", 0)  # the emulator's own chance: memory at power-on
        self.ale.setFloat("repeat_action_probability", 0.0)  # see the convention above
        self.ale.loadROM(roms.get_rom_path(_game(spec.id)))
        self.ale.reset_game()
        self._start = self.ale.cloneState()
        self._start_screen = self.ale.getScreenRGB()  # a restored state comes without its picture
        self._actions = self.ale.getMinimalActionSet()
        assert len(self._actions) == self.action_space.n, (spec.id, len(self._actions))
        self.action_names = tuple(action.name for action in self._actions)
        self._frames = np.zeros((2, *self.ale.getScreenDims(), 3), np.uint8)
        _OPEN.add(self)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start an episode after 0 to 30 idle frames; it follows from `seed` alone."""
        super().reset(seed=seed)
        self.ale.reset_game()  # clears the screen: some games draw only parts of it
        self.ale.restoreState(self._start)
        self._last = self._actions[0]
        idle = int(self.np_random.integers(MAX_IDLE_FRAMES + 1))
        for _ in range(idle):
            self.ale.act(self._actions[0])
        self._frames[:] = self.ale.getScreenRGB() if idle else self._start_screen
        return self._observe(), self._info()

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Hold `action` for 4 frames, each of which may repeat the action before instead."""
        if action not in self.action_space:
            raise ValueError(
                f"expected an action in [0, {len(self._actions)}), one of "
                f"{', '.join(self.action_names)}; got {action!r}."
            )
        wanted, reward = self._actions[int(action)], 0.0
        for i, stick in enumerate(self.np_random.random(FRAME_SKIP) < STICKY):
            if not stick:
                self._last = wanted
            reward += self.ale.act(self._last)
            if i >= FRAME_SKIP - 2:
                self.ale.getScreenRGB(self._frames[i - FRAME_SKIP + 2])
        terminated = self.ale.game_over(with_truncation=False)
        return self._observe(), reward, terminated, False, self._info()

    def twin(self) -> AtariEnv:
        """Return a second emulator in the present state, to look ahead in.

        A restored state comes without its picture, of which some games draw only parts: a look
        ahead in the emulator that plays would be seen in later frames.
        """
        if self._twin is None:
            self._twin = AtariEnv(self._task)
        self._twin.restore(self.snapshot())
        return self._twin

    def snapshot(self) -> tuple[Any, Any]:
        """Return the emulator's state, without the chance of the episode, for `restore`."""
        return self.ale.cloneState(), self._last

    def restore(self, snapshot: tuple[Any, Any]) -> None:
        """Go to a snapshot, of this emulator or its twin; what was seen last stays."""
        state, self._last = snapshot
        self.ale.restoreState(state)

    def imagine(self, action: int, rng: np.random.Generator) -> float:
        """Play a decision as `step` does but with the chance of `rng`, and return its reward."""
        wanted, reward = self._actions[action], 0.0
        for stick in (rng.random(FRAME_SKIP) < STICKY).tolist():
            if not stick:
                self._last = wanted
            reward += self.ale.act(self._last)
        return reward

    def close(self) -> None:
        """Let go of the emulator; the environment cannot be used any more."""
        if self.__dict__.get("_twin") is not None:
            self._twin.close()
        for name in ("ale", "_start", "_actions", "_last"):
            self.__dict__.pop(name, None)

    def ram(self) -> np.ndarray:
        """Return the emulator's 128 bytes of memory, uint8."""
        return self.ale.getRAM()

    def render(self) -> np.ndarray:
        """Return the full screen of the last frame, uint8 RGB."""
        return self._frames[1].copy()

    def _observe(self) -> np.ndarray:
        return shrink(np.maximum(*self._frames), HEIGHT, WIDTH)

    def _info(self) -> dict[str, Any]:
        return {"lives": self.ale.lives()}


_OPEN: weakref.WeakSet[AtariEnv] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """Close what is still open: the emulator's binding complains loudly of objects at exit."""
    for env in list(_OPEN):
        env.close()


def _game(spec_id: str) -> str:
    return next(
        game for games in GAMES.values() for game in games.split() if task_id(game) == spec_id
    )
