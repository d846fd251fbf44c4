"""The transformer: one causal trunk over a flat stream of tokens.

- embeddings of ids and of positions inside a step, plus whatever each modality's module makes of
  its payload rows; the model names no modality
- pre-norm RMSNorm, rotary positions that restart per document, optional query/key norm
- grouped key/value heads, optional sliding window, gated feed-forward (GEGLU or SwiGLU)
- logits only where a token is predicted; token table tied to them by default; where several ids
  are predicted from one state, a state per slot (`joint.py`) and logits over their span of ids
- where it is asked for, a head that matches what is shown with what is said (`contrast.py`)
- output projections start at zero, so every block starts as the identity

Legend: N tokens of a packed batch, M targets, B rows decoded, Q tokens of a chunk, D width,
H query heads, G key/value heads, K head width, F half of the feed-forward width, V vocabulary.
"""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gato.attention import PackedMeta
from gato.cache import KVCache
from gato.contrast import ContrastHead
from gato.decoding import Decoder
from gato.joint import JointHead
from gato.layers import Block, RMSNorm, rotation_at
from gato.model_config import ModelConfig
from gato.parts import is_added
from gato.tokenizers.shapes import in_blocks
from gato.tokenizers.stream import Matches, TokenBatch

LOGITS = 1 << 26
"""Logits made at once where nothing is learnt, or where a run begins with a large vocabulary."""
TARGETS = 128
"""Targets are predicted in multiples of so many while training; see `tokenizers/shapes.py`."""

Payload = dict[str, dict[str, Tensor]]


