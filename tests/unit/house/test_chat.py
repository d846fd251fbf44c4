"""`gato chat` as it is typed: every command, every mistake, pictures, Ctrl-C and Ctrl-D."""

from __future__ import annotations

import errno
import io
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gato import cli, screen, terminal
from gato.config import TrainConfig
from gato.envs.readers import vqa
from gato.envs.readers.chat import open_source
from gato.envs.readers.reader import ReadOptions
from gato.envs.records import images_of
from gato.printing import print_table
from gato.rollouts.agent import Agent
from gato.rollouts.engine import Delta, Sampling
from gato.rollouts.look import Sight
from gato.telling import settle_streams
from gato.terminal import COMMANDS, HELP, Talk, read_messages
from gato.train import train

SHORT = Sampling(max_tokens=4)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("chat") / "run"


@pytest.fixture
def checkpoint(tiny: TrainConfig, trained: Path) -> Path:
    if not trained.exists():
        train(replace(tiny, steps=1, save_every=1), trained, device="cpu")
    return trained


@pytest.fixture
def agent(checkpoint: Path) -> Agent:
    return Agent.load(checkpoint, "cpu")


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    for name, colour in (("red.png", "red"), ("my blue.png", "blue")):
        Image.new("RGB", (16, 16), colour).save(tmp_path / name)
    (tmp_path / "text.png").write_text("no image")
    return tmp_path


class Terminal(io.StringIO):
    """Text that is written to a terminal."""

    def isatty(self) -> bool:
        return True


def talk(agent: Agent, *lines: str, **options: object) -> tuple[Talk, str]:
    """Return a conversation after some lines, and what was printed."""
    out = io.StringIO()
    made = Talk(agent, options.pop("sampling", SHORT), out=out, **options)  # type: ignore[arg-type]
    given = iter(lines)

    def read(prompt: str) -> str:
        try:
            return next(given)
        except StopIteration:
            raise EOFError from None

    made.run(read)
    return made, out.getvalue()


def contents(made: Talk) -> list[list[str]]:
    """Return per message its role and its parts; of a picture, the colour of its first pixel."""

    def part(one: dict) -> str:
        return one["text"] if one["type"] == "text" else str(one["image"][0, 0])

    return [
        [m["role"], *([m["content"]] if isinstance(m["content"], str) else map(part, m["content"]))]
        for m in made.messages
    ]


def test_what_is_said_is_what_the_agent_says(agent: Agent) -> None:
    made, out = talk(agent, "go to the ball", "", "  and then? ", system="be brief")
    first = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "go to the ball"},
    ]
    answer = agent.chat(first, max_tokens=4)
    assert contents(made)[2] == ["assistant", answer]
    assert answer in out
    second = [*first, {"role": "assistant", "content": answer}]
    again = agent.chat([*second, {"role": "user", "content": "and then?"}], max_tokens=4)
    assert made.messages[-1]["content"][0]["text"] == again


def test_pictures_stand_where_they_are_named(agent: Agent, pictures: Path, monkeypatch) -> None:
    monkeypatch.chdir(pictures)
    red, blue = "[255   0   0]", "[  0   0 255]"
    made, out = talk(agent, "/image red.png", "/image 'my blue.png'", "what are they?")
    assert contents(made)[0] == ["user", red, blue, "what are they?"]
    assert out.count("(16 x 16 pixels, shown with the next message)") == 2
    line = 'is /image red.png like /image "my blue.png" or not'
    made, _ = talk(agent, line, "and now?")
    assert contents(made)[0] == ["user", "is", red, "like", blue, "or not"]
    assert contents(made)[2] == ["user", "and now?"]
    made, _ = talk(agent, "/image red.png what is it?", images=[np.zeros((16, 16, 3), np.uint8)])
    assert contents(made)[0] == ["user", "[0 0 0]", red, "what is it?"]
    made, _ = talk(agent, "/image red.png /image red.png", "/reset", "what?")
    assert contents(made)[0] == ["user", "what?"]


