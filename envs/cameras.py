"""Pictures beside, or in place of, a task's own observation: options after "?" in its id.

```
metaworld/push-v3?camera=corner2                    the state, and a picture of 64 x 64
metaworld/push-v3?camera=corner2,gripperPOV         two pictures
dm_control/cartpole-swingup?camera=0&size=80x64     80 wide, 64 high
dm_control/cartpole-swingup?camera=0&state=no       the picture alone
```
One camera fills the key ``image``, several fill ``image_<name>``. What the task itself shows keeps
its keys, or becomes ``state``; without the state, texts stay, for they say what to do.

A suite that offers cameras has a function ``pictures(env, view)`` that returns an object like
`MuJoCoPictures`. Experts play such tasks too: they are shown the task's own observation.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, replace
from typing import Any, Protocol

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from gato.envs import graphics
from gato.envs.episode import TaskSpec

OPTIONS = ("camera", "size", "state")
SMALLEST, LARGEST = 16, 1024
"""Limits of a picture's width and height."""
FREE = "free"
"""The camera of a viewer that is just opened, for models that have none."""

_OPTIONS_START = re.compile(r"\?(?=[^/?*\[\]]*=)")


class Pictures(Protocol):
    """What draws; made from an environment and a `View`."""

    def reset(self) -> None:
        """Take note that an episode has started."""

    def draw(self, camera: str) -> np.ndarray:
        """Return what the camera sees now, uint8 of shape (height, width, 3)."""

    def close(self) -> None:
        """Let go of what draws."""


@dataclass(frozen=True)
class View:
    """What the options of an id ask for."""

    cameras: tuple[str, ...]
    width: int = 64
    height: int = 64
    state: bool = True

    def key(self, camera: str) -> str:
        return "image" if len(self.cameras) == 1 else f"image_{camera}"


def split(task_id: str) -> tuple[str, str]:
    """Return a task id, or a pattern of ids, without its options, and the options.

    >>> split("metaworld/*?camera=corner2"), split("babyai/GoTo?-v0")
    (('metaworld/*', 'camera=corner2'), ('babyai/GoTo?-v0', ''))
    """
    base, *options = _OPTIONS_START.split(task_id, maxsplit=1)
    return base, options[0] if options else ""


def view(options: str, task_id: str) -> View:
    """Return what `options` ask for.

    Raises:
        ValueError: for an unknown option or a value it cannot have.
    """
    given: dict[str, str] = {}
    for part in options.split("&"):
        name, _, value = part.partition("=")
        if name not in OPTIONS:
            close = difflib.get_close_matches(name, OPTIONS, n=1)
            hint = f"closest: {close[0]}" if close else f"known: {', '.join(OPTIONS)}"
            raise ValueError(f"expected known options in {task_id!r}; got {name!r} ({hint}).")
        if name in given or not value:
            raise ValueError(f"expected one value for {name!r} in {task_id!r}; got {options!r}.")
        given[name] = value
    if "camera" not in given:
        raise ValueError(
            f"expected a camera in {task_id!r}; got only {options!r}. Add camera=NAME."
        )
    cameras = tuple(given["camera"].split(","))
    if len(set(cameras)) != len(cameras) or not all(cameras):
        raise ValueError(f"expected different cameras in {task_id!r}; got {given['camera']!r}.")
    if given.get("state", "yes") not in ("yes", "no"):
        raise ValueError(f"expected state=yes or state=no in {task_id!r}; got {given['state']!r}.")
    return View(cameras, *_size(given.get("size", "64x64"), task_id), given.get("state") != "no")


def _size(text: str, task_id: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d{1,5})x(\d{1,5})", text)
    sides = tuple(map(int, found.groups())) if found else ()
    if not sides or not all(SMALLEST <= side <= LARGEST for side in sides):
        raise ValueError(
            f"expected size=WIDTHxHEIGHT, each from {SMALLEST} to {LARGEST}, in {task_id!r}; "
            f"got {text!r}."
        )
    return sides[0], sides[1]


def with_pictures(spec: TaskSpec, task_id: str, view: View) -> TaskSpec:
    """Return the spec of `task_id`, which is the task of `spec` as seen through `view`.

    Scores are those of the task: what an observation shows does not change what is scored.
    """
    own = spec.observation_space
    parts = dict(own.spaces) if isinstance(own, spaces.Dict) else {"state": own}
    if not view.state:
        parts = {key: part for key, part in parts.items() if isinstance(part, spaces.Text)}
    picture = spaces.Box(0, 255, (view.height, view.width, 3), np.uint8)
    pictures = {view.key(camera): picture for camera in view.cameras}
    assert not set(parts) & set(pictures), (task_id, sorted(parts))
    observation = spaces.Dict(dict(sorted({**parts, **pictures}.items())))
    return replace(spec, id=task_id, observation_space=observation)


