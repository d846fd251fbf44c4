"""`gato` with the toy suite, whose world is slow or ends its process as ``$TOY`` says.

    collect_toy.py collect ...            the command
    collect_toy.py kill N collect ...     the command, killed N times at random instants, then whole

Worker processes run this file again before they start, so the suite is there too.
"""

from __future__ import annotations

import importlib.util
import json
import os
import random
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from gato import cli, world_commands
from gato.envs import collect, registry

_SPEC = importlib.util.spec_from_file_location("toy", Path(__file__).with_name("toy.py"))
toy = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(toy)
SETTINGS = json.loads(os.environ["TOY"])


class Walk(toy.Walk):
    """Walks as told."""

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict]:
        self.seed_ = seed
        return super().reset(seed=seed)

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        time.sleep(SETTINGS.get("slow", 0.0))
        marker = SETTINGS.get("once")
        if self.seed_ == SETTINGS.get("dies_at") and not (marker and Path(marker).exists()):
            if marker:
                Path(marker).touch()
            time.sleep(SETTINGS.get("hangs", 0))
            os._exit(7)
        return super().step(action)


def register() -> None:
    """Register the suite and let every attempt be written at once.

    What a killed process has written, the system keeps: only a power cut needs the wait for disks.
    """
    suite = toy.suite()
    suite.make = lambda spec: Walk()
    specs = [toy.SPEC, replace(toy.SPEC, id="toy/crawl-v0", instruction="crawl to the middle")]
    suite.specs = lambda: {spec.id: spec for spec in specs}
    sys.modules["gato.envs.toy"] = suite
    registry.SUITES = ("toy",)
    collect.FLUSH_SECONDS = 0.0
    os.fsync = lambda descriptor: None


def kill(times: int, command: list[str]) -> int:
    """Kill the command at random instants, then let it end; print how often it was cut short."""
    instants, killed = random.Random(0), 0
    for _ in range(times):
        child = os.fork()
        if not child:
            os.setsid()
            os._exit(cli.main(command))
        time.sleep(instants.uniform(0.0, 0.1))
        os.killpg(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        killed += os.WIFSIGNALED(status)
    child = os.fork()
    if not child:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os._exit(cli.main(command))
    _, status = os.waitpid(child, 0)
    print(json.dumps({"killed": killed}))
    return os.waitstatus_to_exitcode(status)


register()
if __name__ == "__main__":
    assert world_commands  # imported before any fork
    if sys.argv[1] == "kill":
        sys.exit(kill(int(sys.argv[2]), sys.argv[3:]))
    sys.exit(cli.main(sys.argv[1:]))
