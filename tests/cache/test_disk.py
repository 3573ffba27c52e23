"""Files of tensors, which the official library reads as ours does; unnamed scratch files, and full disks."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import threading
from pathlib import Path

import pytest
import safetensors.torch
import torch

from cache import disk
from cache.disk import Scratch, UnitFile
from cache.errors import DiskError, DiskFullError
from model.weights.read_ahead import as_bytes
from support.disk_files import again, content, path_of, read, read_into, tensors, write


@pytest.fixture
def file(tmp_path: Path) -> UnitFile:
    return write(tmp_path / "a file", tensors())


def test_the_official_library_reads_our_files(tmp_path: Path) -> None:
    file = write(tmp_path / "x", tensors(), {"block": "3", "of": "ünï"})
    loaded = safetensors.torch.load_file(path_of(file))
    expected = {f"{unit}.{name}": x for unit, items in tensors().items() for name, x in items}
    assert loaded.keys() == expected.keys()
    for name, x in expected.items():
        assert loaded[name].dtype == x.dtype and loaded[name].shape == x.shape
        assert bytes(as_bytes(loaded[name].contiguous())) == bytes(as_bytes(x)), name
    with safetensors.safe_open(path_of(file), "pt") as opened:
        assert opened.metadata().items() >= {"block": "3", "of": "ünï"}.items()
    assert file.metadata == {"block": "3", "of": "ünï"}


@pytest.mark.parametrize("base", [0, 64, 4096, 12_345])
def test_units_come_back(tmp_path: Path, base: int) -> None:
    """Their bytes, in the order in which they were given, wherever the file begins; what lies before it stays."""
    (tmp_path / "x").write_bytes(b"\xab" * base)
    written = write(tmp_path / "x", tensors(), {"a": "b"}, base)
    for file in (written, UnitFile(tmp_path / "x", header_sha256=None, base=base)):
        assert list(file.units) == list(tensors())
        for name, unit in reversed(tensors().items()):
            assert read(file, name) == content(unit)
        assert file.verify() == sum(len(content(unit)) for unit in tensors().values())
    assert (tmp_path / "x").read_bytes()[:base] == b"\xab" * base


@pytest.mark.parametrize("longer", range(70))
def test_the_header_is_padded_so_that_tensors_are_aligned(tmp_path: Path, longer: int) -> None:
    file = write(tmp_path / "x", {"u": [("x", torch.ones(4))]}, {"name": "x" * longer})
    raw = path_of(file).read_bytes()
    size = int.from_bytes(raw[:8], "little")
    assert (8 + size) % 64 == 0 and json.loads(raw[8 : 8 + size])["u.x"]["data_offsets"] == [0, 16]
    assert raw[8 + size :] == bytes(as_bytes(torch.ones(4)))
    assert file.header_sha256 == hashlib.sha256(raw[: 8 + size]).hexdigest()


def test_tensors_that_are_not_contiguous_are_refused(tmp_path: Path) -> None:
    """A contiguous copy would have to live until it is written."""
    with pytest.raises(AssertionError):
        write(tmp_path / "x", {"u": [("a", torch.randn(30, 20).T)]})


def test_as_bytes_is_the_tensors_memory() -> None:
    x = torch.arange(6, dtype=torch.int32)
    as_bytes(x)[4:8] = (77).to_bytes(4, "little")
    assert x.tolist() == [0, 77, 2, 3, 4, 5] and len(as_bytes(x[2:])) == 16
    assert len(as_bytes(torch.empty(0))) == 0
    for other in (torch.ones(3, 2).T, torch.ones(3, device="meta")):
        with pytest.raises(AssertionError):
            as_bytes(other)


def test_a_wrong_length_or_name_is_refused(file: UnitFile) -> None:
    length = file.units["1.0"].nbytes
    for name, size in (("1.0", length - 1), ("1.0", length + 1), ("1.0", 0), ("2.0", length), ("", 0)):
        with pytest.raises(DiskError, match=rf"a file: {name} is .* instead of {size:,} bytes"):
            file.read(name, memoryview(bytearray(size)))


def test_the_checksum_is_compared_once(file: UnitFile, monkeypatch: pytest.MonkeyPatch) -> None:
    """For each unit of each opened file: later reads cost no more than the reading. `verify` compares all anew."""
    compared: list[int] = []
    original = disk.zlib.crc32
    monkeypatch.setattr(disk.zlib, "crc32", lambda *args: compared.append(len(args[0])) or original(*args))
    for _ in range(3):
        read_into(file, "1.0")
    assert compared == [len(content(tensors()["1.0"]))]
    file.verify()
    assert len(compared) == 1 + 3
    again(file).verify()
    assert len(compared) == 1 + 3 + 3


def test_short_reads_and_writes_are_completed(file: UnitFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system may read or write fewer bytes than requested, even one."""
    chance = random.Random(0)
    preadv, pwrite = os.preadv, os.pwrite

    def few(size: int) -> int:
        return min(size, chance.choice((1, 5, 8, 1000)))

    monkeypatch.setattr(
        os, "preadv", lambda d, buffers, offset: preadv(d, [buffers[0][: few(len(buffers[0]))]], offset)
    )
    monkeypatch.setattr(os, "pwrite", lambda d, data, offset: pwrite(d, data[: few(len(data))], offset))
    for name, unit in tensors().items():
        assert read(again(file), name) == content(unit)
    assert path_of(write(tmp_path / "b", tensors())).read_bytes() == path_of(file).read_bytes()


def test_scratch_rows_come_back_and_leave_nothing(tmp_path: Path) -> None:
    scratch = Scratch(tmp_path)
    assert not scratch.is_durable
    files = []
    for row in range(5):
        files.append(scratch.write(row, tensors(row)))
        assert list(tmp_path.iterdir()) == []  # it has no name
    for row, file in reversed(list(enumerate(files))):
        assert {name: read(file, name) for name in file.units} == {
            name: content(unit) for name, unit in tensors(row).items()
        }
        assert file.metadata == {"block": str(row)} and file._base % 4096 == 0
        file.check_size()
        file.verify()
    scratch.close()
    scratch.close()
    with pytest.raises(DiskError, match="cannot be read"):
        read_into(files[0], "1.0")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO])
def test_no_room_for_scratch(tmp_path: Path, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message names the folder and a remedy; the next write, with space, is right, and so is what came before."""
    scratch = Scratch(tmp_path)
    before = scratch.write(0, tensors(0))
    pwrite, left = os.pwrite, 3

    def full(descriptor: int, data: memoryview, offset: int) -> int:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(code, os.strerror(code))
        return pwrite(descriptor, data[:100], offset)  # something of it is written

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(DiskFullError) as caught:
            scratch.write(1, tensors(1))
    message = str(caught.value)
    assert message.startswith(f"{tmp_path}: ") and os.strerror(code) in message and "--kv-dir" in message
    after = scratch.write(1, tensors(1))
    assert read(after, "1.0") == content(tensors(1)["1.0"]) and read(before, "1.0") == content(tensors(0)["1.0"])
    scratch.close()


def test_no_folder_for_scratch(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "missing", tmp_path / "file"):
        with pytest.raises(DiskFullError, match=rf"{folder.name}: cannot create a file there: "):
            Scratch(folder)


def test_several_threads_read_one_file(file: UnitFile) -> None:
    """Its header, too, is read when it is first needed, by whoever comes first."""
    found: list[bool] = []

    def check() -> None:
        for _ in range(20):
            found.extend(read(fresh, name) == content(unit) for name, unit in tensors().items())

    fresh = again(file)
    threads = [threading.Thread(target=check) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * (4 * 20 * 3)
