"""What a page shows of language tasks: figures with their intervals, and examples with pictures."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from gato.rollouts.pages import pairs, table, text

Result = Mapping[str, Any]
LONGEST = 160
"""Pixels of the longer side of an example's picture; larger ones are scaled down."""
NAMES = {"cider": "CIDEr-D", "bleu": "BLEU", "chrf": "chrF", "vqa_accuracy": "VQA accuracy"}
ABOUT = {
    "exact": "word for word one of the true texts",
    "exact_normalised": "alike but for case, punctuation, articles and how numbers are written",
    "vqa_accuracy": "as VQA counts: right where three of ten people said it",
    "cider": "0 to 10: runs of words shared with the true captions, rare ones more",
    "bleu": "0 to 100: runs of words",
    "chrf": "0 to 100: runs of characters",
    "whole_conversations": "conversations right in every answer",
    "accuracy": "the true choice is chosen: as the likeliest per token or, of labels, by contrast "
    "where the model was trained for it",
    "accuracy_unnormalised": "the true choice is the likeliest as a whole",
    "accuracy_contrast": "the true label is nearest to the picture",
    "accuracy_likelihood": "the true label is the likeliest caption per token",
    "unseen": "accuracy on what was never shown together in training",
    "loss": "nats per token",
    "perplexity": "the exponential of the loss",
    "bits_per_byte": "of the text, whatever its tokens",
}


def language_section(rows: Mapping[str, Result], gallery: Mapping[str, Sequence[Any]]) -> str:
    """Return what a page shows of language tasks; nothing where there are none.

    Args:
        rows: results by task.
        gallery: per task, the pictures of its examples.
    """
    if not rows:
        return ""
    used = [name for name in ABOUT if any(name in row["metrics"] for row in rows.values())]
    listed = "".join(f"<dt>{text(_name(n))}</dt><dd>{text(ABOUT[n])}</dd>" for n in used)
    parts = [
        "<h2>Language</h2>",
        "<p>Intervals cover 95%, by bootstrap over records, or are Wilson's where each is right "
        "or wrong; nothing of this is part of the scores against the expert.</p>",
        f"<details><summary>What the figures are</summary><dl>{listed}</dl></details>",
    ]
    for name, row in rows.items():
        parts += [f"<h3>{text(name)}</h3>", _figures(row), _kinds(row)]
        parts += [f'<p class="bad">{text(note)}.</p>' for note in row.get("notes", ())]
        parts.append(_examples(name, row["samples"], gallery.get(name, ())))
    return "\n".join(part for part in parts if part)


def figures_of(rows: Mapping[str, Result]) -> Iterator[tuple[str, str, Result]]:
    """Yield (task, metric, figure) of all results."""
    for task, row in rows.items():
        for name, metric in row["metrics"].items():
            yield task, name, metric


def shown(value: float | None, of: str) -> str:
    """Return a figure as text: shares in percent.

    >>> shown(0.975, "share"), shown(9.0625, "ratio"), shown(99.0, "bleu"), shown(None, "share")
    ('97.5%', '9.06', '99.0', '-')
    """
    if value is None:
        return "-"
    if of == "share":
        return f"{100 * value:.1f}%"
    return f"{value:.3g}" if abs(value) < 10 else f"{value:.1f}"


def ends(metric: Result) -> str:
    """Return a figure's interval as text."""
    if metric["ci95"] is None:
        return "-"
    return " to ".join(shown(end, metric["of"]) for end in metric["ci95"])


def _name(metric: str) -> str:
    return NAMES.get(metric, metric.replace("_", " "))


def _figures(row: Result) -> str:
    lines = [
        (text(_name(name)), text(shown(metric["value"], metric["of"])), text(ends(metric)))
        for name, metric in row["metrics"].items()
    ]
    told = f"{row['count']} records"
    told += f", {row['asked']} answers." if "asked" in row else "."
    for name, value in (row.get("best") or {}).items():
        if value is not None:
            told += f" The true texts themselves have {_name(name)} {value:.3g}."
    figures = table(("", "value", "95%"), lines)
    return f'<p>{text(told)}</p>\n<div class="short">{figures}</div>'


def _kinds(row: Result) -> str:
    kinds = row.get("kinds") or {}
    if len(kinds) < 2:
        return ""
    told = {kind: f"{shown(k['exact'], 'share')} of {k['count']}" for kind, k in kinds.items()}
    about = "Answered exactly, by kind of question"
    return f"<details><summary>{about}</summary>{pairs(told)}</details>"


def _examples(task: str, samples: Sequence[Result], pictures: Sequence[np.ndarray | None]) -> str:
    cards = []
    for i, sample in enumerate(samples):
        picture = pictures[i] if i < len(pictures) else None
        image = "" if picture is None else _image(picture, f"{task}, example {i + 1}")
        lines = [("asked", sample["asked"])] if sample["asked"] else []
        lines.append(("said", sample["said"]))
        wanted = " / ".join(dict.fromkeys(sample["wanted"]))
        if wanted and sample["right"] is not True:
            lines.append(("right", wanted))
        told = "".join(f"<dt>{name}</dt><dd>{text(words)}</dd>" for name, words in lines)
        mark = {True: "right", False: "wrong"}.get(sample["right"], "")
        told = f"<figcaption><dl>{told}</dl></figcaption>"
        cards.append(f'<figure class="{mark}">{image}{told}</figure>')
    return f'<div class="told">{"".join(cards)}</div>' if cards else ""


def _image(picture: np.ndarray, about: str) -> str:
    """Return a picture as an element that holds its own data."""
    from PIL import Image

    drawn = Image.fromarray(np.ascontiguousarray(picture))
    drawn.thumbnail((LONGEST, LONGEST))
    written = io.BytesIO()
    drawn.save(written, "PNG", optimize=True)
    data = base64.b64encode(written.getvalue()).decode()
    return f'<img alt="{text(about)}" src="data:image/png;base64,{data}"/>'


def compared_section(found: Mapping[str, Any], names: Sequence[str]) -> str:
    """Return what a page shows of language tasks side by side, as `compare` compares them."""
    if not found:
        return ""
    first, others = names[0], names[1:]
    parts = [
        "<h2>Language</h2>",
        "<p>The same records are drawn for both wherever they are the same. A difference in bold "
        "is one that chance explains in fewer than 5 of 100 cases.</p>",
    ]
    headings = ("", *names, *(f"{name} - {first}" for name in others))
    for task, row in found.items():
        lines = []
        for metric, scores in row["scores"].items():
            values = [text(shown(scores[n]["value"], scores[n]["of"])) for n in names]
            differing = row["differences"][metric]
            lines.append(
                (text(_name(metric)), *values, *(difference(differing[n]) for n in others))
            )
        strange = ", ".join(name for name, same in row["pairs"].items() if not same)
        told = f"<p>Not the same records as {text(first)}: {text(strange)}.</p>"
        unpaired = told if strange else ""
        parts += [f"<h3>{text(task)}</h3>{unpaired}", table(headings, lines)]
    return "\n".join(parts)


def difference(found: Mapping[str, Any], bold: bool = True) -> str:
    """Return a difference with its interval; of shares in points of percent."""
    if found["difference"] is None:
        return "-"
    scale = 100.0 if found["of"] == "share" else 1.0
    told = f"{scale * found['difference']:+.3g}"
    if found["ci95"]:
        told += " ({:+.3g} to {:+.3g})".format(*(scale * end for end in found["ci95"]))
    if not bold:
        return told + "*" * bool(found["significant"])
    return f"<b>{told}</b>" if found["significant"] else told
