"""Tokens as a person reads them: position, modality, id, value, and whether they are predicted."""

from __future__ import annotations

from typing import Any

import numpy as np

from gato.tokenizers.serializer import CONTROL, Serializer
from gato.tokenizers.stream import JointTargets, TokenSequence


def describe(serializer: Serializer, sequence: TokenSequence) -> list[dict[str, Any]]:
    """Return one dict per token: position, modality, id, value, target and local.

    Where ids are predicted beside the stream, they follow the token beside which they stand, with
    its position, and all have a ``slot``.
    """
    rows: list[dict[str, np.ndarray]] = [{} for _ in range(len(sequence))]
    for payload in sequence.payload.values():
        fields = {k: v for k, v in payload.items() if k != "at"}
        for i, at in enumerate(payload["at"]):
            rows[int(at)] = {k: v[i] for k, v in fields.items()}
    names = {token: name for name, token in serializer.control.items()}
    options = serializer.net_options()
    tokens = []
    for p in range(len(sequence)):
        modality, token = serializer.names[int(sequence.modality[p])], int(sequence.ids[p])
        if modality == CONTROL:
            value = names[token]
        else:
            local = -1 if token < 0 else token - serializer.offset[modality]
            value = serializer.modalities[modality].describe(
                local, rows[p], options.get(modality, {})
            )
        tokens.append(
            {
                "position": p,
                "modality": modality,
                "id": None if token < 0 else token,
                "value": value,
                "target": bool(sequence.target[p]),
                "local": int(sequence.local[p]),
            }
        )
    if sequence.joint is None:
        return tokens
    beside = _beside(serializer, sequence.joint)
    every: list[dict[str, Any]] = []
    for p, described in enumerate(tokens):
        every += [{**described, "slot": None}, *beside.get(p, [])]
    return every


def _beside(serializer: Serializer, joint: JointTargets) -> dict[int, list[dict[str, Any]]]:
    """Return by position what is predicted beside the token there."""
    found: dict[int, list[dict[str, Any]]] = {}
    for at, slot, token, number in zip(
        joint.at, joint.slot, joint.ids, joint.modality, strict=True
    ):
        name = serializer.names[int(number)]
        modality, local = serializer.modalities[name], int(token) - serializer.offset[name]
        row = {k: v[0] for k, v in modality.rows_of(np.array([local]), {}, 0).items()}
        found.setdefault(int(at), []).append(
            {
                "position": int(at),
                "modality": name,
                "id": int(token),
                "value": modality.describe(local, row, serializer.net_options().get(name, {})),
                "target": True,
                "local": None,
                "slot": int(slot),
            }
        )
    return found
