"""Readers of documents: texts in any encoding, notebooks, images, PDF, archives; and what leaves files out."""

from __future__ import annotations

import functools
import io
import json
import random
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

from fuzz.inputs import Files, Mutate, Reader, one_of
from fuzz.mutation import mutate_bytes, mutate_json, mutate_text
from l4ctx.documents.content import NOT_READ
from l4ctx.errors import INPUT, MEMORY

WORDS = (
    "The access code for the amber falcon is 48213.\n",
    "Wo liegt Köln? Über die Brücke.\r\n",
    "Привет, мир! Как дела?\n",
    "日本語の文章です。\n",
    "中文文本，测试一下。\n",
    "한국어 문장입니다.\n",
    "Καλημέρα κόσμε\n",
    "שלום עולם\n",
)
ENCODINGS = (
    "utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-32", "cp1252", "latin-1", "cp1251", "koi8-r", "shift_jis",
    "euc-jp", "iso2022_jp", "gb18030", "big5", "euc-kr", "iso2022_kr", "cp1253", "cp1255", "utf-7", "hz", "cp437",
)  # fmt: skip
DOCUMENT, IGNORE = "document", ".gitignore"


@functools.cache
def texts() -> Mapping[str, Files]:
    uri = b"text <img src='data:image/png;base64," + b"iVBORw0KGgo" * 60 + b"'> more\n" * 3
    words = {name: {DOCUMENT: "".join(WORDS * 4).encode(name, "ignore")} for name in ENCODINGS}
    return words | {"data: URI": {DOCUMENT: uri}}


@functools.cache
def notebooks() -> Mapping[str, Files]:
    cells = [
        {"cell_type": "markdown", "source": ["# Title\n", "text"], "metadata": {}, "attachments": {"a": {"b": "c"}}},
        {"cell_type": "code", "source": "print(1)", "execution_count": 1, "metadata": {}, "outputs": [
            {"output_type": "stream", "name": "stdout", "text": ["1\n"]},
            {"output_type": "display_data", "data": {"image/png": "iVBORw0KGgo="}, "metadata": {}}]},
    ]  # fmt: skip
    newer = {"cells": cells, "metadata": {"language_info": {"name": "python"}}, "nbformat": 4, "nbformat_minor": 5}
    older = {"worksheets": [{"cells": cells}], "metadata": {}, "nbformat": 3, "nbformat_minor": 0}
    return {name: {DOCUMENT: json.dumps(tree).encode()} for name, tree in (("4", newer), ("3", older))}


@functools.cache
def images() -> Mapping[str, Files]:
    from support.image_files import SAMPLES, tiff

    pages = tiff((256, 3, 1, 4), (257, 3, 1, 4), (258, 3, 1, 8), (262, 3, 1, 1), (273, 4, 1, 100), (279, 4, 1, 16),
                 pixels=bytes(64))  # fmt: skip
    return {name: {DOCUMENT: raw} for name, raw in SAMPLES.items()} | {"TIFF by hand": {DOCUMENT: pages}}


@functools.cache
def pdfs() -> Mapping[str, Files]:
    from support.pdf_toys import SCANNED, Page, encrypted, mark, pdf, text

    plain = pdf(Page(text(b"The third quarter", b"was the best.")), Page(text(b"ABCDEFGH", font=b"F2")))
    return {
        "text": {DOCUMENT: plain},
        "scanned": {DOCUMENT: pdf(SCANNED, Page(mark(), entries=b"/Rotate 90"))},
        "encrypted": {DOCUMENT: encrypted(b"", Page(text(b"secret")))},
    }


