"""What a run's weights begin as, where they are not drawn: a language model's, or a checkpoint's.

From a Hugging Face folder come the trunk, the embeddings of its text and its tokenizer; ``<bos>``,
``<eos>`` and the roles of a conversation begin as what the model has for them. All other ids begin
around the mean of its embeddings, as far apart as these are: text is read as before, and written as
before, since only ids of text and ``<eos>`` are drawn from. Likelihoods are over all ids, so at the
start they are lower by the share that ids without a meaning take, and by ln 2 at an ``<eos>``, of
which there are two until one is learnt. From a checkpoint of gato come all of its weights, ids,
tasks and scales; the run is a new one, with its own data and optimizer.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from gato.checkpoint import Checkpoint, load_checkpoint, saved_config
from gato.config import TrainConfig
from gato.hf_folder import ROLES, HuggingFaceFolder, own_ids
from gato.model import LOGITS, TARGETS, GatoModel
from gato.model_config import ModelConfig
from gato.parts import is_added, plain
from gato.tokenizers.hf_text import HuggingFacePieces
from gato.tokenizers.serializer import Serializer
from gato.tokenizers.spaces import CodecOptions
from gato.tokenizers.text import Text
from gato.tokenizers.vocabulary import CONTROL_TOKENS, VocabularyLayout

_OF_THE_RUN = ("context", "window", "soft_bins", "loss_chunk", "init_std")
"""Fields of a model that are a run's own affair, whatever its weights begin as."""


MANY_IDS = 40_000
"""From so many ids on, the logits of a batch are made in blocks (``model.loss_chunk``): of 150,000
ids those of 4,096 targets alone take 2.5 GB, several times over while training."""


class WarmStart(Protocol):
    """Weights to begin with, and what they were made for."""

    @property
    def path(self) -> Path:
        """Where they lie."""

    def settle(self, config: TrainConfig) -> TrainConfig:
        """Return the run with the sizes that the weights have."""

    def serializer(self, codec: CodecOptions) -> Serializer:
        """Return what the weights read and write: their text, ids, tasks and scales."""

    def fill(self, model: GatoModel, serializer: Serializer) -> list[str]:
        """Put the weights into a model; return what a person should know."""

    def data(self) -> dict[str, dict[str, Any]]:
        """Return what the weights were trained on, as a checkpoint says it, where that is known."""


def open_start(path: str | Path) -> WarmStart:
    """Return the weights in a folder.

    Raises:
        ValueError: for a folder that is neither a Hugging Face one nor a checkpoint or run of gato.
    """
    folder = Path(path)
    if folder.is_dir():
        ours = ("latest", "vocabulary.json", "model/latest")
        if any((folder / name).is_file() for name in ours):
            return CheckpointStart(folder)
        if (folder / "config.json").is_file():
            return HuggingFaceStart(folder)
    elif folder.name in ("latest", "best") and folder.is_file():
        return CheckpointStart(folder)
    raise ValueError(
        f"expected --init-from as a Hugging Face folder (config.json, model.safetensors and "
        f"tokenizer.json) or a checkpoint that `gato train` wrote; {path} is neither. Nothing is "
        f"downloaded: give a folder on disk."
    )


def require_sizes(start: WarmStart | GoesOn, config: TrainConfig) -> None:
    """Raise ValueError where a run was given other sizes than the weights it begins with have."""
    wanted = start.settle(config)
    for part, own, theirs in (
        ("model.", config.model, wanted.model),
        ("codec.", config.codec, wanted.codec),
        ("", config, wanted),
    ):
        for field in dataclasses.fields(own):
            a, b = getattr(own, field.name), getattr(theirs, field.name)
            if a != b and not dataclasses.is_dataclass(a) and field.name != "loss_chunk":
                raise ValueError(
                    f"{part}{field.name} is {b} in {start.path}, whose weights this run begins "
                    f"with; got {a}. Leave it out."
                )


@dataclass(frozen=True)
class GoesOn:
    """What a run in its folder began with: it has all of it, and needs no other folder."""

    path: Path
    config: TrainConfig

    def settle(self, config: TrainConfig) -> TrainConfig:
        """Return the run with the sizes and codecs that it has."""
        began = self.config
        own = {name: getattr(config.model, name) for name in _OF_THE_RUN if name != "loss_chunk"}
        return dataclasses.replace(
            config,
            model=dataclasses.replace(began.model, **own),
            codec=began.codec,
            embedders=began.embedders,
            text_pieces=began.text_pieces,
            init_from=began.init_from,
        )


