"""Mixtures written down as files: corpora with their weights, and how each comes to be on disk.

    about = "what it is for"
    weigh = "tokens"                  # or "samples"
    draw = "even"                     # or "random"

    [corpora.arm]
    path = "data/arm"                 # from the folder of this file
    weight = 2.0                      # and any other field of `CorpusConfig`
    make = "gato collect 'metaworld/*' --episodes 100 --out {path}"
    substitute = "..."                # of a published mixture: what stands for the original here
    paper = "..."                     # and what the original is

Mixtures in the folder `mixtures` have a name; their paths begin in the current folder.
"""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gato.config import TrainConfig
from gato.corpus_config import CorpusConfig

FOLDER = Path(__file__).with_name("mixtures")
_TOLD = ("make", "substitute", "paper")
_FIELDS = {k: v for k, v in typing.get_type_hints(CorpusConfig).items() if k != "name"}


@dataclass(frozen=True)
class CorpusNote:
    """What a mixture's file says of a corpus beside how it is used."""

    make: str = ""
    """The command that makes or imports it."""
    substitute: str = ""
    """What it is, where it stands for another."""
    paper: str = ""
    """The one it stands for."""


@dataclass(frozen=True)
class MixtureFile:
    """A mixture as it is written down."""

    name: str
    about: str
    weigh: str
    draw: str
    corpora: tuple[CorpusConfig, ...]
    notes: Mapping[str, CorpusNote]
    """By the name of the corpus."""


def named() -> list[str]:
    """Return the names of the mixtures that come with this package."""
    return sorted(p.stem for p in FOLDER.glob("*.toml"))


def read_mixture(where: str | Path) -> MixtureFile:
    """Return the mixture in a file, or the one of that name.

    Raises:
        ValueError: for an unknown name, a file that is no TOML, an unknown key, with the closest
            known ones, or a value that its field cannot have.
    """
    file = Path(where)
    if str(where) in named():
        file, base = FOLDER / f"{where}.toml", Path()
    elif file.is_file():
        base = file.parent
    elif file.is_dir():
        raise ValueError(f"expected a mixture's file; {where} is a folder.")
    elif file.suffix or len(file.parts) > 1:
        raise ValueError(
            f"expected a mixture's file; there is no file {where}. (Mixtures that come with gato "
            f"have a name: {', '.join(named())}.)"
        )
    else:
        raise ValueError(
            f"expected a mixture's file, or one of the named ones; got {str(where)!r} "
            f"({_closest(str(where), named())})."
        )
    try:
        data = tomllib.loads(file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"expected TOML in {file}; {error}.") from error
    _require_known(data, ("about", "weigh", "draw", "corpora"), str(file))
    corpora = data.get("corpora")
    if not isinstance(corpora, dict) or not corpora:
        raise ValueError(f"{file}: expected a table [corpora.NAME] for every corpus; got none.")
    read = {name: _corpus(name, table, file, base) for name, table in corpora.items()}
    texts = {"about": "", "weigh": "tokens", "draw": "even"}
    for key in texts:
        texts[key] = _text(data.get(key, texts[key]), f"{file}: {key}")
    return MixtureFile(
        name=file.stem,
        corpora=tuple(corpus for corpus, _ in read.values()),
        notes={name: note for name, (_, note) in read.items()},
        **texts,
    )


def with_mixture(config: TrainConfig, mixture: MixtureFile) -> TrainConfig:
    """Return the run on the corpora of a mixture instead of its own."""
    return dataclasses.replace(
        config, corpora=mixture.corpora, weigh=mixture.weigh, draw=mixture.draw
    )


def missing(corpora: tuple[CorpusConfig, ...]) -> list[CorpusConfig]:
    """Return the corpora of which nothing lies on disk; what is elsewhere is not looked for."""
    return [c for c in corpora if not _elsewhere(c.path) and not Path(c.path).exists()]


def require_present(corpora: tuple[CorpusConfig, ...], notes: Mapping[str, CorpusNote]) -> None:
    """Raise ValueError where corpora are missing, naming all, each with what makes it."""
    lacking = missing(corpora)
    if lacking:
        told = []
        for corpus in lacking:
            make = notes.get(corpus.name, CorpusNote()).make
            told.append(
                f"{corpus.name} (nothing at {corpus.path}{f'; make it: {make}' if make else ''})"
            )
        do = "leave them out of the mixture's file" if notes else "give the path where they are"
        raise ValueError(
            f"{len(lacking)} of {len(corpora)} corpora are missing: {', '.join(told)}. Make them, "
            f"or {do}."
        )


def _corpus(name: str, table: Any, file: Path, base: Path) -> tuple[CorpusConfig, CorpusNote]:
    where = f"{file}: corpus {name!r}"
    if not isinstance(table, dict):
        raise ValueError(f"{where}: expected a table [corpora.{name}]; got {table!r}.")
    _require_known(table, (*_FIELDS, *_TOLD), where)
    if "path" not in table:
        raise ValueError(f"{where}: expected a path; got none.")
    fields = {k: _value(v, _FIELDS[k], f"{where}: {k}") for k, v in table.items() if k in _FIELDS}
    if not _elsewhere(fields["path"]):
        fields["path"] = str(base / in_home(fields["path"]))
    told = {k: _text(table[k], f"{where}: {k}") for k in _TOLD if k in table}
    if "make" in told:
        told["make"] = told["make"].replace("{path}", fields["path"])
    try:
        return CorpusConfig(name=name, **fields), CorpusNote(**told)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def _value(value: Any, hint: Any, where: str) -> Any:
    """Return a value of TOML as its field has it."""
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
            raise ValueError(f'{where}: expected a list of texts, such as ["a"]; got {value!r}.')
        return tuple(value)
    kinds = set(typing.get_args(hint) or (hint,)) - {type(None)}
    if kinds == {float} and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if where.endswith(": balance") and isinstance(value, int | float):
        return str(value)
    if type(value) not in kinds:
        wanted = " or ".join(kind.__name__ for kind in kinds)
        raise ValueError(f"{where}: expected {wanted}; got {value!r}.")
    return value


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{where}: expected text; got {value!r}.")
    return value


def _require_known(table: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
    for key in table:
        if key not in known:
            raise ValueError(f"{where}: unknown key {key!r} ({_closest(key, known)}).")


def _closest(name: str, known: typing.Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=2, cutoff=0.5)
    return f"closest: {', '.join(close)}" if close else f"known: {', '.join(known)}"


def in_home(path: str) -> str:
    """Return a path with a leading ``~/`` as the home folder, as shells have it."""
    return str(Path.home() / path[2:]) if path.startswith("~/") else path


def _elsewhere(path: str) -> bool:
    """Return whether a path is an address or a name on a hub, not a place on this disk."""
    return "://" in path or path.startswith(("hf:", "minari:"))
