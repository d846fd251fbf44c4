"""One checkpoint as an agent: it acts, chats, captions and classifies."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from gato.checkpoint import Checkpoint, load_checkpoint
from gato.envs.episode import Episode
from gato.rollouts import generate, retrieval, zero_shot
from gato.rollouts.choices import check_choices, judge
from gato.rollouts.conversation import Example, Prepared, asked, few_shot, prepare
from gato.rollouts.conversation import Message as Message
from gato.rollouts.engine import Delta, Sampling
from gato.rollouts.policy import Policy
from gato.tokenizers.stream import TokenSequence


def load(path: str | Path, device: torch.device | str | None = None) -> Agent:
    """Return the agent of a checkpoint or of a run's newest checkpoint.

    Args:
        path: a folder that training wrote.
        device: by default the GPU where there is one.

    Raises:
        ValueError: for a missing, truncated or foreign checkpoint, saying what is wrong.
    """
    return Agent.load(path, device)


class Agent:
    """A loaded model with everything it needs to act and to talk."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.model = checkpoint.model.eval()
        self.serializer = checkpoint.serializer

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str | None = None) -> Agent:
        """Return the agent of a checkpoint; see the function `load`."""
        chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
        return cls(load_checkpoint(path, chosen))

    def __repr__(self) -> str:
        return f"Agent({str(self.checkpoint.path)!r}, {len(self.serializer.tasks)} tasks)"

    @property
    def name(self) -> str:
        """Where its checkpoint lies."""
        return str(self.checkpoint.path)

    @property
    def tasks(self) -> list[str]:
        """The tasks it was trained on."""
        return sorted(self.serializer.tasks)

    def policy(
        self,
        tasks: str | Sequence[str],
        temperature: float | None = None,
        seeds: Sequence[int] | None = None,
        prompts: Mapping[str, Episode] | None = None,
        kappa: float | None = None,
        execute: int | None = None,
        precision: str | None = None,
    ) -> Policy:
        """Return a policy of one row per task; of one row for a single task.

        Args:
            tasks: one task id, or one per row.
            temperature: of the actions; by default what each task was trained for.
            seeds: of each row's random generator.
            prompts: per task, steps of an episode to be shown before the first step.
            kappa: how far returns to come are tilted upwards; by default as trained.
            execute: actions taken of a chunk of ``joint`` ones; by default all.
            precision: ``float32`` or ``bfloat16``; by default the model's own on a CPU, bfloat16
                on a GPU.
        """
        return Policy(
            self.model,
            self.serializer,
            tasks,
            temperature=temperature,
            seeds=seeds,
            prompts=prompts,
            kappa=kappa,
            execute=execute,
            precision=precision,
        )

    def chat(
        self,
        messages: Sequence[Message],
        max_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        stop: Sequence[str] = (),
    ) -> str:
        """Return the assistant's answer to a conversation; see `Message`.

        Args:
            messages: the last is the user's. Of a conversation that is longer than the model
                remembers, the first turns are left out; `prepare` tells how many.
            max_tokens: the most that are written.
            temperature: 0 takes the likeliest.
            top_p: mass of the ids drawn from.
            seed: of the draws; the same seed gives the same answer.
            stop: texts before the first of which the answer ends.
        """
        return "".join(self.chat_stream(messages, max_tokens, temperature, top_p, seed, stop))

    def chat_stream(
        self,
        messages: Sequence[Message],
        max_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        stop: Sequence[str] = (),
    ) -> Iterator[str]:
        """Yield the assistant's answer as it is written, in whole characters; see `chat`."""
        stops = (stop,) if isinstance(stop, str) else tuple(stop)
        sampling = Sampling(max_tokens, temperature, top_p, seed, stops)
        prefix = self.prepare(messages, max_tokens).prefix
        return (delta.text for delta in self.write(prefix, sampling) if delta.text)

    def write(self, prefix: TokenSequence, sampling: Sampling) -> Iterator[Delta]:
        """Yield what is written after `prefix` (see `prepare`), its end with how it ended."""
        return generate.write(self.model, self.serializer, prefix, sampling)

    def caption(
        self,
        image: np.ndarray,
        max_tokens: int = 64,
        examples: Sequence[Example] = (),
        question: str | None = None,
    ) -> str:
        """Return a caption of an image, uint8 (H, W), (H, W, 1) or (H, W, 3).

        Args:
            image: see above.
            max_tokens: the most that are written.
            examples: (image, text) pairs that are read first, to be followed.
            question: to be answered in place of a caption, examples being earlier answers to it.
        """
        return self.captions([image], max_tokens, examples, question)[0]

    def captions(
        self,
        images: Sequence[np.ndarray],
        max_tokens: int = 64,
        examples: Sequence[Example] = (),
        question: str | None = None,
    ) -> list[str]:
        """Return a caption of each image, or an answer about each; see `caption`."""
        prefixes = [self.shown(image, max_tokens, examples, question) for image in images]
        return generate.generate(self.model, self.serializer, prefixes, max_tokens=max_tokens)

    def answers(
        self, conversations: Sequence[Sequence[Message]], max_tokens: int = 64
    ) -> list[str]:
        """Return the likeliest answer to each conversation, many at once; see `chat`."""
        prefixes = [self.prepare(m, max_tokens).prefix for m in conversations]
        return generate.generate(self.model, self.serializer, prefixes, max_tokens=max_tokens)

    def choose(self, messages: Sequence[Message], choices: Sequence[str]) -> dict[str, float]:
        """Return the probability of each of two or more answers to a conversation.

        They compete by their mean log-likelihood per token; see `choices.py`. Of a conversation
        that leaves no room for the longest, the first turns are left out as in `chat`.
        """
        return self.choose_each([messages], [choices])[0]

    def choose_each(
        self, conversations: Sequence[Sequence[Message]], choices: Sequence[Sequence[str]]
    ) -> list[dict[str, float]]:
        """Return the probabilities of each conversation's own choices, many at once."""
        for texts in choices:
            check_choices(texts)
        longest = [max(len(self.serializer.text(t)) for t in texts) + 1 for texts in choices]
        prefixes = [
            self.prepare(messages, room).prefix
            for messages, room in zip(conversations, longest, strict=True)
        ]
        scores = judge(self.model, self.serializer, prefixes, choices)
        return [
            dict(zip(texts, found.probabilities().tolist(), strict=True))
            for texts, found in zip(choices, scores, strict=True)
        ]

    def classify(
        self,
        image: np.ndarray,
        labels: Sequence[str],
        how: str | None = None,
        templates: Sequence[str] = (zero_shot.SLOT,),
    ) -> dict[str, float]:
        """Return the probability of each label of an image.

        Args:
            image: uint8 (H, W), (H, W, 1) or (H, W, 3).
            labels: two or more different ones.
            how: ``contrast``, by nearness of embeddings, or ``likelihood`` as the image's caption,
                per token; by default the former where the checkpoint was trained for it.
            templates: what labels are written in, such as ``a picture of {}``, averaged.
        """
        return zero_shot.classify(self, image, labels, how, templates)

    def embed_images(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """Return float32 (n, E), unit vectors near those of texts that fit; see `retrieval.py`."""
        return retrieval.embed_images(self, images)

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Return float32 (n, E), unit vectors near those of images that fit; see `retrieval.py`."""
        return retrieval.embed_texts(self, texts)

    def prepare(self, messages: Sequence[Message], max_tokens: int = 128) -> Prepared:
        """Return what the model reads before the assistant's next turn; see `conversation.py`."""
        return prepare(self.serializer, messages, self.model.config.memory, max_tokens)

    def shown(
        self,
        image: np.ndarray,
        max_tokens: int = 64,
        examples: Sequence[Example] = (),
        question: str | None = None,
    ) -> TokenSequence:
        """Return what is read before an image's caption, or before an answer about it.

        Raises:
            ValueError: where that is more than the model remembers.
        """
        if question is None:
            return self._fitting(few_shot(self.serializer, examples, image))
        made = self.prepare(asked(examples, question, image), max_tokens)
        if made.dropped:
            raise ValueError(
                f"the model remembers {self.model.config.memory} tokens; {made.dropped} of the "
                f"{len(examples)} examples do not fit. Give fewer, or smaller images."
            )
        return made.prefix

    def _fitting(self, sequence: TokenSequence) -> TokenSequence:
        most = self.model.config.memory
        if len(sequence) > most:
            raise ValueError(
                f"the model remembers {most} tokens and this takes {len(sequence)}; use "
                f"smaller images (16 x 16 pixels are one token) or fewer examples"
            )
        return sequence
