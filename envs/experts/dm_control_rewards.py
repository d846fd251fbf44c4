"""Rewards of the dm_control suite for many states at once, and what the planner spends on each.

`REWARDS` repeats the suite's own formulas, (N, H) from (N, H) states; a test compares them with the
suite's. `PLANS` holds what the planner maximises: the reward itself, or the reward and a hint that
points towards it where it is the same (mostly nothing) everywhere in sight.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from gato.envs.experts.mujoco_planner import Plan
from gato.envs.experts.mujoco_rollouts import Rollouts

Value = Callable[[Rollouts], np.ndarray]


def _tolerance(x: np.ndarray, *args: object, **kwargs: object) -> np.ndarray:
    from dm_control.utils.rewards import tolerance

    return tolerance(x, *args, **kwargs)


def _at_least(x: np.ndarray, bound: float, margin: float, **kwargs: object) -> np.ndarray:
    return _tolerance(x, bounds=(bound, np.inf), margin=margin, **kwargs)


def _small(x: np.ndarray) -> np.ndarray:
    """Return the suite's reward for small controls: 1 at zero, 0 from 1 on."""
    return _tolerance(x, margin=1, value_at_margin=0, sigmoid="quadratic")


def _distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.sqrt(((a - b) ** 2).sum(axis=0))


def _cartpole(run: Rollouts) -> np.ndarray:
    cosine = np.cos(run.qpos[..., 1:].cumsum(axis=-1))
    centred = (1 + _tolerance(run.qpos[..., 0], margin=2)) / 2
    slow = (1 + _tolerance(run.qvel[..., 1:], margin=5).min(axis=-1)) / 2
    upright = ((1 + cosine) / 2).mean(axis=-1)
    return upright * (4 + _small(run.control[..., 0])) / 5 * slow * centred


def _cartpole_sparse(run: Rollouts) -> np.ndarray:
    cosine = np.cos(run.qpos[..., 1:].cumsum(axis=-1))
    upright = _tolerance(cosine, (0.995, 1)).prod(axis=-1)
    return upright * _tolerance(run.qpos[..., 0], (-0.25, 0.25))


def _cartpole_hint(run: Rollouts) -> np.ndarray:
    away = np.abs(run.qpos[..., 0])  # from the middle, where the sparse reward is
    return _cartpole(run) + 2 * _cartpole_sparse(run) - 0.1 * away


def _pendulum(run: Rollouts) -> np.ndarray:
    return _tolerance(run.upright("pole"), (np.cos(np.deg2rad(8)), 1))


def _pendulum_hint(run: Rollouts) -> np.ndarray:
    """The energy of standing still on top, and no more."""
    moving = 0.063 * run.qvel[..., 0] ** 2  # kinetic energy, J; the mass is 4.9 J high per upright
    return _pendulum(run) - np.abs(moving / 9.81 + (run.upright("pole") - 1) / 2)


def _reach_distance(run: Rollouts) -> np.ndarray:
    return _distance(run.position("target", "geom")[:2], run.position("finger", "geom")[:2])


def _reacher(run: Rollouts) -> np.ndarray:
    radii = sum(run.model.geom(name).size[0] for name in ("target", "finger"))
    return _tolerance(_reach_distance(run), (0, radii))


def _point_distance(run: Rollouts) -> np.ndarray:
    return _distance(run.position("target", "geom"), run.position("pointmass", "geom"))


def _point_mass(run: Rollouts) -> np.ndarray:
    size = run.model.geom("target").size[0]
    near = _tolerance(_point_distance(run), bounds=(0, size), margin=size)
    return near * (4 + _small(run.control).mean(axis=-1)) / 5


def _cup_offset(run: Rollouts) -> np.ndarray:
    return np.abs(run.position("target", "site") - run.position("ball"))[[0, 2]]


def _ball_in_cup(run: Rollouts) -> np.ndarray:
    room = run.model.site("target").size[[0, 2]] - run.model.geom("ball").size[0]
    return (_cup_offset(run) < room[:, None, None]).all(axis=0).astype(float)


def _cup_hint(run: Rollouts) -> np.ndarray:
    return _ball_in_cup(run) - np.linalg.norm(_cup_offset(run), axis=0)


def _finger_spin(run: Rollouts) -> np.ndarray:
    return (run.sensor("hinge_velocity")[..., 0] <= -15).astype(float)


