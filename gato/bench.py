"""`gato bench`: the speed of the serializer, of training and of rollouts, on made-up tasks.

Everything is measured beside a baseline on the same machine in the same minute, block by block in
turns, and the medians are reported. No simulator takes part, so it runs wherever gato does; all
but the last two, which take long and are measured only where they are named.

    serializer   tokens/s of one core       beside the floor that the design asks for
    train        tokens/s of the trainer    beside forward, backward and step on batches at hand
    rollout      steps/s of 8 rows, cached  beside one row, the whole context anew for every token
    data         speed and memory of reading   see `gato.bench_data`
    collect      episodes/s of two workers  beside one, from the command to complete stores
"""

from __future__ import annotations

import difflib
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium import spaces

from gato.checkpoint import build_model
from gato.config import TrainConfig
from gato.corpora import CorpusConfig
from gato.envs.episode import Episode, TaskSpec
from gato.envs.records import RecordWriter
from gato.envs.store import EpisodeWriter
from gato.fitting import make_serializer
from gato.model import GatoModel
from gato.model_config import quickstart
from gato.optim import OptimConfig
from gato.tokenizers.serializer import Serializer
from gato.tokenizers.spaces import CodecOptions
from gato.tokenizers.stream import TokenBatch, TokenSequence, concatenate, pack
from gato.tokenizers.task_codec import History
from gato.train import Trainer

Result = dict[str, Any]

ARM = TaskSpec(
    id="bench/arm",
    observation_space=spaces.Box(-np.inf, np.inf, (39,), np.float32),
    action_space=spaces.Box(-1, 1, (4,), np.float32),
    max_steps=500,
    control_hz=80.0,
    instruction="push the puck to the goal",
)
GAME = TaskSpec(
    id="bench/game",
    observation_space=spaces.Box(0, 255, (80, 80, 3), np.uint8),
    action_space=spaces.Discrete(18),
    max_steps=500,
    control_hz=15.0,
)
FLOORS = {"bench/arm": 1e6, "bench/game": 4e5}
"""Tokens a second that one core must write (Meta-World and Atari in all but the simulator)."""


