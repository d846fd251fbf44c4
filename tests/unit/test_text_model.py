"""Text models: trained on a mixture's text by its weights, taken only where they lose nothing."""

from __future__ import annotations

import hashlib
import io
import json
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from gato import cli, presets
from gato.checkpoint import load_checkpoint
from gato.config import TrainConfig
from gato.corpora import CorpusConfig, open_corpus
from gato.envs.records import RecordWriter
from gato.fitting import make_serializer
from gato.record_corpus import RecordCorpus
from gato.text_model import (
    Texts,
    describe,
    equal_parts,
    read_text_model,
    train_on,
    weighted_shares,
)
from gato.tokenizers.serializer import Serializer
from gato.tokenizers.text import Text, train_text_model
from gato.train import train

from ..conftest import sentences


def corpus(folder: Path, name: str, texts: list[str], weight: float = 1.0) -> RecordCorpus:
    """Return a corpus of documents."""
    with RecordWriter(folder / name, name) as writer:
        for text in texts:
            writer.append({"kind": "document", "text": text})
    found = open_corpus(CorpusConfig(name, str(folder / name), weight), Serializer())
    assert isinstance(found, RecordCorpus)
    return found


# ---- which text is read ----------------------------------------------------------------------


def test_all_text_is_read_in_order_where_there_is_room(tmp_path):
    some = corpus(tmp_path, "some", [f"text {i}" for i in range(10)])
    assert list(Texts(some).part(1000)) == [f"text {i}" for i in range(10)]
    assert Texts(some).size(1000) == 60


def test_of_a_large_corpus_a_part_is_read_that_is_spread_over_it(tmp_path):
    many = corpus(tmp_path, "many", [f"{i:05d}" for i in range(2000)])
    part = list(Texts(many).part(500))
    assert sum(map(len, part)) == 500
    places = sorted(int(text) for text in part)
    assert len(set(places)) == 100
    gaps = [b - a for a, b in pairwise(places)]
    assert max(gaps) < 50  # 20 in the mean
    assert list(Texts(many).part(500)) == part
    assert Texts(many).size(500) == 500


@pytest.mark.parametrize("count", [1, 2, 3, 100, 101, 618])
def test_every_item_is_reached_before_one_comes_again(tmp_path, count):
    texts = [f"{i:03d}" * 40 for i in range(count)]
    some = Texts(corpus(tmp_path, "some", texts))
    assert sorted(some._spread()) == list(range(count))
    almost = sum(map(len, texts)) - 1  # one character too few for all of it
    assert sum(map(len, some.part(almost))) == almost


def test_of_long_items_parts_are_read_not_only_their_beginnings(tmp_path):
    texts = ["a" * 1000 + "b" * 1000 + "c" * 1000 for _ in range(50)]
    part = list(Texts(corpus(tmp_path, "long", texts)).part(1000))
    assert sum(map(len, part)) == 1000
    assert set("".join(part)) == set("abc")


class Endless(RecordCorpus):
    """A corpus of a million long records that are made as they are read."""

    def __init__(self, name: str, weight: float = 1.0) -> None:
        self.config = CorpusConfig(name, "nowhere", weight)
        self.reads = 0
        self.stores = [self]
        self.items = [range(1_000_000)]

    def __getitem__(self, i: int) -> dict[str, Any]:
        self.reads += 1
        return {"kind": "document", "text": f"{i} red ball " * 2000}


def test_no_more_is_read_or_kept_than_is_used():
    endless = Endless("endless")
    tracemalloc.start()
    count = sum(map(len, equal_parts([endless], 200_000)))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 200_000
    assert endless.reads <= 100
    assert peak < 2_000_000


def test_data_without_a_word_have_a_model_of_bytes(tmp_path):
    silent = corpus(tmp_path, "silent", ["", " "])
    text = Text(train_text_model(equal_parts([silent], 1000), 2048))
    assert 256 < text.vocabulary < 270
    assert text.decode(text.text_ids("go to Zürich"), {}) == "go to Zürich"


