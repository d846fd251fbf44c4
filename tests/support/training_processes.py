"""What child processes of tests do: train as one of several ranks, or train and be killed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
import multiprocessing
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gato.config import TrainConfig
from gato.distributed import joined
from gato.run_log import Record
from gato.train import Trainer, train

CONTEXT = multiprocessing.get_context("forkserver")  # its children need not import torch anew
CONTEXT.set_forkserver_preload(["gato.train"])
OPERATIONS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree"}


# ---- one of several ranks ----------------------------------------------------------------------


def start_ranks(size: int, config: TrainConfig, run: Path, **options: Any) -> list[BaseProcess]:
    """Start the processes of a run and return them."""
    return _start(size, _rank, config, run, options)


def _start(size: int, target: Callable[..., None], *arguments: Any) -> list[BaseProcess]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = [
        CONTEXT.Process(target=_ranked, args=(rank, size, port, target, arguments))
        for rank in range(size)
    ]
    for child in children:
        child.start()
    return children


def _ranked(
    rank: int, size: int, port: int, target: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    target(rank, *arguments)


def ranks(size: int, target: Callable[..., None], *arguments: Any) -> list[int | None]:
    """Call ``target(rank, *arguments)`` in `size` processes and return their exit codes."""
    return exit_codes(_start(size, target, *arguments))


def hear(rank: int, folder: Path) -> None:
    """Write down what all processes tell: as many letters as their rank."""
    with joined(torch.device("cpu")) as world:
        (folder / f"{rank}.json").write_text(json.dumps(world.from_all("é" * rank)))


def exit_codes(children: list[BaseProcess], seconds: float = 60) -> list[int | None]:
    """Wait for processes and return their exit codes; None for one that had to be ended."""
    deadline, codes = time.monotonic() + seconds, []
    for child in children:
        child.join(max(0.1, deadline - time.monotonic()))
        codes.append(child.exitcode)
        if child.exitcode is None:
            child.kill()
            child.join()
    return codes


def train_ranks(size: int, config: TrainConfig, run: Path, **options: Any) -> list[int | None]:
    """Train in `size` processes and return their exit codes."""
    return exit_codes(start_ranks(size, config, run, **options))


def _rank(rank: int, config: TrainConfig, run: Path, options: dict[str, Any]) -> None:
    with _errors_to(run.parent / f"{run.name}-{rank}.txt"):
        with record_batches(run.parent / f"{run.name}-{rank}.drawn"):
            _spoil(options.pop("spoilt", None), rank)
            train(config, run, device="cpu", **options)


def score(checkpoint: Path) -> dict[str, float]:
    """Return a made-up score of a checkpoint, and note that it was asked for."""
    with (checkpoint.parent / "played").open("a") as file:
        file.write(f"{checkpoint.name}\n")
    return {"toy/arm-v0": float(checkpoint.name.removeprefix("step-"))}


@contextlib.contextmanager
def _errors_to(path: Path) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        path.write_text(f"{type(error).__name__}: {error}")
        raise


@contextlib.contextmanager
def record_batches(path: Path) -> Iterator[None]:
    """Write a line with the step and the digest of every part that is trained on."""
    real = Trainer.train_step

    def recorded(trainer: Trainer, *parts: Any) -> None:
        with path.open("a") as file:
            for part in parts:
                digest = hashlib.sha256(part.inputs.tobytes() + part.target_ids.tobytes())
                file.write(f"{trainer.step} {digest.hexdigest()}\n")
        real(trainer, *parts)

    Trainer.train_step = recorded  # type: ignore[method-assign]
    try:
        yield
    finally:
        Trainer.train_step = real  # type: ignore[method-assign]


def _spoil(where: tuple[int, int] | None, rank: int) -> None:
    """Let the batch of (rank, step) hold a value that is no number."""
    if where is None or where[0] != rank:
        return
    real = Trainer.train_step

    def spoilt(trainer: Trainer, *parts: Any) -> None:
        if trainer.step == where[1]:
            parts[0].payload["vector"]["values"][0, 0] = np.nan
        real(trainer, *parts)

    Trainer.train_step = spoilt  # type: ignore[method-assign]


# ---- one that is killed ------------------------------------------------------------------------


class Whereabouts:
    """What a process is doing, in a file that outlives it."""

    def __init__(self, path: Path) -> None:
        if not path.exists():
            path.write_bytes(bytes(256))
        with path.open("r+b") as file:
            self.memory = mmap.mmap(file.fileno(), 256)

    def set(self, text: str) -> None:
        self.memory[:128] = text.encode()[:128].ljust(128, b"\0")

    def get(self) -> str:
        return self.memory[:128].rstrip(b"\0").decode()

    def mark(self) -> None:
        """Remember what it is doing now, when the signal is sent."""
        self.memory[128:] = self.memory[:128]

    def marked(self) -> str:
        return self.memory[128:].rstrip(b"\0").decode()


def doomed(
    config: TrainConfig, run: Path, path: Path, number: int, operation: int, options: dict[str, Any]
) -> None:
    """Train, and be sent signal `number` at an operation on the run's files, counted from 1.

    Args:
        config: the run.
        run: its folder.
        path: where it says what it is doing.
        number: a signal.
        operation: which; 0 for none.
        options: of `train`.
    """
    at, phase, count = Whereabouts(path), "set-up", 0

    def hook(event: str, arguments: Any) -> None:
        nonlocal count
        if event not in OPERATIONS or not str(arguments[0]).startswith(str(run)):
            return
        count += 1
        names = [Path(str(a)).name for a in arguments[:2] if isinstance(a, str | Path)]
        at.set(f"{phase}: {event} {re.sub('[0-9]+', 'N', ' '.join(n for n in names if n != 'r'))}")
        if count == operation:
            at.mark()
            os.kill(os.getpid(), number)

    def named(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            nonlocal phase
            before, phase = phase, name
            at.set(name)
            try:
                return function(*args, **kwargs)
            finally:
                phase = before
                at.set(f"after {name}")

        return wrapped

    Trainer.train_step = named("step", Trainer.train_step)  # type: ignore[method-assign]
    Trainer._save = named("save", Trainer._save)  # type: ignore[method-assign]
    Record.write = named("log", Record.write)  # type: ignore[method-assign]
    Record.begin = named("begin", Record.begin)  # type: ignore[method-assign]
    Record.end = named("end", Record.end)  # type: ignore[method-assign]
    Trainer.resumed = named("load", Trainer.resumed)  # type: ignore[method-assign]
    sys.addaudithook(hook)
    at.set("set-up")
    with open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 2)
    train(config, run, device="cpu", **options)
    at.set("done")
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
