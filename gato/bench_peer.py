"""`gato bench peer`: rollouts and training beside a loop of the strongest open peer's shape.

Both have trunks of one size: width x layers, equal heads, equal parameters a layer. The peer's loop
(`gato.bench_peer_loop`) takes two embeddings a step, batches of one, float32; ours takes what its
codecs make of a step, rows decided together, float32 or bfloat16. Both remember as many steps, 128
of an arm's 39 numbers, 16 of a game's frames, where the way does not say otherwise. Training is
counted in steps of the environment too: AdamW on sequences of 256 steps.

    way          a step is ...
    quickstart   written and decided as by `gato quickstart`, which remembers one step: 39 numbers
                 in a token, a frame in cells of 32, all of an action from one state
    vectors      remembering one step too: numbers in three tokens or a frame in cells of 16,
                 actions one id after another
    shown        the same, all that is remembered in view
    joint        its observation (frames in cells of 32), all of its action decided from one state
    one token    the same in one token: 39 numbers, or a frame of 64 x 64
    chunk        that, remembering one step and deciding four: three of four are never read
    gato         written as in the paper: a token a number or 16 x 16 pixels, 1024 in memory

    `peer` has trunks of 128 x 4, `peer_large` of 768 x 12, the size that the peer released.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium import spaces

from gato.bench_common import ARM, Result, in_turns, made_up, result, wait
from gato.bench_machine import device
from gato.bench_peer_loop import LARGE, SIDE, SMALL, STACK, Peer, PeerAgent, Trunk
from gato.checkpoint import build_model
from gato.config import TrainConfig
from gato.corpus_config import CorpusConfig
from gato.envs.episode import TaskSpec
from gato.envs.store import EpisodeWriter
from gato.fitting import history_of
from gato.model_config import ModelConfig
from gato.optim import OptimConfig
from gato.quickstart import recipe
from gato.tokenizers.serializer import Serializer
from gato.tokenizers.spaces import CodecOptions
from gato.tokenizers.task_codec import History
from gato.train import Trainer

STEER = replace(ARM, instruction="")
FRAMES = TaskSpec(
    id="bench/frames",
    observation_space=spaces.Box(0, 255, (64, 64, 3), np.uint8),
    action_space=spaces.Discrete(18),
    max_steps=500,
    control_hz=15.0,
)
TASKS = {"arm": STEER, "frames": FRAMES}
IDS = 4
"""Of an arm's action."""
REMEMBERED = {"arm": 128, "frames": 16}
"""Steps in memory; the peer keeps two embeddings of each."""
SEQUENCE = 256
"""Steps of a training sequence."""
PUBLISHED = {
    ("arm", SMALL): 356.0,
    ("arm", LARGE): 22.0,
    ("frames", SMALL): 92.0,
    ("frames", LARGE): 15.0,
    ("train", SMALL): 3808.0,
    ("train", LARGE): 192.0,
}
"""Steps/s of the peer's own code, random weights, on two cores of a Xeon with AMX, torch 2.13."""
WANTED = {
    ("arm", SMALL): 5.0,
    ("arm", LARGE): 5.0,
    ("frames", SMALL): 12.0,
    ("frames", LARGE): 12.0,
    ("train", SMALL): 1.0,
    ("train", LARGE): 2.5,
}
"""How many times the peer's pace is asked for."""


@dataclass(frozen=True)
class Way:
    """How ours writes, remembers and decides a task's steps."""

    codec: CodecOptions
    tokens: int
    """Of one step, its action's among them where they are shown."""
    history: History
    image: str = "conv"
    """The embedder of frames in cells of 16 pixels."""
    memory: int | None = None
    """Tokens remembered; None for those of `REMEMBERED` steps."""


def _quickstart(corpus: str, tokens: int) -> Way:
    """Return the way of a corpus of quickstart's recipe."""
    config = recipe(Path(), steps=1)
    (found,) = (c for c in config.corpora if c.name == corpus)
    image = config.embedders["image"]["embedder"]
    return Way(config.codec, tokens, history_of(found), image=image)


VECTOR = CodecOptions(observations="vector")
ALL, ONE = History(), History(window=1)
JOINT = History(hide_actions=True, joint=1)
CHUNK = History(window=1, hide_actions=True, joint=4)
WAYS = {
    "arm": {
        "quickstart": _quickstart("metaworld", 1),
        "vectors": Way(VECTOR, 8, ONE),
        "shown": Way(VECTOR, 8, ALL),
        "joint": Way(VECTOR, 3, JOINT),
        "one token": Way(replace(VECTOR, vector_group=39), 1, JOINT),
        "chunk": Way(replace(VECTOR, vector_group=39), 1, CHUNK),
        "gato": Way(CodecOptions(scales="mu_law"), 44, ALL, memory=1024),
    },
    "frames": {
        "quickstart": _quickstart("atari", 4),
        "vectors": Way(VECTOR, 18, ONE),
        "shown": Way(VECTOR, 18, ALL),
        "joint": Way(replace(VECTOR, frame_cell=32), 4, JOINT),
        "one token": Way(replace(VECTOR, frame_cell=64), 1, JOINT),
        "chunk": Way(replace(VECTOR, frame_cell=64), 1, CHUNK),
        "gato": Way(CodecOptions(scales="mu_law"), 18, ALL, image="patch", memory=1024),
    },
}


