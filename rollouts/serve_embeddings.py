"""OpenAI's embeddings: texts, and pictures given as parts of messages are, in one space.

They come from the contrastive head; a checkpoint that was trained without it has none, and the
request is refused: the states of a language model are no honest measure of likeness.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gato.rollouts.data_uri import Budget
from gato.rollouts.serve_json import Fields, kind, strict_json
from gato.rollouts.serve_limits import Refused
from gato.rollouts.serve_openai import part_of
from gato.rollouts.serve_work import Service

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

MAX_INPUTS = 256


def _inputs(body: bytes, service: Service) -> tuple[list[Any], bool, int]:
    """Return what is to be embedded, whether as base64, and the tokens of its text."""
    settings = service.settings
    fields = Fields(strict_json(body))
    name = fields.need("model")
    if not isinstance(name, str):
        raise fields.wrong("model", "a string")
    service.check_model(name)
    given = fields.need("input")
    items = given if isinstance(given, list) else [given]
    if not 1 <= len(items) <= MAX_INPUTS:
        raise fields.wrong("input", f"a string, or a list of 1 to {MAX_INPUTS}")
    form = fields.text("encoding_format", "float")
    if form not in ("float", "base64"):
        raise fields.wrong("encoding_format", "float or base64")
    fields.only("user")
    fields.refuse({"dimensions": ()})
    fields.done()
    budget = Budget(settings.images, settings.image_bytes, settings.image_pixels)
    made: list[Any] = []
    characters = tokens = 0
    for i, item in enumerate(items):
        if isinstance(item, dict):
            part = part_of(Fields(item, f"input[{i}]"), budget)
            item = part["image"] if part["type"] == "image" else part["text"]
        elif not isinstance(item, str) or not item:
            message = f"expected 'input[{i}]' to be a string that is not empty, or a part of a "
            raise Refused(400, f"{message}message; got {kind(item)}", param="input")
        if isinstance(item, str):
            characters += len(item)
            if characters > settings.characters:
                raise fields.wrong("input", f"of at most {settings.characters} characters")
            tokens += len(service.agent.serializer.text(item))
        else:
            tokens += len(service.agent.serializer.image(item))
        made.append(item)
    return made, form == "base64", tokens


async def embeddings(service: Service, request: Request) -> Response:
    """Embed texts, and images given as parts of messages are, into one space."""
    from starlette.responses import JSONResponse

    items, packed, tokens = await service.read(_inputs, await request.body(), service)
    vectors = await service.result(lambda: service.model.call(_embed, service.agent, items))
    service.meter.tokens(tokens, 0)
    data = [
        {
            "object": "embedding",
            "index": i,
            "embedding": base64.b64encode(row.astype("<f4").tobytes()).decode()
            if packed
            else row.tolist(),
        }
        for i, row in enumerate(vectors)
    ]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    whole = {"object": "list", "data": data, "model": service.settings.name, "usage": usage}
    return JSONResponse(whole)


def _embed(agent: Any, items: Sequence[Any]) -> np.ndarray:
    """Return float32 (n, E) of texts and images in their order."""
    from gato.rollouts.retrieval import embed_images, embed_texts

    rows: list[Any] = [None] * len(items)
    for embed, of in ((embed_texts, str), (embed_images, np.ndarray)):
        places = [i for i, item in enumerate(items) if isinstance(item, of)]
        if places:
            for i, row in zip(places, embed(agent, [items[i] for i in places]), strict=True):
                rows[i] = row
    return np.stack(rows)
