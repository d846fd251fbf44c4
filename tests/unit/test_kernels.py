"""The choice of attention's kernel, on machines that are not at hand: cards and packages are fakes.

What the kernels compute is in tests/reference/test_attention.py and tests/gpu.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import ModuleType

import pytest
import torch

from gato import cli, kernels, options
from gato.kernels import Case, chosen

BF16 = Case("cuda", torch.bfloat16, 1024, 64)


class Hook:
    """Stands for PyTorch's registry of flash attention's implementations."""

    def __init__(self) -> None:
        self.active: str | None = None
        self.calls: list[str] = []
        self.error: Exception | None = None

    def activate(self, name: str) -> None:
        self.calls.append(name)
        if self.error is not None:
            raise self.error
        self.active = name

    def restore(self) -> None:
        self.calls.append("restore")
        self.active = None


Machine = Callable[..., Hook]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    """Return what puts another machine in place of this one."""

    def make(
        capability: tuple[int, int] = (9, 0),
        packages: tuple[str, ...] = ("torch.nn.attention.varlen",),
        torch_version: str = "2.13.0+cu130",
        hook: bool = True,
    ) -> Hook:
        found = Hook()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(torch, "__version__", torch_version)
        known = ("flash_attn_interface", "flash_attn.cute.interface", "flash_attn")
        for name in ("torch.nn.attention.varlen", *known):
            # None in place of a module: importing it fails as if it were not there
            fake = ModuleType(name) if name in packages else None
            monkeypatch.setitem(sys.modules, name, fake)
        if "flash_attn.cute.interface" in packages:
            for parent in ("flash_attn", "flash_attn.cute"):
                monkeypatch.setitem(sys.modules, parent, ModuleType(parent))
        names = ("activate", "restore")
        for name in names:
            full = f"{name}_flash_attention_impl"
            if hook:
                monkeypatch.setattr(torch.nn.attention, full, getattr(found, name))
            else:
                monkeypatch.delattr(torch.nn.attention, full)
        monkeypatch.setattr(
            torch.nn.attention, "current_flash_attention_impl", lambda: found.active
        )
        kernels.use("auto")
        return found

    yield make
    kernels.use("auto")


ALL = ("torch.nn.attention.varlen", "flash_attn_interface", "flash_attn.cute.interface")


@pytest.mark.parametrize(
    ("case", "kernel", "reason"),
    [
        (Case("cpu", torch.float32), "sdpa", "flash kernels need CUDA"),
        (Case("cpu", torch.float16), "sdpa", "flash kernels need CUDA"),
        (Case("mps", torch.bfloat16), "sdpa", "flash kernels need CUDA"),
        (Case("cpu", torch.bfloat16), "products", "faster than SDPA's CPU kernel"),
        (Case("cpu", torch.bfloat16, 512), "products", "faster than SDPA's CPU kernel"),
        (Case("cpu", torch.float32, 512), "sdpa", "flash kernels need CUDA"),
        (Case("cpu", torch.bfloat16, 513), "documents", "rows of more than 512 tokens"),
        (Case("cpu", torch.float32, 1024), "documents", "fewer than 32 on average"),
        (Case("mps", torch.float32, 1024), "sdpa", "flash kernels need CUDA"),
        (Case("cuda", torch.float32), "sdpa", "flash kernels need bf16 or fp16"),
        (Case("cuda", torch.float16), "varlen", "has varlen_attn"),
        (Case("cuda", torch.bfloat16, 1024, 36), "sdpa", "multiple of 8, 256 at most; got 36"),
        (Case("cuda", torch.bfloat16, 1024, 512), "sdpa", "multiple of 8, 256 at most; got 512"),
    ],
)
def test_what_is_chosen_by_device_dtype_and_size(machine, case, kernel, reason):
    machine()
    got, why = chosen(case)
    assert got == kernel
    assert reason in why
    assert kernel not in ("sdpa", "products") or "one mask per batch" in why


@pytest.mark.parametrize(
    ("capability", "packages", "kernel", "activated"),
    [
        ((9, 0), ALL, "fa3", ["FA3"]),
        ((10, 0), ALL, "fa4", ["FA4"]),
        ((10, 3), ALL, "fa4", ["FA4"]),
        ((8, 0), ALL, "varlen", []),  # Ampere has neither
        ((12, 0), ALL, "varlen", []),
        ((9, 0), ALL[:1], "varlen", []),
        ((9, 0), ("flash_attn",), "flash_attn", []),
        ((9, 0), (), "sdpa", []),
        ((7, 5), ALL, "sdpa", []),
    ],
)
def test_what_is_chosen_by_card_and_packages(machine, capability, packages, kernel, activated):
    hook = machine(capability, packages)
    assert chosen(BF16)[0] == kernel
    assert hook.calls == activated


def test_what_is_missing_is_told_with_the_choice(machine):
    machine((9, 0), ALL[:1])
    assert "no fa3: flash_attn_interface is not installed" in chosen(BF16)[1]
    machine((9, 0), ())
    why = chosen(BF16)[1]
    assert "no varlen: torch 2.13.0+cu130 has no varlen_attn" in why
    assert "no flash_attn: flash_attn is not installed" in why
    machine((7, 5))
    assert "compute capability 8.0" in chosen(BF16)[1]


def test_an_activation_that_fails_is_told_and_the_built_in_kernel_used(machine):
    hook = machine((9, 0), ALL)
    hook.error = RuntimeError("built for another torch")
    kernel, why = chosen(BF16)
    assert kernel == "varlen"
    assert "FA3 could not be activated (RuntimeError: built for another torch)" in why


def test_a_package_that_cannot_be_imported_is_told(machine, monkeypatch):
    machine((9, 0), ("flash_attn",))

    def broken(name: str) -> ModuleType:
        raise ImportError(f"undefined symbol in {name}")

    monkeypatch.setattr(kernels.importlib, "import_module", broken)
    assert "flash_attn cannot be imported (ImportError: undefined symbol" in chosen(BF16)[1]


def test_an_old_torch_has_no_hook(machine):
    machine((9, 0), ALL, "2.10.0", hook=False)
    kernel, why = chosen(BF16)
    assert kernel == "varlen"
    assert "torch 2.10.0 cannot activate FA3; 2.11 can" in why


def test_what_somebody_else_activated_is_left_and_told(machine):
    hook = machine((8, 0))
    hook.active = "FA9"
    assert "FA9 is active" in chosen(BF16)[1]
    kernels.use("varlen")
    assert hook.calls == []


def test_an_amd_card_is_asked_for_no_hopper_kernel(machine, monkeypatch):
    hook = machine((9, 4), ALL)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert chosen(BF16)[0] == "varlen"
    assert hook.calls == []


@pytest.mark.parametrize("kernel", ["varlen", "fa3", "flash_attn", "products", "sdpa"])
def test_a_kernel_can_be_asked_for(machine, kernel):
    machine((9, 0), (*ALL, "flash_attn"))
    with kernels.using(kernel):
        assert chosen(BF16) == (kernel, "asked for")
    assert chosen(BF16)[0] == "fa3"


def test_asking_for_the_built_in_kernel_takes_back_what_was_activated(machine):
    hook = machine((9, 0), ALL)
    assert chosen(BF16)[0] == "fa3"
    kernels.use("varlen")
    assert hook.calls == ["FA3", "restore"]
    assert chosen(BF16) == ("varlen", "asked for")


@pytest.mark.parametrize(
    ("wish", "capability", "packages", "case", "reason"),
    [
        ("varlen", (9, 0), ALL, Case("cpu", torch.bfloat16), "flash kernels need CUDA"),
        ("varlen", (9, 0), ALL, Case("cuda", torch.float32), "flash kernels need bf16 or fp16"),
        ("varlen", (9, 0), (), BF16, "has no varlen_attn"),
        ("flash_attn", (9, 0), ALL[:1], BF16, "flash_attn is not installed"),
        ("documents", (9, 0), ALL, BF16, "one document after another keeps a GPU waiting"),
        ("fa3", (8, 0), ALL, BF16, "FA3 is for compute capability 9"),
        ("fa3", (9, 0), ALL[:1], BF16, "flash_attn_interface is not installed"),
        ("fa4", (9, 0), ALL, BF16, "FA4 is for compute capability 10"),
        ("fa4", (10, 0), ALL[:2], BF16, "flash_attn.cute.interface is not installed"),
        ("cudnn", (9, 0), ALL, BF16, "cannot be told to take cuDNN; 2.14 can"),
    ],
)
def test_a_kernel_that_cannot_be_had_is_an_error(machine, wish, capability, packages, case, reason):
    machine(capability, packages)
    kernels.use(wish)
    with pytest.raises(ValueError, match=f"'{wish}' was asked for") as error:
        chosen(case)
    assert reason in str(error.value)
    assert "auto" in str(error.value)


def test_cudnn_is_taken_only_where_it_is_asked_for(machine, monkeypatch):
    machine((9, 0), torch_version="2.15.0")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91900)
    kernel, why = chosen(BF16)
    assert kernel == "varlen"
    assert "not cuDNN" in why
    kernels.use("cudnn")
    assert chosen(BF16)[0] == "cudnn"
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91700)
    kernels.use("cudnn")
    with pytest.raises(ValueError, match=r"cuDNN 9\.18 is needed; got 91700"):
        chosen(BF16)
    machine((8, 0), torch_version="2.15.0")
    kernels.use("cudnn")
    with pytest.raises(ValueError, match="compute capability 9 and 10"):
        chosen(BF16)


@pytest.mark.parametrize(
    ("version", "honours"),
    [("2.10.0", False), ("2.13.0+cpu", False), ("2.14.0.dev20260901", True), ("3.0", True)],
)
def test_from_which_torch_on_the_backend_can_be_pinned(monkeypatch, version, honours):
    monkeypatch.setattr(torch, "__version__", version)
    assert kernels.honours_sdpa_kernel() == honours


def test_a_name_that_is_none_is_an_error():
    with pytest.raises(ValueError, match="expected attention as one of auto, fa3"):
        kernels.use("flash")
    assert options.ATTENTION == kernels.NAMES


def test_the_choice_is_described_with_its_reason():
    line = kernels.describe("cpu", torch.float32)
    assert line.startswith("attention: sdpa on cpu in float32 (flash kernels need CUDA")
    assert "decoding: sdpa over the cache" in line
    assert "products on cpu in bfloat16" in kernels.describe("cpu", torch.bfloat16, 256, 64)
    assert "sdpa over the cache on cpu in float32" in kernels.describe_decoding(
        "cpu", torch.float32
    )


def test_training_takes_and_tells_the_kernel(stores, tmp_path, capsys):
    size = ["--model.layers", "1", "--model.width", "32", "--model.head-dim", "16", "--rows", "2"]
    command = ["train", "quickstart", "--data", f"arm={stores}/arm", "--steps", "1", *size]
    command += ["--text-pieces", "300", "--model.ffn-width", "64", "--out", str(tmp_path / "run")]
    try:
        assert cli.main([*command, "--attention", "sdpa"]) == cli.DONE
        told = capsys.readouterr().err
        assert told.count("attention: ") == 1
        assert "attention: sdpa on cpu in bfloat16 (asked for)" in told
        assert cli.main([*command, "--no-resume", "--attention", "fa3"]) == cli.BAD_INPUT
        told = capsys.readouterr().err
        assert "'fa3' was asked for on cpu in bfloat16: flash kernels need CUDA" in told
        assert not list(tmp_path.glob("run-*")), "nothing is set aside for a run that cannot be"
        assert cli.main([*command, "--attention", "flush"]) == cli.BAD_INPUT
        assert "invalid choice: 'flush'" in capsys.readouterr().err
    finally:
        kernels.use("auto")
