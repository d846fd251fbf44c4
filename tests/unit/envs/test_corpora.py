"""The corpora: the same records for the same seed, splits apart, and answers that are true."""

from __future__ import annotations

import doctest
import hashlib
import itertools
import json
from collections import Counter
from random import Random

import numpy as np
import pytest

from gato import cli
from gato.envs import records as record_store
from gato.envs.corpora import (
    bindings,
    common,
    dialogues,
    digits,
    documents,
    frames,
    registry,
    scenes,
    shapes,
    tasks_in_words,
)

COUNT = {
    **{"dialogues": 300, "digits": 400, "documents": 400, "frames": 8, "scenes": 400},
    "shapes": 400,
    "bindings": 60,
}


def digest(record):
    """A record as a string, its images by their sha256."""

    def plain(value):
        if isinstance(value, np.ndarray):
            return hashlib.sha256(value.tobytes() + str(value.shape).encode()).hexdigest()
        raise TypeError(type(value))

    return json.dumps(record, sort_keys=True, default=plain)


def made(name, split, seed=0, count=None):
    return list(registry.records(name, split, seed, COUNT[name] if count is None else count))


def images(record):
    if "image" in record:
        return [record["image"]]
    if "pairs" in record:
        return [pair["image"] for pair in record["pairs"]]
    parts = [part for message in record.get("messages", ()) for part in message["content"]]
    return [part["image"] for part in parts if part["type"] == "image"]


def questions_and_answers(record):
    """(question, answer) of a conversation, without its system message."""
    texts = [m["content"][-1]["text"] for m in record["messages"] if m["role"] != "system"]
    return list(zip(texts[::2], texts[1::2], strict=True))


