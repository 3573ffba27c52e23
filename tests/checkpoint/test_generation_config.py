"""generation_config.json is a stranger's file: what is no number, or too large a one, is refused in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from l4ctx.checkpoint.generation_config import GenerationConfig, GenerationConfigError, Sampling
from model.checkpoint_files import GENERATION_CONFIG


def read(folder: Path, fields: Any) -> GenerationConfig:
    (folder / GENERATION_CONFIG).write_text(json.dumps(fields))
    return GenerationConfig.from_folder(folder)


def test_what_is_recommended(tmp_path: Path) -> None:
    assert read(tmp_path, {}) == GenerationConfig()
    assert read(tmp_path, {"eos_token_id": -1}).stop_tokens == {-1}  # which no token is
    asked = {"eos_token_id": [1, 2], "do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 50}
    assert read(tmp_path, asked) == GenerationConfig(frozenset((1, 2)), Sampling(0.6, 0.9, 50))
    assert read(tmp_path, asked | {"do_sample": False}).sampling == Sampling()


@pytest.mark.parametrize("name", ["temperature", "top_p", "top_k"])
@pytest.mark.parametrize("value", [10**400, 1e308, float("inf"), float("nan"), -1, "1", True, [1], [[]] * 10**4])
def test_what_is_no_setting(tmp_path: Path, name: str, value: Any) -> None:
    with pytest.raises(GenerationConfigError, match=rf"^.{{1,200}}: {name} .{{1,60}} is not a number from 0 to \S+$"):
        read(tmp_path, {"do_sample": True, name: value})


@pytest.mark.parametrize("value", [10**400, 2**32 - 1, -2, 1.0, True, "2", [1, None], {}, [[1]] * 10**4])
def test_what_is_no_token_id(tmp_path: Path, value: Any) -> None:
    with pytest.raises(GenerationConfigError, match=r"^.{1,200}: eos_token_id .{1,60} is not a token id or a list"):
        read(tmp_path, {"eos_token_id": value})
