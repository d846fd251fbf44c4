"""How well a policy plays: episodes at seeds never trained on, scores with their context.

The result is JSON (see `evaluate`); what its figures are, `statistics` says. The policy is a
checkpoint or, in its place, the expert or chance (`players`), whose scores must come out as 1 and
0.

A failed episode, whose environment raised or ended its process twice, is listed with its traceback
under its task's ``failures``. It counts in every figure: with the rewards that it had until then
(none, where its process ended), and as no success.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gato.decoding import decoding_dtype
from gato.envs import registry
from gato.envs.check import require_within
from gato.envs.collect import ATTEMPTS
from gato.envs.episode import EVALUATION_SEED_START, Episode, TaskSpec
from gato.envs.score import SWEEPS
from gato.envs.store import EpisodeStore
from gato.rollouts.agent import Agent, load
from gato.rollouts.hosts import most_at_once
from gato.rollouts.language import evaluate_language
from gato.rollouts.language_tasks import Gallery, is_language, measure
from gato.rollouts.language_tasks import summary as language_summary
from gato.rollouts.metrics import Options
from gato.rollouts.overlap import counted_by
from gato.rollouts.players import PLAYERS, HostPlayer
from gato.rollouts.policy import Policy
from gato.rollouts.runner import Job, Played, RowPolicy, run
from gato.rollouts.speed import Speed
from gato.rollouts.statistics import of_task, summary
from gato.rollouts.video import Recorder

__all__ = ["evaluate", "evaluate_language", "summarise"]

Progress = Callable[[str, int, int], None]
"""Called with a task id, its episodes played so far, and those wanted."""


def evaluate(
    checkpoint: str | Path | Agent,
    task_ids: Sequence[str],
    episodes: int,
    *,
    seed: int = 0,
    workers: int = 2,
    expert: str | None = None,
    temperature: float | None = None,
    kappa: float | None = None,
    execute: int | None = None,
    precision: str | None = None,
    prompt_store: str | Path | None = None,
    prompt_steps: int = 1,
    max_batch: int | None = None,
    threads: int | None = None,
    timeout: float | None = 600.0,
    progress: Progress | None = None,
    recorder: Recorder | None = None,
    speed: Speed | None = None,
    records: int | None = None,
    options: Options | None = None,
    gallery: Gallery | None = None,
) -> dict[str, Any]:
    """Return scores per task and over tasks, as JSON-able data.

    Tasks of control are played; those of language (`language_tasks`) are measured on records.

    Args:
        checkpoint: a folder, a loaded agent, or ``"expert"`` or ``"random"``.
        task_ids: tasks the checkpoint knows, and language tasks.
        episodes: per task of control; episode i is reset with `EVALUATION_SEED_START` + i where
            `seed` is 0.
        seed: chooses other evaluation seeds, [0, 1024), and the draws of sampled actions.
        workers: processes that step simulators; 0 steps them in this one.
        expert: which one ``"expert"`` is: ``auto`` (the default), ``scripted``, ``planner`` or
            the folder of a learned one.
        temperature: of the actions; by default what each task was trained for.
        kappa: how far the returns to come of tasks conditioned on them are tilted upwards; by
            default what each task was trained for.
        execute: actions taken of those that one state decides; by default, and where a task
            decides fewer, all.
        precision: that a model decides in, ``float32`` or ``bfloat16``; by default its own on a
            CPU, bfloat16 on a GPU. The result has which it was.
        prompt_store: a store, or a folder of stores, of demonstrations to prompt with.
        prompt_steps: last steps of a demonstration that are shown.
        max_batch: most episodes that are under way at once; by default 64, or 20 with cameras.
        threads: of the model in this process; by default one per core that no worker has.
        timeout: seconds that one step may take before its worker process is ended; in this
            process (`workers` 0) nothing ends it.
        progress: see `Progress`.
        recorder: is given the episodes that it makes videos of.
        speed: is told where the time goes while it does; at the end it is in the result.
        records: per language task; see `language_tasks.records_of`.
        options: of the measures of language.
        gallery: is given the pictures of the examples that language tasks show.

    Raises:
        ValueError: for an unknown task, one the model does not know, a missing simulator, or
            seeds that the checkpoint was trained on.
    """
    _check(task_ids, episodes, seed, prompt_steps)
    if precision is not None and task_ids and all(map(is_language, task_ids)):
        raise ValueError(
            f"precision is that of policies, and none of these tasks is played; got {precision}. "
            f"Leave it out."
        )
    player = _player(checkpoint, expert, temperature, prompt_store, precision)
    language = [task for task in task_ids if is_language(task)]
    if language and isinstance(player, HostPlayer):
        raise ValueError(f"{player.name!r} only plays: it cannot read {language[0]}.")
    control = [task for task in task_ids if task not in language]
    specs = {task: registry.spec(task) for task in control}
    max_batch = most_at_once(control) if max_batch is None else max_batch
    settings: dict[str, Any] = {"episodes": episodes, "seed": seed, "temperature": temperature}
    settings |= {"workers": workers, "max_batch": max_batch, **_about(player, specs, precision)}
    tilt = _tilt(player, control, kappa)
    settings |= tilt
    if execute is not None:
        _check_execute(player, control, execute)
        settings["execute"] = execute
    how = tilt if precision is None else {**tilt, "precision": precision}
    settings["first_seed"] = first = EVALUATION_SEED_START + seed * ATTEMPTS
    seeds = range(first, first + episodes)
    _refuse_training_seeds(player, seeds if control else range(first, first))
    prompts = _prompts(prompt_store, control, prompt_steps, seeds) if prompt_store else None
    settings["prompt"] = prompts and {"store": str(prompt_store), "steps": prompt_steps}
    logged = seeds[: recorder.per_task] if recorder else ()
    began = time.perf_counter()
    speed = Speed() if speed is None else speed

    def policy(tasks: Sequence[str], draws: Sequence[int]) -> RowPolicy:
        made = player.policy(tasks, temperature, draws, prompts, **how)
        if isinstance(made, Policy) and execute is not None:
            made.shorten(execute)  # also of tasks that its rows play later
        return made

    rows: dict[str, Any] = {}  # first: what is wrong with records shows before hours of play
    if language and isinstance(player, Agent):
        options = options or Options(seed)
        settings["language"] = {"records": records, "max_tokens": options.max_tokens}
        settings["language"] |= {"choices": list(options.choices), "seed": options.seed}
        settings["language"]["precision"] = _language_precision(player)
        with _threads(threads, 0):
            rows = measure(player, language, first, records, options, progress, gallery)
    played = []
    if control:
        with _threads(threads, workers):
            played = run(
                policy,
                [Job(task, s, logged=s in logged) for task in control for s in seeds],
                workers=workers,
                max_batch=max_batch,
                seed=seed,
                timeout=timeout,
                on_played=_counted(progress, episodes),
                speed=speed,
            )
    if recorder:
        recorder.episodes += [p for p in played if p.job.logged]
    seconds = time.perf_counter() - began
    result = _result(specs, played, seed, seconds)
    if rows:
        result["versions"] |= counted_by()
        result["tasks"] |= rows
        result["summary"]["language"] = language_summary(rows)
    return {
        "checkpoint": player.name,
        "settings": settings,
        **result,
        "speed": speed.figures(),
    }


def _player(
    checkpoint: str | Path | Agent,
    expert: str | None,
    temperature: float | None,
    prompt_store: str | Path | None,
    precision: str | None,
) -> Agent | HostPlayer:
    """Return who plays; a folder that is called like a player is meant by ``./expert``."""
    if expert is not None and str(checkpoint) != "expert":
        raise ValueError(f"a kind of expert is chosen for 'expert' only; got {expert!r}.")
    if expert == "random":
        raise ValueError("expected an expert; got 'random'. Evaluate 'random' in its place.")
    if isinstance(checkpoint, Agent):
        return checkpoint
    if str(checkpoint) not in PLAYERS:
        return load(checkpoint)
    if temperature is not None or prompt_store is not None or precision is not None:
        raise ValueError(
            f"{str(checkpoint)!r} is no model: it has no temperature nor precision and reads no "
            f"prompts."
        )
    return HostPlayer(str(checkpoint), expert or "auto")


def _tilt(
    player: Agent | HostPlayer, task_ids: Sequence[str], kappa: float | None
) -> dict[str, float]:
    """Return kappa by its name where it is given; raise ValueError where it has no effect."""
    if kappa is None:
        return {}
    known = {} if isinstance(player, HostPlayer) else player.serializer.tasks
    if not any(t in known and known[t].history.returns is not None for t in task_ids):
        raise ValueError(
            f"kappa tilts returns to come, and none of the tasks is conditioned on them; got "
            f"{kappa}. Train with returns = true in the mixture's file, or leave it out."
        )
    return {"kappa": kappa}


def _check_execute(player: Agent | HostPlayer, task_ids: Sequence[str], execute: int) -> None:
    """Raise ValueError where none of the tasks decides so many actions at once."""
    known = {} if isinstance(player, HostPlayer) else player.serializer.tasks
    most = max((known[t].history.joint for t in task_ids if t in known), default=0)
    if not 1 <= execute <= most:
        raise ValueError(
            f"execute is how many are taken of the actions that one state decides, at most {most} "
            f"in these tasks; got {execute}. Train with a larger joint, or leave it out."
        )


def _refuse_training_seeds(player: Agent | HostPlayer, seeds: range) -> None:
    """Raise ValueError where the checkpoint has seen these episodes in training."""
    known = {} if isinstance(player, HostPlayer) else player.checkpoint.data
    for name, corpus in known.items():
        # older checkpoints know the range of all seeds only
        low, high = corpus.get("evaluation_seeds", corpus.get("seeds")) or (0, -1)
        if low < seeds.stop and high >= seeds.start:
            raise ValueError(
                f"expected evaluation seeds that were not trained on; the corpus {name!r} of "
                f"{player.name} holds episodes of seeds {low} to {high}, and these "
                f"are {seeds.start} to {seeds.stop - 1}. Choose another --seed."
            )


@contextmanager
def _threads(wanted: int | None, workers: int) -> Iterator[None]:
    """Let the model use so many threads inside."""
    before = torch.get_num_threads()
    # Threads that wait for each other while simulators hold the cores may cost ten times more.
    torch.set_num_threads(wanted or max(1, (os.cpu_count() or 1) - workers))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _counted(progress: Progress | None, episodes: int) -> Callable[[Played], None] | None:
    """Return what tells `progress` of each episode."""
    if progress is None:
        return None
    counts: Counter[str] = Counter()

    def tell(played: Played) -> None:
        counts[played.job.task] += 1
        progress(played.job.task, counts[played.job.task], episodes)

    return tell


def _language_precision(player: Agent) -> dict[str, str]:
    """Return in what numbers texts are judged, and written: no option changes it."""
    judged = str(player.model.table.weight.dtype).removeprefix("torch.")
    return {"judged": judged, "written": str(decoding_dtype(player.model)).removeprefix("torch.")}


def _about(
    player: Agent | HostPlayer, specs: Mapping[str, TaskSpec], precision: str | None
) -> dict[str, Any]:
    """Return what else decides the scores: memories, horizons and the suites' protocols.

    Raises:
        ValueError: for a task that the player does not know, or no such precision.
    """
    about: dict[str, Any] = {"device": None, "weights": None, "histories": None, "experts": None}
    about["precision"] = None
    if isinstance(player, Agent):
        about["weights"] = "averaged" if player.checkpoint.averaged else "last step"
        dtype = decoding_dtype(player.model, precision)
        about["device"] = str(player.model.table.weight.device)
        about["precision"] = str(dtype).removeprefix("torch.")
        about["histories"] = {t: asdict(player.serializer.task(t).history) for t in specs}
    elif player.name == "expert":
        about["experts"] = {t: player.expert(spec) for t, spec in specs.items()}
    return about | {
        "max_steps": {t: spec.max_steps for t, spec in specs.items()},
        "protocols": {s: registry.protocol(s) for s in sorted({t.suite for t in specs.values()})},
    }


def _check(task_ids: Sequence[str], episodes: int, seed: int, prompt_steps: int) -> None:
    if isinstance(task_ids, str) or not task_ids or len(set(task_ids)) != len(task_ids):
        raise ValueError(f"expected a list of one or more different task ids; got {task_ids!r}")
    require_within(
        episodes=(episodes, 1, ATTEMPTS),
        seed=(seed, 0, SWEEPS - 1),
        prompt_steps=(prompt_steps, 1, ATTEMPTS),
    )


def _prompts(
    root: str | Path, task_ids: Sequence[str], steps: int, seeds: range
) -> dict[str, Episode]:
    """Return the end of each task's first successful demonstration, its first where none is."""
    folders = [p.parent for p in sorted(Path(root).glob("**/manifest.json"))]
    stores = {store.spec.id: store for store in map(EpisodeStore, folders) if len(store)}
    missing = [task for task in task_ids if task not in stores]
    if missing:
        raise ValueError(f"expected demonstrations of {missing[0]!r} at {root}; found none")
    prompts = {}
    for task in task_ids:
        store = stores[task]
        shared = [int(s) for s in store.seeds if s in seeds]
        if shared:
            raise ValueError(
                f"expected demonstrations at other seeds than the evaluated; {store.path} holds "
                f"one of seed {shared[0]}. Prompt with others, or choose another --seed."
            )
        good = np.flatnonzero(np.asarray(store.successes) == 1)
        index = int(good[0]) if len(good) else 0
        length = int(store.lengths[index])
        prompts[task] = store.window(index, max(0, length - steps), length)
    return prompts


