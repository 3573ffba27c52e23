"""Image files to read, both valid ones and ones that no program would write."""

from __future__ import annotations

import io
import struct
import zlib

from PIL import Image, ImageChops

from l4ctx.documents.images import pixels_digest, read_image


def pattern(width: int = 37, height: int = 23, mode: str = "RGB") -> Image.Image:
    """An image with a distinct look in every corner."""
    shade = Image.linear_gradient("L")
    bands = [
        shade.resize((width, height)),
        shade.rotate(90).resize((width, height)),
        Image.radial_gradient("L").resize((width, height)),
    ]
    return Image.merge("RGB", bands).convert(mode)


def encoded(image: Image.Image, name: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, name, **options)
    return stream.getvalue()


def decoded(raw: bytes) -> Image.Image:
    """The image from `decode()`, checked against the size and digest found on first reading."""
    shown, _ = read_image("image", raw, None)
    image = shown.decode()
    assert image.mode == "RGB" and image.size == (shown.width, shown.height)
    assert shown.sha256 == pixels_digest(*image.size, image.tobytes())
    return image


def largest_difference(one: Image.Image, other: Image.Image) -> int:
    assert one.size == other.size and one.mode == other.mode == "RGB"
    return max(high for _, high in ImageChops.difference(one, other).getextrema() if isinstance(high, int))


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, depth: int, colour: int, rows: bytes, *more: bytes) -> bytes:
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(more) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def tiff(*entries: tuple[int, int, int, int], pixels: bytes = b"") -> bytes:
    """A little-endian TIFF file of one directory with these entries: tag, type, count, value."""
    directory = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return b"II*\0" + struct.pack("<I", 8) + directory + bytes(4) + pixels


SAMPLES: dict[str, bytes] = {
    "PNG": encoded(pattern(), "PNG"), "PNG RGBA": encoded(pattern(mode="RGBA"), "PNG"),
    "PNG P": encoded(pattern(mode="P"), "PNG", transparency=3),
    "PNG 16": encoded(pattern(mode="L").convert("I;16"), "PNG"),
    "PNG animated": encoded(pattern(), "PNG", save_all=True, append_images=[pattern(mode="L").convert("RGB")]),
    "JPEG": encoded(pattern(), "JPEG"), "JPEG CMYK": encoded(pattern(mode="CMYK"), "JPEG"),
    "JPEG progressive": encoded(pattern(), "JPEG", progressive=True),
    "WEBP": encoded(pattern(), "WEBP"), "WEBP lossless": encoded(pattern(mode="RGBA"), "WEBP", lossless=True),
    "TIFF": encoded(pattern(), "TIFF"), "TIFF LZW": encoded(pattern(), "TIFF", compression="tiff_lzw"),
    "TIFF deflate": encoded(pattern(mode="L"), "TIFF", compression="tiff_adobe_deflate"),
    "TIFF G4": encoded(pattern(mode="1"), "TIFF", compression="group4"), "TIFF F": encoded(pattern(mode="F"), "TIFF"),
    "BMP": encoded(pattern(), "BMP"), "BMP P": encoded(pattern(mode="P"), "BMP"),
    "GIF": encoded(pattern(), "GIF"),
    "GIF animated": encoded(pattern(mode="P"), "GIF", save_all=True, append_images=[pattern().rotate(180)] * 2),
}  # fmt: skip
