"""Journals: records are read back, damage is told apart from a torn last line, and a full disk does no harm."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import random
import resource
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from l4ctx.contexts import journal as module
from l4ctx.contexts.journal import Journal, JournalError

RECORDS: list[dict[str, Any]] = [
    {},
    {"block": 0, "file": "0.bin", "tokens": [0, 2048]},
    {"text": '日本 ü 👍🏽 \u2028 \x00\n\r"\\', "path": "bad\udcff.md"},
    {"nested": {"list": [None, True, 1.5, -3, 2**70, {}]}, "": ""},
    {"block": 0, "file": "0.bin", "tokens": [0, 2048]},  # equal to an earlier one, and no duplicate
]


def written(file: Path, records: list[dict[str, Any]]) -> bytes:
    journal = Journal.open(file)
    for record in records:
        journal.append(record)
    journal.close()
    return file.read_bytes()


def line_of(text: str | bytes, after: bytes = b"0" * 16) -> bytes:
    """A line in the journal's format, with any text."""
    text = text if isinstance(text, bytes) else text.encode()
    return hashlib.sha256(after + text).hexdigest()[:16].encode() + b" " + text + b"\n"


def test_the_format(tmp_path: Path) -> None:
    expected = b""
    for record in RECORDS:
        expected += line_of(
            json.dumps(record, separators=(",", ":")), expected.split(b"\n")[-2][:16] if expected else b"0" * 16
        )
    assert written(tmp_path / "journal", RECORDS) == expected
    assert Journal.read(tmp_path / "journal") == RECORDS


def test_records_are_there_after_each_opening(tmp_path: Path) -> None:
    file = tmp_path / "journal"
    for count, record in enumerate(RECORDS):
        journal = Journal.open(file)
        assert journal.records == RECORDS[:count]
        journal.append(record)
        assert journal.records == RECORDS[: count + 1] == Journal.read(file)
        journal.close()
        journal.close()


def test_a_record_is_copied_as_it_will_be_read(tmp_path: Path) -> None:
    journal = Journal.open(tmp_path / "journal")
    record: dict[Any, Any] = {"span": (1, 2), 3: ["x"]}
    journal.append(record)
    record[3].append("y")
    assert journal.records == Journal.read(tmp_path / "journal") == [{"span": [1, 2], "3": ["x"]}]


@pytest.mark.parametrize("record", [{"a": float("nan")}, {"a": float("inf")}, {"a": {1}}, {"a": b""}, [], None, "text"])
def test_what_is_no_record_is_refused_unwritten(tmp_path: Path, record: Any) -> None:
    file = tmp_path / "journal"
    before = written(file, RECORDS)
    journal = Journal.open(file)
    with pytest.raises((TypeError, ValueError)):
        journal.append(record)
    assert file.read_bytes() == before and journal.records == RECORDS
    journal.append({"more": 1})
    assert Journal.read(file) == [*RECORDS, {"more": 1}]


TAILS = [b"0", b"0123456789abcdef {", b"\0", b"\0" * 5000, b'{"a":1}', b"\xff\xfe", b"0123\0\0\0\0"]


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("count", [0, len(RECORDS)])
def test_a_torn_end_is_dropped_and_cut_off(tmp_path: Path, tail: bytes, count: int) -> None:
    file = tmp_path / "journal"
    whole = written(file, RECORDS[:count])
    file.write_bytes(whole + tail)
    assert Journal.read(file) == RECORDS[:count]
    assert file.read_bytes() == whole + tail  # a reader changes nothing
    journal = Journal.open(file)
    assert journal.records == RECORDS[:count] and file.read_bytes() == whole
    journal.append({"after": "the crash"})
    assert Journal.read(file) == [*RECORDS[:count], {"after": "the crash"}]


def test_every_length_a_crash_can_leave(tmp_path: Path) -> None:
    file = tmp_path / "journal"
    data = written(file, RECORDS)
    for length in range(len(data)):
        for kept in (data[:length], data[:length] + bytes(len(data) - length)):  # or the size, but not the data
            file.unlink()
            file.write_bytes(kept)
            assert Journal.read(file) == RECORDS[: data[:length].count(b"\n")]


