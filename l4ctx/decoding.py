"""Bytes of a file to text: which encoding, whether it is text at all, and what could not be decoded.

Knows nothing of files, folders or documents.
"""

from __future__ import annotations

import codecs

SAMPLE_BYTES = 8192  # how much of a file is looked at to tell text from binary

_BYTE_ORDER_MARKS = {  # the longer first: the UTF-32 LE mark begins with the UTF-16 LE one
    codecs.BOM_UTF32_LE: "utf-32-le", codecs.BOM_UTF32_BE: "utf-32-be", codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF16_BE: "utf-16-be",
}  # fmt: skip
_SIGNATURES = {
    b"%PDF-": "PDF", b"\x89PNG\r\n": "PNG image", b"\xff\xd8\xff": "JPEG image", b"GIF8": "GIF image",
    b"PK\x03\x04": "ZIP archive", b"\x1f\x8b": "gzip archive", b"\x7fELF": "ELF program", b"RIFF": "RIFF media",
}  # fmt: skip
_CONTROL_BYTES = bytes(set(range(1, 32)) - set(b"\t\n\v\f\r\b\x1b")) + b"\x7f"


def _encoding(raw: bytes) -> tuple[str, int]:
    """The encoding that the byte order mark names (UTF-8 without one), and the mark's length in bytes."""
    for mark, name in _BYTE_ORDER_MARKS.items():
        if raw.startswith(mark):
            return name, len(mark)
    return "utf-8", 0


def binary_kind(raw: bytes) -> str | None:
    """Why these bytes are not text, if so."""
    name, mark_length = _encoding(raw)
    sample = raw[mark_length : mark_length + SAMPLE_BYTES]
    text = sample.decode(name, "ignore")
    kind = next((kind for signature, kind in _SIGNATURES.items() if raw.startswith(signature)), None)
    if kind == "PDF" or "\0" in text:
        return f"binary ({kind})" if kind else "binary"
    if name != "utf-8":
        return None
    controls = len(sample) - len(sample.translate(None, _CONTROL_BYTES))
    undecodable = len(sample) - len(text.encode())
    if kind is not None and (controls or undecodable):
        return f"binary ({kind})"
    if controls * 10 > len(sample):
        return "binary"
    if undecodable * 2 > len(sample):
        return "not text in UTF-8 or UTF-16 (iconv can convert it)"
    return None


def decode(raw: bytes) -> tuple[str, str | None]:
    """The text of `raw`, and a note where something in it could not be decoded."""
    name, mark_length = _encoding(raw)
    content = memoryview(raw)[mark_length:]  # no copy
    try:
        return str(content, name), None
    except UnicodeDecodeError as error:
        first = mark_length + error.start
    text = str(content, name, "replace")
    replaced = text.count("\ufffd") - str(content, name, "ignore").count("\ufffd")
    places = "1 place" if replaced == 1 else f"{replaced} places"
    return text, f"not valid {name.upper()} in {places}, first at byte {first}: replaced by U+FFFD"
