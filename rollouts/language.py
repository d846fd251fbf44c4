"""How well a checkpoint reads and writes: captions, answers and texts against what was written.

A caption counts where the whole text is one of the picture's. A conversation's answers count one
by one, each given the true turns before it. Documents give the loss per token and per byte.
`captions`, `answers`, `replies` and `documents` are measures of `gato eval`; `evaluate_language`
reads records of all kinds at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gato.envs.records import RecordStore
from gato.rollouts.agent import Agent
from gato.rollouts.choices import Scores, chosen_figures, judge, per_record
from gato.rollouts.generate import log_likelihoods
from gato.rollouts.metrics import SAMPLES, Figure, Options, Record, measured
from gato.rollouts.overlap import cider_d, has_sacrebleu, overlap_of, overlap_rows
from gato.rollouts.questions import Question, ask
from gato.rollouts.words import normalise, vqa_accuracy
from gato.tokenizers.stream import TokenSequence, concatenate

NO_SACREBLEU = "no BLEU and chrF without sacrebleu: pip install 'gato[metrics]'"


def evaluate_language(
    agent: Agent,
    records: str | Path | RecordStore | Sequence[dict[str, Any]],
    limit: int | None = None,
    max_tokens: int = 48,
) -> dict[str, Any]:
    """Return how the agent does on captions, conversations and documents, as JSON-able data.

    Args:
        agent: a loaded checkpoint.
        records: a store, its folder, or records.
        limit: use only the first so many records.
        max_tokens: the most tokens of an answer.

    Returns:
        ``exact``, the share of captions and answers that are word for word right (None without
        any), the same per kind of question, per conversation as a whole, for captions ``overlap``
        (CIDEr-D, and BLEU and chrF where sacrebleu is installed), and for documents
        ``loss`` (nats per token), ``perplexity`` and ``bits_per_byte``.
    """
    store = RecordStore(records) if isinstance(records, str | Path) else records
    count = len(store) if limit is None else min(limit, len(store))
    chosen = [store[i] for i in range(count)]
    asked = ask(agent, chosen, max_tokens)
    return {
        "records": count,
        **_answers(asked),
        **_documents(agent, [r["text"] for r in chosen if r["kind"] == "document"]),
    }


def captions(agent: Agent, records: Sequence[Record], options: Options) -> dict[str, Any]:
    """Measure captions; a record's ``meta["references"]`` are further true captions."""
    asked = ask(agent, records, options.max_tokens)
    said, truths = [q["said"] for q in asked], [q["wanted"] for q in asked]
    figures = _exact(asked) | {"cider": Figure(cider_d(said, truths), "ratio")}
    more: dict[str, Any] = {}
    if all(len(texts) == 1 for texts in truths):
        # what a perfect answer scores: captions of few words have few runs of words
        best = cider_d([texts[0] for texts in truths], truths).mean()
        more["best"] = {"cider": float(best) if np.isfinite(best) else None}
    more["references"] = sum(map(len, truths)) / max(len(truths), 1)
    figures |= _overlaps(asked)
    return measured(figures, _shown(asked), options, **more, **_notes(agent, asked, options))


def answers(agent: Agent, records: Sequence[Record], options: Options) -> dict[str, Any]:
    """Measure answers to questions about pictures.

    A record's ``meta["answers"]`` are what several people answered, a list per answer, and
    ``meta["choices"]`` the texts that each answer is one of.
    """
    asked = ask(agent, records, options.max_tokens)
    numbers = [q["record"] for q in asked]
    accuracy = [0.0 if _lost(q) else vqa_accuracy(q["said"], q["people"]) for q in asked]
    figures = _exact(asked) | {"vqa_accuracy": per_record(numbers, accuracy)}
    figures |= _chosen(agent, asked, options)
    more = _by_kind(asked) | _notes(agent, asked, options, overlap=False)
    return measured(figures, _shown(asked), options, **more)


def replies(agent: Agent, records: Sequence[Record], options: Options) -> dict[str, Any]:
    """Measure the assistant's answers in conversations, one by one and as wholes."""
    asked = ask(agent, records, options.max_tokens)
    figures = _exact(asked) | {"whole_conversations": _whole(asked)} | _overlaps(asked)
    figures |= _chosen(agent, asked, options)
    return measured(
        figures, _shown(asked), options, **_by_kind(asked), **_notes(agent, asked, options)
    )


