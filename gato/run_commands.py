"""`gato train` and `gato runs`: training runs from the command line."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gato.data_commands import set_cache, with_imports
from gato.printing import print_json, print_table, progress_bar
from gato.telling import perhaps_unread, tell

if TYPE_CHECKING:
    from gato.config import TrainConfig
    from gato.mixture_file import CorpusNote
    from gato.monitor import Watcher
    from gato.warm_start import WarmStart

Arguments = argparse.Namespace


def train(chosen: Arguments) -> None:
    """Train a preset, or count its parameters."""
    from gato.envs.files import require_place
    from gato.mixture_file import CorpusNote, read_mixture, require_present, with_mixture
    from gato.presets import preset, with_data
    from gato.warm_start import going_on, require_sizes

    set_cache(chosen)
    config, notes = preset(chosen.preset), dict[str, CorpusNote]()
    if chosen.mixture:
        mixture = read_mixture(chosen.mixture)
        config, notes = with_mixture(config, mixture), dict(mixture.notes)
    if chosen.data:
        config = with_data(config, chosen.data, add=bool(chosen.mixture))
    out = chosen.out or Path("runs") / chosen.preset
    shown = chosen.fields or chosen.parameters or chosen.dry_run is not None
    begun = None if shown or not chosen.resume else going_on(out, chosen.init_from)
    start = None if begun is not None else _start(chosen)
    sized = begun or start
    config = config if sized is None else sized.settle(config)
    config = _overridden(config, chosen)  # --corpora.0 is the first of those that are trained on
    if sized is not None:
        require_sizes(sized, config)
    if chosen.fields:
        with perhaps_unread():
            _print_fields(chosen.preset, config)
        return
    if chosen.parameters:
        with perhaps_unread():
            _parameters(chosen.preset, config, chosen.json)
        return
    if not chosen.data and not chosen.mixture:
        raise ValueError(
            f"expected --data NAME=PATH or --mixture FILE for {chosen.preset!r}; got none. "
            f"Make a store with `gato collect`, or let `gato quickstart` do everything."
        )
    if chosen.dry_run is not None:
        _dry_run(config, notes, chosen, start)
        return
    require_present(config.corpora, notes)
    if out.exists() and not out.is_dir():
        raise ValueError(f"expected a folder as --out; {out} is a file.")
    require_place(out, "a folder for the run")
    _train(config, out, chosen, start)


def _start(chosen: Arguments) -> WarmStart | None:
    """Return the weights that the run is to begin with, if they are not to be drawn."""
    from gato.warm_start import open_start

    if chosen.init_from is None:
        return None
    if chosen.text_model is not None:
        raise ValueError(
            "expected --init-from or --text-model; got both. Weights are begun with together with "
            "the text model that they were trained with."
        )
    return open_start(chosen.init_from)


def _dry_run(
    config: TrainConfig,
    notes: Mapping[str, CorpusNote],
    chosen: Arguments,
    start: WarmStart | None,
) -> None:
    """List a run's corpora, what is missing, and the shares of the tokens of its first batches."""
    from gato.mixture_shares import corpora_rows, measure

    rows = corpora_rows(config, notes)
    lacking = [row for row in rows if not row["there"]]
    found = None
    if chosen.dry_run and not lacking:
        known = None if start is None else start.serializer(config.codec)
        found = measure(imported(config, chosen.skip_bad), chosen.dry_run, known)
    sizes = {} if start is None else _sizes(config)
    with perhaps_unread():
        if chosen.json:
            drawn = {"weigh": config.weigh, "draw": config.draw, "corpora": rows, "drawn": found}
            print_json({**drawn, **({"begins_with": sizes} if sizes else {})})
        else:
            if sizes:
                print("begins with " + ", ".join(f"{k} {v}" for k, v in sizes.items()))
            _print_dry_run(config, rows, found)
    if lacking:
        names = ", ".join(row["corpus"] for row in lacking)
        raise ValueError(f"{len(lacking)} of {len(rows)} corpora are missing: {names}.")


def _print_dry_run(
    config: TrainConfig, rows: list[dict[str, Any]], found: dict[str, Any] | None
) -> None:
    shown = ("corpus", "share", "path", "there", "paper", "substitute")
    print_table([{k: row[k] for k in shown if any(r[k] for r in rows)} for row in rows])
    for row in rows:
        if not row["there"]:
            print(f"missing: {row['corpus']}; make it: {row['make'] or 'no command is known'}")
    if found is not None:
        print_table(found["corpora"])
        print(
            f"{found['tokens']:,} tokens of seed {config.seed} in {found['batches']:,} batches, "
            f"{found['fill']:.1%} full; {found['tokens_per_second']:,.0f} tokens/s"
        )
        print("\n".join(found["notes"]))


