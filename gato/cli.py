"""The command line. Each command is a few lines here; what it does lies in the module it calls.

Exit codes: 0 done, 2 usage or bad input, 1 failure. Errors go to stderr as one sentence; with
``--debug`` the traceback stands before it. Heavy modules are imported inside the commands, so that
``--help`` and ``gato tasks`` answer at once.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from gato.arguments import COMMANDS
from gato.options import Parser, UsageError
from gato.telling import reader_gone, settle_streams, tell, to_nowhere

# Before torch starts its threads: those that wait for work sleep, they do not take a core.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

ABOUT = "One model, one stream of tokens: games, robots, grid worlds, images and conversation."
DONE, FAILURE, BAD_INPUT = 0, 1, 2

Command = Callable[[argparse.Namespace], Any]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    settle_streams()
    try:
        return _run(given)
    except BrokenPipeError as error:
        seen_enough = reader_gone(sys.stdout) and _command(given) != "train"  # gato show ... | head
        if seen_enough:
            to_nowhere(sys.stdout)
        return DONE if seen_enough else _report(_of_system(error), FAILURE, debug)
    except KeyboardInterrupt as error:
        return _report(str(error) or "interrupted", FAILURE, debug)
    except (
        FileExistsError,
        FileNotFoundError,
        IsADirectoryError,
        NotADirectoryError,
    ) as error:
        return _report(_of_system(error), BAD_INPUT, debug)
    except OSError as error:
        return _report(_of_system(error), FAILURE, debug)
    except (ValueError, TypeError) as error:
        return _report(str(error), BAD_INPUT, debug)
    except RuntimeError as error:
        return _report(str(error), FAILURE, debug)
    except Exception as error:  # a fault of ours: still one sentence
        return _report(f"{type(error).__name__}: {error} (run with --debug)", FAILURE, debug)


def _run(line: list[str]) -> int:
    commands = _parser()
    given = [a for a in line if a != "--debug"]
    named = _command(given)
    if named is not None and named not in COMMANDS:
        close = difflib.get_close_matches(named, COMMANDS, n=2, cutoff=0.5) or COMMANDS
        raise UsageError(f"expected a command; got {named!r} (closest: {', '.join(close)}).")
    chosen, rest = commands.parse_known_args(given)
    if chosen.command is None:
        commands.print_help()
        return DONE
    if rest and chosen.command != "train":
        raise UsageError(f"gato {chosen.command} has no argument {rest[0]!r} (see --help).")
    chosen.overrides, chosen.given = rest, line
    for module in getattr(chosen, "imports", ()):
        importlib.import_module("gato.envs.gym").import_module(module)
    code = chosen.run(chosen)
    sys.stdout.flush()
    return DONE if code is None else int(code)


def _command(line: Sequence[str]) -> str | None:
    return next((word for word in line if not word.startswith("-")), None)


def _of_system(error: OSError) -> str:
    """Return the error without its number: what went wrong, and with which file."""
    if error.strerror is None:
        return str(error)
    return error.strerror if error.filename is None else f"{error.strerror}: {error.filename}"


def _report(message: str, code: int, debug: bool) -> int:
    if debug:
        tell(traceback.format_exc().rstrip())
    tell(f"gato: {' '.join(message.split())}")
    return code


def _parser() -> Parser:
    parser = Parser(prog="gato", description=ABOUT)
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)
    for name, (about, arguments) in COMMANDS.items():
        one = subparsers.add_parser(name, help=about, description=about)
        one.add_argument("--debug", action="store_true", help="show the traceback of an error")
        arguments(one)
        one.set_defaults(run=_late(name))
    return parser


def _late(name: str) -> Command:
    """Return the command as a function that imports its module when it is called."""

    def run(chosen: argparse.Namespace) -> Any:
        module = importlib.import_module(MODULES.get(name, "gato.commands"))
        return getattr(module, "evaluate" if name == "eval" else name)(chosen)

    return run


WORLD_COMMANDS = ("tasks", "collect", "show", "eval", "experts", "replay", "compare")
MODULES = {
    **dict.fromkeys(WORLD_COMMANDS, "gato.world_commands"),
    **dict.fromkeys(("train", "runs"), "gato.run_commands"),
    **dict.fromkeys(("chat", "caption", "classify"), "gato.language_commands"),
    "data": "gato.data_commands",
    "search": "gato.search_commands",
    "serve": "gato.serve_commands",
    "bench": "gato.bench_commands",
    "export": "gato.export_commands",
}
"""Where commands stand that do not stand in `gato.commands`."""


if __name__ == "__main__":
    sys.exit(main())
