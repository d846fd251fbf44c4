"""Text models: the text they are trained on, what one made elsewhere must be, and which one it is.

Memory stays flat however large the corpora are: no more of a corpus is read than is used, from
items spread evenly over all of it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium import spaces

from gato.corpora import Corpus, EpisodeCorpus, RecordCorpus
from gato.envs.episode import flatten_space
from gato.envs.store import EpisodeStore
from gato.tokenizers.serializer import Serializer
from gato.tokenizers.text import MODEL_FILE, Text, train_text_model

_EPISODES = 500  # per store whose text is read
_REPEATS = 50  # of an instruction, which every episode of its store begins with
_GOLDEN = 0.618  # its multiples, without their whole part, are well spread
_PARTS = 100  # of a share of characters, at least so many items are read for it, if there are

_BYTES = "byte_fallback=True, so that what it has no piece for is spelled as bytes"
_PROBES = {
    "\ue000\U0001f9ff": _BYTES,
    "ﬁ \u2460 e\u0301 \uff21\n\t.": "normalization_rule_name=identity, so that it changes no "
    "characters",
    "  two  spaces  ": "remove_extra_whitespaces=False, so that it keeps every space",
}
"""Strings that must come back as they were, and what a model lacks that changes one."""


def fewer(model: bytes, asked: int) -> list[str]:
    """Return a note where a text model got fewer pieces than were asked for."""
    found = Text(model).vocabulary
    if found >= asked:
        return []
    return [f"text model: {asked:,} pieces were asked for, the text gives {found:,}"]


def describe(model: bytes) -> str:
    """Return which text model this is, in a few words."""
    text = Text(model)
    return f"sha256 {hashlib.sha256(model).hexdigest()[:12]}, {text.vocabulary:,} pieces"


def read_text_model(path: str | Path) -> bytes:
    """Return the SentencePiece model in a file.

    A model must give back any string as it was: it falls back on bytes, and neither normalises nor
    adds or removes spaces. Those of `train_text_model` and, of the published ones, Gemma's do.

    Raises:
        ValueError: for a file that holds none, or one that lacks what is needed, naming it.
    """
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"expected a SentencePiece model (a .model file) at {path}; found none.")
    return checked(file.read_bytes(), path)


def checked(model: bytes, where: str | Path) -> bytes:
    """Return a text model as it is; raise ValueError, naming `where`, as `read_text_model` does."""
    try:
        text = Text(model)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    lacking = _lacking(text)
    if lacking:
        raise ValueError(
            f"expected a text model that gives back every string as it was; {where} does not. It "
            f"needs {'; and '.join(lacking)}. Train one: gato data text-model."
        )
    return model


def _lacking(text: Text) -> list[str]:
    """Return what a model would have to have been trained with."""
    bytes_known = sum(text.processor.is_byte(i) for i in range(text.vocabulary))
    if bytes_known < 256:
        return [_BYTES]
    changed = (w for probe, w in _PROBES.items() if text.decode(text.text_ids(probe), {}) != probe)
    return list(dict.fromkeys(changed))


def require_same_text_model(serializer: Serializer, given: bytes, where: str | Path) -> None:
    """Raise ValueError where a text model is not the one that a checkpoint was trained with.

    Every piece of a model stands for something in the weights: with another text model they would
    read and write other words.

    Args:
        serializer: the checkpoint's.
        given: the other text model.
        where: the checkpoint, for the message.
    """
    saved = serializer.state()["text"].get(MODEL_FILE)
    if saved is None:
        raise ValueError(
            f"the weights in {where} go with the tokenizer.json of the model that they began as; "
            f"got another text model. Leave out --text-model."
        )
    if saved != given:
        raise ValueError(
            f"expected the text model of {where} ({describe(saved)}); got another "
            f"({describe(given)}). Leave out --text-model, to go on with the checkpoint's own, or "
            f"train into another folder."
        )


class Texts:
    """The texts of a corpus, by the number of the item that they stand in."""

    def __init__(self, corpus: Corpus) -> None:
        self.corpus = corpus
        sizes = [0]
        if isinstance(corpus, EpisodeCorpus):
            sizes = [1 + min(len(items), _EPISODES) for items in corpus.items]
        elif isinstance(corpus, RecordCorpus):
            sizes = [len(items) for items in corpus.items]
        self._ends = np.cumsum(sizes)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, number: int) -> list[str]:
        """Return the texts of an item."""
        which = int(np.searchsorted(self._ends, number, side="right"))
        within = number - int(self._ends[which - 1] if which else 0)
        if isinstance(self.corpus, EpisodeCorpus):
            return _of_episodes(self.corpus.stores[which], self.corpus.items[which], within)
        assert isinstance(self.corpus, RecordCorpus)
        return _of_record(self.corpus.stores[which][int(self.corpus.items[which][within])])

    def part(self, limit: int) -> Iterator[str]:
        """Yield all text or, where there is more than `limit` characters, a part of it.

        That part is made of parts of items that are spread evenly over the corpus, the same ones
        whenever it is asked for.
        """
        begun: list[tuple[int, list[str]]] = []
        left, order = limit, self._spread()
        for number in order:
            begun.append((number, self[number]))
            left -= sum(map(len, begun[-1][1]))
            if left < 0:
                break
        else:
            for _, texts in sorted(begun):
                yield from texts
            return
        rest = (self[number] for number in order)
        yield from _cut(chain((texts for _, texts in begun), rest), limit, len(self))

    def size(self, limit: int) -> int:
        """Return the number of characters; `limit` where there are as many or more."""
        count = 0
        for number in range(len(self)):
            count += sum(map(len, self[number]))
            if count >= limit:
                return limit
        return count

    def _spread(self) -> Iterator[int]:
        """Yield every item once, the first ones as well spread over the corpus as all."""
        count = len(self)
        stride = max(1, int(count * _GOLDEN))
        while math.gcd(stride, count) > 1:
            stride += 1
        return (k * stride % count for k in range(count))


def _cut(items: Iterable[list[str]], limit: int, count: int) -> Iterator[str]:
    """Yield up to `limit` characters of `count` items, of long ones a part anywhere in them."""
    left, most = limit, -(-limit // min(count, _PARTS))
    for k, texts in enumerate(items):
        room = min(left, max(most, -(-left // (count - k))))  # what short ones leave goes to others
        for text in texts:
            skipped = int(max(0, len(text) - room) * (k * _GOLDEN % 1.0))
            yield text[skipped : skipped + room]
            left -= min(len(text), room)
            room -= min(len(text), room)
            if room == 0:
                break
        if left == 0:
            return


def _of_episodes(store: EpisodeStore, items: np.ndarray, number: int) -> list[str]:
    """Return the instruction of a store's task, for number 0, or the words of an episode."""
    if number == 0:
        return [store.spec.instruction] * _REPEATS
    chosen = number - 1
    if len(items) > _EPISODES:
        chosen = chosen * (len(items) - 1) // (_EPISODES - 1)
    leaves, index = flatten_space(store.spec.action_space, "action"), int(items[chosen])
    words = any(isinstance(leaf, spaces.Text) for leaf in leaves.values())
    # of frames one is enough, and all would be many
    episode = store.episode(index) if words else store.window(index, 0, 1)
    found = [c[0] for c in episode.observations.values() if not isinstance(c, np.ndarray)]
    for column in episode.actions.values():
        if not isinstance(column, np.ndarray):
            found += list(dict.fromkeys(column))
    if episode.instruction != store.spec.instruction:
        found.append(episode.instruction)
    return found


