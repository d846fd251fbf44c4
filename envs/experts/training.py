"""Training a specialist of one task with Stable-Baselines3, so that it can be an expert.

```
PPO   several copies of the world; reads each step a few times and forgets it: many steps a second
SAC   one copy; keeps what it saw and learns from it again and again: fewer steps needed, but slow
```
What it has learned is tried now and then, without chance, and the best so far is written as a
`LearnedExpert`. A training that is killed goes on from what it last put down in ``DIR/training``:
its weights, optimizers, scales, memory and counters; only episodes under way begin anew.

Convention: episodes are reset with training seeds drawn below `CHECK_SEED`; those from it on to
`EVALUATION_SEED_START` are for the trials in between; neither meets an evaluation.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np

from gato.envs import registry
from gato.envs.episode import EVALUATION_SEED_START, TaskSpec, space_to_json
from gato.envs.experts import learned
from gato.envs.experts.learned import CLIP, MEAN, STD, Actor, ActorExpert, Interface
from gato.envs.experts.training_state import (
    Check,
    Counters,
    newest,
    read_counters,
    restore,
    save,
)
from gato.envs.files import make_folder
from gato.envs.score import one_episode

CHECK_SEED = EVALUATION_SEED_START - 1024
CHECK_EPISODES = 10
CHECKS = 20
"""Trials in a whole training."""
SAVE_SECONDS = 5.0
"""Work that a kill may lose; more where saving takes long."""
LONG_MINUTES = 60.0
"""From here on SAC is worth its slower steps, where actions are continuous."""

ROLLOUT = 256
"""Steps of each copy between two updates of PPO; steps between two looks at the clock of SAC."""
PPO: dict[str, Any] = {"n_steps": ROLLOUT, "batch_size": 256, "n_epochs": 10, "gae_lambda": 0.95}
PPO |= {"learning_rate": 1e-3, "gamma": 0.99, "clip_range": 0.2, "ent_coef": 0.0}
PPO |= {"policy_kwargs": {"net_arch": {"pi": [64, 64], "vf": [64, 64]}, "log_std_init": -0.5}}
SAC: dict[str, Any] = {"learning_rate": 7e-4, "batch_size": 256, "gamma": 0.99, "tau": 0.01}
SAC |= {"buffer_size": 300_000, "learning_starts": 1000, "policy_kwargs": {"net_arch": [256, 256]}}
ALGORITHMS = ("auto", "ppo", "sac")


@dataclass(frozen=True)
class Status:
    """What is told while it trains."""

    fraction: float
    steps: int
    mean_return: float | None
    """Of recent episodes, which are played with chance."""
    best: float | None
    """Score of the best trial."""
    checked: bool
    """Whether a trial has just been made."""


Progress = Callable[[Status], None]


def train(
    task_id: str,
    out: str | Path,
    *,
    algorithm: str = "auto",
    minutes: float | None = None,
    steps: int | None = None,
    envs: int = 8,
    seed: int = 0,
    until: float | None = None,
    resume: bool = True,
    progress: Progress | None = None,
) -> Counters:
    """Train until a limit is reached, leave the best policy in `out` and return the counters.

    Args:
        task_id: a task whose observations are numbers and whose actions are Discrete or a Box.
        out: folder of the expert.
        algorithm: ``ppo``, ``sac``, or ``auto``: PPO, unless the actions are continuous and there
            is an hour or more.
        minutes: time limit, over all runs of the same training; 10 where no limit is given.
        steps: limit of environment steps.
        envs: copies of the world that PPO plays; SAC has one.
        seed: of weights, episodes and exploration.
        until: a score at which to stop early; confirmed by another twenty episodes.
        resume: go on where a training with the same settings stopped.
        progress: see `Progress`.

    Raises:
        ValueError: for a task that cannot be learned here, a bad setting, a folder of another
            training, or where Stable-Baselines3 is not installed.
    """
    began = time.monotonic()
    _require_library()
    spec, out = registry.spec(task_id), Path(out)
    interface = Interface(spec)
    if minutes is None and steps is None:
        minutes = 10.0
    _check_settings(algorithm, minutes, steps, envs, seed)
    saved = newest(out / "training") if resume else None
    counters = read_counters(saved) if saved else None
    if algorithm == "auto" and counters and counters.settings["task"] == spec.id:
        algorithm = counters.settings["algorithm"]  # more minutes do not change it midway
    chosen = _choose(algorithm, interface, minutes)
    settings = {"task": spec.id, "algorithm": chosen, "envs": envs if chosen == "ppo" else 1}
    settings["seed"] = seed
    if counters is None:
        _refuse_foreign(out, resume)
        counters = Counters(settings)
    elif counters.settings != settings:
        raise ValueError(
            f"expected the settings of the training in {out}: {counters.settings}; got {settings}. "
            f"Give those, another --out, or --no-resume to start anew."
        )
    else:
        _catch_up(counters, out)
    if not resume:
        shutil.rmtree(out / "training", ignore_errors=True)
        (out / learned.DESCRIPTION).unlink(missing_ok=True)  # its trials are not the new training's
    make_folder(out / "training", "a folder for an expert")
    with _one_thread():
        run = _Run(spec, out, counters, saved, began)
        try:
            run.go(minutes, steps, until, progress)
        finally:
            run.close()
    return counters


class _Run:
    """A model, the worlds it learns in, and one it is tried in."""

    def __init__(
        self, spec: TaskSpec, out: Path, counters: Counters, saved: Path | None, began: float
    ) -> None:
        self._spec, self._out, self._counters, self._began = spec, out, counters, began
        self._worlds = _worlds(spec, counters)
        self._model = _model(self._worlds, counters)
        self._try_out = registry.make(spec.id)
        if saved:
            restore(saved, self._model, self._worlds, counters)

    def close(self) -> None:
        """Close all worlds."""
        self._worlds.close()
        self._try_out.close()

    def go(
        self,
        minutes: float | None,
        steps: int | None,
        until: float | None,
        progress: Progress | None,
    ) -> None:
        """Train until a limit is reached."""
        done = self._counters

        def fraction(of: Counters | Check) -> float:
            return max(of.steps / steps if steps else 0.0, of.minutes / minutes if minutes else 0.0)

        def enough() -> bool:
            return until is not None and done.best is not None and done.best.score >= until

        rate = self._model.learning_rate
        falls = done.settings["algorithm"] == "ppo"
        self._model.lr_schedule = lambda _: rate * max(1 - fraction(done), 0.05) if falls else rate
        before, saved, pause = done.minutes, time.monotonic(), SAVE_SECONDS
        while fraction(done) < 1 and not enough():
            self._model.learn(ROLLOUT * done.settings["envs"], reset_num_timesteps=False)
            done.steps, done.updates = self._model.num_timesteps, self._model._n_updates
            done.minutes = before + (time.monotonic() - self._began) / 60
            last = fraction(done.checks[-1]) if done.checks else 0.0
            checked = fraction(done) - last >= 1 / CHECKS or fraction(done) >= 1
            if checked:
                self._check(until)
            if progress:
                progress(self._status(min(fraction(done), 1.0), checked))
            now = time.monotonic()
            if now - saved > pause or fraction(done) >= 1 or enough():
                save(self._out / "training", self._model, self._worlds, done)
                saved = time.monotonic()
                pause = max(SAVE_SECONDS, 20 * (saved - now))

    def _status(self, fraction: float, checked: bool) -> Status:
        recent = [episode["r"] for episode in self._model.ep_info_buffer]
        best = self._counters.best
        return Status(
            fraction=fraction,
            steps=self._counters.steps,
            mean_return=float(np.mean(recent)) if recent else None,
            best=best.score if best else None,
            checked=checked,
        )

    def _check(self, until: float | None) -> None:
        """Try the policy without chance, and write it where it is the best so far."""
        done, actor = self._counters, _actor(self._model, self._worlds)
        expert = ActorExpert(self._spec, actor)
        played = [one_episode(self._try_out, expert, CHECK_SEED + k) for k in range(CHECK_EPISODES)]
        check = _summary(played, self._spec, done)
        if until is not None and check.score >= until:  # more episodes before it stops
            more = range(CHECK_EPISODES, 3 * CHECK_EPISODES)
            played += [one_episode(self._try_out, expert, CHECK_SEED + k) for k in more]
            check = _summary(played, self._spec, done)
        done.checks.append(check)
        if done.best is check:
            learned.save(self._out, _description(self._spec, done), actor)


class TrainingEnv(gym.Env):
    """A task as vectors, every episode of it at a training seed of its own choice."""

    def __init__(self, spec: TaskSpec, entropy: list[int]) -> None:
        self._task, self._env, self._interface = spec.id, registry.make(spec.id), Interface(spec)
        self._seeds = np.random.default_rng(entropy)
        size, outputs = self._interface.size, self._interface.outputs
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (size,), np.float32)
        self.action_space = (
            gym.spaces.Discrete(outputs)
            if self._interface.discrete
            else gym.spaces.Box(-1.0, 1.0, (outputs,), np.float32)
        )

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict]:
        """Start an episode; the seed given is not used."""
        observation, info = self._env.reset(seed=int(self._seeds.integers(CHECK_SEED)))
        return self._interface.vector(observation), info

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Act; refuses what no scale or weight would survive."""
        acted = self._interface.action(action)
        observation, reward, terminated, truncated, info = self._env.step(acted)
        vector = self._interface.vector(observation)
        if not (np.isfinite(vector).all() and np.isfinite(reward)):
            raise RuntimeError(f"{self._task!r} returned a number that is not finite.")
        return vector, float(reward), bool(terminated), bool(truncated), info

    def close(self) -> None:
        """Close the task's environment."""
        self._env.close()


