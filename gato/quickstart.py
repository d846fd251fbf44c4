"""`gato quickstart`: from nothing to a generalist on two CPU cores, in one command.

Four stages, each of which goes on where it was interrupted: demonstrations and language corpora
are made, one model is trained on all of them, it is evaluated at seeds and on records that
training never saw, and a report is written.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, cast

from gato.config import TrainConfig
from gato.corpora import CorpusConfig
from gato.envs.files import make_folder, write_atomically
from gato.examples import PICTURES, write_pictures
from gato.model_config import ModelConfig
from gato.optim import OptimConfig
from gato.report import picture, task_score
from gato.telling import Unfailing
from gato.tokenizers.spaces import CodecOptions
from gato.tokenizers.text import MODEL_FILE

if TYPE_CHECKING:
    from gato.rollouts.agent import Agent

METAWORLD = tuple(
    f"metaworld/{name}-v3"
    for name in ("reach", "button-press-topdown", "drawer-open", "door-open", "push")
)
BABYAI = ("babyai/GoToRedBallGrey-v0", "babyai/GoToLocal-v0")
ATARI = ("atari/Boxing-v5",)
TASKS = (*BABYAI, *METAWORLD, *ATARI)
LANGUAGE = ("digits", "scenes", "frames", "dialogues", "documents")
MATCHED = "shapes"
"""A corpus whose pictures are found by words and told apart, not captioned."""
EPISODES = {
    **dict.fromkeys(METAWORLD, 160),
    **dict.fromkeys(BABYAI, 2500),
    **dict.fromkeys(ATARI, 16),
}
NOISE = {"metaworld": 0.15, "babyai": 0.0, "atari": 0.1}
MIN_FRACTION = {"metaworld": 0.8, "babyai": 0.8, "atari": 0.4}
"""Of the expert's score, below which an episode is dropped; a boxer disturbed one time in ten
scores about 0.75 of what he scores undisturbed."""
EVALUATION_EPISODES = 20
MAX_STEPS = 4000
LOADERS = int((os.cpu_count() or 1) > 1)
"""Processes that make batches ahead: a seventh more steps on two cores."""
TRAIN_SHARE, DATA_SHARE = 0.55, 0.2


def recipe(data: Path, steps: int, seed: int = 0) -> TrainConfig:
    """Return the run that `gato quickstart` trains; choices and figures are in the lab log."""

    def corpus(name: str, weight: float, **options: Any) -> CorpusConfig:
        return CorpusConfig(name, str(data / name), weight, **options)

    return TrainConfig(
        model=ModelConfig(
            layers=4,
            width=128,
            heads=2,
            head_dim=64,
            ffn_width=1024,
            context=256,
            qk_norm=True,
            soft_bins=6.0,
        ),
        codec=CodecOptions(
            observations="vector",
            vector_group=39,
            symbol_axes=2,
            symbol_group=21,
            frame_cell=32,
        ),
        optim=OptimConfig(lr=2e-3, warmup=100),
        embedders={"image": {"embedder": "conv"}},
        corpora=(
            corpus("metaworld", 0.25, window=1, hide_actions=1.0, joint=1),
            corpus("babyai", 0.18, hide_actions=1.0, temperature=1.0),
            corpus("atari", 0.11, window=1, hide_actions=1.0, joint=1),
            corpus("digits", 0.06, contrast=0.1),
            corpus("shapes", 0.04, contrast=0.1),
            corpus("scenes", 0.14),
            corpus("frames", 0.08),
            corpus("dialogues", 0.11),
            corpus("documents", 0.03),
        ),
        text_pieces=1024,
        rows=13,
        steps=steps,
        seed=seed,
        precision="bfloat16",
        save_every=250,
    )


class Quickstart:
    """The command's stages; what is done is known from what lies in the folder."""

    def __init__(self, out: Path, minutes: float, seed: int, say: Callable[[str], None]) -> None:
        self.out, self.minutes, self.seed, self.say = out, minutes, seed, say
        self.data, self.held, self.run_folder = out / "data", out / "heldout", out / "model"
        self.plan_file = out / "plan.json"
        self.plan: dict[str, Any] = {"seed": seed, "minutes": minutes, "seconds": {}}
        if self.plan_file.exists():
            self.plan = json.loads(self.plan_file.read_text())
            if (self.plan["seed"], self.plan["minutes"]) != (seed, minutes):
                raise ValueError(
                    f"{out} holds a quickstart with --seed {self.plan['seed']} --minutes "
                    f"{self.plan['minutes']:g}; go on with those or give another --out"
                )

    def run(self) -> dict[str, Any]:
        """Go through all stages and return the results."""
        make_folder(self.out, "--out as a folder")
        for name, stage, share in (
            ("data", self.make_data, DATA_SHARE),
            ("train", self.train, TRAIN_SHARE),
            ("evaluate", self.evaluate, 1 - DATA_SHARE - TRAIN_SHARE),
        ):
            self.say(f"{name}: about {self.minutes * share:.0f} minutes")
            started = time.perf_counter()
            stage()
            seconds = self.plan["seconds"].get(name, 0.0) + time.perf_counter() - started
            self._remember(seconds={**self.plan["seconds"], name: seconds})
        return self.results()

    def _remember(self, **facts: Any) -> None:
        self.plan |= facts
        self.out.mkdir(parents=True, exist_ok=True)
        write_atomically(self.plan_file, json.dumps(self.plan, indent=1).encode())

    # ---- data --------------------------------------------------------------------------------

    def make_data(self) -> None:
        """Collect demonstrations and write the language corpora; what exists is kept."""
        from gato.envs.collect import collect

        workers = os.cpu_count() or 1
        for suite in (METAWORLD, BABYAI, ATARI):
            name = suite[0].split("/")[0]
            collect(
                suite,
                EPISODES[suite[0]],
                self.data,
                seed=self.seed,
                noise=NOISE[name],
                min_fraction=MIN_FRACTION[name],
                workers=workers,
                progress=self._collected,
            )
        jobs = [
            (name, str(root / name), split)
            for name in (*LANGUAGE, MATCHED)
            for root, split in ((self.data, "train"), (self.held, "heldout"))
            if not (root / name / "manifest.json").exists()
        ]
        with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
            for name, split in pool.map(_build_corpus, jobs):
                self.say(f"  {name} ({split}) written")

    def _collected(self, task: str, kept: int, wanted: int, tried: int) -> None:
        if kept == wanted:
            self.say(f"  {task}: {kept} episodes of {tried} tried")

    # ---- training ----------------------------------------------------------------------------

    def train(self) -> None:
        """Train for the time there is; the number of steps is fixed once, at the start."""
        import torch

        from gato.config import to_json
        from gato.monitor import open_watchers
        from gato.train import Progress, train

        if "steps" not in self.plan:
            self._remember(**self._pace())
        torch.set_num_threads(self.plan["threads"])
        config = recipe(self.data, self.plan["steps"], self.seed)
        text_model = self.out / MODEL_FILE

        def show(p: Progress) -> None:
            self.say(
                f"  step {p.step}/{p.steps}  {p.tokens_per_second:,.0f} tokens/s  "
                f"{p.seconds_left / 60:.1f} min left  {p.figures(2)}"
            )

        model = text_model.read_bytes()
        watchers = open_watchers(self.run_folder, to_json(config), say=self.say)
        last = train(
            config,
            self.run_folder,
            text_model=model,
            on_progress=show,
            workers=LOADERS,
            watchers=watchers,
        )
        if last.name != f"step-{config.steps:08d}":
            raise KeyboardInterrupt(
                f"stopped with everything saved; `gato quickstart --out {self.out}` goes on"
            )

    def _pace(self) -> dict[str, int]:
        """Return the threads that train fastest here, and the steps that fit in the minutes.

        Waiting for one another makes two threads slower than one on a machine with other work.
        """
        import torch

        from gato.fitting import make_serializer
        from gato.loader import Loader
        from gato.train import Trainer

        config = recipe(self.data, MAX_STEPS, self.seed)
        serializer = make_serializer(config)
        write_atomically(self.out / MODEL_FILE, serializer.state()["text"][MODEL_FILE])
        trainer = Trainer(config, self.run_folder, torch.device("cpu"), serializer)
        seconds = {}
        with Loader(trainer.mixture, workers=LOADERS) as loader:
            for threads in sorted({1, os.cpu_count() or 1}):
                torch.set_num_threads(threads)
                for step in range(20):
                    if step == 4:
                        started = time.perf_counter()
                    trainer.train_step(next(loader))
                seconds[threads] = (time.perf_counter() - started) / 16
        threads = min(seconds, key=seconds.__getitem__)
        budget = self.minutes * 60 * TRAIN_SHARE * 0.82
        return {
            "threads": threads,
            "steps": max(100, min(MAX_STEPS, int(budget / seconds[threads]))),
        }

    # ---- evaluation --------------------------------------------------------------------------

    def evaluate(self) -> None:
        """Play every task and read every held-out record; each part is kept once it is there."""
        from gato.rollouts.agent import Agent
        from gato.rollouts.evaluate import evaluate, evaluate_language

        write_pictures(self.held, self.out / PICTURES)
        folder = self.out / "evaluation"
        agent: Agent | None = None
        for suite in (BABYAI, METAWORLD, ATARI):
            path = folder / f"{suite[0].split('/')[0]}.json"
            if not path.exists():
                agent = agent or Agent.load(self.run_folder)
                result = evaluate(agent, suite, EVALUATION_EPISODES, seed=self.seed)
                self._keep(path, result)
                for task, row in result["tasks"].items():
                    self.say(f"  {task}: {task_score(row):.2f}")
        for name in LANGUAGE:
            path = folder / f"{name}.json"
            if not path.exists():
                agent = agent or Agent.load(self.run_folder)
                self._keep(path, evaluate_language(agent, self.held / name))
                self.say(f"  {name}: {_language_score(json.loads(path.read_text()))}")
        path = folder / "matching.json"
        if not path.exists():
            agent = agent or Agent.load(self.run_folder)
            result = matching(agent, self.held / "digits", self.held / MATCHED)
            self._keep(path, result)
            for name, row in result.items():
                self.say(f"  {name}: {row['score']:.2f}")

    def _keep(self, path: Path, result: dict[str, Any]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(result, indent=1).encode())

    def results(self) -> dict[str, Any]:
        """Write results.json and the picture; return what is in the former."""
        folder = self.out / "evaluation"
        read = {p.stem: json.loads(p.read_text()) for p in sorted(folder.glob("*.json"))}
        tasks = {t: row for part in read.values() for t, row in part.get("tasks", {}).items()}
        lines = [
            json.loads(x) for x in (self.run_folder / "metrics.jsonl").read_text().splitlines()
        ]
        config = recipe(self.data, self.plan["steps"], self.seed)
        result = {
            "seconds": self.plan["seconds"],
            "seed": self.seed,
            "steps": self.plan["steps"],
            "tokens": self.plan["steps"] * config.rows * config.model.context,
            "parameters": self._parameters(),
            "scores": {
                **{t: task_score(tasks[t]) for t in TASKS if t in tasks},
                **{n: _language_score(read[n]) for n in LANGUAGE if n in read},
                **{n: row["score"] for n, row in read.get("matching", {}).items()},
            },
            "tasks": tasks,
            "language": {n: read[n] for n in LANGUAGE if n in read},
            "matching": read.get("matching", {}),
            "checkpoint": str(self.run_folder),
        }
        self._keep(self.out / "results.json", result)
        picture(result, lines, self.out / "results.png")
        return result

    def _parameters(self) -> int:
        from gato.checkpoint import load_checkpoint

        return sum(p.numel() for p in load_checkpoint(self.run_folder).model.parameters())


