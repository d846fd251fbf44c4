"""MuJoCo, loaded with a graphics backend that works here.

MuJoCo reads the environment variable MUJOCO_GL when it is imported, and its default needs a screen.
On a machine without one, the first backend that works is written to the variable beforehand;
worker processes inherit it. A backend that was asked for and does not load is replaced by none:
most tasks draw nothing, and the first picture says what is wrong.
"""

from __future__ import annotations

import atexit
import os
import subprocess
import sys
import warnings
from functools import cache
from importlib.util import find_spec
from types import ModuleType
from typing import Any

BACKENDS = {
    "egl": "apt install libegl1 libgl1-mesa-dri, or the graphics driver of the GPU",
    "osmesa": "apt install libosmesa6",
}
"""Backends that need no screen, the faster first, and what installs them."""
NONE = "disable"
"""The value of MUJOCO_GL with which MuJoCo simulates and does not draw."""

TRY_SECONDS = 60.0
"""After which a driver that hangs counts as one that does not work."""
_refused: dict[str, BaseException] = {}
"""What MUJOCO_GL was before it was replaced, and why."""
_TRY = "import mujoco; c = mujoco.GLContext(8, 8); c.make_current(); c.free()"


def load_mujoco() -> ModuleType:
    """Return the module `mujoco`, after choosing its backend where that is still open.

    Raises:
        ImportError: where it is not installed, or does not load whatever the backend.
    """
    if "mujoco" not in sys.modules and find_spec("mujoco") is not None:
        _choose_backend()
    try:
        import mujoco
    except Exception as error:  # of the backend: OpenGL's loader raises all kinds
        if isinstance(error, ModuleNotFoundError) and error.name == "mujoco":
            raise
        chosen, os.environ["MUJOCO_GL"] = os.environ.get("MUJOCO_GL", ""), NONE
        try:
            import mujoco
        except Exception as other:  # it was not the backend
            os.environ["MUJOCO_GL"] = chosen
            raise ImportError(f"mujoco does not load: {other}") from other
        _refused[chosen] = error
    return mujoco


def open_renderer(model: Any, height: int, width: int) -> Any:
    """Return a `mujoco.Renderer` that is closed at exit, or by `close`.

    Raises:
        ValueError: where nothing can be drawn here; see `explain`.
    """
    mujoco = load_mujoco()

    class Renderer(mujoco.Renderer):  # type: ignore[misc, name-defined]
        """One whose end is silent where its beginning has failed."""

        _gl_context = _mjr_context = None

    context = getattr(mujoco, "GLContext", None)
    if context is not None and not hasattr(context, "_context"):
        context._context = None  # its __del__ reads what a failed __init__ has not set
    with warnings.catch_warnings(record=True) as told:  # GLFW has the reason, and goes on
        warnings.simplefilter("always")
        try:
            renderer = Renderer(model, height, width)
        except Exception as error:  # OpenGL's loaders raise all kinds
            raise explain(told[0].message if told else error) from error
    close_at_exit(renderer)
    return renderer


def _choose_backend() -> None:
    """Set MUJOCO_GL where the user has not and there is no screen."""
    screen = os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    if os.environ.get("MUJOCO_GL") or screen or sys.platform != "linux":
        return
    working = (backend for backend in BACKENDS if fault(backend) is None)
    os.environ["MUJOCO_GL"] = next(working, NONE)


@cache
def fault(backend: str) -> str | None:
    """Return why a backend cannot draw, in one line; None where it can.

    A process of its own tries it, for a fifth of a second: a process can load only one backend.
    """
    environment = {k: v for k, v in os.environ.items() if k != "PYOPENGL_PLATFORM"}
    environment["MUJOCO_GL"] = backend
    command = [sys.executable, "-c", _TRY]
    try:
        tried = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=TRY_SECONDS
        )
    except subprocess.TimeoutExpired:
        return f"it did not draw within {TRY_SECONDS:g} s"
    return None if tried.returncode == 0 else _error_in(tried.stderr)


def explain(error: BaseException | str) -> ValueError:
    """Return the error for a user whose pictures cannot be drawn: what was tried, what to do."""
    chosen = os.environ.get("MUJOCO_GL", "")
    if _refused:
        ((chosen, error),) = _refused.items()
    faults = {backend: fault(backend) for backend in BACKENDS}
    tried = {name: why for name, why in faults.items() if why is not None}
    if chosen == NONE:
        tried = {f"MUJOCO_GL={NONE}": "nothing is drawn", **tried}
    elif chosen not in tried:
        first = f"MUJOCO_GL={chosen}" if chosen else "MUJOCO_GL not set"
        tried = {first: " ".join(str(error).split()) or type(error).__name__, **tried}
    works = [name for name, why in faults.items() if why is None]
    if works:
        advice = f"Set MUJOCO_GL={works[0]}, which works here."
    else:
        ways = "; ".join(f"{name}: {how}" for name, how in BACKENDS.items())
        advice = f"Install one ({ways}) and leave MUJOCO_GL unset."
    reasons = "; ".join(f"{name}: {why}" for name, why in tried.items())
    return ValueError(f"expected a backend of MuJoCo that can draw; got {reasons}. {advice}")


def close_at_exit(*renderers: Any) -> None:
    """Close these, and all given before that are still open, ahead of everything else at exit.

    The backend ends at exit too, and complains of what is closed after it. Call it once more after
    an import that may have loaded a backend: what was registered last runs first.
    """
    _OPEN.update(renderers)
    atexit.unregister(_close_all)
    atexit.register(_close_all)


def close(renderer: Any) -> None:
    """Close one that was given to `close_at_exit`."""
    _OPEN.discard(renderer)
    renderer.close()


_OPEN: set[Any] = set()


def _close_all() -> None:
    while _OPEN:
        _OPEN.pop().close()


def _error_in(text: str) -> str:
    """Return the error that a traceback ends with, not what the clean-up after it complains of."""
    lines = text.split("Exception ignored")[0].splitlines()
    errors = [line for line in lines if line and not line.startswith((" ", "Traceback"))]
    return errors[-1][:200] if errors else "it ended without a word"
