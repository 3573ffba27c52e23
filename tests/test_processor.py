"""What depends on the processor: read from the system, and the attention that is chosen by it."""

from __future__ import annotations

from pathlib import Path

import pytest

from l4ctx import processor
from model.config import BACKEND_NAMES

CPUINFO = """processor\t: 0
model name\t: Some CPU
flags\t\t: fpu sse avx2 avx512_bf16

processor\t: 1
flags\t\t: fpu
"""


processor_flags = processor.processor_flags  # before tests/conftest.py replaces it


@pytest.mark.parametrize(("text", "expected"), [
    (CPUINFO, {"fpu", "sse", "avx2", "avx512_bf16"}), ("", set()), ("Features\t: bf16\n", set()), ("flags :\n", set()),
    (None, set())])
def test_flags(text: str | None, expected: set[str], tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    if text is not None:
        cpuinfo.write_text(text)
    assert processor_flags(cpuinfo) == expected


@pytest.mark.parametrize(("flags", "dtype", "on_accelerator", "expected"), [
    ({"avx512_bf16"}, "bfloat16", False, "matmul"), ({"avx512_bf16"}, "float32", False, "sdpa"),
    ({"avx512_bf16"}, "float16", False, "sdpa"), ({"avx512_bf16"}, "bfloat16", True, "sdpa"),
    ({"avx512_bf16", "amx_bf16"}, "bfloat16", False, "sdpa"), (set(), "bfloat16", False, "sdpa")])
def test_default_attention(flags: set[str], dtype: str, on_accelerator: bool, expected: str,
                           monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor, "processor_flags", lambda: frozenset(flags))
    assert processor.default_attention(dtype, on_accelerator=on_accelerator) == expected
    assert expected in BACKEND_NAMES
