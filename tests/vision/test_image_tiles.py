"""Canvas, tiles and numbers against transformers' image processor; and the memory for them."""

from __future__ import annotations

import functools
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import Llama4ImageProcessor
from transformers.image_utils import SizeDict
from transformers.models.llama4 import image_processing_llama4 as reference

from l4ctx.checkpoint.image_processor import ImageProcessing
from l4ctx.documents.images import decoding_bytes, read_image
from l4ctx.vision.tiles import TileLayout, fitted_size, image_tiles, normalized, tile_layout

LLAMA4 = ImageProcessing()
OTHERS = [
    ImageProcessing(size=size, max_patches=most, resize_to_max_canvas=to_max)
    for size, most, to_max in ((28, 1, False), (56, 4, True), (28, 12, False), (56, 12, True), (28, 16, True))
]
MODES = ("L", "LA", "P", "RGB", "RGBA", "1", "I;16", "CMYK")


@functools.cache
def oracle(processing: ImageProcessing) -> Llama4ImageProcessor:
    return Llama4ImageProcessor(
        size={"height": processing.size, "width": processing.size},
        max_patches=processing.max_patches,
        resize_to_max_canvas=processing.resize_to_max_canvas,
    )


@functools.cache
def canvases(processing: ImageProcessing) -> torch.Tensor:
    side = SizeDict(height=processing.size, width=processing.size)
    return torch.tensor(reference.find_supported_resolutions(max_num_chunks=processing.max_patches, patch_size=side))


def any_side(rng: random.Random, size: int) -> int:
    kind = rng.randrange(4)
    if kind == 0:
        return rng.randint(1, 400)
    if kind == 1:
        return rng.randint(1, 6000)
    if kind == 2:
        return size // 4 * rng.randint(1, 80)  # where quotients are equal
    return int(2 ** rng.uniform(0, 20))


@pytest.mark.parametrize("processing", [LLAMA4, ImageProcessing(resize_to_max_canvas=True), *OTHERS])
def test_layouts_equal_those_of_transformers(processing: ImageProcessing) -> None:
    rng = random.Random(processing.size + processing.max_patches)
    for _ in range(120):
        width, height = any_side(rng, processing.size), any_side(rng, processing.size)
        layout = tile_layout(width, height, processing)
        best = reference.get_best_fit((height, width), canvases(processing), processing.resize_to_max_canvas)
        assert [side * processing.size for side in layout] == best.tolist(), (width, height)
        fitted = fitted_size(width, height, layout, processing)
        assert all(1 <= side <= most * processing.size for side, most in zip(fitted, layout[::-1], strict=True))


@pytest.mark.parametrize(
    ("size", "layout", "tiles"),
    [
        ((336, 336), (1, 1), 1),
        ((1, 1), (1, 1), 1),
        ((337, 336), (1, 2), 3),
        ((1344, 1344), (4, 4), 17),
        ((3000, 40), (1, 9), 10),
        ((1, 2**20), (16, 1), 17),
        ((2**20, 1), (1, 16), 17),
        ((672, 1008), (3, 2), 7),
    ],
)
def test_layouts_by_hand(size: tuple[int, int], layout: tuple[int, int], tiles: int) -> None:
    found = tile_layout(*size, LLAMA4)
    assert (found, found.tiles) == (TileLayout(*layout), tiles)


