"""What the commands take that talk: chat, captions, labels, search, the server, export."""

from __future__ import annotations

from pathlib import Path

from gato.options import (
    Parser,
    add_checkpoint,
    add_import,
    add_json,
    add_sampling,
    positive,
    whole,
)


def chat(p: Parser) -> None:
    """Take what `gato chat` takes."""
    add_checkpoint(p)
    about = "one message, - for what stdin holds; without it, a conversation"
    p.add_argument("--prompt", metavar="TEXT", help=about)
    about = "shown before the first message; may be given several times"
    p.add_argument("--image", type=Path, action="append", default=[], metavar="FILE", help=about)
    p.add_argument("--system", metavar="TEXT", help="said before everything else")
    add_sampling(p)
    about = "an answer ends before it; may be given several times"
    p.add_argument("--stop", action="append", default=[], metavar="TEXT", help=about)
    add_import(p)
    add_json(p)


def caption(p: Parser) -> None:
    """Take what `gato caption` takes."""
    add_checkpoint(p)
    p.add_argument("images", nargs="+", type=Path, metavar="IMAGE")
    about = "an image and its text, to be followed; may be given several times"
    p.add_argument("--example", action="append", default=[], metavar="FILE=TEXT", help=about)
    about = "answered in place of a caption; texts of examples are then answers to it"
    p.add_argument("--question", metavar="TEXT", help=about)
    p.add_argument("--max-tokens", type=whole(1), default=64, help="of one text (64)")
    add_json(p)


def classify(p: Parser) -> None:
    """Take what `gato classify` takes."""
    add_checkpoint(p)
    p.add_argument("images", nargs="+", type=Path, metavar="IMAGE")
    p.add_argument("--labels", required=True, help="separated by commas")
    about = "what labels are written in: 'a picture of {}'; several are averaged"
    p.add_argument("--template", action="append", metavar="TEXT", help=about)
    about = "by contrast (nearness of embeddings) or likelihood (as a caption); as trained, else"
    p.add_argument("--how", choices=("contrast", "likelihood"), help=about)
    add_json(p)


def search(p: Parser) -> None:
    """Take what `gato search` takes."""
    add_checkpoint(p)
    p.add_argument("folder", type=Path, metavar="FOLDER", help="pictures, in folders below it too")
    p.add_argument("text", nargs="?", metavar="TEXT", help="what the pictures should show")
    p.add_argument("--image", type=Path, metavar="FILE", help="a picture to search by instead")
    p.add_argument("--top", type=whole(1), default=5, metavar="N", help="pictures told (5)")
    p.add_argument("--skip-bad", action="store_true", help="leave out what cannot be read; name it")
    add_json(p)


def serve(p: Parser) -> None:
    """Take what `gato serve` takes."""
    add_checkpoint(p)
    about = "address to listen at (127.0.0.1); any that other machines reach needs a token"
    p.add_argument("--host", default="127.0.0.1", metavar="H", help=about)
    p.add_argument("--port", type=whole(0), default=8000, metavar="P", help="0: a free one (8000)")
    one = p.add_mutually_exclusive_group()
    about = (
        "what clients must show; other users of this machine can see it in its list of processes"
    )
    one.add_argument("--token", metavar="T", help=about)
    one.add_argument("--token-file", type=Path, metavar="FILE", help="that holds the token")
    p.add_argument("--name", help="of the model in requests (its folder's)")
    about = "answers written at once (16)"
    p.add_argument("--rows", type=whole(1), default=16, metavar="N", help=about)
    about = "answers that may wait for a row; more are refused with 429 (64)"
    p.add_argument("--waiting", type=whole(1), default=64, metavar="N", help=about)
    about = "of actions, at once (32)"
    p.add_argument("--sessions", type=whole(1), default=32, metavar="N", help=about)
    about = "of one answer (1024)"
    p.add_argument("--max-tokens", type=whole(1), default=1024, metavar="N", help=about)
    p.add_argument("--body-mb", type=whole(1), default=16, metavar="MB", help="of one request (16)")
    about = "that one answer may take (120)"
    p.add_argument("--timeout", type=positive, default=120.0, metavar="SECONDS", help=about)
    about = "let pages of this site ask too (CORS), https://example.org; may be given several times"
    p.add_argument("--allow-origin", action="append", default=[], metavar="ORIGIN", help=about)
    about = "a name that clients may call the server by (localhost); may be given several times"
    p.add_argument("--allow-host", action="append", default=[], metavar="NAME", help=about)
    add_import(p)


def export(p: Parser) -> None:
    """Take what `gato export` takes."""
    add_checkpoint(p)
    p.add_argument("out", type=Path, metavar="DIR", help="a new folder")
    about = "as a Hugging Face folder of the text part, which transformers loads"
    p.add_argument("--hf", action="store_true", required=True, help=about)
    add_json(p)
