"""OpenAI's embeddings: texts, and pictures given as parts of messages are, in one space.

They come from the contrastive head; a checkpoint that was trained without it has none, and the
request is refused: the states of a language model are no honest measure of likeness. Many inputs
are read part by part, so that who writes or acts meanwhile waits for one part at most.
"""

from __future__ import annotations

import base64
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from gato.rollouts.data_uri import Budget
from gato.rollouts.retrieval import embed, sequence_of
from gato.rollouts.serve_json import Fields, kind, strict_json
from gato.rollouts.serve_limits import Refused
from gato.rollouts.serve_openai import part_of
from gato.rollouts.serve_work import Service
from gato.tokenizers.serializer import CONTROL
from gato.tokenizers.stream import TokenSequence

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

MAX_INPUTS = 2048

PART_TOKENS = 2048
"""Tokens that the model reads for one request before others have their turn."""


@dataclass(frozen=True)
class _Asked:
    """What is to be embedded."""

    sequences: list[TokenSequence]
    sides: list[str]
    """``shown`` for a picture, ``said`` for a text."""
    tokens: int
    """Of texts and pictures."""
    packed: bool
    """Whether the vectors are wanted as base64."""


def _asked(body: bytes, service: Service) -> _Asked:
    """Return what a request asks for, as the model reads it."""
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
    made: list[TokenSequence] = []
    sides: list[str] = []
    characters = 0
    for i, item in enumerate(items):
        if isinstance(item, dict):
            part = part_of(Fields(item, f"input[{i}]"), budget)
            item = part["image"] if part["type"] == "image" else part["text"]
        elif not isinstance(item, str) or not item:
            message = f"expected 'input[{i}]' to be a string that is not empty, or a part of a "
            message += f"message; got {kind(item)}"
            if isinstance(item, int | list):
                message += (
                    ". Tokens are not taken, for they are another model's: send text (LangChain: "
                    "OpenAIEmbeddings(check_embedding_ctx_length=False))"
                )
            raise Refused(400, message, param="input")
        if isinstance(item, str):
            characters += len(item)
            if characters > settings.characters:
                raise fields.wrong("input", f"of at most {settings.characters} characters")
        made.append(sequence_of(service.agent, item))
        sides.append("said" if isinstance(item, str) else "shown")
    control = service.agent.serializer.number[CONTROL]
    tokens = sum(int((sequence.modality != control).sum()) for sequence in made)
    return _Asked(made, sides, tokens, form == "base64")


async def embeddings(service: Service, request: Request) -> Response:
    """Embed texts, and images given as parts of messages are, into one space."""
    from starlette.responses import JSONResponse

    asked = await service.read(_asked, await request.body(), service)
    rows: list[Any] = [None] * len(asked.sequences)
    for side, places in _parts(asked):
        part = [asked.sequences[i] for i in places]
        vectors = await service.result(lambda part=part, side=side: _called(service, part, side))
        for i, row in zip(places, vectors, strict=True):
            rows[i] = row
    service.meter.tokens(asked.tokens, 0)
    data = [
        {
            "object": "embedding",
            "index": i,
            "embedding": base64.b64encode(row.astype("<f4").tobytes()).decode()
            if asked.packed
            else row.tolist(),
        }
        for i, row in enumerate(rows)
    ]
    usage = {"prompt_tokens": asked.tokens, "total_tokens": asked.tokens}
    whole = {"object": "list", "data": data, "model": service.settings.name, "usage": usage}
    return JSONResponse(whole)


def _called(service: Service, part: list[TokenSequence], side: str) -> Future[np.ndarray]:
    return service.model.call(embed, service.agent, part, side)


def _parts(asked: _Asked) -> list[tuple[str, list[int]]]:
    """Return (side, places) of what is read at once: one of each, or so many tokens in all."""
    parts: list[tuple[str, list[int]]] = []
    for side in ("said", "shown"):
        used = PART_TOKENS
        places = [i for i, own in enumerate(asked.sides) if own == side]
        # those of one length together, for they are laid out in rows of the longest's
        for i in sorted(places, key=lambda i: len(asked.sequences[i])):
            size = len(asked.sequences[i])
            if used + size > PART_TOKENS:
                parts.append((side, []))
                used = 0
            parts[-1][1].append(i)
            used += size
    return parts
