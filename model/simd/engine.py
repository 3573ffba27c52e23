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

Function = Callable[[Sequence[int], int, int, int], None]
"""Called with the arguments that `model.simd.functions` names, the first and last row, and shares for each thread."""


def find_openmp() -> Callable[..., None] | None:
    """Runs a function on the threads that PyTorch's own kernels run on, so that there is one set of threads.

    None where a process has no library of GNU's interface: on macOS and Windows.
    """
    try:
        run = ctypes.CDLL(None).GOMP_parallel
    except (AttributeError, OSError, TypeError):
        return None
    run.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    run.restype = None
    return run


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
        emit_entry(module, f"{name}_entry", name)
        compiled = llvm.parse_assembly(str(module))
        builder = llvm.create_pass_builder(self.target, llvm.create_pipeline_tuning_options(speed_level=2))
        builder.getModulePassManager().run(compiled, builder)
        self.compiler.add_module(compiled)
        self.compiler.finalize_object()
        return functools.partial(self._run, self.compiler.get_function_address(f"{name}_entry"))

    def _run(self, entry: int, arguments: Sequence[int], first: int, last: int, shares: int) -> None:
        threads = torch.get_num_threads()
        share = -(-(last - first) // (threads * shares * LANES)) * LANES
        kept = (ctypes.c_int64 * len(arguments))(*arguments)
        task = (ctypes.c_int64 * 4)(ctypes.addressof(kept), last, share, first)
        if self.openmp is not None:
            self.openmp(entry, ctypes.addressof(task), threads, 0)
            return
        if self.pool is None:
            self.pool = ThreadPoolExecutor(threads)
        function = ctypes.CFUNCTYPE(None, ctypes.c_int64)(entry)
        list(self.pool.map(function, [ctypes.addressof(task)] * threads))

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


@functools.cache
def engine() -> Engine:
    """The process's engine."""
    return Engine()