def _language_score(result: dict[str, Any]) -> float:
    """Return the share answered exactly or, for documents, the loss per token."""
    return float(result["exact"] if result.get("exact") is not None else result["loss"])


def matching(agent: Agent, digits: Path, shapes: Path) -> dict[str, dict[str, float]]:
    """Return how often labels and captions are told apart on held-out pictures, beside chance."""
    from gato.envs.records import RecordStore
    from gato.rollouts import zero_shot
    from gato.rollouts.metrics import Options

    stores = [RecordStore(path) for path in (digits, shapes)]
    numbers, drawn = ([store[i] for i in range(len(store))] for store in stores)
    figures = sorted({r["text"] for r in numbers})
    unseen = [r for r in drawn if r["meta"]["unseen"]]
    labels = zero_shot.among(sorted({r["text"] for r in drawn}), [r["text"] for r in unseen])
    found = {}
    for name, records, chosen in (
        ("digits classified", numbers, figures),
        ("unseen shapes classified", unseen, labels),
    ):
        by = {how: zero_shot.accuracy(agent, records, chosen, how) for how in zero_shot.HOW}
        found[name] = {"score": by["contrast"], "chance": 1 / len(chosen), **by}
    told = zero_shot.retrieve(agent, drawn, Options())
    for what, name in (("text", "caption of a shape found"), ("image", "shape found by caption")):
        recall = {k: told["metrics"][f"{what}_recall_at_{k}"]["value"] for k in (1, 5)}
        found[name] = {"score": recall[1], "chance": 1 / told["among"], "at_5": recall[5]}
    return found


def _build_corpus(job: tuple[str, str, str]) -> tuple[str, str]:
    """Write one language corpus; runs in a worker process."""
    from gato.envs.corpora import registry

    name, path, split = job
    registry.build(name, path, split)  # type: ignore[arg-type]
    return name, split


def run(out: Path, minutes: float = 20.0, seed: int = 0) -> dict[str, Any]:
    """Run the command, print its report and return what it wrote to ``results.json``.

    Args:
        out: the folder of everything it makes; a second call with it goes on.
        minutes: for all of it, about half of them for training.
        seed: of demonstrations, training and sampling.

    Raises:
        ValueError: where `out` holds a quickstart with other settings.
    """
    from rich.console import Console

    from gato.report import show

    console = Console(file=cast(TextIO, Unfailing(sys.stdout)))
    started = time.perf_counter()

    def say(message: str) -> None:
        elapsed = (time.perf_counter() - started) / 60
        console.print(f"[{elapsed:5.1f} min] {message}", markup=False, highlight=False)

    result = Quickstart(out, minutes, seed, say).run()
    show(result, console)
    return result
