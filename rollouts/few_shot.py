"""How much a model learns from examples that stand before a question, by their number.

Of a record of pairs the first 0, 1, 2, 4 and 8 are shown, and the text of the last is asked for: as
the likelier of the texts that the record holds, and written freely.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from gato.rollouts.choices import judge
from gato.rollouts.conversation import few_shot
from gato.rollouts.generate import generate
from gato.rollouts.metrics import SAMPLES, Figure, Options, Record, measured

if TYPE_CHECKING:
    from gato.rollouts.agent import Agent

SHOTS = (0, 1, 2, 4, 8)


def is_pairs(record: Record) -> bool:
    """Return whether a record is pictures with their texts, to be read together."""
    return bool(record["kind"] == "pairs")


def shots(agent: Agent, records: Sequence[Record], options: Options) -> dict[str, Any]:
    """Measure how often the last text of a record is found, by the number of examples shown.

    Raises:
        ValueError: for a record whose texts are all the same, or that does not fit the model.
    """
    serializer, memory = agent.serializer, agent.model.config.memory
    choices = [_choices(record, number) for number, record in enumerate(records)]
    wanted = [record["pairs"][-1]["text"] for record in records]
    fewest = min(len(record["pairs"]) for record in records) - 1
    longest = max(len(serializer.text(text)) for texts in choices for text in texts)
    figures, samples = {}, []
    for count in (n for n in SHOTS if n <= fewest):
        prefixes = []
        for record in records:
            *examples, query = record["pairs"]
            given = [(e["image"], e["text"]) for e in examples[:count]]
            prefixes.append(few_shot(serializer, given, query["image"]))
        most = max(map(len, prefixes)) + longest + 1
        if most > memory:
            raise ValueError(
                f"the model remembers {memory} tokens; {count} examples and a question take {most}"
            )
        scores = judge(agent.model, serializer, prefixes, choices)
        chosen = [c[s.mean.argmax()] for c, s in zip(choices, scores, strict=True)]
        said = generate(
            agent.model, serializer, prefixes, max_tokens=max(options.max_tokens, longest + 1)
        )
        for how, texts in (("chosen", chosen), ("written", said)):
            right = [float(t == w) for t, w in zip(texts, wanted, strict=True)]
            figures[f"{how}_{count}_shots"] = Figure(right)
        asked = zip(records, choices, said, wanted, strict=True)
        samples += [
            {
                "kind": f"{count} shots",
                "asked": " or ".join(texts),
                "said": text,
                "wanted": [want],
                "right": text == want,
                "image": record["pairs"][-1]["image"],
            }
            for record, texts, text, want in list(asked)[: SAMPLES // len(SHOTS)]
        ]
    return measured(figures, samples, options)


def _choices(record: Record, number: int) -> list[str]:
    texts = sorted({pair["text"] for pair in record["pairs"]})
    if len(texts) < 2:
        raise ValueError(
            f"expected records of pairs with two texts or more to choose among; record {number} "
            f"holds {texts}"
        )
    return texts
