"""LeRobot datasets: its own library's are read, and ours come back from it as they were.

``tests/fixtures/make_lerobot.py`` says how the fixtures were made, with LeRobot itself.
"""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
import pytest
from gymnasium import spaces

from gato import cli
from gato.envs.episode import ANY_TEXT, Episode, TaskSpec
from gato.envs.readers import formats, lerobot_files, lerobot_writer
from gato.envs.readers.importing import import_source
from gato.envs.readers.lerobot_stats import Statistics
from gato.envs.readers.reader import BadItem, ReadOptions
from gato.envs.readers.video import VideoWriter, frames_at
from gato.envs.store import EpisodeStore, EpisodeWriter

FIXTURES = Path(__file__).parents[2] / "fixtures"
THEIRS = FIXTURES / "lerobot_v3"
MADE = json.loads((THEIRS / "made.json").read_text())["read"]
TASK = TaskSpec(
    id="toy/hand-v0",
    observation_space=spaces.Dict(
        {
            "camera": spaces.Box(0, 255, (48, 64, 3), np.uint8),
            "images": spaces.Dict({"side": spaces.Box(0, 255, (33, 47, 3), np.uint8)}),
            "grid": spaces.MultiDiscrete(np.full((2, 2, 3), 6)),
            "held": spaces.Discrete(3),
            "note": ANY_TEXT(),
            "state": spaces.Box(-np.inf, np.inf, (5,), np.float64),
            "touch": spaces.Box(0, 255, (4, 4), np.uint8),
        }
    ),
    action_space=spaces.Dict(
        {"arm": spaces.Box(-1, 1, (3,), np.float32), "grip": spaces.Discrete(4, start=-1)}
    ),
    max_steps=30,
    control_hz=12.5,
    instruction="",
    measure="success",
)


def picture(step: int, height: int, width: int) -> np.ndarray:
    """Return a smooth picture that moves."""
    y, x = np.mgrid[:height, :width]
    channels = (
        128 + 100 * np.sin(x / 9 + step / 3),
        128 + 90 * np.cos(y / 7 + step / 5),
        (2 * x + y + 3 * step) % 200,
    )
    return np.stack(channels, -1).astype(np.uint8)


def episode(seed: int, task: TaskSpec = TASK) -> Episode:
    rng = np.random.default_rng(seed)
    steps = int(rng.integers(3, 9))
    rows = steps + 1

    def act() -> dict[str, np.ndarray]:
        arm = rng.uniform(-1, 1, (steps, 3)).astype(np.float32)
        return {"arm": arm, "grip": rng.integers(-1, 3, size=steps)}

    ends = np.arange(steps) == steps - 1
    no = np.zeros(steps, bool)
    return Episode(
        task=task.id,
        observations={
            "camera": np.stack([picture(seed + t, 48, 64) for t in range(rows)]),
            "images/side": np.stack([picture(2 * t, 33, 47) for t in range(rows)]),
            "grid": rng.integers(6, size=(rows, 2, 2, 3)),
            "held": rng.integers(3, size=rows),
            "note": [f"Schritt {t} für {seed}" for t in range(rows)],
            "state": rng.normal(size=(rows, 5)),
            "touch": rng.integers(256, size=(rows, 4, 4), dtype=np.uint8),
        },
        actions=act(),
        targets=act(),
        rewards=rng.normal(size=steps).astype(np.float32),
        terminated=ends if seed % 2 else no,
        truncated=no if seed % 2 else ends,
        instruction=("", "lift", "push")[seed % 3],
        seed=100 + seed,
        success=(None, True, False)[seed % 3],
        info={"level": seed} if seed % 2 else {},
    )


def make_store(folder: Path, episodes: int = 5, task: TaskSpec = TASK) -> EpisodeStore:
    with EpisodeWriter(folder, task, settings={"noise": 0.1}, versions={"toy": "3"}) as writer:
        for seed in range(episodes):
            writer.append(episode(seed, task))
    return EpisodeStore(folder)