def documents(agent: Agent, records: Sequence[Record], options: Options) -> dict[str, Any]:
    """Measure the likelihood of texts."""
    texts = [r["text"] for r in records]
    rows = _scored(agent, texts)  # (N, 3): nats, tokens, bytes
    nats, tokens, size = rows.T
    figures = {
        "loss": Figure(np.stack([nats, tokens], 1), "ratio"),
        "perplexity": Figure(np.stack([nats, tokens], 1), "exponential"),
        "bits_per_byte": Figure(np.stack([nats / np.log(2), size], 1), "ratio"),
    }
    worst = np.argsort(-nats / tokens)[:3].tolist() if len(rows) else []
    samples = [
        {
            "kind": "document",
            "asked": texts[i][:400],
            "said": f"{nats[i] / tokens[i]:.3f} nats per token",
            "wanted": [],
            "right": None,
        }
        for i in worst
    ]
    return measured(figures, samples, options, tokens=int(tokens.sum()))


# ---- figures ---------------------------------------------------------------------------------


def _exact(asked: Sequence[Question]) -> dict[str, Figure]:
    """Return how often an answer is a true one, word for word and normalised."""
    numbers = [q["record"] for q in asked]
    alike = [not _lost(q) and normalise(q["said"]) in map(normalise, q["wanted"]) for q in asked]
    return {
        "exact": per_record(numbers, [q["right"] for q in asked]),
        "exact_normalised": per_record(numbers, alike),
    }


def _lost(question: Question) -> bool:
    """Return whether nothing was answered: what was ``said`` is no text then, not an empty one."""
    return question["prefix"] is None


def _whole(asked: Sequence[Question]) -> Figure:
    """Return how many conversations are right in every answer."""
    whole: dict[int, bool] = {}
    for q in asked:
        whole[q["record"]] = whole.get(q["record"], True) and q["right"]
    return per_record(list(whole), list(whole.values()))


def _overlaps(asked: Sequence[Question]) -> dict[str, Figure]:
    """Return BLEU and chrF, counted per record; nothing without sacrebleu."""
    if not asked or not has_sacrebleu():
        return {}
    said, wanted = [q["said"] for q in asked], [q["wanted"] for q in asked]
    records, numbers = np.unique([q["record"] for q in asked], return_inverse=True)
    found = {}
    for name in ("bleu", "chrf"):
        rows = overlap_rows(name, said, wanted)
        sums = np.zeros((numbers.max() + 1, rows.shape[1]))
        np.add.at(sums, numbers, rows)
        found[name] = Figure(sums, name, records.tolist())
    return found


def _notes(
    agent: Agent, asked: Sequence[Question], options: Options, overlap: bool = True
) -> dict[str, list[str]]:
    """Return what a person should know of the figures; nothing where all is as it should be."""
    notes = [NO_SACREBLEU] if overlap and not has_sacrebleu() else []
    memory = agent.model.config.memory
    odd = [q["cannot"] for q in asked if q["cannot"]]
    if odd:
        notes.append(
            f"{len(odd)} of {len(asked)} questions take more than the {memory} tokens that the "
            f"model remembers and cannot be shortened ({odd[0]}); they count as answered wrongly"
        )
    if lost := sum(map(_lost, asked)) - len(odd):
        notes.append(
            f"{lost} of {len(asked)} questions take more than the {memory} tokens that the model "
            f"remembers; they count as answered wrongly"
        )
    if cut := sum(q["cut"] for q in asked):
        notes.append(
            f"{cut} of {len(asked)} questions were asked without the first turns of their "
            f"conversations: the model remembers {memory} tokens"
        )
    choices = _choices(asked, options)
    if any(choices) and (without := choices.count([])):
        notes.append(
            f"{without} of {len(asked)} questions have no choices: accuracy is of the others"
        )
    return {"notes": notes} if notes else {}


def _choices(asked: Sequence[Question], options: Options) -> list[list[str]]:
    return [q.get("choices") or list(options.choices) for q in asked]