def test_a_conversation_is_saved_and_gone_on_with(agent: Agent, pictures: Path) -> None:
    file = pictures / "talk.jsonl"
    lines = (f"/image {pictures}/red.png what?", f"/save {file}", "more 🙂", f"/save {file}")
    made, out = talk(agent, *lines, system="be brief")
    assert f"(5 messages in {file})" in out
    saved = json.loads(file.read_text())["messages"]
    assert [m["role"] for m in saved] == ["system", "user", "assistant", "user", "assistant"]
    assert saved[1]["content"][0]["image_url"]["url"].startswith("data:image/png;base64,")
    loaded, out = talk(agent, f"/load {file}")
    assert contents(loaded) == contents(made)
    assert f"(5 messages from {file})" in out
    (record,) = open_source(str(file), ReadOptions()).read()  # gato train reads it too
    assert len(record["messages"]) == 5
    assert np.array_equal(
        record["messages"][1]["content"][0]["image"], read_messages(file)[1]["content"][0]["image"]
    )
    one, _ = talk(agent, f"/load {file}", "and?", system="be brief")
    other, _ = talk(agent, lines[0], lines[2], "and?", system="be brief")
    assert contents(one) == contents(other)


def test_a_loaded_conversation_has_one_system_message(agent: Agent, tmp_path: Path) -> None:
    bare, full = tmp_path / "bare.json", tmp_path / "full.json"
    talk(agent, "go", f"/save {bare}")
    talk(agent, "go", f"/save {full}", system="be kind")
    made, out = talk(agent, f"/load {bare}", system="be brief")
    assert contents(made)[0] == ["system", "be brief"]
    assert [m["role"] for m in made.messages] == ["system", "user", "assistant"]
    assert f"(2 messages from {bare})" in out
    made, out = talk(agent, f"/load {full}", system="be brief")
    assert contents(made)[0] == ["system", "be kind"]
    assert len(made.messages) == 3
    assert f"(3 messages from {full}; the system message is theirs)" in out
    made, _ = talk(agent, f"/load {bare}")
    assert [m["role"] for m in made.messages] == ["user", "assistant"]


def test_what_others_saved_is_not_written_over(agent: Agent, tmp_path: Path, capsys) -> None:
    file = tmp_path / "mine.json"
    file.write_text("mine")
    talk(agent, "go", f"/save {file}", f"/save {tmp_path}/no/folder.json", "/save /proc/x.json")
    assert file.read_text() == "mine"
    told = capsys.readouterr().err
    assert f"expected a new file; {file} is there already." in told
    for path in (f"{tmp_path}/no/folder.json", "/proc/x.json"):
        got = f"expected /save FILE as a file in a folder that can be written; got {path} (No such"
        assert got in told
    assert "Errno" not in told
    assert [p.name for p in tmp_path.iterdir()] == ["mine.json"]


def test_a_full_disk_is_told_in_words(agent: Agent, tmp_path: Path, monkeypatch, capsys) -> None:
    def full(path: Path, content: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), f".{path.name}.1.tmp")

    monkeypatch.setattr(terminal, "write_atomically", full)
    talk(agent, "go", f"/save {tmp_path}/a.json")
    assert capsys.readouterr().err.splitlines()[-1] == "No space left on device"


def test_settings_are_changed_and_told(agent: Agent) -> None:
    made, out = talk(
        agent,
        "/max-tokens",
        "/max-tokens 3",
        "/temperature",
        "/temperature 0.75",
        "/seed",
        "/seed 12",
        "/help",
        "/quit",
        "never",
    )
    assert (made.sampling.temperature, made.sampling.seed) == (0.75, 12)
    assert made.sampling.max_tokens == 3
    for told in (
        "(max-tokens 4)",
        "(max-tokens 3)",
        "(temperature 0)",
        "(temperature 0.75)",
        "(seed 0)",
        "(seed 12)",
    ):
        assert told in out
    assert made.messages == []
    for usage, about in HELP:
        assert usage in out
        assert about in out
    assert {usage.split()[0].strip(",") for usage, _ in HELP} == {
        *COMMANDS, "/image", "/quit", "//...",
    }  # fmt: skip


