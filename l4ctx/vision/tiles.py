"""Image preprocessing: choosing a canvas, resizing, cutting into square tiles, normalizing.

Computing a layout needs neither torch nor Pillow.
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

_WIDEST_DETOUR = 1 << 22  # most pixels between the two passes of a resize, where that is more than the image itself


class TileLayout(NamedTuple):
    """A canvas of `rows` x `columns` tiles."""

    rows: int
    columns: int

    @property
    def tiles(self) -> int:
        """Number of tiles that the model sees: if more than one, a thumbnail of the whole image is added at the end."""
        return self.rows * self.columns + (self.rows * self.columns > 1)


def tile_layout(width: int, height: int, processing: ImageProcessing) -> TileLayout:
    """The canvas for an image of `width` x `height` pixels.

    The smallest upscaling that fits, or else the smallest downscaling; ties go to the fewest tiles, then to the first
    in the order of Meta's and transformers' lists. With `resize_to_max_canvas`, the largest upscaling. Scales are
    compared as float32 quotients, as in both references.
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
    """Tiles of an RGB image in row-major order, followed by a thumbnail of the whole image if there are several.

    Returns uint8 (tiles, 3, size, size), where tiles is `tile_layout(...).tiles`. The image keeps its aspect ratio
    (the square thumbnail does not) and is placed at the top left of a black canvas; no side shrinks below 1 pixel.
    Equal to Meta's reference (meta-llama/llama-models, models/llama4/preprocess.py), which resizes with Pillow and
    computes sizes in float64; transformers resizes with torch's interpolation, whose bytes differ by 1 here and there,
    and rounds some sizes from float32.
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
    """Upper bound on the peak memory of `image_tiles` besides the image, in bytes.

    First the resized image, at Pillow's 4 bytes a pixel, and the intermediate image between the two passes of a resize;
    then the resized image, the tiles, and copies of one of them. If the width shrinks, the intermediate image may be
    larger: 4 bytes times the image's rows times the canvas's columns, less than the image itself. That, and Pillow's
    tables for very long sides, is not included: `l4ctx.documents.images.decoding_bytes` covers it, since at most a
    quarter of that is still allocated by then.
    """
    tile, resized = 3 * processing.size**2, 4 * layout.rows * layout.columns * processing.size**2
    return max(resized, 4 * _WIDEST_DETOUR) + max(resized, tile * (layout.tiles + 5))


def normalized(tiles: Tensor, processing: ImageProcessing, dtype: torch.dtype) -> Tensor:
    """uint8 pixels (n, 3, size, size) -> the vision tower's input: `(pixel * rescale_factor - mean) / std`.

    Computed in bfloat16, bit for bit as in transformers' `rescale_and_normalize`, then cast to `dtype`.
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

    Without `resize_to_max_canvas`, an image is upscaled only until its longer side fills one tile.
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
    """Rows and columns of all canvases in the references' order: grouped by aspect ratio, largest canvas first."""
    by_proportion: dict[float, list[tuple[int, int]]] = {}
    for tiles in range(max_patches, 0, -1):
        for rows in range(1, tiles + 1):
            if tiles % rows == 0:
                by_proportion.setdefault(rows * rows / tiles, []).append((rows, tiles // rows))
    return tuple(canvas for canvases in by_proportion.values() for canvas in canvases)


def _quotient(dividend: int, divisor: int) -> float:
    """A float32 division: operands and result are rounded; dividing in float64 in between changes nothing."""
    return _float32(_float32(dividend) / _float32(divisor))


def _float32(value: float) -> float:
    rounded: float = struct.unpack("f", struct.pack("f", value))[0]
    return rounded


def _resized(image: Image.Image, size: tuple[int, int], processing: ImageProcessing) -> Image.Image:
    """`image` resized to this width and height. Pillow resizes the width first, which for a narrow image with very many
    rows would take far more memory than the image, so such an image has its height resized first."""
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