def _result(
    specs: Mapping[str, TaskSpec], played: Sequence[Played], seed: int, seconds: float
) -> dict[str, Any]:
    tasks = {
        task: summarise(spec, [p for p in played if p.job.task == task], seed)
        for task, spec in specs.items()
    }
    result = {"versions": _versions(list(specs)), "seconds": seconds}
    return result | {"tasks": tasks, "summary": summary(tasks, seed)}


def summarise(spec: TaskSpec, played: Sequence[Played], seed: int = 0) -> dict[str, Any]:
    """Return the result of one task from its episodes."""
    defined = spec.measure == "success" or any(
        p.success is not None and not p.error for p in played
    )
    successes = [bool(p.success) for p in played] if defined else None
    returns = [p.score for p in played]
    result: dict[str, Any] = {
        "measure": spec.measure,
        "returns": returns,
        "successes": successes,
        "lengths": [p.length for p in played],
        "seeds": [p.job.seed for p in played],
        "mean_return": float(np.mean(returns)),
        "success_rate": None if successes is None else float(np.mean(successes)),
        "random_score": spec.random_score,
        "expert_score": spec.expert_score,
        "human_score": spec.human_score,
        "score_source": spec.score_source,
    }
    failures = [{"seed": p.job.seed, "traceback": p.error} for p in played if p.error is not None]
    return result | of_task(result, seed) | {"failures": failures}


def _versions(task_ids: Sequence[str]) -> dict[str, str]:
    ours = {name: version(name) for name in ("gato", "gymnasium", "numpy", "torch")}
    return registry.versions(*sorted({task.split("/")[0] for task in task_ids})) | ours
