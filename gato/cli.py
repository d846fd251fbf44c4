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
from pathlib import Path
from typing import Any, NoReturn

# Before torch starts its threads: those that wait for work sleep, they do not take a core.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

ABOUT = "One model, one stream of tokens: games, robots, grid worlds, images and conversation."
DONE, FAILURE, BAD_INPUT = 0, 1, 2

Command = Callable[[argparse.Namespace], Any]


class UsageError(ValueError):
    """The command line itself is wrong."""


class Parser(argparse.ArgumentParser):
    """A parser whose errors are exceptions, so that all errors leave by one door."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Raise `UsageError`, naming the help that would have told."""
        raise UsageError(f"{message} (see {self.prog} --help)")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    try:
        return _run(given)
    except BrokenPipeError:  # the reader of our output has seen enough: `gato show ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
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
    named = next((a for a in given if not a.startswith("-")), None)
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


def _of_system(error: OSError) -> str:
    """Return the error without its number: what went wrong, and with which file."""
    if error.strerror is None:
        return str(error)
    return error.strerror if error.filename is None else f"{error.strerror}: {error.filename}"


def _report(message: str, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    print(f"gato: {' '.join(message.split())}", file=sys.stderr)
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


def _seed(parser: Parser) -> None:
    about = "of everything drawn at random"
    parser.add_argument("--seed", type=_whole(0), default=0, help=about)


def _whole(least: int) -> Callable[[str], int]:
    """Return what reads a whole number, `least` or more."""

    def read(text: str) -> int:
        if not text.removeprefix("-").isdecimal() or int(text) < least:
            wanted = f"expected a whole number, {least} or more; got {text}"
            raise argparse.ArgumentTypeError(wanted)
        return int(text)

    return read


def _share(text: str) -> float:
    """Return a share that leaves something: 0 or more and below 1."""
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0.0 <= share < 1.0:
        raise argparse.ArgumentTypeError(f"expected a share, 0 or more and below 1; got {text}")
    return share


def _workers(parser: Parser) -> None:
    cores = os.cpu_count() or 1
    about = "processes of simulators; with 0, this one, which then ends where a simulator ends it"
    parser.add_argument("--workers", type=_whole(0), default=cores, metavar="N", help=about)
    about = "that one step may take before its process is ended (600)"
    parser.add_argument("--timeout", type=float, default=600.0, metavar="SECONDS", help=about)


def _json(parser: Parser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def _import(parser: Parser) -> None:
    about = "imported first: its environments become tasks, gym/<their ids>"
    parser.add_argument(
        "--import", dest="imports", action="append", default=[], metavar="MODULE", help=about
    )


def _checkpoint(parser: Parser) -> None:
    parser.add_argument("checkpoint", type=Path, help="folder of a checkpoint or of a run")


def _sampling(parser: Parser) -> None:
    parser.add_argument("--max-tokens", type=_whole(1), default=128, help="of one answer")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest")
    parser.add_argument("--top-p", type=float, default=1.0, help="mass of the ids sampled from")
    _seed(parser)


def _quickstart(p: Parser) -> None:
    p.add_argument("--out", type=Path, default=Path("runs/quickstart"), help="folder of it all")
    p.add_argument("--minutes", type=float, default=20.0, help="for everything together")
    _seed(p)
    p.add_argument("--json", action="store_true", help="print results.json at the end")


def _tasks(p: Parser) -> None:
    p.add_argument("patterns", nargs="*", metavar="PATTERN", help="an id or a pattern: babyai/*")
    p.add_argument("--suite", help="only this suite's")
    p.add_argument("--check", action="store_true", help="play each a little: does it keep its word")
    cores = os.cpu_count() or 1
    p.add_argument("--workers", type=_whole(0), default=cores, help="processes of --check")
    _import(p)
    _json(p)


def _collect(p: Parser) -> None:
    p.add_argument("tasks", nargs="+", metavar="TASK", help="an id, or a pattern such as babyai/*")
    p.add_argument("--episodes", type=_whole(1), required=True, help="kept episodes per task")
    p.add_argument("--out", type=Path, required=True, metavar="STORE", help="folder of the stores")
    p.add_argument(
        "--expert", default="auto", help="auto, scripted, planner, or a learned one's DIR"
    )
    p.add_argument("--noise", type=float, default=0.0, help="of the actions; targets stay clean")
    _workers(p)
    p.add_argument("--min-fraction", type=float, default=0.8, help="of the expert's score, to keep")
    _import(p)
    _seed(p)
    _json(p)


def _show(p: Parser) -> None:
    p.add_argument("what", metavar="TASK|STORE", help="a task id or a folder")
    p.add_argument("--steps", type=_whole(1), default=2, help="of an episode")
    p.add_argument("--index", type=int, default=0, help="of the episode or record in a store")
    p.add_argument("--codec", help="scalar (Gato's, the default) or vector observations")
    p.add_argument("--checkpoint", type=Path, help="show what this model reads")
    p.add_argument("--returns", action="store_true", help="with the return to come in every step")
    p.add_argument("--pairs", type=_whole(1), default=1, help="captions in one sequence")
    _import(p)
    _seed(p)
    _json(p)


def _train(p: Parser) -> None:
    p.epilog = "Any field of the run may follow: --optim.lr 3e-4 --model.layers 6 --rows 32"
    p.add_argument("preset", metavar="PRESET", help="quickstart, gato_79m, gato_364m or gato_1b")
    p.add_argument(
        "--data", nargs="+", default=[], metavar="NAME=PATH[:WEIGHT]", help="corpora to train on"
    )
    about = "a mixture's file, or a named one (gato_paper); --data adds to it and overrides it"
    p.add_argument("--mixture", metavar="FILE|NAME", help=about)
    about = "list the corpora and what is missing; draw batches of so many tokens, tell the shares"
    p.add_argument(
        "--dry-run", type=_whole(0), nargs="?", const=0, default=None, metavar="TOKENS", help=about
    )
    p.add_argument("--out", type=Path, help="the run's folder (runs/PRESET)")
    p.add_argument("--steps", type=int, help="optimizer steps")
    p.add_argument("--seed", type=_whole(0), help="of weights, batches and noise")
    p.add_argument(
        "--resume", action=argparse.BooleanOptionalAction, default=True, help="go on where it was"
    )
    about = "processes that make batches ahead (2 on a GPU, 0 on a CPU)"
    p.add_argument("--workers", type=_whole(0), metavar="N", help=about)
    about = "leave out items of other formats that cannot be read, and count them"
    p.add_argument("--skip-bad", action="store_true", help=about)
    about = "leave damaged shards out, tell which, and go on without them"
    p.add_argument("--skip-bad-shards", action="store_true", help=about)
    about = "compare the data with their checksums first; otherwise only sizes and headers"
    p.add_argument("--verify", action="store_true", help=about)
    about = "that each corpus holds out, where it sets no share of its own (0.02)"
    p.add_argument("--validation", type=_share, metavar="FRACTION", help=about)
    about = "a SentencePiece model to use; by default one is trained on the corpora's text"
    p.add_argument("--text-model", type=Path, metavar="FILE", help=about)
    p.add_argument("--wandb", metavar="PROJECT", help="report to Weights & Biases too")
    p.add_argument("--parameters", action="store_true", help="count parameters; train nothing")
    _cache(p)
    _import(p)
    _json(p)


def _runs(p: Parser) -> None:
    about = "a run, or a folder that is searched for runs (runs)"
    p.add_argument("folder", nargs="?", type=Path, default=Path("runs"), metavar="DIR", help=about)
    _json(p)


def _eval(p: Parser) -> None:
    about = "folder of a checkpoint or of a run; or expert, or random"
    p.add_argument("checkpoint", type=Path, help=about)
    p.add_argument("--tasks", nargs="+", metavar="PATTERN", help="all that the model knows, else")
    p.add_argument("--episodes", type=_whole(1), default=20, help="per task")
    about = "of eval expert: auto, scripted, planner, or a learned one's DIR"
    p.add_argument("--expert", metavar="KIND", help=about)
    p.add_argument("--temperature", type=float, help="of actions; by default as trained")
    about = "how far returns to come are tilted upwards; by default as trained"
    p.add_argument("--kappa", type=float, help=about)
    p.add_argument("--prompts", type=Path, metavar="STORE", help="demonstrations shown first")
    _workers(p)
    _seed(p)
    _import(p)
    p.add_argument("--json", nargs="?", const="-", metavar="FILE", help="write JSON, or print it")
    p.add_argument("--report", type=Path, metavar="FILE.html", help="write a page, with videos")
    p.add_argument("--video", type=Path, metavar="DIR", help="write a video of each task")
    about = "filmed per task"
    p.add_argument("--video-episodes", type=_whole(1), default=1, metavar="N", help=about)


def _compare(p: Parser) -> None:
    about = "what gato eval --json wrote; the first is what the others are compared with"
    p.add_argument("results", nargs="+", type=Path, metavar="FILE.json", help=about)
    p.add_argument("--report", type=Path, metavar="FILE.html", help="write a page")
    _seed(p)
    _json(p)


def _chat(p: Parser) -> None:
    _checkpoint(p)
    p.add_argument("--prompt", help="one message; without it, a conversation")
    p.add_argument("--image", type=Path, metavar="FILE", help="shown before the first message")
    _sampling(p)
    _json(p)


def _caption(p: Parser) -> None:
    _checkpoint(p)
    p.add_argument("images", nargs="+", type=Path, metavar="IMAGE")
    _json(p)


def _classify(p: Parser) -> None:
    _checkpoint(p)
    p.add_argument("image", type=Path, metavar="IMAGE")
    p.add_argument("--labels", required=True, help="separated by commas")
    _json(p)


def _bench(p: Parser) -> None:
    p.add_argument(
        "names", nargs="*", metavar="NAME", help="serializer, train, rollout, data, collect"
    )
    _json(p)


def _data(p: Parser) -> None:
    p.set_defaults(help=p.print_help, action=None)
    actions = p.add_subparsers(dest="action", metavar="ACTION", parser_class=Parser)
    for action, about in (
        ("info", "describe stores, or data of other formats"),
        ("validate", "read everything once, and name what is damaged"),
    ):
        a = actions.add_parser(action, help=about, description=about)
        about = "a store, a folder of stores, or data of another format"
        a.add_argument("locations", nargs="+", metavar="PATH", help=about)
        _reading(a)
        _json(a)
    about = "take data of another format into stores"
    a = actions.add_parser("import", help=about, description=about)
    a.add_argument("source", metavar="SOURCE", help="a path, a name on a hub, or an address")
    a.add_argument("--out", type=Path, required=True, metavar="STORE", help="folder of the stores")
    a.add_argument("--skip-bad", action="store_true", help="count what cannot be read; go on")
    _reading(a)
    _json(a)
    about = "write stores as data sets of another format"
    a = actions.add_parser("export", help=about, description=about)
    a.add_argument("store", metavar="STORE", help="a store or a folder of them")
    a.add_argument("--format", required=True, help="minari or lerobot")
    a.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder")
    about = "of lerobot, how pictures are kept: video (small loss), lossless or png (video)"
    a.add_argument("--images", metavar="HOW", help=about)
    _json(a)
    about = "train a text model on the text of a mixture, for gato train --text-model"
    _text_model(actions.add_parser("text-model", help=about, description=about))


def _text_model(p: Parser) -> None:
    about = "corpora to take text from"
    p.add_argument("--data", nargs="+", default=[], metavar="NAME=PATH[:WEIGHT]", help=about)
    p.add_argument("--mixture", metavar="FILE", help="take text from this mixture, by its weights")
    p.add_argument(
        "--pieces", type=_whole(1), required=True, metavar="N", help="256 bytes included"
    )
    p.add_argument("--out", type=Path, required=True, metavar="FILE", help="for --text-model")
    about = "to train on, of all corpora together (20000000)"
    p.add_argument("--characters", type=_whole(1), default=20_000_000, metavar="N", help=about)
    about = "that gato train will hold out of each corpus, and this leaves out (0.02)"
    p.add_argument("--validation", type=_share, metavar="FRACTION", help=about)
    _seed(p)
    _json(p)


def _cache(p: Parser) -> None:
    about = "of the cache of what is fetched from addresses, from now on (20)"
    p.add_argument("--cache-gb", type=float, metavar="GB", help=about)


def _reading(p: Parser) -> None:
    """Add what a user may ask of a reader of other formats."""
    p.add_argument("--format", default="auto", help="of data that do not tell theirs (auto)")
    p.add_argument("--task", metavar="ID", help="the task of all episodes")
    p.add_argument("--instruction", metavar="TEXT", help="of all episodes")
    p.add_argument("--split", metavar="NAME", help="of data that come in splits (train)")
    p.add_argument("--limit", type=_whole(0), metavar="N", help="items to read; 0 reads all (0)")
    about = "of pictures, in multiples of 16"
    p.add_argument("--image-size", type=_size, metavar="WxH", help=about)
    about = "our field=the data's, where names differ: text=body,image=photo"
    p.add_argument("--columns", type=_pairs, metavar="A=B,...", help=about)
    about = "bring actions outside their bounds to these, instead of refusing them"
    p.add_argument("--clip-actions", action="store_true", help=about)
    _cache(p)


def _size(text: str) -> tuple[int, int]:
    width, _, height = text.lower().partition("x")
    if not (width.isdecimal() and height.isdecimal()):
        raise argparse.ArgumentTypeError(f"expected WIDTHxHEIGHT; got {text}")
    return int(width), int(height)


def _pairs(text: str) -> dict[str, str]:
    pairs = [pair.partition("=") for pair in text.split(",")]
    if not all(ours and equals for ours, equals, _ in pairs):
        raise argparse.ArgumentTypeError(f"expected OURS=THEIRS,...; got {text}")
    return {ours: theirs for ours, _, theirs in pairs}


def _replay(p: Parser) -> None:
    p.add_argument("store", type=Path, metavar="STORE", help="a store or a folder of them")
    which = p.add_mutually_exclusive_group()
    which.add_argument("--episode", type=int, default=0, metavar="I", help="of each store (0)")
    which.add_argument("--all", action="store_true", help="every episode")
    _import(p)
    _json(p)


def _experts(p: Parser) -> None:
    p.set_defaults(help=p.print_help)
    actions = p.add_subparsers(dest="action", metavar="ACTION", parser_class=Parser)
    about = "list experts and how well they do"
    a = actions.add_parser("list", help=about, description=about)
    a.add_argument("--suite", help="only this suite's")
    _json(a)
    about = "measure how well experts and random policies do, at evaluation seeds"
    a = actions.add_parser("score", help=about, description=about)
    a.add_argument("tasks", nargs="+", metavar="TASK", help="an id, or a pattern such as babyai/*")
    a.add_argument("--episodes", type=_whole(1), default=20, help="per task and policy")
    a.add_argument("--policy", choices=("expert", "random", "both"), default="expert", help="who")
    a.add_argument(
        "--expert", default="auto", help="auto, scripted, planner, or a learned one's DIR"
    )
    _workers(a)
    a.add_argument("--write", action="store_true", help="replace these rows of envs/scores.csv")
    _import(a)
    _seed(a)
    _json(a)
    about = "train a specialist of one task with Stable-Baselines3; goes on where it was stopped"
    a = actions.add_parser("train", help=about, description=about)
    a.add_argument("task", metavar="TASK", help="with numbers to observe")
    a.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the expert")
    a.add_argument("--algorithm", choices=("auto", "ppo", "sac"), default="auto", help="of SB3")
    a.add_argument("--minutes", type=float, help="in all (10 where no limit is given)")
    a.add_argument("--steps", type=int, help="of the environment, in all")
    a.add_argument("--until", type=float, metavar="SCORE", help="stop where this is reached")
    a.add_argument("--envs", type=int, default=8, help="copies of the world that PPO plays")
    a.add_argument(
        "--resume", action=argparse.BooleanOptionalAction, default=True, help="go on where it was"
    )
    _import(a)
    _seed(a)
    _json(a)


COMMANDS: dict[str, tuple[str, Callable[[Parser], None]]] = {
    "quickstart": ("make data, train, evaluate, caption and chat on two cores", _quickstart),
    "tasks": ("list the tasks", _tasks),
    "collect": ("let experts play and store their episodes", _collect),
    "data": ("describe and check data; take them in from other formats, and give them out", _data),
    "replay": ("do what a store logged again: does the same come of it?", _replay),
    "show": ("print a task's or a store's stream, one token a line", _show),
    "train": ("train a preset on stores", _train),
    "runs": ("list training runs: state, progress, last figures", _runs),
    "eval": ("play tasks with a checkpoint, its scores beside the expert's", _eval),
    "compare": ("compare results of evaluations", _compare),
    "chat": ("talk with a checkpoint", _chat),
    "caption": ("describe images", _caption),
    "classify": ("choose among labels for an image", _classify),
    "experts": ("list, score or train experts", _experts),
    "bench": ("measure speed", _bench),
}
WORLD_COMMANDS = ("tasks", "collect", "show", "eval", "experts", "replay", "compare")
MODULES = {
    **dict.fromkeys(WORLD_COMMANDS, "gato.world_commands"),
    **dict.fromkeys(("train", "runs"), "gato.run_commands"),
    "data": "gato.data_commands",
}
"""Where commands stand that do not stand in `gato.commands`."""


if __name__ == "__main__":
    sys.exit(main())
