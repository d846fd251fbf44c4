"""The commands by name, and what each takes."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path

from gato import language_arguments
from gato.options import (
    Parser,
    add_attention,
    add_cache,
    add_import,
    add_json,
    add_reading,
    add_seed,
    add_workers,
    positive,
    share,
    whole,
)


def _quickstart(p: Parser) -> None:
    p.add_argument("--out", type=Path, default=Path("runs/quickstart"), help="folder of it all")
    p.add_argument("--minutes", type=positive, default=20.0, help="for everything together (20)")
    add_seed(p)
    p.add_argument("--json", action="store_true", help="print results.json at the end")


def _tasks(p: Parser) -> None:
    p.add_argument("patterns", nargs="*", metavar="PATTERN", help="an id or a pattern: babyai/*")
    p.add_argument("--suite", help="only this suite's")
    p.add_argument("--check", action="store_true", help="play each a little: does it keep its word")
    cores = os.cpu_count() or 1
    p.add_argument("--workers", type=whole(0), default=cores, help="processes of --check")
    add_import(p)
    add_json(p)


def _collect(p: Parser) -> None:
    p.add_argument("tasks", nargs="+", metavar="TASK", help="an id, or a pattern such as babyai/*")
    p.add_argument("--episodes", type=whole(1), required=True, help="kept episodes per task")
    p.add_argument("--out", type=Path, required=True, metavar="STORE", help="folder of the stores")
    p.add_argument(
        "--expert", default="auto", help="auto, scripted, planner, or a learned one's DIR"
    )
    p.add_argument("--noise", type=float, default=0.0, help="of the actions; targets stay clean")
    add_workers(p)
    p.add_argument("--min-fraction", type=float, default=0.8, help="of the expert's score, to keep")
    add_import(p)
    add_seed(p)
    add_json(p)


def _show(p: Parser) -> None:
    p.add_argument("what", metavar="TASK|STORE", help="a task id or a folder")
    p.add_argument("--steps", type=whole(1), default=2, help="of an episode")
    p.add_argument("--index", type=int, default=0, help="of the episode or record in a store")
    p.add_argument("--codec", help="scalar (Gato's, the default) or vector observations")
    about = "pixels a side that a token shows of a frame: 16 (the default), 32 or 64"
    p.add_argument("--frame-cell", type=whole(1), metavar="N", help=about)
    p.add_argument("--checkpoint", type=Path, help="show what this model reads")
    p.add_argument("--returns", action="store_true", help="with the return to come in every step")
    p.add_argument("--joint", type=whole(0), default=0, metavar="C", help="actions beside a step")
    about = "of --joint: actions stand in the stream too, where later steps see them"
    p.add_argument("--shown", action="store_true", help=about)
    p.add_argument("--pairs", type=whole(1), default=1, help="captions in one sequence")
    add_import(p)
    add_seed(p)
    add_json(p)


RUN_FIELDS = """\
Any field of the run may follow, such as these (with what quickstart has):
  --rows N               sequences' rows in a batch (13)
  --parts N              computed one after another, for less memory (1)
  --optim.lr RATE        the highest learning rate (0.002)
  --model.layers N       of the model (4); width, heads and others alike
  --model.context N      tokens of a row (256), and of a rollout's memory without a window
  --model.window N       tokens that one sees, in training and at rollout (None: all of a document)
  --ema SHARE            average the weights, which are then loaded: 0.999 (0.0: no average)
  --freeze PART...       what is not trained: trunk, embedders, table, 'blocks.0.*' (none)
  --lora.rank N          of what is learnt beside the trunk's matrices, which stay (0: no LoRA)
  --optim.rates PART X   factors of the rate, of parts or ranges of ids: trunk 0.5 text 0.1 (none)
  --save-every STEPS     between checkpoints (250)
  --keep-last N          of the newest checkpoints (2)
  --keep-best            keep the best checkpoint too (False)
  --validate-every STEPS between losses on what is held out (as --save-every)
  --eval-tasks TASK...   played while training goes on: 'babyai/*' (none); needs --eval-every
  --eval-every STEPS     between such plays (0: never)
  --eval-episodes N      of each task (5)
  --corpora.0.loss-weight W and other fields of the first corpus of --data or --mixture (1.0)
