"""Meta-World: 50 tasks of one robot arm, seen by 39 numbers and moved by 4.

The observation is hand (3), gripper opening (1), objects (14), the same 18 of the step before, and
the goal (3), which is visible in every task here. An episode ends at success. `reset(seed)` fixes
objects and goal; the published environments ignore the seed of `reset`.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from gato.envs.cameras import MuJoCoPictures, Rendered
from gato.envs.episode import TaskSpec, require_kind
from gato.envs.graphics import load_mujoco

SUITE = "metaworld"
EXTRA = "metaworld"
PACKAGES = ("metaworld", "mujoco", "gymnasium")

MAX_STEPS = 500
CONTROL_HZ = 80.0  # 5 physics steps of 2.5 ms

pictures = MuJoCoPictures

INSTRUCTIONS = {
    "assembly": "put the ring on the peg",
    "basketball": "drop the ball into the basket",
    "bin-picking": "move the object to the other bin",
    "box-close": "put the lid on the box",
    "button-press": "press the button",
    "button-press-topdown": "press the button from above",
    "button-press-topdown-wall": "press the button from above, over the wall",
    "button-press-wall": "press the button behind the wall",
    "coffee-button": "press the button of the coffee machine",
    "coffee-pull": "pull the mug away from the coffee machine",
    "coffee-push": "push the mug under the coffee machine",
    "dial-turn": "turn the dial",
    "disassemble": "take the ring off the peg",
    "door-close": "close the door",
    "door-lock": "lock the door",
    "door-open": "open the door",
    "door-unlock": "unlock the door",
    "drawer-close": "close the drawer",
    "drawer-open": "open the drawer",
    "faucet-close": "close the faucet",
    "faucet-open": "open the faucet",
    "hammer": "hammer the nail in",
    "hand-insert": "put the gripper into the hole",
    "handle-press": "press the handle down",
    "handle-press-side": "press the handle down from the side",
    "handle-pull": "pull the handle up",
    "handle-pull-side": "pull the handle up from the side",
    "lever-pull": "pull the lever up",
    "peg-insert-side": "insert the peg from the side",
    "peg-unplug-side": "unplug the peg",
    "pick-out-of-hole": "pick the puck out of the hole",
    "pick-place": "pick up the puck and bring it to the goal",
    "pick-place-wall": "pick up the puck and bring it over the wall to the goal",
    "plate-slide": "slide the plate into the cabinet",
    "plate-slide-back": "slide the plate out of the cabinet",
    "plate-slide-back-side": "slide the plate sideways out of the cabinet",
    "plate-slide-side": "slide the plate sideways into the cabinet",
    "push": "push the puck to the goal",
    "push-back": "push the puck back to the goal",
    "push-wall": "push the puck around the wall to the goal",
    "reach": "reach the goal",
    "reach-wall": "reach the goal behind the wall",
    "shelf-place": "put the puck on the shelf",
    "soccer": "kick the ball into the net",
    "stick-pull": "pull the thermos with the stick",
    "stick-push": "push the thermos with the stick",
    "sweep": "sweep the puck off the table",
    "sweep-into": "sweep the puck into the hole",
    "window-close": "close the window",
    "window-open": "open the window",
}


def specs() -> dict[str, TaskSpec]:
    """Return the 50 tasks by id."""
    observation, action = _observation_space(), spaces.Box(-1.0, 1.0, (4,), np.float32)
    return {
        f"{SUITE}/{name}-v3": TaskSpec(
            id=f"{SUITE}/{name}-v3",
            observation_space=observation,
            action_space=action,
            max_steps=MAX_STEPS,
            control_hz=CONTROL_HZ,
            instruction=instruction,
            measure="success",
            expert="scripted",
        )
        for name, instruction in INSTRUCTIONS.items()
    }


def make(spec: TaskSpec) -> gym.Env:
    """Return the task's environment with the goal in its observation."""
    load_mujoco()
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS

    base = quicker(ALL_V3_ENVIRONMENTS[spec.id.split("/")[1]])(render_mode="rgb_array")
    base._partially_observable = False
    base._freeze_rand_vec = False  # objects and goal are drawn anew at each reset ...
    base.seeded_rand_vec = True  # ... from the environment's own generator
    base._set_task_called = True
    del base.sawyer_observation_space  # cached while the goal was hidden
    return MetaWorldEnv(base, spec)