def test_episodes_give_instructions_words_and_actions_in_words(tiny: TrainConfig):
    grid = open_corpus(tiny.corpora[1], make_serializer(tiny))
    told = list(Texts(grid).part(10**6))
    assert {t for t in told if t} == {f"the {colour} door" for colour in ("red", "green", "blue")}
    arm = open_corpus(tiny.corpora[0], make_serializer(tiny))
    assert list(Texts(arm).part(10**6)) == ["go to the ball"] * 50


# ---- shares ----------------------------------------------------------------------------------


def test_shares_go_by_weight_and_what_one_lacks_goes_to_the_others(tmp_path):
    small = corpus(tmp_path, "small", ["x" * 90], weight=6.0)
    large = corpus(tmp_path, "large", ["y" * 10] * 1000, weight=3.0)
    larger = corpus(tmp_path, "larger", ["z" * 10] * 1000, weight=1.0)
    assert weighted_shares([large, larger], 1000) == [750, 250]
    assert weighted_shares([small, large, larger], 1090) == [90, 750, 250]
    assert weighted_shares([small, large, larger], 10**6) == [90, 10_000, 10_000]
    assert weighted_shares([small], 10) == [10]


def test_a_model_is_trained_on_shares_of_characters(tmp_path):
    lines = sentences()
    ours = corpus(tmp_path, "ours", lines, weight=3.0)
    theirs = corpus(tmp_path, "theirs", [line.upper() for line in lines], weight=1.0)
    model, told = train_on([ours, theirs], 340, 4000)
    assert [row["characters"] for row in told] == [3000, 1000]
    assert [row["share"] for row in told] == [0.75, 0.25]
    assert Text(model).vocabulary <= 340
    assert train_on([ours, theirs], 340, 4000)[0] == model
    more = train_on([replaced(ours, 1.0), replaced(theirs, 3.0)], 340, 4000)[0]
    # three times as likely, or nearly, is the letter of the heavier corpus
    assert score(model, "d") > score(model, "D") + 0.5
    assert score(more, "D") > score(more, "d") + 0.5


def score(model: bytes, piece: str) -> float:
    """Return a piece's log probability."""
    processor = Text(model).processor
    return float(processor.get_score(processor.piece_to_id(piece)))


def replaced(of: RecordCorpus, weight: float) -> RecordCorpus:
    return RecordCorpus(replace(of.config, weight=weight), of.stores, of.serializer)


def test_corpora_without_text_are_refused(tmp_path, tiny):
    silent = corpus(tmp_path, "silent", [""])
    with pytest.raises(ValueError, match=r"corpora with text.*silent hold none"):
        train_on([silent], 300, 1000)


# ---- the command -----------------------------------------------------------------------------


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    corpus(tmp_path, "lines", sentences())
    return tmp_path / "lines"


def test_the_command_writes_a_model_that_train_takes(lines, tiny, tmp_path, capsys, monkeypatch):
    out = tmp_path / "words.model"
    words = ["data", "text-model", "--data", f"lines={lines}:2", "--pieces", "300"]
    assert cli.main([*words, "--out", str(out), "--json"]) == cli.DONE
    told = json.loads(capsys.readouterr().out)
    digest = hashlib.sha256(out.read_bytes()).hexdigest()
    assert told["model"].startswith(f"sha256 {digest[:12]}, ")
    (row,) = told["corpora"]
    assert (row["corpus"], row["weight"], row["share"]) == ("lines", 2.0, 1.0)
    whole = sum(map(len, sentences()))
    assert 0.9 * whole < row["characters"] < whole  # what gato train holds out is not read
    again = tmp_path / "again.model"
    assert cli.main([*words, "--out", str(again)]) == cli.DONE
    assert again.read_bytes() == out.read_bytes()
    assert digest[:12] in capsys.readouterr().out

    monkeypatch.setitem(presets.PRESETS, "tiny", lambda: replace(tiny, steps=2))
    run = tmp_path / "run"
    training = ["train", "tiny", "--data", f"lines={lines}", "--out", str(run), "--text-model"]
    assert cli.main([*training, str(out)]) == cli.DONE
    kept = load_checkpoint(run).serializer.state()["text"]["text.model"]
    assert kept == out.read_bytes()
    assert cli.main([*training, str(out)]) == cli.DONE  # the same one goes on