Damage = Callable[[random.Random, bytes], bytes]


def of_lines(change: Callable[[random.Random, list[bytes]], None]) -> Damage:
    def apply(chance: random.Random, data: bytes) -> bytes:
        lines = data.splitlines(keepends=True)
        change(chance, lines)
        return b"".join(lines)

    return apply


def at_a_place(replace: Callable[[random.Random, bytes], bytes], length: int) -> Damage:
    """What `replace` makes of `length` bytes somewhere."""

    def apply(chance: random.Random, data: bytes) -> bytes:
        place = chance.randrange(len(data))
        return data[:place] + replace(chance, data[place : place + length]) + data[place + length :]

    return apply


def insert(chance: random.Random, lines: list[bytes], line: bytes) -> None:
    lines.insert(chance.randrange(len(lines) + 1), line)


def swap_lines(chance: random.Random, lines: list[bytes]) -> None:
    first, second = chance.sample(range(len(lines)), 2)
    lines[first], lines[second] = lines[second], lines[first]


DAMAGES: dict[str, Damage] = {
    "flip a bit": at_a_place(lambda chance, byte: bytes([byte[0] ^ 1 << chance.randrange(8)]), 1),
    "change a byte": at_a_place(lambda chance, byte: bytes([(byte[0] + chance.randrange(1, 256)) % 256]), 1),
    "insert a byte": at_a_place(lambda chance, _: chance.choice([b"\n", b"\0", b" ", b"0", b"\xff"]), 0),
    "remove a byte": at_a_place(lambda *_: b"", 1),
    "cut": at_a_place(lambda *_: b"", 10**9),
    "zeros in a page": at_a_place(lambda _, part: bytes(len(part)), 64),
    "duplicate a line": of_lines(lambda chance, lines: insert(chance, lines, chance.choice(lines))),
    "swap lines": of_lines(swap_lines),
    "remove a line": of_lines(lambda chance, lines: lines.remove(chance.choice(lines))),
    "insert a line": of_lines(lambda chance, lines: insert(chance, lines, line_of('{"a":1}', after=b"f" * 16))),
    "empty line": of_lines(lambda chance, lines: insert(chance, lines, b"\n")),
    "append garbage": lambda chance, data: data + chance.randbytes(chance.randrange(1, 200)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_told_from_a_torn_end(tmp_path: Path, damage: str) -> None:
    """25 times each: records are read only where all complete lines are a prefix of the original's."""
    file = tmp_path / "journal"
    chance = random.Random(damage)
    for case in range(25):
        records = [{"n": chance.randrange(3), "x": "ab" * chance.randrange(9)} for _ in range(chance.randrange(2, 9))]
        file.unlink(missing_ok=True)
        data = written(file, records)
        damaged = DAMAGES[damage](chance, data)
        file.unlink()
        file.write_bytes(damaged)
        whole = damaged[: damaged.rfind(b"\n") + 1]
        if data.startswith(whole):
            assert Journal.read(file) == records[: whole.count(b"\n")], case
            continue
        with pytest.raises(JournalError) as caught:
            Journal.read(file)
        message = str(caught.value)
        lines = dict(enumerate(data.split(b"\n")[:-1], start=1))
        number = next(n for n, line in enumerate(damaged.split(b"\n"), start=1) if line != lines.get(n))
        assert message.startswith(f"{file}: line {number}: ") and message.isprintable(), (case, message)
        with pytest.raises(JournalError):
            Journal.open(file)
        assert file.read_bytes() == damaged


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "Expecting property name"),
        ("", "Expecting value"),
        ("{} {}", "Extra data"),
        ("[1]", "it is a list"),
        ("null", "it is a NoneType"),
        ('{"a":NaN}', "NaN is not a JSON number"),
        ('{"a":-Infinity}', "-Infinity is not a JSON number"),
        (b'{"a":"\xff"}', "can't decode byte"),
        ('{"a":1}'.encode("utf-16"), "can't decode byte"),
        (b'{"a":"\0"}', "Invalid control character"),
        ('{"a":' + "[" * 100_000 + "]" * 100_000 + "}", "recursion"),
        ('{"a":' + "9" * 5000 + "}", "integer string conversion"),
    ],
)
def test_what_has_a_right_checksum_and_is_no_record(tmp_path: Path, text: str | bytes, message: str) -> None:
    file = tmp_path / "journal"
    file.write_bytes(line_of("{}") + line_of(text, after=line_of("{}")[:16]))
    with pytest.raises(JournalError, match=f"journal: line 2: not a JSON object .*{message}") as caught:
        Journal.read(file)
    assert str(caught.value).isprintable()