def _spin_hint(run: Rollouts) -> np.ndarray:
    return _finger_spin(run) + 3 * np.clip(-run.sensor("hinge_velocity")[..., 0] / 15, 0, 1)


def _turn_distance(run: Rollouts) -> np.ndarray:
    away = (run.sensor("target") - run.sensor("tip"))[..., [0, 2]]
    return np.sqrt((away**2).sum(axis=-1)) - run.model.site("target").size[0]


def _finger_turn(run: Rollouts) -> np.ndarray:
    return (_turn_distance(run) <= 0).astype(float)


def _walker(run: Rollouts, speed: float) -> np.ndarray:
    standing = _at_least(run.position("torso")[2], 1.2, margin=0.6)
    stand = (3 * standing + (1 + run.upright("torso")) / 2) / 4
    if not speed:
        return stand
    velocity = run.sensor("torso_subtreelinvel")[..., 0]
    move = _at_least(velocity, speed, margin=speed / 2, value_at_margin=0.5, sigmoid="linear")
    return stand * (5 * move + 1) / 6


def _walker_hint(run: Rollouts, speed: float) -> np.ndarray:
    height = np.minimum(run.position("torso")[2], 1.2)
    return _walker(run, speed) + height + run.upright("torso")


def _hopper_height(run: Rollouts) -> np.ndarray:
    return run.position("torso", "inertia")[2] - run.position("foot", "inertia")[2]


def _hopper(run: Rollouts, hop: bool) -> np.ndarray:
    standing = _tolerance(_hopper_height(run), (0.6, 2))
    if not hop:
        return standing * (4 + _small(run.control).mean(axis=-1)) / 5
    velocity = run.sensor("torso_subtreelinvel")[..., 0]
    return standing * _at_least(velocity, 2, margin=1, value_at_margin=0.5, sigmoid="linear")


def _cheetah(run: Rollouts) -> np.ndarray:
    velocity = run.sensor("torso_subtreelinvel")[..., 0]
    return _at_least(velocity, 10, margin=10, value_at_margin=0, sigmoid="linear")


def _acrobot(run: Rollouts, margin: float) -> np.ndarray:
    away = _distance(run.position("target", "site"), run.position("tip", "site"))
    return _tolerance(away, bounds=(0, run.model.site("target").size[0]), margin=margin)


def _swimmer(run: Rollouts) -> np.ndarray:
    away = np.linalg.norm((run.sensor("nose_pos") - run.sensor("target_pos"))[..., :2], axis=-1)
    size = run.model.geom("target").size[0]
    return _tolerance(away, bounds=(0, size), margin=5 * size, sigmoid="long_tail")


def _fish_upright(run: Rollouts) -> np.ndarray:
    return _tolerance(run.upright("torso"), bounds=(1, 1), margin=1)


def _swim_distance(run: Rollouts) -> np.ndarray:
    return _distance(run.position("mouth", "geom"), run.position("target", "geom"))


def _fish_swim(run: Rollouts) -> np.ndarray:
    radii = sum(run.model.geom(name).size[0] for name in ("mouth", "target"))
    near = _tolerance(_swim_distance(run), bounds=(0, radii), margin=2 * radii)
    return (7 * near + (1 + run.upright("torso")) / 2) / 8


def _quadruped(run: Rollouts, speed: float) -> np.ndarray:
    kind = {"value_at_margin": 0, "sigmoid": "linear"}
    upright = _at_least(run.upright("torso"), 1, margin=2, **kind)
    velocity = run.sensor("velocimeter")[..., 0]
    move = _at_least(velocity, speed, margin=speed, value_at_margin=0.5, sigmoid="linear")
    return upright * move


def _humanoid(run: Rollouts, speed: float) -> np.ndarray:
    kind = {"value_at_margin": 0, "sigmoid": "linear"}
    standing = _at_least(run.position("head")[2], 1.4, margin=0.35)
    stand = standing * _at_least(run.upright("torso"), 0.9, margin=1.9, **kind)
    velocity = run.sensor("torso_subtreelinvel")[..., :2]
    calm = (4 + _small(run.control).mean(axis=-1)) / 5
    if not speed:
        return calm * stand * _tolerance(velocity, margin=2).mean(axis=-1)
    move = _at_least(np.linalg.norm(velocity, axis=-1), speed, margin=speed, **kind)
    return calm * stand * (5 * move + 1) / 6


