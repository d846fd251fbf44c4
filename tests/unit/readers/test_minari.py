"""Data that Minari itself has written, and stores of ours through Minari and back."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import minari
import numpy as np
import pytest
from gymnasium import spaces
from minari.data_collector.episode_buffer import EpisodeBuffer

from gato import cli
from gato.envs.episode import ANY_TEXT, Episode, TaskSpec, flatten_space
from gato.envs.readers import formats, importing, minari_writer
from gato.envs.readers.reader import ReadOptions
from gato.envs.store import EpisodeStore, EpisodeWriter

STEPS = 9
OBSERVED = spaces.Dict(
    {
        "camera": spaces.Box(0, 255, (32, 48, 3), np.uint8),
        "mission": spaces.Text(64),
        "parts": spaces.Tuple((spaces.Discrete(3), spaces.Box(-1, 1, (2,), np.float64))),
    }
)
DONE = spaces.Box(-1, 1, (2,), np.float32)


def buffer(seed: int, **changed: Any) -> EpisodeBuffer:
    """Return an episode whose best action is plain from what is seen."""
    rng = np.random.default_rng(seed)
    side = int(seed % 2)
    camera = rng.integers(0, 40, (STEPS + 1, 32, 48, 3), np.uint8)
    camera[:, :, :24] += np.uint8(200 * side)
    parts = (np.full(STEPS + 1, side), rng.uniform(-1, 1, (STEPS + 1, 2)))
    ends = np.arange(STEPS) == STEPS - 1
    return EpisodeBuffer(
        **{
            "seed": seed,
            "observations": {
                "camera": camera,
                "mission": [f"go {('left', 'right')[side]}"] * (STEPS + 1),
                "parts": parts,
            },
            "actions": np.full((STEPS, 2), side - 0.5, np.float32),
            "rewards": np.arange(STEPS) / 4,
            "terminations": ends,
            "truncations": np.zeros(STEPS, bool),
            "infos": {"success": [bool(i == STEPS * side) for i in range(STEPS + 1)]},
            **changed,
        }
    )


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function with which Minari itself writes a data set, and its id."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))

    def write(buffers: list[EpisodeBuffer], name: str = "toy/walk/few-v0", **options: Any) -> str:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it is told little of where they are from
            minari.create_dataset_from_buffers(
                name,
                buffers,
                **{
                    "observation_space": OBSERVED,
                    "action_space": DONE,
                    "data_format": "hdf5",
                    "jpeg_encoding": False,
                    **options,
                },
            )
        return f"minari:{name}"

    return write


def folder_of(tmp_path: Path, name: str) -> Path:
    """Return where Minari keeps a data set of that name."""
    return tmp_path / "minari" / name.removeprefix("minari:")


@pytest.mark.parametrize("data_format", ["hdf5", "arrow", "parquet"])
@pytest.mark.parametrize("by_id", [True, False])
def test_what_minari_has_written_is_read(written, tmp_path, data_format, by_id):
    name = written([buffer(seed) for seed in (3, 4, 5)], data_format=data_format)
    location = name if by_id else str(folder_of(tmp_path, name))
    source = formats.open_source(location)
    assert (source.format, source.items, source.steps) == ("minari", 3, 3 * STEPS)
    spec = source.tasks["minari/toy/walk/few-v0"]
    assert spec.observation_space["camera"].shape == (32, 48, 3)
    assert flatten_space(spec.observation_space, "").keys() == {
        *("camera", "mission", "parts/000", "parts/001")
    }
    for seed, episode in zip((3, 4, 5), source.read(), strict=True):
        sent = buffer(seed)
        assert episode.seed == seed
        assert np.array_equal(episode.observations["camera"], sent.observations["camera"])
        assert episode.observations["mission"] == sent.observations["mission"]
        assert np.array_equal(episode.observations["parts/001"], sent.observations["parts"][1])
        assert np.array_equal(episode.actions["action"], sent.actions)
        assert np.array_equal(episode.rewards, sent.rewards)
        assert np.array_equal(episode.terminated, sent.terminations)
        assert not episode.truncated.any()
        assert episode.success == bool(seed % 2)


def test_it_trains(written, trains, tmp_path):
    name = written([buffer(seed) for seed in range(6)])
    out = tmp_path / "store"
    importing.import_source(formats.open_source(name), out)
    first, last = trains(out)
    assert last < 0.7 * first


def test_train_imports_what_is_no_store(written, tmp_path, monkeypatch):
    monkeypatch.setenv("GATO_CACHE", str(tmp_path / "cache"))
    name = written([buffer(seed) for seed in range(3)])
    path = importing.cached(folder_of(tmp_path, name))
    assert importing.is_store(path)
    before = {p: p.stat().st_mtime_ns for p in path.rglob("*")}
    assert importing.cached(folder_of(tmp_path, name)) == path
    assert {p: p.stat().st_mtime_ns for p in path.rglob("*")} == before
    assert importing.cached(name) != path  # the same data under another name
    by_name = importing.cached(name)
    changed = minari.load_dataset(name.removeprefix("minari:"))
    changed.update_dataset_from_buffer([buffer(9)])
    assert importing.cached(folder_of(tmp_path, name)) != path
    assert importing.cached(name) != by_name


def test_scores_and_the_world_are_told(written):
    rows = [
        replace(buffer(1), observations=np.zeros((STEPS + 1, 4), np.float32), actions=[1] * STEPS)
    ]
    name = written(
        rows,
        env="CartPole-v1",
        observation_space=spaces.Box(-1, 1, (4,)),
        action_space=spaces.Discrete(2),
        ref_min_score=9.0,
        ref_max_score=500.0,
    )
    source = formats.open_source(name)
    (spec,) = source.tasks.values()
    assert (spec.random_score, spec.expert_score, spec.max_steps) == (9.0, 500.0, 500)
    assert spec.instruction == "toy walk few"
    assert any("gym/CartPole-v1" in note for note in source.notes)
    renamed = formats.open_source(name, options=ReadOptions(task="gym/CartPole-v1"))
    assert list(renamed.tasks) == ["gym/CartPole-v1"]


@pytest.mark.parametrize(
    ("shape", "becomes", "cut"),
    [
        ((32, 40), (32, 40, 1), lambda x: x[..., None]),
        ((3, 32, 40), (32, 40, 3), lambda x: np.moveaxis(x, 1, -1)),
        ((4, 32, 40), (32, 40, 1), lambda x: x[:, 3, :, :, None]),
        ((32, 40, 4), (32, 40, 1), lambda x: x[..., 3:]),
    ],
)
def test_pictures_of_other_layouts_become_ours(written, shape, becomes, cut):
    pictures = np.random.default_rng(0).integers(0, 256, (STEPS + 1, *shape), np.uint8)
    name = written(
        [buffer(0, observations=pictures)], observation_space=spaces.Box(0, 255, shape, np.uint8)
    )
    source = formats.open_source(name)
    (episode,) = source.read()
    assert next(iter(source.tasks.values())).observation_space.shape == becomes
    assert np.array_equal(episode.observations["observation"], cut(pictures))
    assert "picture" in source.fields["observations: observation"]
    sized = formats.open_source(name, options=ReadOptions(image_size=(48, 16)))
    (episode,) = sized.read()
    assert episode.observations["observation"].shape == (STEPS + 1, 16, 48, 3)


def test_actions_outside_their_space_are_refused_or_clipped_and_counted(written, tmp_path):
    wild = np.full((STEPS, 2), 0.5, np.float32)
    wild[3, 1] = -19.8
    name = written([buffer(0), buffer(1, actions=wild)])
    with pytest.raises(ValueError, match=r"episode 1: action 'action'.*-19\.8 at \(3, 1\)"):
        importing.import_source(formats.open_source(name), tmp_path / "a")
    assert not (tmp_path / "a").exists()
    source = formats.open_source(name, options=ReadOptions(clip_actions=True))
    summary = importing.import_source(source, tmp_path / "b")
    assert sum(summary.counts.values()) == 1
    stored = EpisodeStore(summary.stores[0]).episode(1)
    assert stored.actions["action"][3].tolist() == [0.5, -1.0]


def test_an_action_space_that_changes_is_named_or_counted(written, tmp_path):
    name = written([buffer(0), buffer(1, actions=np.zeros((STEPS, 3), np.float32)), buffer(2)])
    with pytest.raises(ValueError, match=r"episode 1: .* \(2,\) in \[-1, 1\]; got float32 \(3,\)"):
        importing.import_source(formats.open_source(name), tmp_path / "a")
    summary = importing.import_source(formats.open_source(name), tmp_path / "a", skip_bad=True)
    assert (summary.kept, sum(summary.skipped.values())) == (2, 1)
    assert "episode 1" in next(iter(summary.first.values()))


def test_pictures_that_minari_has_made_jpeg_are_told(written):
    source = formats.open_source(written([buffer(0)], jpeg_encoding=True))
    (episode,) = source.read()
    sent = buffer(0).observations["camera"]
    assert np.abs(episode.observations["camera"].astype(int) - sent).mean() < 20
    assert any("JPEG" in note for note in source.notes)


def test_a_data_set_without_spaces_starts_no_environment(written, tmp_path):
    name = written([buffer(0)])
    file = folder_of(tmp_path, name) / "data" / "metadata.json"
    metadata = json.loads(file.read_text())
    del metadata["action_space"]
    file.write_text(json.dumps({**metadata, "env_spec": '{"id": "evil:Evil-v0"}'}))
    with pytest.raises(ValueError, match="expected 'action_space' in"):
        formats.open_source(name)


def test_a_split_that_is_not_there_is_refused(written):
    name = written([buffer(0)])
    with pytest.raises(ValueError, match="--split means nothing to format 'minari'; got 'test'"):
        formats.open_source(name, options=ReadOptions(split="test"))


@pytest.mark.parametrize("kind", ["Box", "MultiBinary"])
def test_a_space_of_too_many_numbers_is_not_made(written, tmp_path, kind):
    name = written([buffer(0)])
    file = folder_of(tmp_path, name) / "data" / "metadata.json"
    metadata = json.loads(file.read_text())
    shape = [60_000, 60_000]
    box = {"type": "Box", "dtype": "float32", "shape": shape, "low": -1.0, "high": 1.0}
    large = box if kind == "Box" else {"type": kind, "n": shape}
    space = {"type": "Dict", "subspaces": {"a": {"type": "Tuple", "subspaces": [large]}}}
    file.write_text(json.dumps({**metadata, "observation_space": json.dumps(space)}))
    with pytest.raises(ValueError, match=r"at most 16,777,216 numbers .*; got 3,600,000,000"):
        formats.open_source(name)
    spec = {"observation_space": {**large, "shape": shape}}
    kept = {"spec": spec, "settings": {}, "versions": {}}
    file.write_text(json.dumps({**metadata, "gato": kept}))
    with pytest.raises(ValueError, match="at most 16,777,216 numbers"):
        formats.open_source(name)


def test_what_is_not_on_this_machine_is_named_with_what_fetches_it(written):
    written([buffer(0)])
    with pytest.raises(ValueError, match="fetch it first: minari download D4RL/door/human-v2"):
        formats.open_source("minari:D4RL/door/human-v2")
    with pytest.raises(ValueError, match="no such file or folder"):
        formats.open_source("D4RL/door/human-v2")


def test_a_damaged_file_is_named(written, tmp_path):
    name = written([buffer(seed) for seed in range(3)])
    (folder_of(tmp_path, name) / "data" / "main_data.hdf5").write_bytes(b"no HDF5")
    with pytest.raises(ValueError, match=r"a Minari data set at minari:toy/walk/few-v0; .*signat"):
        formats.open_source(name)


@pytest.mark.sim
def test_a_grid_world_with_its_mission(written, tmp_path):
    pytest.importorskip("minigrid")
    env = gym.make("BabyAI-GoToRedBallGrey-v0")
    buffers = []
    for seed in range(3):
        seen = [env.reset(seed=seed)[0]]
        env.action_space.seed(seed)
        actions = [int(env.action_space.sample()) for _ in range(6)]
        results = [env.step(action) for action in actions]
        seen += [result[0] for result in results]
        observations = {
            "direction": np.array([o["direction"] for o in seen]),
            "image": np.stack([o["image"] for o in seen]),
            "mission": [o["mission"] for o in seen],
        }
        ends = np.arange(6) == 5
        buffers.append(
            buffer(
                seed,
                observations=observations,
                actions=np.array(actions),
                rewards=[result[1] for result in results],
                terminations=[False] * 6,
                truncations=ends,
                infos=None,
            )
        )
    env.close()
    space = spaces.Dict(
        {
            "direction": spaces.Discrete(4),
            "image": spaces.Box(0, 255, (7, 7, 3), np.uint8),
            "mission": spaces.Text(64),
        }
    )
    name = written(buffers, observation_space=space, action_space=spaces.Discrete(7))
    summary = importing.import_source(formats.open_source(name), tmp_path / "out")
    store = EpisodeStore(summary.stores[0])
    assert store.spec.instruction == ""  # the mission says it
    for seed, sent in enumerate(buffers):
        episode = store.episode(seed)
        assert episode.observations["mission"] == sent.observations["mission"]
        assert "red ball" in episode.observations["mission"][0]
        assert np.array_equal(episode.observations["image"], sent.observations["image"])
        assert np.array_equal(episode.actions["action"], sent.actions)
        assert episode.truncated.tolist() == [False] * 5 + [True]
        assert episode.seed == seed


def full_spec() -> TaskSpec:
    """Return a task with every kind of space."""
    return TaskSpec(
        id="toy/everything-v3?camera=a",
        observation_space=spaces.Dict(
            {
                "grey": spaces.Box(0, 255, (32, 33), np.uint8),
                "stack": spaces.Box(0, 255, (4, 32, 32), np.uint8),
                "camera": spaces.Box(0, 255, (48, 32, 3), np.uint8),
                "grid": spaces.MultiDiscrete(np.full((3, 3, 2), 5), dtype=np.uint8),
                "mission": ANY_TEXT(),
                "nested": spaces.Dict(
                    {"flags": spaces.MultiBinary(3), "x y.z": spaces.Box(-9, 9, (2,), np.float64)}
                ),
                "pair": spaces.Tuple((spaces.Discrete(4, start=-1), ANY_TEXT())),
            }
        ),
        action_space=spaces.Dict(
            {
                "arm": spaces.Box(np.array([-1, -3], np.float32), np.array([1, 3], np.float32)),
                "button": spaces.Discrete(5),
                "keys": spaces.MultiDiscrete([2, 3]),
            }
        ),
        max_steps=20,
        control_hz=12.5,
        instruction="do everything",
        measure="success",
        random_score=0.1,
        expert_score=0.9,
        score_source="measured",
        expert="scripted",
    )


def full_episode(spec: TaskSpec, seed: int, targets: bool) -> Episode:
    """Return a random episode of `full_spec`, texts of all kinds in it."""
    rng = np.random.default_rng(seed)
    steps = 3 + seed
    spec.observation_space.seed(seed)
    spec.action_space.seed(seed)

    def columns(space: gym.Space, name: str, rows: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for path, leaf in flatten_space(space, name).items():
            if isinstance(leaf, spaces.Text):
                found[path] = [f"“{path}” grün, step {i}\n" for i in range(rows)]
            else:
                found[path] = np.stack([np.asarray(leaf.sample()) for _ in range(rows)])
        return found

    ends = np.arange(steps) == steps - 1
    return Episode(
        task=spec.id,
        observations=columns(spec.observation_space, "observation", steps + 1),
        actions=columns(spec.action_space, "action", steps),
        rewards=rng.normal(size=steps).astype(np.float32),
        terminated=ends & (seed % 2 == 0),
        truncated=ends & (seed % 2 == 1),
        targets=columns(spec.action_space, "action", steps) if targets else None,
        instruction=f"do everything, {seed}",
        seed=7 + seed,
        success=[None, True, False][seed % 3],
        info={"level": seed, "names": ["é", None, {"x": 0.1}]} if seed % 2 else {},
    )


def same(a: Episode, b: Episode) -> None:
    """Assert that two episodes are equal in every field, dtypes included."""
    for name in Episode.__dataclass_fields__:
        one, other = getattr(a, name), getattr(b, name)
        if not isinstance(one, dict) or name == "info":
            assert np.array_equal(one, other), name
            continue
        assert one.keys() == other.keys()
        for path, column in one.items():
            assert np.array_equal(column, other[path]), (name, path)
            if isinstance(column, np.ndarray):
                assert column.dtype == other[path].dtype, (name, path)


@pytest.mark.parametrize("targets", [True, False])
def test_a_store_comes_back_from_minari_as_it_was(tmp_path, targets, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)  # paths are relative
    tmp_path = Path()
    spec = full_spec()
    with EpisodeWriter(
        tmp_path / "ours", spec, settings={"expert": "scripted", "seed": 3}, versions={"toy": "1"}
    ) as writer:
        for seed in range(5):
            writer.append(full_episode(spec, seed, targets))
    command = ["data", "export", str(tmp_path / "ours"), "--format", "minari", "--json"]
    assert cli.main([*command, "--out", str(tmp_path / "there")]) == 0, capsys.readouterr().err
    back = ["data", "import", str(tmp_path / "there"), "--out", str(tmp_path / "back"), "--json"]
    assert cli.main(back) == 0, capsys.readouterr().err
    ours = EpisodeStore(tmp_path / "ours")
    again = EpisodeStore(tmp_path / "back" / "toy" / "everything-v3,camera-a")
    assert again.spec.to_json() == ours.spec.to_json()
    assert again.settings == ours.settings
    assert again.manifest["versions"] == ours.manifest["versions"]
    assert len(again) == len(ours) == 5
    for i in range(5):
        same(ours.episode(i), again.episode(i))
    assert again.manifest["shards"] == ours.manifest["shards"]  # byte for byte


def test_several_stores_come_back_from_one_folder(tmp_path):
    for number, targets in enumerate((True, False)):
        spec = replace(full_spec(), id=f"toy/part-{number}")
        with EpisodeWriter(tmp_path / "ours" / spec.id, spec, settings={"n": number}) as writer:
            for seed in range(2):
                writer.append(full_episode(spec, seed, targets))
    command = ["data", "export", str(tmp_path / "ours"), "--format", "minari"]
    assert cli.main([*command, "--out", str(tmp_path / "there")]) == 0
    source = formats.open_source(tmp_path / "there")
    assert (source.items, source.steps) == (4, 14)
    assert cli.main(["data", "import", str(tmp_path / "there"), "--out", str(tmp_path / "b")]) == 0
    for number in range(2):
        folder = f"toy/part-{number}"
        ours, again = (
            EpisodeStore(tmp_path / "ours" / folder),
            EpisodeStore(tmp_path / "b" / folder),
        )
        assert again.manifest == ours.manifest
    file = tmp_path / "there" / "toy" / "part-0" / "data" / "main_data.hdf5"
    file.write_bytes(b"no HDF5")
    with pytest.raises(ValueError, match="part-0/data: expected a Minari data set"):
        importing.import_source(formats.open_source(tmp_path / "there"), tmp_path / "c")
    summary = importing.import_source(
        formats.open_source(tmp_path / "there"), tmp_path / "c", skip_bad=True
    )
    assert (summary.kept, sum(summary.skipped.values())) == (2, 1)
    different = written_twice(tmp_path)
    with pytest.raises(ValueError, match="both called 'toy/x'"):
        formats.open_source(different, options=ReadOptions(task="toy/x"))


def written_twice(tmp_path: Path) -> Path:
    """Return a folder of two data sets of different spaces."""
    for number in range(2):
        spec = replace(full_spec(), id=f"toy/{number}", action_space=spaces.Discrete(2 + number))
        with EpisodeWriter(tmp_path / "two" / spec.id, spec) as writer:
            writer.append(full_episode(spec, number, False))
    stores = [EpisodeStore(tmp_path / "two" / "toy" / name) for name in "01"]
    formats.export(stores, "minari", tmp_path / "exported")
    return tmp_path / "exported"


@pytest.mark.parametrize("kept", [{"spec": {}}, {"settings": 1}, [1], {"spec": 2, "versions": {}}])
def test_what_was_kept_and_is_damaged_is_refused(tmp_path, kept):
    folder = written_twice(tmp_path) / "toy" / "0"
    file = folder / "data" / "metadata.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "gato": kept}))
    with pytest.raises(ValueError, match="expected spec, settings and versions as 'gato'"):
        formats.open_source(folder)


@pytest.mark.parametrize("seed", range(8))
def test_damage_anywhere_ends_in_an_error_or_counted_items(written, tmp_path, seed):
    rng = np.random.default_rng(seed)
    name = written([buffer(i) for i in range(3)])
    file = folder_of(tmp_path, name) / "data" / "main_data.hdf5"
    content = bytearray(file.read_bytes())
    content[rng.integers(2000, len(content))] ^= 255
    file.write_bytes(content if seed else content[: len(content) // 2])
    try:
        source = formats.open_source(name)
    except ValueError:  # any other error is a fault of ours
        return
    summary = importing.check_source(source)
    assert summary.kept + sum(summary.skipped.values()) == 3


def test_minari_itself_loads_what_was_exported(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "root"))
    spec = full_spec()
    episode = full_episode(spec, 1, True)
    with EpisodeWriter(tmp_path / "ours", spec) as writer:
        writer.append(episode)
    name = minari_writer.data_set_id(spec.id)
    formats.export([EpisodeStore(tmp_path / "ours")], "minari", tmp_path / "root" / name)
    data = minari.load_dataset(name)
    assert set(minari.list_local_datasets()) == {name}
    (read,) = data.iterate_episodes()
    assert data.spec.total_steps == len(episode)
    assert np.array_equal(read.observations["camera"], episode.observations["camera"])
    assert read.observations["pair"][1] == episode.observations["pair/001"]
    assert np.array_equal(read.actions["arm"], episode.actions["arm"])
    assert np.array_equal(read.terminations, episode.terminated)


def test_an_export_is_whole_or_not_there(tmp_path):
    spec = full_spec()
    good, bad = full_episode(spec, 0, False), full_episode(spec, 1, False)
    bad.observations["mission"][1] = "a\0b"
    with EpisodeWriter(tmp_path / "ours", spec) as writer:
        writer.append(good)
        writer.append(bad)
    store = EpisodeStore(tmp_path / "ours")
    with pytest.raises(ValueError, match=r"episode 1 of .*ours: expected text without NUL"):
        formats.export([store], "minari", tmp_path / "there")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ours"]
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(ValueError, match="is there already"):
        formats.export([store], "minari", tmp_path / "full")


def test_columns_of_different_lengths_are_refused(written, tmp_path):
    name = written([buffer(0, rewards=np.zeros(STEPS - 2)), buffer(1)])
    with pytest.raises(ValueError, match="item 0: expected 'camera' of shape"):
        importing.import_source(formats.open_source(name), tmp_path / "a")
