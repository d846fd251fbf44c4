"""The optimizer: Muon for the trunk's matrices, AdamW for everything else, one schedule for both.

Muon orthogonalises the momentum of a matrix by a Newton-Schulz iteration (Jordan et al. 2024,
https://kellerjordan.github.io/posts/muon/). Matrices of one shape are stacked and iterated in one
batched product. Steps are scaled so that their root mean square matches AdamW's (Liu et al. 2025,
arXiv 2502.16982), so both share a learning rate.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gato.parts import PARTS, is_added, part_of


@dataclass(frozen=True)
class OptimConfig:
    """How weights are updated."""

    lr: float = 1e-3
    """The highest learning rate."""
    warmup: int = 100
    """Steps of linear warm-up."""
    final: float = 0.0
    """Learning rate at the end, as a fraction of the highest."""
    cooldown: float = 0.6
    """The last fraction of the run over which the rate falls linearly."""
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0
    """The largest norm of the gradient; longer ones are scaled down."""
    muon: bool = True
    """Use Muon for the trunk's matrices instead of AdamW."""
    rates: Mapping[str, float] = field(default_factory=dict)
    """Factors of the learning rate: of a part (``trunk``, ``embedders``, ``table`` and others), or
    of a range of ids (``text``, ``control`` and others), whose rows of the table and of the head
    they are."""

    def __post_init__(self) -> None:
        for name in ("lr", "eps", "clip"):
            if not getattr(self, name) > 0.0:
                raise ValueError(f"optim.{name} must be above 0; got {getattr(self, name)}")
        for name in ("lr", "eps", "final", "weight_decay"):
            if not 0.0 <= getattr(self, name) < math.inf:
                told = f"optim.{name} must be a number of at least 0"
                raise ValueError(f"{told}; got {getattr(self, name)}")
        for name in ("beta1", "beta2"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"optim.{name} must be in [0, 1); got {getattr(self, name)}")
        for name, factor in self.rates.items():
            if not 0.0 <= factor < math.inf:
                raise ValueError(f"optim.rates must be at least 0; got {factor} for {name!r}")
        if self.warmup < 0:
            raise ValueError(f"optim.warmup must be at least 0; got {self.warmup}")
        if not 0.0 <= self.cooldown <= 1.0:
            raise ValueError(f"optim.cooldown must be in [0, 1]; got {self.cooldown}")

    def rate(self, step: int, steps: int) -> float:
        """Return the learning rate of `step`, counted from 0, in a run of `steps`."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        fall = max(1.0, self.cooldown * steps)
        left = min(1.0, (steps - step) / fall)
        return self.lr * (self.final + (1.0 - self.final) * left)


class Muon(torch.optim.Optimizer):
    """Momentum orthogonalised per matrix; all matrices of one shape in one product."""

    def __init__(
        self, params: Iterable[nn.Parameter], lr: float, weight_decay: float, momentum: float = 0.95
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every matrix that has a gradient."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[nn.Parameter]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    by_shape.setdefault(p.shape, []).append(p)
            for params in by_shape.values():
                self._update(params, group)

    def _update(self, params: list[nn.Parameter], group: dict[str, Any]) -> None:
        buffers = []
        for p in params:
            state = self.state[p]
            if "momentum" not in state:
                state["momentum"] = torch.zeros_like(p)
            buffers.append(state["momentum"])
        gradients = [p.grad for p in params]
        closed: Tensor | None = getattr(self, "found_inf", None)  # as AdamW is told
        kept: Tensor | float = 1.0 - group["lr"] * group["weight_decay"]
        if closed is not None:
            # momentum, weights and what is added to them stay as they are, whatever came
            shut = closed > 0
            gradients = [*torch.where(shut, torch.stack(buffers), torch.stack(gradients)).unbind()]
            kept = torch.where(shut, 1.0, kept)
        torch._foreach_lerp_(buffers, gradients, 1.0 - group["momentum"])
        ahead = torch._foreach_lerp(gradients, buffers, group["momentum"])  # Nesterov
        direction = orthogonalise(torch.stack(ahead))
        if closed is not None:
            direction = torch.where(shut, 0.0, direction)
        scale = 0.2 * math.sqrt(max(params[0].shape))
        torch._foreach_mul_(params, kept)
        torch._foreach_add_(params, list(direction.unbind()), alpha=-group["lr"] * scale)


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """Return (n, a, b) matrices with the singular vectors of the input and values near 1.

    In float32, where a matrix is at least twice as long as it is wide, the iteration runs on the
    small Gram matrix: x becomes p(G) x, with G = x x' and p(G) = a + b G + c G G, so that G becomes
    p(G) G p(G), and the long matrix itself takes part in two products instead of ten. In bf16 the
    Gram matrix would lose what makes this exact.
    """
    x = matrices.bfloat16() if matrices.is_cuda else matrices.float()
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    by_gram = x.dtype == torch.float32 and x.shape[-1] >= 2 * x.shape[-2]
    x = _by_gram(x, steps) if by_gram else _directly(x, steps)
    return (x.mT if tall else x).to(matrices.dtype)


_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def _directly(x: Tensor, steps: int) -> Tensor:
    a, b, c = _NEWTON_SCHULZ
    for _ in range(steps):
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def _by_gram(x: Tensor, steps: int) -> Tensor:
    a, b, c = _NEWTON_SCHULZ
    gram = torch.bmm(x, x.mT)
    whole = None
    for k in range(steps):
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal(dim1=-2, dim2=-1).add_(a)
        whole = factor if whole is None else torch.bmm(factor, whole)
        if k < steps - 1:
            gram = torch.bmm(torch.bmm(factor, gram), factor)
    return x if whole is None else torch.bmm(whole, x)


class Optimizers:
    """Both optimizers as one: the trunk's matrices under Muon, the rest under AdamW."""

    def __init__(
        self,
        model: nn.Module,
        config: OptimConfig,
        spans: Mapping[str, tuple[int, int]] | None = None,
    ) -> None:
        """Take what of a model is trained.

        Args:
            model: whose parameters they are.
            config: how they are updated.
            spans: rows [start, stop) of the tables of ids by name, for ``config.rates``.
        """
        self.config = config
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        known = {*PARTS, *(spans or {})}
        for name in config.rates:
            if name not in known:
                raise ValueError(
                    f"optim.rates must name parts or ranges of ids ({', '.join(sorted(known))}); "
                    f"got {name!r}"
                )
        rows = _row_rates(named, config.rates, spans or {})
        self._rows = [row for row in rows if row[3]]
        self._still = [row[:3] for row in rows if not row[3]]
        """Rows of tables that stay as they are, as if they had no gradient."""
        parts = {part_of(n) for n, _ in named}
        learns = {*parts, *((spans or {}) if parts & {"table", "head"} else ())}
        self.idle = [name for name in config.rates if name not in learns]
        """Names of ``config.rates`` of which nothing is trained, so that they do nothing."""
        apart = {id(p) for p, *_ in rows}
        trunk = ("blocks.", "joint.ffn.")
        muon: dict[float, list[nn.Parameter]] = {}
        adam: dict[tuple[float, float], list[nn.Parameter]] = {(config.weight_decay, 1.0): []}
        for n, p in named:
            decayed = p.ndim >= 2 and n.startswith(trunk) and not is_added(n)
            factor = 1.0 if id(p) in apart else config.rates.get(part_of(n), 1.0)
            if decayed and p.ndim == 2 and config.muon:
                muon.setdefault(factor, []).append(p)
            else:
                decay = config.weight_decay if decayed else 0.0
                adam.setdefault((decay, factor), []).append(p)
        groups = [
            {"params": params, "weight_decay": decay, "factor": factor}
            for (decay, factor), params in adam.items()
            if params
        ]
        self.parameters = [p for _, p in named]
        self.all: list[torch.optim.Optimizer] = []
        if groups:
            betas = config.beta1, config.beta2
            self.all.append(
                torch.optim.AdamW(groups, lr=config.lr, betas=betas, eps=config.eps, fused=True)
            )
        if muon:
            matrices = [{"params": params, "factor": factor} for factor, params in muon.items()]
            self.all.append(Muon(matrices, config.lr, config.weight_decay))

    def norm(self) -> Tensor:
        """Return the norm of the gradient, a scalar; that of rows that stay has no part in it."""
        for p, start, stop in self._still:
            if p.grad is not None:
                p.grad[start:stop] = 0.0
        return nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])

    def step(self, rate: float, norm: Tensor | None = None, closed: Tensor | None = None) -> Tensor:
        """Clip, update at learning rate `rate`, clear; return the gradient's norm, a scalar.

        Args:
            rate: of all of them.
            norm: the gradient's, where it is known already.
            closed: a scalar on the device; where it is not 0, nothing is changed, and the host
                need not know.
        """
        norm = self.norm() if norm is None else norm
        nn.utils.clip_grads_with_norm_(self.parameters, self.config.clip, norm)
        before = [p[start:stop].detach().clone() for p, start, stop, _ in self._rows]
        for optimizer in self.all:
            for group in optimizer.param_groups:
                group["lr"] = rate * group["factor"]
            optimizer.found_inf = closed  # type: ignore[attr-defined]
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for (p, start, stop, factor), old in zip(self._rows, before, strict=True):
                p[start:stop].lerp_(old, 1.0 - factor)
        return norm

    def tensors(self, names: dict[int, str]) -> dict[str, Tensor]:
        """Return the state as named tensors; `names` maps id(parameter) to its name."""
        found = {}
        for optimizer in self.all:
            for parameter, state in optimizer.state.items():
                for key, value in state.items():
                    found[f"{names[id(parameter)]}/{key}"] = torch.as_tensor(value)
        return found

    def load_tensors(self, tensors: dict[str, Tensor], names: dict[int, str]) -> None:
        """Restore what `tensors` returned."""
        by_parameter: dict[str, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            parameter, key = name.rsplit("/", 1)
            by_parameter.setdefault(parameter, {})[key] = value
        for optimizer in self.all:
            for group in optimizer.param_groups:
                for p in group["params"]:
                    if names[id(p)] in by_parameter:
                        state = by_parameter[names[id(p)]]
                        optimizer.state[p] = {
                            k: v.to(p.device, copy=True) for k, v in state.items()
                        }
        for p, start, stop in self._still:  # which older runs kept a momentum of
            for value in (s for o in self.all if p in o.state for s in o.state[p].values()):
                if value.shape == p.shape:
                    value[start:stop] = 0.0


def _row_rates(
    named: Iterable[tuple[str, nn.Parameter]],
    rates: Mapping[str, float],
    spans: Mapping[str, tuple[int, int]],
) -> list[tuple[nn.Parameter, int, int, float]]:
    """Return (table, start, stop, factor) of rows [start, stop) that learn at another rate.

    AdamW knows one rate per parameter, so these are taken back by 1 - factor of every step. Rows of
    no range that is named learn at the rate of their table.
    """
    ranges = sorted((*spans[name], factor) for name, factor in rates.items() if name in spans)
    found = []
    for name, p in named:
        part = part_of(name)
        if not ranges or part not in ("table", "head"):
            continue
        common, at = rates.get(part, 1.0), 0
        for start, stop, factor in [*ranges, (len(p), len(p), 1.0)]:
            found += [(p, at, start, common), (p, start, stop, factor)]
            at = stop
    return [(p, start, stop, f) for p, start, stop, f in found if start < stop and f != 1.0]


class Average:
    """Weights averaged over the steps of a run, exponentially: the newest count most.

    What is frozen is its own average, and is not held twice.

    At step k the average keeps min(decay, (1 + k) / (10 + k)) of what it was, so that the first
    weights, which are noise, are soon forgotten.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.values = {n: p.detach().clone() for n, p in self.parameters.items()}

    @torch.no_grad()
    def update(self, step: int, closed: Tensor | None = None) -> None:
        """Take in the weights that `step` led to, unless `closed` is given and not 0."""
        taken = 1.0 - min(self.decay, (1 + step) / (10 + step))
        own, new = [*self.values.values()], [p.detach() for p in self.parameters.values()]
        if closed is None:
            torch._foreach_lerp_(own, new, taken)
            return
        change = [a - b for a, b in zip(new, own, strict=True)]
        torch._foreach_mul_(change, torch.where(closed > 0, 0.0, taken))
        torch._foreach_add_(own, change)

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor]) -> None:
        """Restore the average; `tensors` may hold other things too."""
        for name, value in self.values.items():
            value.copy_(tensors[name])

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Let the model have the averaged weights for as long as this lasts."""
        own = {n: p.data for n, p in self.parameters.items()}
        for name, parameter in self.parameters.items():
            parameter.data = self.values[name]
        try:
            yield
        finally:
            for name, parameter in self.parameters.items():
                parameter.data = own[name]
