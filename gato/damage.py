"""Damaged shards, found before a run begins: an error, or left out and told.

What is left out is written into the configuration (`CorpusConfig.skip`), and so into checkpoints: a
run that goes on leaves out the same shards, whatever has become of them meanwhile.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from gato.config import TrainConfig
from gato.corpora import skipped_of
from gato.corpus_config import CorpusConfig
from gato.distributed import World
from gato.envs.files import stores_below
from gato.envs.mirror import local
from gato.envs.store import damaged_shards
from gato.monitor import Watcher
from gato.run_folder import resolve
from gato.telling import tell


@dataclass(frozen=True)
class Damage:
    """A damaged shard of a corpus."""

    corpus: str
    shard: str
    """As store/shard below the corpus' path."""
    items: int
    """Episodes or records in it."""
    reason: str


def without_damage(
    config: TrainConfig,
    run: Path | None = None,
    *,
    skip: bool = False,
    verify: bool = False,
    say: Callable[[str], None] = lambda told: None,
) -> TrainConfig:
    """Return the run as it can be trained: with what it leaves out, if it leaves out anything.

    Args:
        config: the run.
        run: its folder, if it goes on from a checkpoint there.
        skip: leave damaged shards out, and say so.
        verify: compare every byte with its checksum; by default sizes and headers are looked at.
        say: told of every shard that is left out.

    Raises:
        ValueError: for damage that is not to be left out, naming file and checksum.
    """
    begun = None if run is None else _begun_with(run)
    skips = []
    for corpus in config.corpora:
        if begun is not None:
            corpus = replace(corpus, skip=begun.get(corpus.name, ()))
        found = look(corpus, verify=verify)
        if found and begun is not None:
            raise ValueError(
                f"{_told(found)} What a run leaves out is settled when it begins: restore the "
                f"data, or begin anew with --no-resume."
            )
        if found and not skip:
            raise ValueError(
                f"{_told(found)} Restore the data, or leave damaged shards out with "
                f"--skip-bad-shards."
            )
        for damage in found:
            say(f"corpus {damage.corpus!r}: {_short(damage)} left out. {damage.reason}")
        if found:
            lost = sum(damage.items for damage in found)
            shards = f"{len(found)} damaged {'shard' if len(found) == 1 else 'shards'}"
            say(f"corpus {corpus.name!r}: {shards} left out, {lost} items")
        skips.append(sorted({*corpus.skip, *(damage.shard for damage in found)}))
    return _leaving_out(config, skips)


def agreed(
    config: TrainConfig,
    run: Path | None,
    world: World,
    *,
    skip: bool,
    verify: bool,
    watchers: Sequence[Watcher],
) -> TrainConfig:
    """Return what `without_damage` does in process 0, the same in all; watchers are told."""

    def say(told: str) -> None:
        for watcher in watchers:
            watcher.event("note", text=told)
        if not watchers:
            tell(told)

    def work() -> str:
        whole = without_damage(config, run, skip=skip, verify=verify, say=say)
        return json.dumps([corpus.skip for corpus in whole.corpora])

    return _leaving_out(config, json.loads(world.from_first(work)))


def _leaving_out(config: TrainConfig, skips: Sequence[Sequence[str]]) -> TrainConfig:
    chosen = zip(config.corpora, skips, strict=True)
    return replace(config, corpora=tuple(replace(c, skip=tuple(s)) for c, s in chosen))


def look(corpus: CorpusConfig, *, verify: bool = False) -> list[Damage]:
    """Return the damaged shards of a corpus, but for those that it leaves out.

    Raises:
        ValueError: where a store's manifest is damaged, so that nothing is known of its shards.
    """
    root, found = local(corpus.path), []
    for store in stores_below(root):
        skipped = skipped_of(corpus, root, store)
        if skipped is None:
            continue
        place = store.relative_to(root)
        try:
            damaged = damaged_shards(store, checksums=verify)
        except ValueError as error:
            raise ValueError(f"corpus {corpus.name!r}: {error}") from error
        for shard in damaged:
            if shard.name not in skipped:
                where = (place / shard.name).as_posix()
                found.append(Damage(corpus.name, where, shard.items, shard.reason))
    return found


def _begun_with(run: Path) -> dict[str, tuple[str, ...]] | None:
    """Return per corpus what a run leaves out; None for one without a checkpoint."""
    if not (run / "latest").is_file():
        return None
    try:
        saved = json.loads((resolve(run) / "config.json").read_bytes())["train"]["corpora"]
        return {corpus["name"]: tuple(corpus.get("skip", ())) for corpus in saved}
    except (ValueError, KeyError, TypeError):
        return None  # whoever loads it says what is wrong with it


def _told(found: list[Damage]) -> str:
    more = ""
    if len(found) > 1:
        others = "1 more shard of it is" if len(found) == 2 else f"{len(found) - 1} more of it are"
        more = f" ({others} damaged.)"
    return f"corpus {found[0].corpus!r}: {_short(found[0])} damaged. {found[0].reason}{more}"


def _short(damage: Damage) -> str:
    if damage.shard == ".":  # records are one shard
        return f"all of it, {damage.items} items, is"
    return f"shard {damage.shard} of {damage.items} items is"
