"""The README: its file tree is the repository's, and its commands are ours."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from gato.cli import COMMANDS, _parser

ROOT = Path(__file__).parents[3]
README = (ROOT / "README.md").read_text()
FOLDERS = ("gato", "tokenizers", "envs", "rollouts")


def blocks(language: str) -> list[str]:
    """Return the fenced blocks of a language."""
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def tree() -> set[str]:
    """Return the paths that the file tree of the README names."""
    (block,) = (b for b in blocks("text") if b.startswith("envs/"))
    paths, folders = set(), []
    for line in block.splitlines():
        if not line.strip():
            continue
        name = line.split()[0]
        depth = (len(line) - len(line.lstrip())) // 2
        folders = folders[:depth]
        if name.endswith("/"):
            folders.append(name)
        paths.add("".join([*folders, "" if name.endswith("/") else name]))
    return paths


def test_the_file_tree_is_the_repository():
    told = tree()
    missing = {p for p in told if not (ROOT / p).exists()}
    assert not missing, f"the README names what does not exist: {sorted(missing)}"
    files = set()
    for folder in FOLDERS:
        found = (ROOT / folder).glob("*.py") if folder == "gato" else (ROOT / folder).rglob("*.py")
        files |= {p.relative_to(ROOT).as_posix() for p in found}
    untold = files - told
    assert not untold, f"the README's file tree leaves out {sorted(untold)}"


def commands() -> list[str]:
    """Return the lines of the README's shell blocks that call gato."""
    lines = "\n".join(blocks("bash")).replace("\\\n", " ").splitlines()
    parts = [part.strip() for line in lines for part in line.split("&&")]
    return [part for part in parts if part.startswith("gato ")]


@pytest.mark.parametrize("command", commands())
def test_every_command_parses(command):
    words = shlex.split(command, comments=True)[1:]
    chosen, rest = _parser().parse_known_args(words)
    assert chosen.command in COMMANDS
    assert not rest or chosen.command == "train"


def test_every_command_is_told():
    told = {shlex.split(c, comments=True)[1] for c in commands()}
    assert told == set(COMMANDS)


def test_the_two_commands_stand_first():
    shell = "\n".join(blocks("bash"))
    assert 'pip install -e ".[all]" && gato quickstart' in shell
    assert 'pip install -e ".[all,dev]" && pytest' in shell


def test_the_shell_command_of_ci_is_the_readmes():
    script = (ROOT / ".ci" / "run").read_text()
    assert 'pip install --quiet -e ".[all,dev]"' in script
    assert re.search(r"^pytest", script, re.MULTILINE)
