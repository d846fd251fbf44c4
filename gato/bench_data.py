"""`gato bench data`: how fast data are read, from small stores and from large ones.

The large stores have ten million steps in sparse files, laid out as the writer would: what is
measured is finding and reading, not a disk. Everything is read from files: what a run keeps in
memory of small corpora comes on top.

    frames    GB/s of windows of 16 frames, read and copied into a batch, by two processes
    windows   tokens/s of sampling, beside writing the same windows from memory
    opening   seconds until a store can be read, beside the most it may take
    sampling  samples/s out of ten million steps, beside the same out of ten thousand
    memory    MB after 400 batches, beside after the first 100
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gato import bench_common
from gato.bench_common import ASKED, Result, made_up, pace, result
from gato.bench_machine import bandwidth
from gato.bench_train import mixture_of
from gato.corpora import CorpusConfig, EpisodeCorpus, open_corpus
from gato.envs.episode import TaskSpec
from gato.envs.store import EpisodeStore, EpisodeWriter
from gato.envs.store_reader import FORMAT, TEXTS, columns, file_name, leaves_of
from gato.envs.store_writer import default_shard_steps
from gato.envs.workers import one_thread_each
from gato.fitting import make_serializer
from gato.kept import ROOM, Kept, Room
from gato.memory import resident
from gato.mixture import Mixture
from gato.tokenizers.serializer import Serializer
from gato.tokenizers.spaces import CodecOptions

CPU = torch.device("cpu")
FRAMES_ASKED = 3.0
"""GB/s of uint8 frames that two cores must read from files that are in memory."""
OPENING_CEILING = 1.0
"""Seconds that ten million steps may take to open."""
# without words, which would need a text model
ARM, GAME = replace(bench_common.ARM, instruction=""), replace(bench_common.GAME, instruction="")
STEPS, EPISODE = 10_000_000, 100
WINDOW, SECONDS = 16, 1.0


def data_bench(repeats: int) -> list[Result]:
    """Return what reading costs; see the head of this file."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        results = [_frames(root, repeats), *_windows(root, repeats)]
        for task, what in ((ARM, "numbers"), (GAME, "frames")):
            results += _large(root, task, what, repeats)
        return [*results, _memory(root)]


# ---- frames ----------------------------------------------------------------------------------


def _frames(root: Path, repeats: int) -> Result:
    path = root / "frames"
    with EpisodeWriter(path, GAME, shard_steps=2000) as writer:
        for seed in range(8):
            writer.append(made_up(GAME, 1000, seed))
    with (
        one_thread_each(),
        ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool,
    ):
        list(pool.map(_read, [path] * 2, [0.2] * 2))  # both have started, files are in memory
        rates = [sum(pool.map(_read, [path] * 2, [SECONDS] * 2)) for _ in range(repeats)]
    case = f"data: frames in windows of {WINDOW}, two processes"
    floor = bandwidth(CPU, 1 << 28) / torch.get_num_threads() / 1e9  # two, that read and write
    read = "memory read and written once"
    return result(case, rates, "GB/s", FRAMES_ASKED, "what is asked", floor=floor, floor_from=read)


def _read(path: Path, seconds: float) -> float:
    """Return GB/s of windows read and copied into a batch, at random places."""
    store, rng = EpisodeStore(path), np.random.default_rng(os.getpid())
    batch = np.empty((16, WINDOW, *(GAME.observation_space.shape or ())), np.uint8)
    begun, read = time.perf_counter(), 0
    while time.perf_counter() - begun < seconds:
        for slot in batch:
            i, start = rng.integers(len(store)), rng.integers(1000 - WINDOW)
            window = store.window(int(i), int(start), int(start) + WINDOW, outcome=False)
            slot[...] = window.observations["observation"]
        read += batch.nbytes
    return read / (time.perf_counter() - begun) / 1e9


# ---- windows as tokens -----------------------------------------------------------------------


def _windows(root: Path, repeats: int) -> list[Result]:
    results = []
    for task, what in ((ARM, "robot arm, 39 numbers"), (GAME, "game, frames of 80 x 80")):
        path = root / "windows" / task.id
        with EpisodeWriter(path, task) as writer:
            for seed in range(6):
                writer.append(made_up(task, 500, seed))
        corpus = _corpus(path, task)
        rates = [_sampling(corpus, 40, tokens=True) for _ in range(repeats)]
        case = f"data: windows of a row, {what}, from files"
        results.append(
            result(case, rates, "tokens/s/core", ASKED[task.id], "what is asked of the serializer")
        )
    return results


