"""Contexts that are damaged, or made with other settings or models: answers are right, or refused with the reason."""

from __future__ import annotations

import json
import os
import random
import secrets
import shutil
from array import array
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from cache.disk import UnitFile, write_units
from cache.errors import DiskError, DiskFullError
from l4ctx.checkpoint.fingerprint import FIELDS
from l4ctx.contexts.manifest import read_manifest, saved_recipe
from l4ctx.contexts.reader import Context, ContextReader
from l4ctx.contexts.writer import ContextWriter
from l4ctx.errors import ContextError
from l4ctx.run.context import CHOICES, ContextChoices
from support.context_toys import (
    BLOCK,
    CHUNK,
    CONFIG,
    Kind,
    answer,
    changed,
    close,
    files,
    fresh_answer,
    keep,
    tokens,
)
from support.requests import prefill_request

IDS = tokens(4 * BLOCK + CHUNK + 7)
LATER = changed(IDS, 3 * BLOCK + CHUNK + 5)  # resumes in the middle of a block
REFUSED = (ContextError, DiskError)


@pytest.fixture(autouse=True)
def _fsync_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "context"


class Base(NamedTuple):
    """A context to damage, the documents that it answers from, and those to be read into it next."""

    folder: Path
    ids: array[int]
    next_ids: array[int]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> list[Base]:
    """One that was changed, and one within a change; each with a sibling of other documents, to mix up files with."""
    top, chance = tmp_path_factory.mktemp("bases"), random.Random(0)
    with pytest.MonkeyPatch.context() as patch:  # file names, and so all that follows from them, are the same each time
        patch.setattr(secrets, "token_hex", lambda count: chance.randbytes(count).hex())
        for place, start in (("", IDS), ("sibling of ", tokens(len(IDS), seed=1))):
            ids = changed(start, 2 * BLOCK + 3)
            for name in ("changed", "changing"):
                keep(top / f"{place}{name}", start)
                keep(top / f"{place}{name}", ids)
            keep(top / f"{place}changing", changed(ids, 2 * BLOCK + CHUNK + 5), stop=3 * BLOCK)
    ids = changed(IDS, 2 * BLOCK + 3)
    return [Base(top / "changed", ids, ids), Base(top / "changing", ids, changed(ids, 2 * BLOCK + CHUNK + 5))]


@dataclass
class Patient:
    """The copy that is damaged: a file of it, and its whole folder."""

    file: Path
    folder: Path
    chance: random.Random
    sibling: Path

    def others(self) -> list[Path]:
        return sorted(file for file in self.file.parent.iterdir() if file != self.file)


def of_bytes(change: Callable[[random.Random, bytes], bytes]) -> Callable[[Patient], None]:
    def apply(patient: Patient) -> None:
        patient.file.write_bytes(change(patient.chance, patient.file.read_bytes()))

    return apply


def at_a_place(change: Callable[[random.Random, bytes], bytes], length: int) -> Callable[[Patient], None]:
    """What `change` makes of `length` bytes somewhere."""

    def apply(chance: random.Random, content: bytes) -> bytes:
        place = chance.randrange(len(content))
        return content[:place] + change(chance, content[place : place + length]) + content[place + length :]

    return of_bytes(apply)


def of_lines(change: Callable[[random.Random, list[bytes]], list[bytes]]) -> Callable[[Patient], None]:
    return of_bytes(lambda chance, content: b"".join(change(chance, content.splitlines(keepends=True))))


def without(lines: list[bytes], number: int) -> list[bytes]:
    return lines[:number] + lines[number + 1 :]


def swapped(patient: Patient) -> None:
    other, aside = patient.chance.choice(patient.others()), patient.folder / "aside"
    for source, target in ((patient.file, aside), (other, patient.file), (aside, other)):
        source.rename(target)


def exchanged(patient: Patient) -> None:
    """Replaced by the corresponding file of another context of the same model and settings."""
    name = patient.file.relative_to(patient.folder).as_posix().split("-")[0]
    shutil.copy(patient.chance.choice(sorted(patient.sibling.glob(f"{name}*"))), patient.file)


