"""Pictures told apart by labels that nobody trained as classes, and found by words.

Two ways to classify. By ``likelihood`` a label wins that follows the picture most readily as its
caption; it needs nothing, does well among captions of the one form that was trained, and badly
where colour and shape were never met together. By ``contrast`` a label wins whose embedding lies
nearest to the picture's; it needs the contrastive head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gato.rollouts.choices import judge
from gato.rollouts.conversation import checked
from gato.rollouts.metrics import SAMPLES, Figure, Options, Record, measured, truths
from gato.rollouts.retrieval import Reader, embed_images, embed_texts, has_head, scale_of

HOW = ("contrast", "likelihood")
SLOT = "{}"
"""Where a label stands in a template."""
AMONG = 30
"""Labels that those of unseen pairs are told apart from, their own included; more where those
alone are more."""
OF = 50
"""Candidates of a retrieval."""


def way(agent: Reader, how: str | None = None) -> str:
    """Return how labels are chosen among: as asked, or as the checkpoint was trained for.

    Raises:
        ValueError: for another word, or a way that the checkpoint does not have.
    """
    if how is None:
        return "contrast" if has_head(agent) else "likelihood"
    if how not in HOW:
        raise ValueError(f"expected how to be {' or '.join(HOW)}; got {how!r}")
    if how == "contrast" and not has_head(agent):
        raise ValueError(
            f"{agent.name} was trained without a contrastive head; choose by likelihood "
            f"(how='likelihood', --how likelihood), or train with contrast above 0 in a corpus of "
            f"captions."
        )
    return how


def probabilities(
    agent: Reader,
    images: Sequence[np.ndarray],
    labels: Sequence[str],
    how: str | None = None,
    templates: Sequence[str] = (SLOT,),
) -> np.ndarray:
    """Return (n, labels), the probability of each label for each picture.

    Args:
        agent: a loaded checkpoint.
        images: uint8 (H, W), (H, W, 1) or (H, W, 3).
        labels: two or more different ones.
        how: one of `HOW`; by default as the checkpoint was trained for.
        templates: what labels are written in, ``a picture of {}``; over several, embeddings and
            log-likelihoods are averaged.
    """
    chosen = way(agent, how)
    if isinstance(labels, str) or len(labels) < 2 or len(set(labels)) < len(labels):
        raise ValueError(f"expected two or more different labels; got {labels!r:.200}")
    if not all(labels):
        raise ValueError("expected labels with words in them; got an empty one")
    if isinstance(templates, str) or not templates or not all(SLOT in t for t in templates):
        raise ValueError(f"expected templates with {SLOT} where the label stands; got {templates}")
    written = [[t.replace(SLOT, label) for label in labels] for t in templates]
    if chosen == "contrast":
        words = [embed_texts(agent, texts) for texts in written]
        mean = np.mean(words, 0)
        mean /= np.maximum(np.linalg.norm(mean, axis=1, keepdims=True), 1e-12)
        scores = scale_of(agent) * embed_images(agent, images) @ mean.T
    else:
        contexts = [agent.serializer.caption(checked(i), None) for i in images]
        found = [
            judge(agent.model, agent.serializer, contexts, [texts] * len(contexts))
            for texts in written
        ]
        scores = np.mean([[s.mean for s in scored] for scored in found], 0)
    weights = np.exp(scores - scores.max(1, keepdims=True))
    return np.asarray(weights / weights.sum(1, keepdims=True))


def classify(
    agent: Reader,
    image: np.ndarray,
    labels: Sequence[str],
    how: str | None = None,
    templates: Sequence[str] = (SLOT,),
) -> dict[str, float]:
    """Return the probability of each label of a picture; see `probabilities`."""
    (row,) = probabilities(agent, [image], labels, how, templates)
    return dict(zip(labels, row.tolist(), strict=True))


def accuracy(
    agent: Reader, records: Sequence[Record], labels: Sequence[str], how: str | None = None
) -> float:
    """Return how often the label that is chosen is true of a caption record."""
    found = probabilities(agent, [r["image"] for r in records], labels, how).argmax(1)
    right = [labels[k] in truths(r) for k, r in zip(found, records, strict=True)]
    return float(np.mean(right))


# ---- measures --------------------------------------------------------------------------------


def classes(agent: Reader, records: Sequence[Record], options: Options) -> dict[str, Any]:
    """Measure how often the label that is chosen of all is a picture's own, or one of them.

    The labels are ``options.choices`` or, without these, all captions of the records. ``accuracy``
    is that of the way by default, beside that of each way by its name. Where records say
    (``meta["unseen"]``) that what they show was never shown together in training, ``unseen`` is the
    accuracy on these alone, among `AMONG` labels: all of theirs, and others drawn by the seed.
    """
    own = [truths(record) for record in records]
    labels = list(options.choices) or sorted({text for texts in own for text in texts})
    strange = next((texts[0] for texts in own if not set(texts) & set(labels)), None)
    if strange is not None:
        raise ValueError(f"expected --choices with every record's label; {strange!r} is missing.")
    ways = [how for how in HOW if how == "likelihood" or has_head(agent)]
    unseen = [i for i, r in enumerate(records) if (r.get("meta") or {}).get("unseen")]
    theirs = [text for i in unseen for text in own[i] if text in labels]
    fewer = among(labels, theirs, options.seed)
    figures: dict[str, Figure] = {}
    said: list[int] = []
    for how in sorted(ways, key=lambda how: how != way(agent)):  # by default first
        found = probabilities(agent, [r["image"] for r in records], labels, how)
        chosen = found.argmax(1).tolist()
        right = [labels[k] in texts for k, texts in zip(chosen, own, strict=True)]
        said = said or chosen
        figures.setdefault("accuracy", Figure(np.array(right)))
        figures[f"accuracy_{how}"] = Figure(np.array(right))
        if unseen:
            few = found[unseen][:, [labels.index(label) for label in fewer]].argmax(1).tolist()
            hit = [fewer[k] in own[i] for i, k in zip(unseen, few, strict=True)]
            figures.setdefault("unseen", Figure(np.array(hit), records=unseen))
            figures[f"unseen_{how}"] = Figure(np.array(hit), records=unseen)
    samples = [
        {
            "kind": "label",
            "asked": "",
            "said": labels[k],
            "wanted": texts,
            "right": labels[k] in texts,
            "image": record["image"],
        }
        for record, texts, k in zip(records, own, said, strict=True)
    ]
    shown = sorted(samples, key=lambda s: bool(s["right"]))[:SAMPLES]
    more = {"unseen_among": len(fewer)} if unseen else {}
    return measured(figures, shown, options, labels=labels, how=way(agent), **more)


def among(labels: Sequence[str], unseen: Sequence[str], seed: int = 0) -> list[str]:
    """Return the unseen labels and others drawn by the seed, `AMONG` together if not more."""
    own = sorted(set(unseen))
    others = [label for label in labels if label not in own]
    drawn = np.random.default_rng([seed, 1]).permutation(len(others))
    return sorted([*own, *(others[k] for k in drawn[: max(0, AMONG - len(own))])])


def retrieve(agent: Reader, records: Sequence[Record], options: Options) -> dict[str, Any]:
    """Measure how often a caption finds its own picture among `OF`, and a picture its caption.

    The candidates of a record are it and others that share no caption with it, no two of one
    picture or one caption, drawn by the seed anew for each; all where there are fewer. An equal
    score counts as worse. Of a picture with several captions any is right, and each is looked for.
    """
    own = [truths(record) for record in records]
    by_text: dict[str, list[int]] = {}
    for i, words in enumerate(own):
        for text in words:
            by_text.setdefault(text, []).append(i)
    texts = list(by_text)
    number = {text: k for k, text in enumerate(texts)}
    shown = embed_images(agent, [r["image"] for r in records])
    said = embed_texts(agent, texts)
    most = min(OF, len(texts), len(records))
    found_texts: list[int] = []  # of each record, the place of its best caption
    found_images = []  # and that of the picture for each of its captions
    for i, words in enumerate(own):
        alike = {number[t] for text in words for j in by_text[text] for t in own[j]}
        others = np.delete(np.arange(len(texts)), sorted(alike))
        rng = np.random.default_rng([options.seed, i])
        candidates, pictures = _candidates(rng, others, texts, by_text, most - 1)
        if not candidates:
            raise ValueError(f"expected pictures with different captions; got only {words}")
        mine = said[[number[text] for text in words]]  # (c, E)
        near = mine @ shown[i]  # (c,)
        found_texts.append(1 + int((shown[i] @ said[candidates].T >= near.max()).sum()))
        found_images.append(1 + (mine @ shown[pictures].T >= near[:, None]).sum(1))
    figures = {
        f"{what}_recall_at_{k}": Figure(np.array([np.mean(np.asarray(r) <= k) for r in places]))
        for k in (1, 5)
        for what, places in (("text", found_texts), ("image", found_images))
    }
    samples = [
        {
            "kind": "retrieval",
            "asked": f"place of its caption among {most}",
            "said": str(rank),
            "wanted": words,
            "right": rank == 1,
            "image": record["image"],
        }
        for record, words, rank in zip(records, own, found_texts, strict=True)
    ]
    shown_first = sorted(samples, key=lambda s: bool(s["right"]))[:SAMPLES]
    return measured(figures, shown_first, options, among=most)


def _candidates(
    rng: np.random.Generator,
    others: np.ndarray,
    texts: Sequence[str],
    by_text: Mapping[str, Sequence[int]],
    most: int,
) -> tuple[list[int], list[int]]:
    """Return different texts and a picture of each, no two the same, of at most `most` records."""
    drawn: dict[int, int] = {}  # picture -> text
    for k in rng.permutation(others).tolist():
        if len(drawn) == most:
            break
        having = by_text[texts[k]]
        drawn.setdefault(having[rng.integers(len(having))], k)
    return list(drawn.values()), list(drawn)
