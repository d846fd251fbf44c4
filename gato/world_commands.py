"""Commands about worlds: tasks, experts, demonstrations, and how well a policy plays."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from typing import Any

from gato.data_commands import stores_at
from gato.envs import registry
from gato.envs.cameras import split
from gato.envs.episode import TaskSpec, flatten_space
from gato.envs.gym import imported
from gato.printing import console, print_json, print_table, progress_bar

Arguments = argparse.Namespace


def tasks(chosen: Arguments) -> int | None:
    """List the tasks, or check that they keep what their specs promise."""
    if chosen.suite is not None and chosen.suite not in registry.SUITES:
        raise ValueError(f"expected a suite of {', '.join(registry.SUITES)}; got {chosen.suite!r}.")
    if chosen.patterns:
        named = [i for i in matching(chosen.patterns) if chosen.suite in (None, i.split("/")[0])]
    else:
        named = registry.task_ids(f"{chosen.suite or '*'}/*")
        named += imported() if chosen.suite in (None, "gym") else []
    if chosen.check:
        return _check(named, chosen)
    listed = [_task(registry.spec(i)) for i in named]
    if chosen.json:
        print_json(listed)
    elif listed:
        shown = ("id", "modalities", "max_steps", "random_score", "expert_score", "expert")
        print_table([{k: row[k] for k in shown} for row in listed])
    if chosen.suite == "gym" and not chosen.json:
        print("every registered Gymnasium environment is a task: gym/<its id>")
    return None


def _check(named: list[str], chosen: Arguments) -> int:
    """Sweep over tasks; print a row for each, and how many of each suite are in order."""
    from gato.rollouts.sweep import Row, summary, sweep, to_json

    with progress_bar() as bar:
        all_ = bar.add_task("", total=len(named))

        def progress(row: Row) -> None:
            bar.update(all_, advance=1, description=row.id)
            if row.fault:  # at once: the sweep of all tasks takes minutes
                bar.console.print(row.id, row.fault, soft_wrap=True, markup=False, highlight=False)

        rows = sweep(named, chosen.workers, progress)
    if chosen.json:
        print(to_json(rows))
    else:
        print_table([{"task": r.id, "seconds": r.seconds, "found": r.fault or "ok"} for r in rows])
        print_table([{"suite": suite, **counts} for suite, counts in summary(rows).items()])
    return int(any(row.fault for row in rows))


def _task(spec: TaskSpec) -> dict[str, Any]:
    from gato.tokenizers.spaces import CodecOptions, codec

    roles = {"observation": spec.observation_space, "action": spec.action_space}
    modalities = {
        codec(leaf, role, CodecOptions(), f"{spec.id}: {path}")[0]
        for role, space in roles.items()
        for path, leaf in flatten_space(space, role).items()
    }
    kept = ("max_steps", "random_score", "expert_score", "score_source", "expert")
    return {
        "id": spec.id,
        "suite": spec.suite,
        "modalities": sorted(modalities | ({"text"} if spec.instruction else set())),
        **{name: getattr(spec, name) for name in kept},
    }


def matching(patterns: list[str], known: list[str] | None = None) -> list[str]:
    """Return the task ids that patterns name, each once, in their order.

    Raises:
        ValueError: for a pattern without wildcards that is no task, or one that matches none.
    """
    found: dict[str, None] = {}
    for pattern in patterns:
        if not set(split(pattern)[0]) & set("*?["):
            found[registry.spec(pattern).id] = None  # an unknown one raises, with the closest
            continue
        users = imported() if known is None else known
        matched = [task_id for task_id in users if registry.matches(task_id, pattern)]
        if known is None:
            matched = registry.task_ids(pattern) + matched
        if not matched:
            raise ValueError(f"expected a pattern that matches a task; {pattern!r} matches none.")
        found.update(dict.fromkeys(matched))
    return list(found)


def with_experts(ids: list[str], patterns: list[str]) -> list[str]:
    """Return the tasks that come with an expert and those that are named; tell of the rest.

    One that is named is refused where it is played.
    """
    left_out = [i for i in ids if not registry.has_expert(i) and i not in patterns]
    if left_out:
        told = f"left out, without an expert: {', '.join(left_out)}"
        print(f"{told} (gato experts train makes one)", file=sys.stderr)
    return [i for i in ids if i not in left_out]


def collect(chosen: Arguments) -> None:
    """Let experts play, store what they do, and say how much of it was kept."""
    from gato.envs.collect import collect as run

    ids = matching(chosen.tasks)
    if chosen.expert == "auto":
        ids = with_experts(ids, chosen.tasks)
    if not ids:
        raise ValueError(
            f"expected tasks with an expert; {', '.join(chosen.tasks)} has none. Train one (gato "
            f"experts train TASK --out DIR) and give --expert DIR."
        )
    rows: list[dict[str, Any]] = []
    with progress_bar() as bar:
        bars: dict[str, Any] = {}

        def progress(task: str, kept: int, wanted: int, tried: int) -> None:
            if task not in bars:
                bars[task] = bar.add_task(task, total=wanted)
            bar.update(bars[task], completed=kept, description=f"{task} ({tried} tried)")

        run(
            ids,
            chosen.episodes,
            chosen.out,
            expert=chosen.expert,
            seed=chosen.seed,
            noise=chosen.noise,
            workers=chosen.workers,
            min_fraction=chosen.min_fraction,
            timeout=chosen.timeout,
            progress=progress,
            on_done=lambda one: rows.append({**asdict(one), "store": str(one.store)}),
        )
    if chosen.json:
        print_json(rows)
    else:
        print_table(rows)


def replay(chosen: Arguments) -> None:
    """Do what was logged again, and tell whether the same came of it."""
    from gato.envs.store import EpisodeStore, open_store
    from gato.rollouts.replay import changed_versions
    from gato.rollouts.replay import replay as run

    opened = [open_store(folder) for folder in stores_at(chosen.store)]
    stores = [s for s in opened if isinstance(s, EpisodeStore) and len(s)]
    if not stores:
        raise ValueError(f"expected a store with episodes at {chosen.store}; found none.")
    indices = [range(len(s)) if chosen.all else [chosen.episode] for s in stores]
    rows: list[dict[str, Any]] = []
    changed: dict[str, tuple[str, str]] = {}
    with progress_bar() as bar:
        all_ = bar.add_task("", total=sum(map(len, indices)))
        for store, some in zip(stores, indices, strict=True):
            changed |= changed_versions(store.manifest)
            for one in run(store, some):
                rows.append(asdict(one))
                bar.update(all_, advance=1, description=one.task)
    for name, (then, now) in changed.items():
        print(f"{name} was {then} when this was logged and is {now} now", file=sys.stderr)
    if chosen.json:
        print_json(rows)
    else:
        print_table([{k: v for k, v in row.items() if k != "store"} for row in rows])
    others = [row for row in rows if not row["reproduced"]]
    if others:
        first = f"episode {others[0]['episode']} of {others[0]['store']}"
        raise RuntimeError(
            f"{len(others)} of {len(rows)} episodes are not reproduced; {first} differs at "
            f"{others[0]['difference']}"
        )


def show(chosen: Arguments) -> None:
    """Print a stream."""
    from gato.show import show as tokens_of
    from gato.show import table

    tokens = tokens_of(
        chosen.what,
        steps=chosen.steps,
        seed=chosen.seed,
        index=chosen.index,
        codec=chosen.codec,
        checkpoint=chosen.checkpoint,
        returns=chosen.returns,
        joint=chosen.joint,
        shown=chosen.shown,
        frame_cell=chosen.frame_cell,
        pairs=chosen.pairs,
    )
    if chosen.json:
        print("[\n" + ",\n".join(json.dumps(token) for token in tokens) + "\n]")
    else:
        table(tokens, console())


def evaluate(chosen: Arguments) -> int:
    """Play tasks with a checkpoint."""
    from gato.evaluation_commands import evaluate as run

    return run(chosen)


def compare(chosen: Arguments) -> None:
    """Show results of evaluations side by side."""
    from gato.evaluation_commands import compare as run

    run(chosen)


def experts(chosen: Arguments) -> int | None:
    """List, score or train experts."""
    from gato.expert_commands import experts as run

    return run(chosen)
