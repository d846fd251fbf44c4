"""Episodes in the columns of the JAT data set, written by `datasets` and by pyarrow."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from gymnasium import spaces
from PIL import Image

from gato import cli
from gato.envs.readers import formats, importing
from gato.envs.readers.reader import BadItem, ReadOptions
from gato.envs.store import EpisodeStore

STEPS = 8
FLOATS = pa.list_(pa.list_(pa.float32()))
IMAGES = pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))


def arm(seed: int, width: int = 4, reach: float = 0.9) -> dict[str, Any]:
    """Return an episode of numbers, as Meta-World's are; the action follows from what is seen."""
    rng = np.random.default_rng(seed)
    seen = rng.uniform(-1, 1, (STEPS, 6)).astype(np.float32)
    return {
        "continuous_observations": seen.tolist(),
        "continuous_actions": (reach * np.sign(seen[:, :1]) * np.ones(width)).tolist(),
        "rewards": rng.normal(size=STEPS).astype(np.float32).tolist(),
    }


ARM = pa.schema(
    {
        "continuous_observations": FLOATS,
        "continuous_actions": FLOATS,
        "rewards": pa.list_(pa.float32()),
    }
)


def png(pixels: np.ndarray) -> dict[str, Any]:
    """Return a picture as `datasets` keeps one."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


def frames(seed: int, channels: int) -> np.ndarray:
    """Return pictures whose darkness says what to do."""
    rng = np.random.default_rng(seed)
    noise = rng.integers(0, 60, (STEPS, 84, 84, channels), np.uint8)
    return noise + np.uint8(150 * (seed % 2))


def game(seed: int, channels: int = 4) -> dict[str, Any]:
    """Return an episode of pictures, as Atari's are: four frames in the channels of one picture."""
    pixels = frames(seed, channels)
    pixels = pixels[..., 0] if channels == 1 else pixels
    return {
        "image_observations": [png(p) for p in pixels],
        "discrete_actions": [seed % 2 * 5] * STEPS,
        "rewards": [1.0] * STEPS,
    }


GAME = pa.schema(
    {
        "image_observations": IMAGES,
        "discrete_actions": pa.list_(pa.int64()),
        "rewards": pa.list_(pa.float32()),
    }
)


def level(seed: int) -> dict[str, Any]:
    """Return an episode of words and integers, as BabyAI's are."""
    rng = np.random.default_rng(seed)
    return {
        "text_observations": [f"go to the {('red', 'blue')[seed % 2]} ball"] * STEPS,
        "discrete_observations": rng.integers(0, 11, (STEPS, 12)).tolist(),
        "discrete_actions": [seed % 2 * 2] * STEPS,
        "rewards": [0.0] * (STEPS - 1) + [1.0],
    }


LEVEL = pa.schema(
    {
        "text_observations": pa.list_(pa.string()),
        "discrete_observations": pa.list_(pa.list_(pa.int64())),
        "discrete_actions": pa.list_(pa.int64()),
        "rewards": pa.list_(pa.float32()),
    }
)


def write(path: Path, episodes: list[dict[str, Any]], schema: pa.Schema) -> Path:
    """Write episodes as one Parquet file, a few a row group."""
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.Table.from_pylist(episodes, schema), path, row_group_size=2)
    return path


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """Return a folder laid out as the data set is published."""
    root = tmp_path / "jat-dataset"
    for i in range(2):
        name = f"train-0000{i}-of-00002.parquet"
        rows = range(3 * i, 3 * i + 3)
        write(root / "metaworld-assembly" / name, [arm(s) for s in rows], ARM)
        write(root / "atari-alien" / name, [game(s) for s in rows], GAME)
        write(root / "babyai-go-to" / name, [level(s) for s in rows], LEVEL)
    write(root / "metaworld-assembly" / "test-00000-of-00001.parquet", [arm(90)], ARM)
    return root


def test_the_published_layout_is_read(published):
    source = formats.open_source(published)
    assert (source.format, source.items, source.steps) == ("jat", 18, 18 * STEPS)
    assert set(source.tasks) == {
        "jat/atari-alien",
        "jat/babyai-go-to",
        "jat/metaworld-assembly",
    }
    spec = source.tasks["jat/metaworld-assembly"]
    assert spec.action_space == spaces.Box(-1, 1, (4,), np.float32)
    assert spec.instruction == "metaworld assembly"
    assert source.tasks["jat/atari-alien"].action_space == spaces.Discrete(6)
    words = source.tasks["jat/babyai-go-to"]
    assert words.instruction == ""
    assert words.observation_space["discrete_observations"].nvec.tolist() == [11] * 12
    items = list(source.read())
    assert not any(isinstance(item, BadItem) for item in items)
    arms = [e for e in items if e.task == "jat/metaworld-assembly"]
    for seed, episode in enumerate(arms):
        sent = arm(seed)
        seen = np.array(sent["continuous_observations"], np.float32)
        assert np.array_equal(episode.observations["continuous_observations"][:-1], seen)
        assert np.array_equal(episode.observations["continuous_observations"][-1], seen[-1])
        assert np.array_equal(episode.actions["action"], np.float32(sent["continuous_actions"]))
        assert np.array_equal(episode.rewards, np.float32(sent["rewards"]))
        assert episode.truncated.tolist() == [False] * (STEPS - 1) + [True]
    games = [e for e in items if e.task == "jat/atari-alien"]
    for seed, episode in enumerate(games):
        newest = frames(seed, 4)[..., 3:]  # the stack's last frame
        assert np.array_equal(episode.observations["image_observations"][:-1], newest)
    levels = [e for e in items if e.task == "jat/babyai-go-to"]
    assert levels[1].observations["text_observations"] == ["go to the blue ball"] * (STEPS + 1)
    assert any("twice" in note for note in source.notes)
    (held,) = formats.open_source(
        published / "metaworld-assembly", options=ReadOptions(split="test")
    ).read()
    assert np.array_equal(held.rewards, np.float32(arm(90)["rewards"]))


