"""Office documents, emails and web pages as text: what is in them, and what is said to be missing."""

from __future__ import annotations

import base64
import datetime
import io
from pathlib import Path

import openpyxl
import pytest
from PIL import Image

from l4ctx.documents.office import convert
from l4ctx.documents.office.convert import OfficeError, read_office
from l4ctx.documents.office.formats import is_email, is_html
from l4ctx.documents.office.missing import restored
from l4ctx.documents.office.rich_text import in_unicode
from l4ctx.documents.reader import read_documents
from support.office_files import WORD, by_pandoc, docx, paragraph

MARKDOWN = """---
title: The report
---

# First part

The **risk** is 10^2^ times higher.[^1] See [the plan](https://example.org/plan), ![a chart](picture.png) and $x^2$.

[^1]: Says the auditor.

| name | amount |
|------|--------|
| oak  | 12     |
| elm  | 7      |

# Second part

- one
- two
"""
ODT_LOSSES = ["not read: 1 picture, 1 embedded object (formula or chart)"]
TABLE = "| name | amount |\n| oak | 12 |\n| elm | 7 |\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("office")
    Image.new("RGB", (8, 8), "red").save(made / "picture.png")
    return made


@pytest.mark.parametrize("format", ["docx", "odt", "epub", "html", "pptx"])
def test_text_headings_tables_and_notes_are_read(folder: Path, format: str) -> None:
    text, notes = read_office(format, by_pandoc(MARKDOWN, format, folder))
    assert "# First part\n" in text and TABLE in text, text
    assert "The report" in text and "Says the auditor." in text and "two" in text
    if format == "pptx":  # pandoc's own slide has this in a shape that it does not read
        assert "The risk is 102 times higher.1 See the plan" in text
        return
    assert "The risk is 10² times higher." in text and "See the plan" in text and "\n- two" in text
    assert "See the plan <https://example.org/plan>" in text and "[picture" in text
    assert notes == (["not read: 1 picture"] if format != "odt" else ODT_LOSSES)
    assert ("$x^{2}$" if format == "docx" else "x") in text


def test_slides_are_numbered(folder: Path) -> None:
    text, _ = read_office("pptx", by_pandoc("# One\n\nfirst\n\n# Two\n\nsecond", "pptx", folder, "--slide-level=1"))
    assert (
        '<slide number="1">\n\n## One\n\nfirst\n\n</slide>\n<slide number="2">\n\n## Two\n\nsecond\n\n</slide>' in text
    )


def test_sheets_are_tables_with_names_and_cached_values() -> None:
    workbook, kept = openpyxl.Workbook(), io.BytesIO()
    first = workbook.active
    first.title = 'The "first"'
    for row in (["day", "sum", None], [datetime.date(2026, 3, 1), 12.0, None], [], ["a|b", True, 0.25]):
        first.append(row)
    hidden = workbook.create_sheet("Other")
    hidden.append(["=1+1"])  # no program has computed it, so nothing is cached
    hidden.sheet_state = "hidden"
    workbook.save(kept)
    text, notes = read_office("xlsx", kept.getvalue())
    assert text == (
        "<sheet name=\"The 'first'\">\n| day | sum |\n| 2026-03-01 | 12 |\n| a\\|b | TRUE | 0.25 |\n</sheet>\n"
        '<sheet name="Other">\n</sheet>\n'
    )
    assert notes == [
        "not read: 1 formula without a value (open it in a spreadsheet and save it)",
        "1 hidden sheet, read like the others",
    ]


def test_changes_comments_and_headers_are_told() -> None:
    body = (
        '<w:p><w:r><w:t xml:space="preserve">It is </w:t></w:r><w:del w:id="1" w:author="A"><w:r><w:delText>old'
        '</w:delText></w:r></w:del><w:ins w:id="2" w:author="A"><w:r><w:t>new</w:t></w:r></w:ins></w:p>'
    )
    header = ("word/header1.xml", f'<w:hdr {WORD}>'
              f"{paragraph('secret')}</w:hdr>")  # fmt: skip
    text, notes = read_office("docx", docx(body, header, ("word/vbaProject.bin", b"macro")))
    assert text == "It is new\n"
    assert notes == ["not read: headers and footers of pages, macros, 1 tracked deletion"]


def test_words_that_a_conversion_loses_are_put_back() -> None:
    """Such as the text of a box without a fallback."""
    namespaces = (
        'xmlns:v="urn:schemas-microsoft-com:vml" '
        'xmlns:mc="http://schemas.openxmlformats.org/markup-compatibility/2006" '
        'xmlns:wps="http://schemas.microsoft.com/office/word/2010/wordprocessingShape"'
    )
    box = (
        '<w:p><w:r><mc:AlternateContent><mc:Choice Requires="wps"><w:drawing><wps:txbx><w:txbxContent>'
        f"{paragraph('in the box')}</w:txbxContent></wps:txbx></w:drawing></mc:Choice></mc:AlternateContent></w:r>"
        "<w:r><w:t>seven words that are beside that box</w:t></w:r></w:p>"
    )
    text, notes = read_office("docx", docx(paragraph("whole") + box, more=namespaces))
    assert text == "whole\n\nseven words that are beside that box\n\nin the box\n\n"
    assert notes == ["3 words in shapes or groups, which pandoc leaves out, stand at the end of the text"]