def test_a_layout_needs_neither_torch_nor_pillow() -> None:
    code = (
        "import sys\nfrom l4ctx.checkpoint.image_processor import ImageProcessing\n"
        "from l4ctx.vision.tiles import tile_layout\n"
        "import l4ctx.documents.images\nassert tile_layout(500, 400, ImageProcessing()).tiles == 5\n"
        "print(sorted({'torch', 'PIL', 'numpy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout == b"[]\n"


def drawn(rng: random.Random, width: int, height: int, mode: str) -> Image.Image:
    """Shapes with sharp edges, over a gradient and noise: what resizing could get wrong."""
    image = Image.effect_noise((width, height), 40).convert("RGB")
    slope = Image.linear_gradient("L").rotate(rng.choice((0, 90))).resize((width, height)).convert("RGB")
    image = Image.blend(image, slope, 0.5)
    for _ in range(5):
        left, top = rng.randrange(width), rng.randrange(height)
        colour = tuple(rng.randrange(256) for _ in range(3))
        image.paste(colour, (left, top, left + rng.randint(1, width), top + rng.randint(1, height)))
    if mode == "I;16":
        return Image.merge("L", [image.convert("L")]).convert("I").point(lambda value: value * 257).convert("I;16")
    if mode in ("RGBA", "LA"):
        image.putalpha(slope.convert("L"))
    return image.convert(mode)


def decoded(image: Image.Image, tmp_path: Path) -> Image.Image:
    """By way of a file."""
    file = tmp_path / "image"
    image.save(file, "TIFF" if image.mode == "CMYK" else "PNG")
    return read_image("image", file.read_bytes(), str(file))[0].decode()


def some_size(rng: random.Random, n: int) -> tuple[int, int]:
    if n < 4:
        return ((1, 1), (3000, 40), (40, 3000), (1, 700))[n]
    if n % 25 == 0:
        return rng.randint(300, 1600), rng.randint(300, 1600)
    return rng.randint(1, 330), rng.randint(1, 330)


@pytest.mark.slow
def test_tiles_equal_those_of_transformers(tmp_path: Path) -> None:
    """100 images; every fifth with the defaults, and the others with small tiles. Resizing differs by rounding."""
    rng = random.Random(4)
    averages, most = [], 0
    for n in range(100):
        processing = LLAMA4 if n % 5 == 0 or n < 4 else OTHERS[n % len(OTHERS)]
        image = decoded(drawn(rng, *some_size(rng, n), MODES[n % len(MODES)]), tmp_path)
        layout = tile_layout(*image.size, processing)
        ours = image_tiles(image, processing)
        assert ours.dtype == torch.uint8 and ours.shape == (layout.tiles, 3, processing.size, processing.size)
        theirs = oracle(processing)(image, return_tensors="pt", do_rescale=False, do_normalize=False)
        assert theirs["aspect_ratios"].tolist() == [list(layout)]
        difference = (ours.int() - theirs["pixel_values"].int()).abs()
        averages.append(difference.float().mean().item())
        most = max(most, int(difference.max()))
        assert averages[-1] <= 0.5 and difference.max() <= 2, (n, image.size, processing)
        whole = oracle(processing)(image, return_tensors="pt")["pixel_values"]
        assert (normalized(ours, processing, torch.float32) - whole.float()).abs().max() <= 2.1 * 2 / 255 + 2**-7
    assert sum(averages) / len(averages) < 0.05


def test_tiles_are_equal_where_nothing_is_resized() -> None:
    """Order of the tiles, black to the right and at the bottom, and the whole image last."""
    image = drawn(random.Random(1), 75, 50, "RGB")
    processing = ImageProcessing(size=28)
    tiles = image_tiles(image, processing)
    assert tile_layout(75, 50, processing) == (2, 3) and len(tiles) == 7
    canvas = Image.new("RGB", (84, 56))
    canvas.paste(image)
    for n in range(6):
        left, top = n % 3 * 28, n // 3 * 28
        expected = canvas.crop((left, top, left + 28, top + 28)).tobytes()
        assert tiles[n].permute(1, 2, 0).contiguous().flatten().tolist() == list(expected)
    whole = image.resize((28, 28), Image.Resampling.BILINEAR).tobytes()
    assert tiles[6].permute(1, 2, 0).contiguous().flatten().tolist() == list(whole)


def test_long_and_thin_images() -> None:
    """Resizing one takes little memory, at the cost of a rounding of its own."""
    for size in ((1, 100_000), (100_000, 1), (3, 2**20)):
        image = Image.linear_gradient("L").resize(size).convert("RGB")
        tiles = image_tiles(image, LLAMA4)
        assert len(tiles) == 17
        if size == (1, 100_000):
            direct = torch.tensor(list(image.resize((336, 336), Image.Resampling.BILINEAR).tobytes()))
            assert (tiles[16].permute(1, 2, 0).flatten().int() - direct).abs().max() <= 1


PROCESSINGS = [
    LLAMA4,
    ImageProcessing(image_mean=(0.48145466, 0.4578275, 0.40821073), image_std=(0.2686, 0.2613, 0.2758)),
    ImageProcessing(rescale_factor=1 / 127.5),
    ImageProcessing(do_normalize=False),
    ImageProcessing(do_normalize=False, do_rescale=False),
]


@pytest.mark.parametrize("processing", PROCESSINGS)
def test_numbers_equal_those_of_transformers_to_the_bit(processing: ImageProcessing) -> None:
    pixels = torch.arange(256, dtype=torch.uint8).repeat(9)[: 2 * 3 * 18 * 18 // 9 * 9]
    pixels = torch.cat([pixels, pixels.flip(0)])[: 2 * 3 * 18 * 18].view(2, 3, 18, 18)
    theirs = oracle(LLAMA4).rescale_and_normalize(
        pixels,
        processing.do_rescale,
        processing.rescale_factor,
        processing.do_normalize,
        list(processing.image_mean),
        list(processing.image_std),
    )
    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        ours = normalized(pixels, processing, dtype)
        assert ours.dtype == dtype and torch.equal(ours, theirs.to(dtype))
    assert pixels.dtype == torch.uint8


# Memory, in bytes beside the image and the interpreter. Each image has a fork of one process to itself.
MEASURE = """
import os, sys
from PIL import Image
from l4ctx.checkpoint.image_processor import ImageProcessing
from l4ctx.vision.tiles import image_tiles, tile_layout, tiling_bytes
def memory(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name)) * 1024
def measure(width, height, size, most, to_max, resample):
    processing = ImageProcessing(size, most, bool(to_max), resample=resample)
    image_tiles(Image.new("RGB", (70, 50)), ImageProcessing(size=28, resample=resample))  # the pages of its code
    image = Image.new("RGB", (width, height), (20, 40, 60))
    open("/proc/self/clear_refs", "w").write("5")
    before = memory("VmRSS")
    tiles = image_tiles(image, processing)
    layout = tile_layout(width, height, processing)
    print(*layout, memory("VmHWM") - before, tiling_bytes(layout, processing), tiles.nbytes, flush=True)
image_tiles(Image.new("RGB", (70, 50)), ImageProcessing(size=28))
for line in sys.stdin:
    if not os.fork():
        measure(*map(int, line.split()))
        os._exit(0)
    assert os.wait()[1] == 0
"""
MEASURED = [
    ((1344, 1344), (336, 16, False, 2), (4, 4)),
    ((900, 900), (336, 64, True, 3), (8, 8)),
    ((6000, 9000), (336, 64, True, 1), (9, 6)),
    ((1, 2**20), (336, 16, False, 1), (16, 1)),
    ((20, 30), (1344, 1, False, 2), (1, 1)),
]


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak is read from /proc")
def test_tiling_needs_no_more_than_it_says() -> None:
    asked = "".join(" ".join(str(int(n)) for n in (*size, *processing)) + "\n" for size, processing, _ in MEASURED)
    run = subprocess.run([sys.executable, "-c", MEASURE], input=asked, capture_output=True, text=True, check=True)
    for (size, processing, layout), line in zip(MEASURED, run.stdout.splitlines(), strict=True):
        check_tiling(size, processing, layout, line)


def check_tiling(
    size: tuple[int, int], processing: tuple[int, int, bool, int], layout: tuple[int, int], line: str
) -> None:
    rows, columns, peak, expected, tiles = map(int, line.split())
    assert (rows, columns) == layout
    if size[0] <= columns * processing[0] and max(size) < 2**16:
        assert tiles < peak <= expected < 2 * peak + (18 << 20), peak / tiles
    assert tiles < peak <= expected + decoding_bytes(*size) - 4 * size[0] * size[1], peak / tiles
