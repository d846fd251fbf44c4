"""One model, one set of weights, one stream of tokens: plays, moves, captions and talks.

agent = gato.load(DIR)
policy = agent.policy("metaworld/reach-v3")
action = policy.select_action(observation)
agent.chat(messages), agent.caption(image), agent.classify(image, labels)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gato.rollouts.agent import Agent as Agent
    from gato.rollouts.agent import load as load

__all__ = ["Agent", "load"]


def __getattr__(name: str) -> Any:
    """Import torch and the rest only where they are asked for."""
    if name in __all__:
        from gato.rollouts import agent

        return getattr(agent, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
