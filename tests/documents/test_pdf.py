"""Pages of PDFs as text and as images; broken and locked documents are refused in one line."""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from l4ctx.documents.images import DocumentImage, ImageError, pixels_digest
from l4ctx.documents.pdf import PAGE_PIXELS, PDF_MODES, PdfError, PdfSupportMissing, is_pdf, read_pdf
from support import pdf_toys
from support.pdf_toys import SCANNED, Page, assembled, mark, pdf, stream, text

if TYPE_CHECKING:
    from collections.abc import Iterator

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


@pytest.fixture(autouse=True)
def _nothing_is_left(capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    """No test leaves an open file, beside the pipes to pdfium's process, or a line of pdfium's on the terminal."""
    read(pdf(Page(text(b"words"))))
    before = len(os.listdir("/proc/self/fd")) if sys.platform == "linux" else 0
    yield
    gc.collect()
    assert sys.platform != "linux" or len(os.listdir("/proc/self/fd")) <= before
    assert capfd.readouterr() == ("", "")


def read(raw: bytes, mode: str = "text", path: Path | None = None) -> tuple[list[str | DocumentImage], list[str]]:
    return read_pdf("report.pdf", raw, path and str(path), mode=mode)


def read_text(raw: bytes) -> str:
    content, _ = read(raw)
    return "".join(piece for piece in content if isinstance(piece, str))


def images(raw: bytes, path: Path | None = None) -> list[DocumentImage]:
    content, notes = read(raw, "pages", path)
    assert notes == []
    return [piece for piece in content if isinstance(piece, DocumentImage)]


def test_text_comes_page_by_page() -> None:
    raw = pdf(Page(text(b"first line", b"second line")), Page(text(b"last page")))
    assert read_text(raw) == (
        '<page number="1">\nfirst line\nsecond line\n</page>\n<page number="2">\nlast page\n</page>\n'
    )
    assert read(raw)[1] == []


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (text(rb"caf\351 \200 \223q\224"), "café € “q”"),
        (text(b"c A B C D", font=b"F2"), "c é 中 \U0001f600 fi"),
        (text(b"exam-", b"ple, well-known, 3-", b"4"), "example, well-known, 3-\n4"),
        (text(b"xEy", font=b"F2"), "xy"),
        (text(b"xFyGz", font=b"F2"), "x\ufffdyz"),
        (text(b"xHy", font=b"F2"), "x\ny"),
        (text(b"G" * 3000 + b"x" + b"G" * 3000, font=b"F2"), "x"),
        (text(b"x", b"", b"y  z"), "x\ny z"),
        (b"3 Tr " + text(b"invisible"), "invisible"),  # as over scanned pages
        (text(rb"a \(literal\) </page> <|eot|>"), "a (literal) </page> <|eot|>"),
    ],
)
def test_characters_are_what_a_reader_sees(content: bytes, expected: str) -> None:
    assert read_text(pdf(Page(content))) == f'<page number="1">\n{expected}\n</page>\n'


def test_nothing_of_a_long_page_is_cut() -> None:
    words = [b"%05d" % number for number in range(20_000)]
    long = text(*(b" ".join(words[at : at + 20]) for at in range(0, len(words), 20)))
    assert read_text(pdf(Page(long, b"/MediaBox [0 -14000 1200 200]"))).split()[2:-1] == [w.decode() for w in words]


def test_pages_without_text_are_noted() -> None:
    raw = pdf(Page(text(b"one")), SCANNED, Page(text(b"three")), *[SCANNED] * 3)
    content, notes = read(raw)
    assert content[1] == '<page number="2">\n</page>\n' and len(content) == 6
    assert notes == ["4 of 6 pages have no text (scanned?): 2, 4-6; --pdf pages reads them as images"]
    assert read(raw, "both")[1] == ["4 of 6 pages have no text (scanned?): 2, 4-6"]
    assert read(raw, "pages")[1] == []
    every_second = pdf(*[Page(text(b"words")), SCANNED] * 8, SCANNED)
    assert read(every_second, "both")[1] == ["9 of 17 pages have no text (scanned?): 2, 4, 6, 8, 10, and 4 more"]
    assert read(pdf(Page(text(b"one")), SCANNED), "both")[1] == ["1 of 2 pages has no text (scanned?): 2"]


