"""Metrics of language: equal to the libraries and formulas they are named after."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest
from sacrebleu.metrics import BLEU, CHRF
from scipy import stats

from gato.rollouts.metrics import AGGREGATES, Figure, difference, summed_up
from gato.rollouts.overlap import cider_d, has_sacrebleu, overlap_of, overlap_rows
from gato.rollouts.statistics import wilson
from gato.rollouts.words import normalise, vqa_accuracy

CIDER = Path(__file__).parents[2] / "fixtures" / "cider.json"


# ---- CIDEr-D, BLEU, chrF ---------------------------------------------------------------------


def test_cider_is_that_of_cocos_own_evaluation() -> None:
    told = json.loads(CIDER.read_text())
    scores = cider_d(told["said"], told["references"])
    np.testing.assert_allclose(scores, told["scores"], rtol=0, atol=1e-12)
    assert scores.mean() == pytest.approx(told["mean"], abs=1e-12)
    assert scores.max() == pytest.approx(10.0)
    assert len(scores) == 60


def test_cider_looks_at_words_alone() -> None:
    references = [["a red ball and a key"], ["two blue boxes"], ["the agent's door"]]
    plain = cider_d(["a red ball and a key", "blue boxes", "the agent"], references)
    other = cider_d(["A red ball, and a key.", "Blue boxes!", "The agent."], references)
    np.testing.assert_array_equal(plain, other)
    assert plain[0] == pytest.approx(10.0)
    assert cider_d(["two blue boxes", "x", "x"], references[1:] + references[:1])[0] == (
        pytest.approx(7.5)
    ), "no runs of four words in three"


def test_cider_of_one_picture_is_unknown_and_references_are_needed() -> None:
    assert np.isnan(cider_d(["a"], [["a"]])).all()
    alone = summed_up(Figure(cider_d(["a"], [["a"]]), "ratio"))
    assert alone == {"value": None, "ci95": None, "of": "ratio", "per_record": [[None, 1]]}
    assert difference(alone, alone, True)["difference"] is None
    with pytest.raises(ValueError, match="one or more references for each of 2 captions"):
        cider_d(["a", "b"], [["a"], []])
    with pytest.raises(ValueError, match="got 1"):
        cider_d(["a", "b"], [["a"]])


@pytest.mark.parametrize(("name", "metric"), [("bleu", BLEU()), ("chrf", CHRF())])
def test_bleu_and_chrf_are_sacrebleus(name: str, metric) -> None:
    told = json.loads(CIDER.read_text())
    said, references = told["said"], told["references"]
    rows = overlap_rows(name, said, references)
    streams = [[r[i] if i < len(r) else None for r in references] for i in range(5)]
    wanted = metric.corpus_score(said, streams).score
    assert overlap_of(name, rows.sum(0, keepdims=True))[0] == pytest.approx(wanted, abs=1e-9)
    assert 5 < wanted < 95
    figure = summed_up(Figure(rows, name))
    assert figure["value"] == pytest.approx(wanted, abs=1e-9)
    low, high = figure["ci95"]
    assert low < wanted < high
    # the interval that sacrebleu draws itself: mean and half width
    drawn = metric.corpus_score(said, streams, n_bootstrap=1000)
    assert (high - low) / 2 == pytest.approx(drawn._ci, rel=0.2)


def test_bleu_of_short_texts_is_not_zero() -> None:
    texts = ["a handwritten one", "a handwritten two"]
    assert BLEU().corpus_score(texts, [texts]).score == 0.0
    rows = overlap_rows("bleu", texts, [[t] for t in texts])
    assert overlap_of("bleu", rows.sum(0, keepdims=True))[0] == pytest.approx(100.0)
    assert overlap_rows("bleu", ["a"], [[""]]).shape == (1, 10), "an empty truth is a wrong one"


def test_without_sacrebleu_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from gato.rollouts import overlap

    overlap._metric.cache_clear()
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    assert not has_sacrebleu()
    with pytest.raises(ValueError, match=r"gato\[metrics\]"):
        overlap_rows("bleu", ["a"], [["a"]])


# ---- answers ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("The Dog", "dog"),
        ("An apple a day", "apple day"),
        ("two", "2"),
        ("none", "0"),
        ("Ten.", "10"),
        ("dont know", "don't know"),
        ("it's", "it's"),
        ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("yall'll", "y'all'll"),
        ("ow's'at", "'ow's'at"),
        ("somebody'd", "somebodyd"),
        ("well", "well"),
        ("shed", "shed"),
        ("ill", "ill"),
        ("black/white", "black white"),
        ("black / white", "black white"),
        ("yes, it is", "yes it is"),
        ("yes,it is", "yes it is"),
        ("1,000", "1000"),
        ("1,000 (about)", "1000 about"),
        ("2.5", "2.5"),
        ("u.s.a.", "usa"),
        ("t-shirt", "t shirt"),
        ("what?!", "what"),
        ("a\nred\tball ", "red ball"),
        ("", ""),
    ],
)
def test_answers_are_normalised_as_vqas_evaluation_does(text: str, wanted: str) -> None:
    assert normalise(text) == wanted


def leave_one_out(said: str, answers: list[str]) -> float:
    """Return VQA's accuracy as its formula is written."""
    people = [normalise(a) for a in answers]
    parts = []
    for left_out in range(len(people)):
        others = [a for i, a in enumerate(people) if i != left_out]
        parts.append(min(others.count(normalise(said)) / 3, 1.0))
    return sum(parts) / len(parts)