def test_a_picture_is_the_same_in_chat_as_in_data(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for size in ((200, 40), (640, 480), (30, 50), (16, 3000), (48, 48)):
        folder = tmp_path / f"{size[0]}"
        folder.mkdir()
        file = folder / "one.png"
        Image.fromarray(rng.integers(0, 255, (*size[::-1], 3), np.uint8)).save(file)
        asked = [{"image": "one.png", "question": "what?", "answer": "noise"}]
        (folder / "asked.json").write_text(json.dumps(asked))
        (record,) = vqa.open_source(str(folder / "asked.json"), ReadOptions()).read()
        (picture,) = images_of(record)
        assert np.array_equal(terminal.read_image(file), picture)


def test_a_seed_says_the_same_again(agent: Agent) -> None:
    def said(seed: int) -> list:
        hot = Sampling(max_tokens=12, temperature=3.0)
        return contents(talk(agent, f"/seed {seed}", "go", sampling=hot)[0])

    assert said(3) == said(3)
    assert said(3) != said(4)


def test_a_task_is_looked_at(agent: Agent, monkeypatch) -> None:
    asked = []

    def look(task, steps, seed, by):
        asked.append((task, steps, seed, by if isinstance(by, str) else "policy"))
        return Sight(np.full((16, 16, 3), 7, np.uint8), "go to the \x1b[2Jball", min(steps, 5))

    monkeypatch.setattr(terminal, "look", look)
    made, out = talk(
        agent,
        "/task atari/Pong-v5",
        "/seed 2",
        "/task toy/arm-v0 9 policy",
        "/task a 3 expert",
        "?",
    )
    assert asked == [
        ("atari/Pong-v5", 0, 0, "random"), ("toy/arm-v0", 9, 2, "policy"), ("a", 3, 2, "expert"),
    ]  # fmt: skip
    assert "(the episode ended after 5 steps)" in out
    assert "(go to the ␛[2Jball)" in out
    assert contents(made)[0] == ["user", *["[7 7 7]"] * 3, "?"]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("/imag x.png", "expected a command; got /imag (closest: /image)"),
        ("/xyz", "known: /image, /task"),
        ("/image", "expected /image FILE; got no file"),
        ("what is /image", "expected /image FILE; got no file"),
        ("/image nowhere.png", "expected an image at nowhere.png; no picture"),
        ("/image text.png what?", "expected an image at text.png; no picture of the formats"),
        ("/save", "expected /save FILE; got no file"),
        ("/save new.json", "nothing has been said yet"),
        ("/load", "expected /load FILE"),
        ("/load nowhere.json", "nowhere.json; No such file or directory"),
        ("/load text.png", "expected a conversation in text.png; it is no JSON (Expecting value"),
        ("/save nowhere/x.json", "expected something to save"),
        ("/image .", "expected an image; . is a folder"),
        ("/max-tokens 0", "expected a whole number from 1"),
        ("/seed 9223372036854775808", "expected a whole number from 0"),
        ("one \udce4", "got a byte that is not UTF-8 at position 4"),
        ("/load .", "Is a directory"),
        ("/reset now", "expected /reset alone; got 'now' behind it"),
        ("/temperature hot", "expected a number from 0 to 100; got 'hot'"),
        ("/temperature -1", "expected a number from 0 to 100; got '-1'"),
        ("/temperature nan", "expected a number"),
        ("/seed 1.5", "expected a whole number from 0"),
        ("/seed -3", "expected a whole number from 0"),
        ("/task", "expected /task TASK [STEPS [random|policy|expert]]; got ''"),
        ("/task a 1 random 3", "expected /task TASK"),
        ("/task atari/Pon-v5", "closest: atari/Pong-v5"),
        ("/task atari/Pong-v5 x", "expected a whole number from 0 to 100000; got 'x'"),
        ("/task atari/Pong-v5 3 sometimes", "random, policy or expert; got 'sometimes'"),
        ("/task atari/Pong-v5 3 policy", "tasks this model knows"),
        ("/task gym/os:system", "'gym/os:system' names a module"),
        ("half \ud83d", "must be valid Unicode"),
        ("go to the red ball " * 50, "the last turn takes"),
    ],
)
def test_a_mistake_is_one_sentence(
    agent: Agent, pictures: Path, monkeypatch, capsys, line: str, told: str
) -> None:
    monkeypatch.chdir(pictures)
    before = sorted(p.name for p in pictures.iterdir())
    made, _ = talk(agent, line)
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1
    assert made.messages == []
    assert sorted(p.name for p in pictures.iterdir()) == before
    made, _ = talk(agent, line, "go")  # and the conversation goes on
    assert contents(made)[0] == ["user", "go"]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("[]", "the last message must be|expected a conversation"),
        ('{"messages": 3}', "a list of messages; got int"),
        ('{"a": 1}', "a list of messages; got dict"),
        ('[{"role": "robot", "content": "hi"}]', "role is system, user or assistant; got 'robot'"),
        ('[{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]', "stand before"),
        ('[{"role": "user", "content": "\\ud83d"}]', "valid Unicode"),
        (
            '[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "/a"}}]}]',
            "not f",
        ),
        ("[" * 100_000, "expected a conversation in"),
        ('{"messages": [', r"it is no JSON \(Expecting value"),
        ("\udc89PNG", "it is no text"),
    ],
)
def test_what_is_no_conversation_is_not_loaded(
    agent: Agent, tmp_path: Path, capsys, content: str, told: str
) -> None:
    (tmp_path / "other.json").write_text(content, errors="surrogateescape")
    made, _ = talk(agent, "go", f"/load {tmp_path}/other.json")
    if content == "[]":  # an empty conversation is one
        assert made.messages == []
        return
    assert re.search(told, capsys.readouterr().err)
    assert contents(made)[0] == ["user", "go"]