def test_a_file_that_is_read_in_part_is_not_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file may end early for one read only, where it lies on another machine."""
    content = written(tmp_path / "journal", RECORDS)

    class Short(io.BytesIO):
        def __init__(self, descriptor: int, *_: object, **__: object) -> None:
            super().__init__(os.pread(descriptor, len(content) // 2, 0))

    monkeypatch.setattr(module, "open", Short, raising=False)
    for use in (Journal.open, Journal.read):
        with pytest.raises(OSError, match="bytes could be read"):
            use(tmp_path / "journal")
    assert (tmp_path / "journal").read_bytes() == content


def test_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Journal.read(tmp_path / "none")
    written(tmp_path / "journal", RECORDS)
    (tmp_path / "link").symlink_to("journal")
    (tmp_path / "dangling").symlink_to("made")
    os.mkfifo(tmp_path / "pipe")
    for name in ("link", "dangling", "pipe", "."):
        for use in (Journal.read, Journal.open):
            with pytest.raises((OSError, JournalError)):
                use(tmp_path / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dangling", "journal", "link", "pipe"]


def test_a_new_file_is_for_its_owner_alone(tmp_path: Path) -> None:
    for umask in (0, 0o027, 0o377, 0o777):
        before = os.umask(umask)
        try:
            Journal.open(tmp_path / f"{umask}").close()
        finally:
            os.umask(before)
        assert stat.S_IMODE((tmp_path / f"{umask}").stat().st_mode) == 0o600


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What reaches the disk, in order: writes and truncations, and fsyncs of files and folders."""
    seen: list[str] = []
    fsync, write, ftruncate = os.fsync, os.write, os.ftruncate

    def logged_fsync(descriptor: int) -> None:
        seen.append("sync folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "sync file")
        fsync(descriptor)

    def logged_write(descriptor: int, data: bytes) -> int:
        seen.append(f"write {data.count(10)}")  # lines
        return write(descriptor, data)

    def logged_ftruncate(descriptor: int, length: int) -> None:
        seen.append(f"cut to {length}")
        ftruncate(descriptor, length)

    monkeypatch.setattr(os, "fsync", logged_fsync)
    monkeypatch.setattr(os, "write", logged_write)
    monkeypatch.setattr(os, "ftruncate", logged_ftruncate)
    return seen


def test_order_of_writing_and_syncing(tmp_path: Path, calls: list[str]) -> None:
    file = tmp_path / "journal"
    journal = Journal.open(file)
    assert calls == ["sync folder"]
    journal.append({"a": "x" * 100_000})
    journal.append({})
    journal.close()
    Journal.open(file).close()  # nothing to do
    assert calls[1:] == ["write 1", "sync file"] * 2
    whole = file.stat().st_size
    file.write_bytes(file.read_bytes() + b"torn")
    calls.clear()
    Journal.read(file)
    assert calls == []
    Journal.open(file).close()
    assert calls == [f"cut to {whole}", "sync file"]


def test_a_file_left_empty_by_a_crash_has_its_folder_synced(tmp_path: Path, calls: list[str]) -> None:
    (tmp_path / "journal").touch()
    Journal.open(tmp_path / "journal").close()
    assert calls == ["sync folder"]


def no_space(written_before: int) -> Callable[[int, bytes], int]:
    """An os.write on a full disk: what still fits is written, and is reported or not."""
    write = os.write

    def fails(descriptor: int, data: bytes) -> int:
        count = write(descriptor, data[:written_before]) if written_before else 0
        if count:
            return count
        raise OSError(errno.ENOSPC, "No space left on device")

    return fails


def fails_after_writing(error: BaseException) -> Callable[[int, bytes], int]:
    write = os.write

    def fails(descriptor: int, data: bytes) -> int:
        write(descriptor, data)
        raise error

    return fails


FAILURES: dict[str, tuple[str, Callable[[], Callable[..., Any]], type[BaseException]]] = {
    "full": ("write", lambda: no_space(0), OSError),
    "short by all but one": ("write", lambda: no_space(1), OSError),
    "short": ("write", lambda: no_space(20), OSError),
    "EIO after writing": ("write", lambda: fails_after_writing(OSError(errno.EIO, "I/O error")), OSError),
    "interrupt after writing": ("write", lambda: fails_after_writing(KeyboardInterrupt()), KeyboardInterrupt),
    "fsync fails": ("fsync", lambda: lambda _: (_ for _ in ()).throw(OSError(errno.EIO, "I/O error")), OSError),
    "interrupt in fsync": ("fsync", lambda: lambda _: (_ for _ in ()).throw(KeyboardInterrupt()), KeyboardInterrupt),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_failed_append_leaves_the_journal_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: str
) -> None:
    file = tmp_path / "journal"
    name, make, error = FAILURES[failure]
    before = written(file, RECORDS)
    journal = Journal.open(file)
    for attempt in range(3):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, make())
            with pytest.raises(error):
                journal.append({"lost": attempt, "filler": "x" * 50})
        assert file.read_bytes() == before
        assert journal.records == RECORDS
    journal.append({"room": "again"})
    journal.append({"and": "again"})
    assert Journal.read(file) == journal.records == [*RECORDS, {"room": "again"}, {"and": "again"}]