def _worlds(spec: TaskSpec, counters: Counters) -> Any:
    from stable_baselines3.common.vec_env import DummyVecEnv, VecMonitor, VecNormalize

    settings = counters.settings
    entropies = [[settings["seed"], i, counters.steps] for i in range(settings["envs"])]
    plain = DummyVecEnv([lambda e=e: TrainingEnv(spec, e) for e in entropies])
    ppo = settings["algorithm"] == "ppo"
    return VecNormalize(VecMonitor(plain), norm_reward=ppo, clip_obs=CLIP, gamma=PPO["gamma"])


def _model(worlds: Any, counters: Counters) -> Any:
    import stable_baselines3

    settings = counters.settings
    kind, options = {
        "ppo": (stable_baselines3.PPO, PPO),
        "sac": (stable_baselines3.SAC, SAC),
    }[settings["algorithm"]]
    seed = (settings["seed"] * 1_000_003 + counters.steps) % (1 << 31)
    return kind("MlpPolicy", worlds, seed=seed, device="cpu", **options)


def _actor(model: Any, worlds: Any) -> Actor:
    """Return the network that acts, apart from what it was learned with."""
    import torch

    policy, sac = model.policy, hasattr(model, "actor")
    body = policy.actor.latent_pi if sac else policy.mlp_extractor.policy_net
    head = policy.actor.mu if sac else policy.action_net
    linear = [*(m for m in body if isinstance(m, torch.nn.Linear)), head]
    scales = worlds.obs_rms
    tensors = {
        MEAN: scales.mean.astype(np.float64),
        STD: np.sqrt(scales.var + worlds.epsilon).astype(np.float64),
    }
    for k, layer in enumerate(linear):
        tensors[f"layers.{k}.weight"] = layer.weight.detach().numpy().copy()
        tensors[f"layers.{k}.bias"] = layer.bias.detach().numpy().copy()
    discrete = isinstance(model.action_space, gym.spaces.Discrete)
    return Actor(tensors, "relu" if sac else "tanh", discrete, squash=sac)