def going_on(run: Path, given: Path | None) -> GoesOn | None:
    """Return the run in a folder where it began with other weights; None where there is none.

    Args:
        run: the folder.
        given: the weights that the command names, if it does.

    Raises:
        ValueError: where it began with others.
    """
    try:
        config = saved_config(run)
    except ValueError:
        return None  # told of where it is loaded
    if config is None or not config.init_from:
        return None
    began = Path(config.init_from)
    if given is not None:
        folder = given.resolve()
        folder = folder.parent if folder.name in ("latest", "best") else folder
        if folder != began and folder not in (began.parent, began.parent.parent):
            raise ValueError(
                f"the run in {run} began with the weights of {began}, not of {given}. To go on, "
                f"leave --init-from out; to begin anew, train into another folder."
            )
    return GoesOn(run, config)


@dataclass(frozen=True)
class HuggingFaceStart:
    """A language model of a family that `gato.hf_families` knows."""

    path: Path

    @cached_property
    def folder(self) -> HuggingFaceFolder:
        """The folder as it is read."""
        return HuggingFaceFolder(self.path)

    @cached_property
    def text(self) -> Text:
        """Its tokenizer."""
        text = Text()
        text.load_state(self.folder.text())
        return text

    def settle(self, config: TrainConfig) -> TrainConfig:
        """Return the run with the sizes of the trunk; how its ids are embedded is the preset's."""
        model = dataclasses.replace(config.model, **self.folder.fields)
        origin, rows = str(self.path.resolve()), self.text.vocabulary
        model = _in_blocks(model, rows)
        return dataclasses.replace(config, model=model, text_pieces=rows, init_from=origin)

    def serializer(self, codec: CodecOptions) -> Serializer:
        """Return a serializer that cuts text as the model does, and knows no tasks."""
        return Serializer(codec, {"text": self.text.state()})

    @torch.no_grad()
    def fill(self, model: GatoModel, serializer: Serializer) -> list[str]:
        """Put the trunk and the embeddings of text into a model."""
        own, families = _places(model), self._family_ids()
        first, stop = serializer.layout.span("text")
        lacking = self._lacking()
        for name, value in self.folder.weights(model.config):
            if name not in ("table", "head"):
                own[name].copy_(value)
                continue
            rows = own[f"{name}.weight"]
            deviation, mean = torch.std_mean(value, dim=0)
            rows.normal_().mul_(deviation).add_(mean)  # in place: no second table in memory
            # the model's own rows, but those that now spell what its tokenizer leaves out
            begin = 0
            for end in (*sorted(i for i in lacking if i < len(value)), len(value)):
                rows[first + begin : first + end] = value[begin:end]
                begin = end + 1
            for token, ids in families.items():
                rows[serializer.control[token]] = value[ids].mean(0)
        told = ", ".join(
            f"{token} as {' '.join(map(self.text.pieces.describe, ids))!r}"
            for token, ids in families.items()
        )
        most, context = self.folder.described.get("max_position_embeddings"), model.config.context
        sizes = f"{stop - first:,} rows of text and {model.config.layers} blocks"
        notes = [f"begun with {sizes} of {self.path}" + (f"; {told}" if told else "")]
        if chunk := model.config.loss_chunk:
            notes.append(f"logits are made for {chunk:,} targets at once (model.loss_chunk)")
        if lacking:
            notes.append(
                f"its tokenizer leaves {len(lacking)} of the bytes of UTF-8 out of a text; they "
                f"have ids of their own now, which mean nothing yet"
            )
        if isinstance(most, int) and most < context:
            notes.append(f"rows of {context} tokens are longer than the {most} it was made for")
        return notes

    def data(self) -> dict[str, dict[str, Any]]:
        """Return nothing: the folder does not say what it was trained on."""
        return {}

    def _lacking(self) -> frozenset[int]:
        """Return the ids of bytes that the folder's tokenizer has none for."""
        pieces = self.text.pieces
        if not isinstance(pieces, HuggingFacePieces):
            return frozenset()
        return frozenset(pieces.completed.values())

    def _family_ids(self) -> dict[str, list[int]]:
        """Return of some control tokens the ids that the model has for them, if it has any."""
        found = {token: [i] for token, i in own_ids(self.text).items()}
        known = self.text.ids_by_name
        for role in ROLES:
            whole, opening = f"<|{role}|>", ("<|im_start|>", "<|start_header_id|>")
            begun = [known[name] for name in opening if name in known]
            if whole in known:
                found[f"<{role}>"] = [known[whole]]
            elif begun:
                spelt = (int(i) for i in self.text.text_ids(role))
                found[f"<{role}>"] = [begun[0], *(i for i in spelt if i not in self._lacking())]
        return found