def forged(patient: Patient) -> None:
    """Rewritten as a valid file, with one number changed, token ids included."""
    file = UnitFile(patient.file, header_sha256=None)
    units = {}
    for name, unit in file.units.items():
        content = bytearray(unit.nbytes)
        file.read(name, memoryview(content))
        content[patient.chance.randrange(len(content))] ^= 1
        units[name] = [("x", torch.frombuffer(content, dtype=torch.uint8))]
    with open(patient.file, "wb") as stream:
        write_units(stream.fileno(), units, file.metadata)


def made_a_folder(patient: Patient) -> None:
    patient.file.unlink()
    patient.file.mkdir()


STORED = ("tokens-*", "tail-*", "blocks/*")
ALL = ("manifest.json", "journal", "head.json", *STORED)
MUTATIONS: dict[str, tuple[Callable[[Patient], None], tuple[str, ...]]] = {
    "bit flipped": (at_a_place(lambda chance, x: bytes([x[0] ^ 1 << chance.randrange(8)]), 1), ALL),
    "byte changed": (at_a_place(lambda chance, x: bytes([(x[0] + chance.randrange(1, 256)) % 256]), 1), ALL),
    "byte removed": (at_a_place(lambda chance, x: b"", 1), ALL),
    "byte inserted": (at_a_place(lambda chance, x: chance.randbytes(1), 0), ALL),
    "cut short": (of_bytes(lambda chance, content: content[: chance.randrange(len(content))]), ALL),
    "a byte cut off": (of_bytes(lambda chance, content: content[:-1]), ALL),
    "emptied": (of_bytes(lambda chance, content: b""), ALL),
    "zeroed in part": (at_a_place(lambda chance, x: bytes(len(x)), 64), ALL),
    "grown": (of_bytes(lambda chance, content: content + chance.randbytes(chance.randrange(1, 50))), ALL),
    "removed": (lambda patient: patient.file.unlink(), ALL),
    "made a folder": (made_a_folder, ALL),
    "exchanged": (exchanged, ALL),
    "swapped": (swapped, ("blocks/*",)),
    "replaced by another": (lambda p: shutil.copy(p.chance.choice(p.others()), p.file) and None, ("blocks/*",)),
    "forged": (forged, STORED),
    "lines cut off": (of_lines(lambda chance, lines: lines[: chance.randrange(len(lines))]), ("journal",)),
    "last line cut off": (of_lines(lambda chance, lines: lines[:-1]), ("journal",)),
    "line removed": (of_lines(lambda chance, lines: without(lines, chance.randrange(len(lines) - 1))), ("journal",)),
    "line repeated": (of_lines(lambda chance, lines: [*lines, chance.choice(lines)]), ("journal",)),
    "lines in another order": (of_lines(lambda chance, lines: chance.sample(lines, len(lines))), ("journal",)),
}
CASES = [(name, pattern) for name, (_, patterns) in MUTATIONS.items() for pattern in patterns]


def is_harmless(file: Path, before: bytes, after: bytes) -> bool:
    """Equivalent JSON; of a journal all that counts, or all but what came after the last end of a state."""
    if file.suffix == ".json":
        with suppress(ValueError):
            return bool(json.loads(before) == json.loads(after))
    if file.name == "journal":
        lines, whole = before.splitlines(keepends=True), after[: after.rfind(b"\n") + 1]
        ends = [n for n, line in enumerate(lines, 1) if b'"end"' in line]
        return before.startswith(whole) and whole.count(b"\n") >= ends[-1]
    return False


def asked(folder: Path, ids: array[int] | None) -> torch.Tensor | str:
    """An answer, or the error."""
    try:
        return answer(folder, ids=ids)
    except REFUSED as error:
        return str(error)


