"""Pictures and words in one space: embeddings, labels, measures, and the search of a folder."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gato import cli
from gato.checkpoint import Checkpoint, build_model, save_checkpoint
from gato.config import TrainConfig
from gato.corpora import CorpusConfig
from gato.envs.corpora import shapes
from gato.model_config import ModelConfig
from gato.rollouts import search as searching
from gato.rollouts import zero_shot
from gato.rollouts.agent import Agent
from gato.rollouts.metrics import Options
from gato.rollouts.retrieval import rank
from gato.rollouts.zero_shot import classes, probabilities, retrieve
from gato.tokenizers.serializer import Serializer
from gato.tokenizers.stream import pack
from gato.tokenizers.text import MODEL_FILE

SIZE = ModelConfig(layers=1, width=16, heads=2, head_dim=8, ffn_width=32, context=64, qk_norm=True)
CONFIG = TrainConfig(SIZE, corpora=(CorpusConfig("pictures", "nowhere", contrast=1.0),))
RNG = np.random.default_rng(0)
IMAGES = [RNG.integers(0, 256, (h, w, 3), np.uint8) for h, w in [(32, 32), (16, 48), (32, 32)] * 9]
TEXTS = ["a red ball", "go", "", "the box that is green and behind the door", "a red ball"]


def made_agent(text_model: bytes, config: TrainConfig, path: Path, seed: int = 0) -> Agent:
    serializer = Serializer(state={"text": {MODEL_FILE: text_model}})
    torch.manual_seed(seed)
    model = build_model(config, serializer).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "contrast.log_scale":
                parameter.add_(torch.randn_like(parameter) * 0.2)
    saved = save_checkpoint(path, 1, config, serializer, model)
    return Agent(Checkpoint(saved, config, serializer, model, 1))


@pytest.fixture
def agent(text_model: bytes, tmp_path: Path) -> Agent:
    return made_agent(text_model, CONFIG, tmp_path / "run")


@pytest.fixture
def bare(text_model: bytes, tmp_path: Path) -> Agent:
    """Return an agent without the head."""
    return made_agent(text_model, TrainConfig(SIZE), tmp_path / "bare")


@pytest.fixture
def album(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder of six pictures; what is kept of it lies in the test's own cache."""
    monkeypatch.setenv("GATO_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "album"
    (folder / "below").mkdir(parents=True)
    for i, name in enumerate(["a.png", "b.JPG", "c.webp", "below/d.png", "e.png", "f.png"]):
        kind = "JPEG" if name.endswith("JPG") else None
        Image.fromarray(IMAGES[i]).save(folder / name, format=kind)
    (folder / "notes.txt").write_text("no picture")
    (folder / ".hidden.png").write_bytes(b"x")
    return folder


def slowly(agent: Agent, sequence, linear: str) -> np.ndarray:
    """The unit vector of one sequence, computed alone."""
    with torch.inference_mode():
        batch = pack([[sequence]], len(sequence), agent.serializer.control).to("cpu")
        vector = getattr(agent.model.contrast, linear).weight @ agent.model(batch)[-1]
    return (vector / vector.norm()).numpy()


# ---- embeddings --------------------------------------------------------------------------------


def test_embeddings_are_those_of_each_alone(agent):
    found = agent.embed_images(IMAGES)
    wanted = [slowly(agent, agent.serializer.caption(image, None), "shown") for image in IMAGES]
    assert found.dtype == np.float32
    assert np.allclose(found, wanted, atol=1e-5)
    many = TEXTS * 30  # several rows
    found = agent.embed_texts(many)
    wanted = [slowly(agent, agent.serializer.document(text), "said") for text in TEXTS] * 30
    assert np.allclose(found, wanted, atol=1e-5)
    assert np.allclose(np.linalg.norm(found, axis=1), 1.0, atol=1e-5)
    assert agent.embed_texts([]).shape == agent.embed_images([]).shape == (0, 16)


def test_what_cannot_be_embedded_is_refused(agent, bare):
    told = r"this checkpoint has no contrastive head.*--corpora.0.contrast"
    with pytest.raises(ValueError, match=told):
        bare.embed_texts(["a"])
    with pytest.raises(ValueError, match="has no contrastive head"):
        bare.embed_images(IMAGES[:1])
    with pytest.raises(ValueError, match="remembers 64 tokens"):
        agent.embed_texts(["go to the red ball " * 99])
    with pytest.raises(ValueError, match="remembers 64 tokens"):
        agent.embed_images([np.zeros((160, 160, 3), np.uint8)])
    with pytest.raises(ValueError, match="expected a list of texts"):
        agent.embed_texts("a red ball")
    with pytest.raises(ValueError, match="uint8"):
        agent.embed_images([IMAGES[0] / 255])


def test_ranks_are_by_nearness():
    items = np.eye(4, dtype=np.float32)
    queries = np.array([[0.1, 0.9, 0.3, 0.2], [0.5, 0.5, 0.1, 0.6]], np.float32)
    places, near = rank(queries, items, 3)
    assert places.tolist() == [[1, 2, 3], [3, 0, 1]]  # the first of equals stands first
    assert np.allclose(near[0], [0.9, 0.3, 0.2])
    assert rank(queries, items, 9)[0].shape == (2, 4)


# ---- labels ------------------------------------------------------------------------------------


def test_labels_are_chosen_by_nearness(agent):
    labels = ["red ball", "go", "green box"]
    found = probabilities(agent, IMAGES[:4], labels)
    assert found.shape == (4, 3)
    for image, row in zip(IMAGES[:4], found, strict=True):
        near = agent.embed_texts(labels) @ agent.embed_images([image])[0]
        weights = np.exp(10.0 * near)
        assert row == pytest.approx(weights / weights.sum(), abs=1e-5)
        assert agent.classify(image, labels) == pytest.approx(
            dict(zip(labels, row, strict=True)), abs=1e-5
        )


def test_templates_are_averaged(agent, bare):
    labels, templates = ["red ball", "box"], ["a {}", "the {} and {}"]
    sums = sum(agent.embed_texts([t.replace("{}", x) for x in labels]) for t in templates)
    means = sums / np.linalg.norm(sums, axis=1, keepdims=True)
    weights = np.exp(10.0 * means @ agent.embed_images(IMAGES[:1])[0])
    found = agent.classify(IMAGES[0], labels, templates=templates)
    assert list(found.values()) == pytest.approx(weights / weights.sum(), abs=1e-5)
    context = bare.serializer.caption(IMAGES[0], None)
    means = []
    for label in labels:
        written = [t.replace("{}", label) for t in templates]
        scored = zero_shot.judge(bare.model, bare.serializer, [context], [written])[0]
        means.append(scored.mean.mean())
    weights = np.exp(np.array(means))
    found = bare.classify(IMAGES[0], labels, templates=templates)
    assert list(found.values()) == pytest.approx(weights / weights.sum(), rel=1e-4)


def test_the_way_is_as_trained_or_as_asked(agent, bare):
    assert zero_shot.way(agent) == "contrast"
    assert zero_shot.way(bare) == zero_shot.way(agent, "likelihood") == "likelihood"
    labels = ["a red ball", "go"]
    asked = agent.classify(IMAGES[0], labels, how="likelihood")
    assert asked != pytest.approx(agent.classify(IMAGES[0], labels), abs=1e-3)
    with pytest.raises(ValueError, match=r"\(how='likelihood', --how likelihood\)"):
        bare.classify(IMAGES[0], labels, how="contrast")
    with pytest.raises(ValueError, match="contrast or likelihood; got 'guess'"):
        agent.classify(IMAGES[0], labels, how="guess")


@pytest.mark.parametrize(
    ("labels", "templates", "message"),
    [
        (["a"], ["{}"], "two or more different labels"),
        (["a", "a"], ["{}"], "two or more different labels"),
        ("ab", ["{}"], "two or more different labels"),
        (["a", ""], ["{}"], "an empty one"),
        (["a", "b"], ["a picture"], "where the label stands"),
        (["a", "b"], [], "where the label stands"),
        (["a", "b"], "{}", "where the label stands"),
    ],
)
def test_labels_and_templates_are_checked(agent, labels, templates, message):
    with pytest.raises(ValueError, match=message):
        agent.classify(IMAGES[0], labels, templates=templates)


# ---- measures ----------------------------------------------------------------------------------


def records(count: int) -> list:
    rng = __import__("random").Random(0)
    found = []
    for k in range(count):
        colour, shape = shapes.PAIRS[k % len(shapes.PAIRS)]
        picture = shapes.draw(colour, shape, rng)
        about = {"unseen": (colour, shape) in shapes.UNSEEN}
        text = shapes.name(colour, shape)
        found.append({"kind": "caption", "image": picture, "text": text, "meta": about})
    return found


def vectors(monkeypatch, images, texts) -> None:
    """Let pictures and texts be embedded by these functions."""
    for module in (zero_shot,):
        monkeypatch.setattr(module, "embed_images", lambda agent, given: images(given))
        monkeypatch.setattr(module, "embed_texts", lambda agent, given: texts(given))


def test_recall_counts_what_comes_first(agent, monkeypatch):
    made = records(128)
    known = sorted({r["text"] for r in made})
    number = {id(r["image"]): known.index(r["text"]) for r in made}
    unit = np.eye(len(known))
    vectors(
        monkeypatch,
        lambda given: unit[[number[id(image)] for image in given]],
        lambda given: unit[[known.index(text) for text in given]],
    )
    told = retrieve(agent, made, Options())
    assert told["among"] == 50
    assert {name: row["value"] for name, row in told["metrics"].items()} == {
        f"{what}_recall_at_{k}": 1.0 for k in (1, 5) for what in ("text", "image")
    }
    # all alike: nothing is found, since an equal score counts as worse
    vectors(monkeypatch, lambda g: np.ones((len(g), 1)), lambda g: np.ones((len(g), 1)))
    told = retrieve(agent, made, Options())
    assert {row["value"] for row in told["metrics"].values()} == {0.0}


def slow_places(record: int, pictures: np.ndarray, texts: dict, own: list) -> tuple[int, list]:
    """The place of a picture's best caption among all of others, and of it for each of its own."""
    near = {text: pictures[record] @ texts[text] for text in texts}
    best = max(near[text] for text in own[record])
    strange = [t for i, told in enumerate(own) if i != record for t in told]
    place = 1 + sum(near[text] >= best for text in strange)
    others = [i for i in range(len(pictures)) if i != record]
    return place, [1 + sum(pictures[i] @ texts[t] >= near[t] for i in others) for t in own[record]]


def test_any_caption_of_a_picture_is_right_and_none_is_another(agent, monkeypatch):
    rng = np.random.default_rng(0)
    own = [[f"{word} of {i}" for word in ("one", "two", "three")] for i in range(12)]
    pictures = rng.normal(size=(12, 8))
    texts = {t: p + rng.normal(size=8) for p, told in zip(pictures, own, strict=True) for t in told}
    made = [
        {"kind": "caption", "image": IMAGES[i], "text": t[0], "meta": {"references": t[1:]}}
        for i, t in enumerate(own)
    ]
    number = {id(r["image"]): i for i, r in enumerate(made)}
    vectors(
        monkeypatch,
        lambda given: pictures[[number[id(image)] for image in given]],
        lambda given: np.stack([texts[text] for text in given]),
    )
    told = retrieve(agent, made, Options())
    assert told["among"] == 12
    assert told["samples"][0]["wanted"] in own
    slow = [slow_places(i, pictures, texts, own) for i in range(12)]
    for k in (1, 5):
        value = np.mean([np.mean(np.array(places) <= k) for _, places in slow])
        assert told["metrics"][f"image_recall_at_{k}"]["value"] == pytest.approx(value)
        # of the others' captions one each is a candidate: never worse than among all of them
        least = np.mean([place <= k for place, _ in slow])
        assert told["metrics"][f"text_recall_at_{k}"]["value"] >= least
    assert told["metrics"]["image_recall_at_1"]["value"] > 0.3, "its own captions are no others"
    shared = [{**r, "meta": {"references": ["the same"]}} for r in made]
    texts["the same"] = np.ones(8)
    with pytest.raises(ValueError, match="pictures with different captions"):
        retrieve(agent, shared, Options())


def test_any_caption_of_a_picture_is_its_label(agent):
    made = [{**r, "meta": {"references": ["a thing"]}} for r in records(6)]
    told = classes(agent, made, Options(choices=("a thing", "no such")))
    labels = ["a thing", "no such"]
    found = probabilities(agent, [r["image"] for r in made], labels).argmax(1)
    assert told["metrics"]["accuracy"]["value"] == np.mean(found == 0)
    assert "a thing" in classes(agent, made, Options())["labels"]


def test_recall_of_chance_is_chance(agent, monkeypatch):
    rng = np.random.default_rng(0)
    drawn = lambda given: rng.normal(size=(len(given), 8))  # noqa: E731
    vectors(monkeypatch, drawn, drawn)
    told = retrieve(agent, records(1024), Options())["metrics"]
    for what in ("text", "image"):
        assert told[f"{what}_recall_at_1"]["value"] == pytest.approx(0.02, abs=0.02)
        assert told[f"{what}_recall_at_5"]["value"] == pytest.approx(0.10, abs=0.05)
    with pytest.raises(ValueError, match="pictures with different captions"):
        retrieve(agent, records(1), Options())


def test_classes_are_told_by_both_ways_and_unseen_pairs_among_thirty(agent, bare):
    made = records(64)
    told = classes(agent, made, Options(seed=3))
    assert set(told["metrics"]) == {
        *("accuracy", "accuracy_contrast", "accuracy_likelihood"),
        *("unseen", "unseen_contrast", "unseen_likelihood"),
    }
    assert told["how"] == "contrast"
    assert told["unseen_among"] == 30
    assert told["metrics"]["accuracy"] == told["metrics"]["accuracy_contrast"]
    assert len(told["metrics"]["unseen"]["per_record"]) == 8
    labels = sorted({r["text"] for r in made})
    found = probabilities(agent, [r["image"] for r in made], labels).argmax(1)
    right = np.mean([labels[k] == r["text"] for k, r in zip(found, made, strict=True)])
    assert told["metrics"]["accuracy"]["value"] == pytest.approx(right)
    unseen = [r for r in made if r["meta"]["unseen"]]
    few = zero_shot.among(labels, [r["text"] for r in unseen], 3)
    assert len(set(few)) == 30
    assert {r["text"] for r in unseen} <= set(few)
    found = probabilities(agent, [r["image"] for r in unseen], few).argmax(1)
    right = np.mean([few[k] == r["text"] for k, r in zip(found, unseen, strict=True)])
    assert told["metrics"]["unseen"]["value"] == pytest.approx(right)
    told = classes(bare, made[:12], Options())
    assert set(told["metrics"]) >= {"accuracy", "accuracy_likelihood"}
    assert told["how"] == "likelihood"
    assert "accuracy_contrast" not in told["metrics"]
    with pytest.raises(ValueError, match="every record's label"):
        classes(agent, made, Options(choices=("a red circle", "go")))


# ---- the search of a folder --------------------------------------------------------------------


def test_the_nearest_pictures_are_found(agent, album):
    index = searching.index_folder(agent, album)
    names = ["a.png", "b.JPG", "below/d.png", "c.webp", "e.png", "f.png"]
    assert index.paths == names
    exact = {"a.png": IMAGES[0], "below/d.png": IMAGES[3], "e.png": IMAGES[4]}
    for name, image in exact.items():
        row = index.rows[names.index(name)]
        assert np.allclose(row, agent.embed_images([image])[0], atol=1e-5)
    found = searching.search(agent, index, "a red ball", top=3)
    near = index.rows @ agent.embed_texts(["a red ball"])[0]
    assert [f.path for f in found] == [album / names[k] for k in np.argsort(-near)[:3]]
    assert [f.score for f in found] == pytest.approx(sorted(near, reverse=True)[:3])
    (best, *_) = searching.search(agent, index, image=IMAGES[4])
    assert best.path == album / "e.png"
    assert best.score == pytest.approx(1.0, abs=1e-5)
    for wrong in ({}, {"text": ""}, {"text": "a", "image": IMAGES[0]}):
        with pytest.raises(ValueError, match="one of the two"):
            searching.search(agent, index, **wrong)


def read_again(agent: Agent, album: Path, monkeypatch, **options) -> list[str]:
    """Index the folder; return the names of the pictures that were read."""
    read, real = [], searching.read_picture

    def watched(path, chosen):
        read.append(path.name)
        return real(path, chosen)

    with monkeypatch.context() as patch:
        patch.setattr(searching, "read_picture", watched)
        searching.index_folder(agent, album, **options)
    return read


def test_what_was_embedded_is_not_read_again(agent, album, text_model, tmp_path, monkeypatch):
    assert len(read_again(agent, album, monkeypatch)) == 6
    assert read_again(agent, album, monkeypatch) == []
    Image.fromarray(IMAGES[9]).save(album / "a.png")  # another content
    os.utime(album / "e.png", ns=(1, 1))  # another time
    (album / "f.png").rename(album / "g.png")  # another name
    assert read_again(agent, album, monkeypatch) == ["a.png", "e.png", "g.png"]
    other = made_agent(text_model, CONFIG, tmp_path / "other", seed=1)
    assert len(read_again(other, album, monkeypatch)) == 6
    assert read_again(agent, album, monkeypatch) == []
    kept = sorted((tmp_path / "cache" / "search").iterdir())
    assert len(kept) == 2
    assert len(searching._read(kept[0])) == len(searching._read(kept[1])) == 6


@pytest.mark.parametrize(
    "damage", [b"", b"\x80\x04.", b"[]", None], ids=["empty", "pickle", "text", "cut"]
)
def test_a_damaged_cache_is_made_anew(agent, album, tmp_path, monkeypatch, damage):
    read_again(agent, album, monkeypatch)
    (kept,) = (tmp_path / "cache" / "search").iterdir()
    known = searching._read(kept)
    kept.write_bytes(kept.read_bytes()[:-9] if damage is None else damage)
    assert len(read_again(agent, album, monkeypatch)) == 6
    anew = searching._read(kept)
    assert anew.keys() == known.keys()
    assert all(np.array_equal(anew[stamp], row) for stamp, row in known.items())


def test_pictures_that_cannot_be_read_are_named(agent, album, monkeypatch):
    (album / "b.JPG").write_bytes((album / "b.JPG").read_bytes()[:100])
    (album / "c.webp").write_bytes(b"")
    with pytest.raises(ValueError, match=r"2 of 6 pictures .* \(b.JPG: .*; c.webp: .*--skip-bad"):
        searching.index_folder(agent, album)
    # those that could be read are kept all the same
    assert read_again(agent, album, monkeypatch, skip_bad=True) == ["b.JPG", "c.webp"]
    index = searching.index_folder(agent, album, skip_bad=True)
    assert index.paths == ["a.png", "below/d.png", "e.png", "f.png"]
    assert [path for path, _ in index.skipped] == ["b.JPG", "c.webp"]
    for path in index.paths:
        (album / path).write_bytes(b"x")
    with pytest.raises(ValueError, match="none of the 6 pictures"):
        searching.index_folder(agent, album, skip_bad=True)


def test_an_interruption_keeps_what_was_done(agent, album, monkeypatch):
    monkeypatch.setattr(searching, "AT_ONCE", 2)

    def interrupt(done: int, total: int) -> None:
        assert total == 6
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        searching.index_folder(agent, album, progress=interrupt)
    assert len(read_again(agent, album, monkeypatch)) == 2


def test_where_nothing_can_be_kept_pictures_are_found_all_the_same(agent, album, tmp_path, capsys):
    nowhere = tmp_path / "no-folder"
    nowhere.write_text("")
    index = searching.index_folder(agent, album, cache=nowhere / "search")
    assert np.array_equal(index.rows, searching.index_folder(agent, album).rows)
    (said,) = capsys.readouterr().err.splitlines()
    assert f"cannot be kept in {nowhere}/search (Not a directory)" in said

    def interrupt(done: int, total: int) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):  # which is not hidden by it
        searching.index_folder(agent, album, cache=nowhere, progress=interrupt)