def _sizes(config: TrainConfig) -> dict[str, Any]:
    """Return what of a run is as large as the weights it begins with."""
    names = ("layers", "width", "heads", "kv_heads", "head_dim", "ffn_width", "ffn", "tied")
    found = {name: getattr(config.model, name) for name in names}
    return {"folder": config.init_from, **found, "ids of text": config.text_pieces}


def _overridden(config: TrainConfig, chosen: Arguments) -> TrainConfig:
    """Return the run with the overrides of the command line, which tyro reads."""
    flags = {"steps": chosen.steps, "seed": chosen.seed}
    config = dataclasses.replace(config, **{k: v for k, v in flags.items() if v is not None})
    return _by_tyro(config, chosen.overrides) if chosen.overrides else config


def _by_tyro(config: TrainConfig, overrides: list[str]) -> TrainConfig:
    import io

    import tyro

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            changed: TrainConfig = tyro.cli(type(config), default=config, args=overrides)
    except SystemExit as error:
        raise ValueError(_told(said.getvalue())) from error
    return changed


def _print_fields(name: str, config: TrainConfig) -> None:
    """Print every field of the run: its flag, what it is and what it would be."""
    import tyro

    about = "Fields of the run, each with what it is set to."
    with contextlib.suppress(SystemExit):
        tyro.cli(
            type(config),
            default=config,
            args=["--help"],
            prog=f"gato train {name}",
            description=about,
        )


def _told(said: str) -> str:
    """Return what tyro has to say, without its frames and titles."""
    frame = re.compile(r"[╭╮╰╯│|]|[─-]{4,}")
    lines = [line for line in (frame.sub("", line).strip() for line in said.splitlines()) if line]
    told = " ".join(line for line in lines[1:] if not line.startswith("For full help"))
    found = re.match(r"Error parsing (?!--)[\w.]+: (.*)", told)
    if found:  # what one of our configurations says
        return found[1]
    told = told.removeprefix("Error parsing ").replace("Argument helptext:", "It is")
    told = re.sub(r"^Unrecognized options:", "there is no", told)
    told = told.replace("Perhaps you meant:", "- perhaps you meant")
    return f"expected fields of the run as overrides; {told}"


def _parameters(name: str, config: TrainConfig, as_json: bool) -> None:
    from gato.presets import LEFT_OPEN, PAPER_PARAMETERS, parameters

    counts, paper = parameters(config), PAPER_PARAMETERS.get(name)
    if config.init_from:  # of the size of other weights
        paper = None
    if as_json:
        print_json({"preset": name, "parameters": counts, "paper": paper})
        return
    print_table([{"component": k, "parameters": v} for k, v in counts.items()])
    if paper is not None:
        print(f"the paper says {paper / 1e6:,.0f}M: ours is {counts['total'] / paper:.0%} of it")
        print(LEFT_OPEN)


def imported(config: TrainConfig, skip_bad: bool = False) -> TrainConfig:
    """Return the run on stores alone: what is of another format is imported into the cache."""
    paths = with_imports([corpus.path for corpus in config.corpora], skip_bad)
    corpora = [
        dataclasses.replace(corpus, path=path)
        for corpus, path in zip(config.corpora, paths, strict=True)
    ]
    return dataclasses.replace(config, corpora=tuple(corpora))