def all_damage(folder: Path) -> str:
    try:
        context = Context.read(folder)
    except ContextError as error:
        return str(error)
    return "\n".join(text for state in context.usable for text in context.damage(state, verify=True).values())


def gone_on_with(folder: Path, ids: array[int]) -> str:
    """Reads the rest, or returns the error."""
    try:
        keep(folder, ids, verify=True)
    except REFUSED as error:
        return str(error)
    return ""


@pytest.mark.parametrize("number", range(120), ids=lambda n: "{}, {} {}".format(n, *reversed(CASES[n % len(CASES)])))
def test_damage_is_named_and_no_answer_is_wrong(bases: list[Base], folder: Path, number: int) -> None:
    """Asked, the context gives the exact answer or names the damage; verification names it in any case. Reading resumes
    from what can be kept; where nothing can, nothing is touched."""
    name, pattern = CASES[number % len(CASES)]
    chance = random.Random(number)
    base = chance.choice(bases)
    shutil.copytree(base.folder, folder)
    file = chance.choice(sorted(folder.glob(pattern)))
    before, content = files(folder), file.read_bytes()
    MUTATIONS[name][0](Patient(file, folder, chance, base.folder.with_name(f"sibling of {base.folder.name}")))
    damaged = files(folder)
    assert damaged != before
    is_nothing = file.is_file() and is_harmless(file, content, file.read_bytes())
    found = all_damage(folder)
    assert str(folder) in found and file.name in found if not is_nothing else not found
    for ids in (base.ids, base.next_ids, None):  # read again behind what is kept, or not
        result, expected = asked(folder, ids), fresh_answer(base.ids if ids is None else ids)
        if isinstance(result, str):
            assert str(folder) in result and any(Path(name).name in result for name in before) and not is_nothing
        else:
            assert torch.equal(result, expected) or (ids and close(result, expected))
    assert files(folder) == damaged
    refusal = gone_on_with(folder, base.next_ids)
    if refusal:
        assert str(folder) in refusal and not is_nothing
        assert file.name in refusal or (file.name == "manifest.json" and "no saved context" in refusal)
        assert {name for name, content in files(folder).items() if content != damaged.get(name)} <= {"journal"}
    else:
        assert torch.equal(answer(folder), fresh_answer(base.next_ids))
        assert keep(folder, base.next_ids, verify=True) == len(base.next_ids)


@pytest.mark.parametrize("prefill_chunk_size", [CHUNK, 3 * BLOCK + 1])
@pytest.mark.parametrize("sealed", [0, 1])
def test_damage_amid_a_change_and_an_interruption_then(tmp_path: Path, sealed: int, prefill_chunk_size: int) -> None:
    """Whatever is missing, and wherever reading the rest is interrupted again."""
    kind = Kind(prefill_chunk_size=prefill_chunk_size)
    keep(tmp_path / "base", IDS, kind)
    keep(tmp_path / "base", LATER, kind, stop=4 * BLOCK if sealed else 0)
    for file in sorted(path.relative_to(tmp_path / "base") for path in (tmp_path / "base").rglob("*-*")):
        for stop in (0, 2 * BLOCK, 4 * BLOCK):
            folder = tmp_path / f"{file.name} {stop}"
            shutil.copytree(tmp_path / "base", folder)
            (folder / file).unlink()
            keep(folder, LATER, kind, stop=stop)
            keep(folder, LATER, kind)
            assert close(answer(folder, kind), fresh_answer(LATER, kind)), folder.name


OTHER = {
    "config": "f0" * 32,
    "weights": "f0" * 32,
    "tokenizer": "f0" * 32,
    "template": "f0" * 32,
    "dtype": "bfloat16",
    "kv_dtype": "int8",
    "attention": "eager",
    "prefill_chunk_size": 20,
    "block_tokens": 3 * CHUNK,
}


