"""Options that several commands share, and a parser whose errors leave by one door."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

FORMATS = (
    *("lerobot", "minari", "jat", "webdataset"),
    *("coco", "vqa", "chat", "hub", "text"),
)
"""Names of `gato.envs.readers.formats.READERS`, whose modules are not loaded to print a help."""

ATTENTION = (
    *("auto", "fa3", "fa4", "varlen", "cudnn", "flash_attn"),
    *("products", "documents", "sdpa"),
)
"""Names of `gato.kernels.NAMES`, alike."""


class UsageError(ValueError):
    """The command line itself is wrong."""


class Parser(argparse.ArgumentParser):
    """A parser whose errors are exceptions, so that all errors leave by one door."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Raise `UsageError`, naming the help that would have told."""
        raise UsageError(f"{message} (see {self.prog} --help)")


def add_seed(parser: Parser) -> None:
    """Take ``--seed``."""
    about = "of everything drawn at random"
    parser.add_argument("--seed", type=whole(0), default=0, help=about)


def whole(least: int) -> Callable[[str], int]:
    """Return what reads a whole number, `least` or more."""

    def read(text: str) -> int:
        if not text.removeprefix("-").isdecimal() or int(text) < least:
            wanted = f"expected a whole number, {least} or more; got {text}"
            raise argparse.ArgumentTypeError(wanted)
        return int(text)

    return read


def share(text: str) -> float:
    """Return a share that leaves something: 0 or more and below 1."""
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0.0 <= share < 1.0:
        raise argparse.ArgumentTypeError(f"expected a share, 0 or more and below 1; got {text}")
    return share


def positive(text: str) -> float:
    """Return a finite number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0.0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"expected a finite number above 0; got {text}")
    return number


def add_workers(parser: Parser) -> None:
    """Take ``--workers`` and ``--timeout``, of processes of simulators."""
    cores = os.cpu_count() or 1
    about = "processes of simulators; with 0, this one, which then ends where a simulator ends it"
    parser.add_argument("--workers", type=whole(0), default=cores, metavar="N", help=about)
    about = "that one step may take before its process is ended (600)"
    parser.add_argument("--timeout", type=float, default=600.0, metavar="SECONDS", help=about)


def add_json(parser: Parser) -> None:
    """Take ``--json``."""
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def add_attention(parser: Parser) -> None:
    """Take ``--attention``, the kernel of attention in training."""
    about = f"kernel of attention while training: {', '.join(ATTENTION)} (auto)"
    parser.add_argument(
        "--attention", choices=ATTENTION, default="auto", metavar="KERNEL", help=about
    )


def add_import(parser: Parser) -> None:
    """Take ``--import``, which may be given several times."""
    about = "imported first: its environments become tasks, gym/<their ids>"
    parser.add_argument(
        "--import", dest="imports", action="append", default=[], metavar="MODULE", help=about
    )


def add_checkpoint(parser: Parser) -> None:
    """Take the folder of a checkpoint."""
    parser.add_argument("checkpoint", type=Path, help="folder of a checkpoint or of a run")


def add_sampling(parser: Parser) -> None:
    """Take how words are sampled."""
    about = "of one answer, for which as much room is kept, half of the memory at most (128)"
    parser.add_argument("--max-tokens", type=whole(1), default=128, metavar="N", help=about)
    about = "0 takes the likeliest (0)"
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help=about)
    about = "mass of the ids sampled from (1)"
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help=about)
    add_seed(parser)


def add_cache(p: Parser) -> None:
    """Take the bound of the cache."""
    about = "of the cache of what is fetched from addresses, from now on (20); what is imported "
    about += "lies beside it in ~/.cache/gato/imports without a bound, and may be deleted"
    p.add_argument("--cache-gb", type=float, metavar="GB", help=about)


def add_reading(p: Parser) -> None:
    """Add what a user may ask of a reader of other formats."""
    about = f"of data that do not tell theirs (auto): {', '.join(FORMATS)}"
    p.add_argument("--format", default="auto", metavar="F", help=about)
    p.add_argument("--task", metavar="ID", help="the task of all episodes")
    p.add_argument("--instruction", metavar="TEXT", help="of all episodes")
    p.add_argument("--split", metavar="NAME", help="of data that come in splits (train)")
    p.add_argument("--limit", type=whole(0), metavar="N", help="items to read; 0 reads all (0)")
    about = "of pictures, in multiples of 16"
    p.add_argument("--image-size", type=size, metavar="WxH", help=about)
    about = "our field=the data's, where names differ: text=body,image=photo"
    p.add_argument("--columns", type=renamed, metavar="A=B,...", help=about)
    about = "bring actions outside their bounds to these, instead of refusing them"
    p.add_argument("--clip-actions", action="store_true", help=about)
    add_cache(p)


def size(text: str) -> tuple[int, int]:
    """Read ``WIDTHxHEIGHT``, in whole patches."""
    numbers = text.lower().split("x")
    if len(numbers) == 2 and all(n.isdecimal() and int(n) and int(n) % 16 == 0 for n in numbers):
        return int(numbers[0]), int(numbers[1])
    raise argparse.ArgumentTypeError(f"expected WIDTHxHEIGHT in multiples of 16; got {text}")


def renamed(text: str) -> dict[str, str]:
    """Read ``OURS=THEIRS,...``."""
    pairs = [pair.partition("=") for pair in text.split(",")]
    if not all(ours and equals for ours, equals, _ in pairs):
        raise argparse.ArgumentTypeError(f"expected OURS=THEIRS,...; got {text}")
    return {ours: theirs for ours, _, theirs in pairs}