def _chosen(agent: Agent, asked: Sequence[Question], options: Options) -> dict[str, Figure]:
    """Return accuracy by choosing, of the questions that have choices."""
    judged = [(q, c) for q, c in zip(asked, _choices(asked, options), strict=True) if c]
    if not judged:
        return {}
    for question, texts in judged:
        if question["wanted"][0] not in texts:
            raise ValueError(
                f"expected choices with the true answer; {question['wanted'][0]!r:.100} to "
                f"{question['asked']!r:.100} is not among {texts!r:.200}."
            )
    fitting = [(q["prefix"], c) for q, c in judged if not _lost(q)]
    contexts, of_them = [prefix for prefix, _ in fitting], [c for _, c in fitting]
    found = iter(judge(agent.model, agent.serializer, contexts, of_them))
    none = Scores(np.zeros(1), np.zeros(1))
    scores = [none if _lost(q) else next(found) for q, _ in judged]
    right = [-1 if _lost(q) else c.index(q["wanted"][0]) for q, c in judged]
    return chosen_figures(scores, right, [q["record"] for q, _ in judged])


def _by_kind(asked: Sequence[Question]) -> dict[str, Any]:
    kinds = sorted({q["kind"] for q in asked})
    shares = {kind: _share([q for q in asked if q["kind"] == kind]) for kind in kinds}
    return {"asked": len(asked), "kinds": shares}


def _shown(asked: Sequence[Question]) -> list[dict[str, Any]]:
    """Return examples, wrong ones first: at most half of them where there are right ones."""
    shown = [q for q in asked if not q["right"]][: SAMPLES // 2]
    shown += [q for q in asked if q["right"]][: SAMPLES - len(shown)]
    kept = ("record", "kind", "asked", "said", "wanted", "right", "image")
    return [{name: q[name] for name in kept} for q in shown]


def _share(rows: Sequence[Question]) -> dict[str, Any]:
    exact = float(np.mean([q["right"] for q in rows])) if rows else None
    return {"exact": exact, "count": len(rows)}


def _answers(asked: Sequence[Question]) -> dict[str, Any]:
    captioned = [q for q in asked if q["kind"] == "caption"]
    answered = [q for q in asked if q["kind"] != "caption"]
    whole = np.asarray(_whole(answered).rows)
    samples = [dict(q, wanted=q["wanted"][0]) for q in _shown(asked)]
    for sample in samples:
        del sample["image"]
    return {
        **_share(asked),
        "captions": _share(captioned),
        "answers": _share(answered),
        "conversations": {
            "exact": float(whole[:, 0].mean()) if len(whole) else None,
            "count": len(whole),
        },
        "kinds": _by_kind(answered)["kinds"],
        **({"overlap": _overlap(captioned)} if len(captioned) > 1 else {}),
        "samples": samples,
    }


def _overlap(captioned: Sequence[Question]) -> dict[str, float]:
    said, wanted = [q["said"] for q in captioned], [q["wanted"] for q in captioned]
    sums = {name: np.asarray(f.rows).sum(0) for name, f in _overlaps(captioned).items()}
    found = {name: float(overlap_of(name, row[None])[0]) for name, row in sums.items()}
    return {"cider": float(cider_d(said, wanted).mean()), **found}


# ---- documents -------------------------------------------------------------------------------


def _documents(agent: Agent, texts: Sequence[str]) -> dict[str, Any]:
    result: dict[str, Any] = {"documents": len(texts)}
    if not texts:
        return result
    nats, tokens, size = _scored(agent, texts).sum(0)
    loss = float(nats / tokens)
    return {
        **result,
        "loss": loss,
        "perplexity": float(np.exp(loss)),
        "bits_per_byte": float(nats / np.log(2) / size),
    }


def _scored(agent: Agent, texts: Sequence[str]) -> np.ndarray:
    """Return (N, 3): nats, tokens and bytes of each text."""
    windows = [_windows(agent, text) for text in texts]
    pieces = [piece for parts in windows for piece in parts]
    scored = iter(log_likelihoods(agent.model, agent.serializer, pieces))
    rows = np.zeros((len(texts), 3))
    for row, text, parts in zip(rows, texts, windows, strict=True):
        found = np.array([next(scored) for _ in parts]).sum(0)
        row[:] = -found[0], found[1], len(text.encode())
    return rows


def _windows(agent: Agent, text: str) -> list[TokenSequence]:
    """Return a document in windows that fit the model's memory, each after ``<bos>``."""
    whole, most = agent.serializer.document(text), agent.model.config.memory
    if len(whole) <= most:
        return [whole]
    starts = range(1, len(whole), most - 1)
    first = whole.slice(0, 1)
    return [concatenate([first, whole.slice(s, min(s + most - 1, len(whole)))]) for s in starts]