def test_a_mixture_gives_text_by_its_weights(tmp_path, capsys):
    corpus(tmp_path, "lines", sentences())
    corpus(tmp_path, "loud", [line.upper() for line in sentences()])
    mixture = tmp_path / "mixture.toml"
    mixture.write_text(
        '[corpora.lines]\npath = "lines"\nweight = 3.0\n'
        '[corpora.loud]\npath = "loud"\nweight = 1.0\n'
    )
    out = tmp_path / "words.model"
    words = ["data", "text-model", "--mixture", str(mixture), "--pieces", "340"]
    words += ["--characters", "4000", "--out", str(out), "--json"]
    assert cli.main(words) == cli.DONE
    rows = json.loads(capsys.readouterr().out)["corpora"]
    assert {row["corpus"]: row["characters"] for row in rows} == {"lines": 3000, "loud": 1000}
    assert read_text_model(out) == out.read_bytes()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--pieces", "300", "--out", "x.model"], "--data NAME=PATH or --mixture FILE"),
        (["--data", "a=b", "--out", "x.model"], "--pieces"),
        (["--data", "a=/nowhere", "--pieces", "300", "--out", "x.model"], "/nowhere"),
        (["--data", "a=b", "--pieces", "300", "--out", "/nowhere/x.model"], "folder that exists"),
        (["--data", "a=b", "--pieces", "0", "--out", "x.model"], "1 or more"),
    ],
)
def test_bad_input_is_told(words, told, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["data", "text-model", *words]) == cli.BAD_INPUT
    assert told in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_too_little_text_leaves_no_file(tmp_path, capsys):
    corpus(tmp_path, "few", [f"a b {i % 3}" for i in range(60)])
    out = tmp_path / "x.model"
    words = ["data", "text-model", "--data", f"few={tmp_path / 'few'}", "--pieces", "100"]
    assert cli.main([*words, "--out", str(out)]) == cli.BAD_INPUT
    said = capsys.readouterr().err
    assert "expected at least 263 pieces for this text" in said
    assert "got 100. Ask for more pieces" in said
    assert "INTERNAL" not in said
    assert not out.exists()
    words[-1] = "262"
    assert cli.main([*words, "--out", str(out)]) == cli.BAD_INPUT
    words[-1] = "263"
    assert cli.main([*words, "--out", str(out)]) == cli.DONE
    capsys.readouterr()


def test_fewer_pieces_than_were_asked_for_are_told(tmp_path, capsys, tiny):
    corpus(tmp_path, "few", [f"a b {i % 3}" for i in range(60)])
    words = ["data", "text-model", "--data", f"few={tmp_path / 'few'}", "--pieces", "4000"]
    assert cli.main([*words, "--out", str(tmp_path / "x.model")]) == cli.DONE
    found = Text((tmp_path / "x.model").read_bytes()).vocabulary
    told = f"text model: 4,000 pieces were asked for, the text gives {found}"
    assert told in capsys.readouterr().err
    config = replace(tiny, corpora=(CorpusConfig("few", str(tmp_path / "few")),), text_pieces=4000)
    make_serializer(config)
    assert capsys.readouterr().err == f"{told}\n"
    make_serializer(replace(config, text_pieces=found))
    assert capsys.readouterr().err == ""


# ---- models made elsewhere -------------------------------------------------------------------

LOSSLESS = {
    "byte_fallback": True,
    "normalization_rule_name": "identity",
    "add_dummy_prefix": False,
    "remove_extra_whitespaces": False,
}


