"""What this machine's processor is quick at, as far as defaults depend on it. No torch, so that plans are quick.

By its kind and not by a measurement: a run that goes on with a saved context must choose as the run before it did.
"""

from __future__ import annotations

import functools
import os
import platform
from pathlib import Path

from l4ctx.machine.memory import SPARE_SHARE

CPUINFO = Path("/proc/cpuinfo")
WITHOUT_BFLOAT16 = frozenset({"SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI"})
WITHOUT_AMX = frozenset({"AVX512_CORE_BF16", "AVX512_CORE_FP16", "AVX10_1_512", "AVX10_2_512"})
"""What ONEDNN_MAX_CPU_ISA can be set to, but for what leaves everything in."""

SPINS = "3000"
"""Turns of a loop in which OpenMP's threads wait for one another before they sleep."""


def share_cores() -> None:
    """Lets torch's threads sleep early where another process may need their core; to be called before torch is loaded.

    By default they wait in loops of milliseconds at each of thousands of barriers a second: with one core of two busy,
    reading and decoding were 1.3 times slower than so. On idle cores decoding loses 3 %. A user's own setting stands.
    """
    if not os.environ.keys() & {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}:
        os.environ["GOMP_SPINCOUNT"] = SPINS


def without_sharing() -> dict[str, str]:
    """The environment as the user has it, for other programs than this one."""
    return {name: value for name, value in os.environ.items() if (name, value) != ("GOMP_SPINCOUNT", SPINS)}


@functools.cache
def processor_flags(cpuinfo: Path = CPUINFO) -> frozenset[str]:
    """The instruction sets that Linux lists for the first processor; empty on other systems."""
    return frozenset(_field(cpuinfo, "flags").split())


def processor_name(cpuinfo: Path = CPUINFO) -> str:
    """As the system names it."""
    return _field(cpuinfo, "model name") or platform.processor() or platform.machine() or os.name


def _field(cpuinfo: Path, name: str) -> str:
    """The first of that name; empty where there is none."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(name)), "")


def newest_instructions() -> str:
    """That oneDNN, which computes products of 16-bit numbers, is allowed to use; empty: all that there are.

    ATEN_CPU_CAPABILITY is for torch's own kernels and changes nothing in these products.
    """
    return (os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or "").upper()


def bfloat16_units() -> frozenset[str]:
    """Those of "avx512_bf16" and "amx_bf16" that products make use of here."""
    units, newest = frozenset({"avx512_bf16", "amx_bf16"}) & processor_flags(), newest_instructions()
    if newest in WITHOUT_BFLOAT16:
        return frozenset()
    return units - {"amx_bf16"} if newest in WITHOUT_AMX else units


def has_fast_bfloat16() -> bool:
    """Whether bfloat16 products are quicker than float32 ones; without such instructions they take twice as long, or
    much longer."""
    return bool(bfloat16_units())


def default_attention(dtype: str, *, on_accelerator: bool) -> str:
    """The attention backend that is the quickest for this dtype, of those in model/kernels/registry.py.

    With AVX512_BF16 alone the fused kernels make no use of it: products are 1.5 to 1.8 times as fast. With AMX, which
    has not been measured, they do.
    """
    if not on_accelerator and dtype == "bfloat16" and bfloat16_units() == {"avx512_bf16"}:
        return "matmul"
    return "sdpa"


def computing_dtype(asked: str, stored: str, parameters: int, *, on_accelerator: bool, available: int | None) -> str:
    """What "auto" means: the checkpoint's own dtype, but float32 on a CPU whose products of 16-bit numbers are slower,
    if the memory is there."""
    if asked != "auto":
        return asked
    if on_accelerator or (stored == "bfloat16" and has_fast_bfloat16()):
        return stored
    return "float32" if available is None or 4 * parameters < SPARE_SHARE * available else stored
