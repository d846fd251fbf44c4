"""Id ranges are disjoint and never move."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gato.tokenizers.vocabulary import CONTROL_TOKENS, VocabularyLayout

NAMES = st.sampled_from(["text", "continuous", "discrete", "codes", "series", "speech"])
SIZES = st.dictionaries(NAMES, st.integers(1, 3000), min_size=1)


@given(SIZES)
def test_no_two_modalities_share_an_id(sizes):
    layout = VocabularyLayout.build(sizes)
    owners = [layout.owner(i) for i in range(layout.size)]
    for name, size in sizes.items():
        start, stop = layout.span(name)
        assert stop - start == size
        assert owners[start:stop] == [name] * size
        assert owners.count(name) == size
    assert layout.size % 128 == 0
    assert all(owner is None for owner in owners[layout._used :])
    controls = [layout.control(token) for token in CONTROL_TOKENS]
    assert len(set(controls)) == len(controls)
    assert all(owners[c] == "control" for c in controls)


@given(SIZES, st.integers(1, 5000))
def test_appending_a_range_moves_nothing(sizes, size):
    layout = VocabularyLayout.build(sizes)
    longer = layout.append("new", size)
    for name in (*sizes, "control"):
        assert longer.span(name) == layout.span(name)
    for token in CONTROL_TOKENS:
        assert longer.control(token) == layout.control(token)
    start, stop = longer.span("new")
    assert start == layout._used
    assert stop - start == size
    assert longer.size >= stop


@given(SIZES)
def test_the_ledger_survives_its_file(sizes):
    layout = VocabularyLayout.build(sizes)
    assert VocabularyLayout.from_json(layout.to_json()) == layout


def test_order_is_gatos():
    layout = VocabularyLayout.build(
        {"zoo": 7, "discrete": 1024, "continuous": 1024, "text": 32_000}
    )
    assert layout.span("text") == (0, 32_000)
    assert layout.span("continuous") == (32_000, 33_024)
    assert layout.span("discrete") == (33_024, 34_048)


def test_what_is_unknown_or_twice_is_refused():
    layout = VocabularyLayout.build({"text": 10})
    with pytest.raises(ValueError, match=r"no ids are reserved for 'txt'; known: \['text'\]"):
        layout.start("txt")
    with pytest.raises(ValueError, match="control tokens are"):
        layout.control("<nothing>")
    with pytest.raises(ValueError, match="once each"):
        layout.append("text", 3)
    with pytest.raises(ValueError, match="not be empty"):
        layout.append("codes", 0)