def assert_same(got: Episode, wanted: Episode, *, but: tuple[str, ...] = ()) -> None:
    """Assert that two episodes are equal to the bit; pictures in `but` only in the last frame."""
    for role in ("observations", "actions", "targets"):
        mine, theirs = getattr(got, role), getattr(wanted, role)
        assert list(mine) == list(theirs)
        for path, values in theirs.items():
            if isinstance(values, list):
                assert mine[path] == values
                continue
            assert mine[path].dtype == values.dtype, path
            if path in but:
                assert np.array_equal(mine[path][-1], values[-1])
            else:
                assert np.array_equal(mine[path], values), path
    for name in ("rewards", "terminated", "truncated"):
        assert getattr(got, name).dtype == getattr(wanted, name).dtype
        assert np.array_equal(getattr(got, name), getattr(wanted, name)), name
    for name in ("task", "instruction", "seed", "success", "info"):
        assert getattr(got, name) == getattr(wanted, name), name


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    """Return a copy of LeRobot's dataset that may be spoilt."""
    return Path(shutil.copytree(THEIRS, tmp_path / "theirs"))


def describe(folder: Path, **changes: object) -> None:
    """Change ``meta/info.json``."""
    file = folder / "meta" / "info.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


# what LeRobot has written


def test_the_dataset_is_recognised_and_described():
    source = formats.open_source(THEIRS)
    assert (source.format, source.kind) == ("lerobot", "episodes")
    assert source.items == MADE["episodes"] + 1  # one changes its task on its way
    assert source.steps == MADE["frames"]
    assert source.hours == pytest.approx(70 / 10 / 3600)
    task = source.tasks["lerobot/lerobot_v3"]
    assert (task.control_hz, task.max_steps, task.measure) == (10.0, 18, "success")
    assert source.fields["observation.images.front"].startswith("observation 'images/front'")
    assert source.fields["next.reward"] == "reward"
    assert any("repeated" in note for note in source.notes)


def test_every_number_is_the_one_that_lerobot_reads(read):
    good, bad = read(THEIRS)
    assert not bad
    items = iter(MADE["items"])
    for one in good:
        assert isinstance(one, Episode)
        for step, item in zip(range(len(one)), items, strict=False):
            assert one.instruction == item["task"]
            assert one.observations["state"][step].tolist() == item["observation.state"]
            assert one.actions["action"][step].tolist() == item["action"]
            assert float(one.rewards[step]) == item["next.reward"]
            assert bool(one.terminated[step]) == item["next.done"]
            wrist = one.observations["images/wrist"][step].mean((0, 1))
            assert wrist == pytest.approx(item["observation.images.wrist"], abs=1e-3)
    assert next(items, None) is None


def test_video_frames_are_those_that_lerobot_decodes(read):
    good, _ = read(THEIRS)
    frames = np.concatenate([e.observations["images/front"][:-1] for e in good])
    with np.load(THEIRS / "front.npz") as expected:
        assert len(expected) > 15  # of several files, and the last of each episode among them
        for index, frame in expected.items():
            difference = np.abs(frames[int(index)].astype(int) - frame.astype(int))
            assert difference.max() <= 2  # another version of the decoder rounds otherwise
            assert difference.mean() < 0.3


def test_an_episode_of_two_tasks_becomes_two(read):
    good, _ = read(THEIRS)
    assert [len(e) for e in good] == [10, 12, 14, 16, 8, 10]
    first, second = good[-2:]
    assert first.instruction != second.instruction
    state = "state"
    # what follows the first is known; what follows the second is not, so the last is repeated
    assert np.array_equal(first.observations[state][-1], second.observations[state][0])
    assert np.array_equal(second.observations[state][-1], second.observations[state][-2])
    assert (first.success, second.success) == (None, True)
    assert first.truncated[-1]
    assert not first.terminated[-1]
    assert second.terminated[-1]
    assert not second.truncated[-1]
    assert [e.success for e in good[:4]] == [True, True, True, False]


