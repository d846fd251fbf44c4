"""Text by SentencePiece with byte fallback, so that any string round-trips exactly.

A run that begins with the weights of a language model takes that model's own tokenizer instead: a
SentencePiece model or a ``tokenizer.json`` (see `hf_text.py`), whose ids are rows of its embedding.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import sentencepiece

from gato.tokenizers.hf_text import SPACE, HuggingFacePieces, ranges_of, require_whole
from gato.tokenizers.modality import Modality, Segment, Spec, register

_SPACE_BYTES = SPACE.encode()  # as which it is spelled where text holds it
MODEL_FILE = "text.model"
TOKENIZER_FILE = "tokenizer.json"
ABOUT_FILE = "text.json"
"""What a pretrained model says of its text: the rows of its embedding, and what else it has."""
TEXT_FILES = (MODEL_FILE, TOKENIZER_FILE, ABOUT_FILE)
"""The files of a text modality, which has the first or the second of them."""
_LONGEST = 1000  # characters of a line that the text model is trained on
_NO_PREFIX = b"\x1a\x02\x18\x00"
"""Appended to a SentencePiece model, which is a protocol buffer, this sets add_dummy_prefix to
false in its normalizer: the last value of a field counts."""


def train_text_model(texts: Iterable[str], size: int, *, seed: int = 0) -> bytes:
    """Return a SentencePiece unigram model of `size` pieces trained on `texts`.

    Args:
        texts: strings of any length; only as many as are needed are read.
        size: pieces, the 256 bytes included.
        seed: which sentences are sampled where there are many.

    Raises:
        ValueError: where the texts hold too little for a model of that size.
    """
    model = io.BytesIO()
    sentencepiece.set_random_generator_seed(seed)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_sentences(texts),
            model_writer=model,
            vocab_size=size,
            model_type="unigram",
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            bos_id=-1,
            eos_id=-1,
            pad_id=-1,
            character_coverage=0.9999,
            hard_vocab_limit=False,
            num_threads=1,
            minloglevel=2,
            input_sentence_size=200_000,
            shuffle_input_sentence=True,
        )
    except RuntimeError as error:
        raise ValueError(_why(str(error), size)) from error
    return model.getvalue()


def _why(said: str, size: int) -> str:
    """Return why there is no text model of so many pieces, of what SentencePiece says."""
    needed = re.search(r"smaller than required_chars\. \d+ vs (\d+)", said)
    if needed:
        return (
            f"expected at least {needed[1]} pieces for this text, whose characters and the 256 "
            f"bytes are a piece each; got {size}. Ask for more pieces."
        )
    reason = re.sub(r"^INTERNAL: |\S+\(\d+\) |\[[^\]]*\] ", "", said).strip(" .")
    more = f" ({reason})" if reason else ""
    return (
        f"expected enough text for {size} pieces; it holds too little{more}. Give more text or "
        f"another size."
    )


def _sentences(texts: Iterable[str]) -> Iterator[str]:
    r"""Yield lines; long ones in parts, for SentencePiece leaves out what has more than 4192 bytes.

    >>> list(_sentences(["one\ntwo"]))
    ['one', 'two']
    """
    for text in texts:
        for line in text.splitlines():
            if "\0" in line:
                continue
            left = line
            while len(left) > _LONGEST:
                stop = left.rfind(" ", 1, _LONGEST)
                stop = _LONGEST if stop < 0 else stop
                yield left[:stop]
                left = left[stop:]
            if left:
                yield left


class SentencePieces:
    """Text to the ids of a SentencePiece model and back."""

    def __init__(self, model: bytes, rows: int | None = None) -> None:
        """Read a model; `rows` is the size of the embedding that its ids index, if it is known.

        Raises:
            ValueError: for a file that is none, or one that has more pieces than rows.
        """
        if not model:
            raise ValueError("expected a SentencePiece model; the file is empty")
        try:
            self.processor = sentencepiece.SentencePieceProcessor(model_proto=model)
            self.prefixed = self._prefixes()
            if self.prefixed:  # put there by us, so that it is taken away as often as it was put
                bare = model + _NO_PREFIX
                self.processor = sentencepiece.SentencePieceProcessor(model_proto=bare)
        except RuntimeError as error:
            raise ValueError(
                f"expected a SentencePiece model of {len(model)} bytes; it is damaged, or "
                f"another kind of file: take it from the checkpoint it was saved in"
            ) from error
        self.used: int = self.processor.get_piece_size()
        self.size = self.used if rows is None else rows
        if self.size < self.used:
            raise ValueError(
                f"the text model has {self.used} pieces, the model's embedding {rows} rows: they "
                f"do not belong together"
            )
        pieces = [str(self.processor.id_to_piece(i)) for i in range(self.used)]
        self._byte_ids = {p: i for i, p in enumerate(pieces) if self.processor.is_byte(i)}
        self._pretrained = rows is not None
        self.special: dict[str, int] = {}
        """Symbols that a pretrained model has besides control ones, and no text may become."""
        self._symbols = frozenset[int]()
        self._cuts: re.Pattern[str] | None = None
        if self._pretrained:
            if len(self._byte_ids) < 256:
                raise ValueError(
                    "expected a tokenizer.model that spells what it has no piece for as bytes "
                    "(byte_fallback); this one has none"
                )
            self.special = {p: i for i, p in enumerate(pieces) if self._is_symbol(i, p)}
            self._symbols = frozenset(self.special.values())
            if self.special:
                names = (re.escape(name[1:]) for name in self.special)  # the first character stays
                self._cuts = re.compile(f"(?<=<)(?={'|'.join(names)})")
            require_whole(self, "tokenizer.model", self.special)
            silent = (self.processor.is_unknown, self.processor.is_unused)
            spelled = (i for i in range(self.used) if not any(kind(i) for kind in silent))
            self._spans = ranges_of(i for i in spelled if self.bytes_of(i))

    def _is_symbol(self, token: int, piece: str) -> bool:
        """Return whether a piece is a symbol such as <|im_start|>, which is matched as a whole."""
        p = self.processor
        told = p.is_control(token) or p.is_unknown(token) or p.is_byte(token) or p.is_unused(token)
        named = piece[:1] == "<" and piece[-1:] == ">" and len(piece) > 2
        # those that somebody defined have no score, as they were never learnt
        return named and not told and float(p.get_score(token)) == 0.0

    def _prefixes(self) -> bool:
        ids = self.processor.encode("a")
        return bool(ids) and str(self.processor.id_to_piece(ids[0])).startswith(SPACE)

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text; its own U+2581 is spelled as bytes."""
        parts = (" " + text if self.prefixed and text else text).split(SPACE)
        ids = self._cut(parts[0])
        for part in parts[1:]:
            ids += [self._byte_ids[f"<0x{b:02X}>"] for b in _SPACE_BYTES]
            ids += self._cut(part)
        return ids

    def _cut(self, text: str) -> list[int]:
        """Return the ids of a text; a symbol that stands in it is cut in two."""
        if self._cuts is None:
            return list(self.processor.encode(text))
        return [i for part in self._cuts.split(text) for i in self.processor.encode(part)]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids; rows past the pieces have none."""
        kept = [i for i in ids if i < self.used and i not in self._symbols]
        text = str(self.processor.decode(kept))
        return text.removeprefix(" ") if self.prefixed else text

    def bytes_of(self, token: int) -> bytes:
        """Return what an id spells."""
        processor = self.processor
        if token >= self.used or processor.is_control(token):
            return b""
        piece = str(processor.id_to_piece(token))
        if piece in self.special:
            return b""
        if processor.is_byte(token):
            return bytes([int(piece[1:-1], 16)])
        if processor.is_unknown(token):
            return str(processor.decode([token])).encode()
        return piece.replace(SPACE, " ").encode()

    def spans(self) -> tuple[tuple[int, int], ...]:
        """Return the ranges of ids that spell something."""
        if not self._pretrained:
            return ((0, self.size),)
        return self._spans

    def describe(self, token: int) -> str:
        """Return the piece as SentencePiece writes it; its sign for a space is U+2581."""
        return str(self.processor.id_to_piece(token)) if token < self.used else f"<row {token}>"


@register
class Text(Modality):
    """Strings; ids are the text model's own (Gato section 2.1 with a vocabulary of any size)."""

    name = "text"

    def __init__(self, model: bytes | None = None) -> None:
        self._pieces: SentencePieces | HuggingFacePieces | None = None
        self._names: dict[str, int] | None = None
        self._state: dict[str, bytes] = {}
        if model is not None:
            self.load_state({MODEL_FILE: model})

    @property
    def pieces(self) -> SentencePieces | HuggingFacePieces:
        """The text model."""
        if self._pieces is None:
            raise ValueError("this text modality has no SentencePiece model yet; load or train one")
        return self._pieces

    @property
    def processor(self) -> sentencepiece.SentencePieceProcessor:
        """SentencePiece itself.

        Raises:
            ValueError: where the text model is of another kind.
        """
        if not isinstance(self.pieces, SentencePieces):
            raise ValueError("expected a SentencePiece text model; this one is a tokenizer.json")
        return self.pieces.processor

    @property
    def about(self) -> dict[str, Any]:
        """What a pretrained model said of its text; empty where it was trained here."""
        return dict(json.loads(self._state.get(ABOUT_FILE, b"{}")))

    def load_state(self, state: Mapping[str, bytes]) -> None:
        self._state = {name: state[name] for name in TEXT_FILES if name in state}
        try:
            rows = self.about.get("rows")
        except (ValueError, TypeError) as error:
            raise ValueError(f"{ABOUT_FILE} is damaged: {error}") from error
        if TOKENIZER_FILE in state:
            self._pieces = HuggingFacePieces(state[TOKENIZER_FILE], rows)
        else:
            self._pieces = SentencePieces(state[MODEL_FILE], rows)
        self.vocabulary, self._names = self._pieces.size, None

    def state(self) -> dict[str, bytes]:
        return dict(self._state)

    def count(self, spec: Spec) -> None:
        return None

    def text_ids(self, text: str) -> np.ndarray:
        """Return the ids (n,) of one string.

        Raises:
            ValueError: for a string that is not valid Unicode (lone surrogates).
        """
        if not isinstance(text, str):
            raise TypeError(f"text must be a str; got {type(text).__name__}")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"text must be valid Unicode; {error}") from error
        return np.array(self.pieces.encode(text), np.int32)

    @property
    def prefixed(self) -> bool:
        """Whether a space is put before every text that is read, and taken from what is written."""
        return self.pieces.prefixed

    def spans(self) -> tuple[tuple[int, int], ...]:
        """Return the ranges [start, stop) of local ids that may be written.

        Rows without a piece and a pretrained model's special tokens lie outside.
        """
        return self.pieces.spans()

    def bytes_of(self, token: int) -> bytes:
        """Return what a local id spells; some spell part of a character, special ones nothing."""
        return self.pieces.bytes_of(token)

    @property
    def ids_by_name(self) -> dict[str, int]:
        """The ids by what they are called; rows without a piece are called nothing."""
        if self._names is None:
            pieces = self.pieces
            known = range(pieces.used) if isinstance(pieces, SentencePieces) else pieces.pieces
            self._names = {pieces.describe(i): i for i in known}
        return self._names

    def encode(self, values: Any, spec: Spec, key: str = "value") -> Segment:
        """Return the tokens of L equal strings (steps of a run share their text)."""
        ids = self.text_ids(values[0])
        return Segment(np.broadcast_to(ids, (len(values), len(ids))))

    def decode(self, ids: np.ndarray, spec: Spec) -> str:
        return self.pieces.decode(int(i) for i in ids)

    def allowed(self, prefix: np.ndarray, spec: Spec) -> tuple[int, int] | None:
        if len(prefix) >= spec["max_tokens"]:
            return None
        return max(self.spans(), key=lambda span: span[1] - span[0])

    def describe(
        self, token: int, row: Mapping[str, np.ndarray], options: Mapping[str, Any]
    ) -> str:
        return self.pieces.describe(token)

    def example(self, rng: np.random.Generator) -> tuple[Any, Spec]:
        return ["a red ball"] * 2, {"max_tokens": 32}
