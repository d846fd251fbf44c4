"""`gato search`: the pictures of a folder by words or by another picture."""

from __future__ import annotations

import argparse
import sys

from gato.printing import print_json, progress_bar
from gato.telling import shown, tell


def search(chosen: argparse.Namespace) -> None:
    """Print the pictures of a folder that fit best."""
    if (chosen.text is None) == (chosen.image is None):
        raise ValueError("expected TEXT to search by, or --image FILE; give one of the two.")
    from gato import load
    from gato.rollouts.search import index_folder
    from gato.rollouts.search import search as find
    from gato.terminal import read_image

    image = None if chosen.image is None else read_image(chosen.image)
    agent = load(chosen.checkpoint)
    with progress_bar() as bar:
        line = bar.add_task("pictures", total=None)
        index = index_folder(
            agent,
            chosen.folder,
            skip_bad=chosen.skip_bad,
            progress=lambda done, total: bar.update(line, completed=done, total=total),
        )
    for path, why in index.skipped:
        tell(f"left out: {index.folder / path}: {why}")
    found = find(agent, index, chosen.text, image, chosen.top)
    if chosen.json:
        print_json(
            {
                "query": chosen.text if chosen.image is None else str(chosen.image),
                "pictures": len(index.paths),
                "skipped": [
                    {"path": str(index.folder / path), "reason": why} for path, why in index.skipped
                ],
                "results": [{"path": str(f.path), "score": f.score} for f in found],
            }
        )
        return
    for one in found:
        print(shown(f"{one.score:.3f}  {one.path}", sys.stdout))
