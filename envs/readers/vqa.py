"""Questions about pictures: VQA v2's two files, or a plain list of questions.

VQA v2: ``v2_OpenEnded_mscoco_train2014_questions.json``, ``v2_mscoco_train2014_annotations.json``
and the pictures, ``train2014/COCO_train2014_000000000009.jpg``. The answer is the one that most of
its ten people gave (``multiple_choice_answer``).

The plain list, as JSON or JSON lines: ``{"image": file or data URI, "question": str, "answer": str
or [str, ...]}``; of several answers the most frequent one, of equals the first, is taken.

Every question is a conversation: the user shows the picture and asks, the assistant answers. Where
several people did, ``meta["answers"]`` has what each said, for VQA's accuracy.
"""

from __future__ import annotations

import itertools
import re
import sys
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from gato.envs.readers import json_stream
from gato.envs.readers.chat import picture_at
from gato.envs.readers.coco import choose_split, picture_folder
from gato.envs.readers.json_stream import first_value, json_items, json_values
from gato.envs.readers.pictures import note, read_picture
from gato.envs.readers.reader import BadItem, ReadOptions, Source
from gato.envs.readers.untrusted import (
    READ_ERRORS,
    below,
    check_options,
    checked_fields,
    checked_text,
    each,
    files,
    size_of,
)

FORMAT = "vqa"
EXTRA = ""
IGNORES = ("clip_actions",)
BESIDE = True
OURS = ("image", "question", "answer")
_SMALL = 16 << 20


def recognises(location: str) -> bool:
    """Return whether there is a file called *questions.json, or a list of OURS."""
    if _question_files(location, glance=True):
        return True
    found = files(location, json_stream.SUFFIXES, glance=True)
    first = first_value(found[0])[1] if found else None
    return isinstance(first, dict) and set(OURS) <= first.keys()


def open_source(location: str, options: ReadOptions) -> Source:
    """Return the questions of VQA v2's files, or of files that list image, question, answer."""
    questions = _question_files(location)
    if questions:
        return _version_2(location, questions, options)
    check_options(options, FORMAT, OURS, splits=False)
    paths = files(location, json_stream.SUFFIXES)
    if not paths:
        raise ValueError(f"expected *questions.json, or a list in JSON, at {location}; got none.")
    names = [options.columns.get(name, name) for name in OURS]
    first = first_value(paths[0])[1]
    found = list(first) if isinstance(first, dict) else names
    for ours, name in zip(OURS, names, strict=True):
        if name not in found:
            raise ValueError(
                f"expected a field {name!r} in {paths[0]}; got {', '.join(found)[:500]}. "
                f"Say what it is called: --columns {ours}=NAME."
            )
    fields = dict(zip(names, OURS, strict=True))
    small = size_of(paths) <= _SMALL
    return Source(
        FORMAT,
        location,
        "records",
        partial(_read_list, paths, names, options),
        items=sum(1 for p in paths for _ in json_items(p)) if small else None,
        fields={name: fields.get(name, "left out") for name in found},
        notes=[f"files: {len(paths)}", note(options)],
    )


def conversation(
    picture: Any, question: Any, answer: Any, people: Sequence[str] = ()
) -> dict[str, Any]:
    """Return the record of one question.

    Args:
        picture: as records hold it.
        question: text.
        answer: text, or several, of which the most frequent is taken.
        people: what several people answered, where `answer` is one text.
    """
    if isinstance(answer, list) and answer and all(isinstance(a, str) for a in answer):
        people = [checked_text(a, "answer").strip() for a in answer if a.strip()]
        answer = Counter(answer).most_common(1)[0][0]
    asked = {"type": "text", "text": checked_text(question, "question").strip()}
    said = {"type": "text", "text": checked_text(answer, "answer").strip()}
    shown = {"type": "image", "image": picture}
    record: dict[str, Any] = {
        "kind": "conversation",
        "messages": [
            {"role": "user", "content": [shown, asked]},
            {"role": "assistant", "content": [said]},
        ],
    }
    return record | {"meta": {"answers": [list(people)]}} if len(people) > 1 else record


def _question_files(location: str, *, glance: bool = False) -> list[Path]:
    return [p for p in files(location, (".json",), glance=glance) if "questions" in p.name.lower()]


def _read_list(paths: list[Path], names: list[str], options: ReadOptions) -> Iterator[Any]:
    for path in paths:

        def record(value: Any, folder: Path = path.parent) -> Iterator[dict[str, Any]]:
            row = checked_fields(value, *names)
            image, question, answer = (row[name] for name in names)
            yield conversation(picture_at(image, folder, options), question, answer)

        yield from each(json_items(path), record)


