"""Image files: formats, modes, orientations, and whatever an untrusted file may hold."""

from __future__ import annotations

import hashlib
import io
import os
import random
import struct
import subprocess
import sys
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image, ImageChops, ImageOps

from l4ctx import images
from l4ctx.images import FORMATS, MAX_PIXELS, MAX_SIDE, ImageError, decoding_bytes, image_format, read_image


def pattern(width: int = 37, height: int = 23, mode: str = "RGB") -> Image.Image:
    """Something with a distinct look at every corner."""
    shade = Image.linear_gradient("L")
    bands = [shade.resize((width, height)), shade.rotate(90).resize((width, height)),
             Image.radial_gradient("L").resize((width, height))]
    return Image.merge("RGB", bands).convert(mode)


def encoded(image: Image.Image, name: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, name, **options)
    return stream.getvalue()


def decoded(raw: bytes) -> Image.Image:
    """By `decode()`, which has to agree with what was found at first."""
    shown, _ = read_image("image", raw, None)
    image = shown.decode()
    assert image.mode == "RGB" and image.size == (shown.width, shown.height)
    assert shown.sha256 == hashlib.sha256(raw).hexdigest()
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
    """Little-endian, of one directory with these entries: tag, type, count, value."""
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


@pytest.mark.parametrize("name", SAMPLES)
def test_formats_are_recognised_and_decoded_as_pillow_does(name: str) -> None:
    raw = SAMPLES[name]
    assert image_format(raw) == name.split()[0] in FORMATS
    if name not in ("PNG RGBA", "PNG P", "PNG 16", "WEBP lossless", "TIFF F"):
        assert largest_difference(decoded(raw), Image.open(io.BytesIO(raw)).convert("RGB")) == 0


@pytest.mark.parametrize("raw", [
    b"", b"BM", b"BMW builds cars and has done so for long.", b"RIFF\0\0\0\0WAVEfmt ", b"%PDF-1.7", b"II", b"<svg/>",
    b"GIF90a", b"\0\0\0\x20ftypavif", b"P6 1 1 255 abc", b"\x89PNG\n"])
def test_what_is_no_image(raw: bytes) -> None:
    assert image_format(raw) is None
    with pytest.raises(ImageError, match=r"^not an image in a format that can be read \(PNG, JPEG"):
        read_image("x", raw, None)


def test_transparent_becomes_white() -> None:
    colour = pattern()
    for mode, kind in (("RGBA", "PNG"), ("RGBA", "WEBP"), ("RGBA", "TIFF"), ("LA", "PNG"), ("PA", "TIFF")):
        shown = pattern(mode="L").convert("RGB") if mode == "LA" else colour
        faded = shown.convert("RGBA")
        faded.putalpha(pattern(mode="L"))
        image = faded.convert(mode)
        paper = Image.new("RGBA", image.size, "white")
        expected = Image.alpha_composite(paper, image.convert("RGBA")).convert("RGB")
        raw = encoded(image, kind, **({"lossless": True, "exact": True} if kind == "WEBP" else {}))
        assert largest_difference(decoded(raw), expected) <= 2, (mode, kind)


def test_single_transparent_colours_become_white() -> None:
    two = Image.new("RGB", (2, 1), (10, 20, 30))
    two.putpixel((1, 0), (200, 20, 30))
    assert decoded(encoded(two, "PNG", transparency=(200, 20, 30))).tobytes() == b"\x0a\x14\x1e\xff\xff\xff"
    grey = two.convert("L")
    assert decoded(encoded(grey, "PNG", transparency=grey.getpixel((1, 0)))).getpixel((1, 0)) == (255, 255, 255)
    assert decoded(png(2, 1, 1, 0, b"\0\x40", chunk(b"tRNS", b"\0\0"))).tobytes() == b"\xff" * 6
    palette = two.quantize(2)
    for kind in ("PNG", "GIF"):
        shown = decoded(encoded(palette, kind, transparency=palette.getpixel((1, 0))))
        assert shown.getpixel((1, 0)) == (255, 255, 255) != shown.getpixel((0, 0))
    half = bytearray(b"\xff\xff")
    half[palette.getpixel((1, 0))] = 128
    red, green, blue = decoded(encoded(palette, "PNG", transparency=bytes(half))).getpixel((1, 0))
    assert (abs(red - 227), abs(green - 137), abs(blue - 142)) <= (1, 1, 1)


def test_sixteen_bit_shades_are_scaled_not_clipped() -> None:
    values = [0, 128, 129, 257, 1000, 32768, 65406, 65407, 65535]
    expected = bytes(shade for value in values for shade in [round(value / 257)] * 3)
    rows = b"\0" + struct.pack(">9H", *values)
    assert decoded(png(9, 1, 16, 0, rows)).tobytes() == expected
    see_through = decoded(png(9, 1, 16, 0, rows, chunk(b"tRNS", struct.pack(">H", 1000)))).tobytes()
    assert see_through == expected[:12] + b"\xff\xff\xff" + expected[15:]
    for order, name in (("<", "I;16"), (">", "I;16B")):
        image = Image.frombytes(name, (9, 1), struct.pack(f"{order}9H", *values))
        assert decoded(encoded(image, "TIFF")).tobytes() == expected
    assert decoded(png(2, 1, 16, 2, b"\0" + struct.pack(">6H", 0, 257, 65535, 514, 771, 1028))).tobytes() == bytes(
        (0, 1, 255, 2, 3, 4))


