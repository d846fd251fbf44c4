"""What `gato serve` does."""

from __future__ import annotations

import argparse
import logging
import os
import stat
import sys
from pathlib import Path

Arguments = argparse.Namespace
SPARE = 64
"""Requests under way beside those that write or wait for a row: that act, ask for figures, ..."""


def serve(chosen: Arguments) -> None:
    """Serve a checkpoint until the process is asked to end."""
    from gato.rollouts.serve_limits import Settings, is_loopback

    body = chosen.body_mb << 20
    settings = Settings(
        host=chosen.host,
        port=chosen.port,
        token=_token(chosen),
        name=chosen.name or model_name(chosen.checkpoint),
        rows=chosen.rows,
        waiting=chosen.waiting,
        sessions=chosen.sessions,
        max_tokens=chosen.max_tokens,
        requests=max(Settings.requests, chosen.rows + chosen.waiting + SPARE),
        body_bytes=body,
        held_bytes=max(Settings.held_bytes, 2 * body),
        image_bytes=min(max(Settings.image_bytes, body // 2), body),
        seconds=chosen.timeout,
        origins=tuple(chosen.allow_origin),
        hosts=tuple(chosen.allow_host),
    )
    from gato import load
    from gato.rollouts.serve import run

    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(name)s: %(message)s")
    agent = load(chosen.checkpoint)

    def ready(address: str) -> None:
        print(f"serving {settings.name} at {address} (Ctrl-C ends)", file=sys.stderr, flush=True)
        if not is_loopback(settings.host):
            told = "plain HTTP shows the token and all else to the network; put TLS in front of it"
            print(f"gato: {told}", file=sys.stderr, flush=True)

    run(agent, settings, ready)


def model_name(folder: Path) -> str:
    """Return a checkpoint's name: its folder's, or its run's where that says nothing.

    >>> [model_name(Path(p)) for p in ("runs/arm", "runs/quickstart/model", "runs/arm/step-10")]
    ['arm', 'quickstart', 'arm']
    """
    path = folder.absolute()
    while path.name in ("model", "latest", "best") or path.name.startswith("step-"):
        path = path.parent
    return path.name or "gato"


def _token(chosen: Arguments) -> str | None:
    if chosen.token_file is None:
        return str(chosen.token) if chosen.token is not None else None
    file: Path = chosen.token_file
    if os.name == "posix" and stat.S_IMODE(file.stat().st_mode) & 0o077:
        print(f"gato: {file} can be read by others; chmod 600 it", file=sys.stderr)
    return file.read_text("utf-8").strip()
