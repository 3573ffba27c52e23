"""Compiles vector code for this processor and runs it on PyTorch's threads. Needs the package llvmlite."""

from __future__ import annotations

import ctypes
import functools
import platform
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import llvmlite.binding as llvm
import torch
from llvmlite import ir

from model.simd import gguf as _gguf  # noqa: F401  # registers how blocks are decoded
from model.simd.functions import emit_entry, emit_expansion, emit_product
from model.simd.layouts import LANES, Layout

Function = Callable[[Sequence[int], int, int], None]
"""Called with the arguments that `model.simd.functions` names, and the first and last row."""


class OpenMP:
    """The functions of the library that PyTorch's own threads come from, so that there is one set of threads."""

    def __init__(self) -> None:
        library = ctypes.CDLL(None)
        self.run = library.GOMP_parallel
        self.run.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        self.run.restype = None
        self.thread, self.threads = (
            ctypes.cast(function, ctypes.c_void_p).value or 0
            for function in (library.omp_get_thread_num, library.omp_get_num_threads)
        )


def find_openmp() -> OpenMP | None:
    """None where a process has no library of GNU's interface: on macOS and Windows."""
    try:
        return OpenMP()
    except (AttributeError, OSError, TypeError):
        return None


class Engine:
    """Machine code of functions, each made when it is first wanted, in some tenths of a second."""

    def __init__(self) -> None:
        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        self.openmp = find_openmp()
        self.pool: ThreadPoolExecutor | None = None
        self.has_wide_registers = torch.backends.cpu.get_cpu_capability() == "AVX512"
        target = self._target()
        self.target = self._target()
        self.compiler = llvm.create_mcjit_compiler(llvm.parse_assembly(""), target)  # which owns its target
        self.count = 0

    @functools.cache  # noqa: B019  # there is one engine
    def product(self, layout: Layout, rows: int) -> Function:
        """A product with so many rows, float32."""
        accumulators = 16 if self.has_wide_registers else 4
        return self._function(emit_product, layout, rows, accumulators)

    @functools.cache  # noqa: B019
    def expansion(self, layout: Layout, dtype: str) -> Function:
        """Writes rows in `dtype`."""
        return self._function(emit_expansion, layout, dtype)

    def _function(self, emit: Callable[..., None], *what: Any) -> Function:
        self.count += 1
        name = f"work_{self.count}"
        module = ir.Module(name)
        module.triple = self.target.triple
        emit(module, name, *what, platform.machine())
        if self.openmp is not None:
            emit_entry(module, f"{name}_entry", name, self.openmp.thread, self.openmp.threads)
        compiled = llvm.parse_assembly(str(module))
        builder = llvm.create_pass_builder(self.target, llvm.create_pipeline_tuning_options(speed_level=2))
        builder.getModulePassManager().run(compiled, builder)
        self.compiler.add_module(compiled)
        self.compiler.finalize_object()
        if self.openmp is not None:
            return functools.partial(_on_openmp, self.openmp, self.compiler.get_function_address(f"{name}_entry"))
        kind = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 3)
        return functools.partial(self._on_pool, kind(self.compiler.get_function_address(name)))

    def _on_pool(self, work: Callable[..., None], arguments: Sequence[int], first: int, last: int) -> None:
        """Without OpenMP, on threads of our own."""
        threads = torch.get_num_threads()
        if self.pool is None:
            self.pool = ThreadPoolExecutor(threads)
        kept = (ctypes.c_int64 * len(arguments))(*arguments)
        share = -(-(last - first) // (threads * LANES)) * LANES
        parts = [(start, min(start + share, last)) for start in range(first, last, share)]
        list(self.pool.map(lambda part: work(ctypes.addressof(kept), *part), parts))

    @staticmethod
    def _target() -> Any:
        """The machine that PyTorch's own kernels are chosen for, which may be told to do without AVX-512."""
        capability = torch.backends.cpu.get_cpu_capability()
        is_old = capability == "AVX2" and llvm.get_host_cpu_features().get("avx512f", False)
        target = llvm.Target.from_default_triple()
        if is_old:
            return target.create_target_machine(cpu="haswell", opt=2, jit=True)
        features = llvm.get_host_cpu_features().flatten()
        return target.create_target_machine(cpu=llvm.get_host_cpu_name(), features=features, opt=2, jit=True)


def _on_openmp(openmp: OpenMP, entry: int, arguments: Sequence[int], first: int, last: int) -> None:
    kept = (ctypes.c_int64 * len(arguments))(*arguments)
    work = (ctypes.c_int64 * 3)(ctypes.addressof(kept), first, last)
    openmp.run(entry, ctypes.addressof(work), torch.get_num_threads(), 0)


@functools.cache
def engine() -> Engine:
    """The process's engine."""
    return Engine()
