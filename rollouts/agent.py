"""One checkpoint as an agent: it acts, chats, captions and classifies."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from gato.checkpoint import Checkpoint, load_checkpoint
from gato.envs.episode import Episode
from gato.rollouts import generate
from gato.rollouts.choices import judge
from gato.rollouts.conversation import Message as Message
from gato.rollouts.conversation import Prepared, checked, prepare
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
    ) -> str:
        """Return the assistant's answer to a conversation; see `Message`."""
        return "".join(self.chat_stream(messages, max_tokens, temperature, top_p, seed))

    def chat_stream(
        self,
        messages: Sequence[Message],
        max_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> Iterator[str]:
        """Yield the assistant's answer as it is written, in whole characters."""
        return generate.stream(
            self.model,
            self.serializer,
            self.prepare(messages, max_tokens).prefix,
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
        )

    def caption(self, image: np.ndarray, max_tokens: int = 64) -> str:
        """Return a caption of an image, uint8 (H, W), (H, W, 1) or (H, W, 3)."""
        return self.captions([image], max_tokens)[0]

    def captions(self, images: Sequence[np.ndarray], max_tokens: int = 64) -> list[str]:
        """Return a caption of each image."""
        prefixes = [self._fitting(self.serializer.caption(checked(i), None)) for i in images]
        return generate.generate(self.model, self.serializer, prefixes, max_tokens=max_tokens)

    def answers(
        self, conversations: Sequence[Sequence[Message]], max_tokens: int = 64
    ) -> list[str]:
        """Return the likeliest answer to each conversation, many at once."""
        prefixes = [self.prepare(m, max_tokens).prefix for m in conversations]
        return generate.generate(self.model, self.serializer, prefixes, max_tokens=max_tokens)

    def choose(self, messages: Sequence[Message], choices: Sequence[str]) -> dict[str, float]:
        """Return the probability of each of two or more answers to a conversation.

        They compete by their mean log-likelihood per token; see `choices.py`.
        """
        return self.choose_each([messages], [choices])[0]

    def choose_each(
        self, conversations: Sequence[Sequence[Message]], choices: Sequence[Sequence[str]]
    ) -> list[dict[str, float]]:
        """Return the probabilities of each conversation's own choices, many at once."""
        prefixes = [self.prepare(messages).prefix for messages in conversations]
        scores = judge(self.model, self.serializer, prefixes, choices)
        return [
            dict(zip(texts, found.probabilities().tolist(), strict=True))
            for texts, found in zip(choices, scores, strict=True)
        ]

    def classify(self, image: np.ndarray, labels: Sequence[str]) -> dict[str, float]:
        """Return the probability of each label as the image's caption.

        Labels compete by their mean log-likelihood per token, so that long ones have a chance.
        """
        if not labels or len(set(labels)) != len(labels):
            raise ValueError(f"expected one or more different labels; got {list(labels)}")
        context = self._fitting(self.serializer.caption(checked(image), None))
        scored = generate.score(self.model, self.serializer, context, labels)
        mean = np.array([total / count for total, count in scored])
        weights = np.exp(mean - mean.max())
        return dict(zip(labels, (weights / weights.sum()).tolist(), strict=True))

    def prepare(self, messages: Sequence[Message], max_tokens: int = 128) -> Prepared:
        """Return what the model reads before the assistant's next turn; see `conversation.py`."""
        return prepare(self.serializer, messages, self.model.config.memory, max_tokens)

    def _fitting(self, sequence: TokenSequence) -> TokenSequence:
        most = self.model.config.memory
        if len(sequence) > most:
            raise ValueError(
                f"the model remembers {most} tokens and this takes {len(sequence)}; use a shorter "
                f"conversation or smaller images (16 x 16 pixels are one token)"
            )
        return sequence
