"""Bytes of RTF in the code pages of fonts, written as Unicode: pandoc takes them all for Windows-1252."""

from __future__ import annotations

import re

_CODE_PAGES = {  # of \fcharset
    128: "cp932", 129: "cp949", 134: "gbk", 136: "big5", 161: "cp1253", 162: "cp1254", 163: "cp1258", 177: "cp1255",
    178: "cp1256", 186: "cp1257", 204: "cp1251", 222: "cp874", 238: "cp1250",
}  # fmt: skip
CODECS = (*_CODE_PAGES.values(), "cp1252")
_TOKEN = re.compile(rb"\\'([0-9A-Fa-f]{2})|\\([a-z]+)(-?\d{1,10})?( ?)|([{}])|\\.|[^\\{}]+", re.DOTALL)
_KNOWN_ANSI = {int(name[2:]): name for name in CODECS if name.startswith("cp")} | {936: "gbk", 950: "big5"}


def in_unicode(raw: bytes) -> bytes:
    r"""The document with its bytes \'xx as \u, where their font or \ansicpg says that they are not Windows-1252."""
    if b"\\fcharset" not in raw and b"\\ansicpg" not in raw:
        return raw
    return _Recoder().recode(raw)


class _Recoder:
    """Follows groups, the font table and the current font of each group."""

    def __init__(self) -> None:
        self._default: str | None = None  # the document's code page; None: Windows-1252
        self._fonts: dict[int, str | None] = {}
        self._groups: list[tuple[str | None, bool]] = []  # those of the groups around this one
        self._page: str | None = None
        self._in_fonts = False
        self._defined = 0  # the font that the font table is about
        self._fallback = 0  # further characters that stand for a \u before them
        self._bytes = bytearray()
        self._out = bytearray()

    def recode(self, raw: bytes) -> bytes:
        for match in _TOKEN.finditer(raw):
            code, word, number, _, brace = match.groups()
            if code is not None and self._page is not None and not self._in_fonts and not self._fallback:
                self._bytes.append(int(code, 16))
                continue
            piece = self._finish(match.group(), is_text=code is None and word is None and brace is None)
            if code is not None:
                self._fallback = max(0, self._fallback - 1)
            elif brace is not None:
                self._enter_or_leave(brace)
            elif word is not None:
                self._obey(word, None if number is None else int(number))
            else:
                self._fallback = 0
            self._out += piece
        self._finish(b"", is_text=False)
        return bytes(self._out)

    def _finish(self, following: bytes, *, is_text: bool) -> bytes:
        """Writes the bytes that were collected; returns what is left of `following`, whose first byte may end them."""
        if not self._bytes:
            return following
        assert self._page is not None
        taken = bytes(self._bytes)
        text = taken.decode(self._page, "replace")
        if is_text and text.endswith("\ufffd") and following[:1] not in (b"\r", b"\n"):
            whole = (taken + following[:1]).decode(self._page, "replace")
            if not whole.endswith("\ufffd") and len(whole) == len(text):
                text, following = whole, following[1:]
        units = text.encode("utf-16-le")
        values = [int.from_bytes(units[at : at + 2], "little", signed=True) for at in range(0, len(units), 2)]
        self._out += b"{\\uc0" + b"".join(b"\\u%d " % value for value in values) + b"}"
        self._bytes.clear()
        return following

    def _enter_or_leave(self, brace: bytes) -> None:
        self._fallback = 0
        if brace == b"{":
            self._groups.append((self._page, self._in_fonts))
        elif self._groups:
            self._page, self._in_fonts = self._groups.pop()

    def _obey(self, word: bytes, number: int | None) -> None:
        self._fallback = 0
        if word == b"fonttbl":
            self._in_fonts = True
        elif word == b"u":
            self._fallback = 1
        elif word == b"ansicpg" and number is not None:
            self._default = _KNOWN_ANSI.get(number) if number != 1252 else None
            self._page = self._default
        elif word == b"fcharset" and self._in_fonts and number is not None:
            self._fonts[self._defined] = self._default if number in (0, 1) else _CODE_PAGES.get(number)
        elif word == b"f" and number is not None:
            if self._in_fonts:
                self._defined = number
                self._fonts.setdefault(number, self._default)
            else:
                self._page = self._fonts.get(number, self._default)
        elif word in (b"plain", b"deff"):
            self._page = self._default
