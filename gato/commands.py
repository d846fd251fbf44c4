"""The command that makes everything; see `gato.cli`."""

from __future__ import annotations

import argparse
import sys

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
