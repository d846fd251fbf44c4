"""What `gato export` does."""

from __future__ import annotations

import argparse

from gato.printing import print_json


def export(chosen: argparse.Namespace) -> None:
    """Write the text part of a checkpoint as a Hugging Face folder."""
    from gato import hf_export
    from gato.checkpoint import load_checkpoint
    from gato.envs.files import require_place

    require_place(chosen.out.parent, "a folder for the export")
    notes = hf_export.export(load_checkpoint(chosen.checkpoint), chosen.out)
    if chosen.json:
        print_json({"folder": str(chosen.out), "notes": notes})
    else:
        print("\n".join(notes))
