"""Episodes come back from disk as they went in, whatever happens to the writer."""

from __future__ import annotations

import json
import os
import pickle
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from gato.envs.episode import Episode
from gato.envs.store import EpisodeStore, EpisodeWriter


def assert_same(got: Episode, expected: Episode) -> None:
    for kind in ("observations", "actions", "targets"):
        a, b = getattr(got, kind), getattr(expected, kind)
        assert (a is None) == (b is None)
        for path in b or ():
            assert type(a[path]) is type(b[path])
            np.testing.assert_array_equal(a[path], b[path])
            if isinstance(b[path], np.ndarray):
                assert a[path].dtype == b[path].dtype
    for name in ("rewards", "terminated", "truncated"):
        np.testing.assert_array_equal(getattr(got, name), getattr(expected, name))
    for name in ("task", "instruction", "seed", "success", "info"):
        assert getattr(got, name) == getattr(expected, name)


def tree(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def write(path: Path, toy: ModuleType, seeds: range, shard_steps: int = 20) -> None:
    with EpisodeWriter(path, toy.SPEC, shard_steps) as writer:
        for seed in seeds:
            writer.append(toy.episode(seed))


def test_episodes_come_back(tmp_path: Path, toy: ModuleType) -> None:
    write(tmp_path, toy, range(17))
    store = EpisodeStore(tmp_path)
    assert len(store) == 17
    assert len(store._shards) > 2
    store.validate()
    for i in range(17):
        assert_same(store.episode(i), toy.episode(i))
    assert_same(store.episode(-1), toy.episode(16))
    assert store.lengths.tolist() == [len(toy.episode(i)) for i in range(17)]
    assert store.returns.tolist() == [toy.episode(i).score for i in range(17)]
    assert store.successes.tolist() == [[1, 0, -1][i % 3] for i in range(17)]
    assert store.spec.to_json() == toy.SPEC.to_json()


def test_windows_are_cut_from_episodes(tmp_path: Path, toy: ModuleType) -> None:
    write(tmp_path, toy, range(9))
    store = EpisodeStore(tmp_path)
    for i in range(9):
        whole = toy.episode(i)
        start, stop = len(whole) // 3, len(whole)
        window = store.window(i, start, stop)
        assert len(window) == stop - start
        for path, values in whole.observations.items():
            np.testing.assert_array_equal(window.observations[path], values[start:stop])
        np.testing.assert_array_equal(window.actions["go"], whole.actions["go"][start:stop])
        np.testing.assert_array_equal(window.rewards, whole.rewards[start:stop])
        assert not window.observations["picture"].flags.writeable
    with pytest.raises(ValueError, match="expected a window in episode 0"):
        store.window(0, 0, int(store.lengths[0]) + 1)
    with pytest.raises(IndexError, match=r"in \[0, 9\)"):
        store.episode(9)


@pytest.mark.parametrize("cuts", [(3,), (1, 2, 3, 9), (6, 7)])
def test_a_writer_goes_on(tmp_path: Path, toy: ModuleType, cuts: tuple[int, ...]) -> None:
    """Stopping anywhere leaves the same bytes as never stopping."""
    write(tmp_path / "whole", toy, range(12))
    for start, stop in zip((0, *cuts), (*cuts, 12), strict=True):
        write(tmp_path / "cut", toy, range(start, stop))
    assert tree(tmp_path / "cut") == tree(tmp_path / "whole")


@pytest.mark.parametrize("after", [0, 1, 3, 18, 19, 20, 21, 22, 40])
def test_a_failing_disk_leaves_complete_shards(
    tmp_path: Path, toy: ModuleType, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    """A writer stopped at any of its file operations leaves a store that reads and goes on."""
    write(tmp_path / "whole", toy, range(12))
    sync, left = os.fsync, iter(range(after))

    def fail_later(descriptor: int) -> None:
        if next(left, None) is None:
            raise OSError(28, "No space left on device")
        sync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail_later)
        with pytest.raises(OSError, match="No space"):
            write(tmp_path / "cut", toy, range(12))
    done = 0
    if (tmp_path / "cut" / "manifest.json").exists():
        store = EpisodeStore(tmp_path / "cut")
        store.validate()
        done = len(store)
    write(tmp_path / "cut", toy, range(done, 12))
    assert tree(tmp_path / "cut") == tree(tmp_path / "whole")


def test_damage_is_named(tmp_path: Path, toy: ModuleType) -> None:
    write(tmp_path, toy, range(3))
    file = next(tmp_path.glob("shard-*/rewards.npy"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"rewards.npy"):
        EpisodeStore(tmp_path).validate()
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match="expected JSON"):
        EpisodeStore(tmp_path)
    (tmp_path / "manifest.json").write_text(json.dumps({"format": "other"}))
    with pytest.raises(ValueError, match=r"'gato-episodes-1'.*got 'other'"):
        EpisodeStore(tmp_path)
    with pytest.raises(ValueError, match=r"it has no manifest.json"):
        EpisodeStore(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["lengths", "seeds", "returns", "successes"])
@pytest.mark.parametrize("damage", ["empty", "cut", "foreign", "missing", "short", "kind"])
def test_a_damaged_index_is_named(tmp_path: Path, toy: ModuleType, name: str, damage: str) -> None:
    write(tmp_path, toy, range(3))
    file = next(tmp_path.glob(f"shard-*/{name}.npy"))
    content, column = file.read_bytes(), np.load(file)
    match damage:
        case "empty":
            file.write_bytes(b"")
        case "cut":
            file.write_bytes(content[:-3])
        case "foreign":
            file.write_bytes(b"{}" + content)
        case "missing":
            file.unlink()
        case "short":
            np.save(file, column[1:])
        case "kind":
            np.save(file, column.astype(np.float32))
    with pytest.raises(ValueError, match=rf"{name}\.npy.*The store is damaged: make it again"):
        EpisodeStore(tmp_path)


def test_lengths_that_do_not_add_up_are_named(tmp_path: Path, toy: ModuleType) -> None:
    write(tmp_path, toy, range(3))
    file = next(tmp_path.glob("shard-*/lengths.npy"))
    np.save(file, np.load(file) + 1)
    with pytest.raises(ValueError, match=r"expected \d+ steps in all in .*lengths.npy; got \d+"):
        EpisodeStore(tmp_path)


def test_what_a_killed_writer_leaves_is_swept(tmp_path: Path, toy: ModuleType) -> None:
    write(tmp_path / "whole", toy, range(4))
    write(tmp_path / "cut", toy, range(2))
    (tmp_path / "cut" / ".manifest.json.77.tmp").write_text("{")
    (tmp_path / "cut" / ".shard-00000-000003.77.tmp").mkdir()
    (tmp_path / "cut" / "shard-00000-000003").mkdir()
    write(tmp_path / "cut", toy, range(2, 4))
    assert tree(tmp_path / "cut") == tree(tmp_path / "whole")


def test_bad_episodes_are_refused(tmp_path: Path, toy: ModuleType) -> None:
    good = toy.episode(3, 5)
    writer = EpisodeWriter(tmp_path, toy.SPEC)

    def refused(match: str, **changes: object) -> None:
        with pytest.raises(ValueError, match=match):
            writer.append(replace(good, **changes))

    nan = good.observations["a/place"].copy()
    nan[2, 1] = np.nan
    refused(
        r"'a/place' finite.*nan at \(2, 1\)", observations={**good.observations, "a/place": nan}
    )
    out = {**good.actions, "go": good.actions["go"] * 0 - 19.75}
    refused(r"'go' inside its space.*-19.75 at \(0, 0\)", actions=out)
    refused(r"'say' inside its space", targets={**good.actions, "say": good.actions["say"] * 0})
    refused(r"shape \(6, 2\)", observations={**good.observations, "a/place": nan[:5]})
    refused(r"expected \['go', 'say'\]", actions={"go": good.actions["go"]})
    refused("6 strings as 'note'", observations={**good.observations, "note": [1] * 6})
    refused("got one of 'other'", task="other")
    refused("5 finite rewards", rewards=good.rewards + np.inf)
    refused("at least one step", rewards=good.rewards[:0])
    writer.append(good)
    refused("targets in all episodes", targets=None)
    assert len(writer) == 1


def test_a_store_goes_on_only_as_it_began(tmp_path: Path, toy: ModuleType) -> None:
    EpisodeWriter(tmp_path, toy.SPEC, settings={"noise": 0.1}).close()
    with pytest.raises(ValueError, match=r"noise=0\.1; got 0\.2"):
        EpisodeWriter(tmp_path, toy.SPEC, settings={"noise": 0.2})
    with pytest.raises(ValueError, match="Choose another folder"):
        EpisodeWriter(tmp_path, replace(toy.SPEC, id="toy/run-v0"), settings={"noise": 0.1})


def test_a_store_goes_on_only_with_the_versions_it_began_with(
    tmp_path: Path, toy: ModuleType
) -> None:
    made = {"python": "3.11.1", "mujoco": "3.3.0"}
    EpisodeWriter(tmp_path, toy.SPEC, versions=made).close()
    EpisodeWriter(tmp_path, toy.SPEC, versions={**made, "python": "3.12.0"}).close()
    with pytest.raises(ValueError, match=r"mujoco='3\.3\.0'; got '3\.4\.0'.*same versions"):
        EpisodeWriter(tmp_path, toy.SPEC, versions={**made, "mujoco": "3.4.0"})


def test_a_store_has_one_writer_at_a_time(tmp_path: Path, toy: ModuleType) -> None:
    first = EpisodeWriter(tmp_path, toy.SPEC)
    half = tmp_path / ".shard-00000-000001.1.tmp"
    half.mkdir()  # what the first is about to rename
    with pytest.raises(ValueError, match="being written by another process"):
        EpisodeWriter(tmp_path, toy.SPEC)
    assert half.exists()
    first.append(toy.episode(0))
    first.close()
    with pytest.raises(ValueError, match="Choose another folder"):
        EpisodeWriter(tmp_path, replace(toy.SPEC, id="toy/run-v0"))
    second = EpisodeWriter(tmp_path, toy.SPEC)
    assert len(second) == 1
    del second  # as good as closed
    EpisodeWriter(tmp_path, toy.SPEC).close()


def test_stores_travel_to_other_processes(tmp_path: Path, toy: ModuleType) -> None:
    write(tmp_path, toy, range(4))
    store = pickle.loads(pickle.dumps(EpisodeStore(tmp_path)))
    assert_same(store.episode(3), toy.episode(3))
