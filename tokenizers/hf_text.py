"""A Hugging Face ``tokenizer.json`` as a text model: byte-level BPE, and Llama's BPE with bytes.

The library `tokenizers` cuts text into pieces; the rest is done here, so that any string comes back
as it was and no text ever becomes a special token:

- special tokens in a text are spelled out, also where the vocabulary would let them through
- a space that a tokenizer puts before a text is put there by us, and taken away again by us: on its
  own, the library puts none before a text that begins with one, which would then be lost
- the file's Unicode normalisation (Qwen's NFC) is left out; text that is in that form already, as
  nearly all is, gets the same ids
- Llama's sign for a space (U+2581), where text holds it, is spelled as bytes
- bytes that the file has no id for, as SmolLM2's has none for 0xF1, get ids behind its own: the
  library would leave them out of a text without a word

No code of the folder is run, and nothing is fetched.
"""

from __future__ import annotations

import codecs
import importlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

SPACE = "\u2581"
EACH_BYTE = "gato.each"
"""How bytes that are no text are read: U+FFFD for each of them, as SentencePiece does."""
_BYTES = bytes([*range(0xC0), *range(0xC2, 0xF5)])
"""The bytes that UTF-8 has: no string needs another."""
_EVERY = (
    *map(chr, range(0xC0)),
    *(chr(b % 32 << 6) for b in range(0xC3, 0xE0)),
    *("\u0800", *(chr(b % 16 << 12) for b in range(0xE1, 0xF0))),
    *("\U00010000", *(chr(b % 8 << 18) for b in range(0xF1, 0xF5))),
)
"""Characters that take every one of these bytes."""
_PROBES = (
    "".join(_EVERY),
    "  two  spaces  ",
    "\ue000\U0001f9ff",
    "ﬁ \u2460 e\u0301 \uff21\n\t.",
    "a\u2581b",
    "A 12,5",
)


