"""Office documents, made by pandoc and openpyxl, or part by part."""

from __future__ import annotations

import io
import subprocess
import zipfile
from collections.abc import Sequence
from pathlib import Path

from l4ctx.documents.office.convert import pandoc_path

_PACKAGE = "http://schemas.openxmlformats.org/package/2006"
_OFFICE = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
_TYPES = (
    f'<?xml version="1.0"?><Types xmlns="{_PACKAGE}/content-types">'
    '<Default Extension="rels" ContentType="application/vnd.openxmlformats-package.relationships+xml"/>'
    '<Default Extension="xml" ContentType="application/xml"/><Override PartName="/{part}" '
    'ContentType="application/vnd.openxmlformats-officedocument.{kind}.main+xml"/></Types>'
)
_RELATIONS = (
    f'<?xml version="1.0"?><Relationships xmlns="{_PACKAGE}/relationships">'
    f'<Relationship Id="rId1" Type="{_OFFICE}/{{type}}" Target="{{target}}"/></Relationships>'
)
WORD = 'xmlns:w="http://schemas.openxmlformats.org/wordprocessingml/2006/main"'
_DOCUMENT = f"<w:document {WORD} {{more}}><w:body>{{body}}</w:body></w:document>"
_S = 'xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main"'


def by_pandoc(markdown: str, format: str, folder: Path, *options: str) -> bytes:
    """What pandoc writes in that format; pictures lie in `folder`."""
    file = folder / f"made.{format}"
    program = pandoc_path()
    assert program is not None
    subprocess.run(
        [program, "--from", "markdown", "--to", format, "--standalone", *options, "-o", str(file)],
        input=markdown.encode(),
        cwd=folder,
        check=True,
    )
    return file.read_bytes()


def archive(parts: Sequence[tuple[str, str | bytes]]) -> bytes:
    kept = io.BytesIO()
    with zipfile.ZipFile(kept, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in parts:
            file.writestr(name, content)
    return kept.getvalue()


def paragraph(text: str) -> str:
    return f"<w:p><w:r><w:t>{text}</w:t></w:r></w:p>"


def docx(body: str, *parts: tuple[str, str | bytes], before: str = "", more: str = "") -> bytes:
    """A Word document with this body, in XML; `before` stands before its root."""
    document = f'<?xml version="1.0"?>{before}' + _DOCUMENT.format(body=body, more=more)
    return archive([
        ("[Content_Types].xml", _TYPES.format(part="word/document.xml", kind="wordprocessingml.document")),
        ("_rels/.rels", _RELATIONS.format(type="officeDocument", target="word/document.xml")),
        ("word/document.xml", document),
        *parts,
    ])  # fmt: skip


def xlsx(rows: str) -> bytes:
    """A workbook with one sheet, `One`, whose rows are given in XML."""
    return archive([
        ("[Content_Types].xml", _TYPES.format(part="xl/workbook.xml", kind="spreadsheetml.sheet")),
        ("_rels/.rels", _RELATIONS.format(type="officeDocument", target="xl/workbook.xml")),
        ("xl/workbook.xml", f'<workbook {_S} xmlns:r="{_OFFICE}">'
                            '<sheets><sheet name="One" sheetId="1" r:id="rId1"/></sheets></workbook>'),
        ("xl/_rels/workbook.xml.rels", _RELATIONS.format(type="worksheet", target="worksheets/sheet1.xml")),
        ("xl/worksheets/sheet1.xml", f"<worksheet {_S}><sheetData>{rows}</sheetData></worksheet>"),
    ])  # fmt: skip