@pytest.mark.parametrize("name", registry.names())
@pytest.mark.parametrize("split", common.SPLITS)
def test_records_follow_from_split_and_seed(name, split):
    records = made(name, split)
    assert len(records) == COUNT[name]
    for record in records:
        record_store.check_record(record)
        json.dumps(record.get("meta", {}))
    shorter = [digest(r) for r in made(name, split, count=COUNT[name] // 2)]
    assert shorter == [digest(r) for r in records[: len(shorter)]]
    other = [digest(r) for r in made(name, split, seed=1, count=len(shorter))]
    assert other != shorter


@pytest.mark.parametrize("name", registry.names())
def test_nothing_held_out_is_in_training(name):
    seeds = (0,) if name == "frames" else (0, 1)  # the emulator takes its time
    shown = [r for seed in seeds for r in made(name, "train", seed)]
    train = {digest(r) for r in shown}
    train_images = {image.tobytes() for r in shown for image in images(r)}
    for seed in seeds:
        for record in made(name, "heldout", seed):
            assert digest(record) not in train
            if name != "digits":  # an image of digits has a source of its own, tested below
                assert not any(image.tobytes() in train_images for image in images(record))


@pytest.mark.parametrize("name", registry.names())
def test_images_are_small_and_of_whole_patches(name):
    for record in made(name, "train", count=min(50, COUNT[name])):
        for image in images(record):
            assert image.dtype == np.uint8
            assert image.ndim == 3
            assert image.shape[2] == 3
            assert image.shape[0] % 16 == image.shape[1] % 16 == 0
            assert max(image.shape) <= 80


@pytest.mark.parametrize("name", ["dialogues", "frames", "scenes"])
@pytest.mark.parametrize("split", common.SPLITS)
def test_conversations_alternate_and_name_the_kind_of_each_answer(name, split):
    for record in made(name, split):
        if record["kind"] != "conversation":
            continue
        roles = [m["role"] for m in record["messages"]]
        spoken = roles[1:] if roles[0] == "system" else roles
        assert spoken == ["user", "assistant"] * (len(spoken) // 2)
        assert len(record["meta"]["kinds"]) == len(spoken) // 2
        assert 1 <= len(spoken) // 2 <= 6
        for _, answer in questions_and_answers(record):
            assert answer == answer.strip() != ""


def test_store_holds_what_was_made(tmp_path):
    path = registry.build("scenes", tmp_path / "scenes", "heldout", seed=3, count=20)
    store = record_store.RecordStore(path)
    store.validate()
    assert store.name == "scenes"
    read = [digest(store[i]) for i in range(len(store))]
    assert read == [digest(r) for r in made("scenes", "heldout", 3, 20)]


def test_a_corpus_is_made_by_a_command(tmp_path, capsys):
    given = ["data", "make", "bindings", "--out", str(tmp_path / "b"), "--split", "heldout"]
    given += ["--count", "5", "--seed", "3", "--json"]
    assert cli.main(given) == cli.DONE
    told = json.loads(capsys.readouterr().out)
    assert told == {"store": str(tmp_path / "b"), "items": 5, "split": "heldout"}
    store = record_store.RecordStore(tmp_path / "b")
    store.validate()
    assert [digest(r) for r in made("bindings", "heldout", 3, 5)] == [
        digest(store[i]) for i in range(5)
    ]
    assert cli.main(given) == cli.BAD_INPUT
    assert "something lies at" in capsys.readouterr().err
    assert cli.main([*given[:2], "binding", *given[3:4], str(tmp_path / "c")]) == cli.BAD_INPUT
    assert "closest: bindings" in capsys.readouterr().err
    assert not (tmp_path / "c").exists()


def test_a_corpus_is_made_in_a_new_folder_only(tmp_path, capsys):
    def make(out):
        return cli.main(["data", "make", "bindings", "--out", str(out), "--count", "3"])

    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "records.jsonl").write_text("mine\n")
    assert make(tmp_path / "stores" / "a") == cli.DONE
    for place in (mine, tmp_path / "stores"):
        assert make(place) == cli.BAD_INPUT  # files would go, stores hide behind another
        assert f"expected a new folder as --out; something lies at {place}" in (
            capsys.readouterr().err
        )
    assert (mine / "records.jsonl").read_text() == "mine\n"
    assert [p.name for p in (tmp_path / "stores").iterdir()] == ["a"]
    (tmp_path / "empty").mkdir()
    assert make(tmp_path / "empty") == cli.DONE


def test_what_a_killed_making_left_is_cleared_away(tmp_path, monkeypatch):
    given = ["data", "make", "bindings", "--out", str(tmp_path / "b"), "--count", "3"]
    seen = []

    def killed(writer):  # by SIGKILL: what lies there then stays
        seen.extend(p for p in tmp_path.rglob("*") if p.suffix == ".tmp")
        assert not (tmp_path / "b").exists()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(record_store.RecordWriter, "close", killed)
        assert cli.main(given) == cli.FAILURE
    assert seen
    assert not list(tmp_path.iterdir())
    seen[0].parent.mkdir(parents=True)
    seen[0].write_text("half a record")
    assert cli.main(given) == cli.DONE
    assert [p.name for p in tmp_path.iterdir()] == ["b"]
    assert not list((tmp_path / "b").glob(".*"))


def test_wrong_arguments_are_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="closest: scenes"):
        registry.build("scene", tmp_path / "x", "train")
    with pytest.raises(ValueError, match="'train' or 'heldout'; got 'test'"):
        registry.build("scenes", tmp_path / "x", "test")
    with pytest.raises(ValueError, match="at least 0; got -1"):
        list(registry.records("scenes", "train", count=-1))
    with pytest.raises(ValueError, match="known task id"):
        registry.build("dialogues", tmp_path / "x", "train", tasks=("metaworld/raech-v3",))
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(("name", "module"), [("digits", "sklearn"), ("scenes", "minigrid")])
def test_a_missing_package_is_named_with_its_extra(name, module, monkeypatch):
    for cached in (digits._part, scenes._minigrid):
        cached.cache_clear()
    for loaded in ("sklearn.datasets", "minigrid.core.grid"):
        monkeypatch.setitem(__import__("sys").modules, loaded, None)
    with pytest.raises(ValueError, match=r"pip install \"gato\[(language|babyai)\]\""):
        list(registry.records(name, "train", count=1))


@pytest.mark.parametrize("module", [bindings, common, documents, scenes, shapes])
def test_examples_in_docstrings(module):
    assert doctest.testmod(module).failed == 0


# digits


def test_digits_are_split_by_index_and_stratified():
    parts = {split: digits._part(split) for split in common.SPLITS}
    numbers = {split: set(part[2].tolist()) for split, part in parts.items()}
    assert not numbers["train"] & numbers["heldout"]
    assert numbers["train"] | numbers["heldout"] == set(range(1797))
    for label in range(10):
        held, train = (int((parts[s][1] == label).sum()) for s in ("heldout", "train"))
        assert held / (held + train) == pytest.approx(0.2, abs=0.006)
        assert min(parts["heldout"][2][parts["heldout"][1] == label]) > max(
            parts["train"][2][parts["train"][1] == label]
        )


def test_held_out_digits_are_every_image_once_and_unchanged():
    records = made("digits", "heldout", count=digits.COUNTS["heldout"])
    sources = [record["meta"]["source"] for record in records]
    assert sorted(sources) == sorted(digits._part("heldout")[2].tolist())
    for record in made("digits", "heldout", seed=5, count=5):
        raw = digits._part("heldout")
        at = int(np.flatnonzero(raw[2] == record["meta"]["source"])[0])
        blocks = record["image"][..., 0].reshape(8, 4, 8, 4).mean((1, 3)) / 255 * 16
        assert np.corrcoef(blocks.ravel(), raw[0][at].ravel())[0, 1] > 0.95
        assert record["text"] == f"a handwritten {common.NUMBERS[int(raw[1][at])]}"


@pytest.mark.parametrize("label", range(10))
def test_drawing_moves_and_lights_a_digit(label):
    images_, labels, _ = digits._part("train")
    raw = images_[labels == label][0]
    y, x = np.mgrid[:32, :32]
    middle = [float((digits.draw(raw)[..., 0] * g).sum()) for g in (x, y)]
    moved = [float((digits.draw(raw, shift=(2, 0))[..., 0] * g).sum()) for g in (x, y)]
    mass, mass_moved = digits.draw(raw).sum() / 3, digits.draw(raw, shift=(2, 0)).sum() / 3
    assert moved[0] / mass_moved - middle[0] / mass == pytest.approx(2, abs=0.4)
    assert moved[1] / mass_moved - middle[1] / mass == pytest.approx(0, abs=0.4)
    assert digits.draw(raw, light=0.5).mean() == pytest.approx(digits.draw(raw).mean() / 2, rel=0.1)
    turned = digits.draw(digits.draw(raw)[::4, ::4, 0] / 16, angle=np.pi)
    assert turned.shape == (32, 32, 3)


# bindings


@pytest.mark.parametrize("split", common.SPLITS)
def test_words_are_bound_anew_in_every_record(split):
    records = made("bindings", split, count=300)
    bound, places = Counter(), Counter()
    for record in records:
        meta, pairs = record["meta"], record["pairs"]
        assert len(pairs) == bindings.SHOTS + 1
        assert len(set(meta["digits"])) == len(set(meta["words"])) == 2
        told = [meta["words"].index(pair["text"]) for pair in pairs]
        if set(meta["words"]) == set(bindings.WORDS):
            bound.update(zip(meta["digits"], meta["words"], strict=True))
            places[told[-1]] += 1
        else:  # a digit under its own name, for training alone
            assert split == "train"
            assert meta["words"] == [common.NUMBERS[digit] for digit in meta["digits"]]
        if split == "heldout":  # both digits in every two examples
            assert all(told[i] != told[i + 1] for i in range(0, bindings.SHOTS, 2))
    share = sum(bound.values()) / (2 * len(records))
    assert share == 1.0 if split == "heldout" else abs(share - 1 + bindings.NAMED) < 0.08
    for digit in range(10):  # a word should say nothing about a digit
        dako, vilu = (bound[digit, word] for word in bindings.WORDS)
        assert abs(dako - vilu) < 4 * (dako + vilu) ** 0.5
    assert abs(places[0] / sum(places.values()) - 0.5) < 0.1


def test_bound_digits_are_those_that_the_record_names():
    _, labels, _ = digits._part("heldout")
    drawn = {}
    for i, label in enumerate(labels.tolist()):
        drawn.setdefault(bindings._drawn("heldout", i, 0).tobytes(), set()).add(label)
    for record in made("bindings", "heldout"):
        of = dict(zip(record["meta"]["words"], record["meta"]["digits"], strict=True))
        for pair in record["pairs"]:
            assert of[pair["text"]] in drawn[pair["image"].tobytes()]


# scenes


def test_scenes_hold_out_arrangements_of_objects():
    def arrangements(split):
        return {json.dumps(r["meta"]["things"]) for s in range(2) for r in made("scenes", split, s)}

    assert not arrangements("train") & arrangements("heldout")
    rng = Random(0)
    counts = Counter(scenes.sample("train", rng).split for _ in range(50))
    assert counts == {"train": 50}


def test_answers_about_scenes_are_true():
    """Read the answers back from the picture's own state, by a rule of its own."""
    seen = Counter()
    for seed in range(300):
        rng = Random(seed)
        scene = scenes.sample("heldout", rng)
        for question in scenes.questions(scene):
            seen[question.kind] += 1
            words = question.text(rng).rstrip("?").split()
            named = [
                t
                for t in scene.things
                if (t.type in words or not set(words) & set(scenes.TYPES))
                and (t.colour in words or not set(words) & set(scenes.COLOURS))
            ]
            if question.kind == "colour":
                assert [t.colour for t in named] == [question.answer]
            elif question.kind == "object":
                assert [f"a {t.type}" for t in named] == [question.answer]
            elif question.kind == "place":
                (thing,) = named
                assert where(thing.x, thing.y) == question.answer
            elif question.kind == "agent place":
                assert where(*scene.agent) == question.answer
            elif question.kind == "agent direction":
                assert scenes.DIRECTIONS[scene.direction] == question.answer
            else:
                assert common.NUMBERS[len(scene.things)] == question.answer
    assert set(seen) == set(scenes.KINDS) == set(scenes.QUESTIONS)
    assert min(seen.values()) > 100


def where(x, y):
    names = (
        ("top left", "top", "top right"),
        ("left", "middle", "right"),
        ("bottom left", "bottom", "bottom right"),
    )
    return names[y][x]


def test_questions_about_one_image_have_different_answers():
    answers = [
        {answer for _, answer in questions_and_answers(record)}
        for record in made("scenes", "heldout")
        if record["kind"] == "conversation" and len(record["meta"]["kinds"]) > 2
    ]
    assert np.mean([len(a) > 1 for a in answers]) > 0.95


def test_no_answer_is_much_more_common_than_the_others():
    answers: dict[str, Counter] = {kind: Counter() for kind in scenes.KINDS}
    for record in made("scenes", "train", count=2000):
        if record["kind"] == "conversation":
            for kind, (_, a) in zip(
                record["meta"]["kinds"], questions_and_answers(record), strict=True
            ):
                answers[kind][a] += 1
    for kind, counts in answers.items():
        assert max(counts.values()) < 1.8 / len(counts) * sum(counts.values()), (kind, counts)


def test_scene_is_drawn_as_minigrid_draws_it():
    from minigrid.core.constants import COLORS

    scene = scenes.Scene((scenes.Thing(0, 1, "blue", "ball"),), (2, 2), 3)
    image = scenes.render(scene)
    assert image.shape == (48, 48, 3)
    assert image[8, 24].tolist() == COLORS["blue"].tolist()
    assert image[40, 40].tolist() == COLORS["red"].tolist()  # the agent
    assert image[38, 34].tolist() == image[8, 8].tolist() == [0, 0, 0]
    distinct = {
        scenes.render(scenes.Scene((scenes.Thing(1, 1, c, t),), (0, 0), 0)).tobytes()
        for c in scenes.COLOURS
        for t in scenes.TYPES
    }
    assert len(distinct) == 18


# dialogues


def test_dialogues_hold_out_pairs_but_no_wording_and_no_task():
    def asked(split):
        return {q for s in range(6) for r in made("dialogues", split, s) for q in asked_of(r)}

    def asked_of(record):
        return [q for q, _ in questions_and_answers(record)]

    train, held = asked("train"), asked("heldout")
    assert held - train, "some questions are never asked in training"
    tasks = tasks_in_words.tasks_in_words(tasks_in_words.TASKS)
    for kind, wordings in dialogues.ABOUT_TASK.items():
        for task in tasks:
            missing = [w for w in wordings if w.format(task.name) not in train]
            assert len(missing) == 1, (kind, task.name)
        for wording in wordings:
            assert any(wording.format(task.name) in train for task in tasks), wording


@pytest.mark.parametrize("split", common.SPLITS)
def test_a_rule_answers_every_dialogue(split):
    """The answer follows from the kind, what was asked and what was said before: never two."""
    answers: dict[str, set[str]] = {}
    for record in made("dialogues", split, count=1500):
        said = [str(hash(i.tobytes())) for i in images(record)]
        for question, answer in questions_and_answers(record):
            said.append(question)
            answers.setdefault("\n".join(said), set()).add(answer)
    assert {len(found) for found in answers.values()} == {1}


def test_dialogue_answers_are_the_registry_s_instructions():
    from gato.envs import registry as tasks

    goals = {t.id: t.goal for t in tasks_in_words.tasks_in_words(tasks_in_words.TASKS)}
    for task_id, goal in goals.items():
        assert tasks.spec(task_id).instruction in ("", goal)
    told = {a for r in made("dialogues", "train", count=1500) for _, a in questions_and_answers(r)}
    assert {f"the goal is to {goal}." for goal in goals.values()} <= told


def test_dialogues_can_be_about_any_task_with_an_instruction():
    found = registry.records("dialogues", "train", 0, 200, tasks=("metaworld/soccer-v3",))
    text = " ".join(a for r in found for _, a in questions_and_answers(r))
    assert "the goal is to kick the ball into the net." in text
    assert "reach" not in text
    with pytest.raises(ValueError, match="of one of the suites"):
        tasks_in_words.tasks_in_words(("gym/CartPole-v1",))


@pytest.mark.parametrize("module", [dialogues, scenes, frames])
def test_no_two_wordings_are_equal(module):
    tables = [v for v in vars(module).values() if isinstance(v, dict)]
    groups = [g for table in tables for g in table.values() if isinstance(g, tuple)]
    wordings = Counter(w for group in groups for w in group if isinstance(w, str))
    assert wordings
    assert set(wordings.values()) == {1}


# documents


def test_documents_are_prose_and_split_by_source():
    records = {s: made("documents", s, count=None) for s in common.SPLITS}
    sources = {s: {r["meta"]["source"] for r in records[s]} for s in common.SPLITS}
    assert not sources["train"] & sources["heldout"]
    paragraphs = {s: {p for r in records[s] for p in r["text"].split("\n")} for s in common.SPLITS}
    assert not paragraphs["train"] & paragraphs["heldout"]
    characters = sum(len(r["text"]) for s in common.SPLITS for r in records[s])
    assert 200_000 < characters <= documents.MOST_CHARACTERS * 1.1
    for paragraph in itertools.islice(paragraphs["train"], 500):
        assert len(paragraph) >= documents.SHORTEST_PARAGRAPH
        assert paragraph.isascii()
        assert ">>>" not in paragraph
        assert "  " not in paragraph


# frames


def test_answers_about_frames_are_true():
    state = {"player_x": 0.3, "player_y": 0.3, "opponent_x": 0.5, "opponent_y": 0.65}
    assert frames.describe(state) == "the white boxer is left of the black boxer"
    assert set(frames.questions(state)) == {
        ("boxer place", "white", "top left"),
        ("boxer place", "black", "bottom"),
        ("boxer side", "white", "left"),
        ("boxer side", "black", "right"),
        ("boxer height", "", "white"),
    }
    near = {"player_x": 0.43, "player_y": 0.5, "opponent_x": 0.41, "opponent_y": 0.5}
    assert frames.describe(near) == ""
    assert frames.questions(near) == []


def test_boxers_are_where_the_state_says():
    for frame, state in itertools.islice(frames.play(Random(1)), 20):
        size = np.array(frame.shape[:2])
        ring = np.zeros_like(frame[..., 0], bool)
        top, bottom, left, right = (int(part * 64) for part in (0.18, 0.82, 0.22, 0.8))
        ring[top:bottom, left:right] = True
        white, black = frame.min(axis=-1) > 190, frame.max(axis=-1) < 40
        for mask, name in ((white, "player"), (black, "opponent")):
            y, x = (np.argwhere(mask & ring) + 0.5).mean(axis=0) / size
            assert abs(y - state[f"{name}_y"]) < 0.05
            assert abs(x - state[f"{name}_x"]) < 0.08  # an outstretched arm moves the middle


# shapes


def test_eight_pairs_of_colour_and_shape_are_never_shown_in_training():
    unseen = {shapes.name(*pair) for pair in shapes.UNSEEN}
    assert len(unseen) == 8
    assert len({c for c, _ in shapes.UNSEEN}) == len({s for _, s in shapes.UNSEEN}) == 8
    for seed in (0, 1):
        told = Counter(r["text"] for r in made("shapes", "train", seed, 2000))
        assert not unseen & told.keys()
        assert len(told) == 56  # every other pair is shown, and no word is new
        held = made("shapes", "heldout", seed, 512)
        assert [r["meta"]["unseen"] for r in held] == [k % 2 == 0 for k in range(512)]
        for record in held:
            assert (record["text"] in unseen) == record["meta"]["unseen"]
        assert len({r["text"] for r in held}) == 64


@pytest.mark.parametrize("shape", shapes.SHAPES)
def test_a_shape_is_wholly_in_the_picture_and_of_its_colour(shape):
    rng = Random(0)
    for colour, rgb in shapes.COLOURS.items():
        for _ in range(20):
            picture = shapes.draw(colour, shape, rng).astype(int)
            edge = np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]])
            assert (np.ptp(edge, axis=0) <= 1).all()  # nothing but ground
            drawn = (abs(picture - edge[0]).sum(2) > 60).mean()
            assert 0.02 < drawn < 0.6
            middle = picture[abs(picture - edge[0]).sum(2) > 60]
            nearest = {
                name: min(
                    float(np.median(abs(middle - light * np.array(other)).sum(1)))
                    for light in (0.8, 0.87, 0.94, 1.0)
                )
                for name, other in shapes.COLOURS.items()
            }
            assert min(nearest, key=nearest.__getitem__) == colour, (colour, rgb)
