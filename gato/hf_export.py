"""The text part of a checkpoint as a Hugging Face folder, which `transformers` loads.

    config.json, generation_config.json     a model of the Llama, Qwen2, Qwen3 or SmolLM3 family
    model.safetensors                       the trunk and the embeddings of text
    tokenizer.json, tokenizer_config.json   the text model, with our control tokens

``<bos>`` and ``<eos>`` take the places of the family's own where the model began with one; roles of
a conversation, and what it lacks of these two, stand behind its last token, where its table may
have had rows of padding. On text, logits are equal.
Images, actions and all other ids are left behind.
"""

from __future__ import annotations

import errno
import glob
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from gato.checkpoint import Checkpoint
from gato.envs.files import sync_folder, write_synced
from gato.hf_families import described_as, to_theirs
from gato.hf_folder import CONTROLS, ROLES, own_ids
from gato.model import GatoModel
from gato.tokenizers.hf_text import SPACE, HuggingFacePieces, library
from gato.tokenizers.text import SentencePieces, Text

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<' + message['role'] + '>' }}"
    "{{ message['content'] }}{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


@dataclass(frozen=True)
class _Ids:
    """Where control tokens stand in the exported vocabulary, by their names here."""

    at: dict[str, int]
    names: dict[str, str]
    """What each is called there."""
    added: list[str]
    """Those that stand behind the last token, in their order."""
    rows: int
    """Ids in all."""


def export(checkpoint: Checkpoint, out: Path) -> list[str]:
    """Write a folder that `transformers` loads; return what a person should know.

    Args:
        checkpoint: with its LoRA merged and its averaged weights, as it is loaded.
        out: a new folder, written whole or not at all.

    Raises:
        ValueError: where no family has such a model, or its text cannot be cut alike, saying why.
    """
    if out.exists():
        raise ValueError(f"expected a new folder to write; {out} exists. Name another.")
    model, serializer = checkpoint.model, checkpoint.serializer
    text = serializer.modalities["text"]
    assert isinstance(text, Text)
    about = text.about.get("config", {})
    described = described_as(model.config, about.get("model_type"))
    if described["model_type"] == "qwen2" != about.get("model_type"):
        raise ValueError(
            "a model with qkv_bias can only be written as a qwen2 one, and of such a model "
            "transformers cuts text by Qwen's own rules; this text model has others. Only what "
            "began with a qwen2 folder can be written with qkv_bias"
        )
    ids = _placed(text)
    tokenizer = _tokenizer(text, ids)
    first, stop = serializer.layout.span("text")
    controls = {name: serializer.control[name] for name in ids.at}
    tensors = dict(to_theirs(model.state_dict(), model.config))
    read, written = _tables(model, (first, stop), ids, controls)
    tensors["model.embed_tokens.weight"] = read
    if written is not None:
        tensors["lm_head.weight"] = written
    window, context = model.config.window, model.config.context
    most = window or max(context, int(about.get("max_position_embeddings") or 0))
    specials = {key: ids.at[name] for name, key in CONTROLS}
    described |= {f"{key}_id": at for key, at in specials.items()}
    described |= {
        "vocab_size": ids.rows,
        "pad_token_id": about.get("pad_token_id"),
        "max_position_embeddings": most,
        "tie_word_embeddings": written is None,
    }
    generation = {f"{key}_id": at for key, at in specials.items()}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{key: ids.names[name] for name, key in CONTROLS},
        "model_max_length": most,
        "clean_up_tokenization_spaces": False,
        "chat_template": TEMPLATE,
    }
    _write(
        out,
        {
            "config.json": _json(described),
            "generation_config.json": _json(generation),
            "model.safetensors": tensors,
            "tokenizer.json": json.dumps(tokenizer, ensure_ascii=False).encode(),
            "tokenizer_config.json": _json(settings),
        },
    )
    notes = [f"{out}: {described['architectures'][0]}, {ids.rows:,} ids of text"]
    if isinstance(text.pieces, SentencePieces):
        notes.append(
            "texts that spell U+2581, a control token, such as <user>, or the name of a byte, such "
            "as <0x41>, may differ"
        )
    if window:
        notes.append(f"logits are equal up to {window} tokens: the model sees no more, theirs does")
    return notes


def _placed(text: Text) -> _Ids:
    """Return where control tokens go: to the family's own places, else behind the text."""
    known = text.ids_by_name
    at, names, added = dict[str, int](), dict[str, str](), list[str]()
    for name, own in reversed(own_ids(text).items()):  # where both are one token, it is the end
        if own not in at.values():
            at[name], names[name] = own, text.pieces.describe(own)
    used = max(known.values()) + 1
    for name in (*(n for n, _ in CONTROLS), *(f"<{role}>" for role in ROLES)):
        if name not in at:
            if name in known:
                raise ValueError(f"the text model has a piece {name!r} of its own")
            at[name], names[name] = used + len(added), name
            added.append(name)
    return _Ids(at, names, added, max(text.vocabulary, used + len(added)))


