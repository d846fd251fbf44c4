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
from gato.rollouts.choices import chosen_figures, judge, per_record
from gato.rollouts.generate import foreseen, generate, log_likelihoods
from gato.rollouts.metrics import SAMPLES, Figure, Options, Record, measured
from gato.rollouts.overlap import cider_d, has_sacrebleu, overlap_of, overlap_rows
from gato.rollouts.words import normalise, vqa_accuracy
from gato.tokenizers.stream import TokenSequence, concatenate

Question = dict[str, Any]
"""What was asked about a record (its number), the answers ``wanted``, what was ``said``, whether it
was ``right``; ``people``, what several people answered; ``choices``, and the ``image`` shown."""
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
    return measured(figures, _shown(asked), options, **more, **_notes())


def answers(agent: Agent, records: Sequence[Record], options: Options) -> dict[str, Any]:
    """Measure answers to questions about pictures.

    A record's ``meta["answers"]`` are what several people answered, a list per answer, and
    ``meta["choices"]`` the texts that each answer is one of.
    """
    asked = ask(agent, records, options.max_tokens)
    numbers = [q["record"] for q in asked]
    accuracy = per_record(numbers, [vqa_accuracy(q["said"], q["people"]) for q in asked])
    figures = _exact(asked) | {"vqa_accuracy": accuracy}
    figures |= _chosen(agent, asked, options)
    return measured(figures, _shown(asked), options, **_by_kind(asked))


def replies(agent: Agent, records: Sequence[Record], options: Options) -> dict[str, Any]:
    """Measure the assistant's answers in conversations, one by one and as wholes."""
    asked = ask(agent, records, options.max_tokens)
    figures = _exact(asked) | {"whole_conversations": _whole(asked)} | _overlaps(asked)
    figures |= _chosen(agent, asked, options)
    return measured(figures, _shown(asked), options, **_by_kind(asked), **_notes())


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


# ---- asking ----------------------------------------------------------------------------------


def ask(agent: Agent, records: Sequence[Record], max_tokens: int) -> list[Question]:
    """Return every question about the records with the agent's likeliest answer to it."""
    asked = [item for i, r in enumerate(records) for item in _questions(agent, r, i)]
    longest = max((len(agent.serializer.text(q["wanted"][0])) for q in asked), default=0)
    _foresee(agent, records, asked)
    unsure = [q for q in asked if not q["right"]]  # they may still spell the same text otherwise
    said = generate(
        agent.model,
        agent.serializer,
        [q["prefix"] for q in unsure],
        max_tokens=max(max_tokens, longest + 1),
    )
    for question, answer in zip(unsure, said, strict=True):
        question["said"], question["right"] = answer, answer in question["wanted"]
    return asked


def _foresee(agent: Agent, records: Sequence[Record], asked: Sequence[Question]) -> None:
    """Mark the answers that one forward over a whole record shows to be the likeliest."""
    written = {}
    for i in dict.fromkeys(q["record"] for q in asked):
        record = records[i]
        if record["kind"] == "caption":
            sequence = agent.serializer.caption(record["image"], record["text"])
        else:
            sequence = agent.serializer.conversation(record["messages"])
        if len(sequence) <= agent.model.config.memory:
            written[i] = sequence
    judged = foreseen(agent.model, agent.serializer, list(written.values()))
    right = dict(zip(written, map(iter, judged), strict=True))
    for question in asked:
        sure = question["record"] in right and next(right[question["record"]])
        question["right"], question["said"] = sure, question["wanted"][0]