@pytest.mark.parametrize("mode", ["I", "F"])
def test_wide_values_are_shown_from_their_own_range(mode: str) -> None:
    image = Image.new(mode, (3, 1))
    for x, value in enumerate((-1000, 500, 2000)):
        image.putpixel((x, 0), value)
    shown, notes = read_image("x", encoded(image, "TIFF"), None)
    assert shown.decode().tobytes() == bytes([0] * 3 + [128] * 3 + [255] * 3)
    assert notes == ["32-bit values: -1000 is shown as black, 2000 as white"]
    assert set(decoded(encoded(Image.new(mode, (2, 2), 7), "TIFF")).tobytes()) == {0}
    if mode == "F":
        image.putpixel((1, 0), float("inf"))
        with pytest.raises(ImageError, match="not all finite"):
            decoded(encoded(image, "TIFF"))


def test_other_modes() -> None:
    expected = pattern(mode="CMYK").convert("RGB")
    assert largest_difference(decoded(encoded(pattern(mode="CMYK"), "TIFF")), expected) == 0
    raw = encoded(pattern(mode="LAB"), "TIFF")
    assert largest_difference(decoded(raw), pattern(mode="LAB").convert("RGB")) == 0
    muted = pattern().point(lambda value: 96 + value // 4)
    assert largest_difference(decoded(encoded(muted.convert("LAB"), "TIFF")), muted) <= 8
    jpeg = encoded(pattern(mode="YCbCr"), "JPEG", quality=100, subsampling=0)
    assert largest_difference(decoded(jpeg), pattern()) <= 8
    assert set(decoded(encoded(pattern(mode="1"), "PNG")).tobytes()) == {0, 255}


@pytest.mark.parametrize("name", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_upright(name: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if name == "WEBP" else {"quality": 100} if name == "JPEG" else {}
    for endian in ("<", ">"):
        exif.endian = endian
        raw = encoded(pattern(), name, exif=exif, **options)
        upright = ImageOps.exif_transpose(Image.open(io.BytesIO(raw))).convert("RGB")
        assert upright.size == ((37, 23) if orientation < 5 else (23, 37))
        shown = decoded(raw)
        assert largest_difference(shown, upright) == 0 and not shown.getexif()


def test_odd_orientations() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    profile = exif.tobytes().hex()
    text = chunk(b"tEXt", b"Raw profile type exif\0\nexif\n      %d\n%s\n" % (len(profile) // 2, profile.encode()))
    assert decoded(png(2, 1, 8, 0, b"\0\1\2", text)).size == (1, 2)
    damaged = [b"", b"II", b"II*\0\xff\xff\xff\xff" + bytes(9), b"II*\0\x08\0\0\0\xff\xff" + bytes(20),
               b"Exif\0\0MM\0*"]
    huge = b"II*\0\x08\0\0\0\x01\0" + struct.pack("<HHII", 0x0112, 3, 2**32 - 1, 2**32 - 1) + bytes(8)
    wrong = b"II*\0\x08\0\0\0\x01\0" + struct.pack("<HHII", 0x0112, 3, 1, 9) + bytes(8)
    for content in [*damaged, huge, wrong]:
        assert decoded(png(2, 1, 8, 0, b"\0\1\2", chunk(b"eXIf", content))).size == (2, 1)


def test_of_several_frames_the_first_is_read_and_that_is_said() -> None:
    frames = [Image.new("RGB", (5, 4), colour) for colour in ("red", "lime", "blue")]
    for name in ("GIF", "WEBP", "PNG"):
        raw = encoded(frames[0], name, save_all=True, append_images=frames[1:], lossless=True)
        shown, notes = read_image("x", raw, None)
        assert notes == ["animated: the first of 3 frames is read"]
        assert shown.decode().getpixel((2, 2)) == (255, 0, 0)
    raw = encoded(frames[0], "TIFF", save_all=True, append_images=frames[1:])
    shown, notes = read_image("x", raw, None)
    assert notes == ["a TIFF of 3 pages: the first is read"] and shown.decode().getpixel((2, 2)) == (255, 0, 0)
    assert read_image("x", encoded(frames[0], "TIFF", big_tiff=True), None)[1] == []
    raw = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decoded(raw[: raw.rindex(b"\0;") - 4]).getpixel((2, 2)) == (255, 0, 0)  # cut off in the last frame


def test_a_file_is_read_again_and_has_to_be_the_same(tmp_path: Path) -> None:
    file = tmp_path / "chart.jpg"  # which it is not
    file.write_bytes(SAMPLES["PNG"])
    shown, notes = read_image("chart.jpg", file.read_bytes(), str(file))
    assert (shown.source, shown.width, shown.height, notes) == ("chart.jpg", 37, 23, [])
    one, other = shown.decode(), shown.decode()
    assert one is not other and largest_difference(one, other) == largest_difference(one, pattern()) == 0
    assert len(SAMPLES["PNG"]) not in [len(cell.cell_contents) for cell in shown.decode.__closure__ or ()
                                       if isinstance(cell.cell_contents, bytes)]
    file.write_bytes(SAMPLES["PNG RGBA"])
    with pytest.raises(ImageError, match=r"^chart\.jpg: changed since it was first read$"):
        shown.decode()
    file.unlink()
    with pytest.raises(ImageError, match=r"^chart\.jpg: vanished since it was first read$"):
        shown.decode()
    os.mkfifo(file)
    with pytest.raises(ImageError, match=r"^chart\.jpg: cannot be read again: became a named pipe$"):
        shown.decode()


def test_without_a_path_the_bytes_are_kept() -> None:
    shown, _ = read_image("stdin", SAMPLES["GIF"], None)
    assert largest_difference(shown.decode(), shown.decode()) == 0


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
        return tiff((256, 4, 1, width), (257, 4, 1, height), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1),
                    (273, 4, 1, 120), (277, 3, 1, 1), (278, 4, 1, height), (279, 4, 1, 4), pixels=bytes(32))
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


def test_what_does_not_fit_into_memory_is_refused_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = encoded(Image.new("L", (6000, 4000)), "PNG")
    monkeypatch.setattr(images, "available_memory", lambda: 400 << 20)
    assert read_image("image", raw, None)[0].width == 6000
    monkeypatch.setattr(images, "available_memory", lambda: 300 << 20)
    with pytest.raises(ImageError, match=r"^decoding its 6,000 x 4,000 pixels can take 398 MiB") as refused:
        read_image("image", raw, None)
    assert "300 MiB are free (scale it down)" in str(refused.value)
    monkeypatch.setattr(images, "available_memory", lambda: None)
    assert read_image("image", raw, None)[0].width == 6000


def test_long_and_thin() -> None:
    assert decoded(png(1, 100_000, 8, 0, b"\0\x40" * 100_000)).size == (1, 100_000)
    assert decoded(png(100_000, 1, 8, 0, b"\0" + b"\x40" * 100_000)).size == (100_000, 1)
    with pytest.raises(ImageError, match="a side may have 1,048,576 at most"):
        read_image("x", png(1, MAX_SIDE + 1, 8, 0, b"\0"), None)


@pytest.mark.parametrize(("raw", "reason"), [
    (tiff((256, 3, 1, 4), (257, 3, 1, 4), (270, 2, 2**31, 8), pixels=bytes(64)),
     "tags claim more bytes than the file"),
    (tiff(*[(1000 + n, 1, 600, 0) for n in range(900)]), "tags claim more bytes than the file"),
    (tiff((256, 3, 1, 4), (257, 3, 1, 4), (322, 4, 1, 2**20), (323, 4, 1, 2**20)), "tiles are larger"),
    (b"II*\0\x08\0\0\0\xff\xff" + bytes(40), "cut short"), (b"II*\0\xf0\xff\xff\xff" + bytes(40), "cut short"),
    (b"MM\0+\0\x08\0\0" + b"\xff" * 40, "cut short"), (b"II*\0", "cut short"),
    (png(0, 5, 8, 0, b"\0"), "damaged"), (png(2, 2, 8, 0, b"\0\1"), "cut short"),
    (png(2, 2, 3, 0, b"\0\1"), "damaged"),
    (b"\x89PNG\r\n\x1a\n" + chunk(b"\x1b[2J", b""), "damaged"),
])
def test_hostile_headers(raw: bytes, reason: str) -> None:
    with pytest.raises(ImageError, match=reason) as raised:
        read_image("x", raw, None)
    assert str(raised.value).isprintable()


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


# Memory, in bytes beside the file and the interpreter.
MEASURE = """
import sys
from l4ctx.images import read_image, decoding_bytes
from PIL import Image
Image.init()
read_image('x', open(sys.argv[2], 'rb').read(), None)
raw = open(sys.argv[1], "rb").read()
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024
before = peak()
shown, _ = read_image("x", raw, None)
print(peak() - before, shown.width, shown.height)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak is read from /proc")
@pytest.mark.parametrize(("mode", "name", "options"), [
    ("RGBA", "WEBP", {"lossless": True, "quality": 0, "method": 0}), ("RGBA", "TIFF", {"compression": "tiff_lzw"}),
    ("RGBA", "PNG", {}), ("F", "TIFF", {}), ("CMYK", "JPEG", {"progressive": True})])
def test_decoding_needs_no_more_than_it_says(
    tmp_path: Path, mode: str, name: str, options: dict[str, object]
) -> None:
    image = Image.new(mode, (4000, 3000), 99.0 if mode == "F" else (20, 40, 60, 128))
    (tmp_path / "image").write_bytes(encoded(image, name, **options))
    (tmp_path / "small").write_bytes(encoded(image.crop((0, 0, 9, 9)), name, **options))
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "image"), str(tmp_path / "small")]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    peak, width, height = map(int, run.stdout.split())
    assert (width, height) == (4000, 3000)
    assert 4 * width * height < peak <= decoding_bytes(width, height), peak / width / height
