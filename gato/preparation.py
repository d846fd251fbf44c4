"""What `gato train` settles before a run begins: what is held out, what is played meanwhile."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gato.telling import tell

if TYPE_CHECKING:
    import rich.progress

    from gato.config import TrainConfig
    from gato.corpora import Corpus, CorpusConfig
    from gato.train import Progress

VALIDATION = 0.02
"""Share that corpora hold out from the command line, where they set none of their own."""


def opened(config: TrainConfig) -> list[Corpus]:
    """Return the corpora of a run, each whole."""
    return [_open(corpus, config) for corpus in config.corpora]


def _open(corpus: CorpusConfig, config: TrainConfig) -> Corpus:
    from gato.corpora import open_corpus
    from gato.tokenizers.serializer import Serializer

    return open_corpus(corpus, Serializer(config.codec))


def validated(
    config: TrainConfig, asked: float | None, goes_on: Path | None
) -> tuple[TrainConfig, list[str]]:
    """Return the run with corpora that hold something out, and what a person should know.

    Args:
        config: the run; corpora that set `validation` keep it.
        asked: the share for the others; None for the default, or what a run that goes on has.
        goes_on: the folder of that run.
    """
    corpora, notes = [], []
    before = None if asked is not None or goes_on is None else _saved(goes_on)
    for corpus in config.corpora:
        if before is not None:
            found = before["validation"].get(corpus.name, 0.0)
            corpus = dataclasses.replace(corpus, validation=corpus.validation or found)
        elif not corpus.validation:
            share = VALIDATION if asked is None else asked
            split = dataclasses.replace(corpus, validation=share)
            if share and _too_small(split, config):
                notes.append(
                    f"corpus {corpus.name!r} is too small to hold out {share:g} of it: all of it "
                    f"is trained on, and it is not validated"
                )
                split = corpus
            corpus = split
        corpora.append(corpus)
    every = config.validate_every or (before["validate_every"] if before else config.save_every)
    every = every if any(c.validation and c.weight for c in corpora) else config.validate_every
    changed = dataclasses.replace(config, corpora=tuple(corpora), validate_every=every)
    changed.require_best()
    return changed, notes


def _saved(run: Path) -> dict[str, Any] | None:
    """Return what a run that goes on holds out; None where it does not say."""
    from gato.run_folder import resolve

    if not (run / "latest").is_file():
        return None
    try:
        found = json.loads((resolve(run) / "config.json").read_bytes())["train"]
        shares = {c["name"]: float(c.get("validation", 0.0)) for c in found["corpora"]}
        return {"validation": shares, "validate_every": int(found.get("validate_every", 0))}
    except (ValueError, KeyError, TypeError):
        return None  # training will say what is wrong with it


def _too_small(corpus: CorpusConfig, config: TrainConfig) -> bool:
    """Return whether a corpus, which can be opened whole, cannot be split as it is asked to."""
    try:
        return _open(corpus, config).held_out() is None
    except ValueError:
        return True


def evaluated(
    config: TrainConfig, corpora: list[Corpus]
) -> tuple[TrainConfig, Callable[[Path], dict[str, float]] | None]:
    """Return the run with its eval_tasks' patterns as tasks, and what plays them."""
    from gato.corpora import EpisodeCorpus

    if not config.eval_tasks:
        return config, None
    from gato.envs.cameras import split
    from gato.envs.gym import require_imported
    from gato.envs.registry import matches
    from gato.rollouts.during_training import evaluation
    from gato.world_commands import matching

    stores = [s for c in corpora if isinstance(c, EpisodeCorpus) for s in c.stores]
    known = sorted({store.spec.id for store in stores})
    for pattern in config.eval_tasks:
        wild = set(split(pattern)[0]) & set("*?[")
        if wild and not any(matches(task, pattern) for task in known):
            theirs = f"its tasks are {', '.join(known)}" if known else "it has no tasks"
            raise ValueError(
                f"expected eval_tasks that this run is trained on; {pattern!r} matches none of "
                f"them: {theirs}."
            )
    tasks = tuple(matching(list(config.eval_tasks), known))
    require_imported(tasks)  # those that were typed in full are
    config = dataclasses.replace(config, eval_tasks=tasks)
    return config, evaluation(tasks, config.eval_episodes, stores)


def judged_by_returns(config: TrainConfig) -> list[str]:
    """Return a note on tasks whose returns would outweigh other tasks' shares of the best score."""
    from gato.envs import registry
    from gato.rollouts.statistics import normalised

    if not config.keep_best or len(config.eval_tasks) < 2:
        return []
    specs = [registry.spec(task) for task in config.eval_tasks]
    raw = [
        spec.id
        for spec in specs
        if spec.measure != "success"
        and normalised(0.0, spec.random_score, spec.expert_score) is None
    ]
    if not raw:
        return []
    return [
        f"keep_best compares mean scores of {len(specs)} tasks; of {', '.join(raw)} no scores of "
        f"chance and expert are known, so that plain returns are averaged with the others' shares "
        f"and may decide alone. Leave them out of eval_tasks, or set their scores."
    ]


class Shown:
    """What the terminal shows of a run."""

    def __init__(self, bar: rich.progress.Progress, steps: int) -> None:
        self._bar, self._line = bar, bar.add_task("training", total=steps)

    def progress(self, p: Progress) -> None:
        """Move the bar."""
        about = f"{p.figures()}  {p.tokens_per_second:,.0f} tokens/s"
        if p.mfu is not None:
            about += f"  {p.mfu:.0%} MFU"
        self._bar.update(self._line, completed=p.step, description=about)
        if not sys.stderr.isatty():
            tell(f"step {p.step}/{p.steps}  {about}")

    def metrics(self, line: dict[str, Any]) -> None:
        """Print what was measured."""
        told = ""
        if "validation" in line:
            told = "held out: " + "  ".join(
                f"{name} {row['loss']:.3f} (perplexity {row['perplexity'] or math.inf:.4g})"
                if row["loss"] is not None
                else f"{name} no number"
                for name, row in line["validation"].items()
            )
        elif "evaluation" in line:
            told = "played: " + "  ".join(
                f"{name} {value:.3g}" for name, value in line["evaluation"].items()
            )
        if told:
            about = f"step {line['step']}  {told}"
            self._bar.console.print(about, markup=False, highlight=False, soft_wrap=True)

    def event(self, kind: str, **facts: Any) -> None:
        """Print what a person should know."""
        if kind == "note":
            self._bar.console.print(facts["text"], markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Do nothing: the bar is its owner's."""