def _questions(agent: Agent, record: Record, index: int) -> list[Question]:
    """Return what is asked about one record: the text to go on from and the answer wanted."""
    meta = record.get("meta") or {}
    if record["kind"] == "caption":
        truths = list(dict.fromkeys([record["text"], *meta.get("references", ())]))
        item = {"record": index, "kind": "caption", "asked": "", "wanted": truths}
        prefix = agent.serializer.caption(record["image"], None)
        return [{**item, "people": truths, "image": record["image"], "prefix": prefix}]
    if record["kind"] != "conversation":
        return []
    messages, found = record["messages"], []
    turns = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    kinds = list(meta.get("kinds", ()))
    people, choices = (_per_turn(meta.get(k), len(turns)) for k in ("answers", "choices"))
    for number, i in enumerate(turns):
        wanted = _text(messages[i])
        found.append(
            {
                "record": index,
                "kind": kinds[number] if len(kinds) == len(turns) else "answer",
                "asked": _text(messages[i - 1]) if i else "",
                "wanted": [wanted],
                "people": people[number] or [wanted],
                "choices": choices[number],
                "image": _picture(messages[:i]),
                "prefix": _prefix(agent, messages[:i]),
            }
        )
    return found


def _per_turn(told: Any, turns: int) -> list[list[str]]:
    """Return lists of texts per answer; a plain list of texts is every answer's."""
    if told and all(isinstance(text, str) for text in told):
        return [list(told)] * turns
    if not told:
        return [[]] * turns
    if len(told) != turns:
        raise ValueError(
            f"expected a list of texts for each of a conversation's {turns} answers; got "
            f"{len(told)} lists."
        )
    return [list(texts) for texts in told]


def _prefix(agent: Agent, messages: Sequence[dict[str, Any]]) -> TokenSequence:
    parts = [agent.serializer.conversation(messages)]
    return concatenate([*parts, agent.serializer.control_piece("<assistant>")])


def _picture(messages: Sequence[dict[str, Any]]) -> np.ndarray | None:
    """Return the picture that was shown last, if any."""
    shown = [
        part["image"]
        for message in messages
        if not isinstance(message["content"], str)
        for part in message["content"]
        if part["type"] == "image"
    ]
    return shown[-1] if shown else None


def _text(message: dict[str, Any]) -> str:
    if isinstance(message["content"], str):
        return message["content"]
    return "".join(part["text"] for part in message["content"] if part["type"] == "text")


# ---- figures ---------------------------------------------------------------------------------


def _exact(asked: Sequence[Question]) -> dict[str, Figure]:
    """Return how often an answer is a true one, word for word and normalised."""
    numbers = [q["record"] for q in asked]
    alike = [normalise(q["said"]) in map(normalise, q["wanted"]) for q in asked]
    return {
        "exact": per_record(numbers, [q["right"] for q in asked]),
        "exact_normalised": per_record(numbers, alike),
    }


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
    numbers = np.unique([q["record"] for q in asked], return_inverse=True)[1]
    found = {}
    for name in ("bleu", "chrf"):
        rows = overlap_rows(name, said, wanted)
        sums = np.zeros((numbers.max() + 1, rows.shape[1]))
        np.add.at(sums, numbers, rows)
        found[name] = Figure(sums, name)
    return found


def _notes() -> dict[str, list[str]]:
    return {} if has_sacrebleu() else {"notes": [NO_SACREBLEU]}


def _chosen(agent: Agent, asked: Sequence[Question], options: Options) -> dict[str, Figure]:
    """Return accuracy by choosing, where every question has choices."""
    choices = [q.get("choices") or list(options.choices) for q in asked]
    if not any(choices):
        return {}
    for question, texts in zip(asked, choices, strict=True):
        if question["wanted"][0] not in texts:
            raise ValueError(
                f"expected choices with the true answer; {question['wanted'][0]!r:.100} to "
                f"{question['asked']!r:.100} is not among {texts!r:.200}."
            )
    contexts = [q["prefix"] for q in asked]
    scores = judge(agent.model, agent.serializer, contexts, choices)
    right = [c.index(q["wanted"][0]) for q, c in zip(asked, choices, strict=True)]
    return chosen_figures(scores, right, [q["record"] for q in asked])


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