@dataclass(frozen=True)
class CheckpointStart:
    """A checkpoint of gato: all that it knows goes on, on other data."""

    path: Path

    @cached_property
    def saved(self) -> Checkpoint:
        """The checkpoint, with averaged weights where it has them."""
        return load_checkpoint(self.path)

    def settle(self, config: TrainConfig) -> TrainConfig:
        """Return the run with the checkpoint's sizes and codecs."""
        began = self.saved.config
        kept = {name: getattr(config.model, name) for name in _OF_THE_RUN}
        vocabulary = self.saved.serializer.layout.size
        return dataclasses.replace(
            config,
            model=_in_blocks(dataclasses.replace(began.model, **kept), vocabulary),
            codec=began.codec,
            embedders=began.embedders,
            text_pieces=dict(self.saved.serializer.layout.ranges)["text"],
            init_from=str(self.saved.path.resolve()),
        )

    def serializer(self, codec: CodecOptions) -> Serializer:
        """Return the checkpoint's serializer, with ranges behind its own where there are new ones.

        Raises:
            ValueError: where its ledger names control tokens that stand for others now.
        """
        before = self.saved.serializer
        layout = before.layout
        if CONTROL_TOKENS[: len(layout.control_tokens)] != layout.control_tokens:
            raise ValueError(
                f"{self.saved.path}: its control tokens are others than those of this version of "
                f"gato: {', '.join(layout.control_tokens)}"
            )
        ranges = dict(layout.ranges)
        grown = VocabularyLayout(layout.ranges)
        for name, modality in before.modalities.items():
            if modality.vocabulary and name not in ranges:
                grown = grown.append(name, modality.vocabulary)
        return Serializer(codec, before.state(), grown, before.tasks.values())

    @torch.no_grad()
    def fill(self, model: GatoModel, serializer: Serializer) -> list[str]:
        """Put all weights into a model that has a place for them."""
        weights, own = self.saved.model.state_dict(), _places(model)
        grown = {"table.weight", "head.weight", "joint.scale.weight", "joint.shift.weight"}
        notes = [f"begun with the weights of {self.saved.path}, step {self.saved.step}"]
        for name, value in weights.items():
            if name not in own:
                notes.append(f"{name} of {self.path} has no place in this run and is left out")
            elif own[name].shape == value.shape:
                own[name].copy_(value)
            elif (
                name in grown
                and len(own[name]) >= len(value)
                and own[name].shape[1:] == value.shape[1:]
            ):
                rows = len(value) - (name == "table.weight")  # the last stands for no id
                own[name][:rows] = value[:rows]
                if name == "table.weight":
                    own[name][-1] = value[-1]
            else:
                raise ValueError(
                    f"{name} has shape {tuple(value.shape)} in {self.path}, in this run "
                    f"{tuple(own[name].shape)}: give the run the options that it was trained with"
                )
        missing = [name for name in own if name not in weights]
        return notes + ([f"new, beside those weights: {', '.join(missing)}"] if missing else [])

    def data(self) -> dict[str, dict[str, Any]]:
        """Return what the checkpoint, and what it began with, was trained on."""
        held = {corpus.name: corpus.validation for corpus in self.saved.config.corpora}
        return {
            name if "validation" in contents else f"{name} of {self.saved.path}": {
                "validation": held.get(name, 0.0),
                **contents,
            }
            for name, contents in self.saved.data.items()
        }


def _in_blocks(model: ModelConfig, vocabulary: int) -> ModelConfig:
    """Return a model that learns in blocks of targets, if it has many ids and sets no other."""
    if model.loss_chunk or vocabulary < MANY_IDS:
        return model
    return dataclasses.replace(model, loss_chunk=max(1, LOGITS // vocabulary // TARGETS) * TARGETS)


def _places(model: GatoModel) -> dict[str, Tensor]:
    """Return a model's tensors by the names they have where LoRA adds nothing."""
    return {plain(n): tensor for n, tensor in model.state_dict().items() if not is_added(n)}
