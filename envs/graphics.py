"""Which of MuJoCo's graphics backends draws: decided once, before MuJoCo is first imported.

MuJoCo reads the environment variable MUJOCO_GL when it is imported, and its default needs a screen.
On a machine without one, the first backend that works is chosen here and written to the variable,
which worker processes inherit.
"""

from __future__ import annotations

import os
import subprocess
import sys

BACKENDS = {
    "egl": "apt install libegl1 libgl1-mesa-dri, or the driver of the GPU",
    "osmesa": "apt install libosmesa6",
}
"""Backends that need no screen, the faster first, with what installs them."""
NONE = "disable"
"""The value of MUJOCO_GL with which MuJoCo simulates and does not draw."""

_TRY = "import mujoco; c = mujoco.GLContext(8, 8); c.make_current(); c.free()"


def choose_backend() -> None:
    """Set MUJOCO_GL where the user has not, there is no screen, and MuJoCo is still to come."""
    screen = os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    if os.environ.get("MUJOCO_GL") or screen or "mujoco" in sys.modules or sys.platform != "linux":
        return
    working = (backend for backend in BACKENDS if fault(backend) is None)
    os.environ["MUJOCO_GL"] = next(working, NONE)


def fault(backend: str) -> str | None:
    """Return why a backend cannot draw, in one line; None where it can. Takes a fifth of a second.

    A process of its own tries it, because a process can load only one.
    """
    environment = {k: v for k, v in os.environ.items() if k != "PYOPENGL_PLATFORM"}
    environment["MUJOCO_GL"] = backend
    tried = subprocess.run(
        [sys.executable, "-c", _TRY], env=environment, capture_output=True, text=True
    )
    return None if tried.returncode == 0 else _last_line(tried.stderr)


def explain(error: BaseException) -> ValueError:
    """Return the error for a user whose cameras cannot draw: what was tried, what to do."""
    chosen = os.environ.get("MUJOCO_GL", "")
    first = f"MUJOCO_GL={chosen}" if chosen else "the default"
    tried = {first: " ".join(str(error).split()) or type(error).__name__}
    faults = {backend: fault(backend) for backend in BACKENDS}
    tried |= {name: why for name, why in faults.items() if why is not None}
    works = [name for name, why in faults.items() if why is None]
    if works:
        advice = f"Set MUJOCO_GL={works[0]}, which works here."
    else:
        ways = "; ".join(f"{name}: {how}" for name, how in BACKENDS.items())
        advice = f"Install one of them ({ways}), then set MUJOCO_GL to its name."
    reasons = "; ".join(f"{name}: {why}" for name, why in tried.items())
    return ValueError(
        f"expected a graphics backend that can draw; none of these can: {reasons}. {advice}"
    )


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line and not line.startswith(" ")]
    errors = [line for line in lines if "Error" in line]
    return (errors or lines or ["it ended without a word"])[-1][:200]
