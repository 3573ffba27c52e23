"""Image files: recognised by content, checked, and decoded upright to RGB.

Pillow is imported when the first image is read. Colour profiles are ignored, as in Meta's reference.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
import re
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from l4ctx.documents.tiff import ORIENTATION, TIFF_PREFIXES, TILE_LENGTH, TILE_WIDTH, TiffDirectory
from l4ctx.errors import MEMORY, InputError
from l4ctx.formatting import human_bytes, only_printable
from l4ctx.machine.files import read_regular_file
from l4ctx.machine.memory import available_memory

if TYPE_CHECKING:
    from PIL import Image


_MOST_PAGES = 10_000  # of a TIFF; further ones are not counted

FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF")  # Pillow's names; no other decoder ever runs
MAX_PIXELS = 2**27  # of one image; some 134 million, 2 GiB at the peak of decoding
MAX_SIDE = 2**20  # in pixels: an image that long and thin shows nothing, and resizing it would need much memory

_BMP_HEADERS = (12, 40, 52, 56, 64, 108, 124)  # the sizes that exist; a text that begins with BM has none of them
_UPRIGHT = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}  # EXIF orientation -> the PIL.Image.Transpose that undoes it
_SHADES = [(value + 128) // 257 for value in range(1 << 16)]  # 16 bits to 8, rounded
_SURELY_FREE = 2**28  # bytes; less needs no look at the free memory
_BAND = 1 << 20  # bytes of RGB that are hashed at once
_MOST_REASON = 100  # characters of Pillow's own words

_warnings_lock = threading.Lock()


class ImageError(InputError):
    """An image cannot be used; the message is the reason in one line."""


class ImageMemoryError(ImageError):
    """Not enough memory to decode an image."""

    exit_code = MEMORY


@dataclass(frozen=True)
class DocumentImage:
    """One image that can be decoded.

    `source` is the name to show; `width` and `height`, in pixels, are those of the upright image; `sha256` is the
    `pixels_digest` of what it shows: the same pixels are the same image, whatever file they come from. `decode()`
    decodes anew at each call, to mode RGB of exactly that size, and keeps nothing; it raises ImageError, the source
    named, where the pixels are no longer those. `memory` is how many bytes that may take at its peak.
    """

    source: str
    sha256: str
    width: int
    height: int
    decode: Callable[[], Image.Image]
    memory: int


def image_format(raw: bytes) -> str | None:
    """Which of FORMATS these bytes begin as, if any; without Pillow, from the first 18 bytes."""
    if raw.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if raw.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if raw.startswith((b"GIF87a", b"GIF89a")):
        return "GIF"
    if raw.startswith(b"RIFF") and raw[8:12] == b"WEBP":
        return "WEBP"
    if raw.startswith(TIFF_PREFIXES):
        return "TIFF"
    if raw.startswith(b"BM") and int.from_bytes(raw[14:18], "little") in _BMP_HEADERS:
        return "BMP"
    return None


def read_image(source: str, raw: bytes, path: str | None) -> tuple[DocumentImage, list[str]]:
    """An image from the bytes of a file, and what to know about it (one line each).

    Decodes once, in full, to be sure that it can be. With `path` later calls of `decode()` read the file again;
    without, `raw` is kept. Raises ImageError with a reason that does not name the source.
    """
    image, notes = _decoded(raw)
    (width, height), digest = image.size, _image_digest(image)
    del image

    memory = decoding_bytes(width, height) + len(raw)

    def again() -> Image.Image:
        return _decoded_again(source, digest, raw if path is None else _read_again(source, path))

    if path is not None:
        raw = b""  # `again` does not hold on to it
    return DocumentImage(source, digest, width, height, again, memory), notes


def pixels_digest(width: int, height: int, rgb: bytes | memoryview) -> str:
    """SHA-256, in hexadecimal, of the size in pixels and the RGB bytes, row by row from the top."""
    digest = _digest_of_size(width, height)
    digest.update(rgb)
    return digest.hexdigest()


def decoding_bytes(width: int, height: int) -> int:
    """Bytes that `decode()` of an upright image of this size needs at its peak, at most, beside the file's own.

    Pillow holds RGB and RGBA in 4 bytes a pixel. The most is needed by animated WebP: two canvases, a copy, and the
    image (16 bytes a pixel); then by TIFF in a single strip of 16-bit RGBA, by transparency (4, and 4 for the
    result), and by 32-bit shades (4, 4, 1 and 4). Codecs' own buffers are in the constant part.
    """
    return 16 * width * height + (32 << 20)


def _digest_of_size(width: int, height: int) -> hashlib._Hash:
    return hashlib.sha256(f"{width} x {height}\n".encode("ascii"))


def _image_digest(image: Image.Image) -> str:
    """`pixels_digest` of an image of mode RGB, without all of its bytes at once."""
    width, height = image.size
    digest, rows = _digest_of_size(width, height), max(_BAND // (3 * width), 1)
    for top in range(0, height, rows):
        digest.update(image.crop((0, top, width, min(top + rows, height))).tobytes())
    return digest.hexdigest()


def _read_again(source: str, path: str) -> bytes:
    try:
        return read_regular_file(path)[0]  # changed meanwhile or not: the pixels will tell
    except FileNotFoundError:
        raise ImageError(f"{source}: vanished since it was first read") from None
    except OSError as error:
        raise ImageError(f"{source}: cannot be read again: {error.strerror}") from None


def _decoded_again(source: str, digest: str, raw: bytes) -> Image.Image:
    try:
        image = _decoded(raw)[0]
    except ImageMemoryError as error:
        raise ImageMemoryError(f"{source}: {error}") from None
    except ImageError as error:
        raise ImageError(f"{source}: changed since it was first read: {error}") from None
    if _image_digest(image) != digest:
        raise ImageError(f"{source}: changed since it was first read")
    return image


def _decoded(raw: bytes) -> tuple[Image.Image, list[str]]:
    """The upright image in mode RGB, and notes. Raises ImageError."""
    name = image_format(raw)
    if name is None:
        raise ImageError(f"not an image in a format that can be read ({', '.join(FORMATS)})")
    pages = _tiff_pages(raw) if name == "TIFF" else 1
    with _only_image_errors(name), _without_libtiff_messages(name):
        from PIL import Image

        with Image.open(io.BytesIO(raw), formats=[name]) as image:
            _check_size(*image.size)
            _check_memory(*image.size)
            image.load()
            _check_size(*image.size)  # a frame of a GIF may exceed what its header declares
            notes = []
            if pages > 1:
                more = "more than " if pages > _MOST_PAGES else ""
                notes.append(f"a TIFF of {more}{min(pages, _MOST_PAGES):,} pages: the first is read")
            rgb = _on_white(_in_eight_bits(image, notes))
            if name != "TIFF" and (undo := _UPRIGHT.get(_orientation(image))):  # with TIFF, Pillow has done it
                rgb = rgb.transpose(Image.Transpose[undo])
            if rgb is image:
                rgb = image.copy()  # without what the decoder holds on to
            if (frames := _frames(image, name)) > 1:
                notes.append(f"animated: the first of {frames:,} frames is read")
    rgb.info.clear()  # the orientation that has been applied, among others
    return rgb, notes


def _frames(image: Image.Image, name: str) -> int:
    """Frames of an animation; 1 where those after the first are damaged. What `image` has decoded is dropped for it.

    JPEG counts as one: phones hide previews and depths behind the one image.
    """
    with suppress(Exception):  # as in _only_image_errors
        return int(getattr(image, "n_frames", 1)) if name in ("GIF", "PNG", "WEBP") else 1
    return 1


@contextmanager
def _only_image_errors(name: str) -> Iterator[None]:
    """Whatever Pillow raises for malformed input becomes an ImageError; its warnings are dropped.

    Warnings are filtered for the whole process (Python's filters are), hence by one thread at a time: images are
    decoded one after another.
    """
    with _warnings_lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except ImageError:
            raise
        except Exception as error:  # Pillow's decoders raise some twenty kinds for malformed input
            if isinstance(error, MemoryError) or str(error).startswith("out of memory"):  # some decoders' OSError
                raise ImageMemoryError("decoding it needs more memory than there is (scale it down)") from None
            raise ImageError(_reason(name, error)) from None


@contextmanager
def _without_libtiff_messages(name: str) -> Iterator[None]:
    """libtiff prints what is wrong with a TIFF, page by page, on the standard error output: closed to it meanwhile."""
    try:
        kept = os.dup(2) if name == "TIFF" else None
    except OSError:  # there is no such output
        kept = None
    if kept is None:
        yield
        return
    try:
        sys.stderr.flush()
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _reason(name: str, error: Exception) -> str:
    """In one printable line, the same for the same bytes."""
    kind, text = type(error).__name__, " ".join(str(error).split())
    if kind == "DecompressionBombError":  # Pillow's own limit, before the size is known
        pixels = re.search(r"\d+", text)
        return _too_large(f"{int(pixels.group()):,} pixels" if pixels else "its size")
    if kind == "UnidentifiedImageError" or not text or " at 0x" in text:
        return f"damaged, or a kind of {name} that cannot be read"
    if "truncated" in text.lower() or isinstance(error, EOFError):
        return f"damaged: the {name} file is cut short"
    return f"damaged, or a kind of {name} that cannot be read ({only_printable(text, '?')[:_MOST_REASON]})"


def _check_size(width: int, height: int) -> None:
    if width < 1 or height < 1:
        raise ImageError(f"damaged: it has no pixels ({width} x {height})")
    if width * height > MAX_PIXELS:
        raise ImageError(_too_large(f"{width:,} x {height:,} pixels"))
    if max(width, height) > MAX_SIDE:
        raise ImageError(f"{width:,} x {height:,} pixels: a side may have {MAX_SIDE:,} at most (scale it down)")


def _check_memory(width: int, height: int) -> None:
    """Raises ImageMemoryError before it is allocated: under overcommit too much would be a kill."""
    needed = decoding_bytes(width, height)
    if needed < _SURELY_FREE:
        return
    free = available_memory()
    if free is not None and needed > free:
        raise ImageMemoryError(
            f"decoding its {width:,} x {height:,} pixels can take {human_bytes(needed)}, but "
            f"{human_bytes(free)} is free (scale it down)"
        )


def _too_large(size: str) -> str:
    return f"too large: {size}, and {MAX_PIXELS:,} pixels is the most (scale it down)"


def _on_white(image: Image.Image) -> Image.Image:
    """Mode RGB, white behind what is transparent."""
    from PIL import Image

    if not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB")
    coloured = image if image.mode == "RGBA" else image.convert("RGBA")
    white = Image.new("RGB", image.size, (255, 255, 255))
    white.paste(coloured, mask=coloured)
    return white


def _in_eight_bits(image: Image.Image, notes: list[str]) -> Image.Image:
    """Shades of 16 bits divided by 257, those of 32 bits and floats stretched from their own range; others as is."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        shades, transparent = _SHADES, image.info.get("transparency")
        if isinstance(transparent, int) and 0 <= transparent < len(shades):
            shades = [*shades[:transparent], 255, *shades[transparent + 1 :]]  # one shade stands for white paper
        wide = image if image.mode == "I" else image.convert("I")
        wide.info.pop("transparency", None)
        return wide.point(shades, "L")
    if image.mode not in ("I", "F"):
        return image
    low, high = (float(value) for value in image.getextrema() if isinstance(value, int | float))
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ImageError("its values are not all finite numbers")
    scale = 255 / (high - low) if high > low else 0.0
    offset = 0.5 - low * scale
    notes.append(f"32-bit values: {low:g} is shown as black, {high:g} as white")
    return image.point(lambda value: value * scale + offset).convert("L")


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 where there is none or it cannot be read.

    Pillow would decode all of EXIF for it, and the entries of a hostile file can claim any amount.
    """
    exif = image.info.get("exif")
    profile = image.info.get("Raw profile type exif")  # how ImageMagick stores it in PNG: hexadecimal, after a head
    if not isinstance(exif, bytes) and isinstance(profile, str):
        with suppress(ValueError):
            exif = bytes.fromhex("".join(profile.split("\n")[3:]))
    if not isinstance(exif, bytes):
        return 1
    directory = TiffDirectory.first(exif.removeprefix(b"Exif\0\0"))
    return 1 if directory is None else directory.numbers()[0].get(ORIENTATION, 1)


def _tiff_pages(raw: bytes) -> int:
    """The number of pages, at most _MOST_PAGES + 1. Raises ImageError where the first claims more than the file or
    the limits hold."""
    directory = TiffDirectory.first(raw)
    if directory is None:
        raise ImageError("damaged: the TIFF file is cut short")
    tags, claimed = directory.numbers()
    if claimed > len(raw):
        raise ImageError("damaged: its TIFF tags claim more bytes than the file has")
    if tags.get(TILE_WIDTH, 0) * tags.get(TILE_LENGTH, 0) > MAX_PIXELS:
        raise ImageError("damaged: its TIFF tiles are larger than an image may be")
    seen: set[int] = set()
    while directory is not None and directory.offset not in seen and len(seen) <= _MOST_PAGES:
        seen.add(directory.offset)
        directory = directory.following()
    return len(seen)
