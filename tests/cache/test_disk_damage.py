"""Files of tensors that are damaged, truncated, replaced or foreign: detected, in one line that names the file."""

from __future__ import annotations

import errno
import json
import os
import random
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cache.disk import MAX_HEADER_BYTES, Scratch, UnitFile
from cache.errors import DiskError
from support.disk_files import again, content, path_of, read, read_into, tensors, write


@pytest.fixture
def file(tmp_path: Path) -> UnitFile:
    return write(tmp_path / "a file", tensors())


def lengths(raw: bytes) -> list[int]:
    """Where a cut is interesting: around the parts of the header and every unit, and some places between."""
    head = 8 + int.from_bytes(raw[:8], "little")
    edges, offset = {0, 8, 9, 64, head, len(raw)}, head
    for unit in tensors().values():
        offset += len(content(unit))
        edges.add(offset)
    near = {edge + n for edge in edges for n in (-1, 0, 1)} | set(random.Random(0).sample(range(len(raw)), 20))
    return sorted(length for length in near if 0 <= length < len(raw))


@pytest.mark.parametrize("known", [True, False])
def test_a_file_that_is_cut_short(file: UnitFile, known: bool) -> None:
    """At every length `check_size` detects it, and so does reading a unit that is incomplete."""
    raw = path_of(file).read_bytes()
    assert file.units
    assert len(lengths(raw)) > 30
    for length in lengths(raw):
        path_of(file).write_bytes(raw[:length])
        for check in (UnitFile.check_size, UnitFile.verify):
            with pytest.raises(DiskError, match=r"a file: .*(cut short|damaged|not a file that l4ctx wrote)"):
                check(UnitFile(path_of(file), header_sha256=file.header_sha256 if known else None))
        head = 8 + int.from_bytes(raw[:8], "little")
        for name, unit in file.units.items():
            if head + unit.offset + unit.nbytes <= length:
                assert read(again(file), name) == content(tensors()[name])
                continue
            with pytest.raises(DiskError, match=f"a file: (cut short: {name} ends after|damaged)"):
                read_into(again(file), name)
    path_of(file).write_bytes(raw + b"\0")
    with pytest.raises(DiskError, match=f"a file: too long: {len(raw) + 1:,} bytes instead of {len(raw):,}"):
        again(file).check_size()
    with pytest.raises(DiskError, match="too long"):
        again(file).verify()
    path_of(file).write_bytes(raw)
    again(file).verify()


def test_a_file_that_is_cut_short_while_it_is_used(file: UnitFile) -> None:
    read_into(file, "1.0")
    os.truncate(path_of(file), path_of(file).stat().st_size - 1)
    with pytest.raises(DiskError, match=r"a file: cut short: 1\.0 ends after"):
        read_into(file, "1.0")
    read_into(file, "odd")
    path_of(file).unlink()
    with pytest.raises(DiskError, match="a file: missing"):
        read_into(file, "odd")


@pytest.mark.parametrize("seed", range(60))
def test_a_flipped_bit(file: UnitFile, seed: int) -> None:
    """In header or payload: detected by `verify` and by reading the unit that it is in, but by no other read."""
    raw = bytearray(path_of(file).read_bytes())
    head = 8 + int.from_bytes(raw[:8], "little")
    chance = random.Random(seed)
    place = chance.randrange(head) if seed % 2 else chance.randrange(head, len(raw))
    raw[place] ^= 1 << chance.randrange(8)
    path_of(file).write_bytes(raw)
    with pytest.raises(DiskError, match=r"a file: .*(damaged|cut short)"):
        again(file).verify()
    spoilt = again(file)
    if place < head:
        for name in tensors():
            with pytest.raises(DiskError, match="a file: damaged"):
                read_into(spoilt, name)
        return
    spoilt.check_size()
    for name, place_of in spoilt.units.items():
        if place_of.offset <= place - head < place_of.offset + place_of.nbytes:
            for _ in range(2):  # not only the first time
                with pytest.raises(DiskError, match=f"a file: damaged: the checksum of {name} does not match"):
                    read_into(spoilt, name)
        else:
            assert read(spoilt, name) == content(tensors()[name])


def test_another_file_in_its_place(tmp_path: Path) -> None:
    """With the same length and a header that is valid by itself."""
    ours, other = write(tmp_path / "ours", tensors(0)), write(tmp_path / "other", tensors(1))
    assert path_of(ours).stat().st_size == path_of(other).stat().st_size
    path_of(other).rename(path_of(ours))
    for check in (UnitFile.check_size, UnitFile.verify, lambda file: file.units, lambda file: file.metadata):
        with pytest.raises(DiskError, match="ours: damaged, or another file: its header is not the one"):
            check(again(ours))
    UnitFile(path_of(ours), header_sha256=None).verify()


def raw_file(path: Path, header: object, payload: bytes = b"abcd") -> UnitFile:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + payload)
    return UnitFile(path, header_sha256=None)


def with_places(places: object) -> dict[str, Any]:
    return {"__metadata__": {"units": places if isinstance(places, str) else json.dumps(places)}}