@pytest.mark.parametrize("task", ["metaworld-assembly", "atari-alien", "babyai-go-to"])
def test_it_trains(published, trains, tmp_path, task):
    summary = importing.import_source(formats.open_source(published / task), tmp_path / "store")
    assert summary.stores == [tmp_path / "store" / "jat" / task]
    first, last = trains(tmp_path / "store")
    assert last < 0.7 * first


def test_what_datasets_has_saved_is_read(tmp_path):
    import datasets

    features = datasets.Features(
        {
            "image_observations": datasets.Sequence(datasets.Image()),
            "continuous_actions": datasets.Sequence(datasets.Array2D((1, 3), "float32")),
            "rewards": datasets.Sequence(datasets.Value("float32")),
        }
    )
    pixels = [frames(seed, 3) for seed in range(4)]
    moves = np.random.default_rng(0).uniform(-1, 1, (4, STEPS, 1, 3)).astype(np.float32)
    rows = {
        "image_observations": [[Image.fromarray(p) for p in episode] for episode in pixels],
        "continuous_actions": [list(m) for m in moves],
        "rewards": [[0.5] * STEPS] * 4,
    }
    table = datasets.Dataset.from_dict(rows, features=features)
    parts = table.train_test_split(test_size=1, shuffle=False)
    parts.save_to_disk(tmp_path / "push")
    for location in (tmp_path / "push", tmp_path / "push" / "train"):
        source = formats.open_source(location)
        assert (source.format, source.items, list(source.tasks)) == ("jat", 3, ["jat/push"])
        for i, episode in enumerate(source.read()):
            assert np.array_equal(episode.observations["image_observations"][:-1], pixels[i])
            assert np.array_equal(episode.actions["action"], moves[i])
    table.to_parquet(tmp_path / "lift.parquet")
    source = formats.open_source(tmp_path / "lift.parquet")
    assert list(source.tasks) == ["jat/lift"]
    assert len(list(source.read())) == 4


def test_actions_outside_are_refused_unless_they_are_clipped(tmp_path, capsys):
    wild = [arm(0), arm(1, reach=-19.8)]
    file = write(tmp_path / "metaworld-push" / "train-00000.parquet", wild, ARM)
    out = tmp_path / "out"
    command = ["data", "import", str(file.parent), "--out", str(out)]
    assert cli.main(command) == cli.BAD_INPUT
    said = capsys.readouterr().err
    assert "row 1" in said
    assert "19.8 at (0, 0)" in said
    assert "--clip-actions" in said
    assert not out.exists()
    assert cli.main([*command, "--clip-actions", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert sum(told["counts"].values()) == STEPS * 4
    stored = EpisodeStore(out / "jat" / "metaworld-push").episode(1).actions["action"]
    assert np.abs(stored).max() == 1.0


def test_an_action_space_that_changes_is_named_or_counted(tmp_path):
    file = write(tmp_path / "a.parquet", [arm(0), arm(1, width=3), arm(2)], ARM)
    with pytest.raises(ValueError, match=r"row 1: .*float32 \(4,\) in \[-1, 1\]; got .*\(3,\)"):
        importing.import_source(formats.open_source(file), tmp_path / "out")
    summary = importing.import_source(formats.open_source(file), tmp_path / "out", skip_bad=True)
    assert (summary.kept, sum(summary.skipped.values())) == (2, 1)
    origin = json.loads((summary.stores[0] / importing.ORIGIN).read_text())
    assert "row 1" in origin["skipped"][0]["first"]


@pytest.mark.parametrize("damage", ["footer", "pages", "columns"])
def test_a_bad_file_is_named_or_counted(published, tmp_path, damage):
    file = published / "metaworld-assembly" / "train-00001-of-00002.parquet"
    content = file.read_bytes()
    match damage:
        case "footer":
            file.write_bytes(content[:-10])
        case "pages":
            file.write_bytes(
                content[:4] + b"\xff" * (len(content) // 4) + content[4:][len(content) // 4 :]
            )
        case "columns":
            write(file, [game(0)], GAME)
    location = published / "metaworld-assembly"
    with pytest.raises(ValueError, match="train-00001-of-00002"):
        importing.import_source(formats.open_source(location), tmp_path / "out")
    source = formats.open_source(location)
    summary = importing.import_source(source, tmp_path / "out", skip_bad=True)
    assert summary.kept == 3
    assert sum(summary.skipped.values()) >= 1


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"rewards": [0.0] * 3}, f"expected 3 steps of continuous_observations.*got {STEPS}"),
        ({"rewards": [None] * STEPS}, f"rewards: {STEPS} values are missing"),
        ({"rewards": None}, "the value is missing"),
        ({"continuous_actions": [[0.0] * 4] * 7 + [[0.0] * 2]}, "4 numbers at step 0 and 2 at"),
        ({"continuous_actions": [[float("nan")] * 4] * STEPS}, "expected actions of float32"),
    ],
)
def test_a_bad_row_is_named(tmp_path, change, told):
    file = write(tmp_path / "a.parquet", [arm(0), {**arm(1), **change}, arm(2)], ARM)
    items = list(formats.open_source(file, options=ReadOptions(clip_actions=True)).read())
    bad = [item for item in items if isinstance(item, BadItem)]
    assert len(bad) == 1
    assert "row 1" in bad[0].where
    with pytest.raises(ValueError, match=told):
        raise ValueError(bad[0].reason)


