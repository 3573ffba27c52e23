"""The small JSON files of a checkpoint: read whole or refused, by the words of whoever needs them."""

from __future__ import annotations

from pathlib import Path

import pytest

from model.config import TextConfig
from model.errors import CheckpointError, ConfigError
from model.folder import MAX_JSON_BYTES, PICKLED_WEIGHTS, read_json, read_object

NAME = "settings.json"


def test_an_object_is_read_and_a_missing_one_is_empty(tmp_path: Path) -> None:
    (tmp_path / NAME).write_text('{"ä": [1, null]}', encoding="utf-8")
    (tmp_path / "link").symlink_to(NAME)  # as in the hub's cache
    assert read_object(tmp_path / "link", ConfigError) == read_json(tmp_path / NAME) == {"ä": [1, None]}
    assert read_object(tmp_path / "none", ConfigError) == {}
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "none")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", r"cannot be read as JSON \(Expecting property name .*: line 1 column 2 \(char 1\)\)"),
        (b'{"a": "\xff"}', r"cannot be read as JSON \('utf-8' codec can't decode byte 0xff in position 7: .*\)"),
        (b"[" * 10**6, r"cannot be read as JSON \(maximum recursion depth exceeded.*\)"),
        (b"[1]", "the top level is not an object"),
    ],
)
def test_what_is_no_object_is_the_callers_error(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / NAME
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"^{file}: {message}$"):
        read_object(file, CheckpointError)


def test_a_file_that_is_too_large_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "config.json").open("wb") as file:
        file.write(b"{}")
        file.truncate(MAX_JSON_BYTES + 1)  # takes no space
    with pytest.raises(ConfigError, match=r"config.json: cannot be read as JSON \(larger than 64 MiB\)$"):
        TextConfig.from_folder(tmp_path)


def test_names_of_pickled_weights() -> None:
    names = ("pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "consolidated.00.pth", "adapter_model.bin")
    assert all(PICKLED_WEIGHTS.fullmatch(name) for name in names)
    assert not any(PICKLED_WEIGHTS.fullmatch(name) for name in ("model.safetensors", "training_args.bin", "x.pth"))