def _train(config: TrainConfig, out: Path, chosen: Arguments, start: WarmStart | None) -> None:
    from gato import kernels
    from gato.config import to_json
    from gato.contents import known_before
    from gato.damage import without_damage
    from gato.distributed import is_first, local_device
    from gato.execution import Execution
    from gato.monitor import open_watchers
    from gato.preparation import Shown, evaluated, judged_by_returns, opened, validated
    from gato.text_model import read_text_model
    from gato.train import compute_dtype
    from gato.train import train as run

    device, again = local_device(), _again(chosen.given)
    execution = Execution(compile=chosen.compile, profile=chosen.profile)
    kernels.use(chosen.attention)
    attention = kernels.describe(
        device,
        compute_dtype(config.precision, device),
        config.model.context,
        config.model.head_dim,
    )
    # What is wrong is told before anything is trained; what is no store becomes one. Of several
    # processes the first alone reads every byte and prints, but where what it finds is left out:
    # all must know that.
    text_model = None if chosen.text_model is None else read_text_model(chosen.text_model)
    config = without_damage(
        imported(config, chosen.skip_bad),
        out if chosen.resume else None,
        skip=chosen.skip_bad_shards,
        verify=chosen.verify and (is_first() or chosen.skip_bad_shards),
        say=tell if is_first() else lambda told: None,
    )
    corpora = opened(config)
    config, notes = validated(config, chosen.validation, out if chosen.resume else None)
    if start is not None:
        pairs = zip(config.corpora, corpora, strict=True)
        held = {c.name: (c.validation, corpus.contents()) for c, corpus in pairs if c.validation}
        notes += known_before(held, start.data())
    config, evaluate = evaluated(config, corpora)
    notes += judged_by_returns(config)
    workers = chosen.workers
    if workers is None:  # where the CPU trains, it has no time to spare
        workers = 2 if device.type == "cuda" else 0
    if is_first():
        for note in [*(note for corpus in corpora for note in corpus.notes()), *notes]:
            tell(note)
        tell(json.dumps(to_json(config), indent=1))
        tell(attention)
        tell(execution.describe(device))
    with progress_bar() as bar:
        shown = Shown(bar, config.steps)

        def watchers() -> list[Watcher]:
            opened = open_watchers(out, to_json(config), chosen.wandb, anew=not chosen.resume)
            return [*opened, shown]

        try:
            saved = run(
                config,
                out,
                resume=chosen.resume,
                device=device,
                text_model=text_model,
                start=start,
                on_progress=shown.progress,
                workers=workers,
                watchers=watchers,
                evaluate=evaluate,
                execution=execution,
            )
        except KeyboardInterrupt as error:
            raise KeyboardInterrupt(
                f"stopped at once; what was saved before is whole. Go on with: {again}"
            ) from error
    if not is_first():
        return
    step = int(saved.name.removeprefix("step-"))
    if step < config.steps:
        tell(f"stopped at step {step}, saved in {saved}. Go on with:\n{again}")
    elif config.ema:
        tell("saved with averaged weights, which are those that are loaded")
    with perhaps_unread():
        if chosen.json:
            print_json({"checkpoint": str(saved), "step": step})
        else:
            print(saved)


def _again(given: Sequence[str]) -> str:
    """Return the command line that was given, for a shell, as one that goes on."""
    words = ["gato"]
    if Path(sys.argv[0]).name == "cli.py":
        words = ["python", "-m", "gato.cli"]
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        each = os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"])
        words = ["torchrun", f"--nproc_per_node={each}", "-m", "gato.cli"]
    return shlex.join([*words, *(word for word in given if word != "--no-resume")])


def text_model(chosen: Arguments) -> None:
    """Train a text model on a mixture's text, and say what each corpus gave."""
    from gato.envs.files import write_atomically
    from gato.mixture_file import CorpusNote, read_mixture, require_present, with_mixture
    from gato.preparation import opened, validated
    from gato.presets import preset, with_data
    from gato.text_model import describe, fewer, train_on

    if not chosen.data and not chosen.mixture:
        raise ValueError("expected --data NAME=PATH or --mixture FILE to take text from; got none.")
    if chosen.out.is_dir() or not chosen.out.parent.is_dir():
        raise ValueError(f"expected --out as a file in a folder that exists; got {chosen.out}.")
    config, notes = dataclasses.replace(preset("quickstart"), corpora=()), dict[str, CorpusNote]()
    if chosen.mixture:
        mixture = read_mixture(chosen.mixture)
        config, notes = with_mixture(config, mixture), dict(mixture.notes)
    if chosen.data:
        config = with_data(config, chosen.data, add=bool(chosen.mixture))
    require_present(config.corpora, notes)
    # what gato train will hold out is no text to learn from either
    config, _ = validated(imported(config), chosen.validation, None)
    model, rows = train_on(opened(config), chosen.pieces, chosen.characters, chosen.seed)
    write_atomically(chosen.out, model)
    for note in fewer(model, chosen.pieces):
        tell(note)
    if chosen.json:
        print_json({"file": str(chosen.out), "model": describe(model), "corpora": rows})
        return
    print_table(rows)
    print(f"{chosen.out}: {describe(model)}")


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