def run(names: Sequence[str] = (), repeats: int = 5) -> dict[str, Any]:
    """Return what the benches `names` measured; where none is named, all without simulators.

    Raises:
        ValueError: for a name that is no bench, with the closest.
    """
    for name in names:
        if name not in BENCHES:
            close = difflib.get_close_matches(name, BENCHES) or list(BENCHES)
            raise ValueError(f"expected a bench, such as {' or '.join(close)}; got {name!r}")
    chosen = list(dict.fromkeys(names)) or [name for name in BENCHES if name not in LONG]
    packages = ("gato", "torch", "numpy", "gymnasium")
    return {
        "name": " ".join(chosen),
        "hardware": _hardware(),
        "versions": {"python": platform.python_version(), **{p: _version(p) for p in packages}},
        "results": [result for name in chosen for result in BENCHES[name](repeats)],
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except ImportError:
        return "not installed"


def _hardware() -> str:
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    name = platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads{gpu}"


def result(case: str, value: float, unit: str, baseline: float, against: str) -> Result:
    """Return one line of what is printed."""
    return {
        "case": case,
        "value": value,
        "unit": unit,
        "baseline": baseline,
        "ratio": value / baseline,
        "against": against,
    }


def pace(work: Callable[[], Any], amount: float) -> float:
    """Return `amount` per second of one call of `work`."""
    begun = time.perf_counter()
    work()
    return amount / (time.perf_counter() - begun)


def made_up(task: TaskSpec, steps: int, seed: int = 0) -> Episode:
    """Return an episode of noise in the task's spaces."""
    rng = np.random.default_rng(seed)

    def column(space: Any, n: int) -> np.ndarray:
        if isinstance(space, spaces.Discrete):
            return rng.integers(space.n, size=n)
        if space.dtype == np.uint8:
            return rng.integers(0, 256, (n, *space.shape), np.uint8)
        return np.clip(rng.normal(size=(n, *space.shape)), -1, 1).astype(np.float32)

    no = np.zeros(steps, bool)
    return Episode(
        task=task.id,
        observations={"observation": column(task.observation_space, steps + 1)},
        actions={"action": column(task.action_space, steps)},
        rewards=np.zeros(steps, np.float32),
        terminated=no,
        truncated=no,
        instruction=task.instruction,
        seed=seed,
    )


# ---- the serializer --------------------------------------------------------------------------


def serializer_bench(repeats: int) -> list[Result]:
    """Return tokens/s of writing whole episodes, one token per number and 16 x 16 patches."""
    results = []
    for task, what in ((ARM, "robot arm, 39 numbers"), (GAME, "game, frames of 80 x 80")):
        serializer = Serializer(CodecOptions(scales="mu_law"))
        serializer.add_task(replace(task, instruction=""))
        episodes = [replace(made_up(task, 200, seed=i), instruction="") for i in range(4)]

        def work(serializer: Serializer = serializer, episodes: Any = episodes) -> int:
            return sum(len(serializer.episode(e).steps) for e in episodes)

        tokens = work()
        value = statistics.median(pace(work, tokens) for _ in range(2 * repeats))
        floor = FLOORS[task.id]
        results.append(result(f"serializer: {what}", value, "tokens/s/core", floor, "the floor"))
    return results


# ---- training --------------------------------------------------------------------------------


def train_bench(repeats: int) -> list[Result]:
    """Return tokens/s of training on a mixture of an arm, a game and text."""
    with tempfile.TemporaryDirectory() as folder:
        config = mixture_of(Path(folder))
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        serializer = make_serializer(config)
        trainer = Trainer(config, Path(folder) / "run", device, serializer)
        bare = Trainer(config, Path(folder) / "bare", device, serializer)
        steps, first = 3, 4
        tokens = steps * config.rows * config.model.context
        _train(trainer, range(first))  # caches fill, kernels are chosen
        ours, theirs = [], []
        for block in range(repeats):
            indices = range(first + block * steps, first + (block + 1) * steps)
            batches = [bare.mixture.batch(k).to(device) for k in indices]
            theirs.append(pace(lambda b=batches: _bare(bare, b), tokens))
            ours.append(pace(lambda i=indices: _train(trainer, i), tokens))
    value, baseline = statistics.median(ours), statistics.median(theirs)
    against = "forward, backward and step of the same model on the same batches at hand"
    return [result("train: arm, game and text, bfloat16", value, "tokens/s", baseline, against)]


def mixture_of(folder: Path) -> TrainConfig:
    """Return a run on an arm, a game and text, made up in `folder`."""
    for task, episodes in ((ARM, 40), (GAME, 6)):
        with EpisodeWriter(folder / task.id, task) as writer:
            for i in range(episodes):
                writer.append(made_up(task, 100, seed=i))
    rng = np.random.default_rng(0)
    words = "the a red green ball box door goes to of and is in on it robot reads writes".split()
    with RecordWriter(folder / "text", "text") as records:
        for _ in range(400):
            records.append({"kind": "document", "text": " ".join(rng.choice(words, 60))})
    return TrainConfig(
        model=quickstart(),
        codec=CodecOptions(observations="vector"),
        optim=OptimConfig(warmup=10),
        corpora=(
            CorpusConfig("arm", str(folder / ARM.id), 2.0, window=4),
            CorpusConfig("game", str(folder / GAME.id), 2.0, window=2),
            CorpusConfig("text", str(folder / "text"), 1.0),
        ),
        embedders={"image": {"embedder": "conv"}},
        text_pieces=320,
        precision="bfloat16",
        rows=8,
        steps=1000,
    )


def _train(trainer: Trainer, indices: Sequence[int]) -> None:
    for k in indices:
        trainer.train_step(trainer.mixture.batch(k))
    _wait(trainer.device)


def _bare(trainer: Trainer, batches: Sequence[TokenBatch]) -> None:
    model, optimizers = trainer.model, trainer.optimizers
    for batch in batches:
        with torch.autocast(
            trainer.device.type, trainer.dtype, enabled=trainer.dtype != torch.float32
        ):
            loss = model.loss(batch, ordinal=trainer.ordinal)
        (loss * batch.target_weight).mean().backward()
        optimizers.step(1e-4)
    _wait(trainer.device)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


# ---- rollouts --------------------------------------------------------------------------------


def rollout_bench(repeats: int) -> list[Result]:
    """Return decisions/s of 8 rows decided together with a cache, and of one row without."""
    results = []
    for case, window in (("memory of 16 steps", 16), ("memory of one step", 1)):
        serializer = Serializer(CodecOptions(observations="vector"))
        serializer.add_task(replace(ARM, instruction=""), history=History(window=window))
        torch.manual_seed(0)
        model = _model(serializer)
        decisions, rows = 16, 8
        ours, theirs = [], []
        for _ in range(2 * repeats + 1):
            ours.append(_cached(model, serializer, rows, decisions))
            theirs.append(_uncached(model, serializer, decisions, window))
        value, baseline = statistics.median(ours[1:]), statistics.median(theirs[1:])
        against = "one row, the whole context computed anew for every token"
        results.append(result(f"rollout: arm, 8 rows, {case}", value, "steps/s", baseline, against))
    return results


def _model(serializer: Serializer) -> GatoModel:
    config = TrainConfig(model=quickstart())
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return build_model(config, serializer).to(device).eval()


def _observations(rows: int, decisions: int) -> list[np.ndarray]:
    episode = made_up(ARM, rows * decisions)
    observed = np.asarray(episode.observations["observation"])[:-1]
    return list(observed.reshape(decisions, rows, -1))


def _cached(model: GatoModel, serializer: Serializer, rows: int, decisions: int) -> float:
    """Return decisions/s of the policy."""
    from gato.rollouts.policy import Policy

    policy = Policy(model, serializer, [ARM.id] * rows)
    observations = _observations(rows, decisions)

    def work() -> None:
        for observed in observations:
            policy.select_action(list(observed))

    return pace(work, rows * decisions)


@torch.no_grad()
def _uncached(model: GatoModel, serializer: Serializer, decisions: int, window: int) -> float:
    """Return decisions/s of the plain loop: all that is remembered, read anew for every token."""
    from gato.rollouts.grammar import ActionGrammar

    task, head = serializer.task(ARM.id), serializer.head(ARM.id)
    device = model.table.weight.device
    observations = _observations(1, decisions)

    def work() -> None:
        past: list[TokenSequence] = []
        for i, observed in enumerate(observations):
            past = [] if i % window == 0 else past
            past.append(serializer.observation(ARM.id, {"observation": observed[0]}))
            grammar = ActionGrammar(serializer, task)
            while grammar.allowed is not None:
                sequence = concatenate([head, *past])
                batch = pack([[sequence]], len(sequence), serializer.control).to(device)
                logits = model.logits(model(batch)[-1])
                start, stop = grammar.allowed[0]
                grammar.push(start + int(logits[start:stop].argmax()))
                past.append(grammar.last())
            grammar.value()

    return pace(work, decisions)


# ---- collecting ------------------------------------------------------------------------------


COLLECTED = {
    "metaworld/reach-v3": 100,
    "metaworld/push-v3": 100,
    "metaworld/door-open-v3": 100,
    "babyai/GoToLocal-v0": 100,
    "babyai/GoToRedBallGrey-v0": 100,
    "atari/Boxing-v5": 12,
}
"""Tasks of three simulators and their episodes: about half a minute's work of one core."""


def collect_bench(repeats: int) -> list[Result]:
    """Return episodes/s of two worker processes, their start and the writing included."""
    ours, theirs = [], []
    for _ in range(min(repeats, 2)):
        theirs.append(_collected(1))
        ours.append(_collected(2))
    value, baseline = statistics.median(ours), statistics.median(theirs)
    case = "collect: Meta-World, BabyAI and Atari, 2 workers"
    return [result(case, value, "episodes/s", baseline, "the same episodes by one process")]


def _collected(workers: int) -> float:
    """Return episodes/s of so many workers."""
    from gato.envs.collect import collect

    with tempfile.TemporaryDirectory() as folder:

        def work() -> None:
            for episodes in sorted(set(COLLECTED.values())):
                tasks = [task for task, n in COLLECTED.items() if n == episodes]
                collect(tasks, episodes, folder, noise=0.1, workers=workers, min_fraction=0.4)

        return pace(work, sum(COLLECTED.values()))


def data_bench(repeats: int) -> list[Result]:
    """Return how fast data are read."""
    from gato.bench_data import data_bench as run

    return run(repeats)


BENCHES: dict[str, Callable[[int], list[Result]]] = {
    "serializer": serializer_bench,
    "train": train_bench,
    "rollout": rollout_bench,
    "data": data_bench,
    "collect": collect_bench,
}
LONG = ("data", "collect")
"""Those that take a minute or more."""
