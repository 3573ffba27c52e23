"""Image files: formats, modes, orientations, reading them again, and the memory for it."""

from __future__ import annotations

import hashlib
import io
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image, ImageFile, ImageOps

from l4ctx.documents import images
from l4ctx.documents.images import (
    FORMATS,
    ImageError,
    ImageMemoryError,
    decoding_bytes,
    image_format,
    pixels_digest,
    read_image,
)
from support.image_files import SAMPLES, chunk, decoded, encoded, largest_difference, pattern, png


@pytest.mark.parametrize("name", SAMPLES)
def test_formats_are_recognised_and_decoded_as_pillow_does(name: str) -> None:
    raw = SAMPLES[name]
    assert image_format(raw) == name.split()[0] in FORMATS
    if name not in ("PNG RGBA", "PNG P", "PNG 16", "WEBP lossless", "TIFF F"):
        assert largest_difference(decoded(raw), Image.open(io.BytesIO(raw)).convert("RGB")) == 0


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"BM",
        b"BMW builds cars and has done so for long.",
        b"RIFF\0\0\0\0WAVEfmt ",
        b"%PDF-1.7",
        b"II",
        b"<svg/>",
        b"GIF90a",
        b"\0\0\0\x20ftypavif",
        b"P6 1 1 255 abc",
        b"\x89PNG\n",
    ],
)
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
        (0, 1, 255, 2, 3, 4)
    )


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
    damaged = [
        b"",
        b"II",
        b"II*\0\xff\xff\xff\xff" + bytes(9),
        b"II*\0\x08\0\0\0\xff\xff" + bytes(20),
        b"Exif\0\0MM\0*",
    ]
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
    assert shown.memory == decoding_bytes(37, 23) + file.stat().st_size
    one, other = shown.decode(), shown.decode()
    assert one is not other and largest_difference(one, other) == largest_difference(one, pattern()) == 0
    assert len(SAMPLES["PNG"]) not in [
        len(cell.cell_contents) for cell in shown.decode.__closure__ or () if isinstance(cell.cell_contents, bytes)
    ]
    for same in (encoded(pattern(), "BMP"), SAMPLES["PNG"] + b"more", SAMPLES["PNG"]):
        file.write_bytes(same)
        assert largest_difference(shown.decode(), pattern()) == 0
    changed = r"^chart\.jpg: changed since it was first read"
    for other in (pattern().rotate(180), pattern().transpose(Image.Transpose.ROTATE_90), pattern(38)):
        file.write_bytes(encoded(other, "PNG"))
        with pytest.raises(ImageError, match=rf"{changed}$"):
            shown.decode()
    for damaged, reason in ((SAMPLES["PNG"][:300], "damaged: the PNG file is cut short"), (b"text", "not an image")):
        file.write_bytes(damaged)
        with pytest.raises(ImageError, match=f"{changed}: {reason}"):
            shown.decode()
    file.unlink()
    with pytest.raises(ImageError, match=r"^chart\.jpg: vanished since it was first read$"):
        shown.decode()
    os.mkfifo(file)
    with pytest.raises(ImageError, match=r"^chart\.jpg: cannot be read again: became a named pipe$"):
        shown.decode()


def test_what_is_written_to_while_it_is_read_needs_the_right_pixels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown, _ = read_image("chart", SAMPLES["PNG"], str(tmp_path / "chart"))
    monkeypatch.setattr(images, "read_regular_file", lambda path: (SAMPLES["PNG"], True))
    assert largest_difference(shown.decode(), pattern()) == 0
    monkeypatch.setattr(images, "read_regular_file", lambda path: (SAMPLES["GIF"], True))
    with pytest.raises(ImageError, match=r"^chart: changed since it was first read$"):
        shown.decode()


def test_digests_are_those_of_the_pixels() -> None:
    two = Image.frombytes("RGB", (2, 1), bytes(range(6)))
    expected = hashlib.sha256(b"2 x 1\n" + bytes(range(6))).hexdigest()
    assert pixels_digest(2, 1, bytes(range(6))) == pixels_digest(2, 1, memoryview(bytearray(range(6)))) == expected
    exif = Image.Exif()
    exif[0x0112] = 3
    turned = two.transpose(Image.Transpose.ROTATE_180)
    for raw in (encoded(two, "PNG"), encoded(two, "BMP"), encoded(turned, "TIFF", exif=exif)):
        assert read_image("x", raw, None)[0].sha256 == expected
    assert pixels_digest(1, 2, bytes(range(6))) != expected != pixels_digest(2, 1, bytes(6))
    for size in ((700, 600), (400_000, 2), (1, 400_000)):  # several bands of rows
        image = Image.effect_noise(size, 90).convert("RGB")
        assert read_image("x", encoded(image, "BMP"), None)[0].sha256 == pixels_digest(*size, image.tobytes())


def test_without_a_path_the_bytes_are_kept() -> None:
    shown, _ = read_image("stdin", SAMPLES["GIF"], None)
    assert largest_difference(shown.decode(), shown.decode()) == 0


def test_what_does_not_fit_into_memory_is_refused_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = encoded(Image.new("L", (6000, 4000)), "PNG")
    monkeypatch.setattr(images, "available_memory", lambda: 400 << 20)
    assert read_image("image", raw, None)[0].width == 6000
    monkeypatch.setattr(images, "available_memory", lambda: 300 << 20)
    with pytest.raises(ImageMemoryError, match=r"^decoding its 6,000 x 4,000 pixels can take 398 MiB") as refused:
        read_image("image", raw, None)
    assert "300 MiB is free (scale it down)" in str(refused.value)
    monkeypatch.setattr(images, "available_memory", lambda: None)
    shown = read_image("image", raw, None)[0]
    assert shown.width == 6000
    monkeypatch.setattr(images, "available_memory", lambda: 300 << 20)
    with pytest.raises(ImageMemoryError, match=r"^image: decoding its 6,000 x 4,000 pixels can take 398 MiB"):
        shown.decode()


@pytest.mark.parametrize("error", [MemoryError(), OSError("out of memory when reading image file")])
def test_running_out_of_memory_is_an_error_of_its_own(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Image.Image) -> None:
        raise error

    monkeypatch.setattr(ImageFile.ImageFile, "load", fail)
    with pytest.raises(ImageMemoryError, match=r"^decoding it needs more memory than there is \(scale it down\)$"):
        read_image("image", SAMPLES["PNG"], None)


# Memory, in bytes beside the file and the interpreter.
MEASURE = """
import sys
from l4ctx.documents.images import read_image, decoding_bytes
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
@pytest.mark.parametrize(
    ("mode", "name", "options"),
    [
        ("RGBA", "WEBP", {"lossless": True, "quality": 0, "method": 0}),
        ("RGBA", "TIFF", {"compression": "tiff_lzw"}),
        ("RGBA", "PNG", {}),
        ("F", "TIFF", {}),
        ("CMYK", "JPEG", {"progressive": True}),
    ],
)
def test_decoding_needs_no_more_than_it_says(tmp_path: Path, mode: str, name: str, options: dict[str, object]) -> None:
    image = Image.new(mode, (4000, 3000), 99.0 if mode == "F" else (20, 40, 60, 128))
    (tmp_path / "image").write_bytes(encoded(image, name, **options))
    (tmp_path / "small").write_bytes(encoded(image.crop((0, 0, 9, 9)), name, **options))
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "image"), str(tmp_path / "small")]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    peak, width, height = map(int, run.stdout.split())
    assert (width, height) == (4000, 3000)
    assert 4 * width * height < peak <= decoding_bytes(width, height), peak / width / height