def test_it_trains(trains, tmp_path):
    summary = import_source(formats.open_source(THEIRS), tmp_path / "stores")
    assert (summary.kept, summary.steps) == (6, 70)
    first, last = trains(tmp_path / "stores")
    assert last < 0.7 * first


def test_pictures_take_the_size_that_is_asked_for(read):
    good, _ = read(THEIRS, image_size=(32, 16), task="arm/push", instruction="go")
    assert good[0].observations["images/front"].shape == (11, 16, 32, 3)
    assert {(e.task, e.instruction) for e in good} == {("arm/push", "go")}
    assert len(good) == 5  # with one instruction for all, no episode is cut


def test_features_are_renamed_and_left_out(read):
    columns = {"goal": "observation.state", "observation.images.wrist": "", "reward": "next.reward"}
    good, _ = read(THEIRS, columns=columns)
    assert sorted(good[0].observations) == ["goal", "images/front"]
    with pytest.raises(ValueError, match=r"'observation.stat' \(closest: observation.state"):
        formats.open_source(THEIRS, options=ReadOptions(columns={"goal": "observation.stat"}))


def test_without_statistics_bounds_come_from_the_data(theirs):
    wide = formats.open_source(theirs).tasks["lerobot/theirs"].action_space
    assert np.array_equal(wide.high, [1, 1])  # all actions lie inside
    stats = json.loads((theirs / "meta/stats.json").read_text())
    stats["action"] |= {"min": [-2.5, -1.0], "max": [0.5, 3.0]}
    (theirs / "meta/stats.json").write_text(json.dumps(stats))
    told = formats.open_source(theirs).tasks["lerobot/theirs"].action_space
    assert (told.low.tolist(), told.high.tolist()) == ([-2.5, -1.0], [0.5, 3.0])
    (theirs / "meta/stats.json").unlink()
    assert formats.open_source(theirs).tasks["lerobot/theirs"].action_space == wide


def test_actions_outside_the_bounds_are_bad_or_clipped(theirs, read):
    stats = json.loads((theirs / "meta/stats.json").read_text())
    stats["action"] |= {"min": [-2.0, 0.0], "max": [2.0, 0.1]}
    (theirs / "meta/stats.json").write_text(json.dumps(stats))
    _, bad = read(theirs)
    assert bad
    assert all("'action' inside its space" in item.reason for item in bad)
    source = formats.open_source(theirs, options=ReadOptions(clip_actions=True))
    assert all(isinstance(item, Episode) for item in source.read())
    assert source.counts["numbers of actions clipped"] > 0


# what it refuses


@pytest.mark.parametrize("version", ["v2.0", "v2.1", "v4.0", None])
def test_another_version_is_refused_with_the_converter(theirs, version):
    describe(theirs, codebase_version=version)
    with pytest.raises(ValueError, match=r"version v3.0 at .*; got .*convert_dataset_v21_to_v30"):
        formats.open_source(theirs)


@pytest.mark.parametrize(
    ("feature", "said"),
    [
        ({"dtype": "complex64", "shape": [2]}, "'complex64'"),
        ({"dtype": "video", "shape": [64, 64, 1], "info": {"is_depth_map": True}}, "a depth map"),
        ({"dtype": "image", "shape": [64, 64]}, "'image' of shape"),
        ({"dtype": "float32", "shape": [0]}, "'float32' of shape"),
        ({"dtype": "float32", "shape": ["many"]}, "'float32' of shape"),
        ({"dtype": "image", "shape": [30_000, 30_000, 3]}, "'image' of shape"),
    ],
)
def test_a_feature_that_cannot_be_mapped_is_named(theirs, feature, said):
    features = json.loads((theirs / "meta/info.json").read_text())["features"]
    describe(theirs, features={**features, "observation.odd": feature})
    rows = theirs / "meta/episodes/chunk-000/file-000.parquet"
    if feature["dtype"] == "video":
        table = parquet.read_table(rows)
        for name in ("chunk_index", "file_index", "from_timestamp", "to_timestamp"):
            column = table[f"videos/observation.images.front/{name}"]
            table = table.append_column(f"videos/observation.odd/{name}", column)
        parquet.write_table(table, rows)
    with pytest.raises(ValueError, match=rf"'observation.odd'; got {said}.*--columns") as error:
        formats.open_source(theirs)
    assert "observation.odd=" in str(error.value)
    options = ReadOptions(columns={"observation.odd": ""})
    assert "observation.odd" in str(formats.open_source(theirs, options=options).notes)


