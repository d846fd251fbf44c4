"""The stream: one example as a sequence of tokens, and examples packed into a batch.

    document      <bos> text .............................................. <eos>
    captioned     <bos> img img img img <sep> text ........................ <eos>
    pairs         <bos> img .. <sep> text .. <eos> img .. <sep> text .. <eos> ...
    conversation  <bos> <system> text <user> img.. text <assistant> text <eos> <user> ...
    episode       <bos> [instruction] [prompt steps] step step step ...
    step          observation tokens, keys in lexicographic order | <sep> | action tokens
    conditioned   observation tokens | <sep> | <return i> | action tokens
    joint         observation tokens                              beside the last: ACTION ids
    joint, shown  observation tokens | <sep> | action tokens      beside <sep>: ACTION ids
    said          <bos> text .. <eos>                             of captions, to be matched

Predicted (in capitals: what carries loss): TEXT and <EOS> of documents, captions and assistant
turns, ACTION tokens, and before them the <RETURN> to come of tasks that are conditioned on it.
Never images, proprioception or any other observation. The token at position p is predicted from the
hidden state at p - 1. Joint targets stand beside the stream: all ids of an action, or of a chunk of
actions, are predicted from one hidden state, told apart by their slots 1, 2, ...; none of them sees
another. Where actions are hidden they are then no tokens at all.

Legend: T tokens of one sequence, B rows of a batch, N = B * row length, r payload rows, M targets.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch

Payload = dict[str, dict[str, np.ndarray]]
"""Per modality, fields of r rows each; the field ``at`` holds their positions, ascending.

Convention: a field whose name begins with ``host_`` stays an array on the host wherever the others
go. It says what decides shapes, which asking a GPU for would make the host wait for all its work.
"""


@dataclass
class JointTargets:
    """Ids predicted beside the stream, J of them, in the order of the states that predict them."""

    at: np.ndarray
    """int64 (J,), ascending: the token whose hidden state predicts the id."""
    slot: np.ndarray
    """int16 (J,), from 1: which of the ids that this state predicts."""
    ids: np.ndarray
    """int32 (J,)"""
    modality: np.ndarray
    """uint8 (J,), the number of the modality that owns each id."""
    weight: np.ndarray
    """float32 (J,), above 0: the weight of the loss."""

    def __len__(self) -> int:
        return len(self.at)

    def slice(self, start: int, stop: int) -> JointTargets | None:
        """Return what tokens [start, stop) predict; None where that is nothing."""
        a, b = np.searchsorted(self.at, (start, stop))
        cut = [column[a:b] for column in (self.slot, self.ids, self.modality, self.weight)]
        return JointTargets(self.at[a:b] - start, *cut) if a < b else None

    @staticmethod
    def joined(parts: Sequence[tuple[int, JointTargets | None]]) -> JointTargets | None:
        """Return the targets of parts that start at these tokens, as one."""
        some = [(start, part) for start, part in parts if part is not None]
        if not some:
            return None
        columns = (
            np.concatenate([getattr(part, name) for _, part in some])
            for name in ("slot", "ids", "modality", "weight")
        )
        return JointTargets(np.concatenate([part.at + start for start, part in some]), *columns)


@dataclass
class TokenSequence:
    """One example. Modalities are numbered by the serializer that made it."""

    ids: np.ndarray
    """int32 (T,), -1 where a token carries no id."""
    modality: np.ndarray
    """uint8 (T,), the number of the modality that owns each token."""
    local: np.ndarray
    """int16 (T,), index inside the step; all action tokens share index 0 (Gato appendix C)."""
    target: np.ndarray
    """float32 (T,), the weight of the loss on predicting each token; 0 for none."""
    payload: Payload = field(default_factory=dict)
    hidden: np.ndarray | None = None
    """bool (T,): shown to the model as <masked>. Convention: a hidden token's value is hidden."""
    joint: JointTargets | None = None
    """What is predicted beside the stream."""

    def __len__(self) -> int:
        return len(self.ids)

    def targets(self) -> int:
        """Return how many ids are predicted."""
        beside = 0 if self.joint is None else len(self.joint)
        return int(np.count_nonzero(self.target)) + beside

    def without_targets(self) -> TokenSequence:
        """Return the sequence as something that is given: none of it is predicted."""
        return replace(self, target=np.zeros_like(self.target), joint=None)

    def slice(self, start: int, stop: int) -> TokenSequence:
        """Return tokens [start, stop) as views."""
        payload = {}
        for name, rows in self.payload.items():
            a, b = np.searchsorted(rows["at"], (start, stop))
            if a < b:
                payload[name] = {k: v[a:b] for k, v in rows.items()}
                payload[name]["at"] = rows["at"][a:b] - start
        hidden = None if self.hidden is None else self.hidden[start:stop]
        ids, modality, local, target = (
            c[start:stop] for c in (self.ids, self.modality, self.local, self.target)
        )
        joint = None if self.joint is None else self.joint.slice(start, stop)
        return TokenSequence(ids, modality, local, target, payload, hidden, joint)

    def hide(self, tokens: np.ndarray) -> TokenSequence:
        """Return the sequence with `tokens` (T,) bool shown as <masked>, their values dropped."""
        payload = {}
        for name, rows in self.payload.items():
            keep = ~tokens[rows["at"]]
            if keep.any():
                payload[name] = rows if keep.all() else {k: v[keep] for k, v in rows.items()}
        hidden = tokens if self.hidden is None else self.hidden | tokens
        return replace(self, payload=payload, hidden=hidden)