def _each(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    return "\ufffd" * (error.end - error.start), error.end


codecs.register_error(EACH_BYTE, _each)


def library() -> Any:
    """Return the library `tokenizers`.

    Raises:
        ValueError: where it is not installed, naming the extra.
    """
    # not an import statement: seen from the project's root, a folder of ours has the same name
    try:
        found = importlib.import_module("tokenizers")
    except ImportError:
        found = None
    if found is None or not hasattr(found, "Tokenizer"):
        raise ValueError(
            "a tokenizer.json needs the library `tokenizers`, which is not installed. "
            'Install it: pip install "gato[hf]"'
        )
    return found


class HuggingFacePieces:
    """Text to the ids of a ``tokenizer.json`` and back."""

    def __init__(self, content: bytes, rows: int | None = None) -> None:
        """Read a tokenizer.

        Args:
            content: of the file.
            rows: rows of the embedding that its ids index; by default as many as there are ids.
                Bytes that the file lacks take rows past its ids, and more than these if need be.

        Raises:
            ValueError: for a file that is damaged, of another kind, or that changes text.
        """
        self.content = content
        self.prefixed = False
        """Whether a space stands before every text that is read."""
        self._rows = rows
        try:
            described = _read(content)
            self._kind(described)
            self._take(described)
            used = max(self.pieces) + 1
            if rows is None or used <= rows:
                self._complete(used)
                self._tokenizer = self._made(described)
        except (KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"tokenizer.json is damaged: {error!r}") from error
        if rows is not None and rows < used:
            raise ValueError(
                f"the tokenizer has ids up to {used - 1}, the model's embedding {rows} rows: they "
                f"do not belong together"
            )
        self.size = max(rows or 0, used + len(self.completed))
        require_whole(self, "tokenizer.json", self.special)
        self._spans = ranges_of(i for i, spelled in self._spelled.items() if spelled)

    def _kind(self, described: dict[str, Any]) -> None:
        """Learn how bytes are written; raise ValueError where they are not."""
        model = described["model"]
        if model.get("type", "BPE") != "BPE":
            raise ValueError(
                f"expected a tokenizer.json of kind BPE (those of Llama, Qwen and SmolLM are); got "
                f"{model.get('type')!r}"
            )
        self.byte_level = _has(described.get("pre_tokenizer"), "ByteLevel")
        if not (self.byte_level or model.get("byte_fallback")):
            raise ValueError(
                "expected a tokenizer.json that spells what it has no piece for as bytes: one with "
                "a ByteLevel pre_tokenizer or byte_fallback; got neither"
            )

    def _made(self, described: dict[str, Any]) -> Any:
        """Return the library's tokenizer, without what would change text or make it special."""
        bare = self.complete(described)
        bare |= {"truncation": None, "padding": None, "post_processor": None}
        bare["normalizer"] = self._without_prefix(described.get("normalizer"), _NORMALIZERS)
        bare["pre_tokenizer"] = self._without_prefix(described.get("pre_tokenizer"), None)
        kind = library().Tokenizer
        try:
            made = kind.from_str(json.dumps(bare))
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(f"tokenizer.json is damaged: {error}") from error
        made.encode_special_tokens = True
        return made

    def _take(self, described: Mapping[str, Any]) -> None:
        """Learn what ids there are, and what each spells."""
        model, added = described["model"], described.get("added_tokens") or []
        self.special: dict[str, int] = {t["content"]: t["id"] for t in added if t.get("special")}
        unknown = model.get("unk_token")
        if unknown is not None and unknown in model["vocab"]:
            self.special[unknown] = model["vocab"][unknown]
        self.pieces: dict[int, str] = {i: piece for piece, i in model["vocab"].items()}
        self._spelled = {i: self._spelling(piece) for i, piece in self.pieces.items()}
        for token in added:
            self.pieces[token["id"]] = token["content"]
            self._spelled[token["id"]] = token["content"].encode()
        wrong = next((i for i in self.pieces if type(i) is not int or i < 0), None)
        if wrong is not None or not self.pieces:
            raise ValueError(f"tokenizer.json is damaged: {wrong!r} is no id")
        self._special_ids = frozenset(self.special.values())
        self._spelled |= dict.fromkeys(self._special_ids, b"")
        names = sorted((re.escape(name) for name in self.special if name), key=len, reverse=True)
        self._named = re.compile(f"(?={'|'.join(names)})") if names else None

    def _complete(self, used: int) -> None:
        """Give every byte of UTF-8 an id, those that have none the ids from `used` on."""
        if self.byte_level:
            names = {b: character for character, b in _BYTES_OF.items()}
        else:
            names = {b: f"<0x{b:02X}>" for b in range(256)}
        there = {piece: i for i, piece in self.pieces.items() if i not in self._special_ids}
        self._byte_ids = {b: there[names[b]] for b in range(256) if names[b] in there}
        lacking = [b for b in _BYTES if b not in self._byte_ids]
        self.completed: dict[str, int] = {names[b]: used + k for k, b in enumerate(lacking)}
        """The bytes without an id in the file, as it would write them, and the ids they have."""
        for b in lacking:
            at = self._byte_ids[b] = self.completed[names[b]]
            self.pieces[at], self._spelled[at] = names[b], bytes([b])

    def complete(self, described: dict[str, Any]) -> dict[str, Any]:
        """Return the file's content with an id for every byte of UTF-8."""
        if not self.completed:
            return dict(described)
        model, added = described["model"], described.get("added_tokens") or []
        # the library counts added tokens on from its vocabulary: there they keep their ids
        vocab = {**model["vocab"], **{t["content"]: t["id"] for t in added}, **self.completed}
        return {**described, "model": {**model, "vocab": vocab}}

    def __getstate__(self) -> tuple[bytes, int | None]:
        return self.content, self._rows

    def __setstate__(self, state: tuple[bytes, int | None]) -> None:
        self.__init__(*state)  # type: ignore[misc]  # the library's own copy forgets settings

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text; never a special one."""
        if not text:
            return []
        text = " " + text if self.prefixed else text
        if self.byte_level:
            return self._cut(text)
        first, *others = text.split(SPACE)
        ids = self._cut(first)
        for part in others:
            ids += [self._byte_ids[b] for b in SPACE.encode()]
            ids += self._cut(part)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids; special ones and those past the vocabulary have none."""
        text = b"".join(map(self.bytes_of, ids)).decode("utf-8", EACH_BYTE)
        return text.removeprefix(" ") if self.prefixed else text

    def bytes_of(self, token: int) -> bytes:
        """Return what an id spells."""
        return self._spelled.get(token, b"")

    def spans(self) -> tuple[tuple[int, int], ...]:
        """Return the ranges of ids that spell something: no special ones, no padding."""
        return self._spans

    def describe(self, token: int) -> str:
        """Return an id as the file writes it."""
        return self.pieces.get(token, f"<row {token}>")

    def _cut(self, text: str) -> list[int]:
        """Return the ids of a text; a special token that its pieces would make is cut in two."""
        if not text:
            return []
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        if self._special_ids.isdisjoint(ids):
            return ids
        assert self._named is not None
        cuts = [0, *(found.start() + 1 for found in self._named.finditer(text)), len(text)]
        parts = [text[a:b] for a, b in itertools.pairwise(cuts) if a < b]
        ids = [i for p in parts for i in self._tokenizer.encode(p, add_special_tokens=False).ids]
        if not self._special_ids.isdisjoint(ids):
            raise ValueError(f"the tokenizer makes a special token of {text!r:.60}")
        return ids

    def _without_prefix(self, part: Any, known: frozenset[str] | None) -> Any:
        """Return a normalizer or pre_tokenizer that adds no space and leaves characters alone."""
        if part is None:
            return None
        kind = part["type"]
        for name in ("normalizers", "pretokenizers"):
            if kind == "Sequence" and name in part:
                parts = [self._without_prefix(p, known) for p in part[name]]
                return {**part, name: [p for p in parts if p is not None]}
        if known is not None and kind not in known:
            raise ValueError(
                f"expected a tokenizer.json that leaves text as it is; its normalizer {kind!r} "
                f"changes it"
            )
        match kind:
            case "NFC":
                return None
            case "Prepend":
                self.prefixed = True
                return None
            case "ByteLevel":
                self.prefixed |= bool(part.get("add_prefix_space", True))
                return {**part, "add_prefix_space": False}
            case "Metaspace":
                scheme = part.get("prepend_scheme", "always")
                self.prefixed |= bool(part.get("add_prefix_space", True)) and scheme != "never"
                changed = {**part, "prepend_scheme": "never"}
                changed.pop("add_prefix_space", None)
                return changed
        return part

    def _spelling(self, piece: str) -> bytes:
        if self.byte_level:
            known = _BYTES_OF
            return (
                bytes(known[c] for c in piece) if all(c in known for c in piece) else piece.encode()
            )
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            return bytes([int(piece[3:5], 16)])
        return piece.replace(SPACE, " ").encode()


_NORMALIZERS = frozenset({"NFC", "Prepend", "Replace"})


def require_whole(pieces: Any, kind: str, names: Iterable[str]) -> None:
    """Raise ValueError where a text would not come back.

    Args:
        pieces: what cuts text and joins it again.
        kind: what it was read from, for the message.
        names: of its special tokens.
    """
    for probe in (*_PROBES, *names):
        found = pieces.decode(pieces.encode(probe))
        if found != probe:
            raise ValueError(
                f"expected a {kind} that gives back every string as it was; it makes "
                f"{found[-60:]!r} of {probe[-60:]!r}"
            )


def ranges_of(ids: Iterable[int]) -> tuple[tuple[int, int], ...]:
    """Return the ranges [start, stop) that ids make up.

    >>> ranges_of([3, 7, 4, 5])
    ((3, 6), (7, 8))
    """
    found: list[tuple[int, int]] = []
    for i in sorted(ids):
        start = found.pop()[0] if found and found[-1][1] == i else i
        found.append((start, i + 1))
    return tuple(found)


def _read(content: bytes) -> dict[str, Any]:
    try:
        described = json.loads(content)
        if not isinstance(described["model"]["vocab"], Mapping):
            raise ValueError("its vocabulary is no object")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"tokenizer.json is damaged, or another kind of file: {error}") from error
    return dict(described)


def _has(part: Any, kind: str) -> bool:
    """Return whether a pre_tokenizer is or holds one of a kind."""
    if part is None:
        return False
    return bool(part["type"] == kind) or any(_has(p, kind) for p in part.get("pretokenizers", ()))


def _byte_characters() -> Iterator[tuple[str, int]]:
    """Yield the character that stands for each byte in byte-level vocabularies (GPT-2's table)."""
    shown = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = (b for b in range(256) if b not in shown)
    yield from ((chr(b), b) for b in shown)
    yield from ((chr(256 + k), b) for k, b in enumerate(others))


_BYTES_OF = dict(_byte_characters())
