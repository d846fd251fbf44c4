"""The universal serializer: episodes, documents, captions and conversations into the stream.

Order inside a step is fixed here (see the drawing in `stream.py`); how one value becomes tokens
is its modality's business. A whole episode is written at once, by column; steps whose text is the
same form a run, and within a run every step has the same number of tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from gato.envs.episode import Episode, TaskSpec, flatten_space
from gato.tokenizers.image import picture_spec
from gato.tokenizers.modality import Modality, Segment, Spec, modality_classes
from gato.tokenizers.spaces import CodecOptions, codec
from gato.tokenizers.steps import SerializedEpisode, payload_of, runs
from gato.tokenizers.stream import TokenSequence, concatenate
from gato.tokenizers.task_codec import (
    History,
    TaskCodec,
    joint_ids,
    joint_targets,
    return_levels,
    to_come,
)
from gato.tokenizers.vocabulary import RETURN_TOKENS, VocabularyLayout

CONTROL = "control"
MAX_LOCAL = 511


class Serializer:
    """Values of every modality to tokens of one stream, and back."""

    def __init__(
        self,
        options: CodecOptions | None = None,
        state: Mapping[str, Mapping[str, bytes]] | None = None,
        layout: VocabularyLayout | None = None,
        tasks: Iterable[TaskCodec] = (),
    ) -> None:
        """Make a serializer.

        Args:
            options: choices among codecs.
            state: per modality, its fitted parts (the text model).
            layout: a saved ledger; by default one is built from the modalities.
            tasks: the tasks already known.

        Raises:
            ValueError: where the saved ledger and the modalities' own sizes disagree.
        """
        self.options = options or CodecOptions()
        self.modalities: dict[str, Modality] = {n: c() for n, c in modality_classes().items()}
        for name, parts in (state or {}).items():
            self.modalities[name].load_state(parts)
        sizes = {n: m.vocabulary for n, m in self.modalities.items() if m.vocabulary}
        self.layout = layout or VocabularyLayout.build(sizes)
        known = dict(self.layout.ranges)
        for name, size in sizes.items():
            if known.get(name, size) != size:
                raise ValueError(
                    f"the checkpoint reserves {known[name]} ids for {name!r}, its tokenizer has "
                    f"{size}; use the text model that the checkpoint was trained with"
                )
        self.names = [*self.modalities, CONTROL]
        self.number = {name: i for i, name in enumerate(self.names)}
        self.offset = {n: self.layout.start(n) for n in known}
        self.control = {t: self.layout.control(t) for t in self.layout.control_tokens}
        self.return_ids = tuple(self.control[t] for t in RETURN_TOKENS if t in self.control)
        self.tasks: dict[str, TaskCodec] = {t.task.id: t for t in tasks}

    # ---- tasks -------------------------------------------------------------------------------

    def add_task(
        self,
        task: TaskSpec,
        scales: Mapping[str, Spec] | None = None,
        history: History | None = None,
    ) -> TaskCodec:
        """Register a task; `scales` replaces the spec of observation leaves by path."""
        leaves = {}
        for role, space in (
            ("observation", task.observation_space),
            ("action", task.action_space),
        ):
            named = []
            for path, leaf in flatten_space(space, role).items():
                modality, spec = codec(leaf, role, self.options, f"{task.id}: {path}")
                if role == "observation" and scales and path in scales:
                    spec = dict(scales[path])
                named.append((path, modality, spec))
            leaves[role] = tuple(named)
        observation, action = leaves["observation"], leaves["action"]
        made = TaskCodec(task, observation, action, history or History())
        if made.history.joint:
            joint_ids(made, self.modalities)  # which raises where it cannot be
        self.tasks[task.id] = made
        return made

    def net_options(self) -> dict[str, dict[str, Any]]:
        """Return per modality what its embedder must be sized for, from the codec options."""
        o = self.options
        return {
            "frame": {"cell": o.frame_cell},
            "vector": {"group": o.vector_group},
            "symbols": {"group": o.symbol_group, "size": o.symbol_size},
        }

    def ordinal_span(self) -> tuple[int, int] | None:
        """Return [start, stop) of the ids that stand in the order of their values, if any."""
        names = [n for n, m in self.modalities.items() if m.ordinal and n in self.offset]
        return self.layout.span(names[0]) if names else None

    def slots(self) -> int:
        """Return the most ids that one hidden state predicts beside the stream, over all tasks."""
        joint = [t for t in self.tasks.values() if t.history.joint]
        return max((t.history.joint * joint_ids(t, self.modalities) for t in joint), default=0)

    def spans(self) -> dict[int, tuple[int, int]]:
        """Return [start, stop) of the ids of each modality that has any, by its number."""
        return {self.number[n]: self.layout.span(n) for n in self.names if n in self.offset}

    def task(self, task_id: str) -> TaskCodec:
        """Return a known task.

        Raises:
            ValueError: for a task that was never added, with those that were.
        """
        if task_id not in self.tasks:
            raise ValueError(
                f"expected one of the tasks this model knows ({', '.join(sorted(self.tasks))}); "
                f"got {task_id!r}"
            )
        return self.tasks[task_id]

    # ---- pieces ------------------------------------------------------------------------------

    def control_piece(self, *tokens: str, target: float = 0.0) -> TokenSequence:
        """Return control tokens as a sequence."""
        n = len(tokens)
        return TokenSequence(
            np.array([self.control[t] for t in tokens], np.int32),
            np.full(n, self.number[CONTROL], np.uint8),
            np.zeros(n, np.int16),
            np.full(n, target, np.float32),
        )

    def piece(self, modality: str, segment: Segment, target: float = 0.0) -> TokenSequence:
        """Return the tokens of a segment (L, n) as one sequence of L * n."""
        ids, rows = self._global(modality, segment)
        flat = ids.reshape(-1)
        n = len(flat)
        payload = {}
        if rows:
            payload[modality] = {k: v.reshape(n, *v.shape[2:]) for k, v in rows.items()}
            payload[modality]["at"] = np.arange(n)
        return TokenSequence(
            flat,
            np.full(n, self.number[modality], np.uint8),
            np.zeros(n, np.int16),
            np.full(n, target, np.float32),
            payload,
        )

    def _global(self, modality: str, segment: Segment) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        offset = self.offset.get(modality, 0)
        if self.modalities[modality].vocabulary == 0:
            return segment.ids, segment.rows
        return segment.ids + np.int32(offset), segment.rows

    def text(self, text: str, target: float = 0.0) -> TokenSequence:
        """Return a string's tokens."""
        return self.piece("text", self.modalities["text"].encode([text], {}), target)

    def image(self, image: np.ndarray) -> TokenSequence:
        """Return the tokens of a picture that stands alone, see `picture_spec`."""
        spec = picture_spec(image)
        return self.piece("image", self.modalities["image"].encode(image[None], spec, "image"))

    # ---- examples ----------------------------------------------------------------------------

    def document(self, text: str) -> TokenSequence:
        """Return ``<bos> text <eos>``."""
        end = self.control_piece("<eos>", target=1.0)
        return concatenate([self.control_piece("<bos>"), self.text(text, 1.0), end])

    def caption(self, image: np.ndarray, text: str | None) -> TokenSequence:
        """Return ``<bos> img <sep> text <eos>``; without text, the beginning to go on from."""
        parts = [self.control_piece("<bos>"), self.image(image), self.control_piece("<sep>")]
        if text is not None:
            parts += [self.text(text, 1.0), self.control_piece("<eos>", target=1.0)]
        return concatenate(parts)

    def pairs(self, examples: Sequence[TokenSequence]) -> TokenSequence:
        """Return examples about pictures as one, with one ``<bos>`` (Gato section 2.3)."""
        first, *others = examples
        return concatenate([first, *(e.slice(1, len(e)) for e in others)])

    def captions(
        self, examples: Iterable[tuple[np.ndarray, str]], image: np.ndarray | None = None
    ) -> TokenSequence:
        """Return pictures and their texts as one, and what a text for `image` goes on from."""
        written = [self.caption(picture, text) for picture, text in examples]
        return self.pairs(written if image is None else [*written, self.caption(image, None)])

    def conversation(self, messages: Sequence[Mapping[str, Any]]) -> TokenSequence:
        """Return a conversation's tokens; only assistant turns are predicted.

        Args:
            messages: each with ``role`` (system, user or assistant) and ``content``: a string,
                or parts ``{"type": "text", "text": str}`` and ``{"type": "image", "image":
                uint8 array}`` in their order.
        """
        parts = [self.control_piece("<bos>")]
        for message in messages:
            role, content = message["role"], message["content"]
            if role not in ("system", "user", "assistant"):
                raise ValueError(f"a role is system, user or assistant; got {role!r}")
            parts.append(self.control_piece(f"<{role}>"))
            weight = 1.0 if role == "assistant" else 0.0
            if isinstance(content, str):
                content = [{"type": "text", "text": content}]
            for part in content:
                if part["type"] == "image":
                    parts.append(self.image(np.asarray(part["image"])))
                else:
                    parts.append(self.text(part["text"], weight))
            if role == "assistant":
                parts.append(self.control_piece("<eos>", target=1.0))
        return concatenate(parts)

    # ---- episodes ----------------------------------------------------------------------------

    def head(self, task_id: str, instruction: str | None = None) -> TokenSequence:
        """Return ``<bos>`` and the instruction: what every window of the task starts with."""
        text = self.task(task_id).task.instruction if instruction is None else instruction
        parts = [self.control_piece("<bos>")]
        return concatenate([*parts, self.text(text)] if text else parts)

    def episode(
        self, episode: Episode, returns: np.ndarray | None = None, steps: int | None = None
    ) -> SerializedEpisode:
        """Return all steps of an episode; targets are its actions (the expert's where logged).

        Args:
            episode: whole, or a window of one.
            returns: (T,) the return to come at each of its steps, for a task that is conditioned
                on it; by default the sum of the rewards that are in `episode`.
            steps: how many are written; the others' actions are only predicted by those before
                them, where a state predicts those of several steps.
        """
        task = self.task(episode.task)
        levels: np.ndarray | None = None
        if task.history.returns is not None:
            due = to_come(episode.rewards) if returns is None else returns
            levels = np.array(self.return_ids, np.int32)[return_levels(due, task.history)]
        actions = episode.targets if episode.targets is not None else episode.actions
        beside = self._joint(task, actions) if task.history.joint else None
        pieces, counts, masks = [], [], []
        for start, stop in runs(task, episode, len(episode) if steps is None else steps):
            observed = {p: episode.observations[p][start:stop] for p, _, _ in task.observation}
            taken = {p: actions[p][start:stop] for p, _, _ in task.action}
            sequence, n, n_action = self._steps(
                task, observed, taken, None if levels is None else levels[start:stop]
            )
            if beside is not None:
                at = np.arange(stop - start) * n + n - n_action - 1
                chunk = task.history.joint
                sequence.joint = joint_targets(*beside, (start, stop), chunk, at)
            pieces.append(sequence)
            counts += [n] * (stop - start)
            mask = np.zeros((stop - start, n), bool)
            mask[:, n - n_action :] = True
            masks.append(mask.reshape(-1))
        starts = np.cumsum([0, *counts])
        head = self.head(episode.task, episode.instruction or None)
        return SerializedEpisode(head, concatenate(pieces), starts, np.concatenate(masks))

    def actions_in(self, sequence: TokenSequence) -> np.ndarray:
        """Return bool (T,), true at the actions of an episode's steps, not at returns to come."""
        if sequence.joint is not None:
            # behind the states that predict: they carry no loss, and observations have places
            mask = (np.arange(len(sequence)) > sequence.joint.at[0]) & (sequence.local == 0)
            mask[sequence.joint.at] = False
            return mask
        return (sequence.target > 0) & ~np.isin(sequence.ids, self.return_ids)

    def observation(self, task_id: str, observation: Mapping[str, Any]) -> TokenSequence:
        """Return one observation's tokens, and ``<sep>`` unless actions are never shown.

        From the last of them the policy decodes an action.
        """
        return self.observations(task_id, {p: [v] for p, v in observation.items()})

    def observations(self, task_id: str, columns: Mapping[str, Any]) -> TokenSequence:
        """Return L observations of equal text, as `observation` does, one after another."""
        return self._steps(self.task(task_id), columns, None)[0]

    def _joint(self, task: TaskCodec, actions: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids (T, k) of all actions, and their modalities (k,)."""
        blocks = [
            (m, self._encode(m, actions[p], s, f"{task.task.id}: {p}").ids)
            for p, m, s in task.action
        ]
        numbers = np.repeat([self.number[m] for m, _ in blocks], [b.shape[1] for _, b in blocks])
        return np.concatenate([b for _, b in blocks], 1), numbers.astype(np.uint8)

    def _steps(
        self,
        task: TaskCodec,
        observed: Mapping[str, Any],
        actions: Mapping[str, Any] | None,
        returns: np.ndarray | None = None,
    ) -> tuple[TokenSequence, int, int]:
        """Return L steps of equal layout, the tokens per step and the action tokens per step."""
        name = task.task.id
        blocks = [
            (m, self._encode(m, observed[p], s, f"{name}: {p}")) for p, m, s in task.observation
        ]
        length = len(blocks[0][1].ids)
        n_observation = sum(b.ids.shape[1] for _, b in blocks)
        bare = task.history.bare and n_observation > 0
        if not bare:
            separator = np.full((length, 1), self.control["<sep>"], np.int32)
            blocks.append((CONTROL, Segment(separator)))
        if returns is not None:
            blocks.append((CONTROL, Segment(returns[:, None])))
        if actions is not None and not task.history.bare:
            for path, modality, spec in task.action:
                blocks.append(
                    (modality, self._encode(modality, actions[path], spec, f"{name}: {path}"))
                )
                if modality == "text":  # a written action ends where it says so
                    end = np.full((length, 1), self.control["<eos>"], np.int32)
                    blocks.append((CONTROL, Segment(end)))
        n = sum(b.ids.shape[1] for _, b in blocks)
        n_action = n - n_observation - (not bare) - (returns is not None)
        local = np.zeros(n, np.int16)
        local[:n_observation] = np.minimum(np.arange(1, n_observation + 1), MAX_LOCAL)
        target = np.zeros(n, np.float32)
        if not task.history.joint:
            target[n_observation + 1 :] = 1.0
        numbers = np.repeat(
            [self.number[m] for m, _ in blocks], [b.ids.shape[1] for _, b in blocks]
        )
        sequence = TokenSequence(
            np.concatenate([b.ids for _, b in blocks], 1).reshape(-1),
            np.tile(numbers.astype(np.uint8), length),
            np.tile(local, length),
            np.tile(target, length),
            payload_of(blocks, length, n),
        )
        return sequence, n, n_action

    def _encode(self, modality: str, values: Any, spec: Spec, key: str) -> Segment:
        segment = self.modalities[modality].encode(values, spec, key)
        ids, rows = self._global(modality, segment)
        return Segment(ids, rows)

    # ---- the checkpoint ----------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        """Return everything but the modalities' fitted parts as JSON-able data."""
        return {
            "options": asdict(self.options),
            "layout": self.layout.to_json(),
            "tasks": [t.to_json() for t in self.tasks.values()],
        }

    def state(self) -> dict[str, dict[str, bytes]]:
        """Return the modalities' fitted parts."""
        states = {name: m.state() for name, m in self.modalities.items()}
        return {name: parts for name, parts in states.items() if parts}

    @classmethod
    def from_json(
        cls, data: Mapping[str, Any], state: Mapping[str, Mapping[str, bytes]]
    ) -> Serializer:
        """Return the serializer that `to_json` and `state` described."""
        tasks = [TaskCodec.from_json(t) for t in data["tasks"]]
        layout = VocabularyLayout.from_json(data["layout"])
        return cls(CodecOptions(**data["options"]), state, layout, tasks)
