"""Small handmade PDFs: text, images, rotated and cropped pages, encrypted and damaged files, and bombs."""

from __future__ import annotations

import functools
import hashlib
import random
import zlib
from dataclasses import dataclass

_PADDING = bytes.fromhex("28BF4E5E4E758A4164004E56FFFA01082E2E00B6D0683E802F0CA9FE6453697A")
_IDENTIFIER = bytes(range(16))

_MAPPED = {  # one byte per character
    "A": "00E9", "B": "4E2D", "C": "D83DDE00", "D": "00660069",  # an accent, Chinese, an emoji, a ligature
    "E": "00AD", "F": "D83D", "G": "0000", "H": "000C",  # a soft hyphen, half a surrogate pair, nothing, a page end
}  # fmt: skip
_TO_UNICODE = (
    "/CIDInit /ProcSet findresource begin 12 dict begin begincmap /CMapName /toy def /CMapType 2 def\n"
    f"1 begincodespacerange <00> <FF> endcodespacerange {len(_MAPPED)} beginbfchar\n"
    + "".join(f"<{ord(code):02X}> <{units}>\n" for code, units in _MAPPED.items())
    + "endbfchar endcmap end end"
).encode()


@dataclass(frozen=True)
class Page:
    """The content of one page: drawing operators, its box in points, more entries of its dictionary."""

    content: bytes = b""
    box: bytes = b"/MediaBox [0 0 300 200]"
    entries: bytes = b""


def text(*lines: bytes, font: bytes = b"F1") -> bytes:
    """Operators that draw lines from the top of a page 200 points high. Bytes are WinAnsi, or mapped by font F2."""
    drawn = b"".join(b"(" + line + b") Tj 0 -14 Td " for line in lines)
    return b"BT /" + font + b" 12 Tf 20 170 Td " + drawn + b"ET"


def mark(color: bytes = b"1 0 0", box: bytes = b"0 100 150 100") -> bytes:
    """Operators that fill a rectangle; by default the upper left quarter of the page, in red."""
    return b" " + color + b" rg " + box + b" re f"


SCANNED = Page(b"q 300 0 0 200 0 0 cm /I1 Do Q")


def stream(data: bytes, entries: bytes = b"") -> bytes:
    return b"<< /Length %d " % len(data) + entries + b">>\nstream\n" + data + b"\nendstream"


def objects_of(pages: list[Page]) -> list[bytes]:
    """The objects of a document, from 1: catalog, page tree, two fonts, a map to Unicode, an image, the pages."""
    first = 7
    kids = b" ".join(b"%d 0 R" % (first + 2 * at) for at in range(len(pages)))
    font = b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica /Encoding /WinAnsiEncoding "
    image = b"/Type /XObject /Subtype /Image /Width 2 /Height 1 /ColorSpace /DeviceRGB /BitsPerComponent 8 "
    resources = b"/Resources << /Font << /F1 3 0 R /F2 4 0 R >> /XObject << /I1 6 0 R >> >> "
    found = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [" + kids + b"] /Count %d >>" % len(pages),
        font + b">>",
        font + b"/ToUnicode 5 0 R >>",
        stream(_TO_UNICODE),
        stream(b"\x00\x00\xff\x00\xff\x00", image),
    ]
    for at, page in enumerate(pages):
        contents = b"/Contents %d 0 R " % (first + 2 * at + 1)
        found.append(b"<< /Type /Page /Parent 2 0 R " + contents + resources + page.box + b" " + page.entries + b" >>")
        found.append(stream(page.content))
    return found


def assembled(objects: list[bytes], trailer: bytes = b"") -> bytes:
    """A file of these objects, of which the first is the catalog, with a cross-reference table."""
    out, offsets = b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n", []
    for number, content in enumerate(objects, 1):
        offsets.append(len(out))
        out += b"%d 0 obj\n" % number + content + b"\nendobj\n"
    size, start = len(objects) + 1, len(out)
    out += b"xref\n0 %d\n0000000000 65535 f \n" % size + b"".join(b"%010d 00000 n \n" % offset for offset in offsets)
    return out + b"trailer\n<< /Size %d /Root 1 0 R " % size + trailer + b">>\nstartxref\n%d\n%%%%EOF\n" % start