def test_vqa_accuracy_is_its_formula() -> None:
    rng = random.Random(0)
    for _ in range(300):
        answers = [rng.choice(["red", "blue", "a Red", "two"]) for _ in range(10)]
        said = rng.choice(["red", "2", "green", "The blue."])
        assert vqa_accuracy(said, answers) == pytest.approx(leave_one_out(said, answers))


@pytest.mark.parametrize(
    ("right", "wanted"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)]
)
def test_vqa_accuracy_of_ten_people(right: int, wanted: float) -> None:
    assert vqa_accuracy("cat", ["cat"] * right + ["dog"] * (10 - right)) == pytest.approx(wanted)


def test_vqa_accuracy_of_fewer_people() -> None:
    assert vqa_accuracy("cat", ["cat"]) == 1.0
    assert vqa_accuracy("cat", ["dog"]) == 0.0
    assert vqa_accuracy("cat", ["cat", "dog", "cow"]) == 1.0, "four of twelve"
    with pytest.raises(ValueError, match="one or more true answers"):
        vqa_accuracy("cat", [])


# ---- intervals -------------------------------------------------------------------------------


def test_an_interval_is_a_bootstrap_over_records() -> None:
    rng = np.random.default_rng(3)
    asked = rng.integers(1, 5, 80)
    rows = np.stack([rng.binomial(asked, 0.7), asked], 1)
    found = summed_up(Figure(rows))
    assert found["value"] == pytest.approx(rows[:, 0].sum() / rows[:, 1].sum())
    draws = []
    for _ in range(4000):  # the obvious twin: records drawn one by one
        drawn = rows[rng.integers(len(rows), size=len(rows))]
        draws.append(drawn[:, 0].sum() / drawn[:, 1].sum())
    np.testing.assert_allclose(found["ci95"], np.quantile(draws, [0.025, 0.975]), atol=0.008)
    assert summed_up(Figure(rows))["ci95"] == found["ci95"], "the same seed, the same interval"
    assert json.loads(json.dumps(found)) == found


def test_records_that_are_all_alike_prove_less_than_everything() -> None:
    assert summed_up(Figure(np.ones(20)))["ci95"] == [wilson(20, 20)[0], 1.0]
    assert summed_up(Figure(np.zeros(20)))["ci95"][0] == 0.0
    assert summed_up(Figure(np.full(20, 7.5), "ratio"))["ci95"] is None, "nothing is so sure"
    same = ["go to the red ball"] * 20
    rows = overlap_rows("bleu", same, [[text] for text in same])
    assert summed_up(Figure(rows, "bleu"))["ci95"] is None
    assert summed_up(Figure(np.ones(4)))["ci95"] is None, "too few"
    empty = summed_up(Figure(np.zeros((0, 2))))
    assert empty["value"] is None
    assert empty["ci95"] is None


def test_one_error_more_never_raises_an_interval_of_right_and_wrong() -> None:
    found = [summed_up(Figure(np.arange(20) < right))["ci95"] for right in range(21)]
    np.testing.assert_allclose(found, [wilson(right, 20) for right in range(21)], atol=1e-12)
    assert (np.diff(found, axis=0) > 0).all()
    alone = summed_up(Figure(np.arange(20) < 19), 0, list(range(20)))
    assert alone["ci95"] == found[19], "in groups of one"
    parts = np.full(20, 0.9)
    parts[0] = 0.3  # as VQA's accuracy counts: no rate of successes
    low, high = summed_up(Figure(parts))["ci95"]
    assert 0.78 < low < high == 0.9