def test_paragraphs_that_are_lacking_return_to_their_slides() -> None:
    text = '<slide number="1">\n\nfirst words\n\n</slide>\n<slide number="2">\n\nlater words\n\n</slide>\n'
    body = [(1, "first words"), (1, "in a group"), (2, "later words"), (2, "first words")]
    whole, notes = restored(text, body)
    assert whole == (
        '<slide number="1">\n\nfirst words\n\nin a group\n\n</slide>\n'
        '<slide number="2">\n\nlater words\n\nfirst words\n\n</slide>\n'
    )
    assert notes == ["5 words in shapes or groups, which pandoc leaves out, stand at the end of their slides"]
    assert restored(text, [(1, "first words"), (2, "later: words")]) == (text, [])


MAIL = (
    b"From: Anna <anna@example.org>\r\nTo: =?utf-8?q?J=C3=BCrgen?= <j@example.org>\r\nSubject: =?utf-8?b?w5xiZXI=?=\r\n"
    b"Date: Thu, 1 Jan 2026 10:00:00 +0000\r\nMIME-Version: 1.0\r\nContent-Type: multipart/mixed; boundary=x\r\n\r\n"
    b"--x\r\nContent-Type: multipart/alternative; boundary=y\r\n\r\n"
    b"--y\r\nContent-Type: text/plain; charset=iso-8859-1\r\nContent-Transfer-Encoding: quoted-printable\r\n\r\n"
    b"Gr=FC=DFe\r\n--y\r\nContent-Type: text/html\r\n\r\n<p>no</p>\r\n--y--\r\n"
    b"--x\r\nContent-Type: application/pdf; name=bill.pdf\r\nContent-Transfer-Encoding: base64\r\n"
    b"Content-Disposition: attachment; filename=bill.pdf\r\n\r\nJVBERi0=\r\n--x--\r\n"
)
PAGE = (
    b"From: a@example.org\nSubject: s\nMessage-ID: <1@x>\nContent-Type: text/html; charset=utf-8\n"
    b"Content-Transfer-Encoding: base64\n\n" + base64.b64encode("<p>Grüße <b>alle</b></p>".encode())
)


def test_an_email_is_its_usual_fields_and_its_text(tmp_path: Path) -> None:
    (tmp_path / "a.eml").write_bytes(MAIL)
    found = read_documents([tmp_path / "a.eml"], stdin=None)
    assert found.documents[0].text == (
        "From: Anna <anna@example.org>\nTo: Jürgen <j@example.org>\nDate: Thu, 1 Jan 2026 10:00:00 +0000\n"
        "Subject: Über\n\nGrüße\n"
    )
    assert [note.partition(": ")[2] for note in found.notes] == ["not read: 1 attachment (bill.pdf)"]
    as_it_is = read_documents([tmp_path / "a.eml"], stdin=None, keep_payload=True)
    assert as_it_is.documents[0].text == MAIL.decode()


def test_an_emails_page_is_converted_where_that_is_possible(monkeypatch: pytest.MonkeyPatch) -> None:
    text, notes = read_office("eml", PAGE)
    assert text.rstrip() == "From: a@example.org\nSubject: s\n\nGrüße alle" and notes == []
    monkeypatch.setattr(convert, "has_support", lambda: False)
    text, notes = read_office("eml", PAGE)
    assert "<p>Grüße <b>alle</b></p>" in text and "l4ctx[office]" in notes[0]


@pytest.mark.parametrize(
    "text",
    [
        b"From: me\nTo: you\n\nnot sent",
        b"From 1a2b Mon Sep 17 00:00:00 2001\nFrom: A\nDate: x\nSubject: [PATCH] y\nMessage-ID: <1>\n\nz",
        b"Subject: about MIME-Version:\n\nMIME-Version: is a field",
        b"key: value\nother: value\n",
    ],
)
def test_what_a_person_writes_is_no_email(text: bytes) -> None:
    assert not is_email(text) and is_email(MAIL) and is_email(PAGE)


def test_web_pages_are_source_unless_their_text_is_wanted(tmp_path: Path) -> None:
    page = (
        '<!DOCTYPE html><html><head><meta charset="windows-1251"><title>T</title></head><body><p>Привет, мир</p></body>'
    )
    (tmp_path / "a.html").write_bytes(page.encode("cp1251"))
    (tmp_path / "b.txt").write_text("about <html>")
    source, text = (read_documents([tmp_path], stdin=None, html=html).documents for html in ("source", "text"))
    assert "<title>T" in source[0].text and text[0].text == "# T\n\nПривет, мир\n"
    assert source[1].text == text[1].text == "about <html>" and not is_html(b"text <html>")


def test_bytes_of_rich_text_are_read_in_the_code_page_of_their_font() -> None:
    fonts = rb"{\fonttbl{\f0\fcharset0 A;}{\f1\fcharset128 B;}{\f2\fcharset204 C;}}"
    russian, japanese = (
        "".join(rf"\'{byte:02x}" for byte in text) for text in ("мир".encode("cp1251"), "表示".encode("cp932"))
    )
    raw = rb"{\rtf1\ansi\ansicpg1252" + fonts + rf"\f0 caf\'e9 {{\f1 {japanese}}} \f2 {russian} \u1078\'3f x}}".encode()
    assert read_office("rtf", raw)[0] == "café 表示 мир ж x\n"
    plain = rb"{\rtf1\ansi words}"
    assert in_unicode(plain) == plain


def test_without_the_extra_one_line_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert, "has_support", lambda: False)
    (tmp_path / "a.docx").write_bytes(docx(paragraph("words")))
    found = read_documents([tmp_path], stdin=None)
    assert found.skipped[0].reason == 'a Word document (DOCX); pip install "l4ctx[office]" adds what reads it'


def test_a_document_without_text_says_what_it_has(folder: Path) -> None:
    with pytest.raises(OfficeError, match=r"^a Word document \(DOCX\); without text$"):
        read_office("docx", docx("<w:p/>"))
