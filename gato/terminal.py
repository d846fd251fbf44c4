"""A conversation in the terminal: words and pictures as they are typed, answers as they come.

    > /image cat.png what is this?
    > is /image a.png the same as /image "my b.png"?
    > /task atari/Boxing-v5 40
    > where is the white boxer?

What a line means is decided in `Talk`; what a picture looks like there, and the history of lines,
in `gato.screen`. An error is one sentence and never ends the conversation.
"""

from __future__ import annotations

import difflib
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from gato.envs.files import require_writable, write_atomically
from gato.envs.readers.pictures import open_image
from gato.rollouts.agent import Agent
from gato.rollouts.conversation import Message, checked_messages, kept_for_answer
from gato.rollouts.engine import Sampling
from gato.rollouts.look import look
from gato.rollouts.messages import fitting, from_openai, to_openai
from gato.screen import history, show_picture
from gato.telling import printable, shown, tell

_IMAGE = re.compile(r"(?:^|(?<=\s))/image(?!\S)(?:\s+(?:\"([^\"]*)\"|'([^']*)'|(\S+)))?")
Parts = list[dict[str, Any]]
TASK = "/task TASK [STEPS [random|policy|expert]]"


@dataclass(frozen=True)
class Answer:
    """What was said, how it ended, and what it took."""

    text: str
    finish: str
    """``stop``, ``length``, or ``interrupted`` by the person."""
    prompt_tokens: int
    tokens: int
    dropped: int
    """Turns that were no longer read."""

    def to_json(self) -> dict[str, Any]:
        """Return it as ``--json`` prints it, in OpenAI's words."""
        return {
            "answer": self.text,
            "finish_reason": self.finish,
            "usage": {
                "prompt_tokens": self.prompt_tokens,
                "completion_tokens": self.tokens,
                "total_tokens": self.prompt_tokens + self.tokens,
            },
        }


def read_image(path: Path) -> np.ndarray:
    """Return an image file as uint8 (H, W, 3), in the size in which data are imported.

    Raises:
        ValueError: for a file that is missing or not an image.
    """
    if path.is_dir():
        raise ValueError(f"expected an image; {path} is a folder.")
    try:
        return fitting(open_image(path))
    except (OSError, ValueError) as error:
        raise ValueError(f"expected an image at {path}; {error}.") from error


def message(text: str, images: Sequence[np.ndarray] = ()) -> Message:
    """Return a user's message, its images before its text."""
    shown: Parts = [{"type": "image", "image": image} for image in images]
    return {"role": "user", "content": [*shown, {"type": "text", "text": text}]}


def said_by(
    agent: Agent,
    messages: Sequence[Message],
    sampling: Sampling,
    show: Callable[[str], None] = lambda text: None,
) -> Answer:
    """Return the agent's answer; `show` is called with its parts as they come.

    Ctrl-C ends the answer, which is then what has been said.
    """
    prepared = agent.prepare(messages, sampling.max_tokens)
    if prepared.dropped:
        some = "the first turn is" if prepared.dropped == 1 else "the first {} turns are"
        memory = agent.model.config.memory
        some, room = some.format(prepared.dropped), kept_for_answer(sampling.max_tokens, memory)
        tell(
            f"({some} no longer read: the model remembers {memory} tokens, of which {room} are "
            f"kept for the answer: --max-tokens)"
        )
    text, tokens, finish = "", 0, "interrupted"
    try:
        for delta in agent.write(prepared.prefix, sampling):
            text += delta.text
            tokens += delta.tokens
            finish = delta.finish or finish
            show(delta.text)
    except KeyboardInterrupt:
        finish = "interrupted"
    return Answer(text, finish, len(prepared.prefix), tokens, prepared.dropped)


