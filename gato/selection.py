"""Which items of a store are drawn: return filters, what is held out, how stores are balanced."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np

from gato.corpus_config import CorpusConfig
from gato.envs.episode import space_to_json
from gato.envs.records import RecordStore
from gato.envs.store import EpisodeStore


def held_out(items: int, share: float, name: str) -> np.ndarray:
    """Return bool (items,), true for the share of a store's items that is never trained on.

    One item of every 1 / share in a row, drawn from its place and the store's name alone: what is
    held out stays so where a store grows, and is spread over all of it.
    """
    held = np.zeros(items, bool)
    if share > 0:
        block = np.arange(int(items * share) + 2)
        starts = np.ceil(block / share - 1e-9).astype(np.int64)
        length = np.diff(starts)
        chosen = starts[:-1] + (_hash(block[:-1], name) % length.astype(np.uint64)).astype(np.int64)
        held[chosen[chosen < items]] = True
    return held


def _hash(values: np.ndarray, name: str) -> np.ndarray:
    """Return 64 well mixed bits of each value (splitmix64), other ones for each name."""
    x = values.astype(np.uint64) + np.uint64(zlib.crc32(name.encode()) << 32)
    for factor, shift in (
        (0x9E3779B97F4A7C15, 30),
        (0xBF58476D1CE4E5B9, 27),
        (0x94D049BB133111EB, 31),
    ):
        x = x * np.uint64(factor)  # wraps around
        x ^= x >> np.uint64(shift)
    return x


def divide(
    config: CorpusConfig,
    good: Sequence[np.ndarray],
    names: Sequence[str],
    *,
    numbers: Sequence[np.ndarray] | None = None,
    held: bool = False,
) -> list[np.ndarray]:
    """Return per store the items that are trained on or, with `held`, those that never are.

    Args:
        config: of the corpus.
        good: per store, bool (items,): what the filters let pass.
        names: what the stores are called.
        numbers: per store, the number of each item in the whole store, where parts are left out;
            or of the group that it belongs to: what has one number is held out together.
        held: which of the two.

    Raises:
        ValueError: where a store has nothing to train on, or the corpus nothing held out.
    """
    found, count = [], 0
    known = [np.arange(len(mask)) for mask in good] if numbers is None else numbers
    for mask, name, number in zip(good, names, known, strict=True):
        out = mask & held_out(int(number.max()) + 1, config.validation, name)[number]
        count += int(np.count_nonzero(out))
        if (out == mask).all():
            raise ValueError(
                f"corpus {config.name!r}: validation={config.validation:g} leaves nothing to train "
                f"on of the {np.count_nonzero(mask)} items of {name!r}; lower it or add data"
            )
        found.append(np.flatnonzero(out if held else mask & ~out))
    if config.validation and not count:
        raise ValueError(
            f"corpus {config.name!r}: validation={config.validation:g} holds out none of its "
            f"{sum(int(m.sum()) for m in good)} items; raise it or add data"
        )
    return found


def check_stores(config: CorpusConfig, stores: Sequence[EpisodeStore]) -> None:
    """Check that every store holds episodes, and that stores of one task show the same task.

    Raises:
        ValueError: naming the corpus and the store.
    """
    first: dict[str, EpisodeStore] = {}
    for store in stores:
        if len(store) == 0:
            raise ValueError(
                f"corpus {config.name!r} holds no episodes of {store.spec.id!r}: {store.path} is "
                f"empty. Collect some, or take the folder away."
            )
        require_same_task(f"corpus {config.name!r}", first.setdefault(store.spec.id, store), store)


def check_records(config: CorpusConfig, stores: Sequence[RecordStore]) -> None:
    """Check that every store holds records, and that nothing is asked of them that episodes have.

    Raises:
        ValueError: naming the corpus and the store.
    """
    for store in stores:
        if len(store) == 0:
            raise ValueError(
                f"corpus {config.name!r} holds no records of {store.name!r}: {store.path} is "
                f"empty. Write some, or take the folder away."
            )
    asked = {
        "min_fraction": config.min_fraction is not None,
        "min_return": config.min_return is not None,
        "top": config.top < 1.0,
        "returns": config.returns,
    }
    for name in (n for n, is_asked in asked.items() if is_asked):
        raise ValueError(
            f"corpus {config.name!r}: {name} is about episodes; {stores[0].path} holds records"
        )


def require_same_task(where: str, one: EpisodeStore, other: EpisodeStore) -> None:
    """Raise ValueError where two stores of one task differ in its spaces."""
    for role in ("observation_space", "action_space"):
        a, b = (space_to_json(getattr(s.spec, role)) for s in (one, other))
        if a != b:
            raise ValueError(
                f"{where}: the {role} of {one.spec.id!r} is {getattr(one.spec, role)} in "
                f"{one.path} and {getattr(other.spec, role)} in {other.path}. A task has one; give "
                f"one of the two another id, or leave one out."
            )


def good_episodes(config: CorpusConfig, store: EpisodeStore) -> tuple[np.ndarray, str]:
    """Return bool (episodes,), true for those the return filters keep, and what they asked for.

    Raises:
        ValueError: where they keep none.
    """
    kept = np.ones(len(store), bool)
    asked = []
    if config.min_fraction is not None:
        good, rule = _by_fraction(config.min_fraction, store)
        kept &= good
        asked.append(rule)
    if config.min_return is not None:
        kept &= store.returns >= config.min_return
        asked.append(f"a return of {config.min_return:g}")
    if config.top < 1.0:
        # the best of all, ties by order, so that exactly this share is kept
        best = np.argsort(-store.returns, kind="stable")[: max(1, round(config.top * len(store)))]
        kept &= np.isin(np.arange(len(store)), best)
        asked.append(f"the best {config.top:.0%}")
    rule = ", ".join(asked)
    if not kept.any():
        raise ValueError(
            f"corpus {config.name!r}: none of the {len(store)} episodes in {store.path} reaches "
            f"{rule}; their returns go from {store.returns.min():g} to {store.returns.max():g}. "
            f"Ask for less, or collect better ones."
        )
    return kept, rule


def _by_fraction(fraction: float, store: EpisodeStore) -> tuple[np.ndarray, str]:
    """Return which episodes get that part of the way to the expert, and the rule in words."""
    spec = store.spec
    if spec.measure == "success" and (store.successes >= 0).all():
        if fraction <= 0:
            return np.ones(len(store), bool), "any success"
        return store.successes == 1, "success"
    low, high = spec.random_score, spec.expert_score
    if spec.measure == "return" and low is not None and high is not None and high > low:
        least = low + fraction * (high - low)
        return store.returns >= least, f"{fraction:g} of the way to the expert, {least:g}"
    best, worst = float(store.returns.max()), min(0.0, float(store.returns.min()))
    low = worst if low is None or spec.measure != "return" else min(low, best)
    least = low + fraction * (best - low)
    return store.returns >= least, f"{fraction:g} of the way to its best, {least:g}"


def cumulative_shares(config: CorpusConfig, sizes: Sequence[int]) -> np.ndarray | None:
    """Return the cumulated chance of each store; None where all are as likely."""
    power = config.power()
    if power == 0:
        return None
    weights = np.array(sizes, np.float64) ** power
    return np.cumsum(weights / weights.sum())


def pick(rng: np.random.Generator, stores: int, shares: np.ndarray | None) -> int:
    """Return the index of a store drawn by its chance."""
    if shares is None:
        return int(rng.integers(stores))
    return min(int(np.searchsorted(shares, rng.random(), side="right")), stores - 1)