def test_records_that_belong_together_are_drawn_together() -> None:
    rng = np.random.default_rng(0)
    games = rng.random(30) < 0.8  # of each game all frames are easy, or none
    groups = np.repeat(np.arange(30), 10)
    figure = Figure(np.repeat(games, 10))
    alone, together = summed_up(figure), summed_up(figure, 0, groups.tolist())
    assert alone["value"] == together["value"]
    assert alone["per_record"] == together["per_record"]
    assert np.ptp(together["ci95"]) > 2 * np.ptp(alone["ci95"])
    whole = Figure(np.stack([10 * games, np.full(30, 10)], 1))
    assert together["ci95"] == summed_up(whole)["ci95"]
    few = summed_up(figure, 0, [i // 100 for i in range(300)])
    assert few["ci95"] is None, "three groups are too few"
    other = summed_up(Figure(np.repeat(rng.random(30) < 0.7, 10)))
    spread = [
        np.ptp(difference(alone, other, True, 0, g)["ci95"]) for g in (((), ()), (groups, groups))
    ]
    assert spread[1] > 2 * spread[0]


def test_a_figure_of_some_records_is_drawn_by_their_groups() -> None:
    rng = np.random.default_rng(4)
    games = (rng.random(20) < 0.6).astype(float)
    groups = np.repeat(np.arange(40), 5).tolist()  # the figure knows every other game alone
    records = [i for i in range(200) if groups[i] % 2]
    figure = Figure(np.repeat(games, 5), records=records)
    found = summed_up(figure, 0, groups)
    whole = Figure(np.stack([5 * games, np.full(20, 5)], 1))
    assert found["ci95"] == summed_up(whole)["ci95"]
    assert found["records"] == records
    other = summed_up(Figure(np.repeat(1 - games, 5), records=records), 0, groups)
    few, many = (difference(found, other, True, 0, g)["ci95"] for g in ((groups, groups), ((), ())))
    assert np.ptp(few) > 1.5 * np.ptp(many)
    assert "records" not in summed_up(Figure(games, records=range(20)))


def test_perplexity_is_of_all_tokens() -> None:
    rows = np.array([[10.0, 5], [3, 3], [8, 2], [4, 4], [1, 1]])
    found = summed_up(Figure(rows, "exponential"))
    assert found["value"] == pytest.approx(np.exp(26 / 15))
    assert found["ci95"][0] < found["value"] < found["ci95"][1]


def test_the_same_records_are_drawn_for_both() -> None:
    rng = np.random.default_rng(0)
    hard = rng.random(200)
    first = summed_up(Figure((hard > 0.5).astype(float)))
    second = summed_up(Figure((hard > 0.4).astype(float)))
    paired, unpaired = (difference(first, second, p) for p in (True, False))
    assert paired["difference"] == pytest.approx(second["value"] - first["value"])
    assert paired["significant"]
    assert not unpaired["significant"]
    spread = [np.ptp(d["ci95"]) for d in (paired, unpaired)]
    assert spread[0] < 0.6 * spread[1]
    same = difference(first, first, True)
    assert same["ci95"] == [0.0, 0.0]
    assert same["significant"] is False
    few = summed_up(Figure(np.ones(3)))
    assert difference(few, few, True) == {
        "difference": 0.0,
        "ci95": None,
        "significant": None,
    }
    unknown = summed_up(Figure(np.zeros((0, 2))))
    assert difference(first, unknown, False)["difference"] is None
    shorter = summed_up(Figure((hard[:50] > 0.4).astype(float)))
    assert difference(first, shorter, False)["ci95"] is not None


def test_chance_alone_is_seldom_called_a_difference() -> None:
    rng = np.random.default_rng(1)
    called = 0
    for trial in range(60):
        a, b = (summed_up(Figure(rng.random(30)), trial) for _ in range(2))
        called += bool(difference(a, b, True, trial)["significant"])
    assert called <= 9, "5% of 60 are 3"


@pytest.mark.parametrize("records", [8, 20, 200])
def test_few_records_right_and_wrong_prove_what_a_sign_test_says(records: int) -> None:
    for better in range(9):
        for worse in range(min(3, 9 - better)):
            first, second = np.ones((2, records))
            first[:better] = second[better : better + worse] = 0.0
            a, b = summed_up(Figure(first)), summed_up(Figure(second))
            found = difference(a, b, True)
            assert found["difference"] == pytest.approx((better - worse) / records)
            pairs = better + worse
            proved = pairs > 0 and stats.binomtest(better, pairs).pvalue < 0.05
            low, high = found["ci95"]
            assert found["significant"] == proved == (not low <= 0.0 <= high)
            assert low <= found["difference"] <= high


def test_other_records_right_and_wrong_are_compared_as_rates_of_success() -> None:
    a, b = (summed_up(Figure(np.arange(n) < right)) for n, right in ((80, 48), (70, 56)))
    assert difference(a, b, False)["ci95"] == pytest.approx([0.0524, 0.3339], abs=5e-5)
    assert difference(a, b, False)["significant"]
    four, six = (summed_up(Figure(np.arange(6) < right)) for right in (4, 6))
    assert difference(four, six, False)["significant"] is False


def test_every_aggregate_takes_many_sums_at_once() -> None:
    told = json.loads(CIDER.read_text())
    for name, aggregate in AGGREGATES.items():
        if name in ("bleu", "chrf"):
            sums = overlap_rows(name, told["said"], told["references"])[:30].cumsum(0)[9:]
        else:
            sums = np.array([[3.0, 4], [1, 2], [0, 5]])
        whole = aggregate(sums)
        assert whole.shape == (len(sums),)
        for row, value in zip(sums, whole, strict=True):
            assert aggregate(row[None])[0] == pytest.approx(value)
