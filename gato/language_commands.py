"""Commands that talk: chat, captions, labels; see `gato.cli`."""

from __future__ import annotations

import argparse
import io
import sys
from pathlib import Path
from typing import Any

from gato.printing import print_json
from gato.telling import shown

Arguments = argparse.Namespace


def chat(chosen: Arguments) -> None:
    """Talk with a checkpoint, or answer one prompt."""
    if isinstance(sys.stdin, io.TextIOWrapper):  # what is no text is told, and ends nothing
        sys.stdin.reconfigure(errors="surrogateescape")
    if chosen.json and chosen.prompt is None:
        raise ValueError("expected --prompt beside --json; a conversation has no figures.")
    prompt = chosen.prompt
    if prompt == "-":
        prompt = sys.stdin.read().removesuffix("\n")  # `echo` ends its line, a person means none
    images = [_image(path) for path in chosen.image]
    from gato import load
    from gato.rollouts.engine import Sampling
    from gato.terminal import Talk, message, said_by

    stop = tuple(chosen.stop)
    sampling = Sampling(chosen.max_tokens, chosen.temperature, chosen.top_p, chosen.seed, stop)
    agent = load(chosen.checkpoint)
    if prompt is None:
        Talk(agent, sampling, system=chosen.system, images=images).run()
        return
    before = [] if chosen.system is None else [{"role": "system", "content": chosen.system}]

    def show(text: str) -> None:
        if not chosen.json:
            print(shown(text, sys.stdout), end="", flush=True)

    answer = said_by(agent, [*before, message(prompt, images)], sampling, show)
    if chosen.json:
        print_json({"prompt": prompt, **answer.to_json()})
    else:
        print()
    if answer.finish == "interrupted":
        raise KeyboardInterrupt


def caption(chosen: Arguments) -> None:
    """Describe images, or answer a question about each."""
    examples = [_example(text) for text in chosen.example]
    images = [_image(path) for path in chosen.images]
    from gato import load

    agent = load(chosen.checkpoint)
    said = agent.captions(images, chosen.max_tokens, examples, chosen.question)
    paths = map(str, chosen.images)
    rows = [{"image": p, "caption": text} for p, text in zip(paths, said, strict=True)]
    if chosen.json:
        print_json(rows)
        return
    for row in rows:
        print(shown(f"{row['image']}: {row['caption']}", sys.stdout))


def classify(chosen: Arguments) -> None:
    """Choose among labels for images."""
    labels = [label.strip() for label in chosen.labels.split(",") if label.strip()]
    if len(labels) < 2:
        raise ValueError(f"expected at least two --labels, separated by commas; got {labels}.")
    images = [_image(path) for path in chosen.images]
    from gato import load
    from gato.rollouts.zero_shot import SLOT, probabilities, way

    agent = load(chosen.checkpoint)
    how = way(agent, chosen.how)
    shares = probabilities(agent, images, labels, how, chosen.template or (SLOT,))
    rows: list[dict[str, Any]] = [
        {
            "image": str(path),
            "probabilities": dict(zip(labels, row.tolist(), strict=True)),
            "how": how,
        }
        for path, row in zip(chosen.images, shares, strict=True)
    ]
    if chosen.json:
        print_json(rows[0] if len(rows) == 1 else rows)
        return
    for row in rows:
        if len(rows) > 1:
            print(shown(row["image"], sys.stdout))
        for label, probability in sorted(row["probabilities"].items(), key=lambda pair: -pair[1]):
            print(f"{probability:.3f}  {label}")


def _example(text: str) -> tuple[Any, str]:
    file, equals, told = text.partition("=")
    if not (file and equals):
        raise ValueError(f"expected --example FILE=TEXT; got {text!r}.")
    return _image(Path(file)), told


def _image(path: Path) -> Any:
    from gato.terminal import read_image

    return read_image(path)