def foreign(path: Path, kind: str = "unigram", **options: Any) -> Path:
    """Return a file with a model of SentencePiece's own making."""
    content = io.BytesIO()

    def words() -> Iterator[str]:
        yield from sentences()

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=words(),
        model_writer=content,
        vocab_size=330,
        model_type=kind,
        hard_vocab_limit=kind == "bpe",
        minloglevel=2,
        num_threads=1,
        **options,
    )
    path.write_bytes(content.getvalue())
    return path


@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_a_model_with_bytes_that_changes_nothing_is_taken(tmp_path, kind, prefix):
    # with <s>, </s> of its own; a space that it puts before a text is taken away again
    file = foreign(tmp_path / "x.model", kind, **{**LOSSLESS, "add_dummy_prefix": prefix})
    assert read_text_model(file) == file.read_bytes()
    text = Text(file.read_bytes())
    assert text.pieces.prefixed is prefix
    theirs = sentencepiece.SentencePieceProcessor(model_proto=file.read_bytes())
    assert text.text_ids("the red ball").tolist() == theirs.encode("the red ball")
    for string in ("", " ", " a", "  a ", "a\u2581b", "\u2581", "</s> a"):
        assert text.decode(text.text_ids(string), {}) == string


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"byte_fallback": False}, "byte_fallback=True"),
        ({"normalization_rule_name": "nmt_nfkc"}, "normalization_rule_name=identity"),
        ({"remove_extra_whitespaces": True}, "remove_extra_whitespaces=False"),
    ],
)
def test_a_model_that_loses_something_is_refused_naming_what_is_missing(tmp_path, changed, told):
    file = foreign(tmp_path / "x.model", **{**LOSSLESS, **changed})
    with pytest.raises(ValueError, match=r"gives back every string as it was; .* does not") as e:
        read_text_model(file)
    wanted = {
        f"{k}={v}" if k != "normalization_rule_name" else f"{k}=identity"
        for k, v in LOSSLESS.items()
    }
    assert {w for w in wanted if w in str(e.value)} == {told}


def test_a_run_takes_no_model_that_loses_something(tiny, tmp_path):
    file = foreign(tmp_path / "x.model", **{**LOSSLESS, "byte_fallback": False})
    with pytest.raises(ValueError, match=r"text_model does not\. It needs byte_fallback=True"):
        train(tiny, tmp_path / "run", text_model=file.read_bytes())
    assert not (tmp_path / "run").exists()


def test_a_file_that_holds_no_model_is_refused(tmp_path):
    for content in (b"", b"no model", b"\x0a\x05<unk>"):
        (tmp_path / "x.model").write_bytes(content)
        with pytest.raises(ValueError, match=r"x\.model"):
            read_text_model(tmp_path / "x.model")
    with pytest.raises(ValueError, match=r"a \.model file.*found none"):
        read_text_model(tmp_path)


def test_another_model_than_the_checkpoints_is_refused(tiny, tmp_path, text_model):
    tiny = replace(tiny, steps=1)
    saved = train(tiny, tmp_path, device="cpu")
    own = load_checkpoint(saved).serializer.state()["text"]["text.model"]
    with pytest.raises(ValueError, match="expected the text model of") as error:
        train(tiny, tmp_path, text_model=text_model)
    for model in (own, text_model):
        assert describe(model) in str(error.value)
    assert describe(own) != describe(text_model)
    assert train(tiny, tmp_path, text_model=own) == saved


def test_long_lines_are_learned_from_too():
    """SentencePiece itself leaves out lines of more than 4192 bytes."""
    words = " ".join(sentences())
    assert len(words) > 4192
    assert Text(train_text_model([words], 300)).vocabulary > 256 + 20
    text = Text(train_text_model(["xyz" * 5000, *sentences()], 330))
    assert not any(text.processor.is_byte(int(i)) for i in text.text_ids("xyz"))
