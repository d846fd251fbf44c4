"""Worker processes answer in order, and how they end is told."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gato.envs import workers
from gato.envs.workers import Pool, WorkerDiedError, last_words


def handler(tick: Callable[[], None]) -> Callable[[Any], Any]:
    """Return what does as it is told, and tells which process did."""

    def handle(message: Any) -> Any:
        match message:
            case ("raise", text):
                raise OSError(2, text)
            case ("odd",):
                raise Odd(1, 2)
            case ("tick", n, pause):
                for _ in range(n):
                    time.sleep(pause)
                    tick()
                os._exit(3)
            case ("sleep", seconds):
                time.sleep(seconds)
            case ("print", text):
                print(text, flush=True)
        return message, os.getpid()

    return handle


class Odd(Exception):
    """An exception that does not come back from a pickle."""

    def __init__(self, a: int, b: int) -> None:
        super().__init__(f"{a} {b}")


@pytest.fixture(autouse=True)
def _workers_find_this_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[3])


@pytest.fixture
def pool() -> Iterator[Pool]:
    made = Pool(2, handler, timeout=1.5)
    yield made
    made.close()


def test_answers_come_in_order(pool: Pool) -> None:
    for i in range(6):
        pool.send(i % 2, i)
    got: dict[int, list] = {0: [], 1: []}
    while sum(map(len, got.values())) < 6:
        for worker, (message, process) in pool.receive():
            got[worker].append((message, process))
    assert [message for message, _ in got[0]] == [0, 2, 4]
    assert len({process for some in got.values() for _, process in some}) == 2


def test_without_workers_this_process_answers() -> None:
    alone = Pool(0, handler)
    alone.send(0, "a")
    alone.send(0, "b")
    assert [alone.receive(), alone.receive()] == [[(0, (m, os.getpid()))] for m in "ab"]
    alone.close()


def test_what_a_handler_raises_is_raised_here(pool: Pool) -> None:
    pool.send(0, ("raise", "lost"))
    with pytest.raises(OSError, match="lost") as caught:
        pool.receive()
    assert "Traceback" in caught.value.__notes__[0]
    pool.send(1, ("odd",))
    with pytest.raises(RuntimeError, match="Odd: 1 2") as caught:
        pool.receive()
    assert "raise Odd(1, 2)" in caught.value.__notes__[0]


def test_how_far_a_dead_worker_came_is_known(pool: Pool) -> None:
    pool.send(0, ("tick", 4, 0.0))
    ((worker, death),) = pool.receive()
    assert isinstance(death, WorkerDiedError)
    assert (worker, death.ticks, str(death)) == (0, 4, "worker process ended, exit code 3")
    pool.send(0, "again")
    assert pool.receive()[0][1][0] == "again"


def test_a_worker_that_is_killed_while_idle_is_replaced(pool: Pool) -> None:
    pool.send(0, "a")
    ((_, (_, process)),) = pool.receive()
    os.kill(process, signal.SIGKILL)
    pool.send(0, "b")
    ((_, death),) = pool.receive()
    assert "exit code -9" in str(death)
    pool.send(0, "c")
    assert pool.receive()[0][1][1] != process


def test_only_a_worker_that_does_nothing_is_hung(pool: Pool) -> None:
    """Longer work that ticks is waited for; ticks are 30 times as frequent as need be."""
    begun = time.monotonic()
    pool.send(0, ("tick", 40, 0.05))
    ((_, slow),) = pool.receive()
    assert time.monotonic() - begun > 40 * 0.05
    assert slow.ticks == 40
    pool.send(1, ("sleep", 3600))
    ((worker, hung),) = pool.receive()
    assert (worker, "nothing came of it in 1.5 s" in str(hung)) == (1, True)


def slow_to_start(tick: Callable[[], None]) -> Callable[[Any], Any]:
    """Return what answers, after longer than a message may take."""
    time.sleep(1.5)
    return lambda message: message


def test_a_worker_may_take_its_time_to_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process imports for seconds where others are busy; that is not a simulator that hangs."""
    slow = Pool(1, slow_to_start, timeout=1.0)
    slow.send(0, "a")
    assert slow.receive() == [(0, "a")]
    slow.close()
    monkeypatch.setattr(workers, "START_SECONDS", 1.2)
    slow.send(0, "a")
    ((_, death),) = slow.receive()
    assert str(death) == "worker process was ended: it had not started in 1.2 s"
    slow.close()


