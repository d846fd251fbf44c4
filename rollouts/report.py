"""The page of an evaluation, or of several side by side: one HTML file to keep, send and print."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from gato.rollouts.metrics import divided
from gato.rollouts.pages import (
    SERIES,
    Scale,
    bar,
    cards,
    curve,
    interval,
    page,
    pairs,
    percent,
    plain,
    table,
    text,
)
from gato.rollouts.report_language import compared_section, language_section
from gato.rollouts.statistics import Stratified, excluded
from gato.rollouts.video import Clip

FINE = np.arange(101) / 100
"""Thresholds of the drawn curve."""
Result = Mapping[str, Any]


def report(
    result: Result,
    clips: Sequence[Clip] = (),
    no_clips: str = "",
    gallery: Mapping[str, Sequence[Any]] | None = None,
) -> str:
    """Return the page of an evaluation.

    Args:
        result: what `evaluate` returned.
        clips: videos of some of its episodes.
        no_clips: why there are none.
        gallery: the pictures of the examples of its language tasks.
    """
    title = f"{result['checkpoint']} on {len(result['tasks'])} tasks"
    control, language = divided(result["tasks"])
    result = {**result, "tasks": control}
    sections = (
        _head(title, result),
        _tasks(result),
        _curve(result),
        language_section(language, gallery or {}),
        _videos(clips, no_clips if control else ""),
        _failures(result),
        _settings(result),
    )
    return page(title, [section for section in sections if section])


def _head(title: str, result: Result) -> str:
    found = result["summary"]
    counted = found["tasks"]
    figures = []
    if counted:
        half, whole = found["tasks_at_50_percent"], found["tasks_at_100_percent"]
        figures = [
            _sure("of expert, mean of the tasks", found["mean"], found["mean_ci95"]),
            _sure("interquartile mean of the tasks", found["expert_normalised_iqm"], found["ci95"]),
            _sure(
                "interquartile mean of all episodes",
                found["episodes_iqm"],
                found["episodes_iqm_ci95"],
            ),
            (f"{half} / {counted}", "tasks at half of the expert's score or more"),
            (f"{whole} / {counted}", "tasks at the expert's score or more"),
        ]
    if human := found["human"]:
        about = (
            f"of people, median of the {human['tasks']} with a human score (interquartile mean of "
            f"their episodes: {percent(human['episodes_iqm'])})"
        )
        figures.append((percent(human["median"]), about))
    failed = sum(len(task["failures"]) for task in result["tasks"].values())
    if failed:
        figures.append((str(failed), "episodes failed: see below"))
    episodes = sum(len(task["returns"]) for task in result["tasks"].values())
    head = f"<h1>{text(title)}</h1>\n"
    if not result["tasks"]:
        return head
    said = (
        f"{episodes} episodes at seeds from {result['settings']['first_seed']} on, "
        f"{result['seconds']:.0f} seconds. 0% is the random policy, 100% the task's expert; "
        "intervals cover 95%, by bootstrap over each task's episodes; of a rate of success they "
        "are Wilson's."
    )
    head += f"<p class='dim'>{text(said)}</p>\n{cards(figures)}"
    return head + _no_intervals(found["no_intervals"])


def _no_intervals(why: str | None) -> str:
    return f'\n<p class="bad">{text(why[:1].upper() + why[1:])}.</p>' if why else ""


def _sure(about: str, value: float, ends: Sequence[float] | None) -> tuple[str, str]:
    return percent(value), f"{about} ({interval(ends)})" if ends else about


def _scale(rows: Iterable[Mapping[str, Any]]) -> Scale:
    """Return the scale on which all of a page's scores and intervals are drawn."""
    known = [row for row in rows if row["expert_normalised"] is not None]
    return Scale(
        x for row in known for x in row["expert_normalised_ci95"] or [row["expert_normalised"]]
    )


