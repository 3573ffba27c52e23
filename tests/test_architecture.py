"""Imports run one way, and what must be quick to import stays free of torch. Read from the sources, not executed."""

from __future__ import annotations

import ast
import tomllib
from pathlib import Path

import pytest

from support.places import ROOT

PACKAGES = ("model", "cache", "l4ctx")  # each may import itself and those before it
MODEL_LAYERS = (  # each may import only from rows above its own
    {"config", "layers", "kernels", "vision", "weights", "weights.linearized", "weights.read_ahead"},
    {"costs", "rope", "kernels.masks", "moe", "vision.config"},
    {"kernels.attend", "vision.tower"},
    {"kernels.eager", "kernels.sdpa", "kernels.flex"},
    {"kernels.matmul"},
    {"kernels.registry"},
    {"attention"},
    {"transformer"},
    {"weights.shards"},
    {"weights.loading"},
)
CACHE_LAYERS = (
    {"layout", "grid"},
    {"blocks", "disk"},
    {"packing"},
    {"tiers"},
    {"offloaded", "chunked"},
    {"hybrid"},
)
ROWS = {"model": MODEL_LAYERS, "cache": CACHE_LAYERS}
WITHOUT_TORCH = (
    "model.config",
    "model.costs",
    "model.vision.config",
    "cache.layout",
    "l4ctx.planning.workload",
    "l4ctx.contexts.journal",
    "l4ctx.contexts.manifest",
    "l4ctx.machine.memory",
    "l4ctx.inspection.model_folder",
    "l4ctx.documents.pdf",
    "l4ctx.documents.pdf_process",
    "l4ctx.documents.pdf_worker",
    "l4ctx.documents.images",
    "l4ctx.planning.memory_plan",
    "l4ctx.planning.cost_model",
    "l4ctx.run.request",
    "l4ctx.contexts.states",
    "l4ctx.bench.jobs",
    "l4ctx.bench.report",
    "l4ctx.bench.roofline",
)


def modules() -> dict[str, Path]:
    """Dotted names of all modules of the three packages."""
    files = {
        file.relative_to(ROOT).with_suffix(""): file for package in PACKAGES for file in (ROOT / package).rglob("*.py")
    }
    return {".".join(name.parts).removesuffix(".__init__"): file for name, file in files.items()}


MODULES = modules()


def imports(module: str) -> set[str]:
    """Modules that a module imports anywhere in it, functions included; relative imports made absolute."""
    file = MODULES[module]
    package = module.split(".") if file.name == "__init__.py" else module.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"), str(file))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            found.add(origin)
            found |= {f"{origin}.{alias.name}" for alias in node.names if f"{origin}.{alias.name}" in MODULES}
    return found


def top(module: str) -> str:
    return module.split(".")[0]


def row(module: str) -> int:
    rows = [number for number, names in enumerate(ROWS[top(module)]) if module.split(".", 1)[1] in names]
    assert rows, f"{module} has no place in {top(module).upper()}_LAYERS: give it one"
    return rows[0]


def test_the_sources_are_found() -> None:
    assert {"model", "model.config", "model.transformer", "model.weights.loading", *WITHOUT_TORCH} <= MODULES.keys()
    placed = {f"{package}.{name}" for package, rows in ROWS.items() for names in rows for name in names}
    assert placed == {name for name in MODULES if name.startswith(("model.", "cache."))}
    assert "model.attention" in imports("model.transformer") and "torch" in imports("model.transformer")


@pytest.mark.parametrize("module", MODULES)
def test_packages_import_downwards(module: str) -> None:
    allowed = PACKAGES[: PACKAGES.index(top(module)) + 1]
    wrong = {name for name in imports(module) if top(name) in {*PACKAGES, "tests", "samples"} - set(allowed)}
    assert not wrong, f"{module} imports {', '.join(sorted(wrong))}"


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith(("model.", "cache."))])
def test_modules_of_a_package_import_downwards(module: str) -> None:
    wrong = {name for name in imports(module) if name.startswith(f"{top(module)}.") and row(name) >= row(module)}
    assert not wrong, f"{module} imports {', '.join(sorted(wrong))}"


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_plans_import_no_torch(module: str) -> None:
    """Nor does anything that they import, packages' __init__ included."""
    seen, waiting = set(), {module}
    while waiting:
        name = waiting.pop()
        seen.add(name)
        parents = {name.rsplit(".", n)[0] for n in range(1, name.count(".") + 1)}
        if name in MODULES:
            waiting |= (imports(name) | parents) - seen
    heavy = {top(name) for name in seen} & {"torch", "numpy", "safetensors", "tokenizers", "transformers"}
    assert not heavy, f"{module} leads to {', '.join(sorted(heavy))}"


@pytest.mark.parametrize("module", [name for name in MODULES if top(name) in ("model", "cache")])
def test_model_and_cache_know_no_command_line(module: str) -> None:
    assert not {top(name) for name in imports(module)} & {"typer", "rich", "click", "argparse", "tokenizers", "jinja2"}


def test_other_engines_are_imported_by_the_benchmark_alone() -> None:
    """They are optional: nothing else may need them."""
    assert {
        module for module in MODULES if {"transformers", "gguf", "numpy"} & {top(name) for name in imports(module)}
    } == {"l4ctx.bench.peers.transformers", "l4ctx.bench.worker", "l4ctx.bench.peers.gguf"}


def test_every_package_is_installed() -> None:
    """An editable installation finds those that pyproject.toml forgets; a user's does not."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert sorted(listed) == sorted(
        {module if MODULES[module].name == "__init__.py" else module.rpartition(".")[0] for module in MODULES}
    )
