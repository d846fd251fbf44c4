"""The wheel: everything of ours, under the one name gato."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
FOLDERS = ("gato", "tokenizers", "envs", "rollouts")
RESULTS = ROOT / "rollouts" / "results"
"""The lab log and the records behind the README's figures: not for an installed package."""


def ours() -> set[str]:
    """Return the names in the wheel of every file of ours."""
    names = set()
    for folder in FOLDERS:
        prefix = "" if folder == "gato" else "gato/"
        paths = (ROOT / folder).iterdir() if folder == "gato" else (ROOT / folder).rglob("*")
        names |= {
            prefix + p.relative_to(ROOT).as_posix()
            for p in paths
            if p.is_file() and p.suffix != ".pyc" and RESULTS not in p.parents
        }
    return names | {f"gato/mixtures/{p.name}" for p in (ROOT / "gato" / "mixtures").iterdir()}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the sdist of a copy of the sources, and the wheel built from it."""
    root = tmp_path_factory.mktemp("build")
    source, dist = root / "source", root / "dist"
    source.mkdir()
    dist.mkdir()
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, source / folder, symlinks=True, ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build(source, "sdist", dist)
    with tarfile.open(next(dist.glob("*.tar.gz"))) as archive:
        archive.extractall(root, filter="data")
    build(next(root.glob("gato-*")), "wheel", dist)
    return dist


def build(source: Path, kind: str, out: Path) -> None:
    """Build the sdist or the wheel of a source folder."""
    code = f"from setuptools import build_meta; build_meta.build_{kind}({str(out)!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    return next(built.glob("*.whl"))


def test_the_only_top_level_name_is_gato(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {n.split("/")[0] for n in names if ".dist-info/" not in n} == {"gato"}


def test_nothing_is_left_out(wheel):
    names = {n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n}
    assert names == ours()


def test_it_runs_from_its_own_files(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    code = (
        "import gato, json, sys; from gato.cli import main; import gato.rollouts.agent;"
        f"assert gato.__file__.startswith({str(tmp_path)!r});"
        "from gato.tokenizers.modality import modality_classes;"
        "print(sorted(modality_classes()))"
    )
    # -S -I would hide the dependencies; the wheel only has to come first
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    from gato.tokenizers.modality import modality_classes

    assert json.loads(done.stdout.replace("'", '"')) == sorted(modality_classes())
