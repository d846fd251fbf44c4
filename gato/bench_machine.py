"""What a bench ran on: the machine, the versions, and how fast the machine is at its best.

`peak` and `bandwidth` are measured where they are first asked for, in well under a second, and are
the best of many shots: what the machine can do, not what other processes leave of it (on a CPU, by
the CPU time of one thread, times the threads). A floor is worked out from them: operations over
peak, bytes over bandwidth.
"""

from __future__ import annotations

import functools
import os
import platform
import subprocess
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from gato.bench_common import seconds
from gato.flops import measured, shortest, thread_seconds

PACKAGES = ("gato", "torch", "numpy", "gymnasium")
OPTIONAL = ("triton", "flash-attn", "nvidia-cudnn-cu13", "nvidia-cudnn-cu12")
FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_tile", "asimd", "sve")
"""Instructions that decide how fast matrix products are."""
BUSY = 0.5
"""Processes that want to run, per core, from which on a machine is called busy."""
MOMENT = 1.0
"""Seconds that are too few to say what others do."""


def device() -> torch.device:
    """Return where benches of a model run."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def machine() -> dict[str, Any]:
    """Return what results depend on; `load` is that of the last minute."""
    info = _cpu_info()
    flags = set((info.get("flags") or info.get("Features") or "").split())
    found: dict[str, Any] = {
        "cpu": info.get("model name") or platform.processor() or platform.machine(),
        "family": " ".join(info[k] for k in ("cpu family", "model", "stepping") if k in info),
        "cores": os.cpu_count(),
        "allowed_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "threads": torch.get_num_threads(),
        "flags": [flag for flag in FLAGS if flag in flags],
        "memory_gb": round(_memory() / 2**30, 1),
        "gpu": None,
        "driver": None,
        "system": f"{platform.system()} {platform.release()}",
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }
    if torch.cuda.is_available():
        facts = torch.cuda.get_device_properties(0)
        found |= {
            "gpu": facts.name,
            "gpu_memory_gb": round(facts.total_memory / 2**30, 1),
            "capability": f"{facts.major}.{facts.minor}",
            "driver": _driver(),
        }
    return found


def in_words(machine: dict[str, Any]) -> str:
    """Return one line that is equal for equal machines, however busy."""
    plural = "" if machine["threads"] == 1 else "s"
    threads = f"{machine['cores']} cores, {machine['threads']} thread{plural}"
    family = f" ({machine['family']})" if machine["family"] else ""
    gpu = f", {machine['gpu']}" if machine["gpu"] else ""
    flags = f", {' '.join(machine['flags'])}" if machine["flags"] else ""
    return f"{machine['cpu']}{family}, {threads}{flags}, {machine['memory_gb']:.0f} GB{gpu}"


def warning(machine: dict[str, Any]) -> str | None:
    """Return what spoils a measurement here, if anything does."""
    load, cores = machine["load"], machine["allowed_cores"] or machine["cores"] or 1
    if load is None or load < BUSY * cores:
        return None
    return (
        f"the machine is busy (load {load:g} on {cores} cores): figures beside a baseline hold, "
        f"the others are low"
    )


def worked() -> tuple[float, float, float] | None:
    """Return the time, and the CPU seconds of everybody and of this process and its children.

    None where the system does not say (others than Linux).
    """
    try:
        counts = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
        user, nice, system, _, _, irq, softirq, steal = map(int, counts)
        tick = os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, AttributeError):
        return None
    everybody = (user + nice + system + irq + softirq + steal) / tick
    return time.perf_counter(), everybody, sum(os.times()[:4])


def load_of_others(since: tuple[float, float, float] | None) -> float | None:
    """Return how many cores others have kept busy since what `worked` returned.

    None where that is unknown or was a moment ago: the system counts in hundredths of a second.
    """
    now = worked()
    if since is None or now is None or now[0] - since[0] < MOMENT:
        return None
    seconds, everybody, own = (b - a for a, b in zip(since, now, strict=True))
    return max(0.0, round((everybody - own) / seconds, 2))


def versions() -> dict[str, str | None]:
    """Return what computed, package by package, and what it was told by the environment."""
    found: dict[str, str | None] = {"python": platform.python_version(), "commit": commit()}
    found |= {name: _version(name) or "not installed" for name in PACKAGES}
    found |= {name: v for name in OPTIONAL if (v := _version(name))}
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    told = ("OMP_WAIT_POLICY", "OMP_NUM_THREADS")
    return found | {name: os.environ.get(name) for name in told}


def commit(folder: Path = Path(__file__).parent) -> str | None:
    """Return the git commit that `folder` is at, with "+" where files differ from it."""
    try:
        head = _said("git", "-C", str(folder), "rev-parse", "--short=12", "HEAD")
        changed = _said("git", "-C", str(folder), "status", "--porcelain", "-uno")
    except (OSError, subprocess.SubprocessError):
        return None
    return head + ("+" if changed else "")


# ---- at its best -----------------------------------------------------------------------------


def peak(device: torch.device, dtype: torch.dtype) -> float:
    """Return the FLOP/s of the fastest matrix product of a few sizes."""
    if device.type == "cuda":
        return _products(device, dtype)
    return measured(dtype, torch.get_num_threads())


@functools.cache
def _products(device: torch.device, dtype: torch.dtype) -> float:
    best = 0.0
    for n in (4096, 8192):
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        out = torch.empty(n, n, device=device, dtype=dtype)
        best = max(best, 2 * n**3 * _rate(functools.partial(torch.mm, a, b, out=out), device))
    return best


def bandwidth(device: torch.device, working_set: float) -> float:
    """Return the bytes/s at which so many bytes are read again and again.

    On a CPU, what fits in a cache is read several times as fast as memory, and threads that read
    memory share it (so that this is more than it can do); on a GPU, this is a copy's, of memory
    that no cache holds.
    """
    if device.type == "cuda":
        return _copied(device)
    return _read(1 << max(16, min(28, round(working_set).bit_length() - 1)))


def floor_seconds(
    device: torch.device,
    dtype: torch.dtype,
    operations: float,
    moved: float,
    working_set: float | None = None,
) -> float:
    """Return the least seconds for so many operations and so many bytes read or written."""
    rate = bandwidth(device, moved if working_set is None else working_set)
    return max(operations / peak(device, dtype), moved / rate)


def peaks(device: torch.device) -> dict[str, float]:
    """Return what the floors are worked out from, measured now, in GFLOP/s and GB/s."""
    dtypes = (torch.float32, torch.bfloat16)
    products = {f"{device.type} {str(d)[6:]} GFLOP/s": peak(device, d) / 1e9 for d in dtypes}
    return products | {f"{device.type} memory GB/s": bandwidth(device, 1 << 28) / 1e9}


@functools.cache
def _read(size: int) -> float:
    numbers = torch.ones(size // 4)
    times = max(1, (1 << 22) // size)  # so that a call's own time is small

    def work() -> None:
        for _ in range(times):
            numbers.sum()

    return times * size * _rate(work, torch.device("cpu"))


@functools.cache
def _copied(device: torch.device) -> float:
    size = 1 << 30
    source = torch.randint(0, 255, (size,), device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    return 2 * size * _rate(lambda: target.copy_(source), device)


def _rate(work: Callable[[], Any], device: torch.device) -> float:
    """Return calls per second of the quickest of many, all threads working."""
    if device.type == "cuda":
        return 1 / shortest(lambda: seconds(work, device))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return threads / shortest(lambda: thread_seconds(work))
    finally:
        torch.set_num_threads(threads)


# ---- what the system says ---------------------------------------------------------------------


def _cpu_info() -> dict[str, str]:
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def _memory() -> float:
    try:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, ValueError, OSError):
        return 0.0


def _driver() -> str | None:
    try:
        return _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0")
    except (OSError, subprocess.SubprocessError):
        return None


def _said(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
