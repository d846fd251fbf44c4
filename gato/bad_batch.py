"""A batch whose loss or gradient is no number, kept for a look at it.

    bad-batch-00000012/     the step that was not taken
      about.json            the loss, the gradient's norm, the corpora and the documents at fault
      part-0.npz            the batch as arrays, by the names of `TokenBatch`; "nll" is each
                            target's loss, and "payload.<modality>.<field>" what stands at tokens

``gato show RUN/bad-batch-00000012`` prints the first document at fault, and ``numpy.load`` is
enough to look at everything. On a CPU a value that is no number spoils the whole row it lies in, so
the corpora whose own values are at fault are named first.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from gato.distributed import World
from gato.envs.files import atomic_file, write_atomically
from gato.tokenizers.serializer import Serializer
from gato.tokenizers.stream import JointTargets, TokenBatch, TokenSequence

_LISTED = 100  # documents named at most


class NonFiniteLossError(RuntimeError):
    """The loss of a step, or its gradient, was no number; the weights are those before the step."""


@dataclass
class Part:
    """A part of a batch, with what came of it."""

    number: int
    batch: TokenBatch
    """Of arrays."""
    nll: np.ndarray
    """float32 (M,): the loss of each target."""

    def corpus_of(self, document: int) -> int | None:
        """Return the corpus of a document, known where something of it is predicted."""
        found = self.batch.target_corpus[self.documents() == document]
        return int(found[0]) if len(found) else None

    def documents(self) -> np.ndarray:
        """Return (M,): the document of each target."""
        return self.batch.document[self.batch.target_at]

    def spoilt_inputs(self) -> dict[int, str]:
        """Return per document that has values which are no numbers, where the first one stands."""
        found: dict[int, str] = {}
        for modality, rows in self.batch.payload.items():
            for name, values in rows.items():
                if not np.issubdtype(values.dtype, np.floating):
                    continue
                bad = ~np.isfinite(values.reshape(len(values), -1)).all(1)
                for at in rows["at"][bad]:
                    document = int(self.batch.document[at])
                    found.setdefault(document, f"{modality}.{name} at token {int(at)}")
        return found


def refuse(
    run: Path,
    step: int,
    loss: float,
    norm: float,
    parts: Sequence[Part],
    names: Sequence[str],
    world: World,
) -> NonFiniteLossError:
    """Keep the batch of a step that is not taken; return the error that names who is at fault."""
    flags = [world.any(row) for row in suspects(parts, len(names))]
    first = next((row for row in flags if any(row)), flags[-1])
    fault = [n for n, at_fault in zip(names, first, strict=True) if at_fault]
    others = [n for n, there in zip(names, flags[-1], strict=True) if there and n not in fault]
    facts = {"step": step, "loss": str(loss), "gradient_norm": str(norm)}
    folder = run / f"bad-batch-{step:08d}"
    try:
        _write(folder, parts, names, {**facts, "at_fault": fault, "others": others})
        kept = f"The batch is kept in {folder}"
    except OSError as error:
        kept = f"The batch could not be kept ({error.strerror})"
    what, value = ("loss", loss) if not math.isfinite(loss) else ("gradient's norm", norm)
    also = f" (also in the batch: {', '.join(others)})" if others else ""
    last = "the last checkpoint is whole" if (run / "latest").exists() else "there is no checkpoint"
    return NonFiniteLossError(
        f"the {what} of step {step} is {value}; look at {', '.join(fault)}{also}. {kept}; {last}. "
        f"Mend that data, or train anew with a lower optim.lr."
    )


def suspects(parts: Sequence[Part], corpora: int) -> list[list[bool]]:
    """Return which corpora have values that are no numbers, which losses, and which are there."""
    values, losses, drawn = set(), set(), set()
    for part in parts:
        values |= {part.corpus_of(d) for d in part.spoilt_inputs()}
        losses |= set(part.batch.target_corpus[~np.isfinite(part.nll)].tolist())
        drawn |= set(part.batch.target_corpus.tolist())
    return [[i in found for i in range(corpora)] for found in (values, losses, drawn)]


def _write(
    folder: Path, parts: Sequence[Part], names: Sequence[str], facts: dict[str, Any]
) -> None:
    """Write the parts of a batch that this process computed, and `facts` about all of it."""
    folder.mkdir(parents=True, exist_ok=True)
    documents = []
    for part in parts:
        arrays = {
            f.name: getattr(part.batch, f.name)
            for f in fields(part.batch)
            if isinstance(getattr(part.batch, f.name), np.ndarray)
        }
        for modality, rows in part.batch.payload.items():
            arrays |= {f"payload.{modality}.{name}": values for name, values in rows.items()}
        with atomic_file(folder / f"part-{part.number}.npz") as file:
            np.savez(file, allow_pickle=False, **arrays, nll=part.nll)
        documents += _documents(part, names)
    about = {
        **facts,
        "rows_of_a_part": parts[0].batch.rows,
        "row_length": parts[0].batch.row_length,
        "documents": documents[:_LISTED],
    }
    # of several processes, each writes what it computed
    name = "about.json" if parts[0].number == 0 else f"about-{parts[0].number}.json"
    write_atomically(folder / name, json.dumps(about, indent=1).encode())


def _documents(part: Part, names: Sequence[str]) -> list[dict[str, Any]]:
    """Return the documents at fault: where they lie, and what of them is no number."""
    values, owner = part.spoilt_inputs(), part.documents()
    bad = ~np.isfinite(part.nll)
    found = []
    for document in sorted({*values, *owner[bad].tolist()}):
        corpus = part.corpus_of(document)
        tokens = np.flatnonzero(part.batch.document == document)
        found.append(
            {
                "part": part.number,
                "tokens": [int(tokens[0]), int(tokens[-1]) + 1],
                "corpus": None if corpus is None else names[corpus],
                "value": values.get(document),
                "targets": int((owner == document).sum()),
                "targets_not_finite": int((bad & (owner == document)).sum()),
            }
        )
    return found


def read(folder: Path, index: int, serializer: Serializer) -> TokenSequence:
    """Return a document at fault as it was read; `index` is its place in ``about.json``.

    Raises:
        ValueError: where there is no such document, or no such batch.
    """
    try:
        about = json.loads((folder / "about.json").read_text())
        documents = about["documents"]
        if not 0 <= index < len(documents):
            raise ValueError(f"there are {len(documents)} documents; got index {index}")
        start, stop = documents[index]["tokens"]
        with np.load(folder / f"part-{documents[index]['part']}.npz") as arrays:
            batch = dict(arrays)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"expected a bad batch in {folder}: {error}") from error
    ids = batch["inputs"][start:stop].astype(np.int32)
    target = np.zeros(len(batch["inputs"]), np.float32)
    slot = batch.get("target_slot", np.zeros(len(batch["target_at"]), np.int64))
    target[batch["target_at"][slot == 0]] = batch["target_weight"][slot == 0]
    payload: dict[str, dict[str, np.ndarray]] = {}
    for key, values in batch.items():
        if key.startswith("payload."):
            _, modality, name = key.split(".", 2)
            payload.setdefault(modality, {})[name] = values
    owners = [serializer.layout.owner(int(i)) if i >= 0 else None for i in ids]
    modality = np.array([serializer.number.get(owner or "", 0) for owner in owners], np.uint8)
    joint = _joint(batch, np.flatnonzero(slot))
    whole = TokenSequence(batch["inputs"], target, batch["local"], target, payload, joint=joint)
    cut = whole.slice(start, stop)
    for name, rows in cut.payload.items():
        modality[rows["at"][ids[rows["at"]] < 0]] = serializer.number[name]
    local = batch["local"][start:stop].astype(np.int16)
    return replace(cut, ids=ids, modality=modality, local=local)


def _joint(batch: Mapping[str, np.ndarray], which: np.ndarray) -> JointTargets | None:
    """Return those targets of a batch which are joint, in the order of a sequence."""
    if not len(which):
        return None
    which = which[np.lexsort((batch["target_slot"][which], batch["target_at"][which]))]
    names = ("at", "slot", "ids", "modality", "weight")
    return JointTargets(*(batch[f"target_{name}"][which] for name in names))