def test_dropped_turns_are_told(agent: Agent, capsys) -> None:
    made, _ = talk(agent, *["go to the red ball"] * 10)
    told = capsys.readouterr().err.splitlines()
    kept = "the model remembers 96 tokens, of which 4 are kept for the answer: --max-tokens"
    assert f"(the first turn is no longer read: {kept})" in told
    assert re.search(r"first [2-9] turns are no longer read", told[-1])
    assert len(made.messages) == 20


def test_ctrl_c_stops_an_answer_and_not_the_conversation(agent: Agent, monkeypatch) -> None:
    write = Agent.write
    count = 0

    def interrupted(self, prefix, sampling) -> Iterator:
        nonlocal count
        count += 1
        for n, delta in enumerate(write(self, prefix, sampling)):
            if n == 2 and count == 1:
                raise KeyboardInterrupt
            yield delta

    monkeypatch.setattr(Agent, "write", interrupted)
    made, out = talk(agent, "go", "and now?", sampling=Sampling(max_tokens=12, temperature=2.0))
    assert "(stopped)" in out
    assert [m["role"] for m in made.messages] == ["user", "assistant"] * 2
    assert (
        0
        < len(made.messages[1]["content"][0]["text"])
        < len(made.messages[3]["content"][0]["text"])
    )

    def look(*_: object) -> Sight:
        raise KeyboardInterrupt

    monkeypatch.setattr(terminal, "look", look)
    made, out = talk(agent, "/task atari/Pong-v5 99", "go")
    assert "(stopped)" in out
    assert len(made.messages) == 2


def test_a_terminal_is_not_obeyed_by_what_a_model_writes(agent: Agent) -> None:
    out = Terminal()
    made = Talk(agent, SHORT, out=out)
    made._show("\x1b[2J\x9b31m\r\x07a\tb\n🙂")
    assert out.getvalue() == "␛[2J\ufffd31m␍␇a\tb\n🙂"
    plain = io.StringIO()
    Talk(agent, SHORT, out=plain)._show("\x1b[2J")  # in a file it is what it is
    assert plain.getvalue() == "\x1b[2J"


