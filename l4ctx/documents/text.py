"""Bytes of a file to text: whether it is text at all, its encoding, and what could not be decoded.

Legacy encodings are detected in `l4ctx.documents.encodings`.
"""

from __future__ import annotations

import codecs

from l4ctx.documents.encodings import detect, wide_encoding
from l4ctx.documents.recognition import binary_kind

SAMPLE_BYTES = 8192  # of a file, to tell text from binary

_BYTE_ORDER_MARKS = {  # the longer first: the UTF-32 LE mark begins with the UTF-16 LE one
    codecs.BOM_UTF32_LE: "utf-32-le", codecs.BOM_UTF32_BE: "utf-32-be", codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF16_BE: "utf-16-be",
}  # fmt: skip
_MARKS = tuple(_BYTE_ORDER_MARKS)
_CONTROL_BYTES = bytes(set(range(1, 32)) - set(b"\t\n\v\f\r\b\x1b")) + b"\x7f"
_NOT_IN_TEXT = _CONTROL_BYTES + b"\0"
_SHIFTS = b"\x0e\x0f"  # from one set of characters to another in ISO-2022
_SEVEN_BIT = ("iso2022", "hz", "utf-7")  # beginnings of the names of encodings that look like ASCII
_MOST_BAD = 0.1  # of a text's characters: where more cannot be decoded, its encoding is another one


class UndecodableError(Exception):
    """The encoding of a text is unknown; the message says in one line what to do."""


def _marked_encoding(raw: bytes) -> tuple[str, int] | None:
    """The encoding that the byte order mark names, and the mark's length in bytes; None without one."""
    if not raw.startswith(_MARKS):
        return None
    return next((name, len(mark)) for mark, name in _BYTE_ORDER_MARKS.items() if raw.startswith(mark))


def check_encoding(name: str) -> str:
    """The codec's own name for an encoding. Raises ValueError if it is not an encoding of text."""
    try:
        codec = codecs.lookup(name)
    except (LookupError, ValueError):  # ValueError: a NUL character in it
        codec = None
    if codec is None or not getattr(codec, "_is_text_encoding", True) or codec.name == "undefined":
        raise ValueError(f"{name!r} is not an encoding of text, such as gbk or windows-1252")
    return codec.name


def is_text(sample: bytes, given: str | None = None) -> bool:
    """Whether what begins with `sample` is text, in whatever encoding; `given` names one."""
    start = sample[:SAMPLE_BYTES]
    if start.isascii() and len(start.translate(None, _NOT_IN_TEXT)) == len(start):
        return True  # as most are; without a mark, and none of the bytes below
    marked = _marked_encoding(sample)
    name, mark_length = marked or ("utf-8", 0)
    head = sample[mark_length : mark_length + SAMPLE_BYTES]
    if "\0" in head.decode(name, "ignore"):
        if marked is not None or binary_kind(sample) is not None:
            return False
        if given is not None:
            return "\0" not in head.decode(given, "ignore") and _is_wide(given)
        return wide_encoding(sample) is not None
    if name != "utf-8":
        return True
    if b"\x1b$)C" in head:  # ISO-2022-KR
        head = head.translate(None, _SHIFTS)
    controls = len(head) - len(head.translate(None, _CONTROL_BYTES))
    if controls and binary_kind(sample) is not None:
        return False
    return controls * 10 <= len(head)


def _is_wide(name: str) -> bool:
    """Whether ASCII characters have zero bytes in this encoding."""
    return "\0".encode(name, "ignore") != b"\0" and len("a".encode(name, "ignore")) > 1


def decode(raw: bytes, given: str | None = None) -> tuple[str, list[str]]:
    """The text of `raw`, and notes: in which encoding it is read, what in it could not be decoded.

    `given` names the encoding of what is not UTF-8 and has no byte order mark; None: it is detected. Raises
    UndecodableError where that cannot be told.
    """
    if marked := _marked_encoding(raw):
        return _decoded(raw, *marked)
    text = _strict(raw, "utf-8")
    is_ascii = text is not None and raw.isascii()
    if given is not None and (
        text is None or "\0" in text[:SAMPLE_BYTES] or (is_ascii and given.startswith(_SEVEN_BIT))
    ):
        return _by_name(raw, given)
    if text is not None and "\0" not in text[:SAMPLE_BYTES] and not (is_ascii and b"\x1b" in raw):
        return text, []
    found = detect(raw)
    if found.name is not None:
        return raw.decode(found.codec), [f"read as {found.name}"]
    if text is not None:
        return text, []
    if found.reason is not None:
        raise UndecodableError(found.reason)
    text, notes = _decoded(raw, "utf-8", 0)
    return text, [f"{note}{found.hint}" for note in notes]


def _strict(raw: bytes, name: str) -> str | None:
    try:
        return raw.decode(name)
    except UnicodeDecodeError:
        return None


def _by_name(raw: bytes, given: str) -> tuple[str, list[str]]:
    text, notes = _decoded(raw, given, 0)
    if notes and text.count("\ufffd") > _MOST_BAD * len(text):
        raise UndecodableError(f"not text in {given} (--encoding)")
    return text, notes


def _decoded(raw: bytes, name: str, mark_length: int) -> tuple[str, list[str]]:
    """The text, with what cannot be decoded replaced, and a note about that."""
    content = memoryview(raw)[mark_length:]  # no copy
    try:
        return str(content, name), []
    except UnicodeDecodeError as error:
        first = mark_length + error.start
    text = str(content, name, "replace")
    replaced = text.count("\ufffd") - str(content, name, "ignore").count("\ufffd")
    places = "1 place" if replaced == 1 else f"{replaced} places"
    return text, [f"not valid {name.upper()} in {places}, first at byte {first}: replaced by U+FFFD"]