def fails(tick: Callable[[], None]) -> Callable[[str], str]:
    """Return what ends its process at the name of a file that is not there, having made it."""

    def handle(message: str) -> str:
        if message.startswith("/") and not Path(message).exists():
            Path(message).touch()
            os._exit(5)
        if message == "end":
            os._exit(6)
        return message.upper()

    return handle


@pytest.mark.parametrize("count", [1, 2])
def test_jobs_are_dealt_once_each_and_again_after_a_death(tmp_path: Path, count: int) -> None:
    once = str(tmp_path / "once")
    jobs = ["a", once, "b", "end", "c"]
    done = {job: answer for job, answer, _ in workers.deal(Pool(count, fails), jobs, tries=2)}
    assert str(done.pop("end")) == "worker process ended, exit code 6"
    assert done == {job: job.upper() for job in jobs if job != "end"}
    (tmp_path / "once").unlink()
    told = [(job, type(answer)) for job, answer, _ in workers.deal(Pool(count, fails), [once, "a"])]
    assert sorted(told, key=str) == sorted([(once, WorkerDiedError), ("a", str)], key=str)
    here = workers.deal(Pool(0, fails), ["a", "b"])
    assert [(job, answer, seconds < 60) for job, answer, seconds in here] == [
        ("a", "A", True),
        ("b", "B", True),
    ]


@pytest.mark.parametrize("timeout", [0.0, -1.0, float("nan")])
def test_a_timeout_is_some_time(timeout: float) -> None:
    with pytest.raises(ValueError, match="more than 0 seconds"):
        Pool(2, handler, timeout=timeout)


def test_work_at_import_is_explained(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from gato.envs.workers import Pool\n"
        "pool = Pool(2, print)\n"
        "pool.send(0, 'hello')\n"
        "pool.receive()\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert done.returncode == 1
    assert "`if __name__ == '__main__':`. Try workers=0." in done.stderr.splitlines()[-1]


def test_no_worker_outlives_its_parent(tmp_path: Path) -> None:
    """The parent is killed; its worker, which sleeps, ends too."""
    script = tmp_path / "script.py"
    script.write_text(
        "import os, signal, sys\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from gato.envs.workers import Pool\n"
        "from test_workers import handler\n"
        "if __name__ == '__main__':\n"
        "    pool = Pool(2, handler)\n"
        "    pool.send(0, 'who')\n"
        "    print(pool.receive()[0][1][1], flush=True)\n"
        "    pool.send(0, ('sleep', 3600))\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    command = [sys.executable, str(script)]
    # returns when nobody holds its output any more
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == -signal.SIGKILL
    assert int(done.stdout) > 0


@pytest.mark.parametrize("count", [0, 1])
def test_what_workers_print_is_kept_from_the_results(
    count: int, capfd: pytest.CaptureFixture[str]
) -> None:
    pool = Pool(count, handler)
    pool.send(0, ("print", "hello from a world"))
    pool.receive()
    pool.close()
    said = capfd.readouterr()
    assert said.out == ""
    assert "hello from a world" in said.err


def test_the_last_words_are_the_first_line_of_the_message() -> None:
    try:
        raise RuntimeError("boom\nin two lines")
    except RuntimeError:
        assert last_words(traceback.format_exc()) == "RuntimeError: boom"
    assert last_words("the process ended") == "the process ended"
