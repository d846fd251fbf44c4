"""The DeepMind control suite: physics tasks with rewards between 0 and 1 at each of 1000 decisions.

The observation keeps the suite's own keys, as float32; a key that is one number has shape (1,). No
episode ends before its time, except those of `lqr` that come to rest. Rewards are the suite's, so
the best return is 1000 (`lqr` may fall below 0).

Convention: the linear systems of `lqr` and the lengths of other bodies drawn while a task is loaded
are those of seed 0; what is drawn at the start of an episode follows from the seed of `reset`.
"""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from gato.envs.cameras import MuJoCoPictures, Rendered
from gato.envs.episode import TaskSpec, require_kind
from gato.envs.experts.dm_control_rewards import PLANS
from gato.envs.experts.mujoco_planner import MujocoPlanner
from gato.envs.graphics import close_at_exit, load_mujoco

SUITE = "dm_control"
EXTRA = "dm_control"
PACKAGES = ("dm_control", "mujoco")

MAX_STEPS = 1000
LARGEST_FORCE = 5.0
"""Bound of the actions of `lqr`, which the suite leaves open; its best controller stays below."""

_ARM = "arm_pos:8x2 arm_vel:8 touch:5 hand_pos:4 "
_DOG = (
    "joint_angles:73 joint_velocites:73 torso_pelvis_height:2 z_projection:9 "
    "torso_com_velocity:3 inertial_sensors:9 foot_forces:12 touch_sensors:4 actuator_state:38 "
)
_FINGER = "position:4 velocity:3 touch:2 "
_HUMANOID = "head_height:1 extremities:12 torso_vertical:3 com_velocity:3 "
_QUADRUPED = "egocentric_state:44 torso_velocity:3 torso_upright:1 imu:6 force_torque:24 "
BODIES = {
    "acrobot": (100.0, 1, "orientations:4 velocity:2"),
    "ball_in_cup": (50.0, 2, "position:4 velocity:4"),
    "cartpole": (100.0, 1, "position:3 velocity:2"),
    "cartpole-three_poles": (100.0, 1, "position:7 velocity:4"),
    "cartpole-two_poles": (100.0, 1, "position:5 velocity:3"),
    "cheetah": (100.0, 6, "position:8 velocity:9"),
    "dog": (1 / 0.015, 38, _DOG),
    "dog-fetch": (1 / 0.015, 38, _DOG + "ball_state:6 target_position:3"),
    "finger": (50.0, 2, _FINGER + "target_position:2 dist_to_target:1"),
    "finger-spin": (50.0, 2, _FINGER),
    "fish-swim": (25.0, 5, "joint_angles:7 upright:1 target:3 velocity:13"),
    "fish-upright": (25.0, 5, "joint_angles:7 upright:1 velocity:13"),
    "hopper": (50.0, 4, "position:6 velocity:7 touch:2"),
    "humanoid": (40.0, 21, _HUMANOID + "joint_angles:21 velocity:27"),
    "humanoid-run_pure_state": (40.0, 21, "position:28 velocity:27"),
    "humanoid_CMU": (50.0, 56, _HUMANOID + "joint_angles:56 velocity:62"),
    "lqr-lqr_2_1": (1 / 0.03, 1, "position:2 velocity:2"),
    "lqr-lqr_6_2": (1 / 0.03, 2, "position:6 velocity:6"),
    "manipulator": (100.0, 5, _ARM + "object_pos:4 object_vel:3 target_pos:4"),
    "pendulum": (50.0, 1, "orientation:2 velocity:1"),
    "point_mass": (50.0, 2, "position:2 velocity:2"),
    "quadruped": (50.0, 12, _QUADRUPED),
    "quadruped-escape": (50.0, 12, _QUADRUPED + "origin:3 rangefinder:20"),
    "quadruped-fetch": (50.0, 12, _QUADRUPED + "ball_state:9 target_position:3"),
    "reacher": (50.0, 2, "position:2 to_target:2 velocity:2"),
    "stacker-stack_2": (100.0, 5, _ARM + "box_pos:2x4 box_vel:6 target_pos:2"),
    "stacker-stack_4": (100.0, 5, _ARM + "box_pos:4x4 box_vel:12 target_pos:2"),
    "swimmer-swimmer15": (1 / 0.03, 14, "joints:14 to_target:2 body_velocities:45"),
    "swimmer-swimmer6": (1 / 0.03, 5, "joints:5 to_target:2 body_velocities:18"),
    "walker": (40.0, 6, "orientations:14 height:1 velocity:9"),
}
"""Decisions a second, actions, and shapes by key, of a task or else of all others of its domain."""