class Talk:
    """A conversation under way and what its commands change."""

    def __init__(
        self,
        agent: Agent,
        sampling: Sampling,
        *,
        system: str | None = None,
        images: Sequence[np.ndarray] = (),
        out: TextIO | None = None,
    ) -> None:
        """Begin a conversation.

        Args:
            agent: whom to talk with.
            sampling: how it answers, until commands change that.
            system: said before everything else, also after a reset.
            images: shown before the first message.
            out: where answers go; by default stdout.
        """
        self.agent, self.sampling = agent, sampling
        self.out = sys.stdout if out is None else out
        self._system: list[Message] = (
            [] if system is None else [{"role": "system", "content": system}]
        )
        self.messages: list[Message] = list(self._system)
        self._waiting = list(images)
        """Pictures to be shown before the next message."""
        self._own: set[Path] = set()
        """Files that this conversation was saved in or loaded from, which may be written over."""

    def run(self, read: Callable[[str], str] | None = None) -> None:
        """Talk until the input ends; `read` returns a line for a prompt, by default `input`."""
        read = input if read is None else read
        alone = not sys.stdin.isatty()  # lines of a script, whose output is answers alone
        if not alone:
            self._say("/help tells what can be done; Ctrl-D leaves")
        with history():
            while True:
                try:
                    line = read("" if alone else "> ")
                except EOFError:
                    if not alone:
                        self._say("")
                    return
                except KeyboardInterrupt:
                    self._say("\n(Ctrl-D leaves)")
                    continue
                try:
                    if not self.take(line):
                        return
                except BrokenPipeError:
                    raise
                except KeyboardInterrupt:
                    self._say("\n(stopped)")
                except (ValueError, TypeError, OSError, RuntimeError) as error:
                    told = getattr(error, "strerror", None) or error  # without its number
                    tell(" ".join(str(told).split()))

    def take(self, line: str) -> bool:
        """Do what a line says; return whether the conversation goes on."""
        line = line.strip()
        if not line:
            return True
        word, _, rest = line.partition(" ")
        if word.startswith("//"):  # a message that begins with a stroke
            self._ask([{"type": "text", "text": line[1:]}])
        elif word == "/quit":
            return False
        elif not word.startswith("/") or word == "/image":
            self._message(line)
        elif word in COMMANDS:
            COMMANDS[word](self, rest.strip())
        else:
            known = ("/image", *COMMANDS, "/quit")
            close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
            hint = f"closest: {close[0]}" if close else f"known: {', '.join(known)}"
            raise ValueError(f"expected a command; got {word} ({hint}).")
        return True

    def _message(self, line: str) -> None:
        """Ask what a line says with pictures in their places; without words they wait."""
        parts: Parts = list(_parts(line))
        images = [part["image"] for part in parts if part["type"] == "image"]
        if len(images) == len(parts):
            for image in images:
                self._wait(image)
            return
        for image in images:
            show_picture(image, self.out)
        self._ask(parts)

    def _wait(self, image: np.ndarray) -> None:
        self._waiting.append(image)
        show_picture(image, self.out)
        self._say(f"({image.shape[1]} x {image.shape[0]} pixels, shown with the next message)")

    def _ask(self, parts: Parts) -> None:
        """Answer a message; where that fails, the conversation stays as it was."""
        waiting: Parts = [{"type": "image", "image": image} for image in self._waiting]
        turn: Message = {"role": "user", "content": [*waiting, *parts]}
        answer = said_by(self.agent, [*self.messages, turn], self.sampling, self._show)
        self._say("")
        if answer.finish == "interrupted":
            self._say("(stopped)")
        if answer.finish == "length":
            self._say("(cut off: see /max-tokens)")
        if answer.text or answer.finish != "interrupted":
            content = [{"type": "text", "text": answer.text}]
            self.messages += [turn, {"role": "assistant", "content": content}]
            self._waiting = []

    # ---- commands ----------------------------------------------------------------------------

    def reset(self, rest: str) -> None:
        """Forget everything but the system's message."""
        _no_more("/reset", rest)
        self.messages, self._waiting = list(self._system), []
        self._say("(a new conversation)")

    def save(self, rest: str) -> None:
        """Write the conversation to a file, in the form of OpenAI's messages."""
        path = Path(_needed("/save FILE", rest)).expanduser()
        if all(m["role"] != "assistant" for m in self.messages):
            raise ValueError("expected something to save; nothing has been said yet.")
        if path.exists() and path.resolve() not in self._own:
            raise ValueError(f"expected a new file; {path} is there already.")
        require_writable(path, "/save FILE")
        content = json.dumps({"messages": to_openai(self.messages)}, ensure_ascii=False)
        write_atomically(path, content.encode() + b"\n")
        self._own.add(path.resolve())
        self._say(f"({len(self.messages)} messages in {path})")

    def load(self, rest: str) -> None:
        """Go on with a conversation from a file; a system's message of its own stays."""
        path = Path(_needed("/load FILE", rest)).expanduser()
        loaded = read_messages(path)
        own = [message for message in loaded if message["role"] == "system"]
        self.messages, self._waiting = loaded if own else [*self._system, *loaded], []
        self._own.add(path.resolve())
        told = "; the system message is theirs" if own and self._system else ""
        self._say(f"({len(loaded)} messages from {path}{told})")

    def task(self, rest: str) -> None:
        """Look at a task as it is played."""
        words = rest.split()
        if not 1 <= len(words) <= 3:
            raise ValueError(f"expected {TASK}; got {rest!r}.")
        steps = int(_number(words[1], int, 0, 100_000)) if len(words) > 1 else 0
        who = words[2] if len(words) > 2 else "random"
        if who not in ("random", "policy", "expert"):
            raise ValueError(f"expected random, policy or expert; got {who!r}.")
        by: Any = who
        if who == "policy":
            by = self.agent.policy(words[0], seeds=[self.sampling.seed]).select_action
        seen = look(words[0], steps, self.sampling.seed, by)
        if seen.steps < steps:
            self._say(f"(the episode ended after {seen.steps} steps)")
        if seen.words:
            self._say(f"({printable(seen.words)})")
        self._wait(seen.picture)

    def max_tokens(self, rest: str) -> None:
        """Set or tell how long an answer may be."""
        if rest:
            self.sampling = replace(self.sampling, max_tokens=int(_number(rest, int, 1, 2**31)))
        self._say(f"(max-tokens {self.sampling.max_tokens})")

    def temperature(self, rest: str) -> None:
        """Set or tell the temperature."""
        if rest:
            self.sampling = replace(self.sampling, temperature=_number(rest, float, 0.0, 100.0))
        self._say(f"(temperature {self.sampling.temperature:g})")

    def seed(self, rest: str) -> None:
        """Set or tell the seed."""
        if rest:
            self.sampling = replace(self.sampling, seed=int(_number(rest, int, 0, 2**63 - 1)))
        self._say(f"(seed {self.sampling.seed})")

    def help(self, rest: str) -> None:
        """Tell what there is."""
        width = max(len(usage) for usage, _ in HELP)
        for usage, about in HELP:
            self._say(f"{usage:{width}}  {about}")

    def _show(self, text: str) -> None:
        self.out.write(shown(text, self.out))
        self.out.flush()

    def _say(self, text: str) -> None:
        self.out.write(text + "\n")
        self.out.flush()


