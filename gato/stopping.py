"""Signals that end a run: the first lets it save, a second Ctrl-C stops it at once."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from gato.distributed import is_first

_ECHO = 0.3  # seconds in which one Ctrl-C may arrive twice: from the terminal and from a wrapper


@dataclass
class Stop:
    """Whether a run was asked to end after the present step."""

    reason: str | None = None
    """The signal's name; None where nobody asked."""
    at_once: bool = False
    """Whether the first signal interrupts what is being done."""

    @contextlib.contextmanager
    def interrupting(self) -> Iterator[None]:
        """Let a signal, or one that came before, raise KeyboardInterrupt: nothing is lost by it."""
        self.at_once = True
        try:
            if self.reason is not None:
                raise KeyboardInterrupt
            yield
        finally:
            self.at_once = False


@contextlib.contextmanager
def stop_on_signals() -> Iterator[Stop]:
    """Yield what SIGTERM and SIGINT set, for as long as this lasts.

    Raises:
        KeyboardInterrupt: at a SIGINT after either, or where `Stop.interrupting` lasts.
    """
    stop, asked = Stop(), 0.0

    def request(number: int, frame: Any) -> None:
        nonlocal asked
        name = signal.Signals(number).name
        if stop.reason is None:
            stop.reason, asked = name, time.monotonic()
            if is_first():  # not through Python's buffers, which the signal may have interrupted
                with contextlib.suppress(OSError):  # its reader may have been asked to end too
                    told = f"\n{name}: saving and stopping; Ctrl-C stops at once\n"
                    os.write(2, told.encode())
            if stop.at_once:
                raise KeyboardInterrupt
        elif number == signal.SIGINT and time.monotonic() - asked > _ECHO:
            raise KeyboardInterrupt

    try:
        before = {s: signal.signal(s, request) for s in (signal.SIGTERM, signal.SIGINT)}
    except ValueError:  # not the main thread: the caller handles signals
        yield stop
        return
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