def _version_2(location: str, questions: list[Path], options: ReadOptions) -> Source:
    check_options(options, FORMAT, (), splits=True)
    path = choose_split(location, questions, options.split)
    beside = files(path.parent, (".json",))
    if Path(location).is_dir():
        beside += [p for p in files(location, (".json",)) if p not in beside]
    others = [p for p in beside if "annotations" in p.name.lower()]
    answers_path = choose_split(str(path.parent), others, _subset(path) or options.split)
    answers, told = _answers(answers_path)
    total, first = 0, None
    for key, value in json_values(path):
        total += key == "questions"
        if key == "data_subtype" and isinstance(value, str):
            told = value
        if key == "questions" and first is None:
            first = value
    if not isinstance(first, dict) or not {"image_id", "question", "question_id"} <= first.keys():
        raise ValueError(
            f"expected questions with image_id, question and question_id in {path}; "
            f"got {first!r:.200}."
        )
    subset = told if re.fullmatch(r"[\w-]+", told) else _subset(path)
    pattern, folder, example = _pictures(location, path, subset)
    return Source(
        FORMAT,
        location,
        "records",
        partial(_read_version_2, path, answers, folder, pattern, options),
        items=total,
        fields={
            "questions.question": "question",
            "questions.image_id": f"image, as {example}",
            "annotations.multiple_choice_answer": "answer",
            "annotations.answers": "what each person answered, for evaluation",
            "annotations.answer_type, question_type": "left out",
        },
        notes=[
            f"questions in {path}: {total}; answers in {answers_path.name}: {len(answers)}",
            f"pictures in {folder}",
            note(options),
        ],
    )


def _subset(path: Path) -> str:
    """Return ``train2014`` of ``v2_OpenEnded_mscoco_train2014_questions.json``."""
    words = path.name.removesuffix(".gz").removesuffix(".json").split("_")
    return re.sub(r"[{}]", "", words[-2]) if len(words) > 1 else ""


def _answers(path: Path) -> tuple[dict[Hashable, tuple[Any, Any]], str]:
    """Return answer and people's answers by question, and the subset that the file names."""
    found: dict[Hashable, tuple[Any, Any]] = {}
    subset = ""
    for key, value in json_values(path):
        if key == "data_subtype" and isinstance(value, str):
            subset = value
        if key == "annotations" and isinstance(value, dict):
            question = value.get("question_id")
            if isinstance(question, int | str):
                found[question] = value.get("multiple_choice_answer"), _people(value.get("answers"))
    if not found:
        raise ValueError(f"expected annotations with question_id in {path}; got none.")
    return found, subset


def _people(answers: Any) -> tuple[str, ...] | None:
    """Return what each person answered; nothing where it is not told, None where that is odd."""
    if answers is None:
        return ()
    if not isinstance(answers, list):
        return None
    try:
        given = [a["answer"] for a in answers]
        said = [checked_text(a, "answer").strip() for a in given if a != ""]
    except (ValueError, KeyError, TypeError):
        return None
    return tuple(map(sys.intern, said))  # millions of answers, few different ones


def _pictures(location: str, path: Path, subset: str) -> tuple[str, Path, str]:
    """Return how the pictures' names follow from their ids, their folder, and such a name."""
    called = f"COCO_{subset}_{{:012d}}.jpg", f"abstract_v002_{subset}_{{:012d}}.png"
    patterns = (*called, "{:012d}.jpg", "{}.jpg", "{}.png")
    first = itertools.islice((v for k, v in json_values(path) if k == "questions"), 20)
    ids = [v.get("image_id") for v in first if isinstance(v, dict)]
    known = [i for i in ids if isinstance(i, int)]
    failed = None
    for pattern in patterns:
        names = [pattern.format(image) for image in known]
        try:
            return pattern, picture_folder(location, path, subset, names), names[0]
        except ValueError as error:
            failed = failed or error
    raise failed or ValueError(f"expected questions with image_id in {path}; got none.")


def _read_version_2(
    path: Path,
    answers: dict[Hashable, tuple[Any, Any]],
    folder: Path,
    pattern: str,
    options: ReadOptions,
) -> Iterator[Any]:
    latest: tuple[Any, Any] = (None, None)  # questions about one picture follow each other

    def record(value: Any) -> Iterator[dict[str, Any]]:
        nonlocal latest
        row = checked_fields(value, "image_id", "question", "question_id")
        image, question = row["image_id"], row["question_id"]
        if not isinstance(image, int) or not isinstance(question, int | str):
            raise ValueError("expected numbers as 'image_id' and 'question_id'")
        if question not in answers:
            raise ValueError("a question without an annotation of its 'question_id'")
        answer, people = answers[question]
        if people is None:
            raise ValueError("expected a list of objects with an 'answer' each as 'answers'")
        if latest[0] != image:
            latest = (image, read_picture(below(folder, pattern.format(image)), options))
        yield conversation(latest[1], row["question"], answer, people)

    yield from each(_questions(path), record)


def _questions(path: Path) -> Iterator[tuple[str, Any]]:
    number = 0
    try:
        for key, value in json_values(path):
            if key == "questions":
                yield f"{path}, question {number}", value
                number += 1
    except (ValueError, *READ_ERRORS) as error:
        where = f"{path}, question {number}"
        yield where, BadItem(where, f"nothing from here on can be read: {error}")