class CameraEnv(gym.Wrapper):
    """Adds pictures to what an environment shows; `base_observation` is what it showed itself."""

    def __init__(self, env: gym.Env, spec: TaskSpec, view: View, pictures: Pictures) -> None:
        super().__init__(env)
        self.observation_space = spec.observation_space
        self.base_observation: Any = None
        self._view, self._pictures = view, pictures

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Start the episode that the task itself starts with this seed."""
        observation, info = self.env.reset(seed=seed, options=options)
        self._pictures.reset()
        return self._observe(observation), info

    def step(self, action: Any) -> tuple[dict[str, Any], Any, bool, bool, dict[str, Any]]:
        """Act, and look."""
        observation, *rest = self.env.step(action)
        return self._observe(observation), *rest

    def close(self) -> None:
        """Let go of the simulator and of what draws."""
        self._pictures.close()
        super().close()

    def _observe(self, observation: Any) -> dict[str, Any]:
        self.base_observation = observation
        shown = observation if isinstance(observation, dict) else {"state": observation}
        drawn = {self._view.key(c): self._pictures.draw(c) for c in self._view.cameras}
        return {key: drawn[key] if key in drawn else shown[key] for key in self.observation_space}


class BaseExpert:
    """An expert of the task without pictures, shown what that task shows."""

    def __init__(self, expert: Any) -> None:
        self._expert = expert
        if hasattr(expert, "settings"):
            self.settings = expert.settings

    def reset(self, env: gym.Env, seed: int) -> None:
        """Start an episode."""
        self._expert.reset(env, seed)

    def act(self, env: gym.Env, observation: Any) -> Any:
        """Return the expert's action; the pictures are not looked at."""
        return self._expert.act(env, env.get_wrapper_attr("base_observation"))


class MuJoCoPictures:
    """Draws what cameras of a MuJoCo model see.

    Without shadows and reflections, which take a CPU four fifths of the time (Meta-World, 64 x 64).
    Cameras that hang upside down, as most of Meta-World's do, have their picture turned. What is
    drawn is a copy of the state, so that the episode stays as it is.
    """

    def __init__(self, env: gym.Env, view: View) -> None:
        self._mujoco = graphics.load_mujoco()
        base = env.unwrapped
        self._model, self._view, self._env = base.model, view, base
        self._cameras = {name: self._find(name) for name in view.cameras}
        self._shown = self._mujoco.MjData(self._model)
        kind = self._mujoco.mjtState.mjSTATE_INTEGRATION
        self._kind, self._state = kind, np.empty(self._mujoco.mj_stateSize(self._model, kind))
        whole = self._model.vis.global_
        whole.offwidth = max(whole.offwidth, view.width)
        whole.offheight = max(whole.offheight, view.height)
        self._renderer: Any = None
        self._open()

    def reset(self) -> None:
        """Load the ground anew where it has heights, which an episode may draw."""
        if self._model.nhfield:
            self.close()
            self._open()

    def draw(self, camera: str) -> np.ndarray:
        """Return what a camera sees now."""
        mujoco, model = self._mujoco, self._model
        mujoco.mj_getState(model, self._env.data, self._state, self._kind)
        mujoco.mj_setState(model, self._shown, self._state, self._kind)
        mujoco.mj_fwdPosition(model, self._shown)
        which, turned = self._cameras[camera]
        self._renderer.update_scene(self._shown, camera=which)
        flags = self._renderer.scene.flags
        flags[mujoco.mjtRndFlag.mjRND_SHADOW] = flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = 0
        picture = self._renderer.render()
        return picture[::-1, ::-1].copy() if turned else picture

    def close(self) -> None:
        """Let go of the drawing context."""
        if self._renderer is not None:
            graphics.close(self._renderer)
            self._renderer = None

    def _open(self) -> None:
        self._renderer = graphics.open_renderer(self._model, self._view.height, self._view.width)

    def _find(self, name: str) -> tuple[Any, bool]:
        """Return the camera of a name or number, and whether it hangs upside down."""
        if name == FREE:
            return self._free(), False
        known = [self._model.camera(i).name for i in range(self._model.ncam)]
        number = int(name) if name.isdecimal() else known.index(name) if name in known else -1
        if not 0 <= number < len(known):
            numbered = [called or str(i) for i, called in enumerate(known)]
            raise ValueError(
                f"expected one of the cameras {', '.join([*numbered, FREE])}, or a number below "
                f"{len(known)}; got camera={name!r}."
            )
        up = self._model.cam_mat0[number].reshape(3, 3)[2, 1]
        return number, bool(self._model.cam_bodyid[number] == 0 and up < -0.1)

    def _free(self) -> Any:
        """Return the camera that a viewer of the task starts with."""
        camera = self._mujoco.MjvCamera()
        self._mujoco.mjv_defaultFreeCamera(self._model, camera)
        renderer = getattr(self._env, "mujoco_renderer", None)
        for key, value in (getattr(renderer, "default_cam_config", None) or {}).items():
            if isinstance(value, np.ndarray):
                getattr(camera, key)[:] = value
            else:
                setattr(camera, key, value)
        return camera


class Rendered:
    """Gives an environment on MuJoCo its `render`: quick to draw, the right way up."""

    render_camera = FREE
    _film: MuJoCoPictures | None = None

    def render(self) -> np.ndarray:
        """Return a picture for people, uint8 of shape (240, 320, 3)."""
        if self._film is None:
            self._film = MuJoCoPictures(self, View((self.render_camera,), 320, 240))  # type: ignore[arg-type]
        return self._film.draw(self.render_camera)

    def close(self) -> None:
        """Let go of the simulator and of what draws."""
        if self._film is not None:
            self._film.close()
            self._film = None
        super().close()  # type: ignore[misc]
