"""Text by SentencePiece with byte fallback, so that any string round-trips exactly."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import sentencepiece

from gato.tokenizers.modality import Modality, Segment, Spec, register

_SPACE = "\u2581"  # SentencePiece's own sign for a space: spelled as bytes when text holds it
_SPACE_BYTES = _SPACE.encode()
MODEL_FILE = "text.model"
_LONGEST = 1000  # characters of a line that the text model is trained on


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


@register
class Text(Modality):
    """Strings; ids are SentencePiece's own (Gato section 2.1 with a vocabulary of any size)."""

    name = "text"

    def __init__(self, model: bytes | None = None) -> None:
        self._processor: sentencepiece.SentencePieceProcessor | None = None
        if model is not None:
            self.load_state({MODEL_FILE: model})

    @property
    def processor(self) -> sentencepiece.SentencePieceProcessor:
        if self._processor is None:
            raise ValueError("this text modality has no SentencePiece model yet; load or train one")
        return self._processor

    def load_state(self, state: Mapping[str, bytes]) -> None:
        self._model = state[MODEL_FILE]
        if not self._model:
            raise ValueError("expected a SentencePiece model; the file is empty")
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=self._model)
        except RuntimeError as error:
            raise ValueError(
                f"expected a SentencePiece model of {len(self._model)} bytes; it is damaged, or "
                f"another kind of file: take it from the checkpoint it was saved in"
            ) from error
        self.vocabulary = self._processor.get_piece_size()
        pieces = (self._processor.id_to_piece(i) for i in range(self.vocabulary))
        self._byte_ids = {p: i for i, p in enumerate(pieces) if self._processor.is_byte(i)}

    def state(self) -> dict[str, bytes]:
        return {} if self._processor is None else {MODEL_FILE: self._model}

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
        parts = text.split(_SPACE)
        ids: list[int] = list(self.processor.encode(parts[0]))
        for part in parts[1:]:
            ids += [self._byte_ids[f"<0x{b:02X}>"] for b in _SPACE_BYTES]
            ids += self.processor.encode(part)
        return np.array(ids, np.int32)

    def encode(self, values: Any, spec: Spec, key: str = "value") -> Segment:
        """Return the tokens of L equal strings (steps of a run share their text)."""
        ids = self.text_ids(values[0])
        return Segment(np.broadcast_to(ids, (len(values), len(ids))))

    def decode(self, ids: np.ndarray, spec: Spec) -> str:
        return str(self.processor.decode([int(i) for i in ids]))

    def allowed(self, prefix: np.ndarray, spec: Spec) -> tuple[int, int] | None:
        return None if len(prefix) >= spec["max_tokens"] else (0, self.vocabulary)

    def describe(
        self, token: int, row: Mapping[str, np.ndarray], options: Mapping[str, Any]
    ) -> str:
        """Return the piece as SentencePiece writes it; its sign for a space is U+2581."""
        return str(self.processor.id_to_piece(token))

    def example(self, rng: np.random.Generator) -> tuple[Any, Spec]:
        return ["a red ball"] * 2, {"max_tokens": 32}
