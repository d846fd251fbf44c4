"""Captions over HTTP: what a picture shows, as `gato caption` says it.

POST /v1/captions   {"image": "data:image/png;base64,...", "max_tokens": 64}  ->  {"text": ...}
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gato.rollouts.data_uri import Budget
from gato.rollouts.engine import Sampling
from gato.rollouts.messages import fitting
from gato.rollouts.serve_json import Fields, strict_json
from gato.rollouts.serve_limits import CLEANUP, Refused
from gato.rollouts.serve_work import Service, Writing
from gato.tokenizers.stream import TokenSequence

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

MAX_TOKENS = 64
"""Of a caption, unless told otherwise."""


def _prepared(body: bytes, service: Service) -> tuple[TokenSequence, Sampling]:
    limits = service.settings
    fields = Fields(strict_json(body))
    address = fields.need("image")
    length = fields.whole("max_tokens", 1, limits.max_tokens) or min(MAX_TOKENS, limits.max_tokens)
    fields.done()
    try:
        picture = Budget(1, limits.image_bytes, limits.image_pixels).picture(address)
    except ValueError as error:
        raise Refused(400, f"image: {error}", param="image", code="invalid_image") from error
    try:
        prefix = service.agent.shown(fitting(picture), length)
    except ValueError as error:
        code = "context_length_exceeded"
        raise Refused(400, str(error), param="image", code=code) from error
    return prefix, Sampling(max_tokens=length)


async def caption(service: Service, request: Request) -> Response:
    """Say what a picture shows."""
    from starlette.responses import JSONResponse

    prefix, sampling = await service.read(_prepared, await request.body(), service)
    writing = Writing(service, prefix, [sampling])
    request.scope[CLEANUP].append(writing.close)
    text = ""
    async for _, delta in writing.deltas():
        text += delta.text
    usage = {"prompt_tokens": writing.read, "completion_tokens": writing.written}
    return JSONResponse({"text": text, "model": service.settings.name, "usage": usage})