@pytest.mark.parametrize("role", ["observation.odd", "action"])
@pytest.mark.parametrize("shape", [[60_000, 60_000], [1 << 62, 4], [2**24 + 1]])
def test_a_feature_of_too_many_numbers_is_refused(theirs, shape, role):
    features = json.loads((theirs / "meta/info.json").read_text())["features"]
    describe(theirs, features={**features, role: {"dtype": "float64", "shape": shape}})
    with pytest.raises(ValueError, match=rf"at most 16,777,216 numbers .* '{role}' is of shape"):
        formats.open_source(theirs)


@pytest.mark.parametrize(
    "name",
    [
        "{chunk_index:>200000000}",
        "{chunk_index:0999999999d}",
        "{chunk_index[0]}",
        "{chunk_index.real}",
        "{chunk_index!r}",
        "{chunk_index:{file_index}}",
        "{}",
        "{other}",
        "{{chunk_index}}",
        "{chunk_index",
    ],
)
def test_names_of_files_are_no_formats(theirs, read, name):
    describe(theirs, data_path=name)
    good, bad = read(theirs)
    assert not good
    assert all("expected names of files in meta/info.json" in item.reason for item in bad)
    assert lerobot_files.file_name("a-{file_index:03d}/{key}", file_index=7, key="b") == "a-007/b"


def test_data_without_actions_or_observations_are_refused(theirs):
    features = json.loads((theirs / "meta/info.json").read_text())["features"]
    describe(theirs, features={k: v for k, v in features.items() if k != "action"})
    with pytest.raises(ValueError, match="expected a feature 'action'"):
        formats.open_source(theirs)
    describe(theirs, features={k: v for k, v in features.items() if "observation" not in k})
    with pytest.raises(ValueError, match=r"expected features 'observation\.\*'"):
        formats.open_source(theirs)


def test_unknown_splits_and_missing_episodes_are_told(theirs):
    with pytest.raises(ValueError, match=r"expected a split .*\(train\); got 'test'"):
        formats.open_source(theirs, options=ReadOptions(split="test"))
    describe(theirs, splits={"train": "0:3", "test": "3:5"})
    assert formats.open_source(theirs, options=ReadOptions(split="test")).steps == 34
    describe(theirs, total_episodes=9)
    with pytest.raises(ValueError, match="expected 9 episodes"):
        formats.open_source(theirs)
    describe(theirs, total_episodes=5)
    file = theirs / "meta/episodes/chunk-000/file-000.parquet"
    table = parquet.read_table(file)
    at = table.schema.get_field_index("length")
    parquet.write_table(table.set_column(at, "length", [[None, 12, 14, 16, 18]]), file)
    with pytest.raises(ValueError, match="every row of 'length'"):
        formats.open_source(theirs)


def test_damaged_episodes_are_bad_items_and_the_others_are_read(theirs, read):
    video = theirs / "videos/observation.images.front/chunk-000/file-001.mp4"
    video.write_bytes(video.read_bytes()[:500])
    good, bad = read(theirs)
    assert good
    assert bad
    assert all("file-001.mp4" in item.reason for item in bad)
    video.unlink()
    _, gone = read(theirs)
    assert [b.where for b in gone] == [b.where for b in bad]
    assert all("there is none" in item.reason for item in gone)