@functools.cache
def others() -> Mapping[str, Files]:
    """What is recognised and left out."""
    archive, tape = io.BytesIO(), io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        for name in ("[Content_Types].xml", "word/document.xml", "mimetype"):
            file.writestr(zipfile.ZipInfo(name), "application/epub+zip")
    with tarfile.open(fileobj=tape, mode="w") as file:
        file.addfile(tarfile.TarInfo("a"), io.BytesIO(b""))
    found = {
        "zip": archive.getvalue(),
        "tar": tape.getvalue(),
        "rtf": rb"{\rtf1\ansi text}",
        "gzip": b"\x1f\x8b\x08" + bytes(20),
        "ole": bytes.fromhex("D0CF11E0A1B11AE1") + bytes(520),
        "mp4": b"\0\0\0\x18ftypisom" + bytes(40),
        "ogg": b"OggS" + bytes(60),
        "elf": b"\x7fELF\x02\x01\x01" + bytes(60),
        "heic": b"\0\0\0\x18ftypheic" + bytes(40),
        "sqlite": b"SQLite format 3\0" + bytes(100),
        "gguf": b"GGUF\3\0\0\0" + bytes(40),
        "safetensors": b"\x10\0\0\0\0\0\0\0" + b'{"a":{}}        ',
        "mkv": b"\x1aE\xdf\xa3" + bytes(60),
    }
    return {name: {DOCUMENT: raw} for name, raw in found.items()}


def mutate_binary(draw: random.Random, content: bytes) -> bytes:
    return mutate_bytes(draw, content, 200)


PDF_PIECES = (
    b"<<", b">>", b"endobj", b"stream\n", b"endstream", b"/Length 99999999999", b"/Length -1", b"1 0 R", b"99999 0 R",
    b"/Kids [1 0 R]", b"/Count -1", b"/Rotate 91", b"/MediaBox [0 0 1e30 1e30]", b"/MediaBox [0 0 0 0]", b"xref\n",
    b"/Filter /FlateDecode", b"/Filter [/ASCIIHexDecode /LZWDecode /DCTDecode]", b"/Parent 3 0 R", b"startxref\n0\n",
    b"/Width 99999 /Height 99999", b"q " * 500, b"BT ET " * 100, b"/I1 Do ", b"(" * 300, b"[" * 300, b"%%EOF\n",
)  # fmt: skip


def mutate_pdf(draw: random.Random, content: bytes) -> bytes:
    return mutate_text(draw, content, PDF_PIECES) if draw.randrange(3) else mutate_bytes(draw, content)


def read_document(folder: Path) -> None:
    """As a file that a user names; images are decoded again, as for the model."""
    from l4ctx.documents.reader import read_documents

    found = read_documents([folder / DOCUMENT], stdin=None, pdf="text")
    for document in found.documents:
        document.text.encode()
        for image in document.images:
            image.decode()


def read_pages(folder: Path) -> None:
    from l4ctx.documents.reader import read_documents

    for document in read_documents([folder / DOCUMENT], stdin=None, pdf="both").documents:
        for image in document.images:
            image.decode()


def read_stream(folder: Path) -> None:
    """From a pipe; in an encoding that the user names, too."""
    from l4ctx.documents.reader import read_documents

    raw = (folder / DOCUMENT).read_bytes()
    for encoding in (None, "gb18030"):
        read_documents(["-"], stdin=io.BytesIO(raw), encoding=encoding)


def read_content(folder: Path) -> None:
    from l4ctx.documents.content import ContentReader
    from l4ctx.documents.recognition import binary_kind, is_archive, is_rtf

    raw = (folder / DOCUMENT).read_bytes()
    binary_kind(raw[:65536])
    is_archive(raw[:512])
    is_rtf(raw[:512])
    reader = ContentReader(keep_payload=len(raw) % 3 == 0)
    reader.check(None, raw[:65536], len(raw))
    reader.read("document", raw, None)


PATTERNS = (
    b"# comment\n*.pyc\n!keep.pyc\n/build/\ndocs/**/*.tmp\n**/node_modules/\n\\#name\n[a-c]?.txt\n*.[oa]\n",
    b"*\n!*/\n!*.md\nfoo/**\na/**/b\n\xef\xbb\xbfx\n trailing \\ \n[[:alpha:]]*\n[!a-z]\n",
)
IGNORE_PIECES = (
    b"*", b"**", b"**/", b"/**", b"?", b"[", b"]", b"[z-a]", b"[[:x:]]", b"[!", b"\\", b"!", b"#", b"/", b"//", b"\n",
    b"*a" * 14 + b"b", b"a" * 300, b" " * 2000, b"[a-z]*" * 50, b"**/" * 50, b"\0", b"\r\n", b"x\n" * 500, b"[" * 200,
)  # fmt: skip
PATHS = (b"a" * 60, b"docs/x/y.tmp", b"keep.pyc", b"a/b/c/b", b"build", b"\xff\xfe/x", b"b.txt", b"#name", b"foo/bar/x")


