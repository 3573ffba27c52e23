"""Mapped tensors are found in their files, read in, and dropped. Files elsewhere than on Linux are never found."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from model.weights import pages
from model.weights.pages import Dropper, MappedRange, mapped_files, num_bytes, ranges_of, read_in, split

PAGES = 64
SIZE = PAGES * pages.PAGE_BYTES

only_on_linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells where files are mapped")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    file = tmp_path / "weights (1).bin"
    file.write_bytes(bytes(range(256)) * (SIZE // 256))
    return file


def opened(file: Path) -> Tensor:
    return torch.from_file(str(file), shared=False, size=SIZE, dtype=torch.uint8)


def resident(here: MappedRange) -> int:
    """Bytes of the mapping that are in this process's page table."""
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    for line in lines:
        if line.startswith(f"{here.address:x}-"):
            return int(next(line for line in lines if line.startswith("Rss:")).split()[1]) * 1024
    raise AssertionError("not mapped")


@only_on_linux
def test_mapped_tensors_are_found_at_their_file_offsets(file: Path) -> None:
    whole = opened(file)
    parts = [whole[10:1000].view(11, 90), whole[5000:9000].view(40, 100).t(), whole[9000:9100]]
    found = ranges_of([torch.ones(1000), *parts], mapped_files())
    assert [(here.offset, here.num_bytes) for here in found] == [(10, 990), (5000, 4100)]  # neighbours are joined
    content = file.read_bytes()
    assert all(here.file == str(file) for here in found)
    assert bytes(parts[0].flatten().tolist()) == content[10:1000]
    assert ranges_of([torch.ones(1000), torch.empty(0), torch.empty(3, device="meta")], mapped_files()) == []


@only_on_linux
def test_reading_in_and_dropping_change_what_is_resident_and_no_value(file: Path) -> None:
    whole = opened(file)
    before = whole.clone()
    (here,) = ranges_of([whole], mapped_files())
    dropper = Dropper()
    dropper.drop([here])
    assert resident(here) == 0
    read_in([here], lambda: True)
    if resident(here) == 0:
        pytest.skip("this kernel only starts reading on request")
    assert resident(here) == SIZE
    dropper.drop([here.part(pages.PAGE_BYTES + 1, 5 * pages.PAGE_BYTES - 1)])  # whole pages within: 2, 3
    assert resident(here) == SIZE - 2 * pages.PAGE_BYTES
    assert torch.equal(whole, before)
    dropper.close()


@only_on_linux
def test_reading_ends_when_it_is_no_longer_wanted(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "PIECE_BYTES", 4 * pages.PAGE_BYTES)
    advised: list[tuple[int, int]] = []
    monkeypatch.setattr(pages, "_advise", lambda address, size, advice: advised.append((address, size)) or True)
    here, wanted = MappedRange(100 * pages.PAGE_BYTES + 7, 20 * pages.PAGE_BYTES, str(file), 1, 7), iter([True] * 2)
    read_in([here], lambda: next(wanted, False))
    assert advised == [((100 + 4 * n) * pages.PAGE_BYTES, 4 * pages.PAGE_BYTES) for n in range(2)]
    advised.clear()
    read_in([here], lambda: True)
    assert sum(size for _, size in advised) == here.end - 100 * pages.PAGE_BYTES


def test_another_file_of_the_same_name_is_left_alone(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "_advise", lambda *_: True)
    advised: list[int] = []
    monkeypatch.setattr(pages.os, "posix_fadvise", lambda descriptor, *_: advised.append(descriptor), raising=False)
    monkeypatch.setattr(pages.os, "POSIX_FADV_DONTNEED", 4, raising=False)
    dropper, inode = Dropper(), file.stat().st_ino
    dropper.drop([MappedRange(0, SIZE, str(file), inode + 1, 0), MappedRange(0, SIZE, "/nowhere", inode, 0)])
    assert advised == []
    dropper.drop([MappedRange(0, SIZE, str(file), inode, 0)] * 2)
    assert len(advised) == 2 and len(set(advised)) == 1
    dropper.close()


def test_splitting_keeps_every_byte(file: Path) -> None:
    ranges = [MappedRange(start, 30, str(file), 1, start + 5) for start in (100, 200, 300)]
    for size in (0, 1, 30, 47, 60, 90, 100):
        first, rest = split(ranges, size)
        assert num_bytes(first) == min(size, 90) and num_bytes(first) + num_bytes(rest) == 90
        held = [here.address + n for here in (*first, *rest) for n in range(here.num_bytes)]
        assert held == [here.address + n for here in ranges for n in range(30)]
        assert all(here.offset == here.address + 5 for here in (*first, *rest))


def test_nothing_is_mapped_where_the_system_does_not_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "MAPPINGS", "/nowhere")
    assert mapped_files() == []