def test_what_could_not_be_cut_off_is_cut_off_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that has failed refuses truncation too."""
    file = tmp_path / "journal"
    before = written(file, RECORDS)
    journal = Journal.open(file)

    def broken(*_: object) -> None:
        raise OSError(errno.EIO, "I/O error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", no_space(30))
        patch.setattr(os, "ftruncate", broken)
        for _ in range(2):
            with pytest.raises(OSError, match=r"journal line|I/O error"):
                journal.append({"lost": "x" * 50})
        assert file.read_bytes().startswith(before) and file.stat().st_size == len(before) + 30
        assert Journal.read(file) == RECORDS
    journal.append({"room": "again"})
    assert Journal.read(file) == [*RECORDS, {"room": "again"}]


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_real_short_write(tmp_path: Path) -> None:
    """The system's own limit on a file's size cuts the write short, or refuses it."""
    file = tmp_path / "journal"
    before = written(file, RECORDS)
    journal = Journal.open(file)
    for room in (0, 1, 30):
        with largest_file(len(before) + room), pytest.raises(OSError, match=f"only {room} of" if room else "too large"):
            journal.append({"lost": "x" * 50})
        assert file.read_bytes() == before
    journal.append({"room": "again"})
    assert Journal.read(file) == [*RECORDS, {"room": "again"}]


def test_nothing_stays_open(tmp_path: Path) -> None:
    def descriptors() -> int:
        return len(os.listdir("/dev/fd"))

    (tmp_path / "damaged").write_bytes(b"damaged\n")
    before = descriptors()
    for file in (tmp_path / "damaged", tmp_path, tmp_path / "journal"):
        for use in (Journal.read, lambda file: Journal.open(file).close()):
            with suppress(JournalError, OSError):
                use(file)
    assert descriptors() == before


def test_reading_takes_no_time(tmp_path: Path) -> None:
    data, digits = [], b"0" * 16
    for number in range(20_000):
        data.append(line_of(json.dumps({"number": number, "file": f"{number:08}.bin", "sha256": "0f" * 32}), digits))
        digits = data[-1][:16]
    (tmp_path / "journal").write_bytes(b"".join(data))
    seconds = []
    for _ in range(3):  # a garbage collection of what other tests left may fall into one
        began = time.process_time()
        assert len(Journal.read(tmp_path / "journal")) == 20_000
        seconds.append(time.process_time() - began)
    assert min(seconds) < 0.5  # 0.06 s when nothing else runs