HEADERS: dict[str, object] = {
    "nothing": b"",
    "no JSON": b"{",
    "no text": b"\xff\xfe{}",
    "a number": 3,
    "a list": [1, 2],
    "null": None,
    "no metadata": {},
    "metadata that is a number": {"__metadata__": 7},
    "metadata without units": {"__metadata__": {}},
    "units that are no text": {"__metadata__": {"units": {"u": [0, 4, 1]}}},
    "units that are no JSON": with_places("{"),
    "units in a list": with_places([[0, 4, 1]]),
    "two numbers": with_places({"u": [0, 4]}),
    "four numbers": with_places({"u": [0, 4, 1, 1]}),
    "words": with_places({"u": ["a", "b", "c"]}),
    "no numbers": with_places({"u": None}),
    "a negative offset": with_places({"u": [-4, 4, 1]}),
    "a negative length": with_places({"u": [0, -4, 1]}),
    "infinity": with_places('{"u": [0, 1e999, 1]}'),
    "no number": with_places('{"u": [NaN, 4, 1]}'),
    "deep": b"[" * 100_000,
    "a number too long to read": with_places('{"u": [' + "9" * 5000 + "]}"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_headers_that_are_not_ours(tmp_path: Path, name: str) -> None:
    file = raw_file(tmp_path / "a file", HEADERS[name])
    for check in (file.check_size, file.verify, lambda: file.units, lambda: file.read("u", memoryview(bytearray(4)))):
        with pytest.raises(DiskError, match=r"a file: not a file that l4ctx wrote \(\w+"):
            check()


@pytest.mark.parametrize("place", [[5, 4, 1], [2**62, 4, 1], [2**63 - 1, 4, 1], [10**30, 4, 1]])
def test_units_that_lie_elsewhere(tmp_path: Path, place: list[int]) -> None:
    file = raw_file(tmp_path / "a file", with_places({"u": place}))
    for check in (file.check_size, file.verify, lambda: file.read("u", memoryview(bytearray(4)))):
        with pytest.raises(DiskError, match="a file: "):
            check()


@pytest.mark.parametrize("size", [MAX_HEADER_BYTES + 1, 2**40, 2**63, 2**64 - 1])
def test_a_huge_header_is_not_allocated(tmp_path: Path, size: int) -> None:
    (tmp_path / "a file").write_bytes(size.to_bytes(8, "little") + b"{}")
    with pytest.raises(DiskError, match="a file: damaged: it does not begin with a header"):
        UnitFile(tmp_path / "a file", header_sha256=None).verify()
    (tmp_path / "a file").write_bytes(MAX_HEADER_BYTES.to_bytes(8, "little") + b"{}")
    with pytest.raises(DiskError, match="a file: damaged"):
        UnitFile(tmp_path / "a file", header_sha256=None).verify()


def as_symlink(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


def as_socket(path: Path) -> None:
    path.unlink()
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(os.path.relpath(path))


def replaced_by(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def replace(path: Path) -> None:
        path.unlink()
        make(path)

    return replace


IN_ITS_PLACE: dict[str, tuple[Callable[[Path], object], str]] = {
    "nothing": (Path.unlink, "missing"),
    "a symlink to it": (as_symlink, "cannot be opened: Too many levels of symbolic links"),
    "a dangling symlink": (replaced_by(lambda path: path.symlink_to("nowhere")), "cannot be opened"),
    "a folder": (replaced_by(Path.mkdir), "cannot be read: Is a directory"),
    "a FIFO": (replaced_by(os.mkfifo), "cannot be read: Illegal seek"),
    "a socket": (as_socket, "cannot be opened"),
    "an empty file": (replaced_by(Path.touch), "damaged: it does not begin with a header"),
}


@pytest.mark.parametrize("what", IN_ITS_PLACE)
@pytest.mark.parametrize("is_known", [True, False])
def test_something_else_in_its_place(
    file: UnitFile, what: str, is_known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also after its header has been read; and none of it hangs."""
    monkeypatch.chdir(path_of(file).parent)
    if is_known:
        assert file.units
    change, message = IN_ITS_PLACE[what]
    change(path_of(file))
    errors: list[BaseException] = []

    def check() -> None:
        for checked in (file.check_size, file.verify, lambda: read_into(file, "1.0")):
            try:
                checked()
            except BaseException as error:
                errors.append(error)

    thread = threading.Thread(target=check, daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive(), "it hangs"
    assert [type(error) for error in errors] == [DiskError] * 3
    assert all(str(error).startswith(f"{file.source}: ") for error in errors)
    if not is_known:
        assert all(message in str(error) for error in errors)


def test_a_folder_without_permission(file: UnitFile, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: object, **__: object) -> int:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(os, "open", denied)
    with pytest.raises(DiskError, match="a file: cannot be opened: Permission denied"):
        file.check_size()


def test_an_error_while_reading(file: UnitFile, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    known = again(file)
    assert known.units
    monkeypatch.setattr(os, "preadv", broken)
    for opened in (file, known):
        with pytest.raises(DiskError, match=r"a file: cannot be read: .*Input/output error"):
            read_into(opened, "1.0")


def test_damage_to_scratch_is_told(tmp_path: Path) -> None:
    scratch = Scratch(tmp_path)
    first, last = (scratch.write(row, tensors(row)) for row in range(2))
    first.verify()
    os.pwrite(scratch._file.fileno(), b"?", last._base + 10)
    with pytest.raises(DiskError, match="damaged"):
        last.verify()
    os.ftruncate(scratch._file.fileno(), last._base + 3)
    with pytest.raises(DiskError, match="damaged: it does not begin with a header"):
        UnitFile(scratch._file.fileno(), header_sha256=last.header_sha256, base=last._base).verify()
    first.verify()
    scratch.close()
