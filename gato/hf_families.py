"""Language models of the Llama, Qwen and SmolLM families: their configuration and weights as ours.

Both ways, and without the library `transformers`. What differs is form alone:

- theirs are separate matrices where ours are joined: queries, keys and values; gate and value
- their rotation pairs i with i + K / 2 of a head, ours 2i with 2i + 1: rows are reordered
- an `intermediate_size` of n is our `ffn_width` of 2n

Legend: K head width, D width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from gato.model_config import ModelConfig

FAMILIES = ("llama", "qwen2", "qwen3", "smollm3")
_ROPE_BASE = {"smollm3": 2_000_000.0}
_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
_FORMER = "rotary_emb.inv_freq"  # tables that old files hold and nobody reads


def model_fields(
    described: Mapping[str, Any], tensors: Collection[str], where: Any
) -> dict[str, Any]:
    """Return the fields of `ModelConfig` that a ``config.json`` decides.

    Args:
        described: what stands in the file.
        tensors: the names of the weights beside it.
        where: the folder, for messages.

    Raises:
        ValueError: for another family, or a model of one that is not built here, saying which.
    """
    family = described.get("model_type")
    if family not in FAMILIES:
        raise ValueError(
            f"expected a language model of the family llama (to which SmolLM and SmolLM2 belong), "
            f"qwen2, qwen3 or smollm3 in {where}; its config.json says model_type {family!r}. Take "
            f"a model of one of these, or train from nothing without --init-from."
        )
    try:
        _require_known(described, family, where)
        base, scaling = _rope(described, family, where)
        heads, width = (_whole(described, n) for n in ("num_attention_heads", "hidden_size"))
        layers = _whole(described, "num_hidden_layers")
        last = f"model.layers.{layers - 1}.input_layernorm.weight"
        if last not in tensors:  # before anything of that size is made
            raise Refused(f"{where}: its weights lack {last!r}, of {layers} layers")
        every = _whole(described, "no_rope_layer_interval", 4)  # of SmolLM3, else not asked for
        turned = described.get("no_rope_layers") or [(i + 1) % every for i in range(layers)]
        tied = described.get("tie_word_embeddings")
        return {
            "layers": layers,
            "width": width,
            "heads": heads,
            "head_dim": _whole(described, "head_dim", width // heads),
            "kv_heads": _whole(described, "num_key_value_heads", heads),
            "ffn_width": 2 * _whole(described, "intermediate_size"),
            "ffn": "swiglu",
            "qk_norm": family == "qwen3",
            "qkv_bias": family == "qwen2",
            "tied": "lm_head.weight" not in tensors if tied is None else bool(tied),
            "rope_base": base,
            "rope_scaling": scaling,
            "no_rope": tuple(i for i, on in enumerate(turned[:layers]) if not on)
            if family == "smollm3"
            else (),
            "norm_eps": _above_0("rms_norm_eps", described.get("rms_norm_eps", 1e-6)),
            "plain_text": True,
        }
    except Refused:
        raise
    except KeyError as error:
        raise ValueError(f"{where}: config.json is damaged: {error} is missing") from error
    except (TypeError, AttributeError, ValueError, ArithmeticError) as error:
        raise ValueError(f"{where}: config.json is damaged: {error}") from error


class Refused(ValueError):
    """What a configuration says is clear, and not built here."""


def _whole(described: Mapping[str, Any], name: str, else_: int | None = None) -> int:
    """Return a whole number of a configuration, or `else_` where it says none or 0."""
    found = described[name] if else_ is None else described.get(name) or else_
    if isinstance(found, bool) or not isinstance(found, int) or found < 1:
        raise ValueError(f"expected {name} as a whole number of at least 1; got {found!r:.40}")
    return found


def _above_0(name: str, found: Any) -> float:
    number = float(found)
    if not 0.0 < number < math.inf:
        raise ValueError(f"expected {name} as a number above 0; got {number}")
    return number


def _require_known(described: Mapping[str, Any], family: str, where: Any) -> None:
    kinds = set(described.get("layer_types") or ())
    refused = {
        "quantization_config": described.get("quantization_config") is not None,
        "attention_bias": bool(described.get("attention_bias")) and family != "qwen2",
        "mlp_bias": bool(described.get("mlp_bias")),
        "use_sliding_window": bool(described.get("use_sliding_window")),
        "layer_types": bool(kinds - {"full_attention"}),
        "hidden_act": described.get("hidden_act", "silu") not in ("silu", "swish"),
    }
    for name, is_so in refused.items():
        if is_so:
            raise Refused(
                f"{where}: a {family} model with {name} = {described[name]!r:.80} is not built "
                f"here; expected one without (full attention, silu, no biases but Qwen2's own, "
                f"weights not quantised). Take another model of the family."
            )


def _rope(described: Mapping[str, Any], family: str, where: Any) -> tuple[float, tuple[float, ...]]:
    """Return the base of the rotary frequencies and their scaling, of old files and new ones."""
    rope = dict(described.get("rope_parameters") or described.get("rope_scaling") or {})
    said = rope.get("rope_theta", described.get("rope_theta", _ROPE_BASE.get(family, 10_000.0)))
    base = _above_0("rope_theta", said)
    kind = rope.get("rope_type", rope.get("type", "default"))
    partial = rope.get("partial_rotary_factor", described.get("partial_rotary_factor", 1.0))
    if kind not in ("default", "llama3") or partial not in (None, 1.0):
        told = f"rope scaling {kind!r}" if partial in (None, 1.0) else "partial rotation"
        raise Refused(
            f"{where}: expected rotary positions as they are or scaled as Llama 3's ('llama3'); "
            f"got {told}, which is not built here. Take a model without."
        )
    if kind == "default":
        return base, ()
    context = rope.get(_LLAMA3[3]) or described["max_position_embeddings"]
    low_high = (_above_0(name, rope[name]) for name in _LLAMA3[:3])
    return base, (*low_high, _above_0(_LLAMA3[3], context))


def described_as(config: ModelConfig, family: str | None = None) -> dict[str, Any]:
    """Return what ``config.json`` says of a model's sizes and family.

    Args:
        config: the model's.
        family: that it came from; taken where it still fits.

    Raises:
        ValueError: where no family has such blocks, saying why.
    """
    if config.ffn != "swiglu":
        raise ValueError(
            f"no Llama, Qwen or SmolLM model has a feed-forward layer of kind {config.ffn!r}; only "
            f"models with --model.ffn swiglu, or begun with --init-from, can be written as one"
        )
    if bool(config.qk_norm) + bool(config.qkv_bias) + bool(config.no_rope) > 1:
        raise ValueError(
            "no family has two of qk_norm (qwen3), qkv_bias (qwen2) and no_rope (smollm3); got "
            f"qk_norm={config.qk_norm}, qkv_bias={config.qkv_bias}, no_rope={config.no_rope}"
        )
    fits = "qwen3" if config.qk_norm else "qwen2" if config.qkv_bias else "llama"
    if config.no_rope or (family == "smollm3" and fits == "llama"):
        fits = "smollm3"
    names = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3", "smollm3": "SmolLM3"}
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_base}
    if config.rope_scaling:
        rope |= dict(zip(_LLAMA3, config.rope_scaling, strict=True))
        rope |= {"rope_type": "llama3", _LLAMA3[3]: int(config.rope_scaling[3])}
    described = {
        "model_type": fits,
        "architectures": [f"{names[fits]}ForCausalLM"],
        "num_hidden_layers": config.layers,
        "hidden_size": config.width,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.ffn_width // 2,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_base,  # what older readers look for, as in the line below
        "rope_scaling": None if not config.rope_scaling else rope,
        "rope_parameters": rope,
        "attention_dropout": 0.0,
        "dtype": "float32",
        "torch_dtype": "float32",
    }
    if fits in ("llama", "qwen3", "smollm3"):
        described["attention_bias"] = False
    if fits in ("llama", "smollm3"):
        described["mlp_bias"] = False
    if fits != "llama":
        described["use_sliding_window"] = False
    if fits == "smollm3":
        turned = [int(i not in config.no_rope) for i in range(config.layers)]
        described |= {"no_rope_layers": turned, "layer_types": ["full_attention"] * config.layers}
    return described


def to_ours(
    read: Callable[[str], Tensor], tensors: Collection[str], config: ModelConfig, where: Any
) -> Iterator[tuple[str, Tensor]]:
    """Yield a trunk's weights by our names, at last ``table`` and ``head`` of text ids alone.

    Each is read when it is asked for, so that memory holds no second model.

    Args:
        read: returns a tensor by their name.
        tensors: the names there are.
        config: of the model, from `model_fields`.
        where: the folder, for messages.

    Raises:
        ValueError: where a tensor is missing, of another shape or not known.
    """
    left = {n for n in tensors if not n.endswith(_FORMER)}

    def take(name: str, *shape: int) -> Tensor:
        if name not in tensors:
            raise ValueError(f"{where}: its weights lack {name!r}, which its config.json asks for")
        left.discard(name)
        found = read(name).float()
        if shape and tuple(found.shape) != shape:
            raise ValueError(
                f"{where}: expected {name!r} of shape {shape}, as its config.json says; got "
                f"{tuple(found.shape)}"
            )
        return found

    c, K, D = config, config.head_dim, config.width
    assert c.kv_heads is not None
    yield "norm.weight", take("model.norm.weight", D)
    for i in range(c.layers):
        theirs, ours = f"model.layers.{i}.", f"blocks.{i}."
        yield ours + "attention_norm.weight", take(theirs + "input_layernorm.weight", D)
        yield ours + "ffn_norm.weight", take(theirs + "post_attention_layernorm.weight", D)
        sizes = {"q": c.heads * K, "k": c.kv_heads * K, "v": c.kv_heads * K}
        for kind, *rest in (("weight", D), ("bias",)):
            if kind == "bias" and not c.qkv_bias:
                continue
            parts = [take(f"{theirs}self_attn.{n}_proj.{kind}", s, *rest) for n, s in sizes.items()]
            parts[:2] = [_neighbours(part, K) for part in parts[:2]]
            yield f"{ours}attention.qkv.{kind}", torch.cat(parts)
        out = take(theirs + "self_attn.o_proj.weight", D, c.heads * K)
        yield ours + "attention.out.weight", out
        for n in ("q", "k") if c.qk_norm else ():
            norm = take(f"{theirs}self_attn.{n}_norm.weight", K)
            yield f"{ours}attention.{n}_norm.weight", _neighbours(norm, K)
        half = c.ffn_width // 2
        gate_value = [take(f"{theirs}mlp.{n}_proj.weight", half, D) for n in ("gate", "up")]
        yield ours + "ffn.up.weight", torch.cat(gate_value)
        yield ours + "ffn.down.weight", take(theirs + "mlp.down_proj.weight", D, half)
    table = take("model.embed_tokens.weight")
    shape = tuple(table.shape)
    yield "table", table
    del table
    if c.tied:
        left.discard("lm_head.weight")  # the same again, in files that say so twice
    else:
        yield "head", take("lm_head.weight", *shape)
    if left:
        raise ValueError(
            f"{where}: its weights hold {sorted(left)[0]!r}, of which its config.json says nothing "
            f"that is built here"
        )


def to_theirs(weights: Mapping[str, Tensor], config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """Yield a trunk's weights by their names, of those by ours; no tables of ids."""
    c, K = config, config.head_dim
    assert c.kv_heads is not None
    yield "model.norm.weight", weights["norm.weight"]
    for i in range(c.layers):
        theirs, ours = f"model.layers.{i}.", f"blocks.{i}."
        yield theirs + "input_layernorm.weight", weights[ours + "attention_norm.weight"]
        yield theirs + "post_attention_layernorm.weight", weights[ours + "ffn_norm.weight"]
        for kind in ("weight", "bias") if c.qkv_bias else ("weight",):
            joined = weights[f"{ours}attention.qkv.{kind}"]
            parts = torch.split(joined, [c.heads * K, c.kv_heads * K, c.kv_heads * K])
            for name, part in zip("qkv", parts, strict=True):
                kept = part if name == "v" else _halves(part, K)
                yield f"{theirs}self_attn.{name}_proj.{kind}", kept
        yield theirs + "self_attn.o_proj.weight", weights[ours + "attention.out.weight"]
        for n in ("q", "k") if c.qk_norm else ():
            norm = weights[f"{ours}attention.{n}_norm.weight"]
            yield f"{theirs}self_attn.{n}_norm.weight", _halves(norm, K)
        gate, value = weights[ours + "ffn.up.weight"].chunk(2)
        yield theirs + "mlp.gate_proj.weight", gate
        yield theirs + "mlp.up_proj.weight", value
        yield theirs + "mlp.down_proj.weight", weights[ours + "ffn.down.weight"]


def _neighbours(rows: Tensor, head_dim: int) -> Tensor:
    """Return the rows of heads (n K, ...) with those that are turned together side by side."""
    halves = rows.reshape(-1, 2, head_dim // 2, *rows.shape[1:])  # (n, 2, K / 2, ...)
    return halves.transpose(1, 2).flatten(0, 2)


def _halves(rows: Tensor, head_dim: int) -> Tensor:
    """Return what `_neighbours` was given."""
    pairs = rows.reshape(-1, head_dim // 2, 2, *rows.shape[1:])  # (n, K / 2, 2, ...)
    return pairs.transpose(1, 2).flatten(0, 2)
