"""Meta-World's environments in less time are Meta-World's environments, bit for bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from gato.envs import metaworld, registry

pytestmark = pytest.mark.sim


def alike(a: Any, b: Any) -> bool:
    """Return whether two answers of `step` are one."""
    return (
        a[0].tobytes() == b[0].tobytes()
        and a[1:4] == b[1:4]
        and a[4].keys() == b[4].keys()
        and all(np.array_equal(a[4][key], b[4][key]) for key in a[4])
    )


@pytest.mark.parametrize(
    "task", ["push", "pick-place", "assembly", "peg-insert-side", "drawer-open", "lever-pull"]
)
def test_quicker_environments_are_the_same(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hands that reach for things, and noise, so that pads touch them and let go."""
    task_id = f"metaworld/{task}-v3"
    quick = registry.make(task_id)
    monkeypatch.setattr(metaworld, "quicker", lambda environment: environment)
    plain = registry.make(task_id)
    assert type(quick.unwrapped) is not type(plain.unwrapped)
    assert quick.unwrapped.task_name == plain.unwrapped.task_name
    experts = [registry.make_expert(task_id) for _ in range(2)]
    seen, noise, touched = [], np.random.default_rng(0), set()
    for env, expert in zip((quick, plain), experts, strict=True):
        seen.append(env.reset(seed=5)[0])
        expert.reset(env, 5)
    assert seen[0].tobytes() == seen[1].tobytes()
    for _ in range(90):
        actions = [
            expert.act(env, observed)
            for env, expert, observed in zip((quick, plain), experts, seen, strict=True)
        ]
        assert np.array_equal(*actions)
        action = np.clip(actions[0] + noise.normal(0, 0.1, 4), -1, 1).astype(np.float32)
        results = [env.step(action) for env in (quick, plain)]
        assert alike(*results)
        seen = [result[0] for result in results]
        things = {x.geom1 for x in plain.unwrapped.data.contact}
        held = [bool(env.unwrapped.touching_object(g)) for env in (quick, plain) for g in things]
        assert held[: len(things)] == held[len(things) :]
        touched |= set(held)
        if results[0][2]:
            break
    if task in ("pick-place", "push"):
        assert touched == {False, True}, "else nothing was held, and nothing was shown"