def concatenate(parts: Sequence[TokenSequence]) -> TokenSequence:
    """Return the parts written one after another as one sequence."""
    if len(parts) == 1:
        return parts[0]
    starts = np.cumsum([0, *(len(p) for p in parts)])
    collected: dict[str, list[tuple[int, dict[str, np.ndarray]]]] = {}
    for start, part in zip(starts, parts, strict=False):
        for name, rows in part.payload.items():
            collected.setdefault(name, []).append((int(start), rows))
    payload = {name: _join_rows(pieces) for name, pieces in collected.items()}
    hidden = None
    if any(p.hidden is not None for p in parts):
        hidden = np.concatenate(
            [np.zeros(len(p), bool) if p.hidden is None else p.hidden for p in parts]
        )
    ids, modality, local, target = (
        np.concatenate([getattr(p, name) for p in parts])
        for name in ("ids", "modality", "local", "target")
    )
    joint = JointTargets.joined([(int(s), p.joint) for s, p in zip(starts, parts, strict=False)])
    return TokenSequence(ids, modality, local, target, payload, hidden, joint)


def _join_rows(pieces: list[tuple[int, dict[str, np.ndarray]]]) -> dict[str, np.ndarray]:
    joined = {k: np.concatenate([rows[k] for _, rows in pieces]) for k in pieces[0][1] if k != "at"}
    joined["at"] = np.concatenate([rows["at"] + start for start, rows in pieces])
    return joined


@dataclass
class Matches:
    """Pairs to be told from others: I of what is shown, U different texts; arrays or tensors."""

    shown_at: Any
    """int64 (I,): the token whose state knows what is shown."""
    said_at: Any
    """int64 (U,): the token whose state knows a text."""
    said: Any
    """int64 (I,): the text that belongs to each, a place in `said_at`."""
    weight: Any
    """float32 (I,): of the loss."""
    corpus: Any
    """int64 (I,): the index of the corpus each pair comes from."""

    def __len__(self) -> int:
        return len(self.shown_at)

    def each(self, change: Callable[[Any], Any]) -> Matches:
        """Return the pairs with every column changed."""
        return Matches(**{f.name: change(getattr(self, f.name)) for f in fields(self)})


@dataclass
class TokenBatch:
    """Sequences packed back to back into B rows of a fixed length; arrays or tensors.

    No token sees another document. What is left at a row's end is a document of its own, made of
    padding, that predicts nothing.
    """

    inputs: Any
    """int64 (N,): ids, with <masked> in place of hidden tokens; -1 where a token has no id."""
    local: Any
    """int64 (N,)"""
    position: Any
    """int64 (N,), restarts at 0 with each document."""
    document: Any
    """int64 (N,), ascending; one number per document."""
    cu_seqlens: Any
    """int32 (D + 1,), document boundaries, padded with N (documents of length 0)."""
    target_at: Any
    """int64 (M,): positions of the predicted tokens; of joint targets, which come last and by
    their modality, of the tokens beside which they stand."""
    target_ids: Any
    """int64 (M,)"""
    target_weight: Any
    """float32 (M,)"""
    target_corpus: Any
    """int64 (M,): the index of the corpus each target comes from."""
    target_modality: Any
    """int64 (M,)"""
    target_slot: Any
    """int64 (M,): 0 for the next token, from 1 for joint targets."""
    payload: dict[str, dict[str, Any]]
    rows: int
    row_length: int
    joint: tuple[tuple[int, int], ...] = ()
    """(modality, count) of the last targets, which are joint."""
    spare: int = 0
    """Rows past the last token, to which payload rows that are padding are added."""
    matches: Matches | None = None
    """What a contrastive head learns from; None where there is nothing."""

    @property
    def state_at(self) -> Any:
        """int64 (M,): positions of the hidden states that predict the targets."""
        return self.target_at - (self.target_slot == 0) * 1

    def to(self, device: torch.device | str, non_blocking: bool = False) -> TokenBatch:
        """Return the batch as tensors on `device`."""

        def move(x: Any) -> Any:
            tensor = torch.from_numpy(x) if isinstance(x, np.ndarray) else x
            return tensor.to(device, non_blocking=non_blocking)

        payload = {m: to_device(rows, move) for m, rows in self.payload.items()}
        skipped = ("payload", "rows", "row_length", "joint", "spare", "matches")
        arrays = {
            f.name: move(getattr(self, f.name)) for f in fields(self) if f.name not in skipped
        }
        matches = None if self.matches is None else self.matches.each(move)
        return replace(self, **arrays, payload=payload, matches=matches)

    def validate(self) -> None:
        """Check the batch once, at the boundary.

        Raises:
            ValueError: naming the first rule the batch breaks.
        """
        n = self.rows * self.row_length
        rules = {
            f"every per-token array has {n} entries": all(
                len(a) == n for a in (self.inputs, self.local, self.position, self.document)
            ),
            "documents ascend": bool((np.diff(self.document) >= 0).all()),
            "document boundaries end at the batch's end": int(self.cu_seqlens[-1]) == n,
            "targets lie inside their document": bool(
                ((self.position[self.target_at] > 0) | (self.target_slot > 0)).all()
            ),
            "joint targets come last and are counted": bool(
                (np.diff(1 * (self.target_slot > 0)) >= 0).all()
            )
            and sum(n for _, n in self.joint) == np.count_nonzero(self.target_slot),
            "targets carry ids": bool((self.target_ids >= 0).all()),
            "matches lie in the batch": self.matches is None
            or all(
                len(at) > 0 and 0 <= at.min() and at.max() < most
                for at, most in (
                    (self.matches.shown_at, n),
                    (self.matches.said_at, n),
                    (self.matches.said, len(self.matches.said_at)),
                )
            ),
            "payload positions lie in the batch": all(
                len(r["at"]) == 0 or (0 <= r["at"].min() and r["at"].max() < n)
                for r in self.payload.values()
            ),
        }
        broken = [rule for rule, holds in rules.items() if not holds]
        if broken:
            raise ValueError(f"a batch must satisfy: {broken[0]}; this one does not")


