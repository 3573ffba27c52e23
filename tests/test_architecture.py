"""Imports only go down, and what must import quickly stays free of torch. Reads the sources; executes nothing."""

from __future__ import annotations

import ast
import functools
import graphlib
import tomllib
from pathlib import Path

import pytest

from support.places import ROOT

PACKAGES = (  # from the top down: each may import only those in rows below
    {"l4ctx.__main__"},
    {"l4ctx.cli"},
    {"l4ctx.evaluation"},
    {"l4ctx.run", "l4ctx.bench", "l4ctx.conversion"},
    {"l4ctx.engine", "l4ctx.prompt", "l4ctx.inspection"},
    {"l4ctx.vision"},
    {"l4ctx.documents", "l4ctx.planning"},
    {"l4ctx.contexts"},
    {"l4ctx.checkpoint", "l4ctx.drafts", "l4ctx.history", "cache"},
    {"l4ctx.confinement"},
    {"l4ctx.machine"},
    {"l4ctx.errors", "l4ctx.formatting", "l4ctx.spans"},
    {"model", "l4ctx"},
)
ALONE = {"l4ctx", "l4ctx.__main__", "l4ctx.errors", "l4ctx.formatting", "l4ctx.spans"}  # not in a subpackage
MODEL_LAYERS = (  # from the bottom up: each module may import only those in rows above
    {
        "errors",
        "folder",
        "kernels",
        "kernels.watch",
        "vision",
        "spread",
        "transfers",
        "gpu",
        "gpu.forms",
        "gpu.kernels",
        "gpu.probe",
        "gpu.merging",
        "weights",
        "weights.expert_parts",
        "weights.read_ahead",
        "weights.transport",
        "quantization",
        "quantization.choice",
        "quantization.rounding",
        "simd",
        "simd.words",
    },
    {"bounds", "weights.owners", "gpu.available", "gpu.expand_kernel"},
    {"gpu.expanding"},
    {"weights.pages", "weights.residency"},
    {"quantization.gguf_types", "quantization.gguf_simple", "quantization.gguf_library"},
    {"quantization.gguf_k", "simd.layouts"},
    {"simd.vectors"},
    {"simd.decoders"},
    {"simd.gguf", "simd.functions", "simd.attention_form"},
    {"simd.operations", "simd.attention_states"},
    {"simd.attention_blocks"},
    {"simd.attention_integers"},
    {"simd.attention"},
    {"simd.engine"},
    {"simd.products", "simd.program"},
    {"simd.recorder", "simd.attending"},
    {"quantization.pieces"},
    {"quantization.form", "quantization.tables"},
    {"quantization.plain", "quantization.scaled", "weights.sources"},
    {"quantization.gguf_blocks", "quantization.affine", "quantization.float8", "quantization.float4"},
    {"quantization.mlx_affine", "quantization.table4", "quantization.int8_rows"},
    {"layers", "grouped", "gpu.layer_forms"},
    {"gguf", "gguf.header"},
    {"gguf.files", "gguf.names"},
    {"gguf.config", "gguf.tokenizer", "gguf.vision"},
    {"checkpoint_files"},
    {"config"},
    {"costs", "rope", "kernels.masks", "moe", "gpu.support", "vision.config", "division", "context_division"},
    {"kernels.attend", "vision.tower", "gpu.layers"},
    {"kernels.eager", "kernels.sdpa", "kernels.flex"},
    {"kernels.matmul", "kernels.cudnn"},
    {"kernels.registry"},
    {"attention"},
    {"programs", "gpu.steps"},
    {"transformer", "context_attention"},
    {"context_parallel"},
    {"parallel"},
    {"weights.plain", "weights.mapping", "weights.gguf", "weights.checks", "weights.settings"},
    {"weights.companions", "weights.targets", "weights.census", "weights.quantizing", "weights.tiers"},
    {"weights.compressed_tensors", "weights.fbgemm", "weights.mlx", "weights.bitsandbytes", "weights.refused"},
    {"weights.modelopt"},
    {"weights.shards", "weights.formats", "weights.cutting"},
    {"weights.loading", "weights.streaming", "weights.device_stream"},
)
CACHE_LAYERS = (
    {"errors", "layout", "grid"},
    {"residency", "blocks", "disk"},
    {"packing"},
    {"sealed", "heads", "pinned"},
    {"ring"},
    {"tiers"},
    {"offloaded", "chunked"},
    {"hybrid", "dealt"},
    {"fork"},
    {"context"},
)
ROWS = {"model": MODEL_LAYERS, "cache": CACHE_LAYERS}
WITHOUT_TORCH = (
    "model.errors",
    "model.folder",
    "model.weights.owners",
    "model.gguf.config",
    "model.gguf.tokenizer",
    "model.checkpoint_files",
    "cache.errors",
    "l4ctx.errors",
    "model.config",
    "model.costs",
    "model.division",
    "model.context_division",
    "model.vision.config",
    "model.weights.residency",
    "model.weights.settings",
    "model.quantization.gguf_types",
    "cache.layout",
    "cache.residency",
    "l4ctx.planning.workload",
    "l4ctx.history.answers",
    "l4ctx.history.seen",
    "l4ctx.inspection.saved_contexts",
    "l4ctx.contexts.removing",
    "l4ctx.contexts.journal",
    "l4ctx.contexts.manifest",
    "l4ctx.machine.memory",
    "l4ctx.drafts.drafter",
    "l4ctx.inspection.model_folder",
    "l4ctx.checkpoint.template_work",
    "l4ctx.confinement.child",
    "l4ctx.confinement.process",
    "l4ctx.documents.pdf",
    "l4ctx.documents.pdf_process",
    "l4ctx.documents.pdf_worker",
    "l4ctx.documents.images",
    "l4ctx.documents.reader",
    "l4ctx.documents.added",
    "l4ctx.planning.memory_plan",
    "l4ctx.planning.fitting",
    "l4ctx.planning.remedies",
    "l4ctx.planning.cost_model",
    "l4ctx.planning.mesh_time",
    "l4ctx.planning.batch",
    "l4ctx.run.request",
    "l4ctx.evaluation.picture",
    "l4ctx.evaluation.positions",
    "l4ctx.run.questions",
    "l4ctx.run.answers_file",
    "l4ctx.contexts.states",
    "l4ctx.bench.jobs",
    "l4ctx.bench.process",
    "l4ctx.bench.peers.llama_cpp",
    "l4ctx.bench.report",
    "l4ctx.bench.roofline",
)