def _by_suite(names: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Yield suites with their tasks."""
    for suite in sorted({name.split("/")[0] for name in names}):
        yield suite, [name for name in names if name.split("/")[0] == suite]


def _tasks(result: Result) -> str:
    tasks = result["tasks"]
    if not tasks:
        return ""
    scale = _scale(tasks.values())
    headings = (
        "task",
        "random ┆ expert",
        "% of expert",
        "95%",
        "score",
        "random",
        "expert",
        "episodes",
        "failed",
    )
    parts = ["<h2>Tasks</h2>", "<p>Dashed lines mark the random policy and the expert.</p>"]
    for suite, names in _by_suite(list(tasks)):
        parts.append(f"<h3>{text(suite)}</h3>")
        rows = []
        for name in names:
            task = tasks[name]
            value, ends = task["expert_normalised"], task["expert_normalised_ci95"]
            rows.append(
                (
                    text(name.removeprefix(f"{suite}/")),
                    bar(name, scale, [(value, ends)]),
                    percent(value),
                    interval(ends),
                    _score(task),
                    _number(task["random_score"]),
                    _number(task["expert_score"]),
                    str(len(task["returns"])),
                    _failed(task),
                )
            )
        parts.append(table(headings, rows, extra=(3, 5, 6, 7, 8)))
    reasons = {name: why for name, task in tasks.items() if (why := excluded(task))}
    if reasons:
        listed = "".join(f"<li>{text(name)}: {text(why)}</li>" for name, why in reasons.items())
        parts.append(f"<p>Left out of the aggregates:</p><ul>{listed}</ul>")
    return "\n".join(parts)


def _failed(task: Mapping[str, Any]) -> str:
    count = len(task["failures"])
    return f'<b class="bad">{count}</b>' if count else "0"


def _score(task: Mapping[str, Any]) -> str:
    by_success = task["measure"] == "success"
    return _number(task["success_rate"] if by_success else task["mean_return"])


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _curve(result: Result) -> str:
    known = [task for task in result["tasks"].values() if excluded(task) is None]
    if not known:
        return ""
    line = Stratified(known, result["settings"]["seed"]).curve(FINE)
    half, whole = line["share"][50], line["share"][-1]
    about = f"{half:.0%} of {len(known)} tasks reach half of the expert's score, {whole:.0%} all."
    return (
        "<h2>Tasks at or above a part of the expert's score</h2>\n"
        f"<p>{text(about)}{' The band is the 95% interval.' * (line['low'] is not None)}</p>\n"
        f'<figure class="chart">{curve([line], about)}</figure>'
    )


def _videos(clips: Sequence[Clip], no_clips: str) -> str:
    if not clips and not no_clips:
        return ""
    parts = ["<h2>Videos</h2>"]
    if no_clips:
        parts.append(f"<p>None: {text(no_clips)}</p>")
    shown = []
    for clip in clips:
        name = f"<b>{text(clip.task)}</b>, seed {clip.seed}<br/>"
        if clip.webm is None:
            shown.append(
                f"<figure><figcaption>{name}no video: {text(clip.fault)}</figcaption></figure>"
            )
            continue
        data = base64.b64encode(clip.webm).decode()
        shown.append(
            f'<figure><video controls="" loop="" muted="" playsinline="" preload="auto" '
            f'data-task="{text(clip.task)}" aria-label="{text(clip.task)}, an evaluated episode" '
            f'src="data:video/webm;base64,{data}"></video>'
            f"<figcaption>{name}{text(clip.about)}</figcaption></figure>"
        )
    return "\n".join([*parts, f'<div class="clips">{"".join(shown)}</div>'])


def _failures(result: Result) -> str:
    failed = [(n, f) for n, task in result["tasks"].items() for f in task["failures"]]
    if not failed:
        return ""
    told = "\n".join(
        f"<details><summary>{text(name)}, seed {text(f['seed'])}</summary>"
        f"<pre>{text(f['traceback'])}</pre></details>"
        for name, f in failed
    )
    return (
        f'<h2 class="bad">Failed episodes: {len(failed)}</h2>\n<p>Their environment raised. They '
        f"count with the rewards they had, and as no success.</p>\n{told}"
    )


def _settings(result: Result) -> str:
    sources = {t: task["score_source"] for t, task in result["tasks"].items()}
    listed = "".join(f"<li>{text(t)}: {text(plain(s))}</li>" for t, s in sources.items())
    told = (
        f"<h2>Settings</h2>\n{pairs(result['settings'])}\n<h2>Versions</h2>\n"
        f"{pairs(result['versions'])}"
    )
    if not listed:
        return told
    return (
        f"{told}\n<details><summary>Where the reference scores come from"
        f"</summary><ul>{listed}</ul></details>"
    )


def comparison_report(found: Result) -> str:
    """Return the page of what `compare` returned."""
    names = found["files"]
    title = f"{len(names)} results on {len(found['tasks']) + len(found['language'])} tasks"
    keys = "".join(
        f'<li><span class="key {SERIES[i % 4]}"></span>{text(name)}: '
        f"<code>{text(found['checkpoints'][name])}</code></li>"
        for i, name in enumerate(names)
    )
    warned = "".join(f"<li>{text(warning)}</li>" for warning in found["warnings"])
    parts = [
        f"<h1>{text(title)}</h1>",
        f"<ul>{keys}</ul>",
        f'<p class="bad">These may differ by more than the policy:</p><ul>{warned}</ul>'
        if warned
        else "",
        _no_intervals(found["no_intervals"]),
        _compared_aggregates(found),
        _compared_tasks(found),
        compared_section(found["language"], names),
    ]
    return page(title, [part for part in parts if part])


def _compared_aggregates(found: Result) -> str:
    rows = []
    for name, row in found["summary"].items():
        rows.append(
            (
                text(name),
                _with_ends(row["episodes_iqm"], row["episodes_iqm_ci95"]),
                _difference(row.get("difference")),
                _with_ends(row["mean"], row["mean_ci95"]),
                f"{row['tasks_at_50_percent']} / {row['tasks']}",
                f"{row['tasks_at_100_percent']} / {row['tasks']}",
            )
        )
    headings = ("", "interquartile mean of episodes", "difference from the first", "mean of tasks")
    headings += ("tasks at 50%", "tasks at 100%")
    return f"<h2>All tasks</h2>\n{table(headings, rows, extra=(4, 5))}" if rows else ""


def _with_ends(value: float, ends: Sequence[float] | None) -> str:
    return f"{percent(value)} ({interval(ends)})" if ends else percent(value)


def _compared_tasks(found: Result) -> str:
    names, tasks = found["files"], found["tasks"]
    if not tasks:
        return ""
    scale = _scale(row for task in tasks.values() for row in task["scores"].values())
    parts = [
        "<h2>Tasks</h2>",
        "<p>Dashed lines mark the random policy and the expert. A difference in bold is one that "
        "chance explains in fewer than 5 of 100 cases; among many tasks some are so by chance.</p>",
    ]
    headings = ["task", "random ┆ expert", *names, *(f"{n} - {names[0]}" for n in names[1:])]
    for suite, members in _by_suite(list(tasks)):
        rows = []
        for name in members:
            task = tasks[name]
            scores = [task["scores"][n] for n in names]
            shown = [(s["expert_normalised"], s["expert_normalised_ci95"]) for s in scores]
            plain_scores = [
                percent(s["expert_normalised"]) if task["normalised"] else _number(s["score"])
                for s in scores
            ]
            differences = [
                _difference(task["differences"][n], task["normalised"]) for n in names[1:]
            ]
            rows.append(
                (
                    text(name.removeprefix(f"{suite}/")),
                    bar(name, scale, shown),
                    *plain_scores,
                    *differences,
                )
            )
        parts += [f"<h3>{text(suite)}</h3>", table(headings, rows)]
    return "\n".join(parts)


def _difference(found: Mapping[str, Any] | None, of_expert: bool = True) -> str:
    if found is None:
        return "-"
    if not of_expert:
        told = f"{found['difference']:+.4g}"
        told += f" ({found['ci95'][0]:.4g} to {found['ci95'][1]:.4g})" if found["ci95"] else ""
    else:
        told = f"{100 * found['difference']:+.0f}"
        told += f" ({interval(found['ci95'])})" if found["ci95"] else ""
    return f"<b>{told}</b>" if found["significant"] else told