INSTRUCTIONS = {
    "acrobot-swingup": "swing both links up",
    "acrobot-swingup_sparse": "swing both links up; only upright counts",
    "ball_in_cup-catch": "swing the ball into the cup",
    "cartpole-balance": "balance the pole on the cart",
    "cartpole-balance_sparse": "balance the pole on the cart; only upright counts",
    "cartpole-swingup": "swing the pole up on the cart",
    "cartpole-swingup_sparse": "swing the pole up on the cart; only upright counts",
    "cartpole-three_poles": "swing three linked poles up on the cart",
    "cartpole-two_poles": "swing two linked poles up on the cart",
    "cheetah-run": "run forward as a cheetah",
    "dog-fetch": "bring the ball to the target as a dog",
    "dog-run": "run as a dog",
    "dog-stand": "stand as a dog",
    "dog-trot": "trot as a dog",
    "dog-walk": "walk as a dog",
    "finger-spin": "spin the body with the finger",
    "finger-turn_easy": "turn the body's tip to the large target with the finger",
    "finger-turn_hard": "turn the body's tip to the small target with the finger",
    "fish-swim": "swim to the target as a fish",
    "fish-upright": "stay upright as a fish",
    "hopper-hop": "hop forward on one leg",
    "hopper-stand": "stand on one leg",
    "humanoid-run": "run on two legs",
    "humanoid-run_pure_state": "run on two legs, knowing joints alone",
    "humanoid-stand": "stand up on two legs",
    "humanoid-walk": "walk on two legs",
    "humanoid_CMU-run": "run with the body of a person",
    "humanoid_CMU-stand": "stand up with the body of a person",
    "humanoid_CMU-walk": "walk with the body of a person",
    "lqr-lqr_2_1": "bring two masses on springs to rest with one force",
    "lqr-lqr_6_2": "bring six masses on springs to rest with two forces",
    "manipulator-bring_ball": "bring the ball to the target",
    "manipulator-bring_peg": "bring the peg to the target",
    "manipulator-insert_ball": "put the ball into the basket",
    "manipulator-insert_peg": "put the peg into the slot",
    "pendulum-swingup": "swing the pendulum up",
    "point_mass-easy": "move the point to the target",
    "point_mass-hard": "move the point to the target with mixed-up motors",
    "quadruped-escape": "climb out of the bowl on four legs",
    "quadruped-fetch": "bring the ball to the target on four legs",
    "quadruped-run": "run on four legs",
    "quadruped-walk": "walk on four legs",
    "reacher-easy": "reach the large target with the fingertip",
    "reacher-hard": "reach the small target with the fingertip",
    "stacker-stack_2": "stack two boxes on the target",
    "stacker-stack_4": "stack four boxes on the target",
    "swimmer-swimmer15": "swim to the target with fifteen links",
    "swimmer-swimmer6": "swim to the target with six links",
    "walker-run": "run on two flat legs",
    "walker-stand": "stand on two flat legs",
    "walker-walk": "walk on two flat legs",
}

pictures = MuJoCoPictures


