"""`gato train` and `gato runs`: training runs from the command line."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from gato.data_commands import with_imports
from gato.printing import print_json, print_table, progress_bar

if TYPE_CHECKING:
    from gato.config import TrainConfig

Arguments = argparse.Namespace


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
    out = chosen.out or Path("runs") / chosen.preset
    if out.exists() and not out.is_dir():
        raise ValueError(f"expected a folder as --out; {out} is a file.")
    _train(config, out, chosen)


def _overridden(config: TrainConfig, chosen: Arguments) -> TrainConfig:
    """Return the run with the overrides of the command line, which tyro reads."""
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

    # a wrong path is told before anything is printed; what is no store becomes one
    paths = with_imports([corpus.path for corpus in config.corpora])
    corpora = [
        dataclasses.replace(corpus, path=path)
        for corpus, path in zip(config.corpora, paths, strict=True)
    ]
    config = dataclasses.replace(config, corpora=tuple(corpora))
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


def runs(chosen: Arguments) -> None:
    """List runs, what they are doing, and what is wrong with their files."""
    from gato.runs import describe, find_runs, row

    found = [describe(run) for run in find_runs(chosen.folder)]
    if chosen.json:
        print_json(found)
        return
    if not found:
        print(f"no runs in {chosen.folder}", file=sys.stderr)
        return
    print_table([row(run) for run in found])
    for run in found:
        for told in [run["reason"], *run["faults"]]:
            if told:
                print(f"{run['run']}: {told}")
