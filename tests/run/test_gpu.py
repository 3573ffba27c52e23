"""The whole program on a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.cli_runner import TINY, ask, fact_document, text_file


@pytest.mark.gpu
@pytest.mark.parametrize("attention", ["sdpa", "flex", "matmul"])
@pytest.mark.parametrize("options", [(), ("--kv-device-memory", "1B"), ("--kv-dtype", "int8")])
def test_an_answer_is_that_of_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, attention: str, options: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("L4CTX_MODEL", str(TINY))
    text_file(Path("docs/a.md"), fact_document("a"))
    asked = ("docs", "--attention", attention, "--quiet")
    expected = ask("a", *asked, "--device", "cpu")
    assert expected.code == 0
    assert ask("a", *asked, "--device", "cuda", *options) == expected