@pytest.mark.parametrize("command", ["chat", "caption"])
def test_no_command_lets_a_model_write_to_the_terminal(
    checkpoint: Path, pictures: Path, monkeypatch, command: str
) -> None:
    wild = "\x1b[2Jred\n"
    monkeypatch.setattr(Agent, "write", lambda *_: iter([Delta(wild, 3, (), "stop")]))
    monkeypatch.setattr(Agent, "captions", lambda *_: [wild])
    asked = {"chat": ["--prompt", "go"], "caption": [str(pictures / "red.png")]}[command]
    for out, wanted in ((Terminal(), "␛[2Jred"), (io.StringIO(), "\x1b[2Jred")):
        monkeypatch.setattr("sys.stdout", out)
        assert cli.main([command, str(checkpoint), *asked]) == cli.DONE
        assert wanted in out.getvalue()
        assert ("\x1b" in out.getvalue()) == (not out.isatty())


def test_no_name_of_a_file_is_obeyed_by_the_terminal(
    checkpoint: Path, pictures: Path, monkeypatch
) -> None:
    wild = pictures / "a\x1b]0;b\x07.png"
    for out in (Terminal(), io.StringIO()):
        err = type(out)()
        monkeypatch.setattr("sys.stdout", out)
        monkeypatch.setattr("sys.stderr", err)
        wild.write_text("no picture")
        assert cli.main(["caption", str(checkpoint), str(wild)]) == cli.BAD_INPUT
        assert "expected an image at " in err.getvalue()
        shutil.copyfile(pictures / "red.png", wild)
        two = [str(wild), str(pictures / "red.png")]
        assert cli.main(["classify", str(checkpoint), *two, "--labels", "a,b"]) == cli.DONE
        print_table([{"file": wild.name}])
        for told in (out.getvalue(), err.getvalue()):
            assert ("a\x1b]0;b\x07.png" in told) == (not out.isatty())
            assert ("a␛]0;b␇.png" in told) == out.isatty()
        if out.isatty():
            assert "\x1b]0;b" not in out.getvalue()


@pytest.mark.parametrize(
    ("spelling", "wanted"),
    [
        ("utf-8:strict", b"ab?\xc3\x9c: "),
        ("ascii", b"ab??: "),
        ("ascii:backslashreplace", b"\\xdc"),
    ],
)
def test_a_name_that_stdout_cannot_spell_ends_nothing(
    checkpoint: Path, pictures: Path, monkeypatch, spelling: str, wanted: bytes
) -> None:
    name = str(pictures / os.fsdecode(b"ab\xff\xc3\x9c"))
    shutil.copyfile(pictures / "red.png", name)
    monkeypatch.setattr(Agent, "captions", lambda *_: ["red"])
    encoding, _, errors = spelling.partition(":")
    out = io.TextIOWrapper(io.BytesIO(), encoding, errors or "strict")
    monkeypatch.setattr("sys.stdout", out)
    assert cli.main(["caption", str(checkpoint), name]) == cli.DONE
    assert wanted in out.buffer.getvalue()


def test_bytes_of_a_name_reach_a_pipe_that_takes_them(pictures: Path, monkeypatch) -> None:
    out = io.TextIOWrapper(io.BytesIO(), "utf-8", "surrogateescape")
    monkeypatch.setattr("sys.stdout", out)
    settle_streams()
    print(os.fsdecode(b"\xff"), end="", flush=True)
    assert out.buffer.getvalue() == b"\xff"


def test_streams_that_are_closed_end_nothing(checkpoint: Path, monkeypatch) -> None:
    for name in ("stdin", "stdout", "stderr"):  # as after <&- >&- 2>&-
        monkeypatch.setattr(sys, name, None)
    assert cli.main(["chat", str(checkpoint)]) == cli.DONE
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        assert stream.name == os.devnull
        stream.close()


def test_a_script_reads_answers_alone(checkpoint: Path, monkeypatch, capsys) -> None:
    said = json.loads(run(capsys, "chat", checkpoint, "--prompt", "go", "--json")[1])["answer"]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"go\n")))
    out = run(capsys, "chat", checkpoint)[1].splitlines()
    cut = [line for line in out if line != "(cut off: see /max-tokens)"]
    assert cut == said.splitlines()


def test_words_that_begin_like_a_command_are_words(agent: Agent) -> None:
    for line in ("what does /images/cat mean?", "see /image-net"):
        made, _ = talk(agent, line)
        assert contents(made)[0] == ["user", line]


