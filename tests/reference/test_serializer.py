"""The serializer equals an independent one that writes token by token, from the drawing alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

import numpy as np
import pytest
from gymnasium import spaces

from gato.envs.episode import ANY_TEXT, Episode, TaskSpec, flatten_space, flatten_value
from gato.tokenizers.serializer import Serializer
from gato.tokenizers.spaces import CodecOptions
from gato.tokenizers.stream import TokenSequence, concatenate, pack

Token = dict[str, Any]


class SlowSerializer:
    """Writes one token at a time; knows the paper, the drawing in `stream.py` and nothing else."""

    def __init__(self, fast: Serializer, text_pieces: int) -> None:
        self.options, self.text_ids = fast.options, fast.modalities["text"].text_ids
        self.start = {"text": 0, "continuous": text_pieces, "discrete": text_pieces + 1024}
        names = "<bos> <eos> <sep> <pad> <masked> <system> <user> <assistant>".split()
        self.control = {name: text_pieces + 2048 + i for i, name in enumerate(names)}

    def token(self, modality: str, local_id: int | None, **rows: Any) -> Token:
        number = -1 if local_id is None else self.start[modality] + local_id
        return {"id": number, "modality": modality, "local": 0, "target": 0.0, "rows": rows}

    def mark(self, name: str, target: float = 0.0) -> Token:
        token = {"id": self.control[name], "modality": "control", "local": 0, "rows": {}}
        return {**token, "target": target}

    def text(self, text: str, target: float = 0.0) -> list[Token]:
        return [{**self.token("text", int(i)), "target": target} for i in self.text_ids(text)]

    def image(self, image: np.ndarray, cell: int = 16) -> list[Token]:
        height, width = image.shape[:2]
        rows, columns = math.ceil(height / cell), math.ceil(width / cell)
        tokens = []
        for row in range(rows):
            for column in range(columns):
                shown = np.zeros((cell, cell, 3), np.uint8)
                for y in range(min(cell, height - row * cell)):
                    for x in range(min(cell, width - column * cell)):
                        shown[y, x] = image[row * cell + y, column * cell + x]
                name, field = ("image", "patch") if cell == 16 else ("frame", "pixels")
                grid, size = [row, column, rows, columns], [rows, columns]
                known = {field: shown, "grid": grid, "host_size": size}
                tokens.append(self.token(name, None, **known))
        return tokens

    def number(self, x: float, i: int, low: float | None, high: float | None, act: bool) -> Token:
        if low is None:
            squeezed = math.log(100 * abs(x) + 1) / math.log(100 * 256 + 1)
            unit = math.copysign(min(squeezed, 1.0), x)
        else:
            unit = 2 * (x - low) / (high - low) - 1
        bin_ = min(max(math.floor((unit + 1) / 2 * 1024), 0), 1023)
        value = (bin_ + 0.5) / 512 - 1 if act else min(max(unit, -3.0), 3.0)
        return self.token("continuous", bin_, value=value, dimension=i)

    def leaf(self, space: Any, value: Any, role: str, path: str) -> list[Token]:
        act = role == "action"
        match space:
            case spaces.Text():
                return self.text(value)
            case spaces.Discrete():
                return self.digits(int(value) - int(space.start), int(space.n))
            case spaces.MultiBinary():
                return [t for v in np.ravel(value) for t in self.digits(int(v), 2)]
            case spaces.MultiDiscrete():
                small = space.nvec.max() <= 16 and space.nvec.ndim > 1
                if self.options.observations == "vector" and small and not act:
                    return [
                        self.token("symbols", None, place=k, index=[16 * j + v for j, v in e])
                        for k, e in enumerate(
                            list(enumerate(g)) for g in value.reshape(-1, value.shape[-1]).tolist()
                        )
                    ]
                pairs = zip(np.ravel(value), np.ravel(space.nvec), strict=True)
                return [t for v, n in pairs for t in self.digits(int(v), int(n))]
        if space.dtype == np.uint8 and not act:
            frames = value if path.endswith("stack") else [value]
            return [t for frame in frames for t in self.image(frame, self.options.frame_cell)]
        numbers = np.ravel(value).astype(float).tolist()
        if act:
            low, high = np.ravel(space.low).tolist(), np.ravel(space.high).tolist()
            limits = list(zip(low, high, strict=True))
            return [self.number(x, i, *limits[i], act) for i, x in enumerate(numbers)]
        if self.options.observations == "vector":
            return list(self.vectors(numbers))
        limits = (-1.0, 1.0) if self.options.scales == "quantile" else (None, None)
        return [self.number(x, i, *limits, act) for i, x in enumerate(numbers)]

    def vectors(self, numbers: list[float]) -> Iterator[Token]:
        size = self.options.vector_group
        for k in range(0, len(numbers), size):
            tokens = [self.number(x, 0, None, None, False) for x in numbers[k : k + size]]
            values = [t["rows"]["value"] for t in tokens] + [0.0] * (size - len(tokens))
            yield self.token("vector", None, values=values, group=k // size)

    def digits(self, value: int, size: int) -> list[Token]:
        written, reach = [value % 1024], 1024
        while reach < size:
            value //= 1024
            written.insert(0, value % 1024)
            reach *= 1024
        return [self.token("discrete", d) for d in written]

    def step(self, task: TaskSpec, observed: Any, acted: Mapping[str, Any]) -> list[Token]:
        tokens: list[Token] = []
        for path, space in sorted(flatten_space(task.observation_space, "observation").items()):
            tokens += self.leaf(space, observed[path], "observation", path)
        for i, token in enumerate(tokens):
            token["local"] = i + 1
        tokens.append(self.mark("<sep>"))
        for path, space in sorted(flatten_space(task.action_space, "action").items()):
            for token in self.leaf(space, acted[path], "action", path):
                tokens.append({**token, "target": 1.0})
            if isinstance(space, spaces.Text):
                tokens.append(self.mark("<eos>", 1.0))
        return tokens

    def conversation(self, messages: list[dict]) -> list[Token]:
        tokens = [self.mark("<bos>")]
        for message in messages:
            ours = message["role"] == "assistant"
            tokens.append(self.mark(f"<{message['role']}>"))
            for part in message["content"]:
                if part["type"] == "image":
                    tokens += self.image(part["image"])
                else:
                    tokens += self.text(part["text"], float(ours))
            if ours:
                tokens.append(self.mark("<eos>", 1.0))
        return tokens


def assert_same(fast: TokenSequence, slow: list[Token], names: list[str]) -> None:
    assert len(fast) == len(slow)
    np.testing.assert_array_equal(fast.ids, [t["id"] for t in slow])
    assert [names[m] for m in fast.modality] == [t["modality"] for t in slow]
    np.testing.assert_array_equal(fast.local, [t["local"] for t in slow])
    np.testing.assert_array_equal(fast.target, [t["target"] for t in slow])
    found: dict[str, dict[str, list]] = {}
    for at, token in enumerate(slow):
        if token["rows"]:
            fields = found.setdefault(token["modality"], {})
            for key, value in {**token["rows"], "at": at}.items():
                fields.setdefault(key, []).append(value)
    assert fast.payload.keys() == found.keys()
    for modality, fields in found.items():
        assert fast.payload[modality].keys() == fields.keys()
        for key, rows in fields.items():
            got = fast.payload[modality][key]
            np.testing.assert_allclose(got, np.array(rows), rtol=1e-6, atol=1e-6)


TASK = TaskSpec(
    id="toy/everything-v0",
    observation_space=spaces.Dict(
        {
            "z": spaces.Box(-np.inf, np.inf, (2, 7), np.float32),
            "camera": spaces.Box(0, 255, (24, 32, 3), np.uint8),
            "depth": spaces.Box(0, 255, (16, 16), np.uint8),
            "stack": spaces.Box(0, 255, (2, 20, 17), np.uint8),
            "a": spaces.Tuple(
                [
                    spaces.Discrete(5, start=-2),
                    spaces.Dict({"note": ANY_TEXT(), "lamp": spaces.MultiBinary((2, 2))}),
                    spaces.Discrete(3_000_000),
                ]
            ),
            "grid": spaces.MultiDiscrete(np.full((3, 2, 3), 11)),
            "b/c": spaces.Box(-5, 5, (), np.float64),
        }
    ),
    action_space=spaces.Dict(
        {
            "say": ANY_TEXT(),
            "arm": spaces.Box(np.array([-1, 0, -3], np.float32), np.array([1, 2, 9], np.float32)),
            "button": spaces.Tuple([spaces.Discrete(4), spaces.MultiDiscrete([2, 1500])]),
        }
    ),
    max_steps=99,
    control_hz=10.0,
    instruction="do it all",
)
NOTES = ("", "go left", "go\u2581right\n", "\0 é \U0001f600")


def sample(space: Any, rng: np.random.Generator) -> Any:
    """Return an element whose leaves by path are random, text from a few notes."""
    space.seed(int(rng.integers(1 << 30)))

    def element(s: Any) -> Any:
        match s:
            case spaces.Text():
                return NOTES[int(rng.integers(len(NOTES)))]
            case spaces.Dict():
                return {k: element(v) for k, v in s.spaces.items()}
            case spaces.Tuple():
                return tuple(element(v) for v in s.spaces)
        value = s.sample()
        edges = isinstance(s, spaces.Box) and s.is_bounded() and rng.random() < 0.3
        return rng.choice([s.low, s.high]) if edges else value

    return element(space)


def columns(space: Any, name: str, n: int, rng: np.random.Generator) -> dict[str, Any]:
    rows = [flatten_value(space, sample(space, rng), name) for _ in range(n)]
    return {
        path: [r[path] for r in rows]
        if isinstance(leaf, spaces.Text)
        else np.stack([r[path] for r in rows])
        for path, leaf in flatten_space(space, name).items()
    }


def make_episode(seed: int, *, targets: bool = False, instruction: str = "") -> Episode:
    rng = np.random.default_rng(seed)
    steps = int(rng.integers(1, 8))
    made = [columns(TASK.action_space, "action", steps, rng) for _ in range(2)]
    return Episode(
        task=TASK.id,
        observations=columns(TASK.observation_space, "observation", steps + 1, rng),
        actions=made[0],
        targets=made[1] if targets else None,
        rewards=np.zeros(steps, np.float32),
        terminated=np.zeros(steps, bool),
        truncated=np.zeros(steps, bool),
        instruction=instruction,
    )


OPTIONS = [
    CodecOptions(),
    CodecOptions(observations="vector", vector_group=5),
    CodecOptions(scales="mu_law"),
    CodecOptions(frame_cell=32),
]


@pytest.fixture(params=OPTIONS, ids=["scalar", "vector", "mu_law", "frame"])
def pair(request: pytest.FixtureRequest, text_model: bytes) -> tuple[Serializer, SlowSerializer]:
    fast = Serializer(request.param, {"text": {"text.model": text_model}})
    fast.add_task(TASK)
    return fast, SlowSerializer(fast, fast.modalities["text"].vocabulary)


def slow_steps(slow: SlowSerializer, episode: Episode) -> list[list[Token]]:
    acted = episode.targets if episode.targets is not None else episode.actions
    return [
        slow.step(
            TASK,
            {k: v[i] for k, v in episode.observations.items()},
            {k: v[i] for k, v in acted.items()},
        )
        for i in range(len(episode))
    ]


@pytest.mark.parametrize("seed", range(6))
def test_an_episode_is_written_as_drawn(pair, seed):
    fast, slow = pair
    said = "now: go" if seed % 3 == 2 else ""
    episode = make_episode(seed, targets=seed % 2 == 1, instruction=said)
    written, steps = fast.episode(episode), slow_steps(slow, episode)
    assert_same(written.steps, list(chain(*steps)), fast.names)
    head = [slow.mark("<bos>"), *slow.text(said or TASK.instruction)]
    assert_same(written.head, head, fast.names)
    assert len(written) == len(steps)
    np.testing.assert_array_equal(np.diff(written.starts), [len(s) for s in steps])
    np.testing.assert_array_equal(written.actions, written.steps.target > 0)
    rng = np.random.default_rng(seed)
    for _ in range(4):
        start = int(rng.integers(len(steps)))
        stop = int(rng.integers(start, len(steps))) + 1
        window = concatenate([written.head, written.window(start, stop)])
        assert_same(window, head + list(chain(*steps[start:stop])), fast.names)


def test_an_observation_is_written_as_in_its_episode(pair):
    fast, _ = pair
    episode = make_episode(3)
    written = fast.episode(episode)
    for i in range(len(episode)):
        alone = fast.observation(TASK.id, {k: v[i] for k, v in episode.observations.items()})
        step = written.window(i, i + 1)
        np.testing.assert_array_equal(alone.ids, step.ids[: len(alone)])
        np.testing.assert_array_equal(alone.local, step.local[: len(alone)])
        assert alone.ids[-1] == fast.control["<sep>"]
        assert not alone.target.any()
        assert step.target[len(alone) :].all()


def test_documents_captions_and_conversations_are_written_as_drawn(pair):
    fast, slow = pair
    image = np.random.default_rng(0).integers(0, 256, (32, 48, 3), np.uint8)
    for note in NOTES:
        expected = [slow.mark("<bos>"), *slow.text(note, 1.0), slow.mark("<eos>", 1.0)]
        assert_same(fast.document(note), expected, fast.names)
        begun = [slow.mark("<bos>"), *slow.image(image), slow.mark("<sep>")]
        assert_same(fast.caption(image, None), begun, fast.names)
        whole = [*begun, *slow.text(note, 1.0), slow.mark("<eos>", 1.0)]
        assert_same(fast.caption(image, note), whole, fast.names)
    words = [{"type": "text", "text": note} for note in NOTES]
    picture = {"type": "image", "image": image[:16]}
    talk = [
        {"role": "system", "content": words[1:2]},
        {"role": "user", "content": [words[1], picture, words[3], picture]},
        {"role": "assistant", "content": words[2:4]},
        {"role": "user", "content": words[1:2]},
        {"role": "assistant", "content": [words[1], picture]},
    ]
    assert_same(fast.conversation(talk), slow.conversation(talk), fast.names)
    plain = [{"role": "user", "content": "go left"}]
    assert_same(
        fast.conversation(plain),
        slow.conversation([{"role": "user", "content": words[1:2]}]),
        fast.names,
    )
    with pytest.raises(ValueError, match="system, user or assistant; got 'robot'"):
        fast.conversation([{"role": "robot", "content": ""}])


def test_hidden_actions_leave_no_trace_of_their_value(pair):
    fast, _ = pair
    first, second = make_episode(1), make_episode(1)
    rng = np.random.default_rng(9)
    other = {"arm": rng.uniform([-1, 0, -3], [1, 2, 9], (len(first), 3)).astype(np.float32)}
    second = Episode(**{**vars(first), "actions": {**first.actions, **other}})
    batches = []
    for episode in (first, second):
        written = fast.episode(episode)
        hidden = written.steps.hide(written.actions)
        batch = pack([[written.head, hidden]], 2 * len(hidden), fast.control)
        batch.validate()
        at = np.flatnonzero(written.actions) + len(written.head)
        assert (batch.inputs[at] == fast.control["<masked>"]).all()
        np.testing.assert_array_equal(batch.target_at, at)
        np.testing.assert_array_equal(batch.target_ids, written.steps.ids[written.actions])
        for rows in batch.payload.values():
            assert not np.isin(rows["at"], at).any()
        batches.append(batch)
    a, b = batches
    assert not np.array_equal(a.target_ids, b.target_ids)
    np.testing.assert_array_equal(a.inputs, b.inputs)
    for name, rows in a.payload.items():
        for key, values in rows.items():
            np.testing.assert_array_equal(values, b.payload[name][key])


def test_an_action_box_and_its_key_are_named_in_errors(pair):
    fast, _ = pair
    episode = make_episode(1)
    episode.actions["arm"][-1, 1] = 2.5
    with pytest.raises(ValueError, match=r"'toy/everything-v0: arm' must be in \[0, 2\] at dim 1"):
        fast.episode(episode)
    episode = make_episode(1)
    episode.observations["z"][0, 1, 2] = np.nan
    with pytest.raises(ValueError, match=r"'toy/everything-v0: z' must be finite.*\(0, 9\)"):
        fast.episode(episode)


def test_the_serializer_survives_its_checkpoint(pair):
    fast, _ = pair
    again = Serializer.from_json(fast.to_json(), fast.state())
    episode = make_episode(4)
    a, b = fast.episode(episode).steps, again.episode(episode).steps
    np.testing.assert_array_equal(a.ids, b.ids)
    assert again.to_json() == fast.to_json()
    with pytest.raises(ValueError, match=r"tasks this model knows.*got 'toy/other'"):
        again.task("toy/other")
