"""Defaults that depend on what the processor is fast at. Imports no torch, so that planning is fast.

They follow from the processor's model, not from a measurement: a run that resumes a saved context must choose the same
as the run before it.
"""

from __future__ import annotations

import functools
import os
import platform
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
WITHOUT_BFLOAT16 = frozenset({"SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI"})
WITHOUT_AMX = frozenset({"AVX512_CORE_BF16", "AVX512_CORE_FP16", "AVX10_1_512", "AVX10_2_512"})
"""Values of ONEDNN_MAX_CPU_ISA that exclude bfloat16 or AMX instructions."""

SPINS = "3000"
"""Iterations that OpenMP's threads spin while waiting for one another before they sleep."""

NUMPY_THREADS = ("OPENBLAS_NUM_THREADS", "1")


def share_cores() -> None:
    """Makes torch's threads sleep early, so that other processes can use their cores. Call it before importing torch.

    By default they spin for milliseconds at each of thousands of barriers a second: with one core of two busy, prefill
    and decode were 1.3 times slower than with this. On idle cores decode loses 3 %. A user's own setting wins.

    NumPy, which torch imports where it is installed, and whose products nothing here uses, gets one thread: each takes
    address space, and complains where it cannot be started.
    """
    if not os.environ.keys() & {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}:
        os.environ["GOMP_SPINCOUNT"] = SPINS
    os.environ.setdefault(*NUMPY_THREADS)


def without_sharing() -> dict[str, str]:
    """The user's original environment, for running other programs."""
    return {item[0]: item[1] for item in os.environ.items() if item not in (("GOMP_SPINCOUNT", SPINS), NUMPY_THREADS)}


@functools.cache
def processor_flags(cpuinfo: Path = CPUINFO) -> frozenset[str]:
    """CPU flags that Linux lists for the first processor; empty on other systems."""
    return frozenset(_field(cpuinfo, "flags").split())


def processor_name(cpuinfo: Path = CPUINFO) -> str:
    """The processor's name, from the system."""
    return _field(cpuinfo, "model name") or platform.processor() or platform.machine() or os.name


def processor_vendor(cpuinfo: Path = CPUINFO) -> str:
    """What the processor says of its maker, such as "GenuineIntel"; empty where Linux does not list it."""
    return _field(cpuinfo, "vendor_id")


def _field(cpuinfo: Path, name: str) -> str:
    """The first field called `name`; empty if there is none."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(name)), "")


def newest_instructions() -> str:
    """The newest instruction set that oneDNN, which computes 16-bit products, may use; empty means no limit.

    ATEN_CPU_CAPABILITY limits torch's own kernels and does not affect these products.
    """
    return (os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or "").upper()


def bfloat16_units() -> frozenset[str]:
    """Those of "avx512_bf16" and "amx_bf16" that products use on this machine."""
    units, newest = frozenset({"avx512_bf16", "amx_bf16"}) & processor_flags(), newest_instructions()
    if newest in WITHOUT_BFLOAT16:
        return frozenset()
    return units - {"amx_bf16"} if newest in WITHOUT_AMX else units


def has_fast_bfloat16() -> bool:
    """Whether bfloat16 products are faster than float32 ones.

    With AVX512_BF16 alone they are 2.2 times as fast on AMD's processors and half as fast on Intel's, which compute
    twice as many float32 products at a time. Without either unit they are many times slower.
    """
    units = bfloat16_units()
    return "amx_bf16" in units or (bool(units) and processor_vendor() != "GenuineIntel")


def assumed_operations() -> float:
    """Floating-point operations a second in large matrix products, of all cores that this process may use.

    Rates a core, measured on one or two processors of each kind and rounded down; plans with --measure do better.
    """
    flags = processor_flags()
    rate = 60e9 if not flags or "avx2" in flags else 20e9
    if "avx512f" in flags:
        rate = 120e9
    if "amx_bf16" in bfloat16_units():
        rate = 500e9
    return rate * usable_cores()


def usable_cores() -> int:
    """Those that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1


def default_attention(dtype: str, *, on_accelerator: bool) -> str:
    """The fastest attention backend for this dtype, one of model.config.BACKEND_NAMES.

    With AVX512_BF16 alone, the fused kernels do not use it, and plain products are 1.5 to 1.8 times as fast. With AMX,
    which has not been measured, they do.
    """
    if not on_accelerator and dtype == "bfloat16" and bfloat16_units() == {"avx512_bf16"}:
        return "matmul"
    return "sdpa"


def computing_dtype(asked: str, stored: str, *, on_accelerator: bool) -> str:
    """Resolves "auto" to what this processor multiplies quickly, whatever the checkpoint's size.

    Weights keep their stored form: computing in float32 does not enlarge them.
    """
    if asked != "auto":
        return asked
    if on_accelerator or (stored == "bfloat16" and has_fast_bfloat16()):
        return stored
    return "float32"
