"""Small files that hold too much are refused before anything converts them; large honest ones are read."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from l4ctx.confinement.work import Refusal
from l4ctx.documents.office import bounds, convert, mail, sheets
from l4ctx.documents.office.archive import Archive, look
from l4ctx.documents.office.bounds import bounded_page, check_rich_text
from l4ctx.documents.office.convert import OfficeError, read_office
from l4ctx.documents.office.mail import mail_text
from l4ctx.documents.office.sheets import sheets_text
from support.office_files import archive, docx, paragraph, xlsx

ODT = ("mimetype", "application/vnd.oasis.opendocument.text")
TEXT = '<office:text xmlns:office="o" xmlns:text="t">{}</office:text>'


def book(page: str, spine: str = "<itemref/>") -> bytes:
    return archive([("mimetype", "application/epub+zip"), ("a.opf", f"<spine>{spine}</spine>"), ("a.xhtml", page)])


HOSTILE: dict[str, tuple[Callable[[], object], str]] = {
    "cells without a value": (
        lambda: look(Archive(xlsx("<row>" + "<c/>" * 1_000_100 + "</row>"))),
        "1,000,000 elements (paragraphs, cells, formats) in a row",
    ),
    "formats of a workbook": (
        lambda: look(Archive(archive([("xl/workbook.xml", "<w/>"), ("xl/styles.xml", "<x/>" * 500_001)]))),
        "500,000 elements (paragraphs, cells, formats) in xl/styles.xml",
    ),
    "deep DOCX": (lambda: look(Archive(docx("<w:sdt>" * 2001))), "nested more than 2,000 deep"),
    "deep ODT": (
        lambda: look(Archive(archive([ODT, ("content.xml", TEXT.format("<text:p>" * 2001))]))),
        "nested more than 2,000 deep",
    ),
    "spaces of an ODT": (
        lambda: look(
            Archive(archive([ODT, ("content.xml", TEXT.format('<text:p><text:s text:c="9999999"/></text:p>'))]))
        ),
        "it repeats spaces",
    ),
    "one slide many times": (
        lambda: look(
            Archive(
                archive(
                    [
                        ("ppt/presentation.xml", '<p xmlns:r="r">' + '<r:sldId r:id="a"/>' * 2 + "</p>"),
                        (
                            "ppt/_rels/presentation.xml.rels",
                            '<r:r xmlns:r="r"><r:Relationship Id="a" Target="a.xml"/></r:r>',
                        ),
                        ("ppt/a.xml", "<a/>"),
                    ]
                )
            )
        ),
        "a slide is listed twice",
    ),
    "one chapter many times": (lambda: look(Archive(book("<p/>", "<itemref/>" * 4))), "a chapter is listed twice"),
    "lists of a book": (lambda: look(Archive(book("<ul><li>" * 30))), "a.xhtml has lists without an end"),
    "elements of a page": (lambda: bounded_page(b"<i>" * 250_001), "250,000 elements"),
    "a deep page": (lambda: bounded_page(b"<div>" * 2001), "nested more than 2,000 deep"),
    "tables in tables": (lambda: bounded_page(b"<table><tr><td>" * 51), "tables within tables"),
    "spans of a page": (lambda: bounded_page(b'<td colspan=999 rowspan="65000">' * 401), "span more than 4,000,000"),
    "deep RTF": (lambda: check_rich_text(rb"{\rtf1 " + b"{" * 2000), "nested more than 2,000 deep"),
    "paragraphs of RTF": (lambda: check_rich_text(rb"\par " * 200_001), "200,000 paragraphs"),
    "parts of parts": (
        lambda: mail_text(b"Content-Type: multipart/mixed; boundary=a\n\n" * 1001),
        "1,000 parts that hold parts",
    ),
    "a long field": (
        lambda: mail_text(b"Content-Type: text/plain" + b';";' * 6000 + b"\n\nx"),
        "a field Content-Type of 18,",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_holds_too_much_is_refused(name: str) -> None:
    read, reason = HOSTILE[name]
    with pytest.raises(Refusal) as caught:
        read()
    assert reason in str(caught.value)


def test_millions_of_empty_paragraphs_are_refused_in_one_line() -> None:
    with pytest.raises(OfficeError) as caught:
        read_office("docx", docx("<w:p/>" * 4_000_000))
    assert str(caught.value) == (
        "a Word document (DOCX); it has more than 4,000,000 elements (paragraphs, cells, formats) "
        "(save it as PDF or text)"
    )


def test_parts_of_an_email_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mail, "_MOST_PARTS", 8)  # the email itself, and one that the parser makes to try
    raw = b"Content-Type: multipart/mixed; boundary=a\n\n%s--a--\n"
    assert mail_text(raw % (b"--a\n\nx\n" * 6)).text.count("x") == 6
    with pytest.raises(Refusal, match="more than 8 parts"):
        mail_text(raw % (b"--a\n\nx\n" * 7))


def test_a_string_that_many_cells_refer_to_and_cells_far_away_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    text = '<row><c t="inlineStr"><is><t>{0}</t></is></c><c t="inlineStr"><is><t>{0}</t></is></c></row>'
    monkeypatch.setattr(sheets, "MOST_TEXT", 40)
    assert "| long text | long text |" in sheets_text(xlsx(text.format("long text")))[0]
    with pytest.raises(Refusal, match="of text"):
        sheets_text(xlsx(text.format("a longer text than that")))
    monkeypatch.setattr(sheets, "MOST_CELLS", 16_384)
    with pytest.raises(Refusal, match="too wide: more than 16,384 cells"):
        sheets_text(xlsx('<row r="1"><c r="XFD1"><v>2</v></c></row><row r="2"><c r="B2"/></row>'))


def test_lists_without_an_end_are_closed_and_spans_are_bounded() -> None:
    page, count = bounded_page(b"<html><!-- <ul> --><script>'<ul>'</script><ul><li>a<ul><li>b</ul><td colspan='7000'>")
    assert page.endswith(b"<td colspan='100'></ul>") and count == 6
    text, _ = read_office("html", b"<html>" + b"<ul><li>" * 40 + b"words")
    assert "words" in text


def test_of_a_large_document_all_paragraphs_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert, "MOST_CONVERTED", 10)
    note = '<w:footnotes xmlns:w="http://schemas.openxmlformats.org/wordprocessingml/2006/main">{}</w:footnotes>'
    parts = ("word/footnotes.xml", note.format(paragraph("a note")))
    text, notes = read_office("docx", docx(paragraph("first") + paragraph("second"), parts))
    assert text == "first\n\nsecond\n\na note\n\n"
    assert len(notes) == 1 and notes[0].startswith("read paragraph by paragraph, without headings, lists")
    assert convert._by_paragraph([(1, "a"), (3, "b"), (3, "c")]) == (
        '<slide number="1">\n\na\n\n</slide>\n\n<slide number="3">\n\nb\n\nc\n\n</slide>\n'
    )
    assert bounds.MOST_CONVERTED < bounds.MOST_ELEMENTS
