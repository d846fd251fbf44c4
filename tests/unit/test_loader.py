"""Workers change nothing but the time: same batches, errors with their place, no process left."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import pytest

from gato.config import TrainConfig, to_json
from gato.corpora import open_corpus
from gato.envs.store import EpisodeStore, EpisodeWriter
from gato.fitting import make_serializer
from gato.loader import Loader
from gato.mixture import Mixture
from gato.tokenizers.stream import TokenBatch


def mixture(config: TrainConfig, **changes: object) -> Mixture:
    serializer = make_serializer(config)
    corpora = [open_corpus(c, serializer) for c in config.corpora]
    size = {"rows": config.rows, "row_length": config.model.context, "seed": config.seed}
    return Mixture(corpora, serializer, **{**size, **changes})


@pytest.fixture
def made(tiny: TrainConfig) -> Mixture:
    return mixture(tiny, parts=2)


def digest(batch: TokenBatch) -> bytes:
    """Return all bytes of a batch."""
    payload = {m: {k: v.tobytes() for k, v in r.items()} for m, r in batch.payload.items()}
    arrays = {k: getattr(v, "tobytes", lambda v=v: v)() for k, v in vars(batch).items()}
    return pickle.dumps({**arrays, "payload": payload})


def take(batches: Iterable[TokenBatch]) -> list[bytes]:
    return [digest(batch) for batch in batches]


def alive(pid: int) -> bool:
    """Return whether a process runs; one that has ended and was not waited for does not."""
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False


def eventually(condition: Callable[[], bool], seconds: float = 20.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


def test_parts_come_in_order(made):
    wanted = [digest(made.part(k, p)) for k in (3, 4) for p in (1, 0)]
    assert take(Loader(made, 3, (1, 0), stop=5)) == wanted
    assert next(Loader(made, 5, (0,), stop=5), None) is None
    with pytest.raises(ValueError, match="workers of 0 or more and parts; got -1"):
        Loader(made, workers=-1)


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_the_number_of_workers_changes_no_byte(made, workers):
    alone = take(Loader(made, 7, range(2), stop=12))
    with Loader(made, 7, range(2), workers, stop=12) as loader:
        batches = list(loader)
        processes = [w.process for w in loader._crew._workers]
    assert take(batches) == alone
    assert all(array.flags.writeable for array in (batches[0].inputs, batches[0].target_ids))
    assert len({p.pid for p in processes}) == workers
    assert not any(p.is_alive() for p in processes)


def test_a_killed_worker_is_named_and_started_again(made):
    alone, said = take(Loader(made, 0, range(2), stop=8)), []
    with Loader(made, 0, range(2), 1, stop=8, say=said.append) as loader:
        got = [digest(next(loader))]
        first = loader._crew._workers[0].process.pid
        os.kill(first, signal.SIGKILL)
        got += take(loader)
    assert got == alone
    (told,) = said
    assert told.startswith(f"data worker 0 (process {first}) ended, killed by SIGKILL, before")


def test_a_worker_that_dies_again_is_an_error(made):
    with Loader(made, 0, range(2), 1, say=lambda told: None) as loader:
        next(loader)

        def kill() -> None:
            os.kill(loader._crew._workers[0].process.pid, signal.SIGKILL)

        before = loader._crew._workers[0]
        kill()
        assert eventually(lambda: next(loader) and loader._crew._workers[0] is not before)
        kill()
        with pytest.raises(RuntimeError, match=r"data worker 0 .* SIGKILL, .* for the second time"):
            take(loader)
        with pytest.raises(ValueError, match="was closed"):
            next(loader)


def test_what_is_wrong_with_data_arrives_with_its_place(tiny, stores, tmp_path):
    with EpisodeWriter(tmp_path / "arm", EpisodeStore(stores / "arm").spec) as writer:
        writer.append(EpisodeStore(stores / "arm").episode(0))
    corpora = (replace(tiny.corpora[0], path=str(tmp_path / "arm")), *tiny.corpora[1:])
    made = mixture(replace(tiny, corpora=corpora))
    column = next(tmp_path.glob("arm/shard-*/observations.*.npy"))
    column.write_bytes(column.read_bytes()[:-64])  # meanwhile a disk has failed
    made.corpora[0].kept = type(made.corpora[0].kept)()
    told = []
    for workers in (0, 1):
        with (
            Loader(made, workers=workers, stop=50) as loader,
            pytest.raises(ValueError, match="bytes too early") as caught,
        ):
            list(loader)
        told.append(str(caught.value))
    assert told[0] == told[1]
    assert told[0].startswith(f"corpus 'arm', episode 0 of {tmp_path / 'arm'}: expected an array")
    assert f"in {column}" in told[0]
    assert "Its sha256 was " in told[0]


TRAINER = """
import json, signal, sys
from pathlib import Path
from gato.config import TrainConfig, from_json
from gato.loader import Loader
from gato.corpora import open_corpus
from gato.fitting import make_serializer
from gato.mixture import Mixture

if __name__ == "__main__":
    config = from_json(TrainConfig, json.loads(Path(sys.argv[1]).read_text()))
    signal.signal(signal.SIGTERM, lambda *_: print("asked to stop", flush=True))
    serializer = make_serializer(config)
    corpora = [open_corpus(c, serializer) for c in config.corpora]
    loader = Loader(Mixture(corpora, serializer, rows=4, row_length=96), workers=2)
    next(loader)
    print(*(w.process.pid for w in loader._crew._workers), flush=True)
    for line in sys.stdin:
        print("ok" if next(loader) else "", flush=True)
"""


@pytest.fixture
def trainer(tiny: TrainConfig, tmp_path: Path) -> subprocess.Popen:
    """Start a process that loads with two workers and gives a batch per line that it reads."""
    (tmp_path / "config.json").write_text(json.dumps(to_json(tiny)))
    script = tmp_path / "trainer.py"
    script.write_text(TRAINER)
    return subprocess.Popen(
        [sys.executable, str(script), str(tmp_path / "config.json")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def test_workers_end_with_their_parent_however_it_ends(trainer):
    workers = [int(pid) for pid in trainer.stdout.readline().split()]
    assert all(map(alive, workers))
    trainer.kill()
    assert eventually(lambda: not any(map(alive, workers)))
    assert trainer.communicate()[1] == ""


def test_a_signal_to_all_processes_is_the_trainer_s_to_answer(trainer):
    workers = [int(pid) for pid in trainer.stdout.readline().split()]
    os.killpg(trainer.pid, signal.SIGTERM)
    os.killpg(trainer.pid, signal.SIGTERM)
    out, told = trainer.communicate("\n\n\n", timeout=30)
    assert out.split("asked to stop\n")[-1].split() == ["ok"] * 3
    assert told == ""  # nothing was started again, and the interpreter ended without a word
    assert trainer.returncode == 0
    assert not any(map(alive, workers))
