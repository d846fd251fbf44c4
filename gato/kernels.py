"""Which kernel computes the attention of packed rows, and why: chosen, asked for, told.

    fa3, fa4     PyTorch's flash attention for documents of different lengths, computed by
                 FlashAttention 3 (Hopper) or 4 (Blackwell), where their packages are installed
    varlen       the same, computed by what PyTorch has built in
    flash_attn   the flash-attn package, where PyTorch has no such function
    cudnn        as varlen, computed by cuDNN (torch 2.14 and later); only where it is asked for
    products     plain products with a mask: on a CPU in bf16 faster than SDPA, in short rows
    documents    SDPA without a mask, one document after another: on a CPU in long rows, unless
                 documents are many and short, or the model is compiled
    sdpa         PyTorch's scaled_dot_product_attention with a mask: any device, any dtype

`auto` takes the first of these that is at home on the device; `use` asks for one of them, for the
whole process. No package is ever required: what cannot be had is told with its reason.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch

FLASH = ("fa3", "fa4", "varlen", "cudnn", "flash_attn")
NAMES = ("auto", *FLASH, "products", "documents", "sdpa")
HOOKS = {
    "fa3": ("FA3", 9, "flash_attn_interface"),
    "fa4": ("FA4", 10, "flash_attn.cute.interface"),
}
"""By kernel: what PyTorch calls it, the compute capability it is for, the module it needs."""
PRODUCTS_MAX_ROW = 512
"""Longer rows go to SDPA: plain products keep all (R, H, T, T) weights for the backward pass. On a
CPU they are attended document by document, where these are not `SHORT`."""
SHORT = 32
"""Tokens of a document on average, below which one mask for all is as fast."""

_wish = "auto"
_ours: str | None = None  # the implementation that was activated here


@dataclass(frozen=True)
class Case:
    """What a kernel is chosen for."""

    device: str
    """Its type: "cpu" or "cuda"."""
    dtype: torch.dtype
    row_length: int | None = None
    """Tokens in a row; None where that is not known yet."""
    head_dim: int | None = None
    """Width of one head; None where that is not known yet."""


def use(name: str) -> None:
    """Ask for a kernel by its name in the drawing above, for the whole process, or for "auto".

    Raises:
        ValueError: for a name that is none. Whether it can be had, its first use tells.
    """
    global _wish
    if name not in NAMES:
        raise ValueError(f"expected attention as one of {', '.join(NAMES)}; got {name!r}.")
    _wish = name
    _restore()
    _choose.cache_clear()


@contextlib.contextmanager
def using(name: str) -> Iterator[None]:
    """Ask for a kernel for as long as this lasts."""
    before = _wish
    use(name)
    try:
        yield
    finally:
        use(before)


def chosen(case: Case) -> tuple[str, str]:
    """Return the kernel for packed rows, and why it is that one.

    Raises:
        ValueError: where another was asked for that cannot be had.
    """
    return _choose(_wish, case)


def asked_for(kernel: str) -> bool:
    """Return whether somebody asked for this kernel."""
    return _wish == kernel


def describe(
    device: torch.device | str,
    dtype: torch.dtype,
    row_length: int | None = None,
    head_dim: int | None = None,
) -> str:
    """Return one line: the kernel used for training on `device` in `dtype`, and why."""
    kind = torch.device(device).type
    kernel, reason = chosen(Case(kind, dtype, row_length, head_dim))
    return (
        f"attention: {kernel} on {kind} in {_name(dtype)} ({reason}); decoding: sdpa over the cache"
    )


def describe_decoding(device: torch.device | str, dtype: torch.dtype) -> str:
    """Return one line: the kernel that attends to the cache of a rollout, and why."""
    kind = torch.device(device).type
    reason = "keys of a ring lie in no order that flash kernels know; one mask for all layers"
    return f"attention: sdpa over the cache on {kind} in {_name(dtype)} ({reason})"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ---- the choice ------------------------------------------------------------------------------


@functools.cache
def _choose(wish: str, case: Case) -> tuple[str, str]:
    if wish != "auto":
        refused = _refused(wish, case)
        if refused is not None:
            raise ValueError(
                f"attention {wish!r} was asked for on {case.device} in {_name(case.dtype)}: "
                f"{refused}. Take auto instead, or a kernel that is to be had here."
            )
        return wish, "asked for"
    if case.device != "cuda":
        return _on_cpu(case)
    common = _no_flash(case)
    if common is not None:
        return "sdpa", f"{common}; one mask per batch"
    told: list[str] = []
    for kernel in ("fa3", "fa4", "varlen", "flash_attn"):
        if kernel in HOOKS and not _at_home(kernel):
            continue  # nothing to tell
        refused = _refused(kernel, case)
        if refused is None:
            return kernel, "; ".join([_has(kernel), *told])
        told.append(f"no {kernel}: {refused}")
    return "sdpa", "; ".join([*told, "one mask per batch"])


def _on_cpu(case: Case) -> tuple[str, str]:
    if case.device == "cpu" and (case.row_length or 0) > PRODUCTS_MAX_ROW:
        rule = f"one mask per batch where documents have fewer than {SHORT} on average"
        return "documents", f"rows of more than {PRODUCTS_MAX_ROW} tokens; {rule}"
    if case.device != "cpu" or case.dtype != torch.bfloat16:
        return "sdpa", "flash kernels need CUDA; one mask per batch"
    return "products", "faster than SDPA's CPU kernel in bf16; one mask per batch"


def _has(kernel: str) -> str:
    if kernel == "flash_attn":
        return "the flash-attn package is installed"
    by = HOOKS[kernel][0] if kernel in HOOKS else _active()
    told = [f"torch {torch.__version__} has varlen_attn", *([f"{by} is active"] if by else [])]
    return ", ".join([*told, *(["not cuDNN"] if honours_sdpa_kernel() else [])])


def _refused(kernel: str, case: Case) -> str | None:
    """Return why a kernel cannot be had; None where it can, and then it is ready."""
    if kernel in ("sdpa", "products"):
        return None
    if kernel == "documents":
        return None if case.device == "cpu" else "one document after another keeps a GPU waiting"
    common = _no_flash(case)
    if common is not None:
        return common
    if kernel == "flash_attn":
        return _missing("flash_attn")
    if _missing("torch.nn.attention.varlen"):
        return f"torch {torch.__version__} has no varlen_attn; 2.10 has"
    if kernel == "cudnn":
        return _no_cudnn(case)
    return _activated(kernel) if kernel in HOOKS else None


def _no_flash(case: Case) -> str | None:
    """Return why no flash kernel can compute this, if that is so."""
    if case.device != "cuda":
        return "flash kernels need CUDA"
    if case.dtype not in (torch.bfloat16, torch.float16):
        return "flash kernels need bf16 or fp16"
    if torch.version.hip is None and _capability() < (8, 0):
        return "flash kernels need compute capability 8.0"
    if case.head_dim is not None and (case.head_dim % 8 or case.head_dim > 256):
        return f"flash kernels need heads of a multiple of 8, 256 at most; got {case.head_dim}"
    return None


def _no_cudnn(case: Case) -> str | None:
    if not honours_sdpa_kernel():
        return f"torch {torch.__version__} cannot be told to take cuDNN; 2.14 can"
    if torch.version.hip is not None or _capability()[0] not in (9, 10):
        return "cuDNN's kernel is for compute capability 9 and 10"
    found = torch.backends.cudnn.version() or 0  # type: ignore[no-untyped-call]
    return None if found >= 91800 else f"cuDNN 9.18 is needed; got {found}"


def _at_home(kernel: str) -> bool:
    return torch.version.hip is None and _capability()[0] == HOOKS[kernel][1]


def _activated(kernel: str) -> str | None:
    """Let PyTorch compute flash attention by another implementation; return why it could not."""
    global _ours
    name, capability, module = HOOKS[kernel]
    if _ours == name:
        return None
    if not _at_home(kernel):
        return f"{name} is for compute capability {capability}"
    activate = getattr(torch.nn.attention, "activate_flash_attention_impl", None)
    if activate is None:
        return f"torch {torch.__version__} cannot activate {name}; 2.11 can"
    missing = _missing(module)
    if missing is not None:
        return missing
    try:
        activate(name)
    except Exception as error:  # a package built for another torch may fail in any way
        return f"{name} could not be activated ({type(error).__name__}: {error})"
    _ours = name
    return None


def _active() -> str | None:
    """Return the implementation that somebody activated, if any."""
    current = getattr(torch.nn.attention, "current_flash_attention_impl", None)
    return None if current is None else current()


def _restore() -> None:
    """Let PyTorch compute by what it has built in again, where it was told otherwise here."""
    global _ours
    if _ours is not None and _active() == _ours:
        torch.nn.attention.restore_flash_attention_impl()
    _ours = None


def _capability() -> tuple[int, int]:
    return torch.cuda.get_device_capability()


def _missing(module: str) -> str | None:
    """Return why a module cannot be imported; None where it can."""
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        return f"{error.name or module} is not installed"
    except Exception as error:  # built for another torch or another CUDA
        return f"{module} cannot be imported ({type(error).__name__}: {error})"
    return None


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def honours_sdpa_kernel() -> bool:
    """Return whether varlen_attn prefers cuDNN, and obeys `sdpa_kernel` (torch 2.14 and later)."""
    found = re.match(r"(\d+)\.(\d+)", torch.__version__)
    assert found is not None
    return (int(found[1]), int(found[2])) >= (2, 14)
