"""Many futures of one MuJoCo state at once, and what a reward wants to know of them.

Shapes: N samples, H control steps, S numbers in a full physics state.

MuJoCo writes sensors before it integrates, so those of a state come with the step after it; one
physics step more than the horizon has therefore to be simulated. Where a body is, MuJoCo says only
of the state that it holds, so `Rollouts.frame` walks down the tree of bodies for all N x H states.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def physics_state(model: Any, data: Any) -> np.ndarray:
    """Return time, positions, velocities and activations as one vector, (S,)."""
    import mujoco

    kind = mujoco.mjtState.mjSTATE_FULLPHYSICS
    state = np.empty(mujoco.mj_stateSize(model, kind))
    mujoco.mj_getState(model, data, state, kind)
    return state


class Simulator:
    """Rolls a model out from a state under N sequences of actions.

    Args:
        model: the model of the environment itself: tasks move targets by changing it.
        substeps: physics steps per control step.
        threads: that simulate; 1 simulates in the caller's.
    """

    def __init__(self, model: Any, substeps: int, threads: int = 1) -> None:
        import mujoco
        from mujoco.rollout import Rollout

        self.model, self.substeps = model, substeps
        self._datas = [mujoco.MjData(model) for _ in range(threads)]
        self._pool = Rollout(nthread=threads if threads > 1 else 0)

    def rollouts(self, state: np.ndarray, warmstart: np.ndarray, actions: np.ndarray) -> Rollouts:
        """Return what N sequences of actions (N, H, controls) lead to.

        Args:
            state: from `physics_state`.
            warmstart: the solver's first guess, ``data.qacc_warmstart``; with it the result is what
                the environment itself will do, to the last bit.
            actions: controls, held during a control step.
        """
        every = self.substeps
        control = np.repeat(actions.astype(np.float64), every, axis=1)
        control = np.concatenate([control, control[:, -1:]], axis=1)
        states, sensors = self._pool.rollout(
            self.model,
            self._datas,
            state[None],
            control,
            initial_warmstart=warmstart[None],
        )
        return Rollouts(
            self.model, actions, states[:, every - 1 : -1 : every], sensors[:, every::every]
        )


class Rollouts:
    """Futures: after each control step a state and its sensors, all with leading axes (N, H)."""

    def __init__(
        self, model: Any, control: np.ndarray, states: np.ndarray, sensors: np.ndarray
    ) -> None:
        self.model, self.control, self.states, self._sensors = model, control, states, sensors
        self.qpos = states[..., 1 : 1 + model.nq]
        self.qvel = states[..., 1 + model.nq : 1 + model.nq + model.nv]
        identity = np.array([1.0, 0.0, 0.0, 0.0])[:, None, None]
        self._frames = {0: (np.zeros((3, 1, 1)), identity)}  # of the world

    def sensor(self, name: str) -> np.ndarray:
        """Return the values of a sensor of positions or velocities, (N, H, size)."""
        sensor = self.model.sensor(name)
        return self._sensors[..., sensor.adr[0] : sensor.adr[0] + sensor.dim[0]]

    def position(self, name: str, kind: str = "body") -> np.ndarray:
        """Return where a body, its "inertia" (centre of mass), a geom or a site is, (3, N, H)."""
        if kind in ("body", "inertia"):
            body = self.model.body(name).id
            offset = self.model.body_ipos[body] if kind == "inertia" else np.zeros(3)
        else:
            part = getattr(self.model, kind)(name)
            body, offset = part.bodyid[0], part.pos
        origin, turn = self.frame(body)
        return origin + _rotate(turn, offset)

    def upright(self, name: str) -> np.ndarray:
        """Return the cosine between a body's z axis and the vertical, (N, H)."""
        w, x, y, z = self.frame(self.model.body(name).id)[1]
        return w * w - x * x - y * y + z * z

    def frame(self, body: int) -> tuple[np.ndarray, np.ndarray]:
        """Return origin (3, N, H) and orientation (a quaternion, (4, N, H)) of a body."""
        if body not in self._frames:
            model = self.model
            origin, turn = self.frame(model.body_parentid[body])
            origin = origin + _rotate(turn, model.body_pos[body])
            turn = _multiply(turn, model.body_quat[body])
            first = model.body_jntadr[body]
            for joint in range(first, first + model.body_jntnum[body]):
                origin, turn = self._move(joint, origin, turn)
            self._frames[body] = origin, turn
        return self._frames[body]

    def _move(
        self, joint: int, origin: np.ndarray, turn: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        model, (free, ball, slide) = self.model, (0, 1, 2)  # mjtJoint
        start, kind = model.jnt_qposadr[joint], model.jnt_type[joint]
        if kind == free:
            values = np.moveaxis(self.qpos[..., start : start + 7], -1, 0)
            return values[:3], values[3:] / np.linalg.norm(values[3:], axis=0)
        angle, axis = self.qpos[..., start] - model.qpos0[start], model.jnt_axis[joint]
        if kind == slide:
            return origin + _rotate(turn, axis) * angle, turn
        if kind == ball:
            values = np.moveaxis(self.qpos[..., start : start + 4], -1, 0)
            by = values / np.linalg.norm(values, axis=0)
        else:
            by = np.concatenate([np.cos(angle / 2)[None], _column(axis) * np.sin(angle / 2)])
        anchor = origin + _rotate(turn, model.jnt_pos[joint])
        turn = _multiply(turn, by)
        return anchor - _rotate(turn, model.jnt_pos[joint]), turn


def _column(vector: Sequence[float]) -> np.ndarray:
    """Return a constant vector in the shape of (components, N, H)."""
    array = np.asarray(vector)
    return array[:, None, None] if array.ndim == 1 else array


def _rotate(turn: np.ndarray, vector: np.ndarray) -> np.ndarray:
    if not vector.any():
        return np.zeros((3, 1, 1))
    vector = _column(vector)
    twice = 2 * _cross(turn[1:], vector)
    return vector + turn[0] * twice + _cross(turn[1:], twice)


def _cross(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.stack(
        [a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]]
    )


def _multiply(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the product of quaternions: first `b`, then `a`."""
    b = _column(b)
    real = a[0] * b[0] - (a[1:] * b[1:]).sum(axis=0)
    return np.concatenate([real[None], a[0] * b[1:] + b[0] * a[1:] + _cross(a[1:], b[1:])])