def _tables(
    model: GatoModel, span: tuple[int, int], ids: _Ids, controls: Mapping[str, int]
) -> tuple[Tensor, Tensor | None]:
    """Return the embeddings (rows, D) that are read, and those that make logits if they differ."""

    def taken(table: Tensor) -> Tensor:
        more = ids.rows - (span[1] - span[0])
        rows = torch.cat([table[slice(*span)], table.new_zeros(more, table.shape[1])])
        for name, at in ids.at.items():
            rows[at] = table[controls[name]]
        return rows

    read = taken(model.table.weight.detach())
    place = model.local.weight.detach()[0]  # which every token of text has
    if model.head is not None:
        return read + place, taken(model.head.weight.detach())
    return (read + place, read) if place.any() else (read, None)


def _tokenizer(text: Text, ids: _Ids) -> dict[str, Any]:
    """Return the text model as a tokenizer.json with our control tokens.

    Raises:
        ValueError: where it would cut text otherwise.
    """
    if isinstance(text.pieces, HuggingFacePieces):
        described: dict[str, Any] = text.pieces.complete(json.loads(text.pieces.content))
    else:
        assert isinstance(text.pieces, SentencePieces)
        if text.about:
            raise ValueError(
                "the text model came as a SentencePiece tokenizer.model, which cannot be written "
                "with more tokens; begin with a folder that has a tokenizer.json"
            )
        described = _unigram(text.pieces, ids)
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    described["added_tokens"] = [
        *(described.get("added_tokens") or []),
        *({"id": ids.at[name], "content": name, "special": True, **flags} for name in ids.added),
    ]
    theirs = library().Tokenizer.from_str(json.dumps(described))
    # the library gives added tokens numbers of its own, whatever the file says
    wrong = [name for name, i in ids.at.items() if theirs.token_to_id(ids.names[name]) != i]
    if wrong:
        raise ValueError(
            f"this checkpoint's tokenizer.json leaves ids out, so that {wrong[0]} cannot stand "
            f"where its row does; it cannot be written with more tokens"
        )
    if isinstance(text.pieces, SentencePieces):
        _require_same(text, theirs)
    return described


def _unigram(pieces: SentencePieces, ids: _Ids) -> dict[str, Any]:
    """Return a SentencePiece unigram model as a tokenizer.json that puts ``<bos>`` first."""
    processor = pieces.processor
    scores = [float(processor.get_score(i)) for i in range(pieces.used)]
    # no text spells a byte by its name: the names must lose against any other reading of them
    never = 10.0 * min(scores) - 100.0
    vocab = [
        [str(processor.id_to_piece(i)), never if processor.is_byte(i) else score]
        for i, score in enumerate(scores)
    ]
    unknown = int(processor.unk_id())
    vocab[unknown][0] = f" {vocab[unknown][0]}"  # which no text spells: it has no space left
    first = {"SpecialToken": {"id": "<bos>", "type_id": 0}}
    whole = [{"Sequence": {"id": name, "type_id": kind}} for kind, name in enumerate("AB")]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [first, whole[0]],
            "pair": [first, *whole],
            "special_tokens": {
                "<bos>": {"id": "<bos>", "ids": [ids.at["<bos>"]], "tokens": ["<bos>"]}
            },
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "Unigram",
            "unk_id": unknown,
            "vocab": vocab,
            "byte_fallback": True,
        },
    }


def _require_same(text: Text, theirs: Any) -> None:
    """Raise ValueError where a tokenizer.json cuts text otherwise than the text model does."""
    own = [text.bytes_of(i).decode("utf-8", "ignore") for i in range(text.vocabulary)]
    step = 7  # pieces that seldom stand together
    samples = ["".join(own[k::step]) for k in range(step)] + ["".join(own), "\n é 🙂  ", "a <unk>"]
    for sample in samples:
        sample = sample.replace(SPACE, "")
        found = theirs.encode(sample, add_special_tokens=False).ids
        if found != text.text_ids(sample).tolist():
            raise ValueError(
                "this checkpoint's text model cannot be written as a tokenizer.json: it would cut "
                "text otherwise. A unigram model, which gato trains, can"
            )


def _json(value: Any) -> bytes:
    return json.dumps(value, indent=2).encode()


def _write(out: Path, files: Mapping[str, bytes | Mapping[str, Tensor]]) -> None:
    """Write a folder whole or not at all."""
    out.parent.mkdir(parents=True, exist_ok=True)
    for left_over in out.parent.glob(f".{glob.escape(out.name)}.[0-9]*"):  # by a kill
        if left_over.name.rpartition(".")[2].isdigit():
            shutil.rmtree(left_over)
    temporary = out.parent / f".{out.name}.{os.getpid()}"
    try:
        temporary.mkdir()
        for name, content in files.items():
            if isinstance(content, bytes):
                write_synced(temporary / name, content)
                continue
            tensors = {n: t.detach().float().cpu().contiguous() for n, t in content.items()}
            try:
                save_file(tensors, temporary / name, metadata={"format": "pt"})
            except SafetensorError as error:  # for a full disk, say
                raise OSError(errno.EIO, str(error), str(out)) from error
            # the library lets nobody else read what it writes
            shutil.copymode(temporary / "config.json", temporary / name)
            with open(temporary / name, "rb") as file:
                os.fsync(file.fileno())
        sync_folder(temporary)
        os.rename(temporary, out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_folder(out.parent)
