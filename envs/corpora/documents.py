"""Plain English from the standard library's own documentation, cleaned and cut into pieces.

Sources are the topics of `pydoc` and the docstrings of the library's modules, read from their
files without importing them. All pieces of a source are in one split, and no paragraph is in two.
The text depends on the Python that runs; nothing is downloaded.
"""

from __future__ import annotations

import ast
import re
import sysconfig
import textwrap
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from gato.envs.corpora.common import Split, bucket, check_split, stream

COUNTS = {"train": 3_000, "heldout": 150}
PIECE = 600
"""Characters that a piece aims at; only a single longer paragraph makes a longer one."""
MOST_CHARACTERS = 1_500_000
SHORTEST_PARAGRAPH = 40
SHARE_OF_LETTERS = 0.78
"""Letters and spaces in what counts as prose; tables, grammars and code have fewer."""
ALL_DOCSTRINGS = 20_000
"""A module's docstrings beyond this many characters are left out: breadth before depth."""
_SKIPPED = re.compile(r"^[^A-Za-z]*$|^\s*(>>>|\.\.\. |\.\. |::|:[a-z]+:)|::=|^\$")


def records(split: Split, seed: int, count: int | None = None) -> Iterator[dict[str, Any]]:
    """Yield documents, each piece once in an order drawn from the seed, then from the start again.

    Where none are asked for, there are as many as pieces, at most `COUNTS`.
    """
    check_split(split)
    pieces = [piece for piece in _pieces() if piece[0] == split]
    if not pieces:
        raise ValueError(
            f"expected documentation in {sysconfig.get_path('stdlib')}; found none. "
            f"Use a Python that comes with its standard library as files."
        )
    stream("documents", split, seed, 0).shuffle(pieces)
    for k in range(min(COUNTS[split], len(pieces)) if count is None else count):
        _, source, text = pieces[k % len(pieces)]
        yield {"kind": "document", "text": text, "meta": {"source": source}}


def clean(text: str) -> list[str]:
    r"""Return the paragraphs of prose in `text`, each on one line and without markup.

    >>> clean("Title\n*****\n\nThe *quick* brown fox jumps over\nthe lazy dog of the house.")
    ['The quick brown fox jumps over the lazy dog of the house.']
    """
    paragraphs = []
    for block in re.split(r"\n\s*\n", textwrap.dedent(text.expandtabs(4)).strip()):
        lines = block.splitlines()
        if not lines or any(_SKIPPED.search(line) for line in lines):
            continue
        if lines[0].startswith("    ") or any(re.match(r" {6}", line) for line in lines):
            continue  # code, or a table
        prose = re.sub(r"(?<=[a-z])-\s*\n\s*", "-", "\n".join(lines))
        prose = re.sub(r"^[*\-+o] ", "", prose.strip())
        prose = re.sub(r":\w+:(?=`)|[*`\"]+", "", prose).replace("--", "-")
        prose = re.sub(r"\s+", " ", prose).strip()
        if _is_prose(prose):
            paragraphs.append(prose)
    return paragraphs


def _is_prose(text: str) -> bool:
    letters = sum(c.isalpha() or c == " " for c in text)
    return (
        len(text) >= SHORTEST_PARAGRAPH
        and letters >= SHARE_OF_LETTERS * len(text)
        and text.isascii()
        and text[-1] in ".!?:;"
    )


@cache
def _pieces() -> list[tuple[Split, str, str]]:
    """Return (split, source, text) of every piece."""
    found: list[tuple[Split, str, str]] = []
    seen: set[str] = set()  # topics repeat one another: a paragraph belongs to its first source
    for source, text in _sources():
        split: Split = "heldout" if bucket(source, 10) == 0 else "train"
        new = [p for p in dict.fromkeys(clean(text)) if p not in seen]
        seen.update(new)
        found += [(split, source, piece) for piece in _cut(new)]
        if sum(map(len, seen)) >= MOST_CHARACTERS:
            break
    return found


def _cut(paragraphs: list[str]) -> Iterator[str]:
    piece: list[str] = []
    for paragraph in paragraphs:
        if piece and sum(map(len, piece)) + len(paragraph) > PIECE:
            yield "\n".join(piece)
            piece = []
        piece.append(paragraph)
    if piece:
        yield "\n".join(piece)


def _sources() -> Iterator[tuple[str, str]]:
    """Yield (name, text): first the topics, then the modules in alphabetical order."""
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions leave it out
        topics = {}
    for name in sorted(topics):
        yield f"topics/{name}", topics[name]
    library = Path(sysconfig.get_path("stdlib"))
    files = [*library.glob("*.py"), *library.glob("*/__init__.py")]
    for file in sorted(files, key=lambda f: f.relative_to(library).as_posix()):
        name = file.relative_to(library).as_posix()
        if not name.startswith(("_", "test", "idlelib", "turtledemo", "site-packages", "dist-")):
            yield name, _docstrings(file)


def _docstrings(file: Path) -> str:
    """Return the docstrings of a module and of what it defines, without running it."""
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, UnicodeDecodeError):
        return ""  # a file of other encoding is no loss here
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    texts = [ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, kinds)]
    return "\n\n".join(texts)[:ALL_DOCSTRINGS].rsplit("\n\n", 1)[0]
