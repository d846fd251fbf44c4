"""Short videos of evaluated episodes, drawn afterwards.

Drawing costs more than simulating, and must not change what is evaluated. So the runner keeps only
the actions of the episodes that are wanted, and here these are played once more, from the same
seed, in an environment that is drawn after every few steps.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path

import gymnasium as gym
import numpy as np

from gato.envs import registry
from gato.envs.files import write_atomically
from gato.envs.graphics import explain
from gato.envs.readers.video import require_av
from gato.envs.workers import Pool, WorkerDiedError, deal
from gato.rollouts.players import Acts
from gato.rollouts.runner import Job, Played

FRAMES = 60
"""Most pictures in a clip: a software renderer draws about ten a second."""
RATES = (6, 20)
"""Pictures shown per second, at least and at most; between them, a clip runs in real time."""
FASTEST = 4
"""Times real time at most; an episode that would take longer is cut."""
LARGEST = 320
"""Pixels of a side; larger pictures are shrunk by a whole number."""


@dataclass
class Recorder:
    """Which episodes are filmed, and what was done in them."""

    per_task: int = 1
    """The first so many of each task."""
    episodes: list[Played] = field(default_factory=list)


@dataclass(frozen=True)
class Clip:
    """A video of an episode, or why there is none."""

    task: str
    seed: int
    webm: bytes | None = None
    width: int = 0
    height: int = 0
    about: str = ""
    """How it ended, and what part of it is shown at what speed."""
    fault: str = ""


def film(
    recorder: Recorder,
    workers: int = 0,
    progress: Callable[[Clip], None] | None = None,
    timeout: float | None = 600.0,
) -> list[Clip]:
    """Return a clip of each recorded episode, in their order.

    Args:
        recorder: after the evaluation.
        workers: processes that draw; 0 draws in this one.
        progress: called after each.
        timeout: seconds that one step may take before its worker process is ended; in this
            process nothing ends it.
    """
    found: dict[Job, Clip] = {}
    for played, answer, _ in deal(Pool(workers, _filmer, timeout=timeout), recorder.episodes):
        if isinstance(answer, WorkerDiedError):
            answer = Clip(played.job.task, played.job.seed, fault=str(answer))
        found[played.job] = answer
        if progress:
            progress(answer)
    return [found[played.job] for played in recorder.episodes]


def _filmer(tick: Callable[[], None]) -> Callable[[Played], Clip]:
    return lambda played: clip(played, tick)


def clip(played: Played, tick: Callable[[], None] = lambda: None) -> Clip:
    """Return the clip of one episode; whatever goes wrong is its fault, in words.

    Args:
        played: with its actions.
        tick: called after every step.
    """
    task, seed = played.job.task, played.job.seed
    empty = Clip(task, seed)
    if not played.actions:
        return replace(empty, fault="the episode ended before its first step")
    try:
        require_av()
        env = registry.make(task)
    except Exception as error:
        return replace(empty, fault=str(error))
    try:
        hz = registry.spec(task).control_hz
        stride, rate = _pace(len(played.actions), hz)
        frames, total = _drawn(env, played, stride, tick)
        steps = min(len(played.actions), (len(frames) - 1) * stride)
        speed = rate * stride / hz
        whole = steps + stride > len(played.actions)
        same = not whole or played.error is not None or np.isclose(total, played.score)
        webm, width, height = encode(frames, rate)
    except Exception as error:
        drawn_by_mujoco = "mujoco" in registry.packages(task.split("/")[0])
        reason = explain(error) if drawn_by_mujoco and _of_graphics(error) else error
        return replace(empty, fault=f"{type(error).__name__}: {' '.join(str(reason).split())}")
    finally:
        env.close()
    part = "all" if whole else f"the first {steps}"
    outcome = {None: "", True: "success, ", False: "no success, "}[played.success]
    about = (
        f"{outcome}return {played.score:.4g}; {part} of {played.length} steps, {speed:.2g} x speed"
    )
    if not same:
        about += f"; played again, it returned {total:.4g}"
    return replace(empty, webm=webm, width=width, height=height, about=about)


def _of_graphics(error: Exception) -> bool:
    """Return whether an error is of drawing, as far as its words tell."""
    words = f"{type(error).__name__} {error}".lower()
    return any(w in words for w in ("gl", "render", "context", "display", "mjr", "framebuffer"))


def _pace(steps: int, control_hz: float) -> tuple[int, int]:
    """Return how many steps lie between pictures, and how many pictures make a second."""
    least, most = RATES
    fastest = max(1, round(FASTEST * control_hz / least))
    stride = max(1, min(-(-steps // FRAMES), fastest))
    return stride, min(max(round(control_hz / stride), least), most)


def _drawn(
    env: gym.Env, played: Played, stride: int, tick: Callable[[], None]
) -> tuple[list[np.ndarray], float]:
    """Return pictures of an episode every `stride` steps and at its end, and its return."""
    env.reset(seed=played.job.seed)
    frames, total = [draw(env, played.job.task)], 0.0
    for step, action in enumerate(played.actions, 1):
        if isinstance(action, Acts):
            break  # an expert that raised has decided nothing
        try:
            _, reward, terminated, truncated, _ = env.step(action)
        except Exception:
            if played.error is None:
                raise
            break  # as it did when it was evaluated
        tick()
        total += float(reward)
        ended = terminated or truncated or step == len(played.actions)
        if step % stride == 0 or ended:
            frames.append(draw(env, played.job.task))
        if ended or len(frames) > FRAMES:
            break
    return frames, total


def draw(env: gym.Env, task: str) -> np.ndarray:
    """Return what an environment looks like, uint8 (H, W, 3), its sides even and at most `LARGEST`.

    Raises:
        ValueError: where it draws nothing.
    """
    picture = env.render() if env.unwrapped.render_mode else None
    if picture is None:
        raise ValueError(f"the environment of {task!r} draws no pictures")
    picture = np.asarray(picture, np.uint8)
    factor = -(-max(picture.shape[:2]) // LARGEST)
    height, width = (n // (2 * factor) * 2 for n in picture.shape[:2])  # codecs want even sides
    picture = picture[: height * factor, : width * factor]
    blocks = picture.reshape(height, factor, width, factor, 3).mean((1, 3))
    return blocks.round().astype(np.uint8)


def encode(frames: Sequence[np.ndarray], rate: int) -> tuple[bytes, int, int]:
    """Return a WebM file (VP9) of uint8 (H, W, 3) pictures of even sides, its width and height."""
    import av

    height, width = frames[0].shape[:2]
    file = io.BytesIO()
    with av.open(file, "w", format="webm") as container:
        quality = {"crf": "36", "b": "0", "deadline": "good", "cpu-used": "5", "threads": "1"}
        stream = container.add_stream("libvpx-vp9", rate=rate, options=quality)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for number, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            picture.pts, picture.time_base = number, Fraction(1, rate)
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return file.getvalue(), width, height


def write_clips(clips: Sequence[Clip], folder: Path) -> list[Path]:
    """Write one file per clip as ``folder/<task>-<seed>.webm`` and return them."""
    written = []
    for one in clips:
        if one.webm is not None:
            path = folder / f"{registry.folder_of(one.task)}-{one.seed}.webm"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, one.webm)
            written.append(path)
    return written