class GatoModel(nn.Module):
    """Embeddings, trunk and logits."""

    def __init__(
        self,
        config: ModelConfig,
        vocabulary_size: int,
        masked_id: int,
        nets: dict[str, nn.Module] | None = None,
        slots: int = 0,
        spans: Mapping[int, tuple[int, int]] | None = None,
        contrast: bool = False,
    ) -> None:
        """Build and initialise the model.

        Args:
            config: sizes.
            vocabulary_size: number of ids V.
            masked_id: the id that stands at tokens hidden from the model.
            nets: one module per kind of payload; `net(payload)` returns (r, D) for r rows.
            slots: most ids predicted from one state beside the stream; 0 for none.
            spans: ids [start, stop) of each kind of such targets, by its number in batches.
            contrast: have a head that matches what is shown with what is said.
        """
        super().__init__()
        if not 0 <= masked_id < vocabulary_size:
            raise ValueError(f"masked_id must be in [0, {vocabulary_size}); got {masked_id}.")
        self.config = config
        self.vocabulary_size = vocabulary_size
        self.masked_id = masked_id
        # Row V stands for tokens that have no id; it is never a logit.
        self.table = nn.Embedding(vocabulary_size + 1, config.width)
        plain = 0 if config.plain_text else None  # a row of zeros that is never changed
        self.local = nn.Embedding(config.local_positions, config.width, padding_idx=plain)
        self.nets = nn.ModuleDict(nets or {})
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.width, config.norm_eps)
        self.head = None if config.tied else nn.Linear(config.width, vocabulary_size, bias=False)
        self.joint = JointHead(config, slots) if slots else None
        self.spans = dict(spans or {})
        self.compiled = False
        """Whether the blocks are, which then want nothing that differs from batch to batch."""
        self.init_weights()
        # after all else, which begins with the same weights whether there is such a head or not
        self.contrast = ContrastHead(config.width) if contrast else None

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draw the trunk and tables anew; the nets keep the weights they came with."""
        std = self.config.init_std
        nn.init.normal_(self.table.weight, std=std)
        nn.init.normal_(self.local.weight, std=std)
        if self.config.plain_text:
            nn.init.zeros_(self.local.weight[0])
        if self.head is not None:
            nn.init.normal_(self.head.weight, std=std)
        for module in (*self.blocks.modules(), self.norm):
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, RMSNorm):
                nn.init.ones_(module.weight)
        for block in self.blocks:
            nn.init.zeros_(block.attention.out.weight)
            nn.init.zeros_(block.ffn.down.weight)
        if self.joint is not None:
            self.joint.init_weights()

    def embed(
        self, inputs: Tensor, local: Tensor, payload: Payload | None = None, spare: int = 0
    ) -> Tensor:
        """Return (N, D), or (..., D) where there is no payload.

        Args:
            inputs: int64 ids as the model may see them, negative where a token has none.
            local: int64 index of each token inside its step.
            payload: per net, its tensors, among them "at" (r,): the tokens its rows belong to.
            spare: rows past the last token that payload may belong to; they are dropped.
        """
        ids = inputs.where(inputs >= 0, self.vocabulary_size)
        x = self.table(ids) + self.local(local.clamp(max=self.config.local_positions - 1))
        if spare:
            x = F.pad(x, (0, 0, 0, spare))
        for name, rows in (payload or {}).items():
            if name not in self.nets:
                known = ", ".join(self.nets) or "none"
                raise ValueError(f"no net for payload {name!r}; this model has: {known}.")
            x.index_add_(0, rows["at"], self.nets[name](rows).to(x.dtype))
        return x[: len(inputs)] if spare else x

    def trunk(self, x: Tensor, batch: TokenBatch) -> Tensor:
        """Return hidden states (N, D) for embedded tokens x (N, D) of a packed batch."""
        c = self.config
        dtype = self._compute_dtype(x)
        meta = PackedMeta.build(batch, c.window, dtype, c.head_dim, self.compiled)
        rotation = self._rotation(batch.position)
        for number, block in enumerate(self.blocks):
            x = block(x, None if number in c.no_rope else rotation, meta)
        return self.norm(x)

    def forward(self, batch: TokenBatch) -> Tensor:
        """Return hidden states (N, D) of a packed `TokenBatch` of tensors."""
        x = self.embed(batch.inputs, batch.local, batch.payload, batch.spare)
        return self.trunk(x, batch)

    def logits(self, hidden: Tensor, span: tuple[int, int] | None = None) -> Tensor:
        """Return (..., V) for hidden states (..., D); of ids [start, stop) only, with a span."""
        start, stop = span or (0, self.vocabulary_size)
        if self.head is not None and span is None:
            return self.head(hidden)
        weight = self.table.weight if self.head is None else self.head.weight
        return F.linear(hidden, weight[start:stop])

    def loss(
        self,
        batch: TokenBatch,
        ordinal: tuple[int, int] | None = None,
        soft_bins: float | None = None,
    ) -> Tensor:
        """Return the negative log-likelihood (M,) of each target of a packed batch, unweighted.

        Args:
            batch: a `TokenBatch` of tensors.
            ordinal: ids [start, stop) of bins in order; their targets are spread by `soft_bins`.
            soft_bins: spread in bins, 0 for none; None takes the configuration's.
        """
        spread = self.config.soft_bins if soft_bins is None else soft_bins
        if spread > 0 and ordinal is None:
            raise ValueError(f"soft_bins={spread} needs the ordinal ids [start, stop); got None.")
        return self.batch_nll(self(batch), batch, ordinal, spread)

    def batch_nll(
        self,
        hidden: Tensor,
        batch: TokenBatch,
        ordinal: tuple[int, int] | None = None,
        soft_bins: float = 0.0,
    ) -> Tensor:
        """Return (M,) as `loss` does, from the hidden states (N, D) of the batch.

        Joint targets compete with the ids of their own kind alone, as they do where a policy
        decodes them.
        """
        states = hidden[batch.state_at]  # (M, D)
        if not batch.joint:
            return self.target_nll(states, batch.target_ids, ordinal, soft_bins)
        sizes = [count for _, count in batch.joint]
        sizes.insert(0, len(states) - sum(sizes))
        cut = zip(
            (None, *(self.spans[kind] for kind, _ in batch.joint)),
            *(x.split(sizes) for x in (states, batch.target_ids, batch.target_slot)),
            strict=True,
        )
        return torch.cat(
            [
                self.target_nll(h, ids, ordinal, soft_bins, span and (slot, span))
                for span, h, ids, slot in cut
                if len(ids)
            ]
        )

    def match(self, hidden: Tensor, matches: Matches) -> tuple[Tensor, Tensor]:
        """Return the loss (I,) of pairs, and whether their words come first, from states (N, D)."""
        assert self.contrast is not None, "a batch with matches needs a model with such a head"
        shown, said = hidden[matches.shown_at], hidden[matches.said_at]
        found: tuple[Tensor, Tensor] = self.contrast(shown, said, matches.said)
        return found

    def target_nll(
        self,
        hidden: Tensor,
        target_ids: Tensor,
        ordinal: tuple[int, int] | None = None,
        soft_bins: float = 0.0,
        joint: tuple[Tensor, tuple[int, int]] | None = None,
    ) -> Tensor:
        """Return (M,): cross-entropy of target ids (M,) under hidden states (M, D); see `loss`.

        Args:
            hidden: (M, D)
            target_ids: (M,)
            ordinal: see `loss`.
            soft_bins: see `loss`.
            joint: of joint targets, their slots (M,) and the span of their ids.
        """
        slots, span = joint or (torch.zeros_like(target_ids), None)
        first, last = span or (0, self.vocabulary_size)
        if ordinal is not None:
            if ordinal[1] <= first or last <= ordinal[0]:
                soft_bins = 0.0  # none of these ids is a bin
            ordinal = ordinal[0] - first, ordinal[1] - first

        def block(h: Tensor, ids: Tensor, slot: Tensor) -> Tensor:
            if span is not None:
                h, ids = self.joint(h, slot), ids - first
            logits = self.logits(h, span).float()
            if soft_bins > 0:
                return soft_cross_entropy(logits, ids, ordinal, soft_bins)
            return F.cross_entropy(logits, ids, reduction="none")

        if self.training and not self.config.loss_chunk:
            missing = -len(target_ids) % TARGETS
            ids, slots = (
                F.pad(target_ids, (0, missing), value=first),
                F.pad(slots, (0, missing), value=1),
            )
            return in_blocks(lambda h: block(h, ids, slots), hidden, TARGETS)
        size, learns = self.config.loss_chunk, torch.is_grad_enabled()
        if not size and not learns:
            size = max(1, LOGITS // (last - first))
        if not size or hidden.shape[0] <= size:
            return block(hidden, target_ids, slots)
        chunks = zip(hidden.split(size), target_ids.split(size), slots.split(size), strict=True)
        if not learns:
            return torch.cat([block(*chunk) for chunk in chunks])
        return torch.cat([checkpoint(block, *chunk, use_reentrant=False) for chunk in chunks])

    def new_cache(self, batch: int, chunk: int = 64, dtype: torch.dtype | None = None) -> KVCache:
        """Return an empty cache for `batch` rows, on the model's device.

        Args:
            batch: number of rows.
            chunk: most tokens decoded at once; longer chunks are split.
            dtype: of keys and values; None takes that of the computation.
        """
        c, weight = self.config, self.table.weight
        dtype = dtype or self._compute_dtype(weight)
        return KVCache(
            c.layers, batch, c.memory, c.kv_heads, c.head_dim, dtype, weight.device, chunk
        )

    def decode(self, x: Tensor, cache: KVCache, valid: Tensor | None = None) -> Tensor:
        """Return hidden states (B, Q, D) of new tokens, and remember them in the cache.

        Args:
            x: (B, Q, D) from `embed`; finite everywhere, padding included.
            cache: from `new_cache`; every row is on its own timestep.
            valid: (B,) number of real tokens in each row, the first ones; None means all Q.
        """
        if x.shape[1] > cache.chunk:
            parts = x.split(cache.chunk, dim=1)
            counts = [
                None if valid is None else (valid - i * cache.chunk).clamp(0, part.shape[1])
                for i, part in enumerate(parts)
            ]
            hidden = [self.decode(p, cache, c) for p, c in zip(parts, counts, strict=True)]
            return torch.cat(hidden, dim=1)
        step = cache.advance(x.shape[1], valid)
        return Decoder(self)(x.flatten(0, 1), cache, step).view(x.shape)

    def _rotation(self, position: Tensor) -> Tensor:
        c = self.config
        return rotation_at(position, c.head_dim, c.rope_base, c.rope_scaling)

    @staticmethod
    def _compute_dtype(x: Tensor) -> torch.dtype:
        kind = x.device.type
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def soft_cross_entropy(
    logits: Tensor, ids: Tensor, ordinal: tuple[int, int], spread: float
) -> Tensor:
    """Return (M,): cross-entropy with targets spread over neighbouring ordinal bins.

    A target inside [start, stop) becomes a Gaussian over the bins within three spreads of it, cut
    at the ends of the range and scaled to sum to one. Other targets stay as they are.

    Args:
        logits: (M, V) in float32.
        ids: (M,) target ids.
        ordinal: ids [start, stop) of bins in order.
        spread: standard deviation of the Gaussian, in bins.
    """
    start, stop = ordinal
    radius = math.ceil(3 * spread)
    offset = torch.arange(-radius, radius + 1, device=ids.device)
    near = ids[:, None] + offset  # (M, 2 * radius + 1)
    inside = (near >= start) & (near < stop) & (ids >= start)[:, None] & (ids < stop)[:, None]
    weight = torch.exp(-0.5 * (offset / spread) ** 2) * inside
    centre = (offset == 0).to(weight.dtype)
    weight = torch.where(inside.any(dim=1, keepdim=True), weight, centre)
    weight = weight / weight.sum(dim=1, keepdim=True)
    picked = logits.gather(1, near.clamp(0, logits.shape[1] - 1))
    return logits.logsumexp(dim=1) - (weight * picked).sum(dim=1)


def parameter_table(model: GatoModel) -> dict[str, int]:
    """Return parameters by component, with their "total"; shared ones are counted once."""
    parts: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        head, _, rest = name.partition(".")
        if is_added(name):
            head = "lora"
        elif head == "nets":
            head = f"nets.{rest.partition('.')[0]}"
        elif head == "norm" or "norm.weight" in rest:
            head = "norms"
        elif head == "blocks":
            head = "trunk"
        parts[head] = parts.get(head, 0) + parameter.numel()
    return parts | {"total": sum(parts.values())}