def _description(spec: TaskSpec, counters: Counters) -> dict[str, Any]:
    packages = {"stable-baselines3", "torch", "numpy", *registry.packages(spec.suite)}
    return {
        **counters.settings,
        "observation_space": space_to_json(spec.observation_space),
        "action_space": space_to_json(spec.action_space),
        "steps": counters.steps,
        "minutes": round(counters.minutes, 2),
        "checks": [asdict(check) for check in counters.checks],
        "versions": {name: version(name) for name in sorted(packages)},
    }


def _summary(played: list[Any], spec: TaskSpec, counters: Counters) -> Check:
    return Check(
        steps=counters.steps,
        minutes=counters.minutes,
        mean_return=float(np.mean([e.score for e in played])),
        success_rate=float(np.mean([bool(e.success) for e in played]))
        if spec.measure == "success"
        else None,
    )


def _choose(algorithm: str, interface: Interface, minutes: float | None) -> str:
    if algorithm == "sac" and interface.discrete:
        raise ValueError("expected continuous actions for sac; these are Discrete. Use ppo.")
    if algorithm != "auto":
        return algorithm
    return "sac" if (minutes or 0) >= LONG_MINUTES and not interface.discrete else "ppo"


def _check_settings(
    algorithm: str, minutes: float | None, steps: int | None, envs: int, seed: int
) -> None:
    if algorithm not in ALGORITHMS:
        raise ValueError(f"expected algorithm {', '.join(ALGORITHMS)}; got {algorithm!r}.")
    limits = {
        "minutes": (minutes, 0.0, 1e6),
        "steps": (steps, 1, 10**12),
        "envs": (envs, 1, 256),
        "seed": (seed, 0, (1 << 31) - 1),
    }
    for name, (value, low, high) in limits.items():
        if value is not None and not low <= value <= high:
            raise ValueError(f"expected {name} in [{low}, {high}]; got {value}.")


def _refuse_foreign(out: Path, resume: bool) -> None:
    """Raise ValueError where the folder already holds an expert that no training goes on from."""
    if resume and (out / learned.DESCRIPTION).exists() and not (out / "training").exists():
        raise ValueError(
            f"expected a new folder, or a training to go on with; {out} holds an expert whose "
            f"training is gone. Choose another --out, or --no-resume to replace it."
        )


def _catch_up(counters: Counters, out: Path) -> None:
    """Count trials that a killed run had made after it last put its state down.

    The best of them stands in the folder, and only a better one may replace it. An expert that
    another training left there counts for nothing.
    """
    path = out / learned.DESCRIPTION
    if not path.exists():
        return
    description = learned.load(out)[0]
    if {name: description.get(name) for name in counters.settings} != counters.settings:
        return
    try:
        told = [Check(**check) for check in description.get("checks", [])]
    except TypeError as error:
        raise ValueError(f"{path} is damaged ({error}). Start anew with --no-resume.") from error
    counters.checks = max(counters.checks, told, key=len)


def _require_library() -> None:
    try:
        import stable_baselines3  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"training an expert needs Stable-Baselines3, which does not import ({error}). "
            f'Install it: pip install "gato[experts]"'
        ) from error


@contextmanager
def _one_thread() -> Iterator[None]:
    """Let torch use one thread: these networks are too small to share."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