@functools.cache
def patterns() -> Mapping[str, Files]:
    return {str(number): {IGNORE: raw} for number, raw in enumerate(PATTERNS)}


def mutate_patterns(draw: random.Random, content: bytes) -> bytes:
    return mutate_text(draw, content, IGNORE_PIECES)


def read_patterns(folder: Path) -> None:
    from l4ctx.documents.exclusion.gitignore import PatternFile

    content = (folder / IGNORE).read_bytes()
    for ignore_case in (False, True):
        file = PatternFile(content, ignore_case=ignore_case)
        for path in PATHS:
            file.ignores(path, is_folder=False)
            file.ignores(path, is_folder=True)


GIT = b"""[core]
	repositoryformatversion = 0
	ignorecase = true
	excludesFile = "excluded" ; comment
[a "b"]
x = 1
"""
GIT_PIECES = (
    b"[core]", b'[core "x"]', b"=", b'"', b"\\", b"\\\n", b";", b"#", b"ignorecase", b"[include]\npath = /dev/zero",
    b"excludesfile = ../../x", b"\0", b"~", b"[" * 100, b" " * 3000,
)  # fmt: skip


@functools.cache
def repositories() -> Mapping[str, Files]:
    tree = {"a.md": b"words\n", "b/c.txt": b"words\n", IGNORE: PATTERNS[0], "b/.gitignore": b"*.tmp\n"}
    inner = {"top/.git/config": GIT, "top/.git/HEAD": b"ref: refs/heads/main\n", "top/.git/info/exclude": b"*.bak\n",
             "top/.git/excluded": b"x\n", "top/.git/commondir": b"."}  # fmt: skip
    within = {f"top/{name}": content for name, content in tree.items()}
    return {"alone": within, "repository": within | inner, "linked": within | {"top/.git": b"gitdir: ../elsewhere\n"}}


def mutate_git(draw: random.Random, content: bytes) -> bytes:
    return mutate_text(draw, content, GIT_PIECES)


def read_folder(folder: Path) -> None:
    """Without the program git: it would answer for itself."""
    from l4ctx.documents.exclusion import rules
    from l4ctx.documents.reader import read_documents

    before, rules.git_program = rules.git_program, lambda: None  # type: ignore[assignment]
    try:
        read_documents([folder / "top"], stdin=None)
    finally:
        rules.git_program = before


def _document(*changes: object) -> Mutate:
    return one_of(*((DOCUMENT, change) for change in changes))  # type: ignore[arg-type]


CODES = frozenset([INPUT, MEMORY])
READERS = (
    Reader("text", texts, _document(mutate_text, mutate_bytes), read_content, CODES, NOT_READ, share=25),
    Reader("text_from_a_pipe", texts, _document(mutate_text, mutate_bytes), read_stream, CODES, NOT_READ, share=5),
    Reader("notebook", notebooks, _document(mutate_json), read_content, CODES, NOT_READ, share=40),
    Reader("image", images, _document(mutate_binary, mutate_bytes), read_document, CODES, share=40),
    Reader("pdf", pdfs, _document(mutate_pdf), read_document, CODES, share=4),
    Reader("pdf_pages", pdfs, _document(mutate_pdf), read_pages, CODES, share=1),
    Reader("recognition", others, _document(mutate_binary, mutate_text), read_content, CODES, NOT_READ, share=60),
    Reader("gitignore", patterns, one_of((IGNORE, mutate_patterns)), read_patterns, CODES, share=25),
    Reader("folder", repositories,
           one_of((IGNORE, mutate_patterns), ("exclude", mutate_patterns), ("config", mutate_git), (".git", mutate_git),
                  ("commondir", mutate_git)),
           read_folder, CODES, share=8),
)  # fmt: skip
