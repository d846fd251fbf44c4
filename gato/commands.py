"""Commands about a model: make one, talk with it, measure its speed; see `gato.cli`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from gato.printing import print_json

Arguments = argparse.Namespace


def quickstart(chosen: Arguments) -> None:
    """Everything in one command."""
    import contextlib

    from gato.quickstart import run

    # with --json, stdout holds the result and nothing else
    with contextlib.redirect_stdout(sys.stderr if chosen.json else sys.stdout):
        result = run(chosen.out, chosen.minutes, chosen.seed)
    if chosen.json:
        print_json(result)


def chat(chosen: Arguments) -> None:
    """Talk with a checkpoint, or answer one prompt."""
    from gato.terminal import answer, converse

    image = None if chosen.image is None else _image(chosen.image)
    from gato import load

    agent = load(chosen.checkpoint)
    sampling = {
        "max_tokens": chosen.max_tokens,
        "temperature": chosen.temperature,
        "top_p": chosen.top_p,
        "seed": chosen.seed,
    }
    if chosen.prompt is None:
        converse(agent, image, sampling)
        return
    said = answer(agent, chosen.prompt, image, sampling, stream=not chosen.json)
    if chosen.json:
        print_json({"prompt": chosen.prompt, "answer": said})


def caption(chosen: Arguments) -> None:
    """Describe images."""
    images = [_image(path) for path in chosen.images]
    from gato import load

    agent = load(chosen.checkpoint)
    rows = [
        {"image": str(path), "caption": agent.caption(image)}
        for path, image in zip(chosen.images, images, strict=True)
    ]
    if chosen.json:
        print_json(rows)
    else:
        for row in rows:
            print(f"{row['image']}: {row['caption']}")


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
    rows = [
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
            print(row["image"])
        for label, probability in sorted(row["probabilities"].items(), key=lambda pair: -pair[1]):
            print(f"{probability:.3f}  {label}")


def _image(path: Path) -> Any:
    from gato.terminal import read_image

    return read_image(path)
