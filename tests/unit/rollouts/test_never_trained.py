"""Records that a checkpoint was trained on are not measured, wherever they lie."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from language_records import caption, store, talk

from gato.contents import digests
from gato.corpus_config import CorpusConfig
from gato.envs.corpora import registry as corpora
from gato.envs.episode import EVALUATION_SEED_START
from gato.envs.files import stores_below
from gato.envs.records import RecordStore
from gato.rollouts.language_tasks import records_of
from gato.rollouts.never_trained import identity
from gato.selection import held_out

SEED = EVALUATION_SEED_START


def trained(on: Path, validation: float) -> SimpleNamespace:
    config = CorpusConfig("mine", str(on), validation=validation)
    stores = [RecordStore(place) for place in stores_below(on)]
    known, count = digests(stores), sum(map(len, stores))
    sizes = dict(zip(known, map(len, stores), strict=True))
    contents = {"records": count - 1, "held_out": 1, "stores": known, "sizes": sizes}
    return SimpleNamespace(
        data={"mine": contents}, config=SimpleNamespace(corpora=(config,)), path="nowhere"
    )


def test_what_was_trained_on_is_not_evaluated(tmp_path: Path) -> None:
    texts = [caption(i, f"{word} {i}") for i in range(40) for word in ("one", "two")]
    folder = store(tmp_path / "s", texts)
    task = f"caption/{folder}"
    with pytest.raises(ValueError, match=r"not trained on; those at .* were, all of them"):
        records_of(task, SEED, None, trained(folder, 0.0))
    found = records_of(task, SEED, None, trained(folder, 0.25))
    assert len(found.records) == 10
    assert "only the 20 of its 80 records" in found.notes[0]


@pytest.mark.parametrize(("then", "now"), [("a", "b"), ("a (x)", "a"), ("a (2)", "a (2)")])
def test_what_is_held_out_goes_by_the_name_that_was_trained_on(
    tmp_path: Path, then: str, now: str
) -> None:
    texts = [caption(i, f"one {i}") for i in range(40)]
    checkpoint = trained(store(tmp_path / "s", texts, then), 0.25)
    out = [identity(texts[i]) for i in np.flatnonzero(held_out(40, 0.25, then))]
    copy = store(tmp_path / "t", texts, now)
    found = records_of(f"caption/{copy}", SEED, None, checkpoint).records
    assert [identity(record) for record in found] == out


def test_copies_of_what_was_trained_on_are_left_out(tmp_path: Path) -> None:
    texts = [caption(i, f"{word} of {i % 2}") for i in range(40) for word in ("one", "two")]
    folder = store(tmp_path / "s", texts)
    some = store(tmp_path / "some", texts[:6])
    with pytest.raises(ValueError, match=r"not trained on; those at .*some were, all of them"):
        records_of(f"caption/{some}", SEED, None, trained(folder, 0.0))
    new = [caption(i, f"one of {i % 2}") for i in range(50, 54)]  # other pictures, the same words
    meta = [{**record, "meta": {"source": "else"}} for record in texts[:6]]
    mixed = store(tmp_path / "mixed", [*meta, *new, talk("one of 0", "two")], "other")
    found = records_of(f"caption/{mixed}", SEED, None, trained(folder, 0.0))
    assert [identity(r) for r in found.records] == [identity(r) for r in new]
    assert "6 of the 11 records" in found.notes[0]
    assert "as corpus 'mine'" in found.notes[0]
    assert len(records_of(f"chat/{mixed}", SEED, None, trained(folder, 0.0)).records) == 1
    held = records_of(f"caption/{folder}", SEED, None, trained(folder, 0.25)).records
    copies = [r for r in texts if any((r["image"] == h["image"]).all() for h in held)]
    again = store(tmp_path / "held", [*copies, texts[0], texts[1]], "copies")
    found = records_of(f"caption/{again}", SEED, None, trained(folder, 0.25)).records
    assert len(found) == len({identity(r) for r in held}) == 10, "held out there, held out here"


def test_of_what_others_learnt_that_it_began_with_copies_are_not_known(tmp_path: Path) -> None:
    texts = [caption(i, f"one {i}") for i in range(8)]
    folder, some = store(tmp_path / "s", texts), store(tmp_path / "some", texts[:3])
    checkpoint = trained(folder, 0.0)
    checkpoint.data = {"mine of before": {**checkpoint.data["mine"], "validation": 0.0}}
    with pytest.raises(ValueError, match="were, all of them, as corpus 'mine of before'"):
        records_of(f"caption/{folder}", SEED, None, checkpoint)
    found = records_of(f"caption/{some}", SEED, None, checkpoint)
    assert len(found.records) == 3
    (note,) = found.notes
    assert "known as whole stores alone: mine of before" in note


def test_records_made_anew_are_looked_up_as_those_of_a_store(tmp_path: Path) -> None:
    folder = store(tmp_path / "s", list(corpora.records("digits", "heldout", 0)))
    every = "those of the corpus 'digits' were, all of them, as corpus 'mine'"
    with pytest.raises(ValueError, match=every):
        records_of("caption/digits", SEED, None, trained(folder, 0.0))
    half = trained(folder, 0.25)
    found, held = (records_of(f"caption/{w}", SEED, 364, half) for w in ("digits", folder))
    assert len(found.records) == 91
    assert {identity(r) for r in found.records} == {identity(r) for r in held.records}
    assert found.notes == [
        "273 of the 364 records of the corpus 'digits' were trained on, as corpus 'mine': they are "
        "left out",
        "caption/digits has 91 different records, not the 364 asked for",
    ]
    other = records_of("classify/shapes", SEED, 20, half)
    assert (len(other.records), other.notes) == (20, [])
    shutil.rmtree(folder)
    (config,), names = half.config.corpora, "abc"
    half.config.corpora = [replace(config, name=name) for name in names]
    half.data = dict.fromkeys(names, half.data["mine"])
    told = records_of("caption/digits", SEED, 20, half)
    assert len(told.records) == 20
    assert "of the corpus 'digits' were trained on is not known" in told.notes[0]
    assert told.notes[0].endswith(f"'a' ({folder}), 'b' ({folder}) and 1 more")


def test_a_store_that_has_grown_is_known_by_its_place(tmp_path: Path) -> None:
    texts = [caption(i, f"one {i}") for i in range(40)]
    folder = store(tmp_path / "s", texts)
    first, half = trained(folder, 0.0), trained(folder, 0.25)
    held = records_of(f"caption/{folder}", SEED, None, half).records
    store(folder, [*texts, *(caption(i, f"one {i}") for i in range(40, 50))])
    with pytest.raises(ValueError, match=r"not trained on; those at .* were, all of them"):
        records_of(f"caption/{folder}", SEED, None, first)
    found = [identity(r) for r in records_of(f"caption/{folder}", SEED, None, half).records]
    assert found[:10] == [identity(r) for r in held]
    assert 11 <= len(found) <= 13
    told = records_of(f"caption/{folder}", SEED, None, half).notes[0]
    assert "has grown since: only the" in told
    del half.data["mine"]["sizes"]  # as older ones were written
    assert len(records_of(f"caption/{folder}", SEED, None, half).records) == len(found)
    other = store(tmp_path / "t", texts[:6])
    told = records_of(f"caption/{other}", SEED, None, first).notes
    assert "is not known: these corpora are not where they were, or hold more" in told[0]
    assert told[0].endswith(f"'mine' ({folder})")


ALIKE = [caption(i, "one") for i in range(40)]


@pytest.mark.parametrize(
    "now",
    [
        [*ALIKE[20:], *ALIKE[:20]],  # words and numbers of images are as they were
        [talk("what?", f"one {i}") for i in range(39, -1, -1)],
        [*ALIKE[:39], caption(40, "one")],
        ALIKE[:39],
        [*ALIKE[1:], *ALIKE],
    ],
)
def test_a_store_that_was_written_anew_is_refused(tmp_path: Path, now: list[dict]) -> None:
    folder = store(tmp_path / "s", ALIKE)
    checkpoints = trained(folder, 0.25), trained(folder, 0.0)
    store(folder, now)
    for checkpoint in checkpoints:
        with pytest.raises(ValueError, match=r"have changed since corpus 'mine' was read there"):
            records_of(f"{'chat' if len(now[0]) == 2 else 'caption'}/{folder}", SEED, 9, checkpoint)


def test_of_several_stores_each_is_known_to_have_grown(tmp_path: Path) -> None:
    texts = [caption(i, f"one {i}") for i in range(50)]
    store(tmp_path / "s" / "a", texts[:20], "a")
    grown = store(tmp_path / "s" / "b", texts[20:40], "b")
    checkpoint = trained(tmp_path / "s", 0.25)
    beside = store(tmp_path / "s" / "c", texts[38:46], "c")
    found = records_of(f"caption/{beside}", SEED, None, checkpoint)
    assert len(found.records) in (6, 7, 8)
    assert "trained on" in found.notes[0], "it is none of those that were read"
    store(grown, texts[20:], "b")
    assert "has grown since" in records_of(f"caption/{grown}", SEED, None, checkpoint).notes[0]
    with pytest.raises(ValueError, match="have changed since"):  # for all that is known
        records_of(f"caption/{beside}", SEED, None, checkpoint)
    del checkpoint.data["mine"]["sizes"]
    with pytest.raises(ValueError, match="have changed since"):
        records_of(f"caption/{grown}", SEED, None, checkpoint)