def expert(spec: TaskSpec, kind: str) -> Any:
    """Return Meta-World's own scripted policy for the task."""
    require_kind(spec, kind, "scripted")
    load_mujoco()
    from gato.envs.experts.metaworld import ScriptedExpert

    return ScriptedExpert(spec)


def _observation_space() -> spaces.Box:
    hand_low, hand_high = [-0.525, 0.348, -0.0525], [0.525, 1.025, 0.7]
    now_low, now_high = [*hand_low, -1.0, *[-np.inf] * 14], [*hand_high, 1.0, *[np.inf] * 14]
    low, high = [*now_low * 2, *[-np.inf] * 3], [*now_high * 2, *[np.inf] * 3]
    return spaces.Box(np.array(low, np.float32), np.array(high, np.float32), dtype=np.float32)


@cache
def quicker(environment: type) -> type:
    """Return a class of Meta-World with the same results, bit for bit, in less time.

    What it asks of every contact of the scene one by one is asked of all at once, and what it
    joins piece by piece is written where it belongs.
    """

    class Quicker(environment):
        def touching_object(self, object_geom_id: int) -> bool:
            contacts = self.data.contact.geom  # (contacts, 2)
            of_object = (contacts == object_geom_id).any(1)
            if not of_object.any():
                return False
            for pad in ("leftpad_geom", "rightpad_geom"):
                both = of_object & (contacts == self.data.geom(pad).id).any(1)
                addresses = self.data.contact.efc_address[both]
                if not 0 < sum(self.data.efc_force[addresses]):
                    return False
            return True

        def _get_curr_obs_combined_no_goal(self) -> np.ndarray:
            right, left = self.data.body("rightclaw"), self.data.body("leftclaw")
            apart = np.linalg.norm(right.xpos - left.xpos) / 0.1
            positions, quaternions = self._get_pos_objects(), self._get_quat_objects()
            seen = np.zeros(4 + self._obs_obj_max_len)
            seen[:3], seen[3] = self.get_endeff_pos(), min(max(apart, 0.0), 1.0)
            for i in range(len(positions) // 3):
                at = 4 + 7 * i
                seen[at : at + 3] = positions[3 * i : 3 * i + 3]
                seen[at + 3 : at + 7] = quaternions[4 * i : 4 * i + 4]
            return seen

    Quicker.__name__ = Quicker.__qualname__ = environment.__name__  # which Meta-World's tasks know
    return Quicker


class MetaWorldEnv(Rendered, gym.Wrapper):
    """A seeded Meta-World environment in float32 that terminates at success."""

    render_camera = "corner2"

    def __init__(self, base: gym.Env, spec: TaskSpec) -> None:
        super().__init__(base)
        self.observation_space = spec.observation_space
        self.action_space = spec.action_space
        model = base.model
        self._geometry = model.body_pos.copy(), model.site_pos.copy()

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start an episode that depends on `seed` alone, whatever was played before."""
        import mujoco

        base = self.unwrapped
        if seed is not None:
            base.np_random, _ = gym.utils.seeding.np_random(seed)
        # A reset moves doors and drawers only after it has driven the hand home, so without this
        # the hand would meet those of the episode before.
        base.model.body_pos[:], base.model.site_pos[:] = self._geometry
        mujoco.mj_resetData(base.model, base.data)
        observation, info = base.reset()
        return self._clip(observation), {**info, "success": False}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Act; `info["success"]` is a bool and ends the episode."""
        observation, reward, _, truncated, info = self.unwrapped.step(action)
        success = bool(info["success"])
        info = {**info, "success": success}
        return self._clip(observation), float(reward), success, truncated and not success, info

    def _clip(self, observation: np.ndarray) -> np.ndarray:
        space = self.observation_space
        return np.clip(observation.astype(np.float32), space.low, space.high)