def modules() -> dict[str, Path]:
    """All modules of the three packages, by dotted name."""
    files = {
        file.relative_to(ROOT).with_suffix(""): file
        for package in ("model", "cache", "l4ctx")
        for file in (ROOT / package).rglob("*.py")
    }
    return {".".join(name.parts).removesuffix(".__init__"): file for name, file in files.items()}


MODULES = modules()


@functools.cache
def imports(module: str) -> frozenset[str]:
    """Everything a module imports, also in functions and under TYPE_CHECKING; relative imports made absolute."""
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
    return frozenset(found)


def top(module: str) -> str:
    return module.split(".")[0]


def package(module: str) -> str:
    """The module's package as PACKAGES names it: model, cache, or one in l4ctx."""
    return ".".join(module.split(".")[:2]) if top(module) == "l4ctx" else top(module)


def level(module: str) -> int:
    """The level of the module's package, from the top down."""
    return next(number for number, names in enumerate(PACKAGES) if package(module) in names)


def row(module: str) -> int:
    """The module's row within its package, from the bottom up."""
    rows = [number for number, names in enumerate(ROWS[top(module)]) if module.split(".", 1)[1] in names]
    assert rows, f"{module} has no place in {top(module).upper()}_LAYERS: give it one"
    return rows[0]


def test_the_sources_are_found() -> None:
    assert {"model", "model.config", "model.transformer", "model.weights.loading", *WITHOUT_TORCH} <= MODULES.keys()
    placed = {f"{package}.{name}" for package, rows in ROWS.items() for names in rows for name in names}
    assert placed == {name for name in MODULES if name.startswith(("model.", "cache."))}
    assert sorted(name for names in PACKAGES for name in names) == sorted({package(name) for name in MODULES})
    assert {
        name
        for name in MODULES
        if name == package(name) and top(name) == "l4ctx" and not any(other.startswith(f"{name}.") for other in MODULES)
    } | {"l4ctx"} == ALONE
    assert "model.attention" in imports("model.transformer") and "torch" in imports("model.transformer")


@pytest.mark.parametrize("module", MODULES)
def test_packages_import_downwards(module: str) -> None:
    wrong = {
        name
        for name in imports(module)
        if top(name) in {"tests", "support", "samples"}
        or (name in MODULES and package(name) != package(module) and level(name) <= level(module))
    }
    assert not wrong, f"{module} imports {', '.join(sorted(wrong))}"


def test_no_module_imports_itself_by_way_of_others() -> None:
    """Also within packages and under TYPE_CHECKING. A package's own `__init__` holds only a docstring."""
    graph = {name: {other for other in imports(name) if other in MODULES} for name in MODULES}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


@pytest.mark.parametrize("module", [name for name in MODULES if MODULES[name].name == "__init__.py"])
def test_packages_hold_a_docstring_only(module: str) -> None:
    """Every import of a module would also import what its package re-exports: torch, for plans."""
    body = ast.parse(MODULES[module].read_text(encoding="utf-8")).body
    assert [type(node) for node in body] == [ast.Expr]


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith(("model.", "cache."))])
def test_modules_of_a_package_import_downwards(module: str) -> None:
    wrong = {name for name in imports(module) if name.startswith(f"{top(module)}.") and row(name) >= row(module)}
    assert not wrong, f"{module} imports {', '.join(sorted(wrong))}"


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_plans_import_no_torch(module: str) -> None:
    """Neither does anything that they import, including the `__init__` of packages."""
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
    """They are optional: nothing else may need them, but for block types that only the package gguf expands."""
    assert {
        module for module in MODULES if {"transformers", "gguf", "numpy"} & {top(name) for name in imports(module)}
    } == {
        "l4ctx.bench.peers.transformers",
        "l4ctx.bench.worker",
        "l4ctx.bench.peers.gguf",
        "model.quantization.gguf_library",
    }


def test_every_package_is_installed() -> None:
    """An editable installation also finds packages missing from pyproject.toml; a normal one does not."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert sorted(listed) == sorted(
        {module if MODULES[module].name == "__init__.py" else module.rpartition(".")[0] for module in MODULES}
    )
