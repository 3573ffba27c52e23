"""What this machine's processor is quick at, as far as defaults depend on it. No torch, so that plans are quick.

By its kind and not by a measurement: a run that goes on with a saved context must choose as the run before it did.
"""

from __future__ import annotations

import functools
import os
import platform
from pathlib import Path

from l4ctx.memory import SPARE_SHARE

CPUINFO = Path("/proc/cpuinfo")
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


def has_fast_bfloat16() -> bool:
    """Whether bfloat16 products are quicker than float32 ones; without such instructions they take twice as long."""
    return bool({"avx512_bf16", "amx_bf16"} & processor_flags())


def default_attention(dtype: str, *, on_accelerator: bool) -> str:
    """The attention backend that is the quickest for this dtype, of those in model/registry.py.

    With AVX512_BF16 alone the fused kernels make no use of it: products are 1.5 to 1.8 times as fast. With AMX, which
    has not been measured, they do.
    """
    flags = processor_flags()
    if not on_accelerator and dtype == "bfloat16" and "avx512_bf16" in flags and "amx_bf16" not in flags:
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
