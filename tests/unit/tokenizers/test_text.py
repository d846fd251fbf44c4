"""Any string comes back exactly as it was, whatever the text model was trained on."""

from __future__ import annotations

from itertools import chain, repeat

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gato.tokenizers.serializer import Serializer
from gato.tokenizers.text import Text, train_text_model

STRINGS = st.text(max_size=60)  # every code point but lone surrogates
SIGN = "\u2581"  # SentencePiece writes a space so


@pytest.fixture(scope="module")
def text(text_model: bytes) -> Text:
    return Text(text_model)


@given(st.one_of(STRINGS, st.text("\u2581 a\0\n\t\re\u0301", max_size=20)))
@example("")
@example(" ")
@example("  two  spaces  ")
@example(SIGN)
@example(f" {SIGN} a{SIGN}{SIGN}b ")
@example("\0")
@example("a\0b\n\r\n\tc")
@example("e\u0301 is not \u00e9, nor \ufb01 fi")
@example("\U0001f469\u200d\U0001f680 \U0001f1eb\U0001f1f7 \u202eabc\u202c \ufeff")
@example("<s> </s> <unk> <bos> <0x41>")
@example("the red ball \ufffd")
def test_any_string_comes_back(text, string):
    ids = text.text_ids(string)
    assert len(ids) == 0 or 0 <= ids.min() <= ids.max() < text.vocabulary
    assert text.decode(ids, {}) == string


@given(STRINGS)
def test_every_string_of_a_run_has_the_same_tokens(text, string):
    segment = text.encode([string] * 3, {})
    assert segment.ids.shape == (3, len(text.text_ids(string)))
    assert (segment.ids == segment.ids[0]).all()


def test_known_words_take_fewer_tokens_than_bytes(text):
    sentence = "go to the red ball"
    assert len(text.text_ids(sentence)) < len(sentence)


def test_training_is_deterministic(text_model):
    lines = [f"line {i % 50} of the text\nand another {i}" for i in range(500)]
    first, second = (train_text_model(iter(lines), 280, seed=3) for _ in range(2))
    assert first == second
    assert train_text_model(chain(lines, repeat("\0", 3)), 280, seed=3)


def test_what_is_no_text_is_refused(text):
    with pytest.raises(TypeError, match="text must be a str; got bytes"):
        text.text_ids(b"abc")
    with pytest.raises(ValueError, match="valid Unicode"):
        text.text_ids("\ud800")
    with pytest.raises(ValueError, match="no SentencePiece model yet"):
        Text().text_ids("abc")
    with pytest.raises(ValueError, match="Give more text or another size") as caught:
        train_text_model([], 300)
    assert not any(w in str(caught.value) for w in ("INTERNAL", "src/", ".cc"))


def test_a_ledger_of_another_text_model_is_refused(serializer, text_model):
    other = train_text_model([f"{i} other words {i}" for i in range(99)], 280)
    with pytest.raises(ValueError, match="use the text model that the checkpoint was trained with"):
        Serializer(state={"text": {"text.model": other}}, layout=serializer.layout)
