"""`gato train` takes what it is told, or says what is wrong with it before anything is made."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path

import pytest

from gato import cli, run_commands
from gato.arguments import RUN_FIELDS
from gato.config import TrainConfig
from gato.corpora import CorpusConfig
from gato.envs.readers.formats import READERS
from gato.optim import OptimConfig
from gato.options import FORMATS
from gato.presets import PAPER_PARAMETERS, PRESETS, preset, with_data


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[TrainConfig]:
    """Return the runs that would have been trained."""
    runs: list[TrainConfig] = []
    monkeypatch.setattr(run_commands, "_train", lambda config, *_: runs.append(config))
    return runs


def mixture(folder: Path, text: str) -> Path:
    file = folder / "mine.toml"
    file.write_text(text)
    return file


def test_overrides_reach_the_corpora_that_are_given(asked, stores):
    data = [f"talks={stores / 'talks'}", f"arm={stores / 'arm'}:2"]
    more = ["--corpora.0.loss-weight", "3", "--corpora.1.window", "5", "--steps", "7"]
    assert cli.main(["train", "quickstart", "--data", *data, *more, "--seed", "4"]) == cli.DONE
    (run,) = asked
    assert [(c.name, c.loss_weight, c.window) for c in run.corpora] == [
        ("talks", 3.0, 0),
        ("arm", 1.0, 5),
    ]
    assert (run.steps, run.seed, run.corpora[1].weight) == (7, 4, 2.0)


def test_overrides_reach_a_mixture_and_what_is_added_to_it(asked, stores, tmp_path):
    text = f'weigh = "samples"\n[corpora.words]\npath = "{stores / "words"}"\n'
    command = ["train", "quickstart", "--mixture", str(mixture(tmp_path, text))]
    command += ["--data", f"arm={stores / 'arm'}"]
    more = ["--corpora.0.loss-weight", "2", "--corpora.1.loss-weight", "3", "--draw", "random"]
    assert cli.main([*command, *more]) == cli.DONE
    (run,) = asked
    assert [(c.name, c.loss_weight) for c in run.corpora] == [("words", 2.0), ("arm", 3.0)]
    assert (run.weigh, run.draw) == ("samples", "random")


@pytest.mark.parametrize("field", ["loss_weight", "temperature"])
@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_numbers_of_a_corpus_are_checked(field, value):
    with pytest.raises(ValueError, match=f"corpus 'a': {field} must be a number of at least 0"):
        CorpusConfig("a", "b", **{field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("lr", -1e-3), ("lr", 0.0), ("lr", math.nan), ("lr", math.inf), ("weight_decay", -0.1)),
        *(("beta2", 1.0), ("clip", 0.0), ("warmup", -1), ("cooldown", 1.5), ("final", math.nan)),
    ],
)
def test_numbers_of_the_optimizer_are_checked(field, value):
    with pytest.raises(ValueError, match=rf"optim\.{field} must be .*; got"):
        OptimConfig(**{field: value})


@pytest.mark.parametrize("add", [False, True])
def test_a_name_that_is_given_twice_is_an_error(tiny, add):
    with pytest.raises(ValueError, match=r"corpora need different names; got \['x', 'x'\]"):
        with_data(replace(tiny, corpora=()), ["x=a", "x=b"], add=add)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--optm.lr", "3"], "there is no --optm.lr, 3 - perhaps you meant --optim.lr FLOAT"),
        (["--optim.lr", "x"], "--optim.lr: could not convert string to float: 'x' It is"),
        (["--optim.lr", "-1"], "gato: optim.lr must be above 0; got -1.0"),
        (["--rows", "5", "--parts", "2"], "gato: rows must be a multiple of parts; got 5 rows in"),
        (["--corpora.0.loss-weight", "nan"], "gato: corpus 'arm': loss_weight must be a number"),
    ],
)
def test_what_is_wrong_with_an_override_is_a_sentence(asked, stores, capsys, more, message):
    command = ["train", "quickstart", "--data", f"arm={stores / 'arm'}"]
    assert cli.main([*command, *more]) == cli.BAD_INPUT
    said = capsys.readouterr().err
    assert message in said
    assert not any(w in said for w in ("Value error", "Unrecognized", "TrainConfig", "full help"))
    assert not asked


def test_the_help_tells_the_fields_as_they_are(capsys, monkeypatch):
    run = replace(preset("quickstart"), corpora=(CorpusConfig("a", "b"),))
    told = dict(re.findall(r"--([a-z0-9.-]+).*\(([^)]*)\)", RUN_FIELDS))
    assert (told.pop("validate-every"), run.validate_every) == ("as --save-every", 0)
    assert (told.pop("eval-tasks"), run.eval_tasks) == ("none", ())
    assert (told.pop("freeze"), run.freeze) == (told.pop("optim.rates"), ()) == ("none", ())
    assert run.optim.rates == {}
    assert len(told) == 14
    for name, value in told.items():
        found = run
        for part in name.replace("-", "_").split("."):
            found = found[int(part)] if part.isdecimal() else getattr(found, part)
        assert str(found) == value.split(":")[0], name
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    said = capsys.readouterr().out
    assert RUN_FIELDS in said
    steps = {name: preset(name).steps for name in PRESETS}
    (others,) = {steps.pop(name) for name in PAPER_PARAMETERS}
    named = ", ".join(f"{name} {count}" for name, count in steps.items())
    assert f"({named}, others {others})" in " ".join(said.split())
    monkeypatch.setenv("COLUMNS", "80")  # one column of fields, whatever the terminal
    assert cli.main(["train", "quickstart", "--fields", "--rows", "3"]) == cli.DONE
    said = " ".join(capsys.readouterr().out.split())
    assert re.search(r"--rows INT Rows per batch[^()]* \(default: 3\)", said)
    assert "--optim.lr FLOAT" in said


@pytest.mark.parametrize("action", ["import", "info", "validate"])
def test_the_help_lists_the_formats(action, capsys):
    assert list(READERS) == list(FORMATS)
    with pytest.raises(SystemExit):
        cli.main(["data", action, "--help"])
    assert ", ".join(FORMATS) in " ".join(capsys.readouterr().out.split())


def test_a_folder_that_cannot_be_made_is_told_before_anything_else(asked, stores, tmp_path, capsys):
    data = f"arm={stores / 'arm'}"
    assert cli.main(["train", "quickstart", "--data", data, "--out", "/proc/x"]) == cli.BAD_INPUT
    told = "expected a folder for the run that can be written; got /proc/x (No such file"
    assert told in capsys.readouterr().err
    text = tmp_path / "a.txt"
    text.write_text("a ball")
    assert cli.main(["data", "import", str(text), "--out", "/proc/x/y"]) == cli.BAD_INPUT
    assert "expected a folder for stores that can be written" in capsys.readouterr().err
    assert (
        cli.main(["train", "quickstart", "--data", data, "--out", str(tmp_path / "new/run")]) == 0
    )
    assert len(asked) == 1
    assert not (tmp_path / "new").exists()