def specs() -> dict[str, TaskSpec]:
    """Return the tasks by id, ``dm_control/<domain>-<task>``."""
    found = {}
    for name, instruction in INSTRUCTIONS.items():
        domain = name.split("-")[0]
        control_hz, actions, observed = BODIES.get(name) or BODIES[domain]
        found[f"{SUITE}/{name}"] = TaskSpec(
            id=f"{SUITE}/{name}",
            observation_space=_observation_space(observed),
            action_space=_action_space(domain, actions),
            max_steps=MAX_STEPS,
            control_hz=control_hz,
            instruction=instruction,
            expert="planner" if name in PLANS else "none",
        )
    return found


def make(spec: TaskSpec) -> gym.Env:
    """Return the task's environment."""
    load_mujoco()
    from dm_control import suite

    close_at_exit()
    if not hasattr(np, "in1d"):  # numpy 2.4 has it under the newer name alone, and
        np.in1d = np.isin  # type: ignore[attr-defined] # quadruped of dm_control 1.0.28 needs it
    domain, task = spec.id.split("/")[1].split("-")
    endless = {"time_limit": float("inf"), "random": 0}  # the registry limits the time
    return DMControlEnv(suite.load(domain, task, task_kwargs=endless), spec)


def expert(spec: TaskSpec, kind: str) -> Any:
    """Return the look-ahead planner of the tasks whose reward and budget it knows."""
    name = spec.id.split("/")[1]
    require_kind(spec, kind, *(["planner"] if name in PLANS else []))
    return MujocoPlanner(spec, PLANS[name])


def _observation_space(observed: str) -> spaces.Dict:
    shapes = dict(pair.split(":") for pair in observed.split())
    return spaces.Dict(
        {
            key: spaces.Box(-np.inf, np.inf, tuple(map(int, shape.split("x"))), np.float32)
            for key, shape in sorted(shapes.items())
        }
    )


def _action_space(domain: str, actions: int) -> spaces.Box:
    if domain == "quadruped":  # each leg: yaw, lift, extend
        low, high = np.tile([[-1.0, -1.0, -0.8], [1.0, 1.1, 0.8]], 4).astype(np.float32)
        return spaces.Box(low, high, dtype=np.float32)
    bound = LARGEST_FORCE if domain == "lqr" else 1.0
    return spaces.Box(-bound, bound, (actions,), np.float32)


class DMControlEnv(Rendered, gym.Env):
    """One task; `dm` is the suite's environment, `model` and `data` are MuJoCo's own."""

    metadata = {"render_modes": ["rgb_array"]}  # noqa: RUF012
    render_mode = "rgb_array"
    render_camera = "0"

    def __init__(self, dm: Any, spec: TaskSpec) -> None:
        self.dm = dm
        self.observation_space = spec.observation_space
        self.action_space = spec.action_space

    @property
    def model(self) -> Any:
        return self.dm.physics.model.ptr

    @property
    def data(self) -> Any:
        return self.dm.physics.data.ptr

    @property
    def frame_skip(self) -> int:
        return round(self.dm.control_timestep() / self.dm.physics.timestep())

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Start an episode; it follows from `seed` alone."""
        super().reset(seed=seed)
        if seed is not None:
            self.dm.task.random.seed(seed)
        observation = self._observe(self.dm.reset())
        if self._film is not None:
            self._film.reset()
        return observation, {}

    def step(
        self, action: np.ndarray
    ) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """Act; an episode that the suite ends for good has terminated."""
        now = self.dm.step(np.asarray(action, np.float64))
        ended = now.last()
        return self._observe(now), float(now.reward), ended and now.discount == 0.0, False, {}

    def close(self) -> None:
        """Let go of the simulator."""
        super().close()
        self.dm.close()

    def _observe(self, now: Any) -> dict[str, np.ndarray]:
        return {
            key: np.array(now.observation[key], np.float32).reshape(space.shape)
            for key, space in self.observation_space.spaces.items()
        }
