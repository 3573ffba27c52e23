"""The small JSON files of a checkpoint: read whole or refused, by the words of whoever needs them."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from model.config import TextConfig
from model.errors import CheckpointError, ConfigError
from model.folder import MAX_JSON_BYTES, PICKLED_WEIGHTS, open_regular, read_json, read_object, read_regular

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
    with pytest.raises(ConfigError, match=r"config.json: cannot be read as JSON \(larger than 4 MiB\)$"):
        TextConfig.from_folder(tmp_path)


def no_file(file: Path) -> None:
    pass


def device(file: Path) -> None:
    file.symlink_to("/dev/zero")


@pytest.mark.parametrize(
    ("made", "error", "reason"),
    [
        (no_file, FileNotFoundError, "No such file or directory"),
        (os.mkfifo, OSError, "not a regular file"),  # with nobody at its other end: a plain open would wait
        (Path.mkdir, IsADirectoryError, "Is a directory"),
        (device, OSError, "not a regular file"),
        (lambda file: file.symlink_to(file.name), OSError, "Too many levels of symbolic links"),
        (lambda file: file.write_bytes(b"12345"), OSError, "larger than 4 bytes"),
    ],
)
def test_what_is_no_small_regular_file(
    tmp_path: Path, made: Callable[[Path], object], error: type[OSError], reason: str
) -> None:
    made(tmp_path / NAME)
    with pytest.raises(error) as refused:
        read_regular(tmp_path / NAME, 4)
    assert refused.value.strerror == reason and refused.value.filename in (tmp_path / NAME, str(tmp_path / NAME))


def test_a_file_of_the_largest_size_is_read(tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(b"1234")
    assert read_regular(tmp_path / NAME, 4) == b"1234"
    (tmp_path / NAME).write_bytes(b"")
    assert read_regular(tmp_path / NAME, 4) == b""
    assert read_regular("/proc/self/stat", 2**16) if Path("/proc/self/stat").exists() else True  # whose size is 0


def test_links_are_followed_unless_told_otherwise(tmp_path: Path) -> None:
    (tmp_path / "there").write_bytes(b"1234")
    (tmp_path / NAME).symlink_to("there")
    assert read_regular(tmp_path / NAME, 4) == b"1234"
    with pytest.raises(OSError, match="a link, not a regular file"):
        read_regular(tmp_path / NAME, 4, follow=False)


def test_a_file_that_is_replaced_between_look_and_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / NAME).write_bytes(b"1234")
    looked = (tmp_path / NAME).stat()
    (tmp_path / NAME).unlink()
    os.mkfifo(tmp_path / NAME)
    monkeypatch.setattr(os, "stat", lambda *args, **options: looked)
    for is_seen in (False, True):
        with pytest.raises(OSError, match="became a named pipe"):
            open_regular(tmp_path / NAME, is_seen=is_seen)


def test_a_read_that_ends_early_or_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / NAME).write_bytes(b"1234")
    real = os.fstat

    def says(size: int) -> None:
        def fstat(descriptor: int) -> os.stat_result:
            fields = list(real(descriptor))
            fields[stat.ST_SIZE] = size
            return os.stat_result(fields)

        monkeypatch.setattr(os, "fstat", fstat)

    says(5)
    with pytest.raises(OSError, match="only 4 of its 5 bytes could be read"):
        read_regular(tmp_path / NAME, 8)
    says(2)  # it grows meanwhile
    assert read_regular(tmp_path / NAME, 4) == b"1234"
    with pytest.raises(OSError, match="larger than 3 bytes"):
        read_regular(tmp_path / NAME, 3)


def test_names_of_pickled_weights() -> None:
    names = ("pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "consolidated.00.pth", "adapter_model.bin")
    assert all(PICKLED_WEIGHTS.fullmatch(name) for name in names)
    assert not any(PICKLED_WEIGHTS.fullmatch(name) for name in ("model.safetensors", "training_args.bin", "x.pth"))
