"""The size and shape of a model, as plain data, and the four sizes that have a name.

The configuration is a superset of the Llama, Qwen and SmolLM blocks, so that a trunk of that
family can be loaded into it. It says nothing about modalities: those bring their own modules.
"""

from dataclasses import dataclass

FFN_KINDS = ("geglu", "swiglu")


@dataclass(frozen=True)
class ModelConfig:
    """Everything that fixes the shapes and the function of a `GatoModel`."""

    layers: int
    """Number of transformer blocks."""
    width: int
    """Width D of the residual stream."""
    heads: int
    """Number of query heads."""
    head_dim: int
    """Width K of one head; even, since rotary positions turn pairs. 64 or 128 suit GPU kernels."""
    ffn_width: int
    """Width of the feed-forward projection, gate and value together: each half is ffn_width / 2.
    Convention: Gato's table is read so, which with its 3072, 6144 and 8192 comes within 4, 6 and 8%
    of the published totals; a Hugging Face `intermediate_size` of n is an `ffn_width` of 2n."""
    context: int
    """Tokens in one training row; the size of the memory at rollout unless `window` is smaller."""
    kv_heads: int | None = None
    """Number of key and value heads, a divisor of `heads`; None means as many as `heads`."""
    window: int | None = None
    """Tokens a query sees, itself included, in training and at rollout; None means its document in
    training and the last `context` tokens at rollout. With a window, episodes that fit in a row are
    trained as they are rolled out, however much longer than the window they are."""
    local_positions: int = 512
    """Rows of the learned table of positions inside a step; later tokens share the last row."""
    qk_norm: bool = False
    """Normalise queries and keys per head before they are rotated."""
    qkv_bias: bool = False
    """Add a bias to queries, keys and values (Qwen2 does)."""
    ffn: str = "geglu"
    """Activation of the gate: "geglu" (Gato) or "swiglu" (Llama, Qwen, SmolLM)."""
    tied: bool = True
    """Share the token table between input and logits."""
    rope_base: float = 10_000.0
    """Base of the rotary frequencies."""
    rope_scaling: tuple[float, ...] = ()
    """Of Llama 3, how low frequencies are stretched: factor, low and high frequency factor, and the
    context they were first trained on; nothing leaves them as they are."""
    no_rope: tuple[int, ...] = ()
    """Numbers of the blocks whose queries and keys are not rotated (SmolLM3 has some)."""
    plain_text: bool = False
    """Add nothing to tokens whose index inside a step is 0, as that of text is: a trunk that was
    pretrained on text then reads it as it always did."""
    norm_eps: float = 1e-6
    """Added to the mean square in every normalisation."""
    init_std: float = 0.02
    """Standard deviation of the token table at the start."""
    soft_bins: float = 0.0
    """Spread, in bins, of the target over neighbouring ordinal bins; 0 trains on the bin alone."""
    loss_chunk: int = 0
    """Targets per block of logits, to bound memory; 0 computes all logits at once."""

    def __post_init__(self) -> None:
        """Check what a caller can get wrong."""
        positive = ("layers", "width", "heads", "head_dim", "ffn_width", "context")
        for name in (*positive, "local_positions"):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"{name} must be at least 1; got {value}.")
        if self.kv_heads is None:
            object.__setattr__(self, "kv_heads", self.heads)
        if self.kv_heads < 1 or self.heads % self.kv_heads:
            raise ValueError(
                f"kv_heads must divide heads={self.heads}; got {self.kv_heads}. "
                "Use a divisor, or None for one per query head."
            )
        if len(self.rope_scaling) not in (0, 4) or any(not f > 0 for f in self.rope_scaling):
            raise ValueError(f"rope_scaling must be nothing or 4 numbers; got {self.rope_scaling}.")
        if any(not 0 <= block < self.layers for block in self.no_rope):
            raise ValueError(f"no_rope must be blocks of {self.layers}; got {self.no_rope}.")
        for name in ("head_dim", "ffn_width"):
            if getattr(self, name) % 2:
                raise ValueError(f"{name} must be even; got {getattr(self, name)}.")
        if self.ffn not in FFN_KINDS:
            raise ValueError(f"ffn must be one of {', '.join(FFN_KINDS)}; got {self.ffn!r}.")
        if self.window is not None and self.window < 1:
            raise ValueError(f"window must be at least 1 or None; got {self.window}.")
        if self.window is not None and self.window > self.context:
            raise ValueError(
                f"window must be at most context={self.context}, the tokens of a row; got "
                f"{self.window}. No token is ever trained to see more: take a longer context."
            )
        for name in ("soft_bins", "loss_chunk", "init_std"):
            if not getattr(self, name) >= 0:  # nor nan
                raise ValueError(f"{name} must be at least 0; got {getattr(self, name)}.")

    @property
    def memory(self) -> int:
        """Tokens that a rollout keeps: the window, or the training context without one."""
        return self.window if self.window is not None else self.context


def quickstart() -> ModelConfig:
    """Return the size that two CPU cores train in minutes."""
    return ModelConfig(
        layers=4, width=128, heads=4, head_dim=32, ffn_width=1024, context=256, qk_norm=True
    )


def gato_79m() -> ModelConfig:
    """Return Gato's smallest size (Gato table 5)."""
    return ModelConfig(layers=8, width=768, heads=24, head_dim=32, ffn_width=3072, context=1024)


def gato_364m() -> ModelConfig:
    """Return Gato's middle size (Gato table 5)."""
    return ModelConfig(layers=12, width=1536, heads=12, head_dim=128, ffn_width=6144, context=1024)


def gato_1b() -> ModelConfig:
    """Return Gato's full size, 1.18B (Gato table 5)."""
    return ModelConfig(layers=24, width=2048, heads=16, head_dim=128, ffn_width=8192, context=1024)


SIZES = {f.__name__: f for f in (quickstart, gato_79m, gato_364m, gato_1b)}
