"""Thousands of hostile requests, and thousands of good ones at once.

pytest tests/unit/rollouts/test_serve_hostile.py --hostile 10000 --load 1000
"""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from hostile_play import play
from serve_world import ARM, ROOM, make_agent
from serving import ask, serving

from gato.memory import give_back, resident
from gato.rollouts.agent import Agent

CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def agent(text_model: bytes) -> Agent:
    return make_agent(text_model, contrast=0.5)


@pytest.fixture(scope="module")
def address(agent: Agent) -> Iterator[str]:
    bounds = {"body_seconds": 1.0, "head_seconds": 1.0, "body_bytes": 1 << 20, "idle_seconds": 1.0}
    with serving(agent, **bounds) as address:
        yield address


def question(number: int) -> dict[str, Any]:
    """Return a request whose answer no other has."""
    words = ("red", "green", "blue", "ball", "box", "door")
    told = " ".join(words[number // 6**k % 6] for k in range(5))
    messages = [{"role": "user", "content": f"{told} {number}"}]
    return {
        "model": "tiny",
        "messages": messages,
        "max_tokens": 12,
        "temperature": 1.0,
        "seed": number,
    }


def said(address: str, number: int) -> str | None:
    """Return the answer to a question, None where there is none."""
    status, _, told = ask(address, CHAT, question(number))
    return told["choices"][0]["message"]["content"] if status == 200 else None


def held() -> float:
    """Return the MB of memory in use."""
    gc.collect()
    give_back()
    return resident()


@pytest.mark.slow
def test_hostile_requests_are_refused_and_harm_nothing(address, request, caplog):
    count = request.config.getoption("--hostile")
    caplog.set_level(logging.ERROR)
    right, threads, after = said(address, 1), threading.active_count(), []
    tasks = {spec.id: spec.observation_space for spec in (ARM, ROOM)}
    for half in range(2):  # what is allocated once is allocated by the first
        good = {"good": lambda: said(address, 1) == right, "tasks": tasks}
        outcome = asyncio.run(play(address, "tiny", count // 2, seed=half, **good))
        print(sorted(outcome.statuses.items()), f"{held():.0f} MB")
        assert not outcome.wrong, "\n".join(outcome.wrong[:5])
        assert not any(status >= 500 for status in outcome.statuses)
        after.append(held())
    assert not [r for r in caplog.records if r.name == "gato.serve"]
    assert threading.active_count() <= threads + 4
    assert after[1] - after[0] < 32, "memory grows"
    figures = ask(address, "/metrics", method="GET")[2].decode()
    assert "gato_running_rows 0.0" in figures
    assert right is not None
    assert said(address, 1) == right


@pytest.mark.slow
def test_answers_of_many_at_once_are_those_of_each_alone(agent, address, request):
    count, together = request.config.getoption("--load"), 64
    alone = [said(address, i) for i in range(count)]

    async def all_at_once() -> list[str]:
        gate = asyncio.Semaphore(together)
        async with openai.AsyncOpenAI(
            base_url=f"{address}/v1", api_key="x", max_retries=0
        ) as client:

            async def one(i: int) -> str:
                async with gate:
                    if i % 2:
                        return await streamed(client, i)
                    answer = await client.chat.completions.create(**question(i))
                    return str(answer.choices[0].message.content)

            return await asyncio.gather(*(one(i) for i in range(count)))

    assert asyncio.run(all_at_once()) == alone
    assert len(set(alone)) > 0.9 * count


async def streamed(client: openai.AsyncOpenAI, i: int) -> str:
    pieces = [
        chunk.choices[0].delta.content or ""
        async for chunk in await client.chat.completions.create(**question(i), stream=True)
    ]
    return "".join(pieces)