def _of_record(record: Mapping[str, Any]) -> list[str]:
    found = [record["text"]] if "text" in record else []
    found += [pair["text"] for pair in record.get("pairs", ())]
    for message in record.get("messages", ()):
        found += [part["text"] for part in message["content"] if part["type"] == "text"]
    return found


def equal_parts(corpora: Sequence[Corpus], characters: int) -> Iterator[str]:
    """Yield text, an equal share of so many characters from each corpus.

    Corpora without a word give one letter, for a model of bytes, which spells whatever it is given.
    """
    wordless = True
    for corpus in corpora:
        for text in Texts(corpus).part(characters // len(corpora)):
            wordless = wordless and not text.strip()
            yield text
    if wordless:
        yield "a"


def weighted_shares(corpora: Sequence[Corpus], characters: int) -> list[int]:
    """Return the characters to take of each corpus: by its weight, as far as it has them.

    What a corpus has not is shared by the others, by their weights.
    """
    sizes = [Texts(c).size(characters) for c in corpora]
    shares, left = [0] * len(corpora), characters
    open_ = [i for i, c in enumerate(corpora) if c.config.weight > 0 and sizes[i]]
    while open_:
        total = sum(corpora[i].config.weight for i in open_)
        wanted = {i: int(left * corpora[i].config.weight / total) for i in open_}
        short = [i for i in open_ if sizes[i] <= wanted[i]]
        for i in short or open_:
            shares[i] = min(sizes[i], wanted[i])
        if not short:
            break
        left -= sum(shares[i] for i in short)
        open_ = [i for i in open_ if i not in short]
    return shares


def train_on(
    corpora: Sequence[Corpus], pieces: int, characters: int, seed: int = 0
) -> tuple[bytes, list[dict[str, Any]]]:
    """Return a text model of a mixture's text, and of each corpus what it gave.

    Args:
        corpora: with ``config.weight``, the share of characters each gives.
        pieces: of the model, the 256 bytes included.
        characters: to train on, of all corpora together.
        seed: which sentences are sampled where there are many.

    Raises:
        ValueError: where the corpora hold no text, or too little for so many pieces.
    """
    shares = weighted_shares(corpora, characters)
    if not any(shares):
        names = ", ".join(c.config.name for c in corpora)
        raise ValueError(f"expected corpora with text to train a text model on; {names} hold none.")
    counts = [0] * len(corpora)

    def read() -> Iterator[str]:
        for i, (corpus, share) in enumerate(zip(corpora, shares, strict=True)):
            for text in Texts(corpus).part(share) if share else ():
                counts[i] += len(text)
                yield text

    model = train_text_model(read(), pieces, seed=seed)
    used = sum(counts)
    told = [
        {
            "corpus": corpus.config.name,
            "weight": corpus.config.weight,
            "characters": count,
            "share": count / used,
        }
        for corpus, count in zip(corpora, counts, strict=True)
    ]
    return model, told
