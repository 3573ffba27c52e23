"""An image becomes the square tiles that the vision tower sees: choice of the canvas, resizing, numbers.

Files and decoding are left to `l4ctx.documents.images`, what a checkpoint asks for to
`l4ctx.checkpoint.image_processor`, the tokens that stand for tiles to `l4ctx.vision.tokens`. The layout alone needs
neither torch nor Pillow.
"""

from __future__ import annotations

import functools
import math
import struct
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch
    from PIL import Image
    from torch import Tensor

    from l4ctx.checkpoint.image_processor import ImageProcessing

_WIDEST_DETOUR = 1 << 22  # pixels between the two passes of a resize, where these are more than the image's own


class TileLayout(NamedTuple):
    """A canvas of `rows` x `columns` tiles."""

    rows: int
    columns: int

    @property
    def tiles(self) -> int:
        """Tiles that the model sees: with more than one, the whole image in a single tile is added at the end."""
        return self.rows * self.columns + (self.rows * self.columns > 1)


def tile_layout(width: int, height: int, processing: ImageProcessing) -> TileLayout:
    """The canvas for an image of `width` x `height` pixels.

    The least enlargement that fits, or else the least reduction; of equals the fewest tiles; of these the first in
    the order of Meta's and transformers' lists. With `resize_to_max_canvas`: the greatest enlargement. Scales are
    compared as float32 quotients, as both references do.
    """
    scales = [
        (
            min(_quotient(rows * processing.size, height), _quotient(columns * processing.size, width)),
            TileLayout(rows, columns),
        )
        for rows, columns in _canvases(processing.max_patches)
    ]
    enlarging = [scale for scale, _ in scales if scale >= 1]
    if enlarging:
        best = max(enlarging) if processing.resize_to_max_canvas else min(enlarging)
    else:
        best = max(scale for scale, _ in scales)
    return min((layout for scale, layout in scales if scale == best), key=lambda layout: layout.rows * layout.columns)


def image_tiles(image: Image.Image, processing: ImageProcessing) -> Tensor:
    """The tiles of an image of mode RGB, row by row, then the whole image as one if there are several.

    Returns uint8 of shape (tiles, 3, size, size), tiles being `tile_layout(...).tiles`. The image keeps its
    proportions (the last tile, a square, does not) and lies in the top left corner of a black canvas; a side that
    would vanish keeps 1 pixel. Equal to Meta's reference (meta-llama/llama-models, models/llama4/preprocess.py),
    which resizes with Pillow and computes sizes in float64; transformers resizes with torch's interpolation, whose
    bytes differ by 1 here and there, and rounds some sizes from float32.
    """
    import torch
    from PIL import Image

    size, layout = processing.size, tile_layout(*image.size, processing)
    resized = _resized(image, fitted_size(*image.size, layout, processing), processing)
    tiles = torch.empty(layout.tiles, 3, size, size, dtype=torch.uint8)
    for n in range(layout.rows * layout.columns):
        top, left = n // layout.columns * size, n % layout.columns * size
        tile = Image.new("RGB", (size, size))
        tile.paste(resized, (-left, -top))
        tiles[n] = _pixels(tile)
    del resized
    if layout.tiles > 1:
        tiles[-1] = _pixels(_resized(image, (size, size), processing))
    return tiles


def tiling_bytes(layout: TileLayout, processing: ImageProcessing) -> int:
    """Bytes that `image_tiles` needs at its peak, at most, beside the image.

    First the resized image, in Pillow's 4 bytes a pixel, and what lies between the two passes of resizing; then the
    resized image, the tiles, and copies of one of them. Where the width is reduced, what lies between the passes may be
    larger: 4 bytes for each of the image's rows and the canvas's columns, less than the image has itself. That and
    tables of Pillow's, for very long sides, are not in it: `l4ctx.documents.images.decoding_bytes` has room for them,
    since at most a quarter of that is still held by then.
    """
    tile, resized = 3 * processing.size**2, 4 * layout.rows * layout.columns * processing.size**2
    return max(resized, 4 * _WIDEST_DETOUR) + max(resized, tile * (layout.tiles + 5))


def normalized(tiles: Tensor, processing: ImageProcessing, dtype: torch.dtype) -> Tensor:
    """Pixels (n, 3, size, size) of uint8 as what the vision tower takes: `(pixel * rescale_factor - mean) / std`.

    Computed in bfloat16 as transformers' `rescale_and_normalize` does, to the bit, then cast to `dtype`.
    """
    import torch

    if not processing.do_rescale:
        assert not processing.do_normalize, "neither reference normalizes pixels that it has not rescaled"
        return tiles.to(dtype)
    if not processing.do_normalize:
        return (tiles * processing.rescale_factor).to(dtype)
    mean, std = (
        torch.tensor(values, dtype=torch.bfloat16, device=tiles.device).view(3, 1, 1)
        for values in (processing.image_mean, processing.image_std)
    )
    return (tiles.to(torch.bfloat16) * processing.rescale_factor).sub_(mean).div_(std).to(dtype)


def fitted_size(width: int, height: int, layout: TileLayout, processing: ImageProcessing) -> tuple[int, int]:
    """Width and height, in pixels, that an image is resized to on its canvas.

    Unless `resize_to_max_canvas`, an image is enlarged only until its longer side fills one tile.
    """
    most_width, most_height = layout.columns * processing.size, layout.rows * processing.size
    if not processing.resize_to_max_canvas:
        most_width = min(max(width, processing.size), most_width)
        most_height = min(max(height, processing.size), most_height)
    across, down = most_width / width, most_height / height
    if across < down:
        return most_width, max(min(math.floor(height * across), most_height), 1)
    return max(min(math.floor(width * down), most_width), 1), most_height


@functools.cache
def _canvases(max_patches: int) -> tuple[tuple[int, int], ...]:
    """Rows and columns of all canvases, in the order of the references: by proportion, as met from the largest on."""
    by_proportion: dict[float, list[tuple[int, int]]] = {}
    for tiles in range(max_patches, 0, -1):
        for rows in range(1, tiles + 1):
            if tiles % rows == 0:
                by_proportion.setdefault(rows * rows / tiles, []).append((rows, tiles // rows))
    return tuple(canvas for canvases in by_proportion.values() for canvas in canvases)


def _quotient(dividend: int, divisor: int) -> float:
    """What float32 tensors give: both sides and the result rounded; the float64 in between changes nothing."""
    return _float32(_float32(dividend) / _float32(divisor))


def _float32(value: float) -> float:
    rounded: float = struct.unpack("f", struct.pack("f", value))[0]
    return rounded


def _resized(image: Image.Image, size: tuple[int, int], processing: ImageProcessing) -> Image.Image:
    """`image` with this width and height. Pillow resizes the width first, which for an image of a few columns and
    very many rows would take far more memory than the image: its height goes first."""
    from PIL import Image

    if image.size == size:
        return image
    method = Image.Resampling(processing.resample)
    if image.width < size[0] and size[0] * image.height > _WIDEST_DETOUR:
        image = image.resize((image.width, size[1]), method)
    return image.resize(size, method)


def _pixels(image: Image.Image) -> Tensor:
    """uint8 of shape (3, height, width)."""
    import torch

    flat = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return flat.view(image.height, image.width, 3).permute(2, 0, 1)
