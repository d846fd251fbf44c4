"""A Hugging Face folder of a language model, read: nothing is run, unpickled or fetched.

Its config.json, tokenizer and weights in safetensors are data; what it holds beside them (code that
`auto_map` names, pickled weights) is left alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gato.checkpoint import opened
from gato.hf_families import model_fields, to_ours
from gato.model_config import ModelConfig
from gato.tokenizers.text import ABOUT_FILE, MODEL_FILE, TOKENIZER_FILE, Text

_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_KEPT = ("bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings", "model_type")
_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")
ROLES = ("system", "user", "assistant")
CONTROLS = (("<bos>", "bos_token"), ("<eos>", "eos_token"))
"""Control tokens that such models have too, and what these are called in their files."""


@dataclass(frozen=True)
class HuggingFaceFolder:
    """A folder with config.json, a tokenizer and weights."""

    path: Path

    @cached_property
    def described(self) -> dict[str, Any]:
        """What stands in config.json."""
        return self._json("config.json")

    @cached_property
    def files(self) -> dict[str, Path]:
        """The file that each tensor lies in, by the tensor's name.

        Raises:
            ValueError: where there are no weights in safetensors, or one of their files is missing.
        """
        if (self.path / _INDEX).is_file():
            named = self._json(_INDEX).get("weight_map")
            if not isinstance(named, dict):
                raise ValueError(f"{self.path / _INDEX} is damaged: it has no weight_map")
            for shard in {str(name) for name in named.values()}:
                if Path(shard).name != shard or not (self.path / shard).is_file():
                    raise ValueError(f"{self.path / _INDEX} names {shard!r}, not a file beside it")
            return {name: self.path / str(file) for name, file in named.items()}
        file = self.path / _WEIGHTS
        if file.is_file():
            with opened(file) as found:
                return dict.fromkeys(found.keys(), file)
        pickled = sorted([*self.path.glob("*.bin"), *self.path.glob("*.pt*")])
        if pickled:
            raise ValueError(
                f"expected weights in safetensors in {self.path}; got {pickled[0].name}, which is "
                f"pickled: to read it is to run what is in it, so it is not read. Where you trust "
                f"it, let transformers write it anew: AutoModelForCausalLM.from_pretrained("
                f"DIR).save_pretrained(OTHER)."
            )
        raise ValueError(f"expected {_WEIGHTS} or {_INDEX} in {self.path}; found neither")

    @cached_property
    def fields(self) -> dict[str, Any]:
        """The fields of `ModelConfig` that the folder decides."""
        found = model_fields(self.described, self.files, self.path)
        if found["width"] != self._embedding[1]:
            raise ValueError(
                f"{self.path}: its config.json says a hidden_size of {found['width']}, its "
                f"embedding has one of {self._embedding[1]}: they do not belong together"
            )
        return found

    @property
    def rows(self) -> int:
        """Rows of its embedding of ids."""
        return self._embedding[0]

    @cached_property
    def _embedding(self) -> tuple[int, int]:
        name = "model.embed_tokens.weight"
        if name not in self.files:
            raise ValueError(f"{self.path}: its weights lack {name!r}")
        shape = self.shape(name)
        if len(shape) != 2:
            raise ValueError(f"{self.path}: expected {name!r} of two dimensions; got {shape}")
        return int(shape[0]), int(shape[1])

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor by the name it has in the files."""
        with opened(self.files[name]) as file:
            return tuple(file.get_slice(name).get_shape())

    def weights(self, config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
        """Yield the trunk by our names, then ``table`` and ``head`` of text alone, in float32."""

        def read(name: str) -> Tensor:
            with opened(self.files[name]) as file:
                return torch.as_tensor(file.get_tensor(name))

        return to_ours(read, self.files, config, self.path)

    def text(self) -> dict[str, bytes]:
        """Return the state of a text modality that cuts text as the folder's tokenizer does.

        Raises:
            ValueError: where there is no tokenizer.
        """
        for name, ours in ((TOKENIZER_FILE, TOKENIZER_FILE), ("tokenizer.model", MODEL_FILE)):
            if (self.path / name).is_file():
                about = {"rows": self.rows, **self._said()}
                return {ours: (self.path / name).read_bytes(), ABOUT_FILE: _json_bytes(about)}
        raise ValueError(
            f"expected tokenizer.json or tokenizer.model in {self.path}; found neither"
        )

    def _said(self) -> dict[str, Any]:
        """Return what is to be kept of what the folder says of its text."""
        kept = {name: self.described[name] for name in _KEPT if name in self.described}
        found, tokens = self._json("tokenizer_config.json", needed=False), dict[str, str]()
        for name in (n for n in _TOKENS if found.get(n)):
            said = found[name].get("content") if isinstance(found[name], dict) else found[name]
            if not isinstance(said, str):
                raise ValueError(
                    f"{self.path / 'tokenizer_config.json'} is damaged: expected {name} as a "
                    f"string, or an object with its content; got {found[name]!r:.80}"
                )
            tokens[name] = said
        return {"config": kept, "tokens": tokens}

    def _json(self, name: str, needed: bool = True) -> dict[str, Any]:
        file = self.path / name
        if not needed and not file.is_file():
            return {}
        try:
            found = json.loads(file.read_bytes())
        except OSError as error:
            raise ValueError(f"expected {name} in {self.path}; {error.strerror}") from error
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{file} is damaged: {error}") from error
        if not isinstance(found, dict):
            raise ValueError(f"{file} is damaged: expected an object, got {type(found).__name__}")
        return found


def _json_bytes(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True).encode()


def own_ids(text: Text) -> dict[str, int]:
    """Return the ids of a text model that the model it came with begins and ends texts with."""
    about, found, known = text.about, dict[str, int](), text.ids_by_name
    for token, key in CONTROLS:
        said = about.get("config", {}).get(f"{key}_id")
        said = said[0] if isinstance(said, list) and said else said
        at = known.get(about.get("tokens", {}).get(key, ""), said)
        if isinstance(at, int) and not isinstance(at, bool) and 0 <= at < text.vocabulary:
            found[token] = at
    return found