@pytest.mark.parametrize("name", OTHER)
def test_what_was_made_otherwise_is_refused_and_left_alone(folder: Path, name: str) -> None:
    keep(folder, IDS, stop=3 * BLOCK)
    before, mine, value = files(folder), Kind().recipe, OTHER[name]
    option = f"--{name.replace('_', '-')}"
    message = f"made with {option} {getattr(mine, name)}, not {value};" if name in CHOICES else rf"\({name} differs\)"
    with pytest.raises(ContextError, match=f"{folder}: .*{message}"):
        ContextWriter(folder, replace(mine, **{name: value}))
    with pytest.raises(ContextError, match=message):
        read_manifest(folder).check(folder, {name: value})
    with pytest.raises(ContextError, match=message):
        use_of(folder, name, value)
    assert files(folder) == before


def use_of(folder: Path, name: str, value: Any) -> None:
    """What `l4ctx prefill` compares before it touches anything."""
    given = {name: value} if name in CHOICES else {}
    use = ContextChoices.of(prefill_request(Path("model"), ["a.txt"], folder, **given))
    provenance = {field: value if field == name else getattr(Kind().recipe, field) for field in FIELDS}
    use.check(provenance, CONFIG)
    use.saved_layout(CONFIG, 1000, "float32")


@pytest.mark.parametrize("name", ["notes.txt", "head.json", "blocks/map.dat", "journal", "tail-0.txt"])
def test_a_folder_of_somebody_else_is_refused_and_left_alone(folder: Path, name: str) -> None:
    (folder / name).parent.mkdir(parents=True)
    (folder / name).write_text("Dear diary,\n")
    before = files(folder)
    with pytest.raises(ContextError, match=f"{folder}.*"):
        ContextWriter(folder, Kind().recipe)
    assert files(folder) == before
    with pytest.raises(ContextError, match="not a saved context"):
        ContextReader(folder)
    assert files(folder) == before


def test_a_file_in_the_folders_place_is_refused(folder: Path) -> None:
    folder.write_text("text")
    for use in (saved_recipe, ContextReader, lambda folder: ContextWriter(folder, Kind().recipe)):
        with pytest.raises(ContextError, match=str(folder)):
            use(folder)
    assert folder.read_text() == "text"


@pytest.mark.parametrize("name", ["blocks", "journal", "tail-*", "tokens-*", "blocks/000002-*"])
def test_links_are_not_followed(folder: Path, tmp_path: Path, name: str) -> None:
    keep(folder, IDS)
    (path,) = folder.glob(name)
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    before = files(tmp_path)
    with pytest.raises((ContextError, DiskError), match=str(path)):
        answer(folder, ids=IDS)
    if name in ("blocks", "journal"):
        with pytest.raises((ContextError, DiskError, DiskFullError), match=str(folder)):
            keep(folder, IDS)
        assert files(tmp_path) == before
    else:
        assert keep(folder, IDS) < len(IDS)
        assert torch.equal(answer(folder), fresh_answer(IDS))
        assert files(tmp_path)["elsewhere"] == before["elsewhere"]


def test_a_link_in_the_place_of_blocks_is_refused_at_first(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    folder.mkdir()
    (folder / "blocks").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ContextError, match="blocks: a symbolic link"):
        ContextWriter(folder, Kind().recipe)
    assert os.listdir(folder) == ["blocks"]


def test_what_is_not_ready_says_so(folder: Path) -> None:
    for text in ("no such folder", "not a saved context"):
        with pytest.raises(ContextError, match=f"{folder}: {text}"):
            ContextReader(folder)
        folder.mkdir(exist_ok=True)
    ContextWriter(folder, Kind().recipe).close()
    with pytest.raises(ContextError, match=f"{folder}: nothing was read yet"):
        ContextReader(folder)
    for stop, done in ((0, 0), (BLOCK, 32), (3 * BLOCK + CHUNK, 96), (len(IDS), 128)):
        keep(folder, IDS, stop=stop)
        with pytest.raises(ContextError, match=f"{folder}: .*interrupted after {done} of 151 tokens; .*l4ctx prefill"):
            ContextReader(folder)
