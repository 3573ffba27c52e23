"""Office documents that are made to harm cost a line: time and memory have bounds, and nothing outside is reached."""

from __future__ import annotations

import dataclasses
import io
import zipfile
from pathlib import Path

import pytest

from l4ctx.confinement.process import ChildFailedError, Limits, NoChildError
from l4ctx.confinement.program import run_program
from l4ctx.documents.office import convert
from l4ctx.documents.office.convert import OfficeError, pandoc_path, read_office
from support.office_files import docx, paragraph, xlsx

LIMITS = Limits(2 << 30, 60, 60, 1 << 20)
LAUGHS = "<!DOCTYPE l [<!ENTITY a0 'lol'>" + "".join(
    f"<!ENTITY a{number} '{f'&a{number - 1};' * 10}'>" for number in range(1, 10)
)


def refused(format: str, raw: bytes) -> str:
    with pytest.raises(OfficeError) as caught:
        read_office(format, raw)
    assert "\n" not in str(caught.value) and str(caught.value).startswith(convert.NAMES[format])
    return str(caught.value)


def test_a_zip_bomb_is_refused_by_what_it_says_it_unpacks_to() -> None:
    raw = bytearray(docx(paragraph("x")))
    at = raw.rindex(b"word/document.xml") - 46  # its entry in the central directory
    assert raw[at : at + 4] == b"PK\1\2"
    raw[at + 24 : at + 28] = (1 << 31).to_bytes(4, "little")
    assert "it unpacks to 2.0 GiB, which is more than 512 MiB" in refused("docx", bytes(raw))


def test_a_zip_bomb_that_lies_is_broken() -> None:
    raw = bytearray(docx(paragraph("x" * (8 << 20))))
    for signature, offset in ((b"PK\1\2", 24), (b"PK\3\4", 22)):
        name = raw.rindex(b"word/document.xml") if signature == b"PK\1\2" else raw.index(b"word/document.xml")
        at = raw.rindex(signature, 0, name)
        raw[at + offset : at + offset + 4] = (100).to_bytes(4, "little")
    assert "it is broken: " in refused("docx", bytes(raw))


def test_what_is_no_text_is_not_unpacked() -> None:
    text, _ = read_office("docx", docx(paragraph("words"), ("word/media/image1.png", bytes(32 << 20))))
    assert text == "words\n"


def test_entities_neither_expand_without_end_nor_read_files(tmp_path: Path) -> None:
    assert "it is broken: " in refused("docx", docx(paragraph("&a9;"), before=LAUGHS + "]>"))
    (tmp_path / "secret.txt").write_text("the secret")
    external = f"<!DOCTYPE l [<!ENTITY x SYSTEM '{(tmp_path / 'secret.txt').as_uri()}'>]>"
    assert "secret" not in refused("docx", docx(paragraph("&x;"), before=external)).partition("broken")[2]


def test_paths_that_leave_write_nothing(tmp_path: Path) -> None:
    evil = ("../" * 20 + str(tmp_path / "evil.txt").lstrip("/"), str(tmp_path / "evil.txt"))
    text, _ = read_office("docx", docx(paragraph("words"), *((name, b"evil") for name in evil)))
    assert text == "words\n" and list(tmp_path.iterdir()) == []


def test_an_encrypted_archive_says_so() -> None:
    raw = bytearray(docx(paragraph("x")))
    at = raw.index(b"PK\1\2")
    raw[at + 8] |= 1
    assert "it is encrypted: save it without a password" in refused("docx", bytes(raw))


def test_a_cell_far_away_costs_a_line() -> None:
    raw = xlsx('<row r="1"><c r="A1"><v>1</v></c></row><row r="1048576"><c r="XFD1048576"><v>2</v></c></row>')
    text, _ = read_office("xlsx", raw)
    assert (
        text.startswith('<sheet name="One">\n| 1 |\n|  |') and text.endswith("| 2 |\n</sheet>\n") and len(text) < 65536
    )


def test_broken_documents_are_named() -> None:
    whole = docx(paragraph("words"))
    assert "it is broken: " in refused("docx", whole[:-30])
    assert "it is broken: " in refused("xlsx", xlsx("<row"))
    kept = io.BytesIO()
    with zipfile.ZipFile(kept, "w") as file:
        file.writestr("a.txt", "words")
    assert "it is neither DOCX, PPTX nor XLSX" in refused("ooxml", kept.getvalue())


def test_what_takes_too_long_or_too_much_is_bounded_in_memory_and_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert, "HEAP", 48 << 20)
    assert "pandoc needs more than 48.0 MiB of memory" in refused("html", b"<html>" + b"<p>x" * 20_000)
    monkeypatch.undo()
    monkeypatch.setattr(convert, "_PANDOC", dataclasses.replace(convert._PANDOC, processor_seconds=0.1))
    assert "it cannot be read within" in refused("html", b"<html>" + b"<p>x" * 20_000)


def test_emails_within_emails_end() -> None:
    raw = b"words"
    for _ in range(40):
        raw = b"From: a\nSubject: s\nMIME-Version: 1.0\nContent-Type: message/rfc822\n\n" + raw
    text, notes = read_office("eml", raw)
    assert text.count("From: a") == 6 and notes == ["not read: 1 attachment (an email within emails)"]


def program() -> str:
    found = pandoc_path()
    assert found is not None
    return found


def test_a_program_opens_and_starts_nothing(tmp_path: Path) -> None:
    """As far as this kernel allows: see what `l4ctx inspect` says of it."""
    held = convert.CHILD.held()
    (tmp_path / "secret.txt").write_text("the secret")
    opened = run_program([program(), str(tmp_path / "secret.txt")], b"", LIMITS)
    assert "landlock" not in held or (opened.code != 0 and b"secret\n" not in opened.text)
    allowed = run_program([program(), str(tmp_path / "secret.txt")], b"", LIMITS, [str(tmp_path / "secret.txt")])
    assert allowed.code == 0 and allowed.text == b"<p>the secret</p>\n"
    started = run_program([program(), "--filter", "/bin/cat"], b"words", LIMITS)
    assert held == [] or started.code != 0


def test_a_program_says_no_more_than_it_may_and_is_named_where_it_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ChildFailedError, match="says too much"):
        run_program([program(), "-t", "plain"], b"words " * 1000, dataclasses.replace(LIMITS, reply=100))
    with pytest.raises(ChildFailedError, match="takes too long"):
        run_program([program()], b"x", dataclasses.replace(LIMITS, seconds=0.0))
    with pytest.raises(NoChildError, match="No such file"):
        run_program([str(tmp_path / "none")], b"", LIMITS)