@dataclass(frozen=True)
class Case:
    """What is measured at one size of trunk."""

    trunk: Trunk
    rows: int
    """Rows decided together."""
    decisions: int
    """Of every row, in one repeat."""
    peer_steps: int
    """Of the peer's loop, in one repeat."""
    sequences: int
    """Of a training batch of the peer's."""
    tokens: int
    """Of a training batch of ours, at most; else it has as many steps as the peer's."""
    dtypes: Sequence[str] = ("float32", "bfloat16")

    def said(self, what: str) -> str:
        """Return the name of a result."""
        return f"peer: {what}, {self.trunk.width} x {self.trunk.layers}"


CASES = {
    "small": Case(SMALL, rows=32, decisions=8, peer_steps=10, sequences=8, tokens=16_384),
    "large": Case(LARGE, rows=16, decisions=8, peer_steps=3, sequences=4, tokens=4096),
}


def peer_bench(repeats: int) -> list[Result]:
    """Return steps/s of rollouts and training at 128 x 4."""
    return measured(CASES["small"], repeats)


def peer_large_bench(repeats: int) -> list[Result]:
    """Return steps/s of rollouts and training at 768 x 12."""
    return measured(CASES["large"], repeats)


def measured(case: Case, repeats: int) -> list[Result]:
    """Return all results at one size of trunk."""
    results = [r for task, ways in WAYS.items() for r in rollouts(case, task, ways, repeats)]
    return results + trainings(case, WAYS["arm"], repeats)


# ---- rollouts ---------------------------------------------------------------------------------


def rollouts(case: Case, task: str, ways: dict[str, Way], repeats: int) -> list[Result]:
    """Return steps/s of every way, and of the peer's loop without its habits."""
    against = "one row of a loop of JAT's shape, float32"
    peer, results = _peer_work(case, task, lean=False), []
    lean = _peer_work(case, task, lean=True)
    theirs, ours = _paces(repeats, peer, lean, case.peer_steps, case.peer_steps)
    name = case.said(f"{task}, that loop without the peer's habits")
    results.append(result(name, ours, "steps/s", theirs, against))
    for way, dtype in itertools.product(ways, case.dtypes):  # one model at a time in memory
        work = _our_work(case, task, ways[way], dtype)
        theirs, ours = _paces(repeats, peer, work, case.peer_steps, case.rows * case.decisions)
        results.append(_beside(case, task, f"{task}, {way}, {dtype}", ours, theirs, against))
    return results


def _paces(
    repeats: int,
    peer: Callable[[], None],
    work: Callable[[], None],
    theirs: int,
    ours: int | Sequence[int],
) -> tuple[list[float], list[float]]:
    """Return the peer's and our steps/s of every repeat, measured in turns.

    Args:
        repeats: how many.
        peer: what the peer does.
        work: what ours does.
        theirs: the peer's steps in one repeat.
        ours: our steps in one repeat; where they differ, a list that `work` appends them to.
    """
    peer_took, our_took = in_turns(repeats, peer, work, device=device())
    counts = [ours] * repeats if isinstance(ours, int) else ours[-repeats:]
    return [theirs / s for s in peer_took], [n / s for n, s in zip(counts, our_took, strict=True)]


def _beside(
    case: Case, key: str, what: str, ours: list[float], theirs: list[float], against: str
) -> Result:
    """Return a result with the peer's published figure and the ratio that is asked for."""
    published, wanted = PUBLISHED[key, case.trunk], WANTED[key, case.trunk]
    told = f"{against}; JAT's own on two Xeon cores with AMX {published:g}; asked {wanted:g} times"
    made = result(case.said(what), ours, "steps/s", theirs, told)
    return made | {
        "published": published,
        "of_published": made["value"] / published,
        "asked": wanted,
        "reached": made["ratio"] >= wanted,
    }


def _peer_work(case: Case, task: str, *, lean: bool) -> Callable[[], None]:
    """Return some steps of the peer's loop, whose memory is full."""
    rng, frames = np.random.default_rng(0), task == "frames"
    torch.manual_seed(0)
    model = Peer(case.trunk, frames=frames, lean=lean).to(device()).eval()
    agent = PeerAgent(model, 2 * REMEMBERED[task])
    seen = [
        rng.integers(0, 256, (SIDE, SIDE, STACK), np.uint8)
        if frames
        else rng.normal(size=39).astype(np.float32)
        for _ in range(case.peer_steps)
    ]
    for i in range(REMEMBERED[task] + 2):
        agent.act(seen[i % len(seen)])

    def work() -> None:
        for observation in seen:
            agent.act(observation)

    return work


