"""What a server makes of hostile requests: many at once, with good ones between them."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from gymnasium import Space
from hostile import Hostile, Maker

PLAIN = (b"Invalid HTTP request received.", b"The head of the request is too slow")
"""What is said where nothing could be understood."""


@dataclass
class Outcome:
    """What came of many requests."""

    statuses: Counter[int] = field(default_factory=Counter)
    by_kind: Counter[tuple[str, int]] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    """What should not have been."""


async def answered(address: str, hostile: Hostile, timeout: float) -> bytes | None:
    """Send one request and return all that comes back; None where the client left."""
    at = urlsplit(address)
    reader, writer = await asyncio.open_connection(at.hostname, at.port)
    try:
        for part in hostile.parts:
            writer.write(part)
            await writer.drain()
            if hostile.pause:
                await asyncio.sleep(hostile.pause)
        if hostile.leaves:
            return None
        return await asyncio.wait_for(reader.read(-1), timeout)
    except (ConnectionResetError, BrokenPipeError):
        return b""
    finally:
        writer.transport.abort()


def has_reason(answer: bytes) -> bool:
    """Return whether an answer says why, in OpenAI's form."""
    head, _, body = answer.partition(b"\r\n\r\n")
    if b"application/json" not in head.lower():
        return body in PLAIN
    message = json.loads(body)["error"]["message"]
    return isinstance(message, str) and bool(message)


def judge(hostile: Hostile, answer: bytes | None, outcome: Outcome) -> None:
    """Count an answer, and keep it where it should not have been."""
    if answer is None:
        outcome.by_kind[hostile.kind, -1] += 1
        return
    status = int(answer.split(b" ", 2)[1]) if answer.startswith(b"HTTP/1.1 ") else 0
    outcome.statuses[status] += 1
    outcome.by_kind[hostile.kind, status] += 1
    right = 400 <= status < 500 and has_reason(answer)  # 0 where nothing came
    if hostile.may_pass:
        right = right or 200 <= status < 300
    if not right:
        outcome.wrong.append(
            f"{hostile.kind} {status}: {hostile.parts[0][:300]!r} -> {answer[:300]!r}"
        )


async def play(
    address: str,
    model: str,
    count: int,
    seed: int,
    *,
    tasks: Mapping[str, Space] | None = None,
    together: int = 16,
    good: Callable[[], bool] | None = None,
    timeout: float = 30.0,
) -> Outcome:
    """Send `count` hostile requests, so many at once, and a good one every hundred.

    Args:
        address: of the server.
        model: its name.
        count: how many.
        seed: of what is sent.
        tasks: those it knows, and the spaces of what is observed.
        together: connections at once.
        good: asks something good and returns whether the answer is right.
        timeout: seconds that one answer may take.
    """
    maker, outcome = Maker(seed, address, model, tasks), Outcome()
    numbers = iter(range(1, count + 1))

    async def worker() -> None:
        for number in numbers:
            hostile = maker.next()
            try:
                judge(hostile, await answered(address, hostile, timeout), outcome)
            except TimeoutError:
                outcome.wrong.append(f"{hostile.kind}: no answer to {hostile.parts[0][:300]!r}")
            if number % 100 == 0 and good is not None and not await asyncio.to_thread(good):
                outcome.wrong.append(f"a good request after {number} was not answered right")

    await asyncio.gather(*(worker() for _ in range(together)))
    return outcome
