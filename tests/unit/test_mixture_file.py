"""Mixtures as files: what they say, what is wrong with them, and what is missing on disk."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from gato.cli import COMMANDS, _parser, main
from gato.config import TrainConfig
from gato.corpora import CorpusConfig
from gato.envs.readers.formats import READERS
from gato.mixture_file import (
    FOLDER,
    CorpusNote,
    missing,
    named,
    read_mixture,
    require_present,
    with_mixture,
)
from gato.presets import preset, with_data
from gato.world_commands import matching

GOOD = """
about = "two"
weigh = "samples"
[corpora.arm]
path = "data/arm"
weight = 2
window = 3
balance = 0.5
returns = true
min_fraction = 1
make = "gato collect 'x/*' --out {path}"
[corpora.words]
path = "/elsewhere/words"
"""


def written(folder: Path, text: str, name: str = "mine.toml") -> Path:
    file = folder / name
    file.write_text(text)
    return file


def test_a_file_is_read_and_paths_are_from_its_folder(tmp_path, tiny):
    mixture = read_mixture(written(tmp_path, GOOD))
    arm, words = mixture.corpora
    path = str(tmp_path / "data" / "arm")
    assert arm == CorpusConfig(
        "arm", path, 2.0, window=3, balance="0.5", returns=True, min_fraction=1.0
    )
    assert words == CorpusConfig("words", "/elsewhere/words")
    assert mixture.notes["arm"] == CorpusNote(make=f"gato collect 'x/*' --out {path}")
    assert (mixture.name, mixture.about) == ("mine", "two")
    config = with_mixture(tiny, mixture)
    assert (config.weigh, config.draw, config.corpora) == ("samples", "even", mixture.corpora)


@pytest.mark.parametrize("path", ["hf:some/name", "s3://bucket/data", "hf://datasets/a/b"])
def test_what_lies_elsewhere_keeps_its_address(tmp_path, path):
    mixture = read_mixture(written(tmp_path, f'[corpora.far]\npath = "{path}"\n'))
    assert mixture.corpora[0].path == path
    assert missing(mixture.corpora) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "[corpora.arm]\npath = 'a'\nweigth = 1",
            r"mine.toml: corpus 'arm': unknown key 'weigth' "
            r"\(closest: weight",
        ),
        ("wiegh = 'tokens'", r"unknown key 'wiegh' \(closest: weigh\)"),
        ("[corpora.arm]\npath = 'a'\nwindow = 1.5", r"'arm': window: expected int; got 1.5"),
        ("[corpora.arm]\npath = 'a'\nreturns = 1", r"'arm': returns: expected bool; got 1"),
        ("[corpora.arm]\npath = 'a'\nweight = true", r"'arm': weight: expected float; got True"),
        ("[corpora.arm]\npath = 'a'\ntop = 2.0", r"mine.toml: corpus 'arm': top must be above 0"),
        ("[corpora.arm]\npath = 'a'\nskip = 'x'", r"'arm': skip: expected a list of texts, .*'x'"),
        (
            "[corpora.arm]\npath = 'a'\nskip = [1]",
            r"'arm': skip: expected a list .*\[1\]",
        ),
        ("[corpora.arm]\nweight = 1", r"corpus 'arm': expected a path; got none"),
        ("[corpora]\narm = 3", r"corpus 'arm': expected a table \[corpora.arm\]; got 3"),
        ("about = 'none'", r"expected a table \[corpora.NAME\] for every corpus; got none"),
        ("about = 3\n[corpora.a]\npath='a'", r"mine.toml: about: expected text; got 3"),
        ("= 3", r"expected TOML in .*mine.toml; "),
    ],
)
def test_what_is_wrong_is_named(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        read_mixture(written(tmp_path, text))


def test_shards_to_skip_are_a_list(tmp_path):
    found = read_mixture(written(tmp_path, "[corpora.arm]\npath = 'a'\nskip = ['shard-0', 'b/c']"))
    assert found.corpora[0].skip == ("shard-0", "b/c")


def test_an_unknown_name_gets_the_closest(tmp_path):
    with pytest.raises(ValueError, match=r"got 'gato_papr' \(closest: gato_paper\)"):
        read_mixture("gato_papr")
    with pytest.raises(ValueError, match=r"mixture's file; there is no file .*none.toml. \(Mix.*"):
        read_mixture(tmp_path / "none.toml")
    with pytest.raises(ValueError, match=r"mixture's file; .* is a folder"):
        read_mixture(tmp_path)


def test_a_path_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    text = "[corpora.arm]\npath = '~/arm'\nmake = 'make {path}'\n[corpora.b]\npath = '~b'"
    mixture = read_mixture(written(tmp_path, text))
    assert [c.path for c in mixture.corpora] == [str(tmp_path / p) for p in ("me/arm", "~b")]
    assert mixture.notes["arm"].make == f"make {tmp_path / 'me' / 'arm'}"
    (corpus,) = with_data(preset("quickstart"), ["a=~/arm:2"]).corpora
    assert (corpus.path, corpus.weight) == (str(tmp_path / "me" / "arm"), 2.0)


def test_missing_data_do_not_speak_of_a_mixture(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "quickstart", "--data", "a=/nope"]) == 2
    said = capsys.readouterr().err
    assert "1 of 1 corpora are missing: a (nothing at /nope). Make them, or give the path" in said
    assert "mixture" not in said


def test_what_is_missing_is_named_at_once_with_what_makes_it(tmp_path):
    mixture = read_mixture(written(tmp_path, GOOD))
    assert [c.name for c in missing(mixture.corpora)] == ["arm", "words"]
    message = r"2 of 2 corpora are missing: arm \(nothing at .*arm; make it: gato collect .*words"
    with pytest.raises(ValueError, match=message):
        require_present(mixture.corpora, mixture.notes)
    (tmp_path / "data" / "arm").mkdir(parents=True)
    assert [c.name for c in missing(mixture.corpora)] == ["words"]


def test_data_adds_to_a_mixture_and_overrides_it(tiny):
    config = with_data(tiny, ["arm=/new", "more=/m:7"], add=True)
    names = [c.name for c in config.corpora]
    assert names == ["arm", "grid", "words", "pictures", "talks", "more"]
    arm, more = config.corpora[0], config.corpora[-1]
    assert (arm.path, arm.weight, arm.window) == ("/new", 3.0, 4)
    assert (more.path, more.weight) == ("/m", 7.0)
    assert [c.name for c in with_data(tiny, ["arm=/new"]).corpora] == ["arm"]


def test_the_named_mixtures_are_in_the_package():
    assert named() == ["gato_paper", "six_corpora"]
    assert all((FOLDER / f"{name}.toml").is_file() for name in named())


def test_the_papers_mixture_has_its_weights():
    mixture = read_mixture("gato_paper")
    weights = {c.name: c.weight for c in mixture.corpora}
    assert len(weights) == 24
    control = list(weights.values())[:16]
    # the paper rounds every row and says 85.3 and 14.7 in all
    assert sum(control) == pytest.approx(85.3, abs=0.15)
    assert sum(weights.values()) == pytest.approx(100, abs=0.15)
    assert weights["atari"] + weights["atari_extended"] == pytest.approx(19.5)
    about_pictures = ("align", "coco_captions", "conceptual_captions", "ltip", "okvqa", "vqav2")
    assert {c.name for c in mixture.corpora if c.pairs == 5} == set(about_pictures)
    assert (mixture.weigh, mixture.draw) == ("tokens", "even")
    for corpus in mixture.corpora:
        note = mixture.notes[corpus.name]
        assert note.paper
        assert note.substitute
        assert corpus.path in note.make
        assert corpus.path == f"data/gato_paper/{corpus.name}"


def made_by() -> list[tuple[str, str]]:
    """Return (corpus, command) of everything that makes a corpus of a named mixture."""
    found = []
    for name in named():
        for corpus, note in read_mixture(name).notes.items():
            line = note.make.replace("$task", "Ant").replace("; done", "")
            parts = line.replace(" do ", " && ").split(" && ")
            found += [(f"{name} {corpus}", p) for p in parts if p.startswith("gato ")]
    return found


def expand(word: str) -> list[str]:
    """Return what a shell makes of one {a,b,...} in a word."""
    before, brace, rest = word.partition("{")
    inside, _, after = rest.partition("}")
    return [f"{before}{x}{after}" for x in inside.split(",")] if brace else [word]


@pytest.mark.parametrize(("corpus", "command"), made_by(), ids=[c for c, _ in made_by()])
def test_every_command_that_makes_a_corpus_parses(corpus, command):
    words = [w for word in shlex.split(command)[1:] for w in expand(word)]
    chosen, rest = _parser().parse_known_args(words)
    assert chosen.command in COMMANDS
    assert not rest
    if chosen.command == "collect":
        assert matching(chosen.tasks)  # all of them are tasks
    if chosen.command == "data":
        assert chosen.format in (*READERS, "auto")


# ---- the command -----------------------------------------------------------------------------


def test_a_dry_run_lists_shares_and_what_is_missing(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "gato_79m", "--mixture", "gato_paper", "--dry-run", "10"]) == 2
    said, told = capsys.readouterr()
    assert "24 of 24 corpora are missing: dm_lab, " in told
    assert said.count("missing: ") == 24
    assert "missing: metaworld; make it: gato collect 'metaworld/*'" in said
    assert main(["train", "gato_79m", "--mixture", "gato_paper"]) == 2
    assert "24 of 24 corpora are missing: dm_lab (nothing at" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_dry_run_measures_shares(capsys, tmp_path, stores):
    text = "".join(
        f'[corpora.{n}]\npath = "{stores / n}"\nweight = {w}\n'
        for n, w in (("words", 1), ("talks", 3))
    )
    file = written(tmp_path, text)
    command = ["train", "quickstart", "--mixture", str(file), "--data", f"arm={stores / 'arm'}:4"]
    small = ["--text_pieces", "290", "--rows", "4"]
    assert main([*command, "--dry-run", "20000", "--json", *small]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["corpus"] for row in found["corpora"]] == ["words", "talks", "arm"]
    assert [row["share"] for row in found["corpora"]] == [0.125, 0.375, 0.5]
    assert found["draw"] == "even"
    drawn = found["drawn"]
    assert drawn["tokens"] >= 20000
    assert all(abs(row["drawn"] - row["wanted"]) < 0.02 for row in drawn["corpora"])
    assert main([*command, "--dry-run", "5000", *small]) == 0
    assert "tokens of seed 0 in" in capsys.readouterr().out


def test_presets_that_are_published_draw_as_they_did():
    assert preset("quickstart").draw == "random"
    assert preset("gato_79m").draw == "even"
    assert TrainConfig(preset("gato_79m").model).draw == "random"


def test_what_the_filters_leave_out_is_told(capsys, tmp_path, stores):
    text = f'[corpora.arm]\npath = "{stores / "arm"}"\nmin_return = 0.0\ntop = 0.25\n'
    command = ["train", "quickstart", "--mixture", str(written(tmp_path, text))]
    assert main([*command, "--dry-run", "1000", "--text_pieces", "270", "--rows", "4"]) == 0
    said = capsys.readouterr().out
    assert (
        "15 of 20 episodes of 'toy/arm-v0' are left out; asked for: a return of 0, the best 25%"
        in (said)
    )