def test_pictures_are_blocks_where_there_are_colours(monkeypatch) -> None:
    picture = np.zeros((64, 128, 3), np.uint8)
    picture[:, :64] = (255, 0, 0)
    for name in ("NO_COLOR", "FORCE_COLOR", "COLORTERM"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "100")
    drawn = {}
    for term in ("xterm-256color", "dumb"):
        monkeypatch.setenv("TERM", term)
        out = Terminal()
        screen.show_picture(picture, out)
        drawn[term] = out.getvalue()
    assert drawn["dumb"] == ""
    lines = drawn["xterm-256color"].splitlines()
    assert len(lines) == 10  # 40 pixels wide, 20 high, two to a line
    assert re.sub(r"\x1b\[[0-9;]*m", "", lines[0]) == "▀" * 40
    plain = io.StringIO()
    screen.show_picture(picture, plain)
    assert plain.getvalue() == ""


# ---- the command -----------------------------------------------------------------------------


def run(capsys, *arguments: object) -> tuple[int, str, str]:
    code = cli.main([str(a) for a in arguments])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_a_prompt_is_answered(agent: Agent, checkpoint: Path, pictures: Path, capsys) -> None:
    shown = [terminal.read_image(pictures / n) for n in ("red.png", "my blue.png")]
    content = [{"type": "image", "image": i} for i in shown]
    content.append({"type": "text", "text": "what?"})
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": content}]
    answer = agent.chat(messages, max_tokens=5, temperature=0.9, seed=4)
    given = ["chat", checkpoint, "--prompt", "what?", "--system", "be brief", "--max-tokens", 5]
    for name in ("red.png", "my blue.png"):
        given += ["--image", pictures / name]
    given += ["--temperature", 0.9, "--seed", 4]
    assert run(capsys, *given)[:2] == (0, answer + "\n")
    code, out, _ = run(capsys, *given, "--json")
    told = json.loads(out)
    assert (code, told["prompt"], told["answer"]) == (0, "what?", answer)
    usage = told["usage"]
    assert usage["prompt_tokens"] == len(agent.prepare(messages, 5).prefix)
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert told["finish_reason"] in ("stop", "length")
    stop = answer[1:3]
    told = json.loads(run(capsys, *given, "--stop", stop, "--stop", "zzz", "--json")[1])
    assert (told["answer"], told["finish_reason"]) == (answer[: answer.index(stop)], "stop")


def test_a_prompt_comes_from_stdin(checkpoint: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("go 🙂\nnow".encode())))
    given = ["chat", checkpoint, "--prompt", "-", "--max-tokens", 2, "--json"]
    assert json.loads(run(capsys, *given)[1])["prompt"] == "go 🙂\nnow"
    for line in (b"go 1\n", b"go 1\r\n", b"go 1"):  # as `echo` ends it, there and elsewhere
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(line)))
        assert json.loads(run(capsys, *given)[1])["prompt"] == "go 1"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"go \xff")))
    code, out, err = run(capsys, *given)
    assert (code, out) == (cli.BAD_INPUT, "")
    assert "must be valid Unicode" in err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--json"], "expected --prompt beside --json"),
        (["--prompt", "a", "--stop", ""], "stop must be strings"),
        (["--prompt", "a", "--temperature", "-1"], "temperature"),
        (["--prompt", "a", "--top-p", "0"], "top_p"),
        (["--prompt", "a", "--image", "/nowhere.png"], "expected an image at /nowhere.png"),
        (["--prompt", "red ball " * 200], "the last turn takes"),
    ],
)
def test_a_bad_request_is_one_sentence(checkpoint: Path, capsys, arguments, told) -> None:
    code, out, err = run(capsys, "chat", checkpoint, *arguments)
    assert (code, out, err.count("\n")) == (cli.BAD_INPUT, "", 1)
    assert told in err