All of them: gato train PRESET --fields"""


def _train(p: Parser) -> None:
    p.epilog, p.formatter_class = RUN_FIELDS, argparse.RawDescriptionHelpFormatter
    about = "quickstart, few_shot, gato_79m, gato_364m or gato_1b"
    p.add_argument("preset", metavar="PRESET", help=about)
    p.add_argument(
        "--data", nargs="+", default=[], metavar="NAME=PATH[:WEIGHT]", help="corpora to train on"
    )
    about = "a mixture's file, or a named one (gato_paper); --data adds to it and overrides it"
    p.add_argument("--mixture", metavar="FILE|NAME", help=about)
    about = "list the corpora and what is missing; draw batches of so many tokens, tell the shares"
    p.add_argument(
        "--dry-run", type=whole(0), nargs="?", const=0, default=None, metavar="TOKENS", help=about
    )
    p.add_argument("--out", type=Path, help="the run's folder (runs/PRESET)")
    about = "optimizer steps of the whole run (quickstart 1000, few_shot 1500, others 1000000)"
    p.add_argument("--steps", type=int, help=about)
    p.add_argument("--seed", type=whole(0), help="of weights, batches and noise (0)")
    about = "go on where the run in --out was, or set it aside and begin anew (--resume)"
    p.add_argument("--resume", action=argparse.BooleanOptionalAction, default=True, help=about)
    about = "compile the model: yes, no or auto, which does on a GPU (auto)"
    p.add_argument("--compile", choices=("auto", "yes", "no"), default="auto", help=about)
    about = "show what the time of N steps goes to, and keep a trace in the run's folder"
    p.add_argument("--profile", type=whole(1), default=0, metavar="N", help=about)
    about = "processes that make batches ahead (2 on a GPU, 0 on a CPU)"
    p.add_argument("--workers", type=whole(0), metavar="N", help=about)
    about = "leave out items of other formats that cannot be read, and count them"
    p.add_argument("--skip-bad", action="store_true", help=about)
    about = "leave damaged shards out, tell which, and go on without them"
    p.add_argument("--skip-bad-shards", action="store_true", help=about)
    about = "compare the data with their checksums first; otherwise only sizes and headers"
    p.add_argument("--verify", action="store_true", help=about)
    about = "that each corpus holds out, where it sets no share of its own (0.02)"
    p.add_argument("--validation", type=share, metavar="FRACTION", help=about)
    about = "a SentencePiece model to use; by default one is trained on the corpora's text"
    p.add_argument("--text-model", type=Path, metavar="FILE", help=about)
    about = "begin with these weights: a Hugging Face folder of the llama, qwen2, qwen3 or smollm3 "
    about += "family (config.json, safetensors, its tokenizer), or a checkpoint of gato"
    p.add_argument("--init-from", type=Path, metavar="DIR", help=about)
    add_attention(p)
    p.add_argument("--wandb", metavar="PROJECT", help="report to Weights & Biases too")
    p.add_argument("--parameters", action="store_true", help="count parameters; train nothing")
    p.add_argument("--fields", action="store_true", help="list every field of the run; train none")
    add_cache(p)
    add_import(p)
    add_json(p)


def _runs(p: Parser) -> None:
    about = "a run, or a folder that is searched for runs (runs)"
    p.add_argument("folder", nargs="?", type=Path, default=Path("runs"), metavar="DIR", help=about)
    add_json(p)


LANGUAGE_KINDS = """\
Kinds of language tasks, each KIND/CORPUS (held out, made anew at --seed) or KIND/PATH (records, or
any format that gato train --data reads); none of them is part of the scores against the expert:
  caption   exact, CIDEr-D, BLEU, chrF (these two by sacrebleu: pip install "gato[metrics]")
  vqa       answers about pictures: exact, VQA's accuracy, of choices the likeliest
  chat      an assistant's answers: exact, BLEU, chrF
  text      loss, perplexity, bits per byte
  classify  the label of a picture, of all: by contrast where trained for it, and by likelihood
  retrieve  recall of captions by pictures and of pictures by captions, at 1 and 5 of 50
  few_shot  new words for pictures, learned from examples that stand before"""


def _eval(p: Parser) -> None:
    p.epilog, p.formatter_class = LANGUAGE_KINDS, argparse.RawDescriptionHelpFormatter
    about = "folder of a checkpoint or of a run; or expert, or random"
    p.add_argument("checkpoint", type=Path, help=about)
    about = "tasks of control (all that the model knows, else), and of language as KIND/CORPUS or "
    about += "KIND/PATH: caption/scenes, vqa/FOLDER; kinds: see the end"
    p.add_argument("--tasks", nargs="+", metavar="PATTERN", help=about)
    about = "per task (20), and records of each language task (200 of a corpus, all of a folder)"
    p.add_argument("--episodes", type=whole(1), metavar="N", help=about)
    about = (
        "of vqa, chat and classify: answers to choose among where records name none, with commas"
    )
    p.add_argument("--choices", metavar="A,B,...", help=about)
    about = "of eval expert: auto, scripted, planner, or a learned one's DIR"
    p.add_argument("--expert", metavar="KIND", help=about)
    p.add_argument("--temperature", type=float, help="of actions; by default as trained")
    about = "how far returns to come are tilted upwards; by default as trained"
    p.add_argument("--kappa", type=float, help=about)
    about = "actions taken of those that one state decides (train: joint = N); by default all"
    p.add_argument("--execute", type=whole(1), metavar="K", help=about)
    about = "that the model decides in; by default its own on a CPU, bfloat16 on a GPU"
    kinds = ("auto", "float32", "bfloat16")
    p.add_argument("--precision", choices=kinds, default="auto", help=about)
    p.add_argument("--prompts", type=Path, metavar="STORE", help="demonstrations shown first")
    about = "episodes under way at once, in two batches (64; 20 where cameras draw)"
    p.add_argument("--max-batch", type=whole(1), metavar="N", help=about)
    add_workers(p)
    add_seed(p)
    add_import(p)
    p.add_argument("--json", nargs="?", const="-", metavar="FILE", help="write JSON, or print it")
    p.add_argument("--report", type=Path, metavar="FILE.html", help="write a page, with videos")
    p.add_argument("--video", type=Path, metavar="DIR", help="write a video of each task")
    about = "filmed per task"
    p.add_argument("--video-episodes", type=whole(1), default=1, metavar="N", help=about)


def _compare(p: Parser) -> None:
    about = "what gato eval --json wrote; the first is what the others are compared with"
    p.add_argument("results", nargs="+", type=Path, metavar="FILE.json", help=about)
    p.add_argument("--report", type=Path, metavar="FILE.html", help="write a page")
    add_seed(p)
    add_json(p)


def _bench(p: Parser) -> None:
    about = "a bench; those of a minute or less where none is named; list: what there are"
    p.add_argument("names", nargs="*", metavar="NAME", help=about)
    p.add_argument("--repeats", type=whole(1), default=5, help="of everything measured (5)")
    p.add_argument("--save", type=Path, metavar="FILE", help="write what was measured as a record")
    about = "with a record: exit code 1 where something became slower beyond noise"
    p.add_argument("--compare", type=Path, metavar="FILE", help=about)
    about = "change from which on a difference that is no chance is told (0.1)"
    p.add_argument("--tolerance", type=share, default=0.1, metavar="SHARE", help=about)
    add_attention(p)
    add_json(p)


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
        add_reading(a)
        add_json(a)
    about = "take data of another format into stores"
    a = actions.add_parser("import", help=about, description=about)
    a.add_argument("source", metavar="SOURCE", help="a path, a name on a hub, or an address")
    a.add_argument("--out", type=Path, required=True, metavar="STORE", help="folder of the stores")
    a.add_argument("--skip-bad", action="store_true", help="count what cannot be read; go on")
    add_reading(a)
    add_json(a)
    about = "write stores as data sets of another format"
    a = actions.add_parser("export", help=about, description=about)
    a.add_argument("store", metavar="STORE", help="a store or a folder of them")
    a.add_argument("--format", required=True, metavar="F", help="minari or lerobot")
    a.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder")
    about = "of lerobot, how pictures are kept: video (small loss), lossless or png (video)"
    a.add_argument("--images", metavar="HOW", help=about)
    add_json(a)
    about = "write one of the corpora of words and pictures that come with gato"
    a = actions.add_parser("make", help=about, description=about)
    about = "bindings, dialogues, digits, documents, frames, scenes, shapes"
    a.add_argument("corpus", metavar="CORPUS", help=about)
    a.add_argument("--out", type=Path, required=True, metavar="STORE", help="a new folder")
    about = "train, or heldout: what nothing of the former is in"
    a.add_argument("--split", choices=("train", "heldout"), default="train", help=about)
    a.add_argument("--count", type=whole(1), metavar="N", help="records (as many as it has)")
    add_seed(a)
    add_json(a)
    about = "train a text model on the text of a mixture, for gato train --text-model"
    _text_model(actions.add_parser("text-model", help=about, description=about))


def _text_model(p: Parser) -> None:
    about = "corpora to take text from"
    p.add_argument("--data", nargs="+", default=[], metavar="NAME=PATH[:WEIGHT]", help=about)
    p.add_argument("--mixture", metavar="FILE", help="take text from this mixture, by its weights")
    p.add_argument("--pieces", type=whole(1), required=True, metavar="N", help="256 bytes included")
    p.add_argument("--out", type=Path, required=True, metavar="FILE", help="for --text-model")
    about = "to train on, of all corpora together (20000000)"
    p.add_argument("--characters", type=whole(1), default=20_000_000, metavar="N", help=about)
    about = "that gato train will hold out of each corpus, and this leaves out (0.02)"
    p.add_argument("--validation", type=share, metavar="FRACTION", help=about)
    add_seed(p)
    add_json(p)


def _replay(p: Parser) -> None:
    p.add_argument("store", type=Path, metavar="STORE", help="a store or a folder of them")
    which = p.add_mutually_exclusive_group()
    which.add_argument("--episode", type=int, default=0, metavar="I", help="of each store (0)")
    which.add_argument("--all", action="store_true", help="every episode")
    add_import(p)
    add_json(p)


def _experts(p: Parser) -> None:
    p.set_defaults(help=p.print_help)
    actions = p.add_subparsers(dest="action", metavar="ACTION", parser_class=Parser)
    about = "list experts and how well they do"
    a = actions.add_parser("list", help=about, description=about)
    a.add_argument("--suite", help="only this suite's")
    add_json(a)
    about = "measure how well experts and random policies do, at evaluation seeds"
    a = actions.add_parser("score", help=about, description=about)
    a.add_argument("tasks", nargs="+", metavar="TASK", help="an id, or a pattern such as babyai/*")
    a.add_argument("--episodes", type=whole(1), default=20, help="per task and policy")
    a.add_argument("--policy", choices=("expert", "random", "both"), default="expert", help="who")
    a.add_argument(
        "--expert", default="auto", help="auto, scripted, planner, or a learned one's DIR"
    )
    add_workers(a)
    a.add_argument("--write", action="store_true", help="replace these rows of envs/scores.csv")
    add_import(a)
    add_seed(a)
    add_json(a)
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
    add_import(a)
    add_seed(a)
    add_json(a)


COMMANDS: dict[str, tuple[str, Callable[[Parser], None]]] = {
    "quickstart": ("make data, train, evaluate, caption and chat on two cores", _quickstart),
    "tasks": ("list the tasks", _tasks),
    "collect": ("let experts play and store their episodes", _collect),
    "data": ("describe and check data; take them in from other formats, and give them out", _data),
    "replay": ("do what a store logged again: does the same come of it?", _replay),
    "show": ("print a task's or a store's stream, one token a line", _show),
    "train": ("train a preset on stores", _train),
    "runs": ("list training runs: state, progress, last figures", _runs),
    "eval": ("play tasks with a checkpoint, and measure its language", _eval),
    "compare": ("compare results of evaluations", _compare),
    "chat": ("talk with a checkpoint", language_arguments.chat),
    "caption": ("describe images", language_arguments.caption),
    "classify": ("choose among labels for images", language_arguments.classify),
    "serve": (
        "answer over HTTP: OpenAI's endpoints, actions, a web page",
        language_arguments.serve,
    ),
    "search": ("find pictures of a folder by words or by a picture", language_arguments.search),
    "export": ("write a checkpoint in the form of another library", language_arguments.export),
    "experts": ("list, score or train experts", _experts),
    "bench": ("measure speed", _bench),
}
