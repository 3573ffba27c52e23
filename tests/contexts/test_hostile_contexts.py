"""Contexts that somebody made on purpose: every checksum is right, and what they say is impossible.

Whatever they say ends in an answer or in one line, and nothing is allocated that is not there.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from cache.disk import UnitFile, write_units
from cache.errors import DiskError
from l4ctx.contexts.folder import FILE, HEAD, JOURNAL, digest
from l4ctx.contexts.journal import MAX_BYTES, Journal
from l4ctx.contexts.reader import Context
from l4ctx.contexts.states import MOST_TOKENS
from l4ctx.errors import ContextError
from support.context_toys import BLOCK, CHUNK, answer, keep, tokens

IDS = tokens(2 * BLOCK + CHUNK + 7)
REFUSED = (ContextError, DiskError)
VALUES: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 1, 7, 2**31, 2**63, 10**400, 1.5, 1e308, "", "x", "²", "\0", "../x", "a" * 5000),
    *([], {}, [[]], [1], {"a": 1}),
)


@pytest.fixture(autouse=True)
def _fsync_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "context"
    keep(folder, IDS)
    keep(folder, tokens(BLOCK + CHUNK + 3, seed=1))
    return folder


@pytest.fixture
def folder(base: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(base, tmp_path / "context"))


def write_journal(folder: Path, records: list[Any]) -> None:
    """With the right checksums, and a head that ends it."""
    digits, lines = b"0" * 16, []
    for record in records:
        text = json.dumps(record, separators=(",", ":")).encode()
        digits = hashlib.sha256(digits + text).hexdigest()[:16].encode()
        lines.append(digits + b" " + text + b"\n")
    (folder / JOURNAL).write_bytes(b"".join(lines))
    (folder / HEAD).unlink()
    ends = [n for n, record in enumerate(records, 1) if isinstance(record, dict) and record.get("type") == "end"]
    if ends:
        (folder / HEAD).write_text(json.dumps({"records": ends[-1], "end": digest(records[ends[-1] - 1])}))


def places(content: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    if isinstance(content, dict | list):
        for key, value in content.items() if isinstance(content, dict) else enumerate(content):
            yield from places(value, (*path, key))


def put(content: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    content[path[0]] = put(content[path[0]], path[1:], value)
    return content


def changed_somewhere(content: Any, chance: random.Random) -> Any:
    path = chance.choice([path for path in places(content) if path] or [()])
    return put(content, path, chance.choice(VALUES))


def rewritten(folder: Path, pattern: str, change: Callable[[dict[str, bytes]], object]) -> None:
    """A data file with other units, named by the journal with its right digest."""
    path = max(folder.glob(pattern))
    file = UnitFile(path, header_sha256=None)
    contents = {}
    for name, unit in file.units.items():
        contents[name] = bytearray(unit.nbytes)
        file.read(name, memoryview(contents[name]))
    change(contents)  # type: ignore[arg-type]
    units = {
        name: [("x", torch.frombuffer(bytearray(content), dtype=torch.uint8))] if content else []
        for name, content in contents.items()
    }
    with path.open("wb") as stream:
        sha256, _ = write_units(stream.fileno(), units, file.metadata)
    records = json.loads(json.dumps(Journal.read(folder / JOURNAL)))
    name = path.relative_to(folder).as_posix()
    for record in records:
        for part in (record, *(record.get(key) or {} for key in ("tail", "partial", "ids"))):
            if isinstance(part, dict) and part.get("file") == name:
                part["sha256"] = sha256
    write_journal(folder, records)


def of_the_journal(folder: Path, chance: random.Random) -> None:
    records = Journal.read(folder / JOURNAL)
    for _ in range(chance.randrange(1, 3)):
        number = chance.randrange(len(records))
        records[number] = changed_somewhere(records[number], chance)
    write_journal(folder, records)


def of_the_manifest(folder: Path, chance: random.Random) -> None:
    content = json.loads((folder / FILE).read_text())
    del content["sha256"]
    content = changed_somewhere(content, chance)
    with_digest = {**content, "sha256": digest(content)} if isinstance(content, dict) else content
    (folder / FILE).write_text(json.dumps(with_digest))


def of_the_head(folder: Path, chance: random.Random) -> None:
    (folder / HEAD).write_text(json.dumps(changed_somewhere(json.loads((folder / HEAD).read_text()), chance)))


def of_a_list(folder: Path, chance: random.Random) -> None:
    def change(units: dict[str, bytes]) -> None:
        units["documents"] = json.dumps(changed_somewhere(json.loads(units["documents"]), chance)).encode()

    rewritten(folder, "tokens-*", change)


def of_the_units(folder: Path, chance: random.Random) -> None:
    def change(units: dict[str, bytes]) -> None:
        name = chance.choice(sorted(units))
        what = chance.randrange(4)
        if what == 0:
            del units[name]
        elif what == 1:
            units[chance.choice(["99", "-1", "²", "٣", "x", "0" * 5000])] = units.pop(name)
        else:
            units[name] = units[name][: chance.randrange(len(units[name]) + 1)] if what == 2 else units[name] * 2

    rewritten(folder, chance.choice(["tokens-*", "tail-*", "blocks/*"]), change)


CHANGES = (of_the_journal, of_the_journal, of_the_manifest, of_the_head, of_a_list, of_the_units, of_the_units)


def check(folder: Path) -> None:
    """Each way to use a context ends well, or in one line that names it."""
    for use in (
        lambda: [Context.read(folder).damage(state, verify=True) for state in Context.read(folder).usable],
        lambda: [Context.read(folder).documents(state) for state in Context.read(folder).usable],
        lambda: [Context.read(folder).text(state) for state in Context.read(folder).usable],
        lambda: answer(folder),
        lambda: keep(folder, IDS),
    ):
        message = str(folder)
        try:
            use()
        except REFUSED as error:
            message = str(error)
        assert str(folder) in message and "\n" not in message and len(message) < 1000


@pytest.mark.parametrize("seed", range(70))
def test_what_is_impossible_is_refused_in_one_line(folder: Path, seed: int) -> None:
    chance = random.Random(seed)
    CHANGES[seed % len(CHANGES)](folder, chance)
    check(folder)


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


@pytest.mark.parametrize("name", [JOURNAL, HEAD, FILE])
def test_what_is_sparse_and_huge_is_not_read(folder: Path, name: str) -> None:
    os.truncate(folder / name, 3 * 2**30)
    before = peak()
    with pytest.raises(ContextError, match=f"^{folder / name}: .*larger than (1|16) MiB"):
        Context.read(folder)
    assert peak() - before < 2**27


@pytest.mark.parametrize("unit", ["ids", "documents"])
def test_lengths_are_compared_with_the_file_first(folder: Path, unit: str) -> None:
    """A header that promises 200 MB of a file that has none of them, and a state that agrees."""
    count = MOST_TOKENS * 3 // 4
    path = max(folder.glob("tokens-*"))
    places = {"ids": [0, 4 * count, 0], "documents": [0, 4 * count, 0]}
    text = json.dumps({"__metadata__": {"units": json.dumps({unit: places[unit]})}}).encode()
    head = len(text).to_bytes(8, "little") + text
    path.write_bytes(head)
    stored = {"file": path.name, "sha256": hashlib.sha256(head).hexdigest()}
    begun = {"type": "begin", "tokens": count, "start": 0, "ids": stored, "system": False, "base": None, "kept": 0}
    write_journal(folder, [{**begun, "partial": None}])
    context, before = Context.read(folder), peak()
    with pytest.raises(DiskError, match=f"^{path}: cut short: "):
        (context.ids if unit == "ids" else context.documents)(context.states[0])
    assert peak() - before < 2**27


def test_states_cannot_multiply_their_blocks(folder: Path) -> None:
    """A few megabytes of records, each of which would copy all blocks of the first state."""
    records = Journal.read(folder / JOURNAL)
    begin = next(record for record in records if record["type"] == "begin")
    block = next(record for record in records if record["type"] == "block")
    count = 10_000
    blocks = [block | {"index": index} for index in range(count)]
    start = {"tokens": MOST_TOKENS, "start": count * BLOCK, "base": 0, "kept": count}
    before = peak()
    write_journal(folder, [begin | {"tokens": MOST_TOKENS}, *blocks, *[begin | start] * 1_800])
    with pytest.raises(ContextError, match="blocks of earlier states"):
        Context.read(folder)
    assert peak() - before < 2**29


def test_a_journal_does_not_outgrow_what_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("l4ctx.contexts.journal.MAX_BYTES", 100)
    journal = Journal.open(tmp_path / JOURNAL)
    journal.append({"type": "a"})
    with pytest.raises(OSError, match="would be larger"):
        journal.append({"type": "b" * 60})
    journal.append({"type": "c"})
    journal.close()
    assert [record["type"] for record in Journal.read(tmp_path / JOURNAL)] == ["a", "c"] and MAX_BYTES > 100
