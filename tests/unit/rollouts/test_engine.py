"""Requests that share an engine: who waits, who leaves, what is shown, and what one gets wrong."""

from __future__ import annotations

import itertools
from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import rollout_world as world
import torch
from model_asked import drain, text

from gato.rollouts import engine
from gato.rollouts import sampling as drawing
from gato.rollouts.batching import CHUNK, Memory
from gato.rollouts.engine import READ, Engine, Sampling
from gato.rollouts.generate import stream
from gato.rollouts.sampling import choose
from gato.rollouts.spelling import Spelling, text_of
from gato.tokenizers.serializer import History
from gato.tokenizers.stream import TokenSequence


@pytest.fixture(scope="module")
def parts() -> tuple[Any, Any]:
    serializer = world.make_serializer(History())
    return world.make_model(serializer), serializer


class Watched(Engine):
    """Keeps the ids of every ticket."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.ids: dict[int, list[int]] = {}

    def _choose(self, given: torch.Tensor, rows: np.ndarray) -> np.ndarray:
        ids = super()._choose(given, rows)
        for row, token in zip(rows.tolist(), ids.tolist(), strict=True):
            self.ids.setdefault(self._running[row].ticket, []).append(token)
        return ids


def prefix_of(serializer: Any, words: str) -> TokenSequence:
    document = serializer.document(words)
    return document.slice(0, len(document) - 1)


@pytest.mark.parametrize("sampling", [Sampling(40), Sampling(40, 1.0, 0.9, 7)])
def test_neighbours_change_nothing(parts: Any, sampling: Sampling) -> None:
    model, serializer = parts
    prefix = prefix_of(serializer, "go to the red ball")
    lone = Watched(model, serializer, rows=1)
    lone.submit(prefix, sampling)
    alone = text(drain(lone)[0])
    assert alone == "".join(
        stream(
            model,
            serializer,
            prefix,
            max_tokens=40,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=sampling.seed,
        )
    )
    rng = np.random.default_rng(0)
    crowd = Watched(model, serializer, rows=32)
    said, mine, joined = "", -1, 0
    for step in itertools.count():
        while joined < 31 and rng.random() < 0.6:
            words = " ".join(rng.choice(world.WORDS, int(rng.integers(1, 40))))
            crowd.submit(prefix_of(serializer, words), Sampling(int(rng.integers(1, 30)), 1.3))
            joined += 1
        if step == 6:
            mine = crowd.submit(prefix, sampling)
        said += "".join(d.text for ticket, d in crowd.step() if ticket == mine)
        if step > 6 and not (crowd.running or crowd.waiting):
            break
    assert joined == 31
    assert crowd.ids[mine] == lone.ids[0]
    assert said == alone


def test_a_free_row_is_taken_at_the_next_step_and_memory_stays(parts: Any) -> None:
    model, serializer = parts
    made = Engine(model, serializer, rows=3)
    rng = np.random.default_rng(1)
    made.submit(prefix_of(serializer, "push a green key " * 12), Sampling(2))
    drain(made)  # after a chunk of the longest kind the ring is as large as it gets
    store = made.memory.cache.store
    for _ in range(60):
        words = " ".join(rng.choice(world.WORDS, int(rng.integers(1, 60))))
        made.submit(prefix_of(serializer, words), Sampling(int(rng.integers(1, 9)), 2.0))
    done = 0
    while made.running or made.waiting:
        waited, ran = made.waiting, made.running
        deltas = made.step()
        ended = sum(d.finish is not None for _, d in deltas)
        admitted = waited - made.waiting
        assert admitted == min(waited, 3 - ran)
        assert made.running == ran + admitted - ended
        done += ended
    assert done == 60
    assert made.memory.cache.store is store
    assert (made.memory.lengths == 0).all()


def test_long_prefixes_are_read_beside_what_is_written(parts: Any) -> None:
    _, serializer = parts
    model = world.make_model(serializer, context=4096)
    made = Engine(model, serializer, rows=8)
    short = made.submit(prefix_of(serializer, "go"), Sampling(200, 1.0, seed=1))
    made.step()
    for _ in range(6):
        made.submit(prefix_of(serializer, "open the blue door " * 200), Sampling(3))
    reads: list[np.ndarray] = []
    read = made.memory.read

    def watched(chunk: Any, **options: Any) -> Any:
        reads.append(chunk.lengths.copy())
        return read(chunk, **options)

    made.memory.read = watched  # type: ignore[method-assign]
    written = 0
    for _ in range(8):
        written += sum(d.tokens for ticket, d in made.step() if ticket == short)
    assert max(int(r.sum()) for r in reads) == READ + 1
    assert max(int(r.max()) for r in reads) == CHUNK
    assert written >= 6, "some ids end in the midst of a character"
    first = np.argsort([r.ticket for r in made._running])
    got = sum(reads)[first[1:]]
    assert got.tolist() == [512] * 4 + [0] * 2, "who came first is read first"


def test_cancelled_requests_are_gone_at_once(parts: Any) -> None:
    model, serializer = parts
    given = [prefix_of(serializer, w) for w in ("go", "open the door", "push", "pick up")]
    alone = []
    for prefix in given:
        made = Engine(model, serializer, rows=1)
        made.submit(prefix, Sampling(20))
        alone.append(text(drain(made)[0]))
    made = Engine(model, serializer, rows=2)
    tickets = [made.submit(prefix, Sampling(20)) for prefix in given]
    seen: dict[int, str] = dict.fromkeys(tickets, "")
    for _ in range(5):
        for ticket, delta in made.step():
            seen[ticket] += delta.text
    made.cancel(tickets[0])
    made.cancel(tickets[2])
    made.cancel(99)
    assert (made.running, made.waiting) == (1, 1)
    for ticket, deltas in drain(made).items():
        assert ticket in (tickets[1], tickets[3])
        seen[ticket] += text(deltas)
    assert [seen[tickets[1]], seen[tickets[3]]] == [alone[1], alone[3]]
    assert alone[0].startswith(seen[tickets[0]])
    assert seen[tickets[2]] == ""
    made.cancel(tickets[1])


def script(monkeypatch: pytest.MonkeyPatch, ids: list[int]) -> None:
    """Let these ids be chosen, whatever the model says."""
    given = iter(ids)
    monkeypatch.setattr(engine, "choose", lambda *args: np.array([next(given)]))


def test_why_a_text_ended(parts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, serializer = parts
    words, eos = serializer.text("go to the red ball").ids.tolist(), serializer.control["<eos>"]
    for sampling, count, said, why in (
        (Sampling(99), len(words), "go to the red ball", "stop"),
        (Sampling(3), 3, text_of(serializer, words[:3]), "length"),
        (Sampling(len(words)), len(words), "go to the red ball", "length"),
        (Sampling(99, stop=("red", "ball")), None, "go to the ", "stop"),
        (Sampling(99, stop=("ball!", "ballad")), len(words), "go to the red ball", "stop"),
    ):
        made = Engine(model, serializer)
        made.submit(prefix_of(serializer, "a"), sampling)
        script(monkeypatch, [*words, eos])
        (deltas,) = drain(made).values()
        assert text(deltas) == said
        assert [d.finish for d in deltas] == [None] * (len(deltas) - 1) + [why]
        if count is not None:
            assert sum(d.tokens for d in deltas) == count


def test_nothing_of_a_stop_string_is_shown_or_told(
    parts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, serializer = parts
    wanted = "go \u20acST\u20acSTO\u20acSTOP\u20ac up"
    ids = serializer.text(wanted).ids.tolist()
    text_modality = serializer.modalities["text"]
    assert any(len(text_modality.bytes_of(i)) == 1 for i in ids), "some characters are bytes"
    made = Engine(model, serializer)
    made.submit(prefix_of(serializer, "a"), Sampling(99, stop=("STOP\u20ac",), top_logprobs=1))
    script(monkeypatch, ids)
    (deltas,) = drain(made).values()
    said, whole = "", "go \u20acST\u20acSTO\u20ac"
    told = b""
    for delta in deltas:
        said += delta.text
        told += b"".join(t.bytes for t in delta.logprobs)
        assert whole.startswith(said)
        assert whole.encode().startswith(told)
        assert said.encode().startswith(told), "logprobs are told of what is shown"
    assert said == whole
    assert told == whole.encode()


@pytest.mark.parametrize(
    ("stop", "said", "told"),
    [
        ("ed ba", "go to the r", "go to the red"),
        ("ll", "go to the red ba", "go to the red ball"),
        ("go", "", ""),
        ("to", "go ", "go to"),
        (" to", "go", "go"),
    ],
)
def test_ids_are_told_of_all_that_is_shown(parts: Any, monkeypatch, stop, said, told) -> None:
    model, serializer = parts
    made = Engine(model, serializer)
    made.submit(prefix_of(serializer, "a"), Sampling(99, stop=(stop,), top_logprobs=0))
    script(monkeypatch, serializer.text("go to the red ball").ids.tolist())
    (deltas,) = drain(made).values()
    assert text(deltas) == said
    assert b"".join(t.bytes for d in deltas for t in d.logprobs) == told.encode()


def test_spelling_equals_character_by_character(parts: Any) -> None:
    serializer = parts[1]
    modality, offset = serializer.modalities["text"], serializer.offset["text"]
    single = {modality.bytes_of(i): i + offset for i in range(modality.vocabulary)}
    rng = np.random.default_rng(3)
    stopped = 0
    for _ in range(400):
        wanted = "".join(rng.choice(list("aab \u00e9\u20ac\U0001f600"), int(rng.integers(1, 14))))
        starts, sizes = rng.integers(0, len(wanted), 3), rng.integers(1, 5, 3)
        stop = {wanted[a : a + n] for a, n in zip(starts, sizes, strict=True)} | {"ab\u20acb", "zz"}
        stop = tuple(rng.permutation(sorted(stop))[: int(rng.integers(1, 4))].tolist())
        slow = ""
        for character in wanted:
            slow += character
            if ended := [s for s in stop if slow.endswith(s)]:
                slow = slow[: -len(max(ended, key=len))]
                break
        if rng.random() < 0.5:
            ids = serializer.text(wanted).ids.tolist()
        else:
            ids = [single[bytes([b])] for b in wanted.encode()]
        spelling, fast = Spelling(serializer, stop), ""
        for token in ids:
            fast += spelling.push(token)
            assert slow.startswith(fast)
            assert spelling.shown == len(fast)
            if spelling.stopped:
                break
        assert fast + spelling.rest() == slow
        stopped += spelling.stopped
    assert stopped > 200


def test_any_bytes_are_spelled_as_the_text_model_does(parts: Any) -> None:
    serializer = parts[1]
    modality, offset = serializer.modalities["text"], serializer.offset["text"]
    rng = np.random.default_rng(4)
    for _ in range(300):
        ids = rng.integers(0, modality.vocabulary, int(rng.integers(1, 12)))
        ids = np.append(ids, modality.text_ids("x")[-1])  # ends what is unfinished
        assert text_of(serializer, (ids + offset).tolist()) == modality.decode(ids, {})


def broken(serializer: Any) -> TokenSequence:
    """Return a prefix whose image has too few pixels for the model."""
    prefix = serializer.caption(np.zeros((16, 16, 3), np.uint8), None)
    rows = prefix.payload["image"]
    name = next(k for k, v in rows.items() if v.ndim > 1)
    prefix.payload = {"image": {**rows, name: rows[name][:, :1]}}
    return prefix


def test_what_cannot_be_read_fails_alone(parts: Any) -> None:
    model, serializer = parts
    made = Engine(model, serializer, rows=4)
    given = [prefix_of(serializer, w) for w in ("go", "open the door")]
    tickets = [made.submit(prefix, Sampling(15)) for prefix in given]
    first = [d for _ in range(4) for ticket, d in made.step() if ticket == tickets[0]]
    bad = [made.submit(broken(serializer), Sampling(15)) for _ in range(2)]
    last = made.submit(given[0], Sampling(15))
    deltas = drain(made)
    for ticket in bad:
        ((error,),) = [deltas[ticket]]
        assert (error.finish, error.text, error.tokens) == ("error", "", 0)
        assert isinstance(error.error, Exception)
    alone = "".join(stream(model, serializer, given[0], max_tokens=15))
    assert text(first) + text(deltas[tickets[0]]) == alone
    assert text(deltas[last]) == alone


def test_prefixes_that_no_model_reads_are_refused(parts: Any) -> None:
    model, serializer = parts
    made = Engine(model, serializer)
    good = prefix_of(serializer, "go")
    with pytest.raises(ValueError, match="at least one token"):
        made.submit(good.slice(0, 0), Sampling())
    high = good.slice(0, 2)
    high.ids = np.array([3, model.vocabulary_size], np.int32)
    with pytest.raises(ValueError, match="ids of a prefix are below"):
        made.submit(high, Sampling())
    odd = good.slice(0, 2)
    odd.payload = {"sound": {"at": np.zeros(1, np.int64)}}
    with pytest.raises(ValueError, match="no net for payload 'sound'"):
        made.submit(odd, Sampling())
    assert made.waiting == 0
    with pytest.raises(ValueError, match="rows and read"):
        Engine(model, serializer, rows=0)
    with pytest.raises(ValueError, match="precision must be"):
        Engine(model, serializer, precision="float8")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"max_tokens": 0}, "max_tokens must be an integer of at least 1; got 0"),
        ({"max_tokens": 2.0}, "max_tokens must be an integer"),
        ({"seed": -1}, "seed must be an integer of at least 0; got -1"),
        ({"seed": True}, "seed must be an integer"),
        ({"stop": "end"}, "stop must be strings"),
        ({"stop": ("",)}, "stop must be strings of one or more"),
        ({"top_logprobs": -1}, "top_logprobs must be an integer of at least 0; got -1"),
        ({"top_logprobs": 2.5}, "top_logprobs must be an integer"),
    ],
)
def test_sampling_that_makes_no_sense_is_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(**settings)


@torch.inference_mode()
def test_each_row_has_its_own_mass(parts: Any) -> None:
    model, _ = parts
    states = torch.randn(12, model.config.width, generator=torch.Generator().manual_seed(0))
    span = ((0, 300),)
    mass = [1.0, 0.9, 0.5, 0.1] * 3
    warm = [0.0, 0.5, 1.0, 2.0, 3.0, 1.5] * 2

    def draw(rows: list[int], top_p: Any) -> np.ndarray:
        generators = [np.random.default_rng(r) for r in rows]
        return choose(
            model, states[rows], [span] * len(rows), [warm[r] for r in rows], generators, top_p
        )

    assert draw([0], 0.9) == choose(model, states[:1], [span], [1e-300], [np.random.default_rng(0)])
    together = draw(list(range(12)), mass)
    assert together.tolist() == [int(draw([r], mass[r])[0]) for r in range(12)]


def test_the_likeliest_are_found_without_putting_all_in_order() -> None:
    rng = np.random.default_rng(0)
    sizes = Counter()
    for size in (5, 257, 3000, 5000):
        for scale, mass in itertools.product((0.0, 0.5, 3.0, 12.0), (0.05, 0.5, 0.9, 0.999)):
            logits = np.round(rng.normal(size=size) * scale, 1)  # many are equal
            p = np.exp(logits - logits.max())
            p /= p.sum()
            slow = np.zeros(size, bool)
            order = np.argsort(-p, kind="stable")
            before = np.cumsum(p[order]) - p[order]
            slow[order[before < mass]] = True
            fast = drawing._likely(np.stack([p, p[::-1]]), np.array([mass, 1e-9]))
            assert (fast[0] == slow).all()
            assert np.flatnonzero(fast[1]).tolist() == [p[::-1].argmax()]
            sizes[int(slow.sum()) > drawing.LIKELY] += 1
            # drawn by the mass before each id, all others being none
            numbers = np.append(rng.random(7), np.nextafter(1.0, 0.0))
            cumulative = np.cumsum(np.where(slow, p, 0.0))
            wanted = [int((cumulative <= x * cumulative[-1]).sum()) for x in numbers]
            draws = [SimpleNamespace(random=x.item) for x in numbers]
            rows = np.tile(np.log(p), (8, 1))
            some = drawing._draw(rows, np.ones(8), draws, np.full(8, mass))
            assert some[:7].tolist() == wanted[:7]
            assert slow[some[7]], "rounded up to the whole mass, it is still one of them"
    assert min(sizes.values()) > 3


def test_a_row_goes_on_where_it_is_moved_to(parts: Any) -> None:
    model, serializer = parts
    prefix = prefix_of(serializer, "open the blue door " * 3)

    def read(memory: Memory, row: int, part: TokenSequence) -> torch.Tensor:
        lengths = np.zeros(3, np.int64)
        lengths[row] = len(part)
        chunk = memory.chunk(lengths, serializer.control)
        chunk.write([row], part)
        return memory.read(chunk)[np.array([row]), lengths[row : row + 1] - 1]

    stayed, moved = Memory(model, 3), Memory(model, 3)
    for memory in (stayed, moved):
        read(memory, 2, prefix)
        read(memory, 0, prefix.slice(0, 5))
    moved.move(2, 0)
    moved.reset(np.array([False, False, True]))
    more = prefix_of(serializer, "a green key")
    assert torch.equal(read(stayed, 2, more), read(moved, 0, more))
    assert moved.lengths.tolist() == [len(prefix) + len(more), 0, 0]