COMMANDS: Mapping[str, Callable[[Talk, str], None]] = {
    "/task": Talk.task,
    "/reset": Talk.reset,
    "/save": Talk.save,
    "/load": Talk.load,
    "/max-tokens": Talk.max_tokens,
    "/temperature": Talk.temperature,
    "/seed": Talk.seed,
    "/help": Talk.help,
}
HELP = (
    ("/image FILE", "show an image: before a message, in its midst, several too"),
    (TASK, "look at a task after some steps, and ask about it"),
    ("/reset", "forget the conversation"),
    ("/save FILE", "write it down, as OpenAI's messages in JSON"),
    ("/load FILE", "go on with one that was saved"),
    ("/max-tokens [N]", "how long an answer may be; as much room is kept for it"),
    ("/temperature [T]", "0 takes the likeliest words"),
    ("/seed [N]", "of what is drawn"),
    ("/help", "tell this"),
    ("/quit, Ctrl-D", "leave; Ctrl-C stops an answer"),
    ("//...", "a message that begins with a stroke"),
)


def read_messages(path: Path) -> list[Message]:
    """Return a conversation from a file: ``{"messages": [...]}``, or the list alone.

    Of JSON lines the first is taken.

    Raises:
        ValueError: where there is none, saying what is wrong.
    """
    try:
        text = path.read_text(encoding="utf-8")
        lines = path.suffix in (".jsonl", ".ndjson")
        value = json.loads(text.split("\n", 1)[0] if lines else text)
        if isinstance(value, dict) and "messages" in value:
            value = value["messages"]
        messages = from_openai(value)
        checked_messages([*messages, {"role": "user", "content": ""}])
    except (OSError, ValueError, RecursionError) as error:
        told = getattr(error, "strerror", None) or error
        if isinstance(error, UnicodeDecodeError):
            told = "it is no text"
        elif isinstance(error, json.JSONDecodeError):
            told = f"it is no JSON ({error})"
        raise ValueError(f"expected a conversation in {path}; {told}.") from error
    return messages


def _parts(line: str) -> Iterator[dict[str, Any]]:
    """Yield the texts and pictures of a line in their order."""
    end = 0
    for found in _IMAGE.finditer(line):
        file = next((g for g in found.groups() if g), None)
        if file is None:
            raise ValueError("expected /image FILE; got no file.")
        yield from _text(line[end : found.start()])
        yield {"type": "image", "image": read_image(Path(file).expanduser())}
        end = found.end()
    yield from _text(line[end:])


def _text(text: str) -> Iterator[dict[str, Any]]:
    if text.strip():
        yield {"type": "text", "text": text.strip()}


def _number(text: str, kind: Callable[[str], float], low: float, high: float) -> float:
    try:
        number = kind(text)
    except ValueError:
        number = float("nan")
    if not low <= number <= high:
        whole = "a whole number" if kind is int else "a number"
        raise ValueError(f"expected {whole} from {low:g} to {high:g}; got {text!r}.")
    return number


def _needed(usage: str, rest: str) -> str:
    if not rest:
        raise ValueError(f"expected {usage}; got no file.")
    return rest.strip("\"'")


def _no_more(word: str, rest: str) -> None:
    if rest:
        raise ValueError(f"expected {word} alone; got {rest!r} behind it.")