@pytest.mark.parametrize(
    "name",
    ["meta/info.json", "meta/tasks.parquet", "meta/episodes/chunk-000/file-000.parquet"],
)
def test_damaged_descriptions_are_named(theirs, name):
    content = (theirs / name).read_bytes()
    for damaged in (b"", b"PAR1 nothing of the kind", content[: len(content) // 2]):
        (theirs / name).write_bytes(damaged)
        with pytest.raises(ValueError, match=name):
            formats.open_source(theirs, "lerobot")
    (theirs / name).unlink()
    with pytest.raises(ValueError, match=name):
        formats.open_source(theirs, "lerobot")


def test_damaged_tables_are_bad_items(theirs, read):
    file = theirs / "data/chunk-000/file-000.parquet"
    table = parquet.read_table(file)
    at = table.schema.get_field_index("timestamp")
    for wrong, said in (("task_index", "timestamps that rise"), ("index", "expected a frame at")):
        changed = table.set_column(at, "timestamp", table[wrong].cast("float"))
        parquet.write_table(changed, file)
        good, bad = read(theirs)
        assert [e.seed for e in good] == [4, 4]  # its frames are in another file
        assert len(bad) == 4
        assert all(said in item.reason for item in bad)
    parquet.write_table(table.drop_columns("observation.state"), file)
    assert all("'observation.state' in data/chunk-000" in b.reason for b in read(theirs)[1])
    parquet.write_table(table.slice(3), file)
    assert "expected 10 frames" in read(theirs)[1][0].reason
    for wrong in ("{nothing}/{chunk_index}", "{chunk_index", "data/none.parquet"):
        describe(theirs, data_path=wrong)
        assert not read(theirs)[0]


def test_whatever_is_damaged_ends_in_a_sentence(theirs):
    """A byte here and there, or an end cut off: bad items or a ValueError, never another."""
    rng = np.random.default_rng(0)
    names = ["meta/info.json", "meta/stats.json", "meta/tasks.parquet"]
    names += [p.relative_to(theirs).as_posix() for p in theirs.glob("[mdv]*/**/file-*")]
    told = 0
    for _ in range(60):
        file = theirs / str(rng.choice(names))
        whole = file.read_bytes()
        damaged = bytearray(whole[: rng.integers(len(whole))] if rng.random() < 0.3 else whole)
        for at in rng.integers(len(damaged), size=3) if damaged else ():
            damaged[at] = rng.integers(256)
        file.write_bytes(damaged)
        try:
            items = list(formats.open_source(theirs, "lerobot").read())
            told += any(isinstance(item, BadItem) for item in items)
        except ValueError:
            told += 1
        file.write_bytes(whole)
    assert told > 30


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"features": {"action": 3}}, "description of feature 'action' in meta/info.json; got 3"),
        ({"features": []}, "expected 'features' in meta/info.json"),
        ({"splits": ["train"]}, "expected splits by name in meta/info.json"),
        (
            {"features": {"action": {"dtype": "image", "shape": [8, 8, 3], "info": [1]}}},
            "folder meta",
        ),
    ],
)
def test_descriptions_of_another_form_are_named(theirs, changes, said):
    describe(theirs, **changes)
    with pytest.raises(ValueError, match=said):
        formats.open_source(theirs)


