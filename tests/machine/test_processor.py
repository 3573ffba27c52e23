"""What depends on the processor: read from the system, and the attention that is chosen by it."""

from __future__ import annotations

from pathlib import Path

import pytest

from l4ctx.machine import processor
from model.config import BACKEND_NAMES

CPUINFO = """processor\t: 0
model name\t: Some CPU
flags\t\t: fpu sse avx2 avx512_bf16

processor\t: 1
flags\t\t: fpu
"""


processor_flags = processor.processor_flags  # before tests/conftest.py replaces them
newest_instructions = processor.newest_instructions


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (CPUINFO, {"fpu", "sse", "avx2", "avx512_bf16"}),
        ("", set()),
        ("Features\t: bf16\n", set()),
        ("flags :\n", set()),
        (None, set()),
    ],
)
def test_flags(text: str | None, expected: set[str], tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    if text is not None:
        cpuinfo.write_text(text)
    assert processor_flags(cpuinfo) == expected


@pytest.mark.parametrize(
    ("flags", "dtype", "on_accelerator", "expected"),
    [
        ({"avx512_bf16"}, "bfloat16", False, "matmul"),
        ({"avx512_bf16"}, "float32", False, "sdpa"),
        ({"avx512_bf16"}, "float16", False, "sdpa"),
        ({"avx512_bf16"}, "bfloat16", True, "sdpa"),
        ({"avx512_bf16", "amx_bf16"}, "bfloat16", False, "sdpa"),
        (set(), "bfloat16", False, "sdpa"),
    ],
)
def test_default_attention(
    flags: set[str], dtype: str, on_accelerator: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processor, "processor_flags", lambda: frozenset(flags))
    assert processor.default_attention(dtype, on_accelerator=on_accelerator) == expected
    assert expected in BACKEND_NAMES


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, ["avx512_bf16", "amx_bf16"]),
        ({"ONEDNN_MAX_CPU_ISA": "ALL"}, ["avx512_bf16", "amx_bf16"]),
        ({"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_AMX"}, ["avx512_bf16", "amx_bf16"]),
        ({"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}, ["avx512_bf16"]),
        ({"ONEDNN_MAX_CPU_ISA": "avx2"}, []),
        ({"DNNL_MAX_CPU_ISA": "AVX512_CORE"}, []),
        ({"ONEDNN_MAX_CPU_ISA": "", "DNNL_MAX_CPU_ISA": "SSE41"}, []),
        ({"ATEN_CPU_CAPABILITY": "avx2"}, ["avx512_bf16", "amx_bf16"]),
    ],
)
def test_instructions_that_onednn_must_not_use(
    variables: dict[str, str], expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(processor, "processor_flags", lambda: frozenset({"avx2", "avx512_bf16", "amx_bf16"}))
    monkeypatch.setattr(processor, "newest_instructions", newest_instructions)
    assert processor.bfloat16_units() == set(expected) and processor.has_fast_bfloat16() == bool(expected)
    assert processor.default_attention("bfloat16", on_accelerator=False) == (
        "matmul" if expected == ["avx512_bf16"] else "sdpa"
    )


@pytest.mark.parametrize(
    ("flags", "vendor", "expected"),
    [
        ({"avx512_bf16"}, "AuthenticAMD", True),
        ({"avx512_bf16"}, "GenuineIntel", False),
        ({"avx512_bf16", "amx_bf16"}, "GenuineIntel", True),
        ({"avx2"}, "AuthenticAMD", False),
    ],
)
def test_where_bfloat16_products_are_faster(
    flags: set[str], vendor: str, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processor, "processor_flags", lambda: frozenset(flags))
    monkeypatch.setattr(processor, "processor_vendor", lambda: vendor)
    assert processor.has_fast_bfloat16() == expected