def pdf(*pages: Page) -> bytes:
    return assembled(objects_of(list(pages)))


def _rc4(key: bytes, data: bytes) -> bytes:
    state, j = list(range(256)), 0
    for i in range(256):
        j = (j + state[i] + key[i % len(key)]) % 256
        state[i], state[j] = state[j], state[i]
    out, j = bytearray(), 0
    for at, byte in enumerate(data, 1):
        i = at % 256
        j = (j + state[i]) % 256
        state[i], state[j] = state[j], state[i]
        out.append(byte ^ state[(state[i] + state[j]) % 256])
    return bytes(out)


def encrypted(password: bytes, *pages: Page, scheme: bytes = b"/Filter /Standard") -> bytes:
    """A file encrypted by the oldest scheme of the standard, 40-bit RC4. `password` opens it."""
    padded, permissions = (password + _PADDING)[:32], b"\xfc\xff\xff\xff"
    owner = _rc4(hashlib.md5((b"owner" + _PADDING)[:32]).digest()[:5], padded)
    key = hashlib.md5(padded + owner + permissions + _IDENTIFIER).digest()[:5]
    objects = []
    for number, content in enumerate(objects_of(list(pages)), 1):
        head, mark, data = content.partition(b"stream\n")
        if mark:
            inner = hashlib.md5(key + number.to_bytes(3, "little") + b"\0\0").digest()[:10]
            content = head + mark + _rc4(inner, data.removesuffix(b"\nendstream")) + b"\nendstream"
        objects.append(content)
    strings = b" /O <" + owner.hex().encode() + b"> /U <" + _rc4(key, _PADDING).hex().encode() + b">"
    dictionary = b"/Encrypt << " + scheme + b" /V 1 /R 2 /P -4" + strings + b" >> "
    identifier = _IDENTIFIER.hex().encode()
    return assembled(objects, dictionary + b"/ID [<" + identifier + b"> <" + identifier + b">] ")


@functools.cache
def _twice_deflated(blanks: int) -> bytes:
    return zlib.compress(zlib.compress(b" " * blanks, 1), 9)


def memory_bomb(*pages: Page, at: int, count: int) -> bytes:
    """A small file whose page `at` (from 0) has `count` bytes of content: blanks, deflated twice."""
    objects = objects_of(list(pages))
    objects[7 + 2 * at] = stream(_twice_deflated(count), b"/Filter [/FlateDecode /FlateDecode] ")
    return assembled(objects)


def noise(*, pages: int, side: int) -> bytes:
    """A file whose pages each show a different noise image of `side` x `side` pixels."""
    objects, draw = objects_of([Page(b"300 0 0 200 0 0 cm /I1 Do")] * pages), random.Random(0)
    look = b"/Type /XObject /Subtype /Image /Width %d /Height %d /ColorSpace /DeviceGray /BitsPerComponent 8 "
    first = len(objects) + 1
    for at in range(pages):
        leaf = objects[6 + 2 * at]
        objects[6 + 2 * at] = leaf.replace(b"/I1 6 0 R", b"/I1 %d 0 R" % (first + at))
    return assembled([*objects, *(stream(draw.randbytes(side * side), look % (side, side)) for _ in range(pages))])


def time_bomb(*pages: Page, depth: int) -> bytes:
    """SCANNED with a form as its image: each form draws the next one ten times, and the last draws nothing."""
    objects = objects_of(list(pages))
    form = b"/Type /XObject /Subtype /Form /BBox [0 0 300 200] "
    chain = [
        stream(b" /I1 Do" * 10, form + b"/Resources << /XObject << /I1 %d 0 R >> >> " % (len(objects) + at))
        for at in range(1, depth + 1)
    ]
    objects[5] = chain[0]
    return assembled([*objects, *chain[1:], stream(b" n", form)])


