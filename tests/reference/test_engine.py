"""Texts of many requests at once equal each written alone, by full forwards without a cache."""

from __future__ import annotations

import codecs
import contextlib
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import rollout_world as world
import torch

from gato.rollouts.batching import Memory
from gato.rollouts.engine import Engine, Sampling
from gato.tokenizers.serializer import History
from gato.tokenizers.stream import TokenSequence, concatenate, pack

EOS = "<eos>"


@torch.no_grad()
def alone(model, serializer, prefix: TokenSequence, sampling: Sampling) -> list[int]:
    """Return the ids of one text, the whole sequence run through the model for each."""
    (start, stop), eos = serializer.layout.span("text"), serializer.control[EOS]
    allowed = np.array([*range(start, stop), eos])
    rng = np.random.default_rng([sampling.seed, 0])
    sequence, ids = prefix, []
    while len(ids) < sampling.max_tokens:
        batch = pack([[sequence]], -(-len(sequence) // 16) * 16, serializer.control).to("cpu")
        logits = model.logits(model(batch)[len(sequence) - 1]).double().numpy()[allowed]
        place = int(logits.argmax())
        if sampling.temperature:
            p = np.exp((logits - logits.max()) / sampling.temperature)
            p /= p.sum()
            order = np.argsort(-p, kind="stable")
            kept, mass = [], 0.0
            for k in order:  # the fewest that hold top_p of the mass
                if mass >= sampling.top_p:
                    break
                kept.append(k)
                mass += p[k]
            p[[k for k in order if k not in set(kept)]] = 0.0
            place = int((np.cumsum(p) <= rng.random() * p.sum()).sum())
        if allowed[place] == eos:
            break
        ids.append(int(allowed[place]))
        one = serializer.text("a").slice(0, 1)
        one.ids = np.array(ids[-1:], np.int32)
        sequence = concatenate([sequence, one])
    return ids


def characters(spelled: bytes) -> Iterator[str]:
    """Yield characters, U+FFFD for each byte of none; one cut off at the end is left out."""
    while spelled:
        for size in range(1, 5):
            with contextlib.suppress(UnicodeDecodeError):
                yield spelled[:size].decode()
                break
        else:
            with contextlib.suppress(UnicodeDecodeError):
                codecs.getincrementaldecoder("utf-8")().decode(spelled)
                return
            yield "\ufffd"
            size = 1
        spelled = spelled[size:]


def shown(serializer, ids: list[int], stop: tuple[str, ...]) -> str:
    """Return the text of ids, one character after the other until a stop string is complete."""
    text = ""
    for character in characters(b"".join(serializer.modalities["text"].bytes_of(i) for i in ids)):
        text += character
        ended = [s for s in stop if text.endswith(s)]
        if ended:
            return text[: -len(max(ended, key=len))]
    return text


def requests(serializer, count: int) -> list[tuple[TokenSequence, Sampling]]:
    """Return prefixes of all kinds and lengths, and as many ways to go on."""
    rng = np.random.default_rng(0)
    made = []
    for i in range(count):
        words = " ".join(rng.choice(world.WORDS, int(rng.integers(1, 60 if i % 5 == 0 else 9))))
        match i % 3:
            case 0:
                prefix = serializer.document(words)
                prefix = prefix.slice(0, len(prefix) - 1)
            case 1:
                image = rng.integers(0, 256, (16 * int(rng.integers(1, 5)), 32, 3), np.uint8)
                prefix = serializer.caption(image, None)
            case _:
                turn = serializer.conversation([{"role": "user", "content": words}])
                prefix = concatenate([turn, serializer.control_piece("<assistant>")])
        sampling = Sampling(
            max_tokens=int(rng.integers(1, 24)),
            temperature=float(rng.choice([0.0, 0.7, 1.5])),
            top_p=float(rng.choice([1.0, 0.8])),
            seed=int(rng.integers(100)),
        )
        made.append((prefix, sampling))
    return made


def run(engine: Engine, given: list, joined: dict[int, list[int]], cancelled=()) -> dict[int, str]:
    """Return the texts of requests that join at given steps; some are cancelled at the tenth."""
    texts, place, ended, step = {}, {}, set(), 0
    while joined or engine.running or engine.waiting:
        for i in joined.pop(step, ()):
            place[engine.submit(*given[i])] = i
            texts[i] = ""
        if step == 10:
            for ticket, i in place.items():
                if i in cancelled:
                    engine.cancel(ticket)
        for ticket, delta in engine.step():
            i = place[ticket]
            assert i not in ended
            texts[i] += delta.text
            if delta.finish:
                ended.add(i)
        step += 1
    assert ended >= set(place.values()) - set(cancelled)
    return texts


@pytest.fixture(scope="module")
def parts():
    serializer = world.make_serializer(History())
    return world.make_model(serializer), serializer


@pytest.fixture(scope="module")
def wanted(parts) -> tuple[list, list[list[int]]]:
    """Return 32 requests, and the ids of each, written alone."""
    given = requests(parts[1], 32)
    return given, [alone(*parts, *request) for request in given]


@pytest.mark.parametrize(("rows", "read"), [(5, 256), (32, 256), (3, 7)])
def test_what_joins_and_leaves_is_what_is_written_alone(parts, wanted, rows, read) -> None:
    (given, ids), (model, serializer) = wanted, parts
    rng = np.random.default_rng(rows)
    joined: dict[int, list[int]] = {}
    for i in rng.permutation(len(given)).tolist():
        joined.setdefault(int(rng.integers(0, 30)), []).append(i)
    joined.setdefault(0, [])
    for step in range(31):
        joined.setdefault(step, [])
    cancelled = set(rng.choice(len(given), 4, replace=False).tolist())
    texts = run(Engine(model, serializer, rows, read=read), given, joined, cancelled)
    for i, text in texts.items():
        whole = shown(serializer, ids[i], ())
        assert text == whole or (i in cancelled and whole.startswith(text))
    assert len({len(i) for i in ids}) > 10, "the requests should end at different times"


@pytest.mark.parametrize("read", [7, 256])
def test_no_image_is_read_in_two(parts, read: int) -> None:
    serializer = parts[1]
    model = world.make_model(serializer, embedder="conv")  # which takes an image whole
    rng = np.random.default_rng(read)
    large = rng.integers(0, 256, (128, 144, 3), np.uint8)  # more tokens than are read at once
    content = [{"type": "text", "text": "go to the red ball " * 3}]
    content += [{"type": "image", "image": i} for i in (large[:48, :64], large)]
    turn = serializer.conversation([{"role": "user", "content": [*content, content[0]]}])
    given = [(turn, Sampling(6)), *requests(serializer, 6)]
    texts = run(Engine(model, serializer, 3, read=read), given, {0: list(range(len(given)))})
    for i, request in enumerate(given):
        assert texts[i] == shown(serializer, alone(model, serializer, *request), ())


def test_a_text_ends_before_what_stops_it(parts, wanted) -> None:
    (given, ids), (model, serializer) = wanted, parts
    rng = np.random.default_rng(1)
    stopped, cut = [], 0
    for (prefix, sampling), own in zip(given, ids, strict=True):
        text = shown(serializer, own, ())
        at = rng.integers(0, max(1, len(text)), 3)
        stop = tuple(s for a in at if (s := text[a : a + int(rng.integers(1, 5))]))
        stopped.append((prefix, replace(sampling, stop=(*stop, "never said"))))
    texts = run(Engine(model, serializer, 8), stopped, {0: list(range(len(stopped)))})
    for i, (_, sampling) in enumerate(stopped):
        assert texts[i] == shown(serializer, ids[i], sampling.stop)
        assert not any(s in texts[i] for s in sampling.stop)
        cut += texts[i] != shown(serializer, ids[i], ())
    assert cut > 10


def test_texts_longer_than_the_memory_see_a_window(parts) -> None:
    serializer = parts[1]
    model = world.make_model(serializer, window=24)
    given = [(p, Sampling(40, t, seed=3)) for (p, _) in requests(serializer, 4) for t in (0.0, 1.2)]
    texts = run(Engine(model, serializer, 4), given, {0: list(range(len(given)))})
    for i, request in enumerate(given):
        assert texts[i] == shown(serializer, alone(model, serializer, *request), ())


def test_shapes_that_never_change_write_the_same(parts, wanted) -> None:
    (given, ids), (model, serializer) = wanted, parts
    engine = Engine(model, serializer, 6)
    engine.memory = Memory(model, 6, static=True)  # as on a GPU
    texts = run(engine, given, {0: list(range(len(given)))})
    assert all(texts[i] == shown(serializer, own, ()) for i, own in enumerate(ids))


@torch.no_grad()
def test_logprobs_are_those_of_a_full_forward(parts) -> None:
    model, serializer = parts
    prefix, _ = requests(serializer, 3)[2]
    sampling = Sampling(12, 1.5, seed=4, top_logprobs=3)
    engine = Engine(model, serializer, 2)
    engine.submit(requests(serializer, 1)[0][0], Sampling(12, 1.0))  # who asks for none gets none
    ticket = engine.submit(prefix, sampling)
    told = []
    while engine.running or engine.waiting:
        for whose, delta in engine.step():
            told += delta.logprobs
            assert whose == ticket or not delta.logprobs
    ids = alone(model, serializer, prefix, sampling)
    (start, stop), eos = serializer.layout.span("text"), serializer.control[EOS]
    allowed = [*range(start, stop), eos]
    text = serializer.modalities["text"]
    assert 5 < len(told) <= len(ids)
    for i, one in enumerate(told):
        body = serializer.text("a" * 99).slice(0, i)
        body.ids = np.array(ids[:i], np.int32)
        sequence = concatenate([prefix, body])
        batch = pack([[sequence]], len(sequence), serializer.control).to("cpu")
        logp = model.logits(model(batch)[-1])[allowed].log_softmax(-1)
        assert one.bytes == text.bytes_of(ids[i])
        assert one.token == one.bytes.decode(errors="replace")
        assert one.logprob == pytest.approx(float(logp[allowed.index(ids[i])]), abs=1e-4)
        best, at = logp.topk(3)
        assert [p for _, p, _ in one.top] == pytest.approx(best.tolist(), abs=1e-4)
        spelt = [b"" if allowed[k] == eos else text.bytes_of(allowed[k]) for k in at.tolist()]
        assert [b for _, _, b in one.top] == spelt
