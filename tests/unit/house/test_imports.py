"""The house: imports point one way, names stay where they belong, extras stay optional."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from gato.envs.registry import SUITES
from gato.tokenizers.modality import modality_classes

ROOT = Path(__file__).parents[3]
FOLDERS = ("tokenizers", "envs", "gato", "rollouts")
DOORS = {
    *("gato", "gato.cli", "gato.commands", "gato.world_commands", "gato.printing"),
    *("gato.run_commands", "gato.export_commands"),
    "gato.preparation",
    *(
        "gato.expert_commands",
        "gato.evaluation_commands",
        "gato.terminal",
        "gato.language_commands",
        "gato.show",
    ),
    *("gato.quickstart", "gato.examples", "gato.report", "gato.presets", "gato.bench"),
    *("gato.bench_common", "gato.bench_serializer", "gato.bench_train", "gato.bench_rollout"),
    *("gato.bench_data", "gato.bench_collect", "gato.bench_machine", "gato.bench_suites"),
    *("gato.bench_records", "gato.bench_commands", "gato.bench_attention", "gato.bench_latency"),
    "gato.bench_serve",
    "gato.search_commands",
    "gato.serve_commands",
    *("gato.data_commands", "gato.token_estimate", "gato.bench_peer"),
}
"""What a person calls: it may import anything, and nothing below may import it."""
STORES = {
    *("gato.envs.episode", "gato.envs.store", "gato.envs.records", "gato.envs.files"),
    "gato.envs.workers",
    *("gato.envs.remote", "gato.envs.mirror"),
}
"""What of the worlds the trunk may import: data on disk, how it is written, worker processes."""


def module_name(path: Path) -> str:
    """Return the import name of a source file."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    name = ".".join(parts if parts[0] == "gato" else ("gato", *parts))
    return name.removesuffix(".__init__")


def sources() -> list[Path]:
    """Return every source file once, not again through the links."""
    found = []
    for folder in FOLDERS:
        files = (ROOT / folder).glob("*.py") if folder == "gato" else (ROOT / folder).rglob("*.py")
        found += sorted(files)
    return found


MODULES = {module_name(path): path for path in sources()}


def imports(tree: ast.AST) -> Iterator[str]:
    """Yield the modules that a tree imports; `from package import module` yields the module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in MODULES else str(node.module)


def may_import(name: str, other: str) -> bool:
    """Return whether an arrow from module `name` to our module `other` is allowed."""
    if name in DOORS:
        return True
    if name.startswith("gato.envs."):
        return other.startswith("gato.envs.")
    if name.startswith("gato.tokenizers."):
        return other == "gato.envs.episode" or other.startswith("gato.tokenizers.")
    if other in DOORS:
        return False
    if name.startswith("gato.rollouts."):
        return True
    return other in STORES or not other.startswith(("gato.envs.", "gato.rollouts."))


@pytest.mark.parametrize("folder", [f for f in FOLDERS if f != "gato"])
def test_the_folders_beside_gato_are_linked_and_no_packages(folder):
    # a top-level package `tokenizers` would shadow Hugging Face's wherever this folder is the root
    link = ROOT / "gato" / folder
    assert link.is_symlink()
    assert link.readlink() == Path("..") / folder
    assert not list((ROOT / folder).rglob("__init__.py"))


@pytest.mark.parametrize("name", MODULES)
def test_arrows_point_one_way(name):
    tree = ast.parse(MODULES[name].read_text())
    ours = {other for other in imports(tree) if other.split(".")[0] == "gato"}
    wrong = sorted(other for other in ours if other != name and not may_import(name, other))
    assert not wrong, f"{name} must not import {', '.join(wrong)}"


def test_the_arrows_have_no_cycle():
    graph = {n: set(imports(ast.parse(p.read_text()))) & set(MODULES) for n, p in MODULES.items()}
    graph = {n: {o for o in others if o not in DOORS} for n, others in graph.items()}
    while leaves := {n for n, others in graph.items() if not others & set(graph)}:
        graph = {n: others for n, others in graph.items() if n not in leaves}
    assert not graph, f"these import each other: {sorted(graph)}"


def core_packages() -> set[str]:
    """Return the import names of the core dependencies."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    ours = project["dependencies"]
    names = {re.split(r"[<>=!~ ;\[]", r)[0].lower() for r in ours}
    return {{"pillow": "PIL"}.get(n, n) for n in names}


@pytest.mark.parametrize("name", MODULES)
def test_only_core_packages_are_imported_at_the_top(name):
    body = ast.parse(MODULES[name].read_text()).body
    top = ast.Module([n for n in body if isinstance(n, ast.Import | ast.ImportFrom)], [])
    known = core_packages() | set(sys.stdlib_module_names) | {"gato"}
    assert {other.split(".")[0] for other in imports(top)} <= known


GENERIC = [n for n in MODULES if re.match(r"gato\.(model|train)|gato\.rollouts\.runner", n)]


@pytest.mark.parametrize("name", GENERIC)
def test_the_trunk_names_no_modality_and_no_simulator(name):
    tree = ast.parse(MODULES[name].read_text())
    strings = {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant)}
    names = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
    told = {*modality_classes(), *SUITES}
    assert not told & (strings | names)
    modules = {f"gato.tokenizers.{m}" for m in modality_classes()} | {
        f"gato.envs.{s}" for s in SUITES
    }
    assert not modules & set(imports(tree))


BLOCKED = (
    *("ale_py", "metaworld", "mujoco", "minigrid", "sklearn", "flash_attn", "scipy", "imageio"),
    *("fastapi", "starlette", "uvicorn", "prometheus_client", "openai"),
    *("pygame", "tensorboard", "wandb", "pyarrow", "datasets", "minari", "av", "aiohttp", "fsspec"),
    *("tokenizers", "transformers"),
)
WITHOUT_EXTRAS = f"""
import importlib, sys

sys.modules.update(dict.fromkeys({BLOCKED!r}))  # an import of None is an ImportError
for name in {sorted(MODULES)!r}:
    importlib.import_module(name)
from gato.cli import main
assert main(["tasks", "--json"]) == 0
codes = [main(["show", task]) for task in ("metaworld/reach-v3", "babyai/GoToLocal-v0")]
assert codes == [2, 2], codes
"""


def test_every_module_imports_without_extras():
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_EXTRAS], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    for suite in ("metaworld", "babyai"):
        assert f'pip install "gato[{suite}]"' in done.stderr


def test_listing_tasks_and_help_import_no_torch():
    code = (
        "import sys; from gato.cli import main; main(['tasks']); main([]);"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
