"""Tiny random models of the Llama, Qwen and SmolLM families, as `transformers` writes them."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before the libraries are imported, which read it once

import torch

WORDS = (
    *("red", "green", "blue", "grey", "ball", "box", "door", "key", "goes", "to", "the", "a"),
    *("opens", "is", "near", "left", "right", "of", "and", "then", "picks", "up", "drops", "it"),
)
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Where Qwen's tokenizers cut words; `transformers` applies it to every qwen2 model."""
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("Llama", "pieces", {"tie_word_embeddings": False, "rms_norm_eps": 1e-5}),
    "llama3": ("Llama", "bytes", {"tie_word_embeddings": True, "rope_parameters": LLAMA3}),
    "smollm2": ("Llama", "bytes", {"tie_word_embeddings": True, "head_dim": 16}),
    "smollm2_base": ("Llama", "lossy", {"tie_word_embeddings": True, "head_dim": 16}),
    "qwen2": ("Qwen2", "qwen", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", "qwen", {"tie_word_embeddings": False, "head_dim": 32}),
    "smollm3": ("SmolLM3", "bytes", {"tie_word_embeddings": True, "no_rope_layers": [1, 0, 1]}),
}
"""Per name: the family, the kind of tokenizer, and what its configuration has beside `SIZES`."""


def sentences(count: int = 400, first: int = 0) -> Iterator[str]:
    """Yield made-up sentences with some grammar, so that there is something to learn."""
    colours, things, acts = WORDS[:4], WORDS[4:8], (*WORDS[8:9], "opens", "picks up", "drops")
    for i in range(first, first + count):
        k = i * 2654435761 % 2**32
        one, two = (f"the {colours[(k >> s) % 4]} {things[(k >> (s + 2)) % 4]}" for s in (3, 11))
        yield f"{one} {acts[(k >> 19) % 4]} {two} and then it is {colours[(k >> 23) % 4]} {i % 50}."


def tokenizer(kind: str) -> Any:
    """Return a `tokenizers.Tokenizer` of one of the kinds that the families have.

    ``lossy`` is what SmolLM2's is: it has ids for those bytes alone that were in its text.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, trainers
    from tokenizers import pre_tokenizers as pre

    if kind == "pieces":
        return Tokenizer.from_str(json.dumps(_pieces()))
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    made = Tokenizer(models.BPE())
    made.decoder = decoders.ByteLevel()
    byte_level = pre.ByteLevel(add_prefix_space=False, use_regex=kind != "qwen")
    made.pre_tokenizer = pre.Sequence([pre.Digits(individual_digits=True), byte_level])
    if kind == "qwen":
        made.normalizer = normalizers.NFC()
        made.pre_tokenizer = pre.Sequence([pre.Split(Regex(QWEN), "isolated"), byte_level])
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=[] if kind == "qwen" else special,
        initial_alphabet=[] if kind == "lossy" else pre.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(sentences(), trainer)
    if kind == "qwen":
        made.add_special_tokens(special)
        made.add_tokens([AddedToken("<think>", special=False)])
    return made


def _pieces() -> dict[str, Any]:
    """Return Llama's kind of tokenizer.json: spaces as signs, bytes for what has no piece."""
    from tokenizers import Tokenizer, models, normalizers, trainers

    trained = Tokenizer(models.BPE(byte_fallback=True))
    signs = [{"type": "Prepend", "prepend": "\u2581"}]
    signs += [{"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}]
    trained.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    trained.train_from_iterator(
        sentences(), trainers.BpeTrainer(vocab_size=80, show_progress=False)
    )
    learnt = json.loads(trained.to_str())["model"]
    fixed = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    vocab = {piece: i for i, piece in enumerate([*fixed, *learnt["vocab"]])}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": fixed[i], "special": True, **flags} for i in range(3)
        ],
        "normalizer": {"type": "Sequence", "normalizers": signs},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": learnt["merges"],
        },
    }


def make(name: str, folder: Path, seed: int = 0, **options: Any) -> Any:
    """Write a random model and its tokenizer into a folder; return the model of `transformers`.

    Args:
        name: one of `MODELS`.
        folder: a new one.
        seed: of the weights.
        **options: of the configuration, instead of the model's own. ``padding`` is how many rows
            the embedding has that no id indexes.
    """
    with quiet():
        import transformers

        family, kind, own = MODELS[name]
        cut = tokenizer(kind)
        first, end = ("<s>", "</s>") if kind == "pieces" else ("<|endoftext|>", "<|im_end|>")
        if kind == "lossy":
            end = first
        fast = transformers.PreTrainedTokenizerFast(
            tokenizer_object=cut, bos_token=first, eos_token=end
        )
        fast.save_pretrained(str(folder))
        rows = len(fast) + options.pop("padding", 0 if kind == "lossy" else 5)
        sizes = {**SIZES, "vocab_size": rows, **own, **options}
        ids = {"bos_token_id": fast.bos_token_id, "eos_token_id": fast.eos_token_id}
        config = getattr(transformers, f"{family}Config")(**sizes, **ids, pad_token_id=None)
        torch.manual_seed(seed)
        model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
        for parameter_name, parameter in model.named_parameters():
            if "norm" in parameter_name or "bias" in parameter_name:  # all alike would hide errors
                torch.nn.init.normal_(parameter, mean=1.0 if "norm" in parameter_name else 0.0)
        model.save_pretrained(str(folder))
    return model


def quiet() -> warnings.catch_warnings:
    """Return a context in which the libraries' own warnings are no errors."""
    return warnings.catch_warnings(action="ignore")
