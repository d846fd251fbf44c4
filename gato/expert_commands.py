"""What `gato experts list`, `score` and `train` do."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from typing import Any

from gato.envs import registry
from gato.envs.references import Reference, references, write
from gato.printing import print_json, print_table, progress_bar

Arguments = argparse.Namespace


def experts(chosen: Arguments) -> int | None:
    """Do what was asked, or tell what can be asked."""
    if chosen.action is None:
        chosen.help()
        return None
    return {"list": _list, "score": _score, "train": _train}[chosen.action](chosen)


def _list(chosen: Arguments) -> None:
    """Print a row per task: who its expert is, and how well it and others do."""
    if chosen.suite is not None and chosen.suite not in registry.SUITES:
        raise ValueError(f"expected a suite of {', '.join(registry.SUITES)}; got {chosen.suite!r}.")
    rows = [_expert(task_id) for task_id in registry.task_ids(f"{chosen.suite or '*'}/*")]
    if chosen.json:
        print_json(rows)
    elif rows:
        shown = ("task", "expert", "measure", "random", "mean", "human", "episodes", "settings")
        print_table([{k: row[k] for k in shown} for row in rows])
        if any(row["expert"] == "learned" for row in rows):
            print("learned: none comes with the task; gato experts train TASK --out DIR makes one")
    else:
        print(f"suite {chosen.suite!r} lists no tasks; gato experts train makes an expert of any")


def _expert(task_id: str) -> dict[str, Any]:
    spec = registry.spec(task_id)
    rows = references().get(task_id, {})
    ours = rows.get("expert")
    return {
        "task": task_id,
        "expert": spec.expert,
        "measure": spec.measure,
        "random": spec.random_score,
        "mean": spec.expert_score,
        "human": spec.human_score,
        "episodes": ours.episodes if ours else None,
        "settings": ours.expert if ours else None,
        "source": spec.score_source,
    }


def _score(chosen: Arguments) -> int:
    """Play episodes at evaluation seeds and print, or write to the table, what they show."""
    from gato.envs.score import PLAYED_BY_US, score_all
    from gato.envs.workers import last_words

    policies = PLAYED_BY_US if chosen.policy == "both" else (chosen.policy,)
    pairs = _pairs(chosen.tasks, policies, chosen.expert)
    if chosen.write:
        _refuse_another(pairs, chosen.expert)
    before = references()
    rows, failures = [], []
    with progress_bar() as bar:
        all_ = bar.add_task("", total=len(pairs) * chosen.episodes)
        scores = score_all(
            pairs,
            chosen.episodes,
            kind=chosen.expert,
            seed=chosen.seed,
            workers=chosen.workers,
            timeout=chosen.timeout,
            progress=lambda task: bar.update(all_, advance=1, description=task),
        )
        for one in scores:
            for played in one.failed:
                failures.append(f"{one.task} at seed {played.seed}: {last_words(played.error)}")
                print(failures[-1], played.error, sep="\n", file=sys.stderr)
            if one.failed:
                continue
            row = one.reference()
            if chosen.write:  # at once: an interrupted sweep keeps what it has measured
                write([row])
            old = before.get(one.task, {})
            rows.append(_scored(one, row, old))
            bar.console.print(_line(rows[-1]), soft_wrap=True, markup=False, highlight=False)
    if chosen.json:
        print_json(rows)
    elif rows:
        hidden = ("returns", "successes", "lengths", "first_seed", "versions", "source")
        print_table([{k: v for k, v in row.items() if k not in hidden} for row in rows])
    if failures:
        raise RuntimeError(f"{len(failures)} episodes failed: {'; '.join(failures)}")
    return 0


def _pairs(patterns: list[str], policies: tuple[str, ...], kind: str) -> list[tuple[str, str]]:
    """Return tasks and who plays them; see `with_experts` for those that have no expert."""
    from gato.world_commands import matching, with_experts

    ids = matching(patterns)
    able = with_experts(ids, patterns) if kind == "auto" and "expert" in policies else ids
    return [(i, policy) for i in ids for policy in policies if policy != "expert" or i in able]


def _refuse_another(pairs: list[tuple[str, str]], kind: str) -> None:
    """Raise ValueError where the table would name another expert than the one that `auto` plays."""
    for task_id, policy in pairs:
        own = registry.spec(task_id).expert
        if policy == "expert" and kind not in ("auto", own) and own in registry.KINDS:
            raise ValueError(
                f"expected the {own} expert of {task_id!r}, whose score the table holds; got "
                f"{kind!r}. Leave out --expert to measure that one, or --write to measure this "
                f"one without replacing its row."
            )


def _scored(one: Any, row: Reference, old: dict[str, Reference]) -> dict[str, Any]:
    """Return what is shown of one task and policy; ``table`` is what the table said before."""
    human, same = old.get("human"), old.get(one.policy)
    successes = [e.success for e in one.episodes]
    return {
        **asdict(row),
        "human": human.mean if human else None,
        "table": same.mean if same else None,
        "seconds": round(one.seconds, 1),
        "returns": [e.score for e in one.episodes],
        "successes": None if None in successes else successes,
        "lengths": [e.steps for e in one.episodes],
    }


def _line(row: dict[str, Any]) -> str:
    return (
        f"{row['task']} {row['policy']}: {row['measure']} {row['mean']:.4g} "
        f"(std {row['std']:.3g}, {row['episodes']} episodes, {row['seconds']:.0f} s)"
    )


def _train(chosen: Arguments) -> None:
    """Train a specialist and say where it is and how to use it."""
    from gato.envs.experts.training import Status, train

    with progress_bar() as bar:
        whole = bar.add_task(chosen.task, total=100)  # percent

        def progress(now: Status) -> None:
            told = f"{now.steps:,} steps"
            for name, value in (("return", now.mean_return), ("best", now.best)):
                told += "" if value is None else f", {name} {value:.4g}"
            bar.update(
                whole, completed=int(100 * now.fraction), description=f"{chosen.task}: {told}"
            )
            if now.checked:
                bar.console.print(told, soft_wrap=True, markup=False, highlight=False)

        try:
            done = train(
                chosen.task,
                chosen.out,
                algorithm=chosen.algorithm,
                minutes=chosen.minutes,
                steps=chosen.steps,
                envs=chosen.envs,
                seed=chosen.seed,
                until=chosen.until,
                resume=chosen.resume,
                progress=progress,
            )
        except KeyboardInterrupt:
            raise KeyboardInterrupt("interrupted; the same command goes on from here") from None
    best = done.best
    result = {
        "expert": str(chosen.out),
        **done.settings,
        "steps": done.steps,
        "minutes": round(done.minutes, 2),
        "best_return": best.mean_return if best else None,
        "best_success_rate": best.success_rate if best else None,
    }
    if chosen.json:
        print_json(result)
    else:
        print_table([result])
        print(f"finished; measure it: gato experts score {chosen.task!r} --expert {chosen.out}")