def _corpus(path: Path, task: TaskSpec) -> EpisodeCorpus:
    """Return the corpus of a store that keeps nothing in memory."""
    serializer = Serializer(CodecOptions(scales="mu_law"))
    serializer.add_task(task)
    corpus = open_corpus(CorpusConfig(task.id, str(path), prompt=0.0), serializer)
    assert isinstance(corpus, EpisodeCorpus)
    corpus.kept = Kept(Room(0))
    return corpus


def _sampling(corpus: EpisodeCorpus, samples: int, *, tokens: bool = False) -> float:
    """Return samples, or tokens, per second of one core."""
    rng, written = np.random.default_rng(0), 0
    begun = time.process_time()
    for _ in range(samples):
        written += len(corpus.sample(rng, 1024))
    return (written if tokens else samples) / (time.process_time() - begun)


# ---- ten million steps -----------------------------------------------------------------------


def _large(root: Path, task: TaskSpec, what: str, repeats: int) -> list[Result]:
    large, small = root / f"{what}-large", root / f"{what}-small"
    sparse_store(large, task, STEPS)
    sparse_store(small, task, STEPS // 1000)
    times = [1 / pace(lambda: EpisodeStore(large), 1) for _ in range(repeats)]
    case, most = f"data: opening 10M steps of {what}", "the most it may take"
    opening = result(case, times, "s", OPENING_CEILING, most, better="less")
    corpora = _corpus(large, task), _corpus(small, task)
    for corpus in corpora:
        _sampling(corpus, 50)
    rates = [[_sampling(corpus, 100) for corpus in corpora] for _ in range(2 * repeats + 1)]
    ours, theirs = zip(*rates, strict=True)
    case = f"data: sampling 10M steps of {what}"
    return [opening, result(case, ours, "samples/s/core", theirs, "the same out of 10k steps")]


def sparse_store(path: Path, task: TaskSpec, steps: int, episode: int = EPISODE) -> None:
    """Make a store of so many steps, all of whose values are 0, in files that take no room."""
    leaves, left = leaves_of(task), steps // episode
    shards: list[dict[str, Any]] = []
    each = -(-default_shard_steps(task) // episode)  # episodes that fill a shard
    while left:
        count = min(each, left)
        name = f"shard-{len(shards):05d}-{count:06d}"
        entry: dict[str, Any] = {"name": name, "episodes": count, "steps": count * episode}
        entry |= {"targets": False, "open": False, "sha256": {TEXTS: "0" * 64}}
        (path / name).mkdir(parents=True)
        (path / name / TEXTS).write_text(json.dumps([task.instruction]))
        for kind, leaf, dtype, shape in columns(leaves, entry):
            entry["sha256"][file_name(kind, leaf)] = "0" * 64
            with (path / name / file_name(kind, leaf)).open("wb") as file:
                _write_header(file, np.dtype(dtype), shape)
                if leaf == "lengths":
                    file.write(np.full(count, episode, dtype).tobytes())
                else:
                    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
                    file.truncate(file.tell() + size)
        shards.append(entry)
        left -= count
    manifest = {"format": FORMAT, "spec": task.to_json(), "settings": {}, "versions": {}}
    (path / "manifest.json").write_text(json.dumps({**manifest, "shards": shards}))


def _write_header(file: Any, dtype: np.dtype, shape: tuple[int, ...]) -> None:
    header = {
        "descr": np.lib.format.dtype_to_descr(dtype),
        "fortran_order": False,
        "shape": shape,
    }
    np.lib.format.write_array_header_1_0(file, header)


# ---- memory ----------------------------------------------------------------------------------


def _memory(root: Path) -> Result:
    """Return how much memory a process takes after drawing many batches."""
    config = mixture_of(root / "mixture")
    serializer = make_serializer(config)
    corpora = [open_corpus(c, serializer) for c in config.corpora]
    mixture = Mixture(corpora, serializer, rows=config.rows, row_length=config.model.context)
    room = ROOM.limit
    ROOM.limit = min(room, ROOM.used + (8 << 20))  # so that it is used up in the first hundred
    try:
        taken = []
        for k in range(400):
            mixture.part(k, 0)
            if k in (99, 399):
                taken.append(resident())
    finally:
        ROOM.limit = room
    case = "data: memory after 400 batches"
    return result(case, taken[1:], "MB", taken[:1], "after the first 100: 1 is flat", better="less")
