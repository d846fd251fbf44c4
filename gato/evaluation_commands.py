"""`gato eval` and `gato compare`: how well policies play, and which plays better."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gato.printing import print_json, print_table, progress_bar
from gato.telling import tell

if TYPE_CHECKING:
    from gato.rollouts.agent import Agent
    from gato.rollouts.language_tasks import Gallery
    from gato.rollouts.metrics import Options
    from gato.rollouts.video import Clip, Recorder

Arguments = argparse.Namespace
EPISODES = 20
"""Played of each task where no number is asked for."""


def evaluate(chosen: Arguments) -> int:
    """Play tasks with a checkpoint, the expert or chance; 1 where an episode failed."""
    from gato.envs.files import make_folder
    from gato.envs.readers.video import require_av
    from gato.rollouts.evaluate import evaluate as run
    from gato.rollouts.speed import Speed
    from gato.rollouts.video import Recorder

    for option in ("json", "report"):
        _check_writable(option, getattr(chosen, option))
    if chosen.video is not None:
        require_av()
        make_folder(chosen.video, "--video as a folder")
    player, ids, language = _player(chosen)
    wanted = chosen.video is not None or chosen.report is not None
    recorder = Recorder(chosen.video_episodes) if wanted and ids else None
    speed, gallery = Speed(), dict[str, Any]()
    episodes = EPISODES if chosen.episodes is None else chosen.episodes
    with progress_bar() as bar:
        bars = {task: bar.add_task(task, total=episodes) for task in ids + language}
        whole = bar.add_task("all", total=episodes * len(ids)) if ids else None

        def progress(task: str, played: int, wanted: int) -> None:
            if task in language:  # measured as a whole; how many records there are, shows then
                bar.update(bars[task], completed=played, total=wanted)
                return
            bar.update(bars[task], completed=played)
            if whole is not None:
                bar.update(whole, advance=1, description=str(speed))

        result = run(
            player,
            ids + language,
            episodes,
            seed=chosen.seed,
            workers=chosen.workers,
            expert=chosen.expert,
            temperature=chosen.temperature,
            kappa=chosen.kappa,
            execute=chosen.execute,
            precision=_precision(chosen),
            prompt_store=chosen.prompts,
            max_batch=chosen.max_batch,
            timeout=chosen.timeout,
            recorder=recorder,
            progress=progress,
            speed=speed,
            records=chosen.episodes,
            options=_options(chosen),
            gallery=gallery,
        )
    try:  # the figures first: what follows may fail, and must not for a reader who has left
        if chosen.json == "-":
            print_json(result)
        elif chosen.json is not None:
            _write(Path(chosen.json), json.dumps(result, indent=1))
        failed = _tell(result, chosen.json != "-")
    finally:
        _show(result, recorder, gallery, chosen)
    return int(failed > 0)


def _options(chosen: Arguments) -> Options:
    """Return what is asked of the measures of language."""
    from gato.rollouts.choices import check_choices
    from gato.rollouts.metrics import Options

    given = (chosen.choices or "").split(",")
    choices = tuple(choice.strip() for choice in given if choice.strip())
    if chosen.choices is not None:
        check_choices(choices)
    return Options(chosen.seed, choices=choices)


def _tell(result: dict[str, Any], table: bool) -> int:
    """Print the figures, and which episode failed first; return how many did."""
    from gato.envs.workers import last_words
    from gato.rollouts.metrics import divided

    control, language = divided(result["tasks"])
    if table and control:
        _print(result, control)
    if table and language:
        _print_language(language)
    for name, row in language.items():
        for note in row["notes"]:
            tell(f"{name}: {note}")
    failed = sum(len(task["failures"]) for task in control.values())
    if failed:
        name, first = next((t, r["failures"][0]) for t, r in control.items() if r["failures"])
        last = last_words(first["traceback"])
        number = "1 episode" if failed == 1 else f"{failed} episodes"
        told = f"{number} failed; {name} at seed {first['seed']}: {last}"
        tell(f"gato: {told}")
    return failed


def _player(chosen: Arguments) -> tuple[Agent | str, list[str], list[str]]:
    """Return who plays, and which tasks of control and of language."""
    from gato import kernels, load
    from gato.decoding import decoding_dtype
    from gato.envs.gym import require_imported
    from gato.rollouts import language_tasks
    from gato.rollouts.measures import KINDS
    from gato.rollouts.players import PLAYERS
    from gato.world_commands import matching

    name = str(chosen.checkpoint)
    if chosen.expert is not None and name != "expert":
        raise ValueError(f"expected --expert with `gato eval expert` only; got it with {name}.")
    language, others = language_tasks.matching(chosen.tasks or ())
    if chosen.choices is not None:
        choosing = [kind for kind, about in KINDS.items() if about.chooses]
        if not {task.partition("/")[0] for task in language} & {*choosing}:
            told = ", ".join(choosing)
            raise ValueError(f"expected --choices with tasks of {told}; got none in --tasks.")
    if name in PLAYERS:
        if not chosen.tasks:
            raise ValueError(f"expected --tasks for {name!r}, which knows them all.")
        if language:
            raise ValueError(f"{name!r} only plays: it cannot read {language[0]}.")
        return name, matching(others), []
    agent = load(chosen.checkpoint)
    ids = matching(others, agent.tasks) if chosen.tasks else agent.tasks
    require_imported(ids)  # those that were typed in full are
    if ids:
        dtype = decoding_dtype(agent.model, _precision(chosen))
        tell(kernels.describe_decoding(agent.model.table.weight.device, dtype))
    return agent, ids, language


def _precision(chosen: Arguments) -> str | None:
    return None if chosen.precision == "auto" else str(chosen.precision)


def _check_writable(option: str, path: str | Path | None) -> None:
    """Raise ValueError where a file could not be written: nobody waits an hour to learn that."""
    from gato.envs.files import require_writable

    if path not in (None, "-"):
        require_writable(Path(str(path)), f"--{option}")


def _write(path: Path, text: str) -> None:
    from gato.envs.files import write_atomically

    write_atomically(path, text.encode())


def _show(
    result: dict[str, Any], recorder: Recorder | None, gallery: Gallery, chosen: Arguments
) -> None:
    """Film what was recorded, and write the videos and the report."""
    from gato.rollouts.report import report

    clips: list[Clip] = []
    missing = ""
    if recorder is not None:
        clips, missing = _film(recorder, chosen)
    if chosen.report is not None:
        _write(chosen.report, report(result, clips, missing, gallery))


def _film(recorder: Recorder, chosen: Arguments) -> tuple[list[Clip], str]:
    """Return the videos, written where they are to be, and why there are none."""
    from gato.envs.readers.video import require_av
    from gato.rollouts.video import film, write_clips

    clips: list[Clip] = []
    missing = ""
    try:
        require_av()
    except ValueError as error:
        missing = str(error)
    else:
        with progress_bar() as bar:
            filmed = bar.add_task("videos", total=len(recorder.episodes))
            clips = film(recorder, chosen.workers, lambda clip: bar.advance(filmed), chosen.timeout)
    faults = {clip.fault: clip for clip in clips if clip.fault}
    for fault, clip in faults.items():
        tell(f"no video of {clip.task}: {fault}")
    if chosen.video is not None:
        write_clips(clips, chosen.video)
    return clips, missing


def _print_language(rows: dict[str, Any]) -> None:
    from gato.rollouts.report_language import ends, figures_of, shown

    print_table(
        [
            {
                "task": task,
                "metric": name,
                "value": shown(metric["value"], metric["of"]),
                "95%": ends(metric),
                "records": len(metric["per_record"]),
            }
            for task, name, metric in figures_of(rows)
        ]
    )


def _print(result: dict[str, Any], control: dict[str, Any]) -> None:
    from gato.rollouts.speed import describe

    shown = ("random_score", "expert_score", "mean_return", "success_rate", "expert_normalised")
    rows = [
        {"task": t, **{k: row.get(k) for k in shown}, "failed": len(row["failures"])}
        for t, row in control.items()
    ]
    print_table(rows)
    found = result["summary"]
    if found["tasks"]:
        print(
            f"of expert: {found['mean']:.3f}{_ends(found['mean_ci95'])}, mean of {found['tasks']} "
            f"tasks; interquartile mean of the tasks {found['expert_normalised_iqm']:.3f}, of all "
            f"episodes {found['episodes_iqm']:.3f}; {found['tasks_at_50_percent']} tasks at half "
            f"or more, {found['tasks_at_100_percent']} at all of it"
        )
    if found["no_intervals"]:
        print(found["no_intervals"])
    speed = result["speed"]
    print(f"{speed['steps']:,} steps in {speed['seconds']:.0f} s: {describe(speed)}")
    for name, why in found["excluded_because"].items():
        print(f"left out of that: {name} ({why})")


def compare(chosen: Arguments) -> None:
    """Show results side by side."""
    from gato.rollouts.compare import compare as run
    from gato.rollouts.compare import read_result
    from gato.rollouts.report import comparison_report

    _check_writable("report", chosen.report)
    if len(chosen.results) < 2:
        raise ValueError(f"expected two or more results; got {len(chosen.results)}.")
    if len(set(chosen.results)) < len(chosen.results):
        raise ValueError("expected different files; got one twice.")
    found = run({str(path): read_result(path) for path in chosen.results}, chosen.seed)
    if chosen.report is not None:
        _write(chosen.report, comparison_report(found))
    for warning in found["warnings"]:
        tell(f"not the same: {warning}")
    if chosen.json:
        print_json(found)
        return
    if found["tasks"]:
        print_table([_compared(task, row) for task, row in found["tasks"].items()])
    if found["language"]:
        print_table(_compared_language(found["language"]))
    if found["summary"]:
        print_table([_aggregates(name, row) for name, row in found["summary"].items()])
    print("* a difference that chance explains in fewer than 5 of 100 cases")
    if found["no_intervals"]:
        print(found["no_intervals"])


def _compared(task: str, found: dict[str, Any]) -> dict[str, Any]:
    key = "expert_normalised" if found["normalised"] else "score"
    row = {"task": task} | {name: score[key] for name, score in found["scores"].items()}
    return row | {f"- first: {name}": _difference(d) for name, d in found["differences"].items()}


def _compared_language(found: dict[str, Any]) -> list[dict[str, Any]]:
    from gato.rollouts.report_language import difference, shown

    return [
        {"task": task, "metric": metric}
        | {name: shown(score["value"], score["of"]) for name, score in scores.items()}
        | {
            f"- first: {name}": difference(d, bold=False)
            for name, d in row["differences"][metric].items()
        }
        for task, row in found.items()
        for metric, scores in row["scores"].items()
    ]


def _aggregates(name: str, found: dict[str, Any]) -> dict[str, Any]:
    return {
        "result": name,
        "iqm of episodes": found["episodes_iqm"],
        "95%": _ends(found["episodes_iqm_ci95"]).strip(" ()") or "-",
        "- first": _difference(found.get("difference")),
        "mean": found["mean"],
        "tasks at 50%": found["tasks_at_50_percent"],
        "at 100%": found["tasks_at_100_percent"],
        "of": found["tasks"],
    }


def _ends(interval: list[float] | None) -> str:
    return "" if interval is None else f" ({interval[0]:.3f} to {interval[1]:.3f})"


def _difference(found: dict[str, Any] | None) -> str:
    if found is None:
        return "-"
    ends = found["ci95"]
    told = "no interval" if ends is None else f"{ends[0]:+.3g} to {ends[1]:+.3g}"
    return f"{found['difference']:+.3g} ({told}){'*' * bool(found['significant'])}"
