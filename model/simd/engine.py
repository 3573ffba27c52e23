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
from model.simd.attention import emit_attention, emit_preparation
from model.simd.attention_form import AttentionForm
from model.simd.functions import emit_expansion, emit_product
from model.simd.layouts import Layout
from model.simd.operations import emit_entry
from model.simd.words import LINE, WORD


class OpenMP:
    """The threads that PyTorch's own kernels run on, so that there is one set of them.

    Raises AttributeError or OSError where a process has no library of GNU's interface: on macOS and Windows.
    """

    def __init__(self) -> None:
        library = ctypes.CDLL(None)
        self.run = library.GOMP_parallel
        self.run.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        self.run.restype = None
        self.barrier = ctypes.cast(library.GOMP_barrier, ctypes.c_void_p).value or 0


def find_openmp() -> OpenMP | None:
    try:
        return OpenMP()
    except (AttributeError, OSError, TypeError):
        return None


class Engine:
    """Machine code of functions, each made when it is first wanted, in some hundredths of a second."""

    def __init__(self) -> None:
        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        self.openmp = find_openmp()
        self.pool: ThreadPoolExecutor | None = None
        self.has_wide_registers = torch.backends.cpu.get_cpu_capability() == "AVX512"
        self.integers = self._integers()
        target = self._target()
        self.target = self._target()
        self.compiler = llvm.create_mcjit_compiler(llvm.parse_assembly(""), target)  # which owns its target
        self.count = 0
        self.entry = self._compiled(emit_entry)

    def product(self, layout: Layout) -> int:
        """Address of the function that multiplies; see `emit_product`."""
        most_rows, accumulators = (8, 2) if self.has_wide_registers else (4, 1)
        return self.function(emit_product, layout, most_rows, accumulators)

    def expansion(self, layout: Layout, dtype: str) -> int:
        """Address of the function that writes rows in `dtype`."""
        return self.function(emit_expansion, layout, dtype)

    def attention(self, form: AttentionForm) -> tuple[Callable[[int], None], Callable[[int], None]]:
        """What prepares arguments, given their address, and what then attends."""
        prepare = ctypes.CFUNCTYPE(None, ctypes.c_int64)(self.function(emit_preparation, form))
        return prepare, functools.partial(self._run_everywhere, self.function(emit_attention, form))

    @functools.cache  # noqa: B019  # there is one engine
    def function(self, emit: Callable[..., None], *what: Any) -> int:
        """Address of what `emit` makes of these arguments."""
        return self._compiled(emit, *what, platform.machine())

    def run(self, operations: int, count: int, counters: int, rows: int, stages: Sequence[int]) -> None:
        """Runs so many operations, whose words are at an address, with this number of rows of input.

        Counters, of as many LINEs, are at another address. Stages are the numbers of operations that wait.
        """
        threads = torch.get_num_threads()
        ctypes.memset(counters, 0, count * LINE)
        if self.openmp is not None:
            task = (ctypes.c_int64 * 6)(operations, count, rows, threads, self.openmp.barrier, counters)
            self.openmp.run(self.entry, ctypes.addressof(task), threads, 0)
            return
        if self.pool is None:
            self.pool = ThreadPoolExecutor(threads)
        function = ctypes.CFUNCTYPE(None, ctypes.c_int64)(self.entry)
        starts = [0, *(number for number in stages if number)]
        for start, stop in zip(starts, [*starts[1:], count], strict=True):
            at = (LINE * start + first for first in (operations, counters))
            task = (ctypes.c_int64 * 6)(next(at), stop - start, rows, threads, 0, next(at))
            list(self.pool.map(function, [ctypes.addressof(task)] * threads))

    def run_alone(self, operation: Sequence[int], arguments: Sequence[int], rows: int = 1) -> None:
        """Runs one operation: its words but for the address of its arguments, and these."""
        memory = (ctypes.c_int64 * (2 * LINE // WORD + len(arguments)))()
        start = ctypes.addressof(memory)
        words: list[Any] = [operation[0], start + 2 * LINE, *operation[1:]]
        memory[: len(words)] = words
        memory[2 * LINE // WORD :] = list(arguments)
        self.run(start, 1, start + LINE, rows, ())

    def _run_everywhere(self, function: int, argument: int) -> None:
        """Calls it once on each thread."""
        threads = torch.get_num_threads()
        if self.openmp is not None:
            self.openmp.run(function, argument, threads, 0)
            return
        if self.pool is None:
            self.pool = ThreadPoolExecutor(threads)
        list(self.pool.map(ctypes.CFUNCTYPE(None, ctypes.c_int64)(function), [argument] * threads))

    def _compiled(self, emit: Callable[..., None], *what: Any) -> int:
        self.count += 1
        name = f"work_{self.count}"
        module = ir.Module(name)
        module.triple = self.target.triple
        emit(module, name, *what)
        compiled = llvm.parse_assembly(str(module))
        builder = llvm.create_pass_builder(self.target, llvm.create_pipeline_tuning_options(speed_level=2))
        builder.getModulePassManager().run(compiled, builder)
        self.compiler.add_module(compiled)
        self.compiler.finalize_object()
        return int(self.compiler.get_function_address(name))

    @staticmethod
    def _integers() -> str:
        """Which instructions multiply 16-bit integers and add pairs of products, as `AttentionForm` names them."""
        if platform.machine() not in ("x86_64", "AMD64"):
            return ""
        features, capability = llvm.get_host_cpu_features(), torch.backends.cpu.get_cpu_capability()
        has_vnni = features.get("avx512vnni", False) and features.get("avx512vl", False)
        if capability == "AVX512":
            return "vnni" if has_vnni else "madd"
        return "madd" if capability == "AVX2" else ""

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
