"""Conversations as the model reads them: checked, cut to what it remembers, never forged.

```text
<bos> <system> text | <user> img.. text <assistant> text <eos> | <user> ... | <assistant>
      stays           a turn: dropped whole, the oldest first     the last turn: always there
```

Roles are control tokens with ids of their own, which no text is ever cut into: what a user types
stays letters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gato.tokenizers.image import picture_spec
from gato.tokenizers.serializer import Serializer
from gato.tokenizers.stream import TokenSequence, concatenate

Message = Mapping[str, Any]
"""``role`` (system, user or assistant) and ``content``: a string or parts in their order,
``{"type": "text", "text": str}`` and ``{"type": "image", "image": uint8 array}``."""

ROLES = ("system", "user", "assistant")


class TooLong(ValueError):
    """A conversation whose last turn alone is more than the model remembers."""


@dataclass(frozen=True)
class Prepared:
    """What the model reads before the assistant's next turn."""

    prefix: TokenSequence
    dropped: int
    """Turns left out at the front, because the model does not remember as much."""


def prepare(
    serializer: Serializer, messages: Sequence[Message], memory: int, max_tokens: int
) -> Prepared:
    """Return a conversation up to the assistant's next turn, in at most `memory` tokens.

    Where it is longer, whole turns are dropped from the front, so that `max_tokens` more fit, or
    half of the memory if they are more than that. The last turn is never dropped for an answer's
    sake: a long answer pushes the oldest tokens out while it is written.

    Args:
        serializer: the checkpoint's.
        messages: system messages first, if any; the last is the user's.
        memory: tokens that the model remembers.
        max_tokens: the most that are to be written.

    Raises:
        ValueError: for messages of another form.
        TooLong: where the last turn alone is too long.
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1; got {max_tokens}")
    given = checked_messages(messages)
    system, turns = split(given)
    head = serializer.conversation(system)
    ask = serializer.control_piece("<assistant>")
    room = kept_for_answer(max_tokens, memory)
    kept: list[TokenSequence] = []
    used = len(head) + len(ask)
    for turn in reversed(turns):  # the newest first: of a long conversation only an end is cut up
        sequence = serializer.conversation(turn)
        piece = sequence.slice(1, len(sequence))  # without its <bos>
        if kept and used + len(piece) + room > memory:
            break
        if used + len(piece) > memory:
            around = "the system messages take" if system else "what stands around it takes"
            raise TooLong(
                f"the model remembers {memory} tokens; the last turn takes {len(piece)}, {around} "
                f"{used}. Use fewer words or smaller images (16 x 16 pixels are one token)."
            )
        kept.append(piece)
        used += len(piece)
    return Prepared(concatenate([head, *reversed(kept), ask]), len(turns) - len(kept))


def kept_for_answer(max_tokens: int, memory: int) -> int:
    """Return the tokens of a model's memory that a conversation leaves to the answer."""
    return min(max_tokens, memory // 2)


def split(messages: Sequence[Message]) -> tuple[list[Message], list[list[Message]]]:
    """Return the system messages, and the rest in turns: a user's messages with their answer."""
    system = [m for m in messages if m["role"] == "system"]
    turns: list[list[Message]] = []
    before = None
    for message in messages[len(system) :]:
        if not turns or (message["role"] == "user" and before != "user"):
            turns.append([])
        turns[-1].append(message)
        before = message["role"]
    return system, turns


def checked_messages(messages: Sequence[Message]) -> list[Message]:
    """Return messages with their content in parts and their images as the model reads them.

    Raises:
        ValueError: saying which message is at fault: no role or content, an unknown role, a system
            message that is not at the beginning, an end that is not the user's, a part that is
            neither text nor image, text that is not valid Unicode.
    """
    if not messages:
        raise ValueError("expected at least one message; got none")
    given = [_checked(i, message) for i, message in enumerate(messages)]
    roles = [m["role"] for m in given]
    leading = next((i for i, role in enumerate(roles) if role != "system"), len(roles))
    if "system" in roles[leading:]:
        at = leading + roles[leading:].index("system")
        raise ValueError(f"system messages stand before all others; got one as message {at}")
    if roles[-1] != "user":
        raise ValueError(
            f"the last message must be the user's, for the assistant to answer; got the "
            f"{roles[-1]}'s"
        )
    return given


def _checked(number: int, message: Any) -> Message:
    if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
        raise ValueError(f"a message has a role and content; got {message!r:.100}")
    role, content = message["role"], message["content"]
    if role not in ROLES:
        raise ValueError(f"a role is system, user or assistant; got {role!r:.100}")
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list | tuple):
        raise ValueError(
            f"the content of message {number} must be text or a list of parts; got "
            f"{type(content).__name__}"
        )
    parts: list[dict[str, Any]] = []
    for part in content:
        match part:
            case {"type": "text", "text": str(text)}:
                check_text(text, f"message {number}")
                parts.append({"type": "text", "text": text})
            case {"type": "image", "image": image}:
                parts.append({"type": "image", "image": checked(image)})
            case _:
                raise ValueError(f"a part of a message is a text or an image; got {part!r:.100}")
    return {"role": role, "content": parts}


def check_text(text: str, what: str) -> None:
    """Raise ValueError for a string that holds half a character (a lone surrogate)."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        # Python reads a byte that is none of UTF-8 as one of these
        byte = "\udc80" <= text[error.start] <= "\udcff"
        got = "a byte that is not UTF-8" if byte else "half a character (a lone surrogate)"
        raise ValueError(
            f"{what} must be valid Unicode; got {got} at position {error.start}"
        ) from error


def checked(image: Any) -> np.ndarray:
    """Return an image as the model reads it, uint8 (H, W, 3).

    Raises:
        ValueError: for anything that is not uint8 (H, W), (H, W, 1) or (H, W, 3).
    """
    array = np.asarray(image)
    picture_spec(array)
    if array.ndim == 2:
        array = array[..., None]
    return np.broadcast_to(array, (*array.shape[:2], 3)) if array.shape[2] == 1 else array


Example = tuple[Any, str]
"""A picture and the text that belongs to it."""


def few_shot(serializer: Serializer, examples: Sequence[Example], query: Any) -> TokenSequence:
    """Return what the model reads before the text of `query`: examples first (Flamingo's use).

    The stream's form ``pairs``: ``<bos> img <sep> text <eos> img <sep> text <eos> ... img <sep>``.

    Args:
        serializer: the checkpoint's.
        examples: pictures with their texts, in the order in which they are read.
        query: the picture whose text is wanted.
    """
    for number, (_, text) in enumerate(examples):
        check_text(text, f"the text of example {number}")
    return serializer.captions([(checked(image), t) for image, t in examples], checked(query))


def asked(examples: Sequence[Example], question: str, query: Any) -> list[Message]:
    """Return a question about a picture, examples with their answers being earlier turns."""
    turns: list[Message] = []
    for image, answer in [*examples, (query, None)]:
        content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
        turns.append({"role": "user", "content": content})
        if answer is not None:
            turns.append({"role": "assistant", "content": answer})
    return turns