def test_a_folder_without_pictures_is_refused(agent, bare, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"expected pictures \(.*\) in .*empty; found none"):
        searching.index_folder(agent, tmp_path / "empty")
    with pytest.raises(ValueError, match="expected a folder of pictures; got"):
        searching.index_folder(agent, tmp_path / "nowhere")
    with pytest.raises(ValueError, match="has no contrastive head"):
        searching.index_folder(bare, tmp_path / "empty")


# ---- commands ----------------------------------------------------------------------------------


def test_the_search_command(agent, album, capsys):
    run = str(agent.checkpoint.path.parent)
    assert cli.main(["search", run, str(album), "a red ball", "--top", "2", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["query"], told["pictures"], told["skipped"]) == ("a red ball", 6, [])
    wanted = searching.search(agent, searching.index_folder(agent, album), "a red ball", top=2)
    assert [row["path"] for row in told["results"]] == [str(f.path) for f in wanted]
    assert cli.main(["search", run, str(album), "--image", str(album / "e.png")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    assert lines[0] == f"1.000  {album / 'e.png'}"
    (album / "text.md").write_text("no picture")
    assert cli.main(["search", run, str(album), "--image", f"{album}/text.md"]) == cli.BAD_INPUT
    assert f"expected an image at {album}/text.md" in capsys.readouterr().err
    (album / "c.webp").write_bytes(b"")
    assert cli.main(["search", run, str(album), "x"]) == cli.BAD_INPUT
    assert "c.webp" in capsys.readouterr().err
    assert cli.main(["search", run, str(album), "x", "--skip-bad", "--json"]) == 0
    said = capsys.readouterr()
    assert "left out" in said.err
    assert [Path(row["path"]).name for row in json.loads(said.out)["skipped"]] == ["c.webp"]
    for wrong in ([], ["x", "--image", str(album / "e.png")]):
        assert cli.main(["search", run, str(album), *wrong]) == cli.BAD_INPUT
        assert "one of the two" in capsys.readouterr().err


def test_the_classify_command(agent, album, capsys):
    run, files = str(agent.checkpoint.path.parent), [str(album / n) for n in ("a.png", "e.png")]
    labels = ["--labels", "red ball, go", "--template", "a {}", "--template", "{}"]
    assert cli.main(["classify", run, *files, *labels, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["image"] for row in rows] == files
    assert {row["how"] for row in rows} == {"contrast"}
    for row, image in zip(rows, (IMAGES[0], IMAGES[4]), strict=True):
        wanted = agent.classify(image, ["red ball", "go"], templates=["a {}", "{}"])
        assert row["probabilities"] == pytest.approx(wanted, abs=1e-5)
    assert cli.main(["classify", run, files[0], *labels, "--how", "likelihood", "--json"]) == 0
    row = json.loads(capsys.readouterr().out)  # one picture, one object
    assert row["how"] == "likelihood"
    assert cli.main(["classify", run, *files, *labels]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2 * 3
    assert cli.main(["classify", run, files[0], "--labels", "a,b", "--template", "x"]) == 2
    assert "where the label stands" in capsys.readouterr().err