REWARDS: dict[str, Value] = {
    "acrobot-swingup": partial(_acrobot, margin=1),
    "acrobot-swingup_sparse": partial(_acrobot, margin=0),
    "ball_in_cup-catch": _ball_in_cup,
    "cartpole-balance": _cartpole,
    "cartpole-balance_sparse": _cartpole_sparse,
    "cartpole-swingup": _cartpole,
    "cartpole-swingup_sparse": _cartpole_sparse,
    "cartpole-three_poles": _cartpole,
    "cartpole-two_poles": _cartpole,
    "cheetah-run": _cheetah,
    "finger-spin": _finger_spin,
    "finger-turn_easy": _finger_turn,
    "finger-turn_hard": _finger_turn,
    "fish-swim": _fish_swim,
    "fish-upright": _fish_upright,
    "hopper-hop": partial(_hopper, hop=True),
    "hopper-stand": partial(_hopper, hop=False),
    "humanoid-run": partial(_humanoid, speed=10),
    "humanoid-stand": partial(_humanoid, speed=0),
    "humanoid-walk": partial(_humanoid, speed=1),
    "pendulum-swingup": _pendulum,
    "point_mass-easy": _point_mass,
    "point_mass-hard": _point_mass,
    "quadruped-run": partial(_quadruped, speed=5),
    "quadruped-walk": partial(_quadruped, speed=0.5),
    "reacher-easy": _reacher,
    "reacher-hard": _reacher,
    "swimmer-swimmer15": _swimmer,
    "swimmer-swimmer6": _swimmer,
    "walker-run": partial(_walker, speed=8),
    "walker-stand": partial(_walker, speed=0),
    "walker-walk": partial(_walker, speed=1),
}


def _and_near(value: Value, distance: Value, weight: float) -> Value:
    """Return `value` less `weight` times a distance: what to do while the reward is nothing."""
    return lambda run: value(run) - weight * distance(run)


_POLE = {"samples": 32, "rounds": 4, "replan": 10, "knots": 7, "spread": 1.0}
_REACH = {"samples": 32, "horizon": 30, "replan": 3, "spread": 0.5}
_WALK = {"samples": 32, "horizon": 30, "replan": 6, "spread": 2.0}
_TURN = Plan(_and_near(_finger_turn, _turn_distance, 3), 32, 40, replan=4, spread=0.7)

PLANS = {
    "ball_in_cup-catch": Plan(_cup_hint, 16, 60, replan=4, knots=6, spread=1.0),
    "cartpole-balance": Plan(_cartpole, horizon=100, **_POLE),
    "cartpole-balance_sparse": Plan(_cartpole, horizon=100, **_POLE),
    "cartpole-swingup": Plan(_cartpole, horizon=120, **_POLE),
    "cartpole-swingup_sparse": Plan(_cartpole_hint, horizon=120, **_POLE),
    "cheetah-run": Plan(_cheetah, 96, 50, replan=3, knots=6, spread=4.0),
    "finger-spin": Plan(_spin_hint, 96, 12, knots=6, spread=8.0),
    "finger-turn_easy": _TURN,
    "finger-turn_hard": _TURN,
    "fish-swim": Plan(
        _and_near(_fish_swim, _swim_distance, 2), 32, 30, replan=4, knots=8, spread=3.0
    ),
    "fish-upright": Plan(_fish_upright, 16, 20, replan=4, spread=0.7),
    "pendulum-swingup": Plan(_pendulum_hint, 64, 60, replan=5, knots=6, spread=1.0),
    "point_mass-easy": Plan(_and_near(_point_mass, _point_distance, 3), **_REACH),
    "point_mass-hard": Plan(_and_near(_point_mass, _point_distance, 3), **_REACH),
    "reacher-easy": Plan(_and_near(_reacher, _reach_distance, 3), **_REACH),
    "reacher-hard": Plan(_and_near(_reacher, _reach_distance, 3), **_REACH),
    "walker-stand": Plan(partial(_walker_hint, speed=0), **_WALK),
    "walker-walk": Plan(partial(_walker_hint, speed=1), **_WALK),
}
"""What the planner maximises in a task, and what it spends on it."""