def broken(seed: int) -> dict[str, bytes]:
    """Damaged documents by kind of damage; undamaged, they have the lines "first" and "second", one per page."""
    pages = [Page(text(b"first")), Page(text(b"second"))]
    draw = random.Random(seed)
    whole, objects = pdf(*pages), objects_of(pages)

    def with_object(number: int, content: bytes) -> bytes:
        return assembled([*objects[: number - 1], content, *objects[number:]])

    def noise(count: int) -> bytes:
        return bytes(draw.randrange(256) for _ in range(count))

    flipped = bytearray(whole)
    for _ in range(draw.randrange(1, 60)):
        flipped[draw.randrange(8, len(flipped))] ^= 1 << draw.randrange(8)
    leaf = b"<< /Type /Page /Parent 2 0 R /Contents 8 0 R /Resources << /Font << /F1 3 0 R >> >> >>"
    chain = [b"<< /Type /Pages /Kids [%d 0 R] /Count 1 >>" % (len(objects) + 2 + at) for at in range(3000)]
    return {
        "truncated": whole[: draw.randrange(9, len(whole))],
        "no xref": whole[: whole.rindex(b"xref\n0")] + noise(40),
        "wrong xref": whole.replace(b" 00000 n", b"7 0000 n"),
        "wrong startxref": whole[: whole.rindex(b"startxref")] + b"startxref\n%d\n%%%%EOF" % draw.randrange(10**12),
        "bits flipped": bytes(flipped),
        "noise in the middle": whole[:300] + noise(200) + whole[500:],
        "nothing but a header": b"%PDF-1.4\n" + noise(draw.randrange(2000)),
        "header alone": b"%PDF-",
        "a loop of pages": with_object(2, b"<< /Type /Pages /Kids [2 0 R 7 0 R 2 0 R] /Count 3 >>"),
        "a parent loop": with_object(7, b"<< /Type /Page /Parent 7 0 R /Contents 8 0 R >>"),
        "no MediaBox": with_object(7, leaf),
        "no pages": with_object(2, b"<< /Type /Pages /Kids [] /Count 0 >>"),
        "negative count": with_object(2, b"<< /Type /Pages /Kids [7 0 R 9 0 R] /Count -5 >>"),
        "huge count": with_object(2, b"<< /Type /Pages /Kids [7 0 R 9 0 R] /Count 9999 >>"),
        "absurd count": with_object(2, b"<< /Type /Pages /Kids [7 0 R 9 0 R] /Count 999999999999999999999 >>"),
        "kids are no pages": with_object(2, b"<< /Type /Pages /Kids [3 0 R (x) null 99 0 R] /Count 4 >>"),
        "a page is missing": with_object(2, b"<< /Type /Pages /Kids [7 0 R 99 0 R 9 0 R] /Count 3 >>"),
        "wrong lengths": whole.replace(b"/Length ", b"/Length 9"),
        "negative length": with_object(8, b"<< /Length -1 >>\nstream\n" + text(b"first") + b"\nendstream"),
        "length is itself": with_object(8, b"<< /Length 8 0 R >>\nstream\n" + text(b"first") + b"\nendstream"),
        "filter unknown": with_object(8, stream(text(b"first"), b"/Filter /Nonsense ")),
        "not deflated": with_object(8, stream(noise(100), b"/Filter /FlateDecode ")),
        "deep arrays": with_object(8, b"[" * 50_000 + b"]" * 50_000),
        "deep content": with_object(8, stream(b"[" * 50_000 + b" q" * 50_000 + text(b"first"))),
        "deep page tree": assembled([objects[0], chain[0], *objects[2:], *chain, leaf]),
        "draws itself": with_object(6, stream(b"/I1 Do", b"/Subtype /Form /Resources << /XObject << /I1 6 0 R >> >> ")),
        "no root": whole.replace(b"/Root 1 0 R", b""),
        "root is a page": whole.replace(b"/Root 1 0 R", b"/Root 7 0 R"),
    }
