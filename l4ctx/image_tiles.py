"""An image becomes the square tiles that the vision tower sees: choice of the canvas, resizing, numbers.

Files and decoding are left to `l4ctx.images`, the tokens that stand for tiles to `l4ctx.image_tokens`. The layout
alone needs neither torch nor Pillow.
"""

from __future__ import annotations

import functools
import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch
    from PIL import Image
    from torch import Tensor

MOST_TILES = 256  # Llama 4 has 16
_RESAMPLE_NAMES = {0: "NEAREST", 1: "LANCZOS", 2: "BILINEAR", 3: "BICUBIC"}  # Pillow's numbers
_WIDEST_DETOUR = 1 << 22  # pixels between the two passes of a resize, where these are more than the image's own


class ImageProcessingError(Exception):
    """A checkpoint's image processing that cannot be followed: the file, the field, and what is accepted."""


@dataclass(frozen=True)
class ImageProcessing:
    """How images are cut up and turned into numbers; the fields are those of `preprocessor_config.json`.

    `size`: side of a tile in pixels. `max_patches`: tiles of the largest canvas. `resample`: Pillow's number.
    `image_mean` and `image_std`: of red, green and blue, after rescaling.
    """

    size: int = 336
    max_patches: int = 16
    resize_to_max_canvas: bool = False
    image_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    image_std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    rescale_factor: float = 1 / 255
    do_rescale: bool = True
    do_normalize: bool = True
    resample: int = 2

    @classmethod
    def from_folder(cls, folder: Path, image_size: int) -> ImageProcessing:
        """What a checkpoint says, with Llama 4's values for all that it does not say.

        Read from "image_processor" in `processor_config.json`, as transformers 5 writes it, else from
        `preprocessor_config.json`. `image_size`: what the vision tower expects, in pixels. Raises
        ImageProcessingError.
        """
        file = folder / "processor_config.json"
        content = _read_json(file).get("image_processor")
        if content is None:
            file = folder / "preprocessor_config.json"
            content = _read_json(file)
        if not isinstance(content, dict):
            raise ImageProcessingError(f"{file}: image_processor is not an object")
        return _Fields(file, content).processing(image_size)


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
    scales = [(min(_quotient(rows * processing.size, height), _quotient(columns * processing.size, width)),
               TileLayout(rows, columns)) for rows, columns in _canvases(processing.max_patches)]
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
    from PIL import Image

    size, layout = processing.size, tile_layout(*image.size, processing)
    canvas = Image.new("RGB", (layout.columns * size, layout.rows * size))
    canvas.paste(_resized(image, fitted_size(*image.size, layout, processing), processing))
    tiles = _pixels(canvas).view(3, layout.rows, size, layout.columns, size)
    tiles = tiles.permute(1, 3, 0, 2, 4).reshape(-1, 3, size, size)
    if len(tiles) == 1:
        return tiles
    import torch

    return torch.cat([tiles, _pixels(_resized(image, (size, size), processing))[None]])


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
    mean, std = (torch.tensor(values, dtype=torch.bfloat16, device=tiles.device).view(3, 1, 1)
                 for values in (processing.image_mean, processing.image_std))
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

    method = Image.Resampling(processing.resample)
    if image.width < size[0] and size[0] * image.height > _WIDEST_DETOUR:
        image = image.resize((image.width, size[1]), method)
    return image.resize(size, method)


def _pixels(image: Image.Image) -> Tensor:
    """uint8 of shape (3, height, width)."""
    import torch

    flat = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return flat.view(image.height, image.width, 3).permute(2, 0, 1).contiguous()


def _read_json(file: Path) -> dict[str, Any]:
    """The object in a file of the checkpoint; empty where there is no such file."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise ImageProcessingError(f"{file}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise ImageProcessingError(f"{file}: is not JSON") from None
    if not isinstance(content, dict):
        raise ImageProcessingError(f"{file}: holds no JSON object")
    return content


class _Fields:
    """The fields of a file, read one by one: absent or null is the default, anything unfit is refused by name."""

    def __init__(self, file: Path, content: Mapping[str, Any]) -> None:
        self._file = file
        self._content = content

    def processing(self, image_size: int) -> ImageProcessing:
        default = ImageProcessing()
        if not self._flag("do_resize", True):
            raise self._refused("do_resize", "true (images are always resized to tiles)")
        do_rescale, do_normalize = self._flag("do_rescale", True), self._flag("do_normalize", True)
        if do_normalize and not do_rescale:
            raise self._refused("do_rescale", "true where do_normalize is true")
        std = self._three("image_std", default.image_std)
        if 0 in std:
            raise self._refused("image_std", "numbers other than 0")
        return ImageProcessing(
            size=self._size(image_size),
            max_patches=self._whole("max_patches", default.max_patches, range(1, MOST_TILES + 1)),
            resize_to_max_canvas=self._flag("resize_to_max_canvas", default.resize_to_max_canvas),
            image_mean=self._three("image_mean", default.image_mean),
            image_std=std,
            rescale_factor=self._number("rescale_factor", default.rescale_factor),
            do_rescale=do_rescale,
            do_normalize=do_normalize,
            resample=self._resample(default.resample),
        )

    def _get(self, name: str, default: Any) -> Any:
        value = self._content.get(name)
        return default if value is None else value

    def _refused(self, name: str, accepted: str) -> ImageProcessingError:
        shown = json.dumps(self._content.get(name))
        return ImageProcessingError(f"{self._file}: {name} is {shown[:60]}; it has to be {accepted}")

    def _flag(self, name: str, default: bool) -> bool:
        value = self._get(name, default)
        if not isinstance(value, bool):
            raise self._refused(name, "true or false")
        return value

    def _whole(self, name: str, default: int, accepted: range) -> int:
        value = self._get(name, default)
        if type(value) is not int or value not in accepted:
            raise self._refused(name, f"a whole number from {accepted[0]} to {accepted[-1]}")
        return value

    def _number(self, name: str, default: float) -> float:
        value = self._get(name, default)
        if not _is_number(value):
            raise self._refused(name, "a number")
        return float(value)

    def _three(self, name: str, default: tuple[float, float, float]) -> tuple[float, float, float]:
        """Of red, green and blue; a single number stands for all three."""
        value = self._get(name, default)
        values = [value] * 3 if _is_number(value) else value
        if not isinstance(values, list | tuple) or len(values) != 3 or not all(map(_is_number, values)):
            raise self._refused(name, "three numbers")
        red, green, blue = map(float, values)
        return red, green, blue

    def _resample(self, default: int) -> int:
        value = self._get("resample", default)
        if type(value) is not int or value not in _RESAMPLE_NAMES:
            known = ", ".join(f"{number} ({name.lower()})" for number, name in _RESAMPLE_NAMES.items())
            raise self._refused("resample", f"one of {known}")
        return value

    def _size(self, image_size: int) -> int:
        value = self._get("size", image_size)
        sides = [value.get("height"), value.get("width")] if isinstance(value, dict) else [value, value]
        if any(type(side) is not int or side != image_size for side in sides):
            raise self._refused("size", f"{image_size} x {image_size}, the vision tower's image_size")
        return image_size


def _is_number(value: object) -> bool:
    """A finite number that float32 can hold."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= 3e38
