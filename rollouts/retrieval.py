"""Pictures and words as unit vectors of one space, by the contrastive head (`gato/contrast.py`).

    <bos> img img img img <sep>     the state of <sep> stands for a picture
    <bos> text .. <eos>             the state of <eos> stands for words

Both are read as they were in training. What belongs together has a high inner product.

Legend: n things, E width of the embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch

from gato.model import GatoModel
from gato.rollouts.conversation import checked
from gato.tokenizers.serializer import Serializer
from gato.tokenizers.stream import TokenSequence, pack

ROW = 256
"""Tokens of a row; several things stand in one."""
BATCH_TOKENS = 16_384
"""Tokens read together."""


class Reader(Protocol):
    """A model and how it reads; an `Agent` is one."""

    model: GatoModel
    serializer: Serializer

    @property
    def name(self) -> str:
        """Where its checkpoint lies."""


def has_head(agent: Reader) -> bool:
    """Return whether a checkpoint can embed: whether a corpus it was trained on asked for it."""
    return agent.model.contrast is not None


def embed_images(agent: Reader, images: Sequence[np.ndarray]) -> np.ndarray:
    """Return float32 (n, E), unit vectors of pictures.

    Args:
        agent: a loaded checkpoint.
        images: uint8 (H, W), (H, W, 1) or (H, W, 3).

    Raises:
        ValueError: for a checkpoint without a contrastive head, or what is no picture.
    """
    return embed(agent, [sequence_of(agent, image) for image in images], "shown")


def embed_texts(agent: Reader, texts: Sequence[str]) -> np.ndarray:
    """Return float32 (n, E), unit vectors of texts.

    Raises:
        ValueError: for a checkpoint without a contrastive head, or what is no text.
    """
    if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"expected a list of texts; got {texts!r:.100}")
    return embed(agent, [sequence_of(agent, text) for text in texts], "said")


def sequence_of(agent: Reader, thing: np.ndarray | str) -> TokenSequence:
    """Return how a picture or a text is read to be embedded; the model has no part in it.

    Raises:
        ValueError: for a checkpoint without a contrastive head, what is no picture, or what is
            longer than the model remembers.
    """
    if not has_head(agent):
        raise _headless()
    serializer, most = agent.serializer, agent.model.config.memory
    said = isinstance(thing, str)
    sequence = serializer.document(thing) if said else serializer.caption(checked(thing), None)
    if len(sequence) > most:
        raise ValueError(
            f"the model remembers {most} tokens and one of these takes {len(sequence)}; use a "
            f"smaller picture (16 x 16 pixels are one token) or a shorter text."
        )
    return sequence


def rank(queries: np.ndarray, items: np.ndarray, top: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the places (q, top) of the items nearest to each query, nearest first, and how near.

    Args:
        queries: (q, E) unit vectors.
        items: (n, E) unit vectors; fewer than `top` give all of them.
        top: at least 1.
    """
    near = queries @ items.T  # (q, n)
    best = np.argsort(-near, axis=1, kind="stable")[:, :top]
    return best, np.take_along_axis(near, best, 1)


def scale_of(agent: Reader) -> float:
    """Return the factor of similarities that training ended with."""
    assert agent.model.contrast is not None
    return float(agent.model.contrast.scale.detach())


@torch.inference_mode()
def embed(agent: Reader, sequences: Sequence[TokenSequence], side: str) -> np.ndarray:
    """Return float32 (n, E), unit vectors of what `sequence_of` returned.

    Args:
        agent: a loaded checkpoint.
        sequences: all of pictures, or all of texts.
        side: ``shown`` of pictures, ``said`` of texts.
    """
    model, head = agent.model, agent.model.contrast
    if head is None:
        raise _headless()
    turned = head.embed_shown if side == "shown" else head.embed_said
    device = model.table.weight.device
    found = np.zeros((len(sequences), head.said.out_features), np.float32)
    length = max(ROW, *(len(s) for s in sequences)) if sequences else ROW
    for rows in _batches(sequences, length):
        batch = pack(
            [[sequences[i] for i in row] for row in rows], length, agent.serializer.control
        )
        ends, members = [], []
        for number, row in enumerate(rows):
            at = number * length
            for i in row:
                at += len(sequences[i])
                ends.append(at - 1)
                members.append(i)
        states = model(batch.to(device))[torch.tensor(ends, device=device)]
        found[members] = turned(states).cpu().numpy()
    return found


def _headless() -> ValueError:
    return ValueError(  # without its path, for a server says this to anybody
        "this checkpoint has no contrastive head, which embeds pictures and words; train with "
        "contrast above 0 in a corpus of captions (--corpora.0.contrast 1)."
    )


def _batches(sequences: Sequence[TokenSequence], length: int) -> list[list[list[int]]]:
    """Return the places of the sequences in rows of `length` tokens, and those in batches.

    Pictures of one size stand together, as they are embedded.
    """
    rows: list[list[int]] = []
    used = length
    for i in sorted(range(len(sequences)), key=lambda i: len(sequences[i])):
        if used + len(sequences[i]) > length:
            rows.append([])
            used = 0
        rows[-1].append(i)
        used += len(sequences[i])
    n = max(1, BATCH_TOKENS // length)
    return [rows[k : k + n] for k in range(0, len(rows), n)]