def test_pictures_too_large_or_of_another_size_are_named(tmp_path, bomb):
    small = {**game(1), "image_observations": [png(np.zeros((20, 20), np.uint8))] * STEPS}
    huge = {**game(2), "image_observations": [{"bytes": bomb, "path": None}] * STEPS}
    torn = {**game(2), "image_observations": [{"bytes": b"\x89PNG", "path": None}] * STEPS}
    file = write(tmp_path / "a.parquet", [game(0), small, huge, torn], GAME)
    items = list(formats.open_source(file).read())
    reasons = [item.reason for item in items[1:]]
    assert "shape (84, 84, 4); got uint8 of shape (20, 20, 1)" in reasons[0]
    assert "900000000 pixels" in reasons[1]
    assert "step 0" in reasons[2]
    sized = formats.open_source(file, options=ReadOptions(image_size=(64, 48)))
    good = [e for e in sized.read() if not isinstance(e, BadItem)]
    shapes = [e.observations["image_observations"].shape for e in good]
    assert shapes == [(STEPS + 1, 48, 64, 3)] * 2


def test_columns_that_are_missing_or_called_otherwise(tmp_path):
    schema = pa.schema({"obs": FLOATS, "continuous_actions": FLOATS, "rewards": ARM.field(2).type})
    rows = [{**arm(0), "obs": arm(0)["continuous_observations"]}]
    file = write(tmp_path / "a.parquet", rows, schema)
    with pytest.raises(
        ValueError, match=r"expected observations in .*: continuous_observations or"
    ):
        formats.open_source(file)
    options = ReadOptions(columns={"continuous_observations": "obs"})
    (episode,) = formats.open_source(file, options=options).read()
    assert "continuous_observations" in episode.observations
    with pytest.raises(ValueError, match=r"expected columns of continuous_observations.*'state'"):
        formats.open_source(file, options=ReadOptions(columns={"state": "obs"}))
    with pytest.raises(ValueError, match="expected column 'nope' in"):
        formats.open_source(file, options=ReadOptions(columns={"rewards": "nope"}))


def test_a_task_of_the_published_data_set_is_fetched(published, monkeypatch):
    asked = []

    def fetched(address: str) -> Path:
        asked.append(address)
        return published / "metaworld-assembly"

    monkeypatch.setattr("gato.envs.readers.jat.fetch", fetched)
    source = formats.open_source("hf:jat-project/jat-dataset/metaworld-assembly")
    assert (source.format, source.items) == ("jat", 6)
    assert asked == ["hf://datasets/jat-project/jat-dataset/metaworld-assembly"]
    with pytest.raises(ValueError, match="expected one task, as hf:jat-project/jat-dataset/meta"):
        formats.open_source("hf:jat-project/jat-dataset")


def test_info_tells_of_it(published, capsys):
    assert cli.main(["data", "info", str(published), "--json"]) == 0
    (told,) = json.loads(capsys.readouterr().out)
    assert (told["format"], told["items"], told["steps"]) == ("jat", 18, 18 * STEPS)
    # 6 numbers, or 36 patches, or a text and 12 integers, are seen; a separator; what is done
    arm_and_game = 6 * STEPS * (6 + 1 + 4) + 6 * STEPS * (36 + 1 + 1)
    words = told["tokens"] - arm_and_game - 6 * STEPS * (12 + 1 + 1)
    assert 6 * STEPS <= words <= 6 * STEPS * len("go to the blue ball")
    assert told["fields"][f"{published}/babyai-go-to: text_observations"] == "text"
    actions = told["tasks"]["jat/metaworld-assembly"]["actions"]
    assert actions == {"action": "float32 (4,) in [-1, 1]"}
    assert cli.main(["data", "info", str(published)]) == 0
    assert "the last of 4 stacked frames" in capsys.readouterr().out