def to_device(rows: Mapping[str, Any], move: Callable[[Any], Any]) -> dict[str, Any]:
    """Return the fields of one modality's payload, each moved but those that stay on the host."""
    return {k: v if k.startswith("host_") else move(v) for k, v in rows.items()}


def pack(
    rows: Sequence[Sequence[TokenSequence]],
    row_length: int,
    control: Mapping[str, int],
    corpora: Sequence[Sequence[int]] | None = None,
) -> TokenBatch:
    """Return the batch whose rows hold these sequences.

    Args:
        rows: the sequences of each row, in order; their lengths add up to at most `row_length`.
        row_length: tokens per row.
        control: the ids of ``<pad>`` and ``<masked>``.
        corpora: for each sequence of each row, the index of its corpus.

    Raises:
        ValueError: where a row's sequences do not fit.
    """
    padded: list[TokenSequence] = []
    lengths: list[int] = []
    corpus: list[int] = []
    for i, row in enumerate(rows):
        used = sum(len(s) for s in row)
        if used > row_length:
            raise ValueError(f"row {i} holds {used} tokens; {row_length} fit")
        padded += row
        lengths += [len(s) for s in row]
        corpus += corpora[i] if corpora else [0] * len(row)
        if used < row_length:
            padded.append(_padding(row_length - used, control["<pad>"]))
            lengths.append(row_length - used)
            corpus.append(0)
    everything = concatenate(padded)
    n = len(everything)
    bounds = np.cumsum([0, *lengths]).astype(np.int32)
    repeats = np.array(lengths)
    inputs = everything.ids.astype(np.int64)
    if everything.hidden is not None:
        inputs[everything.hidden] = control["<masked>"]
    # one shape for nearly all batches of a run: their numbers of documents differ by a tenth or so
    capacity = max(128, 1 << (len(bounds) - 1).bit_length())
    cu_seqlens = np.full(capacity, n, np.int32)
    cu_seqlens[: len(bounds)] = bounds
    owner = np.repeat(np.array(corpus, np.int64), repeats)
    targets, joint = _targets(everything)
    return TokenBatch(
        inputs=inputs,
        local=everything.local.astype(np.int64),
        position=np.arange(n) - np.repeat(bounds[:-1].astype(np.int64), repeats),
        document=np.repeat(np.arange(len(lengths)), repeats),
        cu_seqlens=cu_seqlens,
        **targets,
        target_corpus=owner[targets["target_at"]],
        payload=everything.payload,
        rows=len(rows),
        row_length=row_length,
        joint=joint,
    )


def _targets(
    sequence: TokenSequence,
) -> tuple[dict[str, Any], tuple[tuple[int, int], ...]]:
    """Return what is predicted, as a batch holds it: joint targets last, by their modality."""
    at = np.flatnonzero(sequence.target)
    columns = {
        "target_at": at,
        "target_ids": sequence.ids[at].astype(np.int64),
        "target_weight": sequence.target[at],
        "target_modality": sequence.modality[at].astype(np.int64),
        "target_slot": np.zeros(len(at), np.int64),
    }
    if sequence.joint is None:
        return columns, ()
    order = np.argsort(sequence.joint.modality, kind="stable")
    for name in columns:
        beside = getattr(sequence.joint, name.removeprefix("target_"))[order]
        columns[name] = np.concatenate([columns[name], beside.astype(columns[name].dtype)])
    numbers, counts = np.unique(sequence.joint.modality, return_counts=True)
    return columns, tuple(zip(numbers.tolist(), counts.tolist(), strict=True))


def _padding(n: int, pad: int) -> TokenSequence:
    zeros = np.zeros(n, np.int16)
    return TokenSequence(
        np.full(n, pad, np.int32), zeros.astype(np.uint8), zeros, zeros.astype(np.float32)
    )
