"""What the quickstart leaves to be tried: every picture that a command names is there."""

from __future__ import annotations

import io
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from gato import quickstart
from gato.cli import _parser
from gato.envs.corpora import registry
from gato.examples import SHAPES, write_pictures
from gato.report import show
from gato.terminal import read_image

README = (Path(__file__).parents[2] / "README.md").read_text()
TRIED = ("runs/quickstart", "runs/few_shot")


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("heldout")
    for name, count in (("digits", 30), ("scenes", 20), ("shapes", None)):
        registry.build(name, root / name, "heldout", count=count)
    return root


@pytest.fixture
def pictures(held_out: Path, tmp_path: Path) -> Path:
    write_pictures(held_out, tmp_path / "pictures")
    return tmp_path / "pictures"


def named(commands: str) -> set[str]:
    """Return the pictures that commands about what the quickstart has made take."""
    lines = (line.strip() for line in commands.replace("\\\n", " ").splitlines())
    gato = [shlex.split(line, comments=True) for line in lines if line.startswith("gato ")]
    words = [w for line in gato if any(x.startswith(TRIED) for x in line) for w in line]
    return {word.partition("=")[0] for word in words if ".png" in word}


def test_the_pictures_are_what_they_are_called(pictures: Path, held_out: Path) -> None:
    sizes = {path.name: read_image(path).shape[:2] for path in pictures.iterdir()}
    assert sizes["digit.png"] == sizes["three.png"] == (32, 32)
    assert sizes["scene.png"] == (48, 48)
    assert {sizes[f"tiny-{name}.png"] for name in ("a", "b", "new")} == {(16, 16)}
    assert len([name for name in sizes if name.startswith("shape-")]) == len(SHAPES) >= 5
    shown = read_image(pictures / "digit.png")
    fives = [r for r in registry.records("digits", "heldout") if r["meta"]["digit"] == 5]
    assert any(np.array_equal(shown, r["image"]) for r in fives)
    red, blue = (
        read_image(pictures / f"shape-{c}-circle.png").astype(int) for c in ("red", "blue")
    )
    assert (red[..., 0] - red[..., 2]).max() > 100 < (blue[..., 2] - blue[..., 0]).max()


def test_every_picture_that_the_readme_tries_is_written(pictures: Path) -> None:
    written = {f"runs/quickstart/pictures/{path.name}" for path in pictures.iterdir()}
    tried = named("\n".join(re.findall(r"```bash\n(.*?)```", README, re.DOTALL)))
    assert len(tried) >= 4
    assert tried <= written


def test_what_to_try_next_can_be_typed(pictures: Path) -> None:
    model = pictures.parent / "a model"
    result = {"tasks": {}, "language": {}, "checkpoint": str(model)}
    result["tasks"] = {
        quickstart.TASKS[0]: {
            **{"success_rate": 1.0, "random_score": 0.0, "expert_score": 1.0},
            "expert_normalised": 1.0,
        }
    }
    told = io.StringIO()
    show(result, Console(file=told, width=40))
    lines = [line.strip() for line in told.getvalue().splitlines() if line.startswith("  gato ")]
    chosen = [_parser().parse_args(shlex.split(line)[1:]) for line in lines]
    assert [c.command for c in chosen] == ["chat", "caption", "classify", "search", "eval", "show"]
    assert all(c.checkpoint == model for c in chosen[:-1])
    for path in (*chosen[1].images, *chosen[2].images, chosen[3].folder):
        assert path.exists()


def test_pictures_are_written_once_and_by_the_quickstart(
    pictures: Path, held_out: Path, monkeypatch
) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in pictures.iterdir()}
    (pictures / "three.png").unlink()
    (pictures / "scene.png").write_bytes(b"mine")
    made = quickstart.Quickstart(pictures.parent, 20.0, 0, print)
    monkeypatch.setattr(made, "held", held_out)

    class Reached(Exception):
        pass

    def stopped(*arguments: object) -> None:
        raise Reached

    monkeypatch.setattr("gato.rollouts.agent.Agent.load", stopped)
    with pytest.raises(Reached):
        made.evaluate()
    after = {path.name: path.stat().st_mtime_ns for path in pictures.iterdir()}
    assert before.keys() == after.keys()
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"three.png", "scene.png"}
    assert (pictures / "scene.png").read_bytes() == b"mine"
    Image.open(pictures / "three.png").load()