def _our_work(case: Case, task: str, way: Way, dtype: str) -> Callable[[], None]:
    """Return some decisions of all rows, whose memory is full."""
    from gato.rollouts.policy import Policy

    spec = TASKS[task]
    serializer = _serializer(way, spec)
    torch.manual_seed(0)
    size = _model_config(case.trunk, way, REMEMBERED[task])
    model = build_model(_config(size, way), serializer).to(device()).eval()
    policy = Policy(model, serializer, [spec.id] * case.rows, precision=dtype)
    episode = made_up(spec, case.rows * case.decisions)
    seen = np.asarray(episode.observations["observation"])[:-1]
    steps = list(seen.reshape(case.decisions, case.rows, *seen.shape[1:]))
    kept = way.history.window or -(-size.context // way.tokens)

    for i in range(kept + 1):
        policy.select_action(list(steps[i % len(steps)]))

    def work() -> None:
        for observed in steps:
            policy.select_action(list(observed))

    return work


def _serializer(way: Way, spec: TaskSpec) -> Serializer:
    serializer = Serializer(way.codec)
    serializer.add_task(spec, history=way.history)
    return serializer


def _model_config(trunk: Trunk, way: Way, steps: int) -> ModelConfig:
    """Return a trunk of equal parameters a layer: 4 D^2 of attention and 8 D^2 beside it."""
    return ModelConfig(
        layers=trunk.layers,
        width=trunk.width,
        heads=trunk.heads,
        head_dim=trunk.head_dim,
        ffn_width=2 * round(8 * trunk.width / 3),
        context=way.memory or max(256, steps * way.tokens),
        qk_norm=True,
    )


def _config(size: ModelConfig, way: Way, **options: Any) -> TrainConfig:
    return TrainConfig(
        model=size, codec=way.codec, embedders={"image": {"embedder": way.image}}, **options
    )


# ---- training ---------------------------------------------------------------------------------


def trainings(case: Case, ways: dict[str, Way], repeats: int) -> list[Result]:
    """Return environment steps/s of the trainer, its reading included, on an arm's episodes.

    A repeat is one optimizer step; that of ours is on about as many steps as the peer's.
    """
    steps = case.sequences * SEQUENCE
    against = f"a loop of JAT's shape, {case.sequences} sequences of {SEQUENCE} steps, float32"
    peer, results = _peer_training(case, lean=False), []
    theirs, ours = _paces(repeats, peer, _peer_training(case, lean=True), steps, steps)
    name = case.said("training, that loop without the peer's habits")
    results.append(result(name, ours, "steps/s", theirs, against))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "arm"
        with EpisodeWriter(path, STEER) as writer:
            for i in range(8):
                writer.append(made_up(STEER, STEER.max_steps, seed=i))
        for way, dtype in itertools.product(ways, case.dtypes):
            counts: list[int] = []
            work = _our_training(case, ways[way], dtype, path, Path(folder) / "run", counts)
            theirs, ours = _paces(repeats, peer, work, steps, counts)
            what = f"training, {way}, {dtype}"
            results.append(_beside(case, "train", what, ours, theirs, against))
    return results


def _peer_training(case: Case, *, lean: bool) -> Callable[[], None]:
    """Return one optimizer step of the peer's shape on tensors at hand."""
    torch.manual_seed(0)
    model = Peer(case.trunk, frames=False, lean=lean).to(device())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    observed = torch.randn(case.sequences, SEQUENCE, 40, device=device())
    acted = torch.rand(case.sequences, SEQUENCE, 4, device=device()) * 2 - 1

    def work() -> None:
        loss: torch.Tensor = model.loss(observed, acted)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return work


def _our_training(
    case: Case, way: Way, dtype: str, path: Path, run: Path, counts: list[int]
) -> Callable[[], None]:
    """Return one step of a trainer; the environment steps in its batch are added to `counts`."""
    size = replace(_model_config(case.trunk, way, SEQUENCE), context=_row(way))
    history = way.history
    config = _config(
        size,
        way,
        optim=OptimConfig(lr=1e-4, muon=False),
        corpora=(
            CorpusConfig(
                "arm",
                str(path),
                window=history.window,
                hide_actions=float(history.hide_actions),
                joint=history.joint,
                prompt=0.0,
            ),
        ),
        rows=max(1, min(case.sequences * SEQUENCE * way.tokens, case.tokens) // size.context),
        precision=dtype,
    )
    trainer = Trainer(config, run, device(), _serializer(way, STEER))

    def work() -> None:
        batch = trainer.mixture.batch(trainer.step)
        counts.append(steps_in(batch.target_slot, ids=IDS))
        trainer.train_step(batch)
        wait(trainer.device)

    return work


def _row(way: Way) -> int:
    """Return tokens of a row: a sequence and <bos>, the paper's 1024, or quickstart's 256."""
    if way.history.window:
        return 256
    return way.memory or SEQUENCE * way.tokens + 1


def steps_in(slots: Iterable[int], ids: int) -> int:
    """Return how many steps' actions a batch predicts, each of `ids` ids.

    Of joint targets, the first slot is the first id of the step's own action.
    """
    slot = np.asarray(slots)
    return int((slot == 1).sum()) + int((slot == 0).sum()) // ids