def test_captions_by_example(agent: Agent, checkpoint: Path, pictures: Path, capsys) -> None:
    red, blue = pictures / "red.png", pictures / "my blue.png"
    examples = [(terminal.read_image(red), "a red=box"), (terminal.read_image(blue), "")]
    given = ["caption", checkpoint, red, blue, "--example", f"{red}=a red=box"]
    given += ["--example", f"{blue}=", "--max-tokens", 6]
    told = json.loads(run(capsys, *given, "--json")[1])
    assert told == [
        {"image": str(p), "caption": agent.caption(terminal.read_image(p), 6, examples)}
        for p in (red, blue)
    ]
    asked = run(capsys, *given, "--question", "what is it?")[1]
    answers = [agent.caption(e[0], 6, examples, "what is it?") for e in examples]
    assert asked == f"{red}: {answers[0]}\n{blue}: {answers[1]}\n"
    code, _, err = run(capsys, "caption", checkpoint, red, "--example", "red.png")
    assert code == cli.BAD_INPUT
    assert "expected --example FILE=TEXT; got 'red.png'" in err


# ---- a real terminal -------------------------------------------------------------------------


ENDLESS = """
import sys, time
import numpy as np
from gato import cli
from gato.rollouts import engine

def choose(*arguments):
    time.sleep(0.02)
    return np.array([280])

engine.choose = choose  # a model that never ends
sys.exit(cli.main(sys.argv[1:]))
"""


class Typed:
    """`gato chat` in a pseudo-terminal."""

    def __init__(self, checkpoint: Path, cache: Path, *options: str) -> None:
        ours, theirs = pty.openpty()
        command = [sys.executable, "-c", ENDLESS, "chat", str(checkpoint), *options]
        env = {**os.environ, "GATO_CACHE": str(cache), "TERM": "xterm-256color"}
        self.process = subprocess.Popen(
            command, stdin=theirs, stdout=theirs, stderr=theirs, env=env, start_new_session=True,
            preexec_fn=_own_terminal,
        )  # fmt: skip
        os.close(theirs)
        self.terminal, self.seen, self._from = ours, "", 0

    def until(self, text: str, seconds: float = 20.0) -> None:
        """Wait for a text that was not waited for yet."""
        end = time.monotonic() + seconds
        while (at := self.seen.find(text, self._from)) < 0:
            left = end - time.monotonic()
            assert left > 0, f"{text!r} did not come; got {self.seen[-500:]!r}"
            if select.select([self.terminal], [], [], left)[0]:
                try:
                    self.seen += os.read(self.terminal, 65536).decode(errors="replace")
                except OSError:  # the other end is closed
                    assert text in self.seen[self._from :], self.seen
        self._from = at + len(text)

    def type(self, text: str) -> None:
        os.write(self.terminal, text.encode())

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.terminal)


def _own_terminal() -> None:
    """Make the terminal the child's own, so that Ctrl-C typed there reaches it."""
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_a_conversation_in_a_terminal(checkpoint: Path, pictures: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    typed = Typed(checkpoint, cache, "--max-tokens", "100000")
    try:
        typed.until("Ctrl-D leaves")
        typed.until("> ")
        typed.type(f"/image {pictures}/red.png\n")
        typed.until("▀")
        typed.until("shown with the next message")
        typed.until("> ")
        typed.type("go on and on\n")
        typed.until("\n")
        time.sleep(0.3)  # while it writes
        typed.type("\x03")
        typed.until("(stopped)")
        typed.until("> ")
        typed.type("half a line")
        typed.until("half a line")
        time.sleep(0.2)  # Python sees no signal that comes just before it waits for a key
        typed.type("\x03")
        typed.until("(Ctrl-D leaves)")
        typed.until("> ")
        typed.type("\x1b[A")  # the line before
        typed.until("go on and on")
        typed.type("\x15/seed 7\n")
        typed.until("(seed 7)")
        typed.until("> ")
        typed.type("\x04")
        assert typed.process.wait(60) == 0
    finally:
        typed.close()
    kept = cache / "chat-history"
    assert "go on and on" in kept.read_text()
    assert kept.stat().st_mode & 0o777 == 0o600


def test_history_is_no_must(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GATO_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr("sys.stdin", Terminal())
    with screen.history():
        pass
    assert (tmp_path / "file").read_text() == ""
