"""OpenAI's endpoints: models and chat completions.

A request is read in three steps, so that what it asks for is refused by name before the model is
asked: its fields (`ChatRequest`), its messages as ours, its prefix (`Agent.prepare`). Beside what
OpenAI tells, an answer has a field ``gato``: the seed it was drawn with, and how many turns were
dropped because the model does not remember as much; a header says so too.

Where it differs: temperature is 0 unless told otherwise (OpenAI's is 1), an answer without
``max_tokens`` may take what the memory leaves, system messages are read before all others wherever
they stand, and names of users (``name``) are not told to the model.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from gato.rollouts.conversation import Prepared, TooLong
from gato.rollouts.data_uri import Budget
from gato.rollouts.engine import Sampling, TokenLogprob
from gato.rollouts.messages import fitting
from gato.rollouts.serve_json import Fields, strict_json
from gato.rollouts.serve_limits import CLEANUP, EVENT_STREAM, MAX_SEED, Refused, Settings
from gato.rollouts.serve_work import Service, Writing

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

HARMLESS = (
    *("user", "metadata", "store", "service_tier", "parallel_tool_calls", "safety_identifier"),
    *("prompt_cache_key", "prompt_cache_retention"),
)
"""Fields that clients send and that do not change an answer."""
UNSUPPORTED: Mapping[str, Sequence[Any]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "logit_bias": ({},),
    "audio": (),
    "prediction": (),
    "reasoning_effort": ("none", "medium"),
    "verbosity": ("medium",),
    "web_search_options": (),
    "top_k": (-1, 0),
    "min_p": (0,),
    "best_of": (1,),
    "suffix": (),
}
"""Fields that would change an answer and are refused, unless they have one of these values."""
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
STOPS, STOP_LENGTH, TOP_LOGPROBS = 4, 200, 20
DROPPED_HEADER = "X-Gato-Dropped-Turns"
ALIVE_SECONDS = 10.0
"""Silence of a stream after which a comment is sent, so that nothing on the way closes it."""
LOWEST = -9999.0
"""What OpenAI tells for the logarithm of a probability of zero, which JSON has not."""


@dataclass(frozen=True)
class ChatRequest:
    """What is asked for."""

    samplings: tuple[Sampling, ...]
    """One per answer."""
    messages: list[dict[str, Any]]
    stream: bool
    include_usage: bool
    """Whether a stream ends with the counts of tokens."""
    as_fits: bool
    """Whether an answer may be as long as the memory leaves room, up to what `samplings` say."""


def chat_request(value: Any, service: Service) -> ChatRequest:
    """Return what a body asks for; its messages, which may cost most, are looked at last.

    Raises:
        Refused: naming the field at fault.
    """
    fields = Fields(value)
    model = fields.need("model")
    if not isinstance(model, str):
        raise fields.wrong("model", "a string")
    service.check_model(model)
    given = fields.need("messages")
    stream = fields.flag("stream")
    options = fields.take("stream_options")
    include = False
    if options is not None:
        inner = Fields(options, "stream_options")
        include = inner.flag("include_usage")
        inner.only("include_obfuscation")
        inner.done()
    as_fits = not ("max_tokens" in fields or "max_completion_tokens" in fields)
    samplings = _samplings(fields, service.settings)
    fields.only(*HARMLESS)
    fields.refuse(UNSUPPORTED)
    fields.done()
    messages = _messages(given, fields, service.settings)
    return ChatRequest(samplings, messages, stream, include, as_fits)


def _samplings(fields: Fields, settings: Settings) -> tuple[Sampling, ...]:
    most = 1 << 31
    asked = fields.whole("max_tokens", 1, most)
    newer = fields.whole("max_completion_tokens", 1, most)
    length = min(newer or asked or settings.max_tokens, settings.max_tokens)
    temperature = fields.number("temperature", 0.0, 2.0) or 0.0
    top_p = fields.number("top_p", 0.0, 1.0)
    if top_p == 0.0:
        raise fields.wrong("top_p", "above 0 and at most 1")
    seed = fields.whole("seed", -MAX_SEED - 1, MAX_SEED)
    if seed is None:
        seed = secrets.randbits(31) if temperature else 0
    count = fields.whole("n", 1, settings.choices) or 1
    shown = fields.flag("logprobs")
    top = fields.whole("top_logprobs", 0, TOP_LOGPROBS)
    if top is not None and not shown:
        raise fields.wrong("top_logprobs", "left out where 'logprobs' is not true")
    stop = _stop(fields)
    return tuple(
        Sampling(
            max_tokens=length,
            temperature=temperature,
            top_p=1.0 if top_p is None else top_p,
            seed=(seed + i) & MAX_SEED,  # generators want no negative ones
            stop=stop,
            top_logprobs=(top or 0) if shown else None,
        )
        for i in range(count)
    )


def _stop(fields: Fields) -> tuple[str, ...]:
    value = fields.take("stop")
    given = [value] if isinstance(value, str) else [] if value is None else value
    told = f"a string or at most {STOPS} of them, of 1 to {STOP_LENGTH} characters"
    if not isinstance(given, list) or len(given) > STOPS:
        raise fields.wrong("stop", told)
    if not all(isinstance(s, str) and 1 <= len(s) <= STOP_LENGTH for s in given):
        raise fields.wrong("stop", told)
    return tuple(given)


def _messages(given: Any, fields: Fields, settings: Settings) -> list[dict[str, Any]]:
    if not isinstance(given, list) or not given:
        raise fields.wrong("messages", "a list of one or more messages")
    contents = [m.get("content") for m in given if isinstance(m, dict)]
    pieces = len(given) + sum(len(c) for c in contents if isinstance(c, list))
    if pieces > settings.pieces:
        raise fields.wrong("messages", f"of at most {settings.pieces} messages and parts together")
    budget = Budget(settings.images, settings.image_bytes, settings.image_pixels)
    made, characters = [], 0
    for i, message in enumerate(given):
        one = _message(Fields(message, f"messages[{i}]"), budget)
        made.append(one)
        characters += sum(len(part.get("text", "")) for part in one["content"])
        if characters > settings.characters:
            raise Refused(
                400,
                f"expected messages of at most {settings.characters} characters together",
                param="messages",
                code="string_above_max_length",
            )
    # The model has seen system messages at the beginning only; clients add some later on.
    made.sort(key=lambda message: message["role"] != "system")
    if made[-1]["role"] != "user":
        raise fields.wrong(
            "messages",
            "a conversation whose last message is the user's, which is then answered (an answer "
            "is not gone on with: ask for more in a message of the user's)",
        )
    return made


def _message(fields: Fields, budget: Budget) -> dict[str, Any]:
    role = fields.need("role")
    if not isinstance(role, str) or role not in ROLES:
        raise fields.wrong("role", f"one of {', '.join(ROLES)}")
    content = fields.need("content")
    fields.only("name", "annotations")
    nothing: dict[str, tuple[Any, ...]] = {"refusal": (), "audio": (), "function_call": ()}
    fields.refuse({**nothing, "tool_calls": ([],), "tool_call_id": ()})
    fields.done()
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise fields.wrong("content", "a string or a list of parts")
    where = fields.path("content")
    parts = [part_of(Fields(part, f"{where}[{k}]"), budget) for k, part in enumerate(content)]
    return {"role": ROLES[role], "content": parts}


def part_of(fields: Fields, budget: Budget) -> dict[str, Any]:
    """Return a part of a message as ours."""
    match fields.need("type"):
        case "text":
            text = fields.need("text")
            if not isinstance(text, str):
                raise fields.wrong("text", "a string")
            fields.done()
            return {"type": "text", "text": text}
        case "image_url":
            return {"type": "image", "image": _image(fields, budget)}
    raise fields.wrong("type", "text or image_url")


def _image(fields: Fields, budget: Budget) -> np.ndarray:
    address = fields.need("image_url")
    where = fields.path("image_url")
    if isinstance(address, dict):
        inner = Fields(address, where)
        address, where = inner.need("url"), inner.path("url")
        inner.only("detail")  # every picture is seen in one size
        inner.done()
    fields.done()
    try:
        return fitting(budget.picture(address))
    except ValueError as error:
        raise Refused(400, f"{where}: {error}", param=where, code="invalid_image") from error


# ---- chat completions ------------------------------------------------------------------------


def _prepared(body: bytes, service: Service) -> tuple[ChatRequest, Prepared]:
    asked = chat_request(strict_json(body), service)
    most, memory = asked.samplings[0].max_tokens, service.agent.model.config.memory
    room = min(most, Sampling.max_tokens, memory // 2) if asked.as_fits else most
    try:
        made = service.agent.prepare(asked.messages, room)
    except ValueError as error:
        code = "context_length_exceeded" if isinstance(error, TooLong) else None
        raise Refused(400, str(error), param="messages", code=code) from error
    if asked.as_fits:
        fits = min(max(memory - len(made.prefix), room), most)
        samplings = tuple(replace(one, max_tokens=fits) for one in asked.samplings)
        asked = replace(asked, samplings=samplings)
    return asked, made


async def chat(service: Service, request: Request) -> Response:
    """Answer a conversation, at once or as it is written."""
    from starlette.responses import JSONResponse, StreamingResponse

    asked, made = await service.read(_prepared, await request.body(), service)
    writing = Writing(service, made.prefix, asked.samplings)
    request.scope[CLEANUP].append(writing.close)
    extra = {"seed": asked.samplings[0].seed, "dropped_turns": made.dropped}
    headers = {DROPPED_HEADER: str(made.dropped)}
    about = {
        "id": f"chatcmpl-{secrets.token_hex(12)}",
        "created": int(time.time()),
        "model": service.settings.name,
    }
    if asked.stream:
        events = _events(writing, asked, about, extra)
        headers |= EVENT_STREAM
        return StreamingResponse(events, media_type="text/event-stream", headers=headers)
    texts = [""] * len(asked.samplings)
    told: list[list[TokenLogprob]] = [[] for _ in texts]
    finish = ["length"] * len(texts)
    async for i, delta in writing.deltas():
        texts[i] += delta.text
        told[i] += delta.logprobs
        finish[i] = delta.finish or finish[i]
    shown = asked.samplings[0].top_logprobs is not None
    choices = [
        {
            "index": i,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": _logprobs(told[i]) if shown else None,
            "finish_reason": finish[i],
        }
        for i, text in enumerate(texts)
    ]
    whole = {"object": "chat.completion", **about, "choices": choices}
    return JSONResponse({**whole, "usage": _usage(writing), "gato": extra}, headers=headers)


async def _events(
    writing: Writing, asked: ChatRequest, about: Mapping[str, Any], extra: Mapping[str, Any]
) -> AsyncIterator[bytes]:
    """Yield the server-sent events of an answer that is being written."""
    shown = asked.samplings[0].top_logprobs is not None
    counts = {"usage": None} if asked.include_usage else {}

    def chunk(choices: list[dict[str, Any]], **more: Any) -> bytes:
        return _event(
            {"object": "chat.completion.chunk", **about, "choices": choices, **counts, **more}
        )

    def choice(i: int, delta: Mapping[str, Any], told: Any, finish: str | None) -> dict[str, Any]:
        return {"index": i, "delta": delta, "logprobs": told, "finish_reason": finish}

    for i in range(len(asked.samplings)):
        start = {"role": "assistant", "content": "", "refusal": None}
        yield chunk([choice(i, start, None, None)], gato=extra)
    try:
        async for i, delta in writing.deltas(ALIVE_SECONDS):
            told = _logprobs(delta.logprobs) if shown and delta.logprobs else None
            if delta.text or told:
                yield chunk([choice(i, {"content": delta.text}, told, None)])
            if delta.finish:
                yield chunk([choice(i, {}, None, delta.finish)])
            elif not (delta.tokens or delta.text):
                yield b": still here\n\n"
    except Refused as refused:  # the status is sent already
        yield _event(refused.to_json())
        return
    if asked.include_usage:
        yield chunk([], usage=_usage(writing))
    yield b"data: [DONE]\n\n"


def _event(value: Any) -> bytes:
    return f"data: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()


def _usage(writing: Writing) -> dict[str, Any]:
    read, written = writing.read, writing.written
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


def _logprobs(told: Sequence[TokenLogprob]) -> dict[str, Any]:
    content = [
        {
            **_token(one.token, one.logprob, one.bytes),
            "top_logprobs": [_token(*likely) for likely in one.top],
        }
        for one in told
    ]
    return {"content": content, "refusal": None}


def _token(token: str, logprob: float, spelt: bytes) -> dict[str, Any]:
    return {"token": token, "logprob": max(logprob, LOWEST), "bytes": list(spelt)}


# ---- models -------------------------------------------------------------------


def model_card(service: Service) -> dict[str, Any]:
    """Return what is told of the model."""
    name, created = service.settings.name, service.created
    return {"id": name, "object": "model", "created": created, "owned_by": "gato"}


async def models(service: Service, request: Request) -> Response:
    """List the one model."""
    from starlette.responses import JSONResponse

    return JSONResponse({"object": "list", "data": [model_card(service)]})


async def model(service: Service, request: Request) -> Response:
    """Describe the model of a name."""
    from starlette.responses import JSONResponse

    service.check_model(request.path_params["name"])
    return JSONResponse(model_card(service))