def test_a_scanned_document_has_only_images() -> None:
    raw = pdf(SCANNED, SCANNED)
    with pytest.raises(PdfError, match=r"^a PDF without text \(scanned\?\); --pdf pages reads its pages as images$"):
        read(raw)
    image = images(raw)[0].decode()
    assert image.mode == "RGB" and image.getpixel((10, 10)) == BLUE and image.getpixel((1300, 800)) == GREEN


def test_text_and_image_stand_in_one_page() -> None:
    content, _ = read(pdf(Page(text(b"words")), SCANNED), "both")
    assert [type(piece).__name__ for piece in content] == ["str", "DocumentImage", "str"] * 2
    assert content[0] == '<page number="1">\nwords\n' and content[2] == "\n</page>\n"
    assert content[3] == '<page number="2">\n'
    only_images, _ = read(pdf(Page(text(b"words"))), "pages")
    assert only_images[0] == '<page number="1">\n' and only_images[2] == "\n</page>\n"


@pytest.mark.parametrize(
    ("box", "entries", "size", "red_at"),
    [
        (b"/MediaBox [0 0 300 200]", b"", (1344, 896), "upper left"),
        (b"/MediaBox [0 0 300 200]", b"/Rotate 90", (896, 1344), "upper right"),
        (b"/MediaBox [0 0 300 200]", b"/Rotate 180", (1344, 896), "lower right"),
        (b"/MediaBox [0 0 300 200]", b"/Rotate 270", (896, 1344), "lower left"),
        (b"/MediaBox [0 0 300 200] /CropBox [50 50 250 150]", b"", (1344, 672), "upper left"),
        (b"/MediaBox [0 0 300 200] /CropBox [50 50 250 150]", b"/Rotate 90", (672, 1344), "upper right"),
        (b"/MediaBox [0 0 300 200]", b"/UserUnit 10", (1344, 896), "upper left"),
        (b"/MediaBox [300 200 0 0]", b"", (1344, 896), "upper left"),
        (b"/MediaBox [-20000 -20000 20000 20000]", b"", (1344, 1344), None),
        (b"/MediaBox [0 0 0.3 0.2]", b"", (1344, 896), None),
        (b"/MediaBox [0 0 100 10000]", b"", (13, 1344), None),
        (b"/MediaBox [0 0 0 0]", b"", (1039, 1344), None),  # US Letter, as pdfium has it
        (b"", b"", (1039, 1344), None),
    ],
)
def test_an_image_is_the_page_as_shown(box: bytes, entries: bytes, size: tuple[int, int], red_at: str | None) -> None:
    (shown,) = images(pdf(Page(mark(), box, entries)))
    image = shown.decode()
    assert (shown.width, shown.height) == image.size == size and max(size) == PAGE_PIXELS
    assert shown.memory > 100 * 2**20  # that of pdfium's process is in it
    assert (image.mode, shown.source) == ("RGB", "report.pdf, page 1")
    quarters = {
        f"{row} {column}": image.getpixel((size[0] * across // 8, size[1] * down // 8))
        for row, down in (("upper", 1), ("lower", 7))
        for column, across in (("left", 1), ("right", 7))
    }
    if red_at:
        assert quarters == dict.fromkeys(quarters, WHITE) | {red_at: RED}


def test_pages_without_an_area_are_noted() -> None:
    outside = Page(text(b"words"), b"/MediaBox [0 0 300 200] /CropBox [400 400 500 500]")
    line = Page(mark(), b"/MediaBox [0 0 1 100000]")
    content, notes = read(pdf(outside, Page(), line), "pages")
    assert len(content) == 3 and isinstance(content[1], DocumentImage) and content[1].source == "report.pdf, page 2"
    assert notes == [
        "1 of 3 pages cannot be drawn (without an area): 1",
        "1 of 3 pages cannot be drawn (too narrow): 3",
    ]
    assert read(pdf(outside), "both")[0] == ['<page number="1">\nwords\n</page>\n']
    with pytest.raises(PdfError, match=r"nothing can be read: 1 of 1 page cannot be drawn \(without an area\): 1$"):
        read(pdf(outside), "pages")


def test_an_image_is_the_same_every_time() -> None:
    raw = pdf(Page(text(b"words") + mark()), Page(text(b"words") + mark()))
    first, second = images(raw)
    assert first.decode().tobytes() == first.decode().tobytes() == second.decode().tobytes()
    assert first.sha256 == second.sha256 == pixels_digest(first.width, first.height, first.decode().tobytes())
    others = images(pdf(Page(text(b"words")), Page(text(b"words") + mark(), b"/MediaBox [0 0 300 201]")))
    assert len({first.sha256, *(shown.sha256 for shown in others)}) == 3


def test_a_file_that_changed_is_not_drawn(tmp_path: Path) -> None:
    path = tmp_path / "report.pdf"
    path.write_bytes(raw := pdf(Page(mark()), Page(mark(b"0 1 0"))))
    first, second = images(raw, path)
    assert second.decode().getpixel((10, 10)) == GREEN
    for other in (Page(mark(b"0 0 1")), Page(mark(), b"/MediaBox [0 0 300 201]")):
        path.write_bytes(pdf(other))
        with pytest.raises(ImageError, match=r"^report\.pdf, page 1: changed since it was first read$"):
            first.decode()
    with pytest.raises(ImageError, match=r"^report\.pdf, page 2: changed since it was first read \(cannot be loaded"):
        second.decode()
    path.write_bytes(b"words")
    with pytest.raises(ImageError, match=r"^report\.pdf, page 1: changed since it was first read \(a broken PDF"):
        first.decode()
    path.unlink()
    with pytest.raises(ImageError, match=r"^report\.pdf, page 2: cannot be read any more: No such file"):
        second.decode()
    path.write_bytes(raw)
    assert first.decode().getpixel((10, 10)) == RED


def test_pages_that_are_added_change_no_others(tmp_path: Path) -> None:
    path, pages = tmp_path / "report.pdf", [Page(mark()), Page(mark(b"0 1 0")), Page(mark(b"0 0 1"))]
    path.write_bytes(raw := pdf(*pages[:2]))
    before = images(raw, path)
    path.write_bytes(raw := pdf(*pages))
    assert [shown.sha256 for shown in images(raw, path)][:2] == [shown.sha256 for shown in before]
    assert [shown.decode().getpixel((10, 10)) for shown in before] == [RED, GREEN]


def test_a_path_is_where_this_process_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that runs pdfium may be elsewhere."""
    (tmp_path / "a").mkdir()
    for name, color in (("report.pdf", b"0 0 1"), ("a/report.pdf", b"1 0 0")):
        (tmp_path / name).write_bytes(pdf(Page(mark(color))))
    monkeypatch.chdir(tmp_path / "a")
    (shown,) = images(pdf(Page(mark())), Path("report.pdf"))
    assert shown.decode().getpixel((10, 10)) == RED
    (tmp_path / "a/report.pdf").unlink()
    (tmp_path / "a").rmdir()
    with pytest.raises(ImageError, match=r"^report\.pdf, page 1: cannot be read any more: No such file"):
        shown.decode()


def form(*fields: bytes) -> bytes:
    """A page for each field, which is in its upper left quarter. LOOK: drawn in red, with the word "Ada"."""
    first = 8 + 2 * len(fields)
    objects = pdf_toys.objects_of(
        [Page(text(b"Name:"), entries=b"/Annots [%d 0 R]" % (first + at)) for at in range(len(fields))]
    )
    script = b"/OpenAction << /S /JavaScript /JS (app.alert\\(1\\)) >> "
    numbers = b" ".join(b"%d 0 R" % (first + at) for at in range(len(fields)))
    objects[0] = b"<< /Type /Catalog /Pages 2 0 R /AcroForm << /Fields [" + numbers + b"] >> " + script + b">>"
    look = b"/Type /XObject /Subtype /Form /BBox [0 0 150 100] /Resources << /Font << /F1 3 0 R >> >> "
    drawn = mark(box=b"0 0 150 100") + b" 0 g BT /F1 12 Tf 50 50 Td (Ada) Tj ET"
    widget = b"<< /Type /Annot /Subtype /Widget /FT /Tx /T (n) /F 4 /Rect [0 100 150 200] "
    filled = [widget + field.replace(b"LOOK", b"/AP << /N %d 0 R >>" % (first - 1)) + b" >>" for field in fields]
    return pdf_toys.assembled([*objects, pdf_toys.stream(drawn, look), *filled])


def test_a_form_is_read_as_if_printed() -> None:
    raw = form(b"/V (Ada) LOOK", b"/V (Ada) LOOK")
    content, notes = read(raw)
    assert [piece.count("Ada") for piece in content if isinstance(piece, str)] == [1, 1] and notes == []
    assert [shown.decode().getpixel((10, 10)) for shown in images(raw)[::-1] * 2] == [RED] * 4
    undrawn = form(b"/V (Ada)", b"/V (Ada) LOOK", b"")
    for mode in PDF_MODES:
        assert read(undrawn, mode)[1] == ["1 form field(s) without an appearance are not read (print it to a PDF)"]


def test_annotations_are_drawn() -> None:
    note = b"<< /Type /Annot /Subtype /Square /IC [1 0 0] /C [1 0 0] /F 4 /Rect [0 100 150 200] >>"
    assert images(pdf(Page(entries=b"/Annots [" + note + b"]")))[0].decode().getpixel((100, 100)) == RED


def test_an_encrypted_document_needs_its_password() -> None:
    pages = Page(text(b"secret words") + mark()), SCANNED
    assert read_text(pdf_toys.encrypted(b"", *pages)) == read_text(pdf(*pages))
    assert images(pdf_toys.encrypted(b"", *pages))[0].decode().getpixel((10, 10)) == RED
    locked = pdf_toys.encrypted(b"sesame", *pages)
    for mode in PDF_MODES:
        with pytest.raises(PdfError, match=r"^encrypted: it needs a password$"):
            read(locked, mode)
    with pytest.raises(PdfError, match=r"^encrypted in a way that pdfium does not know$"):
        read(pdf_toys.encrypted(b"", *pages, scheme=b"/Filter /Unheard"))


@pytest.mark.parametrize("seed", range(2))
def test_broken_documents_are_read_or_refused(seed: int) -> None:
    for name, raw in pdf_toys.broken(seed).items():
        for mode in ("text", "both"):
            try:
                content, notes = read(raw, mode)
                for shown in content:
                    assert isinstance(shown, str) or shown.decode().size == (shown.width, shown.height)
                lines = notes
            except PdfError as error:
                lines = [str(error)]
            assert all(line.isprintable() and len(line) < 200 for line in lines), name


def test_what_can_be_mended_is_read() -> None:
    broken = pdf_toys.broken(0)
    for name in ("wrong xref", "wrong startxref", "negative length", "length is itself", "huge count", "draws itself"):
        assert "first" in read_text(broken[name]) and "second" in read_text(broken[name]), name
    assert read(broken["huge count"])[1] == ["9997 of 9999 pages cannot be loaded: 3-9999"]
    assert read(broken["a page is missing"])[1] == ["1 of 3 pages cannot be loaded: 2"]
    without_text = pdf_toys.objects_of([SCANNED] * 2)[:8]
    with pytest.raises(PdfError, match=r"^a PDF without text .* as images; 1 of 2 pages cannot be loaded: 2$"):
        read(pdf_toys.assembled(without_text))
    with pytest.raises(PdfError, match=r"^a PDF without pages$"):
        read(broken["no pages"])
    with pytest.raises(PdfError, match=r"^a broken PDF: pdfium finds no document in it$"):
        read(broken["header alone"])
    with pytest.raises(PdfError, match=r"^a PDF of which nothing can be read: 4 of 4 pages cannot be loaded: 1-4$"):
        read(broken["kids are no pages"])


def test_many_pages() -> None:
    content, notes = read(pdf(*[Page(text(b"words"))] * 1000))
    assert len(content) == 1000 and content[-1] == '<page number="1000">\nwords\n</page>\n' and notes == []
    content, notes = read(pdf(*[Page(text(b"words"))] * 100), "both")
    assert len(content) == 300 and content[-3] == '<page number="100">\nwords\n' and notes == []


def test_a_document_that_takes_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter(range(10**6))
    monkeypatch.setattr("l4ctx.documents.pdf.monotonic", lambda: next(seconds))  # one for opening it, one for each page
    monkeypatch.setattr("l4ctx.documents.pdf.DOCUMENT_SECONDS", 3)
    raw = pdf(*[Page(text(b"words"))] * 12)
    assert read(raw)[1] == []
    monkeypatch.setattr("l4ctx.documents.pdf.SECONDS_A_PAGE", 0.25)
    for mode in PDF_MODES:
        content, notes = read(raw, mode)
        assert "".join(piece for piece in content if isinstance(piece, str)).count("<page") == 6
        assert notes == ["6 of 12 pages cannot be read (the document takes longer than 6 s): 7-12"]
    monkeypatch.setattr("l4ctx.documents.pdf.SECONDS_A_PAGE", -0.25)
    with pytest.raises(PdfError, match=r"^a PDF of which nothing can be read: 12 of 12 pages .* than 0 s\): 1-12$"):
        read(raw)


def test_endless_text_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("l4ctx.documents.pdf.MOST_TEXT", 1024)
    content, _ = read(pdf(*[Page(text(b"x" * 64))] * 16))
    assert len(content) == 16
    with pytest.raises(PdfError, match=r"^a PDF with more than 1\.0 KiB of text$"):
        read(pdf(*[Page(text(b"x" * 64))] * 17))


def test_the_header_tells_a_pdf() -> None:
    raw = pdf(Page(text(b"words")))
    for before in (b"", b"\xef\xbb\xbf", b" \n", b"\0" * 1000, b"HTTP/1.1 200 OK\r\n\r\n"):
        assert is_pdf(before + raw) and "words" in read_text(before + raw)
    for other in (b"", b"PDF", b"\n" * 1025 + raw, b'RAW = b"%PDF-1.7"\n', b"A PDF begins with %PDF- as is known"):
        assert not is_pdf(other)


def test_the_extra_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pypdfium2", None)
    raw = pdf(Page())
    assert is_pdf(raw)
    with pytest.raises(PdfSupportMissing, match=r'^a PDF document; pip install "l4ctx\[pdf\]" adds what reads it$'):
        read(raw)


def test_a_mode_is_one_of_three() -> None:
    with pytest.raises(ValueError, match="mode is 'html', not one of text, pages, both"):
        read(pdf(Page()), "html")


def test_text_that_is_elsewhere_than_on_the_pages() -> None:
    note = b"<< /Type /Annot /Subtype /Text /Rect [9 9 20 20] /Contents (a remark) >>"
    with pytest.raises(PdfError, match=r"^a PDF without text but for 2 comments \(sticky notes .* with its comments$"):
        read(pdf(Page(entries=b"/Annots [" + note + note + b"]")))
    attached = assembled(
        [
            b"<< /Type /Catalog /Pages 2 0 R /Names << /EmbeddedFiles << /Names [(a.txt) 4 0 R] >> >> >>",
            b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
            b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 300 200] >>",
            b"<< /Type /Filespec /F (a.txt) /EF << /F 5 0 R >> >>",
            stream(b"words", b"/Type /EmbeddedFile"),
        ]
    )
    with pytest.raises(PdfError, match=r"^a PDF without text but with 1 file attached \(a portfolio\?\); save the"):
        read(attached)