@pytest.mark.parametrize(
    ("name", "content"), [("info", []), ("info", None), ("stats", []), ("stats", {"action": 1})]
)
def test_descriptions_that_are_no_objects_are_told(theirs, name, content):
    (theirs / f"meta/{name}.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"meta/info.json|what its folder meta says is damaged"):
        formats.open_source(theirs, "lerobot")


@pytest.mark.parametrize("fps", [0, -1, float("inf"), "10"])
def test_a_rate_that_is_none_is_refused(theirs, fps):
    describe(theirs, fps=fps)
    with pytest.raises(ValueError, match="fps"):
        formats.open_source(theirs)


def test_data_that_point_outside_their_folder_are_refused(theirs, read):
    describe(theirs, data_path="../../{chunk_index}/{file_index}/secret.parquet")
    good, bad = read(theirs)
    assert not good
    assert all("below the data's folder" in item.reason for item in bad)


# what we write


@pytest.mark.parametrize("images", lerobot_writer.IMAGES)
def test_a_store_comes_back_as_it_was(tmp_path, images):
    store = make_store(tmp_path / "store")
    loss = lerobot_writer.export(store, tmp_path / "out", images=images)
    source = formats.open_source(tmp_path / "out")
    summary = import_source(source, tmp_path / "back")
    back = EpisodeStore(summary.stores[0])
    back.validate()
    assert back.spec.to_json() == store.spec.to_json()
    assert (back.settings, back.manifest["versions"]) == (
        store.settings,
        store.manifest["versions"],
    )
    pictures = ("camera", "images/side")
    lossy = pictures if images == "video" else ()
    for i in range(len(store)):
        assert_same(back.episode(i), store.episode(i), but=lossy)
    assert len(back) == len(store)
    if images == "png":
        assert loss == {}
        return
    for path, told in zip(pictures, loss.values(), strict=True):
        pairs = [(back.episode(i), store.episode(i)) for i in range(len(store))]
        differences = np.concatenate(
            [
                np.abs(a.observations[path][:-1].astype(int) - b.observations[path][:-1]).ravel()
                for a, b in pairs
            ]
        )
        # few episodes: the loss was measured on all of them
        assert told["greatest"] == differences.max()
        assert told["mean"] == pytest.approx(differences.mean())
        assert told["mean"] <= (2 if images == "video" else 0)
        kept = json.loads((tmp_path / "out/meta/gato/store.json").read_text())
        assert kept["loss"] == loss


def test_what_lerobot_reads_of_ours_is_what_was_written(tmp_path):
    """LeRobot has read one export; this one has the same form and says the same."""
    recorded = json.loads((FIXTURES / "lerobot_reads.json").read_text())
    store = make_store(tmp_path / "store")
    lerobot_writer.export(store, tmp_path / "out")
    assert json.loads((tmp_path / "out/meta/info.json").read_text()) == recorded["info"]
    for name, schema in recorded["tables"].items():
        got = parquet.read_schema(tmp_path / "out" / name)
        assert [[f.name, str(f.type)] for f in got] == schema, name
    assert recorded["lengths"] == store.lengths.tolist()
    items = iter(recorded["items"])
    for one in (store.episode(i) for i in range(len(store))):
        for step in range(len(one)):
            item = next(items)
            assert item["task"] == one.instruction or (one.task, item["task"]) == (TASK.id,) * 2
            assert item["observation.note"] == one.observations["note"][step]
            # torch makes single precision of Python's floats
            single = one.observations["state"][step].astype(np.float32)
            assert item["observation.state"] == single.tolist()
            for name in ("grid", "touch", "held"):
                assert item[f"observation.{name}"] == one.observations[name][step].tolist()
            assert item["action.arm"] == one.actions["arm"][step].tolist()
            assert item["action.grip"] == int(one.actions["grip"][step])
            assert item["target.arm"] == one.targets["arm"][step].tolist()
            assert item["next.reward"] == float(one.rewards[step])
            last = step == len(one) - 1
            assert item["next.done"] == last
            assert item["next.success"] == (last and one.success is True)
            assert item["timestamp"] == pytest.approx(step / 12.5)
            mean = one.observations["camera"][step].mean((0, 1))
            assert item["observation.images.camera"] == pytest.approx(mean, abs=1.5)
            assert item["observation.images.camera shape"] == [3, 48, 64]
    assert next(items, None) is None


def test_several_files_and_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(lerobot_files, "DATA_MB", 0)
    monkeypatch.setattr(lerobot_files, "VIDEO_MB", 0)
    monkeypatch.setattr(lerobot_files, "CHUNK", 2)
    monkeypatch.setattr("gato.envs.readers.lerobot_kept.PER_FILE", 2)
    store = make_store(tmp_path / "store")
    out = tmp_path / "out"
    command = ["data", "export", str(store.path), "--format", "lerobot", "--out", str(out)]
    assert cli.main([*command, "--images", "lossless", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["lost of pictures"] == "nothing"
    lossy = ["data", "export", str(store.path), "--format", "lerobot", "--json", "--out"]
    assert cli.main([*lossy, str(tmp_path / "lossy")]) == 0
    told = json.loads(capsys.readouterr().out)[0]["lost of pictures"]
    assert "observation.images.camera: " in told
    assert " of 255 in the mean, " in told
    assert len(list(out.glob("data/*/*.parquet"))) == 5
    assert len(list(out.glob("videos/*/*/*.mp4"))) == 10
    assert (out / "data/chunk-002/file-000.parquet").is_file()
    assert cli.main(["data", "import", str(out), "--out", str(tmp_path / "back"), "--json"]) == 0
    back = EpisodeStore(tmp_path / "back/toy/hand-v0")
    for i in range(len(store)):
        assert_same(back.episode(i), store.episode(i))
    capsys.readouterr()
    assert cli.main(["data", "info", str(out)]) == 0
    assert "as exported" in " ".join(capsys.readouterr().out.split())
    assert cli.main(command) == 2  # it is there already
    other = ["data", "export", str(store.path), "--format", "minari", "--images", "png"]
    assert cli.main([*other, "--out", str(tmp_path / "no")]) == 2
    assert "--format lerobot" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["short", "other", "column", "none"])
def test_damage_in_what_was_kept_is_told(tmp_path, read, damage):
    lerobot_writer.export(make_store(tmp_path / "store", 3), tmp_path / "out", images="png")
    file = tmp_path / "out/meta/gato/episodes-00000.parquet"
    table = parquet.read_table(file)
    changed = {
        "short": table.slice(0, 2),
        "other": table.take([0, 1, 1]),
        "column": table.drop_columns(["seed"]),
        "none": table.set_column(
            table.schema.get_field_index("success"), "success", [[-1, 1, None]]
        ),
    }
    parquet.write_table(changed[damage], file)
    good, bad = read(tmp_path / "out")
    assert len(good) == (0 if damage == "column" else 2)
    said = {"short": "no 'episode_index'", "other": "episode 1", "column": "no 'seed'"}
    for item in bad:
        wanted = f"episodes-00000.parquet; got {said[damage]}" if damage in said else "damaged: "
        assert wanted in item.reason


def test_an_export_that_was_changed_is_read_as_lerobots(tmp_path, read):
    lerobot_writer.export(make_store(tmp_path / "store", 3), tmp_path / "out", images="png")
    rows = tmp_path / "out/meta/episodes/chunk-000/file-000.parquet"
    parquet.write_table(parquet.read_table(rows).slice(0, 2), rows)
    describe(tmp_path / "out", total_episodes=2, splits={"train": "0:2"})
    source = formats.open_source(tmp_path / "out")
    assert any("changed after the export" in note for note in source.notes)
    assert list(source.tasks) == ["lerobot/out"]
    (tmp_path / "out/meta/gato/store.json").write_text("{}")
    with pytest.raises(ValueError, match="Remove meta/gato"):
        formats.open_source(tmp_path / "out")


def test_stores_that_lerobot_cannot_hold_are_refused(tmp_path):
    clash = replace(
        TASK,
        observation_space=spaces.Dict(
            {"a.b": spaces.Discrete(2), "a": spaces.Dict({"b": spaces.Discrete(2)})}
        ),
        action_space=spaces.Discrete(2),
    )
    two = np.zeros(3, int)
    one = Episode(clash.id, {"a.b": two, "a/b": two}, {"action": two[1:]}, *np.zeros((3, 2)))
    with EpisodeWriter(tmp_path / "store", clash) as writer:
        writer.append(replace(one, terminated=two[1:] > 0, truncated=two[1:] > 0))
    with pytest.raises(ValueError, match=r"would become the feature 'observation\.a\.b'"):
        lerobot_writer.export(EpisodeStore(tmp_path / "store"), tmp_path / "out")
    with EpisodeWriter(tmp_path / "empty", clash):
        pass
    with pytest.raises(ValueError, match="it is empty"):
        lerobot_writer.export(EpisodeStore(tmp_path / "empty"), tmp_path / "out")
    with pytest.raises(ValueError, match="images as one of video, lossless, png"):
        lerobot_writer.export(make_store(tmp_path / "s", 1), tmp_path / "out", images="jpeg")


def test_statistics_are_those_of_all_frames_at_once():
    rng = np.random.default_rng(0)
    parts = [rng.normal(size=(n, 3)) for n in (1, 7, 20)]
    flags = [rng.random(len(p)) < 0.5 for p in parts]
    pictures = [rng.integers(256, size=(len(p), 8, 8, 3), dtype=np.uint8) for p in parts]
    statistics = Statistics()
    for part, flag, frames in zip(parts, flags, pictures, strict=True):
        statistics.append({"x": part, "flag": flag}, {"camera": frames})
    whole, all_ = statistics.whole(), np.concatenate(parts)
    for name in ("min", "max", "mean", "std"):
        assert whole["x"][name] == pytest.approx(getattr(all_, name)(0))
    assert whole["x"]["count"] == [28]
    assert whole["flag"]["mean"] == [pytest.approx(np.concatenate(flags).mean())]
    seen = np.concatenate(pictures).reshape(-1, 3) / 255
    assert np.shape(whole["camera"]["mean"]) == (3, 1, 1)
    assert np.ravel(whole["camera"]["std"]) == pytest.approx(seen.std(0))


# videos


@pytest.mark.parametrize("rate", [1, 12.5, 29.97, 100 / 3, 240])
def test_frames_are_found_by_their_time(tmp_path, rate):
    from fractions import Fraction

    fps = Fraction(rate).limit_denominator(1000)
    frames = [np.full((16, 16, 3), 8 * i, np.uint8) for i in range(30)]
    with VideoWriter(tmp_path / "a.mp4", fps, "lossless", (16, 16)) as video:
        for i, frame in enumerate(frames):
            video.append(frame, starts=i % 7 == 0)
    chosen = [0, 3, 4, 11, 29]
    times = [i / float(fps) for i in chosen]
    found = list(frames_at(tmp_path / "a.mp4", times, 0.1 / float(fps)))
    assert [int(f[0, 0, 0]) for f in found] == [8 * i for i in chosen]
    with pytest.raises(ValueError, match=r"expected a frame at .*; got the nearest at"):
        list(frames_at(tmp_path / "a.mp4", [31 / float(fps)], 0.1 / float(fps)))


def test_what_is_no_video_is_told(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"nothing of the kind" * 40)
    with pytest.raises(ValueError, match=r"expected a video in .*a\.mp4"):
        list(frames_at(tmp_path / "a.mp4", [0.0], 0.1))


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ValueError, match=r'videos need PyAV.*pip install "gato\[video\]"'):
        formats.open_source(THEIRS)
    formats.open_source(THEIRS, options=ReadOptions(columns={"observation.images.front": ""}))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ValueError, match=r'pip install "gato\[readers\]"'):
        formats.open_source(THEIRS)


def test_bad_items_are_not_hidden_by_an_import(theirs, tmp_path):
    (theirs / "videos/observation.images.front/chunk-000/file-001.mp4").unlink()
    source = formats.open_source(theirs)
    with pytest.raises(ValueError, match=r"episode 4: .*--skip-bad"):
        import_source(source, tmp_path / "out")
    summary = import_source(source, tmp_path / "out", skip_bad=True)
    assert (summary.kept, sum(summary.skipped.values())) == (4, 1)
    assert isinstance(next(iter(source.read())), Episode)
    assert isinstance(list(source.read())[-1], BadItem)


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        lerobot_writer.export(make_store(Path(folder) / "store"), Path(sys.argv[1]))
