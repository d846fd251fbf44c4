"""Short answers compared: as VQA's evaluation normalises them, and its accuracy among people.

Antol et al. 2015 (arXiv 1505.00468): an answer is right where three of the ten people gave it, and
right in part where fewer did, averaged over leaving each of the ten out. The rules of text are
those of VQA's own evaluation: numbers as digits, no articles, no punctuation, apostrophes put back.
It applies them to what a model says only, its true answers being so already; here true answers of
any data are treated alike.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

ANNOTATORS = 10
ENOUGH = 3
"""People whose word makes an answer right."""
_NUMBERS = ("none", *"one two three four five six seven eight nine ten".split())
DIGITS = {word: str(i) for i, word in enumerate(_NUMBERS)} | {"zero": "0"}
ARTICLES = frozenset(("a", "an", "the"))
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_CONTRACTIONS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
haven't he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've
mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't
shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's
something'd something'd've something'll that's there'd there'd've there're there's they'd they'd've
they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's
where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've he'd
""".split()


def _without_one(word: str) -> list[str]:
    """Return a word with each of its apostrophes left out in turn.

    >>> _without_one("he'd've")
    ["hed've", "he'dve"]
    """
    return [word[:i] + word[i + 1 :] for i, c in enumerate(word) if c == "'"]


CONTRACTIONS = {slip: word for word in _CONTRACTIONS for slip in _without_one(word)} | {
    "somebody'd": "somebodyd"  # sic: so the evaluation has it
}


def normalise(text: str) -> str:
    """Return an answer without what makes no difference to its meaning.

    >>> normalise("The two dogs."), normalise("it isnt a cat-fish, no"), normalise("1,000.5")
    ('2 dogs', "it isn't cat fish no", '1000.5')
    """
    given = text.replace("\n", " ").replace("\t", " ").strip()
    thousands, found = re.search(r"\d,\d", given) is not None, given
    for mark in _PUNCTUATION:
        beside_space = f"{mark} " in given or f" {mark}" in given
        found = found.replace(mark, "" if beside_space or thousands else " ")
    found = re.sub(r"\.(?!\d)", "", found)
    words = (DIGITS.get(word, word) for word in found.lower().split())
    return " ".join(CONTRACTIONS.get(w, w) for w in words if w not in ARTICLES)


def vqa_accuracy(said: str, answers: Sequence[str]) -> float:
    """Return how right an answer is, given the answers of several people.

    Fewer than ten stand for ten of the same opinions: they are repeated until there are as many.

    >>> vqa_accuracy("a dog", ["dog"]), vqa_accuracy("cat", ["cat", "cat"] + 8 * ["dog"])
    (1.0, 0.6)
    """
    if not answers:
        raise ValueError("expected one or more true answers; got none.")
    people = [normalise(a) for a in answers] * -(-ANNOTATORS // len(answers))
    right = people.count(normalise(said))
    # who is left out either gave this answer or did not
    ours, others = min((right - 1) / ENOUGH, 1.0), min(right / ENOUGH, 1.0)
    return (right * ours + (len(people) - right) * others) / len(people)
