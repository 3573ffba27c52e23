"""Image files that are damaged, or made to do damage."""

from __future__ import annotations

import random
import struct
import time
import warnings
from collections.abc import Callable

import pytest
from PIL import Image

from l4ctx.documents.images import MAX_PIXELS, MAX_SIDE, ImageError, read_image
from support.image_files import SAMPLES, chunk, decoded, encoded, largest_difference, pattern, png, tiff


@pytest.mark.parametrize("name", [name for name in SAMPLES if name not in ("BMP P", "GIF animated", "PNG animated")])
def test_truncated_images_are_refused(name: str) -> None:
    raw = SAMPLES[name]
    with pytest.raises(ImageError, match=r"^damaged"):
        read_image("x", raw[: len(raw) * 6 // 10], None)


def pixels_declared(name: str, width: int, height: int) -> bytes:
    """A small file that says that it holds an image of this size."""
    if name == "PNG":
        return png(width, height, 8, 2, b"\0" * 100)
    if name == "TIFF":
        return tiff(
            (256, 4, 1, width),
            (257, 4, 1, height),
            (258, 3, 1, 8),
            (259, 3, 1, 1),
            (262, 3, 1, 1),
            (273, 4, 1, 120),
            (277, 3, 1, 1),
            (278, 4, 1, height),
            (279, 4, 1, 4),
            pixels=bytes(32),
        )
    if name == "GIF":
        return b"GIF89a" + struct.pack("<HH", width, height) + SAMPLES["GIF"][10:]
    if name == "BMP":
        head = struct.pack("<IIIIiiHHIIiiII", 200, 0, 54, 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
        return b"BM" + head + bytes(99)
    raw = bytearray(SAMPLES["JPEG"])
    frame = raw.index(b"\xff\xc0")
    raw[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    return bytes(raw)


@pytest.mark.parametrize("name", ["PNG", "TIFF", "GIF", "BMP", "JPEG"])
@pytest.mark.parametrize(("width", "height"), [(60000, 60000), (12000, 12000), (65535, 2049)])
def test_bombs_are_refused_before_they_are_decoded(name: str, width: int, height: int) -> None:
    assert width * height > MAX_PIXELS
    with pytest.raises(ImageError, match=r"^too large: .* pixels, and 134,217,728 pixels is the most") as raised:
        read_image("x", pixels_declared(name, width, height), None)
    assert f"{width:,} x {height:,}" in str(raised.value) or f"{width * height:,}" in str(raised.value)
    assert Image.MAX_IMAGE_PIXELS is not None and len(str(raised.value)) < 120


def test_long_and_thin() -> None:
    assert decoded(png(1, 100_000, 8, 0, b"\0\x40" * 100_000)).size == (1, 100_000)
    assert decoded(png(100_000, 1, 8, 0, b"\0" + b"\x40" * 100_000)).size == (100_000, 1)
    with pytest.raises(ImageError, match="a side may have 1,048,576 at most"):
        read_image("x", png(1, MAX_SIDE + 1, 8, 0, b"\0"), None)


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (
            tiff((256, 3, 1, 4), (257, 3, 1, 4), (270, 2, 2**31, 8), pixels=bytes(64)),
            "tags claim more bytes than the file",
        ),
        (tiff(*[(1000 + n, 1, 600, 0) for n in range(900)]), "tags claim more bytes than the file"),
        (tiff((256, 3, 1, 4), (257, 3, 1, 4), (322, 4, 1, 2**20), (323, 4, 1, 2**20)), "tiles are larger"),
        (b"II*\0\x08\0\0\0\xff\xff" + bytes(40), "cut short"),
        (b"II*\0\xf0\xff\xff\xff" + bytes(40), "cut short"),
        (b"MM\0+\0\x08\0\0" + b"\xff" * 40, "cut short"),
        (b"II*\0", "cut short"),
        (png(0, 5, 8, 0, b"\0"), "damaged"),
        (png(2, 2, 8, 0, b"\0\1"), "cut short"),
        (png(2, 2, 3, 0, b"\0\1"), "damaged"),
        (b"\x89PNG\r\n\x1a\n" + chunk(b"\x1b[2J", b""), "damaged"),
    ],
)
def test_hostile_headers(raw: bytes, reason: str) -> None:
    with pytest.raises(ImageError, match=reason) as raised:
        read_image("x", raw, None)
    assert str(raised.value).isprintable()


def directories(count: int) -> bytes:
    """A TIFF of one page, and a chain of directories without entries after it."""
    raw = bytearray(encoded(pattern(), "TIFF"))
    (first,) = struct.unpack_from("<I", raw, 4)
    (entries,) = struct.unpack_from("<H", raw, first)
    start = len(raw)
    struct.pack_into("<I", raw, first + 2 + 12 * entries, start)
    return bytes(raw) + b"".join(struct.pack("<HI", 0, start + 6 * n) for n in range(1, count)) + bytes(8)


def test_endless_chains_of_pages_are_not_followed() -> None:
    assert read_image("x", directories(9_999), None)[1] == ["a TIFF of 10,000 pages: the first is read"]
    raw = directories(1_400_000)
    began = time.perf_counter()
    shown, notes = read_image("x", raw, None)
    assert time.perf_counter() - began < 1
    assert notes == ["a TIFF of more than 10,000 pages: the first is read"]
    assert (shown.width, shown.height) == pattern().size


def test_pages_that_go_round_in_a_circle_end() -> None:
    raw = bytearray(encoded(pattern(), "TIFF"))
    (first,) = struct.unpack_from("<I", raw, 4)
    (count,) = struct.unpack_from("<H", raw, first)
    struct.pack_into("<I", raw, first + 2 + 12 * count, first)
    assert largest_difference(decoded(bytes(raw)), pattern()) == 0


Mutation = Callable[[bytearray, random.Random], None]


def flip(raw: bytearray, rng: random.Random) -> None:
    for _ in range(rng.randint(1, 12)):
        raw[rng.randrange(len(raw))] ^= rng.randrange(1, 256)


def flip_early(raw: bytearray, rng: random.Random) -> None:
    for _ in range(rng.randint(1, 4)):
        raw[rng.randrange(6, min(len(raw), 120))] = rng.choice((0, 1, 0x1B, 0x7F, 0x80, 0xFF))


def truncate(raw: bytearray, rng: random.Random) -> None:
    del raw[rng.randrange(8, len(raw)) :]


def splice(raw: bytearray, rng: random.Random) -> None:
    at, start = rng.randrange(len(raw)), rng.randrange(len(raw))
    raw[at:at] = raw[start : start + rng.randint(1, 200)]


def zero(raw: bytearray, rng: random.Random) -> None:
    start = rng.randrange(8, len(raw))
    stop = min(len(raw), start + rng.randint(1, 200))
    raw[start:stop] = bytes(stop - start)


def resize(raw: bytearray, rng: random.Random) -> None:
    """Another number wherever the width or the height may be declared."""
    for width in {37, 23, 36, 22}:
        for form in ("<H", ">H", "<I", ">I"):
            found = raw.find(struct.pack(form, width))
            if found >= 0 and rng.random() < 0.3:
                struct.pack_into(form, raw, found, rng.choice((0, 1, 24, 5000, 0x7FFF, 0xFFFF)))


@pytest.mark.parametrize("mutate", [flip, flip_early, truncate, splice, zero, resize])
def test_damaged_images_decode_or_are_refused(mutate: Mutation, capfd: pytest.CaptureFixture[str]) -> None:
    """An image of the size it says, or ImageError; never anything else, on any stream."""
    rng = random.Random(mutate.__name__)
    names = list(SAMPLES)
    reasons: list[str] = []
    for n in range(3 * len(SAMPLES)):
        raw = bytearray(SAMPLES[names[n % len(names)]])
        mutate(raw, rng)
        try:
            decoded(bytes(raw))
        except ImageError as error:
            reasons.append(str(error))
    assert len(reasons) >= 3 and all(reason and reason.isprintable() and len(reason) < 180 for reason in reasons)
    assert not any("0x" in reason or "<_io" in reason for reason in reasons)
    assert capfd.readouterr() == ("", "")


def test_warning_filters_are_left_as_they_were() -> None:
    before = list(warnings.filters)
    decoded(SAMPLES["PNG P"])
    with pytest.raises(ImageError):
        read_image("x", b"II*\0", None)
    assert list(warnings.filters) == before
