"""What a file is, by its first bytes; and that no more of it is read where it is not wanted."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import pytest

from l4ctx.documents import content
from l4ctx.documents.document import DocumentMemoryError
from l4ctx.documents.pdf import is_pdf
from l4ctx.documents.reader import read_documents
from l4ctx.documents.recognition import binary_kind
from support.pdf_toys import assembled, stream, text


def archive(*names: str, mimetype: bytes = b"") -> bytes:
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as file:
        if mimetype:
            file.writestr("mimetype", mimetype, zipfile.ZIP_STORED)
        for name in names:
            file.writestr(name, "content " * 50)
    return target.getvalue()


def compound(stream: str) -> bytes:
    return b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(600) + f"Root Entry\0\0{stream}\0\0".encode("utf-16-le")


def media(*brands: bytes) -> bytes:
    box = b"ftyp" + brands[0] + bytes(4) + b"".join(brands[1:])
    return (len(box) + 4).to_bytes(4, "big") + box + bytes(64)


TYPES = "[Content_Types].xml"
BINARIES = [
    (archive(TYPES, "_rels/.rels", "word/document.xml"), "a Word document (DOCX)"),
    (archive(TYPES, "docProps/app.xml", "xl/workbook.xml"), "an Excel workbook (XLSX)"),
    (archive("_rels/.rels", TYPES, "ppt/presentation.xml"), "a PowerPoint presentation (PPTX)"),
    (archive(TYPES), "an Office document (DOCX, XLSX or PPTX)"),
    (archive("content.xml", mimetype=b"application/vnd.oasis.opendocument.text"), "an OpenDocument text (ODT)"),
    (archive("a", mimetype=b"application/vnd.oasis.opendocument.spreadsheet"), "an OpenDocument spreadsheet (ODS)"),
    (archive("META-INF/container.xml", mimetype=b"application/epub+zip"), "an EPUB book"),
    (archive("META-INF/MANIFEST.MF", "a/B.class"), "a Java archive (JAR)"),
    (archive("AndroidManifest.xml", "classes.dex"), "an Android app (APK)"),
    (archive("archive/data.pkl", "archive/data/0"), "a PyTorch file"),
    (archive("word/notes.txt", "xl.txt"), "a ZIP archive"),
    (compound("WordDocument"), "an old Word document (DOC)"), (compound("Workbook"), "an old Excel workbook (XLS)"),
    (compound("PowerPoint Document"), "an old PowerPoint presentation (PPT)"),
    (compound("Else"), "an old Office document (DOC, XLS or PPT)"),
    (media(b"heic", b"mif1"), "a HEIC image"), (media(b"mif1", b"avif"), "a HEIF image"),
    (media(b"avif", b"mif1"), "an AVIF image"), (media(b"isom", b"mp42"), "an MP4 video"),
    (media(b"qt  "), "a QuickTime video (MOV)"), (media(b"M4A ", b"isom"), "M4A audio"),
    (b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(9), "a JPEG XL image"),
    (b"RIFF\0\0\0\0WAVEfmt ", "WAV audio"), (b"RIFF\0\0\0\0AVI LIST", "an AVI video"),
    (b"\x1aE\xdf\xa3\x9fB\x86\x81\1B\x82\x88matroska", "a Matroska video (MKV)"),
    (b"\x1aE\xdf\xa3\x9fB\x86\x81\1B\x82\x84webm", "a WebM video"), (b"ID3\4\0\0\0\0", "MP3 audio"),
    (b"\xff\xfb\x90\x44" + bytes(99), "MP3 audio"), (b"fLaC\0\0\0\x22", "FLAC audio"),
    (b"OggS\0\2", "Ogg audio or video"), (b"\x1f\x8b\x08\0", "gzip-compressed data"),
    (b"BZh91AY&SY\0\1", "bzip2-compressed data"), (b"\xfd7zXZ\0\0", "xz-compressed data"),
    (b"\x28\xb5\x2f\xfd\0\1", "Zstandard-compressed data"), (b"7z\xbc\xaf\x27\x1c\0\4", "a 7-Zip archive"),
    (b"Rar!\x1a\7\1\0", "a RAR archive"), (b"a.txt".ljust(257, b"\0") + b"ustar\x0000", "a tar archive"),
    (b"\x40\0\0\0\0\0\0\0" + b'{"a":{"dtype":"F32"}}', "a safetensors file"), (b"GGUF\3\0\0\0", "a GGUF model"),
    (b"\x08\7\x12\7pytorch\x1a\0", "an ONNX model"), (b"\x80\4\x95\x0c\0\0\0", "a Python pickle"),
    (b"SQLite format 3\0\x10\0", "an SQLite database"), (b"PAR1\x15\0", "a Parquet table"),
    (b"\x7fELF\2\1\1\0", "a program or library (ELF)"), (b"\xcf\xfa\xed\xfe\7\0", "a program or library (Mach-O)"),
    (b"\xca\xfe\xba\xbe\0\0\0\x41", "a Java class"), (b"\xca\xfe\xba\xbe\0\0\0\2", "a program or library (Mach-O)"),
    (b"MZ".ljust(60, b"\0") + b"\x40\0\0\0PE\0\0", "a Windows program or library (PE)"),
    (b"\0asm\1\0\0\0", "a WebAssembly module"), (b"\xcb\x0d\r\n\0\0\0\0", "Python bytecode (.pyc)"),
    (b"\0\1\0\0\0\x0f", "a font"), (b"OTTO\0\x0b", "a font"), (b"wOF2\0\1\0\0", "a font"),
]  # fmt: skip


@pytest.mark.parametrize(("raw", "name"), BINARIES, ids=[name for _, name in BINARIES])
def test_what_is_left_out_is_named(tmp_path: Path, raw: bytes, name: str) -> None:
    """Whatever its suffix says."""
    file = tmp_path / "it's.txt"
    file.write_bytes(raw)
    found = read_documents([tmp_path], stdin=None)
    assert found.documents == [] and found.skipped[0].reason.split(";")[0] == name
    assert "{file}" not in found.skipped[0].reason
    piped = read_documents(["-"], stdin=io.BytesIO(raw))
    assert piped.skipped[0].reason.split(";")[0] == name


@pytest.mark.parametrize(
    "start",
    [
        "GGUF is a format",
        "ID3 tags",
        "MZ",
        "PAR1",
        "BZh",
        "RIFF",
        "Rar!",
        "OTTO",
        "ORC",
        "fLaC",
        "PACK",
        "GIF8 is",
        "true",
        "FORM",
        "SQLite format 3",
        "ustar",
        "AT&TFORM",
    ],
)
def test_text_that_begins_like_another_format_is_text(tmp_path: Path, start: str) -> None:
    (tmp_path / "a.bin").write_text(start + ", words\n")
    assert [document.text for document in read_documents([tmp_path], stdin=None).documents] == [start + ", words\n"]


def test_rtf_is_converted_and_text_about_it_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(rb"{\rtf1\ansi words}")
    (tmp_path / "b.txt").write_bytes(rb"RTF begins with {\rtf1\ansi")
    found = read_documents([tmp_path], stdin=None)
    assert [document.text for document in found.documents] == ["words\n", r"RTF begins with {\rtf1\ansi"]


def test_random_bytes_have_no_name() -> None:
    assert binary_kind(b"\0\3random bytes\1\2") is None


@pytest.mark.parametrize("name", ["video.mp4", "data"])
def test_a_huge_file_costs_its_beginning_alone(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "d"
    folder.mkdir()
    (folder / "a.md").write_text("words")
    with (folder / name).open("wb") as file:
        file.write(media(b"isom") if name == "video.mp4" else b"\0")
        file.truncate(1 << 42)
    found = read_documents([folder], stdin=None)
    assert [document.text for document in found.documents] == ["words"] and len(found.skipped) == 1
    assert read_documents([folder / name], stdin=None).documents == []


def test_images_that_are_left_out_are_not_read(tmp_path: Path) -> None:
    with (tmp_path / "a.png").open("wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR")
        file.truncate(1 << 42)
    found = read_documents([tmp_path / "a.png"], stdin=None, no_images="--no-images")
    assert found.skipped[0].reason == "a PNG image; --no-images"


@pytest.mark.parametrize("named", [True, False])
def test_a_file_larger_than_the_memory_is_named_with_its_size(tmp_path: Path, named: bool) -> None:
    with (tmp_path / "a.log").open("wb") as file:
        file.write(b"words\n" * 20_000)
        file.truncate(1 << 42)
    with pytest.raises(DocumentMemoryError, match=r"a\.log: 4\.0 TiB, but .* of memory is free; split it"):
        read_documents([tmp_path / "a.log" if named else tmp_path], stdin=None)


def test_running_out_of_memory_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.log").write_text("words")

    def no_memory(*_: object) -> bytes:
        raise MemoryError

    monkeypatch.setattr(content, "decode", no_memory)
    with pytest.raises(DocumentMemoryError, match=r"a\.log: there is not enough memory to read it"):
        read_documents([tmp_path], stdin=None)


def test_a_pipe_of_what_is_not_wanted_is_not_read_to_its_end() -> None:
    class Endless(io.RawIOBase):
        def read(self, size: int = -1) -> bytes:
            assert size > 0, "all of it"
            return bytes(size)

    assert read_documents(["-"], stdin=Endless()).skipped[0].reason == "binary"  # type: ignore[arg-type]


MULTIPART = b'------Boundary7\r\nContent-Disposition: form-data; name="f"\r\nContent-Type: application/pdf\r\n\r\n'


def ascii_pdf() -> bytes:
    font = b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>"
    page = (
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 300 200] /Contents 4 0 R "
        b"/Resources << /Font << /F1 5 0 R >> >> >>"
    )
    raw = assembled(
        [
            b"<< /Type /Catalog /Pages 2 0 R >>",
            b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
            page,
            stream(text(b"words")),
            font,
        ]
    ).replace(b"%\xe2\xe3\xcf\xd3", b"%ABCD")
    assert raw.isascii()
    return raw


@pytest.mark.parametrize(
    "before",
    [
        b"",
        b"\xef\xbb\xbf",
        b"\n",
        b" \r\n\t",
        b"HTTP/1.1 200 OK\r\nServer: x\r\n\r\n",
        MULTIPART,
        b"\0" * 9,
        b"\x1b%-12345X@PJL\r\n",
        b"Subject: report\nContent-Type: application/pdf\n\n",
    ],
)
def test_a_pdf_of_pure_ascii_is_a_pdf_wherever_it_begins(tmp_path: Path, before: bytes) -> None:
    after = b"\r\n------Boundary7--\r\n" if before == MULTIPART else b""
    (tmp_path / "a.txt").write_bytes(before + ascii_pdf() + after)
    found = read_documents([tmp_path], stdin=None)
    assert [document.text for document in found.documents] == ['<page number="1">\nwords\n</page>\n'], found.skipped


@pytest.mark.parametrize(
    "around",
    [
        ("# PDF\n\nA small one:\n\n```\n", "```\nThat was all.\n"),
        ('RAW = b"""\n', '"""\n'),
        ("> quoted\n", "\n-- \nme\n"),
        ("Subject: how PDF works\n\n", "\nIs it right?\n"),
        ("%", ""),
        ("x = '", "'\n"),
    ],
)
def test_text_that_quotes_a_pdf_is_text(tmp_path: Path, around: tuple[str, str]) -> None:
    quoted = around[0].encode() + ascii_pdf() + around[1].encode()
    assert not is_pdf(quoted)
    (tmp_path / "a.pdf").write_bytes(quoted)
    assert [document.text for document in read_documents([tmp_path], stdin=None).documents] == [quoted.decode()]


@pytest.mark.parametrize(
    "words",
    [
        "%PDF-1.4 is how a PDF begins\n",
        "\n\n%PDF-1.7 (see ISO 32000)\n",
        "%PDF-x\n",
        "Subject: q\n\n%PDF-1.4\nand then 1 0 obj, I think\n",
    ],
)
def test_text_that_mentions_a_header_is_text(words: str) -> None:
    assert not is_pdf(words.encode())
