"""What each command of the command line does with its arguments; see `gato.cli`."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gato.envs import registry
from gato.envs.episode import TaskSpec, flatten_space
from gato.printing import console, print_json, print_table, progress_bar

if TYPE_CHECKING:
    from gato.config import TrainConfig

Arguments = argparse.Namespace


# ---- tasks and data --------------------------------------------------------------------------


def tasks(chosen: Arguments) -> None:
    """List the tasks."""
    if chosen.suite is not None and chosen.suite not in registry.SUITES:
        raise ValueError(f"expected a suite of {', '.join(registry.SUITES)}; got {chosen.suite!r}.")
    listed = [_task(registry.spec(i)) for i in registry.task_ids(f"{chosen.suite or '*'}/*")]
    if chosen.json:
        print_json(listed)
    elif listed:
        shown = ("id", "modalities", "max_steps", "random_score", "expert_score", "expert")
        print_table([{k: row[k] for k in shown} for row in listed])
    if chosen.suite == "gym" and not chosen.json:
        print("every registered Gymnasium environment is a task: gym/<its id>")


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
    import fnmatch

    found: dict[str, None] = {}
    for pattern in patterns:
        if not set(pattern) & set("*?["):
            registry.spec(pattern)  # an unknown one raises, with the closest
            found[pattern] = None
            continue
        ids = registry.task_ids() if known is None else known
        matched = fnmatch.filter(ids, pattern)
        if not matched:
            raise ValueError(f"expected a pattern that matches a task; {pattern!r} matches none.")
        found.update(dict.fromkeys(matched))
    return list(found)


def collect(chosen: Arguments) -> None:
    """Let experts play and store what they do."""
    from gato.envs.collect import collect as run

    ids = matching(chosen.tasks)
    kinds = {registry.spec(i).expert for i in ids}
    if chosen.expert != "auto" and kinds != {chosen.expert}:
        raise ValueError(
            f"expected tasks with a {chosen.expert!r} expert; these have {', '.join(sorted(kinds))}"
            f". Use --expert auto."
        )
    with progress_bar() as bar:
        bars: dict[str, Any] = {}

        def progress(task: str, kept: int, wanted: int) -> None:
            if task not in bars:
                bars[task] = bar.add_task(task, total=wanted)
            bar.update(bars[task], completed=kept)

        folders = run(
            ids,
            chosen.episodes,
            chosen.out,
            seed=chosen.seed,
            noise=chosen.noise,
            workers=chosen.workers,
            min_fraction=chosen.min_fraction,
            progress=progress,
        )
    for folder in folders.values():
        print(folder)


def data(chosen: Arguments) -> None:
    """Describe stores, or read everything in them once."""
    folders = [f for path in chosen.stores for f in _stores(path)]
    rows = []
    for folder in folders:
        store = _open(folder)
        if chosen.action == "validate":
            store.validate()
            rows.append({"store": str(folder), "valid": True, "items": len(store)})
        else:
            rows.append(_describe(folder, store))
    if chosen.json:
        print_json(rows)
    else:
        print_table(rows)


def _stores(path: Path) -> list[Path]:
    if (path / "manifest.json").is_file():
        return [path]
    found = sorted(p.parent for p in path.glob("**/manifest.json"))
    if not found:
        raise ValueError(f"expected a store or a folder of stores at {path}; found none.")
    return found


def _open(folder: Path) -> Any:
    from gato.envs.records import RecordStore
    from gato.envs.store import EpisodeStore

    records = (folder / "records.jsonl").exists()
    return RecordStore(folder) if records else EpisodeStore(folder)


def _describe(folder: Path, store: Any) -> dict[str, Any]:
    size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    row = {"store": str(folder), "items": len(store), "steps": None, "mean_return": None}
    row |= {"success_rate": None, "megabytes": round(size / 1e6, 1)}
    if hasattr(store, "lengths") and len(store):
        row["steps"] = int(store.lengths.sum())
        row["mean_return"] = float(store.returns.mean())
        if store.spec.measure == "success":
            row["success_rate"] = sum(bool(s) for s in store.successes) / len(store)
    return row


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
    )
    if chosen.json:
        print("[\n" + ",\n".join(json.dumps(token) for token in tokens) + "\n]")
    else:
        table(tokens, console())


# ---- training --------------------------------------------------------------------------------


def quickstart(chosen: Arguments) -> None:
    """Everything in one command."""
    import contextlib

    from gato.quickstart import run

    # with --json, stdout holds the result and nothing else
    with contextlib.redirect_stdout(sys.stderr if chosen.json else sys.stdout):
        result = run(chosen.out, chosen.minutes, chosen.seed)
    if chosen.json:
        print_json(result)


def train(chosen: Arguments) -> None:
    """Train a preset, or count its parameters."""
    from gato.presets import preset, with_data

    config = _overridden(preset(chosen.preset), chosen)
    if chosen.parameters:
        _parameters(chosen.preset, config, chosen.json)
        return
    if not chosen.data:
        raise ValueError(
            f"expected --data NAME=PATH for {chosen.preset!r}; got none. "
            f"Make a store with `gato collect`, or let `gato quickstart` do everything."
        )
    config = with_data(config, chosen.data)
    _train(config, chosen.out or Path("runs") / chosen.preset, chosen)


def _overridden(config: TrainConfig, chosen: Arguments) -> TrainConfig:
    """Return the run with the overrides of the command line, which tyro reads."""
    import dataclasses

    flags = {"steps": chosen.steps, "seed": chosen.seed}
    config = dataclasses.replace(config, **{k: v for k, v in flags.items() if v is not None})
    return _by_tyro(config, chosen.overrides) if chosen.overrides else config


def _by_tyro(config: TrainConfig, overrides: list[str]) -> TrainConfig:
    import contextlib
    import io

    import tyro

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            changed: TrainConfig = tyro.cli(type(config), default=config, args=overrides)
    except SystemExit as error:
        frame = re.compile(r"[╭╮╰╯│|]|[─-]{4,}")
        lines = [frame.sub("", line).strip() for line in said.getvalue().splitlines()]
        told = " ".join(line for line in lines if line and not line.startswith("For full help"))
        raise ValueError(f"expected fields of the run as overrides; {told}") from error
    return changed


def _parameters(name: str, config: TrainConfig, as_json: bool) -> None:
    from gato.presets import LEFT_OPEN, PAPER_PARAMETERS, parameters

    counts, paper = parameters(config), PAPER_PARAMETERS.get(name)
    if as_json:
        print_json({"preset": name, "parameters": counts, "paper": paper})
        return
    print_table([{"component": k, "parameters": v} for k, v in counts.items()])
    if paper is not None:
        print(f"the paper says {paper / 1e6:,.0f}M: ours is {counts['total'] / paper:.0%} of it")
        print(LEFT_OPEN)


def _train(config: TrainConfig, out: Path, chosen: Arguments) -> None:
    import torch

    from gato.attention import describe_backend
    from gato.config import to_json
    from gato.train import Progress, compute_dtype
    from gato.train import train as run

    for corpus in config.corpora:
        _stores(Path(corpus.path))  # a wrong path is told before anything is printed
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(json.dumps(to_json(config), indent=1), file=sys.stderr)
    print(describe_backend(device, compute_dtype(config.precision, device)), file=sys.stderr)
    with progress_bar() as bar:
        line = bar.add_task("training", total=config.steps)

        def progress(p: Progress) -> None:
            losses = "  ".join(f"{k} {v:.3f}" for k, v in p.losses.items())
            about = f"{losses}  {p.tokens_per_second:,.0f} tokens/s"
            bar.update(line, completed=p.step, description=about)
            if not sys.stderr.isatty():
                print(f"step {p.step}/{p.steps}  {about}", file=sys.stderr)

        saved = run(config, out, resume=chosen.resume, device=device, on_progress=progress)
    step = int(saved.name.removeprefix("step-"))
    if step < config.steps:
        print(f"stopped at step {step}; the same command goes on", file=sys.stderr)
    if chosen.json:
        print_json({"checkpoint": str(saved), "step": step})
    else:
        print(saved)


# ---- using a model ---------------------------------------------------------------------------


def evaluate(chosen: Arguments) -> None:
    """Play tasks with a checkpoint."""
    from gato import load
    from gato.rollouts.evaluate import evaluate as run

    if chosen.json not in (None, "-") and not os.access(Path(chosen.json).parent, os.W_OK):
        raise ValueError(f"expected --json in a folder that can be written; got {chosen.json}")
    agent = load(chosen.checkpoint)
    ids = matching(chosen.tasks, agent.tasks) if chosen.tasks else agent.tasks
    with progress_bar() as bar:
        bars = {task: bar.add_task(task, total=chosen.episodes) for task in ids}
        result = run(
            agent,
            ids,
            chosen.episodes,
            seed=chosen.seed,
            workers=chosen.workers,
            temperature=chosen.temperature,
            prompt_store=chosen.prompts,
            progress=lambda task, played, wanted: bar.update(bars[task], completed=played),
        )
    if chosen.json == "-":
        print_json(result)
        return
    if chosen.json is not None:
        from gato.envs.files import write_atomically

        write_atomically(Path(chosen.json), json.dumps(result, indent=1).encode())
    shown = ("random_score", "expert_score", "mean_return", "success_rate", "expert_normalised")
    print_table(
        [{"task": t, **{k: row.get(k) for k in shown}} for t, row in result["tasks"].items()]
    )


def chat(chosen: Arguments) -> None:
    """Talk with a checkpoint, or answer one prompt."""
    from gato.terminal import answer, converse

    image = None if chosen.image is None else _image(chosen.image)
    from gato import load

    agent = load(chosen.checkpoint)
    sampling = {
        "max_tokens": chosen.max_tokens,
        "temperature": chosen.temperature,
        "top_p": chosen.top_p,
        "seed": chosen.seed,
    }
    if chosen.prompt is None:
        converse(agent, image, sampling)
        return
    said = answer(agent, chosen.prompt, image, sampling, stream=not chosen.json)
    if chosen.json:
        print_json({"prompt": chosen.prompt, "answer": said})


def caption(chosen: Arguments) -> None:
    """Describe images."""
    images = [_image(path) for path in chosen.images]
    from gato import load

    agent = load(chosen.checkpoint)
    rows = [
        {"image": str(path), "caption": agent.caption(image)}
        for path, image in zip(chosen.images, images, strict=True)
    ]
    if chosen.json:
        print_json(rows)
    else:
        for row in rows:
            print(f"{row['image']}: {row['caption']}")


def classify(chosen: Arguments) -> None:
    """Choose among labels for an image."""
    labels = [label.strip() for label in chosen.labels.split(",") if label.strip()]
    if len(labels) < 2:
        raise ValueError(f"expected at least two --labels, separated by commas; got {labels}.")
    image = _image(chosen.image)
    from gato import load

    found = load(chosen.checkpoint).classify(image, labels)
    if chosen.json:
        print_json({"image": str(chosen.image), "probabilities": found})
        return
    for label, probability in sorted(found.items(), key=lambda pair: -pair[1]):
        print(f"{probability:.3f}  {label}")


def _image(path: Path) -> Any:
    from gato.terminal import read_image

    return read_image(path)


def bench(chosen: Arguments) -> None:
    """Measure speed."""
    from gato.bench import run

    result = run(chosen.names)
    if chosen.json:
        print_json(result)
    else:
        print_table(result["results"], result["name"])
